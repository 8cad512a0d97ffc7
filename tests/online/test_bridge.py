"""Users whom the backfill has not reached: answered from their old state over a bridge, flagged, or not at all."""

from pathlib import Path

import numpy as np
import pytest

from model.bridge import Bridge, write_bridge
from model.release import Registry
from model.state_codec import as_stored
from online import guard
from online.client import Embedding, EmbedQuery, UserTowerClient
from online.registry import Follower
from tests.online.conftest import EVERY_CODEC, World
from tests.online.helpers import Rows, context_of, fresh_users, serving, stored_state

WIDTH = 16


def put_bridge(world: World, *, is_enabled: bool = True, width: int = WIDTH) -> Bridge:
    """From a's states to b's: halved, reversed and moved."""
    bridge = Bridge(np.eye(width, dtype=np.float32)[::-1] / 2, np.full(width, 0.25, np.float32))
    write_bridge(
        Registry(world.registry), bridge, np.ones((3, width), np.float32), from_release=world.a.release_id,
        to_release=world.b.release_id, is_enabled=is_enabled, study={}, counts={},
    )  # fmt: skip
    return bridge


def commit(world: World) -> None:
    for manifest in (world.a, world.b):
        Registry(world.registry).commit(manifest.release_id)


def ask(client: UserTowerClient, user: int, **options: bool | str) -> Embedding:
    (reply,) = client.embed_batch([EmbedQuery(user, context_of(user), **options)])  # type: ignore[arg-type]
    assert isinstance(reply, Embedding), reply
    return reply


@EVERY_CODEC
def test_an_old_state_goes_over_the_bridge(world: World, rows: Rows, redis_server: str) -> None:
    put_bridge(world)
    commit(world)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        reply = ask(client, user)
        assert (reply.answer, reply.reason, reply.release_id) == ("BRIDGED", "unknown_user", world.b.release_id)
        assert reply.embedding_version == world.b.embedding_version
        old = stored_state(user, world.a.state_version)
        by_hand = as_stored(rows.codec, old.state_D[None])[0][::-1] / 2 + np.float32(0.25)
        release = world.oracle.releases[world.b.release_id]
        wanted = release.embed(by_hand[None].copy(), [context_of(user)], [old.history_until_us])[0]
        np.testing.assert_allclose(reply.vector, wanted, atol=1e-5)
        assert reply.state_age_us > 0
        (strict,) = client.embed_batch([EmbedQuery(user, context_of(user), policy="strict")])
        assert not isinstance(strict, Embedding), "strict wants a state made for the release"
        assert ask(client, user, expected_embedding_version=world.a.embedding_version).answer == "PREVIOUS_RELEASE"
        rows.put_states(range(user, user + 1), world.b.state_version)
        assert ask(client, user).answer == "EXACT"
        assert ask(client, fresh_users()).answer == "COLD_START"


@pytest.mark.parametrize("why", ["off", "torn", "absent", "other way", "other width"])
def test_without_a_bridge_to_trust_it_is_a_cold_start(world: World, rows: Rows, redis_server: str, why: str) -> None:
    if why in ("off", "torn"):
        put_bridge(world, is_enabled=why != "off")
    if why == "torn":
        (path,) = Path(world.registry, "bridges").glob("*/bridge.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    if why == "other way":
        put_bridge(world)
    if why == "other width":
        put_bridge(world, width=WIDTH + 1)
    order = (world.b, world.a) if why == "other way" else (world.a, world.b)
    for manifest in order:
        Registry(world.registry).commit(manifest.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 1), order[0].state_version)
    with serving(world.registry, redis_server) as (_, client):
        reply = ask(client, user)
        assert (reply.answer, reply.release_id) == ("COLD_START", order[1].release_id)


def test_a_torn_bridge_is_counted(world: World) -> None:
    put_bridge(world)
    (path,) = Path(world.registry, "bridges").glob("*/bridge.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    commit(world)
    refused: list[tuple[str, str]] = []
    follower = Follower(Registry(world.registry), on_refusal=lambda name, kind: refused.append((name, kind)))
    follower.refresh()
    assert (world.b.release_id, "bridge") in refused
    assert follower.current is not None
    assert follower.current.serving.release_id == world.b.release_id


def test_a_damaged_old_row_does_not_cross(world: World, rows: Rows, redis_server: str) -> None:
    """The row that is to go over the bridge passes the same checks as any other."""
    put_bridge(world)
    commit(world)
    user = fresh_users()
    state = stored_state(user, world.a.state_version)
    state.state_D[3] = np.nan
    from tests.online.helpers import row_bytes

    rows.put(user, row_bytes(state))
    with serving(world.registry, redis_server) as (_, client):
        assert ask(client, user).answer == "COLD_START"


def test_a_bridge_between_other_versions_is_not_crossed(
    world: World, rows: Rows, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard looks at the bridge's own ends, whatever the loader paired it with."""
    put_bridge(world)
    commit(world)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    monkeypatch.setattr(guard, "bridge_matches", lambda crossing, resident: False)
    with serving(world.registry, redis_server) as (_, client):
        assert ask(client, user).answer == "COLD_START"


def test_the_ends_of_a_bridge() -> None:
    from types import SimpleNamespace

    ends = SimpleNamespace(from_state_version="old", to_state_version="new")
    stored = SimpleNamespace(manifest=ends)

    def matches(view: str, state: str) -> bool:
        crossing = SimpleNamespace(view=SimpleNamespace(state_version=view), stored=stored)
        return guard.bridge_matches(crossing, SimpleNamespace(state_version=state))  # type: ignore[arg-type]

    assert matches("old", "new")
    assert not matches("other", "new")
    assert not matches("old", "other")
