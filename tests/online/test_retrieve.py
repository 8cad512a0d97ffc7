"""Recommender/Retrieve on a real server: the best items by brute force, the rules of Embed, and its own refusals."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import redis
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model.dataset import DatasetDescription
from model.item_index import read_snapshot, write_snapshot
from model.records import Context
from model.release import Registry
from model.retrieval.rows import Deltas, ItemRows, Layout
from online import registry as following
from online.client import Rules, UserTowerClient
from online.item_feed import Deletion, pack, send, stream_key
from online.servicer import RECOMMENDER, SERVICE
from online.stream import append
from tests.online.conftest import World
from tests.online.helpers import Rows, context_of, fresh_users, row_bytes, serving, stored_state, wait_until
from tests.releases import SMALL, make_description, make_items, make_release


@pytest.fixture
def stream_of(redis_server: str) -> Iterator[Callable[[str], redis.Redis]]:
    """A client for the item updates of a version, whose stream is empty before and after."""
    keys = []
    with redis.Redis.from_url(redis_server, socket_timeout=5) as client:

        def clear(version: str) -> redis.Redis:
            keys.extend((stream_key(version), f"{stream_key(version)}:number"))
            client.delete(*keys)
            return client

        yield clear
        client.delete(*keys)


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


def test_without_wishes_the_answer_is_that_of_the_snapshot(world: World, redis_server: str) -> None:
    """Items, their order and, on the CPU to the bit, their scores are those of an exact search of the snapshot."""
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a)
    snapshot = read_snapshot(Registry(world.registry), world.a.embedding_version)
    with serving(world.registry, redis_server) as (_, client):
        for user in range(fresh_users(), fresh_users(), 9_000):
            for k in (1, 10, 50):
                reply, vector = (
                    client.retrieve(user, context_of(user), k=k),
                    client.embed(user, context_of(user)).vector,
                )
                found = snapshot.search(vector[None], k)
                assert reply.item_ids == snapshot.item_ids.take(found.row_BK[0]).to_pylist()
                atol = 1e-6 if torch.cuda.is_available() else 0.0
                np.testing.assert_allclose(reply.scores, found.score_BK[0], rtol=0, atol=atol)
                assert reply.index_revision == 1


def rows_of(version: str, items: dict[int, float], **columns: Any) -> ItemRows:
    """Items whose embeddings are all of one number."""
    embeddings = [[value] * SMALL.embedding_dim for value in items.values()]
    return ItemRows.build(version, Layout(embedding_dim=SMALL.embedding_dim), list(items), embeddings, **columns)


def test_updates_are_seen_by_their_own_version_alone(
    world: World, redis_server: str, stream_of: Callable[[str], redis.Redis]
) -> None:
    """One update before the server starts, the others while it runs; both loaded releases have their own items."""
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    world.write_items(world.a, world.b)
    a, b = world.a.embedding_version, world.b.embedding_version
    client_of_a = stream_of(a)
    stream_of(b)
    send(client_of_a, Deletion(a, list(range(10, 58))))
    user = fresh_users()

    def items(version: str) -> set[Any]:
        return set(client.retrieve(user, k=60, expected_embedding_version=version).item_ids)

    with serving(world.registry, redis_server) as (server, client):
        assert items(a) == {58, 59}, "caught up before the first request"
        assert items(b) == set(range(10, 60))
        send(client_of_a, rows_of(a, {900: 0.5, 58: 0.1}))
        wait_until(lambda: items(a) == {58, 59, 900})
        for update in (rows_of(b, {1: 1.0}), Deltas(a, [900], eligible_R=torch.tensor([False]))):
            kind, data = pack(update)
            append(client_of_a, stream_key(a), {"kind": kind, "data": data})
        wait_until(lambda: items(a) == {58, 59})
        assert items(b) == set(range(10, 60))
        sample = server.metrics.registry.get_sample_value
        figures = {
            name: sample(name, {"embedding_version": a})
            for name in ("tower_index_updates_total", "tower_index_updates_refused_total", "tower_index_revision")
        }
        assert list(figures.values()) == [3, 1, 4]
        assert sample("tower_index_items", {"release": world.a.release_id}) == 3
        lag_s = sample("tower_index_lag_seconds", {"embedding_version": a})
        assert lag_s is not None
        assert 0 <= lag_s < 5


def test_lost_updates_are_counted_and_the_rest_applied(
    world: World, redis_server: str, stream_of: Callable[[str], redis.Redis]
) -> None:
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a)
    version = world.a.embedding_version
    client = stream_of(version)
    for item in (900, 901, 902):
        send(client, rows_of(version, {item: 0.5}))
    client.xtrim(stream_key(version), maxlen=1, approximate=False)
    with serving(world.registry, redis_server) as (server, tower):
        found = set(tower.retrieve(fresh_users(), k=100).item_ids)
        assert found == {*range(10, 60), 902}
        labels = {"embedding_version": version}
        assert server.metrics.registry.get_sample_value("tower_index_updates_lost_total", labels) == 2


RULED = DatasetDescription.from_dict(
    make_description().to_dict()
    | {"item_rules": {"category": "genres", "main_category": "brand", "advertiser": "brand", "attributes": ["price"]}}
)


def test_rules_hold_by_the_columns_of_the_catalogue(
    tmp_path: Path, redis_server: str, stream_of: Callable[[str], redis.Redis]
) -> None:
    """Against a filter in Python over the items table; bids and budgets come by the stream."""
    manifest = make_release(tmp_path, seed=9, description=RULED)
    registry = Registry(tmp_path)
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    version = manifest.embedding_version
    stream = stream_of(version)
    send(stream, Deltas(version, [10, 11], bid_R=torch.tensor([100.0, 50.0]), budget_R=torch.tensor([5.0, 0.0])))
    table = {row["item_id"]: row for row in make_items().to_pylist()}
    user = fresh_users()
    with serving(tmp_path, redis_server) as (_, client):

        def ask(k: int = 50, **rules: Any) -> list[Any]:
            return client.retrieve(user, k=k, rules=Rules(**rules)).item_ids

        everything = ask()

        def allowed(keep: Callable[[dict[str, Any]], bool]) -> list[Any]:
            return [item for item in everything if keep(table[item])]

        assert len(everything) == 50
        assert ask(required={"category": ["news", "sport"]}) == allowed(
            lambda r: bool({"news", "sport"} & {*r["genres"]})
        )
        assert ask(forbidden={"category": ["drama"]}) == allowed(lambda r: "drama" not in r["genres"])
        between = allowed(lambda r: r["price"] is not None and 0.2 <= np.float32(r["price"]) <= 0.6)
        assert ask(ranges={"price": (0.2, 0.6)}) == between
        assert ask(ranges={"price": (None, None)}) == everything
        assert ask(seen=everything[:3], blocked=[everything[5], 123456]) == [*everything[3:5], *everything[6:]]
        assert ask(min_budget=1.0) == [10]
        assert set(ask(bid_power=1.0, k=50)) == set(everything)
        scores = dict(zip(*(lambda r: (r.item_ids, r.scores.tolist()))(client.retrieve(user, k=50)), strict=True))
        by_bid = sorted(everything, key=lambda i: -scores[i] * {10: 100, 11: 50}.get(i, 1))
        assert ask(bid_power=1.0, k=50) == by_bid
        for cap in ("advertiser_cap", "category_cap"):
            taken: Counter[str] = Counter()
            wanted = []
            for item in everything:
                brand = table[item]["brand"]
                if brand is None or taken[brand] < 2:
                    wanted.append(item)
                    taken[str(brand)] += brand is not None
            assert ask(**{cap: 2}) == wanted
        drawn = [ask(k=10, exploration_share=0.5, exploration_window=20, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert drawn[0][:5] == everything[:5]
        assert set(drawn[0][5:]) <= set(everything[5:25])


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"required": {"genre": ["x"]}}, "required: wanted the fields category, country, language, got 'genre'"),
        ({"forbidden": {"country": ["de"]}}, "forbidden.country: no value 'de'; items of {v} have no named values"),
        ({"required": {"country": [64]}}, "required: country must be in [0, 64), got 64"),
        ({"ranges": {"price": (1.0, 2.0)}}, "ranges: no attribute 'price'; the attributes are: none"),
        ({"ranges": {"price": (2.0, 1.0)}}, "ranges['price']: wanted least at most as large as most, got 2.0 and 1.0"),
        ({"min_budget": float("nan")}, "min_budget: wanted a finite number, at least 0, got nan"),
        ({"bid_power": -1.0}, "bid_power: wanted a number in [0, 10], got -1.0"),
        ({"seen": ["a"]}, "seen: the releases declare int64 ids, wanted int_id, got string_id"),
        ({"seen": range(10_001)}, "seen and blocked: at most 10000 items together, got 10001"),
        ({"advertiser_cap": 0}, "advertiser_cap must be at least 1, got 0"),
        ({"exploration_share": 2.0}, "exploration_share must be in [0, 1], got 2.0"),
        ({"exploration_share": 0.5}, "exploration_window must hold the 50 places drawn, got 0"),
        ({"exploration_window": -1}, "exploration_window: wanted 0 to 10000, got -1"),
    ],
)
def test_wishes_that_nobody_can_grant(world: World, redis_server: str, rules: dict[str, Any], told: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a)
    with serving(world.registry, redis_server) as (_, client):
        status, message = error_of(lambda: client.retrieve(fresh_users(), rules=Rules(**rules)))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert message == told.format(v=world.a.embedding_version)
