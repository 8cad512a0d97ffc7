"""Recommender/Retrieve on a real server: the best items by brute force, the rules of Embed, and its own refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model.item_index import write_snapshot
from model.records import Context
from model.release import Registry
from online import registry as following
from online.client import UserTowerClient
from online.servicer import RECOMMENDER, SERVICE
from tests.online.conftest import World
from tests.online.helpers import Rows, context_of, fresh_users, row_bytes, serving, stored_state, wait_until
from tests.releases import SMALL, make_description, make_release


def error_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_the_items_are_those_of_brute_force(world: World, rows: Rows, redis_server: str) -> None:
    """From both loaded releases, with and without a stored state; k up to more than there are."""
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    world.write_items(world.a, world.b)
    first = fresh_users()
    rows.put_states(range(first, first + 10), world.a.state_version, world.b.state_version)
    with serving(world.registry, redis_server) as (_, client):
        for user in range(first, first + 20):
            for manifest in (world.a, world.b):
                k = 1 + (user - first) * 3  # 1 to 58 of 50
                reply = client.retrieve(
                    user, context_of(user), k=k, expected_embedding_version=manifest.embedding_version
                )
                assert reply.release_id == manifest.release_id
                assert (reply.answer == "COLD_START") == (user >= first + 10)
                assert len(reply.item_ids) == min(k, 50)
                assert world.oracle.is_honest_retrieval(reply, user, k)


def test_the_embedding_is_that_of_embed(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        for asked in (user, user + 1):
            embedding, reply = client.embed(asked, context_of(asked)), client.retrieve(asked, context_of(asked), k=3)
            for name in ("answer", "reason", "release_id", "epoch", "state_version", "embedding_version"):
                assert getattr(embedding, name) == getattr(reply, name)
            assert abs(embedding.state_age_us - reply.state_age_us) < 60_000_000
            assert (embedding.state_age_us > 0) == (reply.state_age_us > 0) == (asked == user)
            assert reply.index_embedding_version == world.a.embedding_version
            table = world.oracle.releases[world.a.release_id].item_table
            assert table is not None
            rows_found = [item_id - 10 for item_id in reply.item_ids if isinstance(item_id, int)]
            np.testing.assert_allclose(table[rows_found].numpy() @ embedding.vector, reply.scores, atol=1e-6)


def test_how_many(world: World, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a)
    user = fresh_users()
    with serving(world.registry, redis_server) as (_, client):
        assert [len(client.retrieve(user, k=k).item_ids) for k in (0, 1, 49, 1000)] == [50, 1, 49, 50]
        for k in (-1, 1001):
            status, message = error_of(lambda k=k: client.retrieve(user, k=k))
            assert status is grpc.StatusCode.INVALID_ARGUMENT
            assert message == f"k: wanted 1 to 1000, or 0 for 100, got {k}"


def test_string_ids(tmp_path: Path, rows: Rows, redis_server: str) -> None:
    manifest = make_release(tmp_path, seed=8, description=make_description(ids="string"))
    registry = Registry(tmp_path)
    registry.commit(manifest.release_id)
    write_snapshot(registry, registry.load(manifest.release_id))
    rows.put("retrieving anna", row_bytes(stored_state(1, manifest.state_version)))
    with serving(tmp_path, redis_server) as (_, client):
        reply = client.retrieve("retrieving anna", Context(), k=50, policy="strict")
        assert sorted(map(str, reply.item_ids)) == [f"i{n}" for n in range(10, 60)]
        assert error_of(lambda: client.retrieve(7))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_the_rules_of_embed_hold(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    world.write_items(world.a, world.b)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        assert client.retrieve(user).answer == "COLD_START"
        assert error_of(lambda: client.retrieve(user, policy="strict"))[0] is grpc.StatusCode.FAILED_PRECONDITION
        reply = client.retrieve(user, context_of(user), k=9, policy="strict", accept_previous_release=True)
        assert (reply.release_id, reply.answer, reply.reason) == (
            world.a.release_id, "PREVIOUS_RELEASE", "unknown_user",
        )  # fmt: skip
        assert world.oracle.is_honest_retrieval(reply, user, 9)


def test_without_a_release_it_is_unavailable(world: World, redis_server: str) -> None:
    with serving(world.registry, redis_server) as (_, client):
        assert error_of(lambda: client.retrieve(1))[0] is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("policy", ["cold_start", "strict"])
def test_without_items_it_is_refused_and_names_what_there_is(
    world: World, rows: Rows, redis_server: str, policy: str
) -> None:
    """b serves without items, a before it with: only a caller that accepts a is answered, and from a alone."""
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    world.write_items(world.a)
    a, b = world.a.embedding_version, world.b.embedding_version
    there = f"loaded: {b} (serving, no items), {a} (previous, items of {a})"
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version, world.b.state_version)
    with serving(world.registry, redis_server) as (_, client):
        assert client.embed(user, policy="strict").release_id == world.b.release_id
        for expected, wanted in (("", b), (b, b), ("f" * 16, "f" * 16)):
            status, message = error_of(
                lambda expected=expected: client.retrieve(user, policy=policy, expected_embedding_version=expected)
            )
            assert status is grpc.StatusCode.FAILED_PRECONDITION
            assert message == f"no items of embedding_version {wanted!r} to search; {there}"
        for options in ({"expected_embedding_version": a}, {"accept_previous_release": True}):
            reply = client.retrieve(user, context_of(user), k=5, policy=policy, **options)  # type: ignore[arg-type]
            assert (reply.release_id, reply.answer, reply.reason) == (
                world.a.release_id, "PREVIOUS_RELEASE", "not_serving",
            )  # fmt: skip
            assert world.oracle.is_honest_retrieval(reply, user, 5)


def health_of(client: UserTowerClient, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def test_items_written_later_are_found(world: World, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_RETRY_AFTER_S", 0.05)
    Registry(world.registry).commit(world.a.release_id)
    status = health_pb2.HealthCheckResponse
    user = fresh_users()
    with serving(world.registry, redis_server) as (_, client):
        assert health_of(client, SERVICE) == status.SERVING
        assert health_of(client, RECOMMENDER) == status.NOT_SERVING
        assert error_of(lambda: client.retrieve(user))[0] is grpc.StatusCode.FAILED_PRECONDITION
        world.write_items(world.a)
        wait_until(lambda: health_of(client, RECOMMENDER) == status.SERVING)
        assert client.retrieve(user).epoch == 1


def test_a_release_with_live_item_features_embeds_and_refuses_to_retrieve(
    tmp_path: Path, rows: Rows, redis_server: str
) -> None:
    """The service does not count events, so it would rank by half of the score."""
    config = replace(SMALL, live_windows_h=(1.0, 24.0), live_dim=4)
    manifest = make_release(tmp_path, config=config)
    registry = Registry(tmp_path)
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    user = fresh_users()
    with serving(tmp_path, redis_server) as (_, client):
        context = context_of(user)
        vector = client.embed(user, context).vector
        np.testing.assert_allclose(vector, release.embed(release.cold_state[None], [context], [None])[0], atol=1e-5)
        assert vector.shape == (config.embedding_dim + 4,)
        code, details = error_of(lambda: client.retrieve(user, context, k=3))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details == "the release scores live item features, which this service does not hold yet"
