"""Item updates over a real Redis: order, what is passed over, what is never lost unseen."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import redis
import torch

from model.errors import DataError, IndexBusy, StoreUnavailable
from model.retrieval import index as index_module
from model.retrieval.index import LiveIndex
from model.retrieval.rows import Deltas, ItemRows, Layout
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import DotScorer
from online.item_feed import Deletion, ItemFeed, pack, send, stream_key, unpack
from online.stream import connect


@pytest.fixture
def client(redis_server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server, socket_timeout=5) as client:
        yield client


def rows_of(version: str, items: dict[int, float]) -> ItemRows:
    return ItemRows.build(version, Layout(embedding_dim=1), list(items), list(items.values()))


def best(index: LiveIndex, **wishes: float) -> list[int]:
    request = Request(**wishes)  # type: ignore[arg-type]
    return index.search(np.ones((1, 1), np.float32), [request], Plan(k=9), index.embedding_version).item_ids[0]


def test_updates_are_applied_in_order(client: redis.Redis) -> None:
    index = LiveIndex(rows_of("feed-order", {10: 1, 11: 2}), DotScorer())
    feed = ItemFeed(client, index)
    assert feed.step(wait_ms=10) == 0
    sent = [
        rows_of("feed-order", {12: 3}),
        Deletion("feed-order", [11]),
        Deltas("feed-order", [10], bid_R=torch.tensor([9.0]), eligible_R=torch.tensor([True])),
        rows_of("feed-order", {11: 4}),
    ]
    assert [send(client, update) for update in sent] == [1, 2, 3, 4]
    assert feed.step() == 4
    assert (feed.applied, feed.refused, feed.number) == (4, 0, 4)
    assert best(index) == [11, 12, 10]
    assert best(index, bid_power=1.0) == [10, 11, 12]


def test_a_second_server_and_one_that_carries_on_come_to_the_same(client: redis.Redis) -> None:
    version = "feed-carry-on"
    first = ItemFeed(client, LiveIndex(rows_of(version, {1: 1}), DotScorer()))
    index = LiveIndex(rows_of(version, {1: 1}), DotScorer())
    for number in range(150):  # more than one read
        send(client, rows_of(version, {number % 40: number}))
        if number == 70:
            half = ItemFeed(client, index)
            assert half.step() == 71
    rest = ItemFeed(client, index, entry=half.entry, number=half.number)
    assert rest.step() == 79
    assert first.step() + first.step() == 150
    assert best(first._index) == best(index) == [29, 28, 27, 26, 25, 24, 23, 22, 21], "149 % 40 = 29"


def test_what_cannot_be_applied_is_passed_over_and_counted(client: redis.Redis) -> None:
    index = LiveIndex(rows_of("feed-bad", {10: 1}), DotScorer())
    key = stream_key("feed-bad")
    wrong = rows_of("feed-other", {11: 1})
    for number, (kind, data) in enumerate([("upsert", b"no parquet"), pack(wrong), ("rename", b"")], start=1):
        client.xadd(key, {"number": number, "kind": kind, "data": data})
    client.set(f"{key}:number", 3)
    send(client, rows_of("feed-bad", {12: 2}))
    feed = ItemFeed(client, index)
    feed.step()
    assert (feed.applied, feed.refused) == (1, 3)
    assert best(index) == [12, 10]


def test_lost_updates_stop_the_feed(client: redis.Redis) -> None:
    index = LiveIndex(rows_of("feed-lost", {10: 1}), DotScorer())
    feed = ItemFeed(client, index)
    send(client, rows_of("feed-lost", {11: 2}))
    feed.step()
    for item in (12, 13, 14):
        send(client, rows_of("feed-lost", {item: item}))
    client.xtrim(stream_key("feed-lost"), maxlen=1, approximate=False)
    with pytest.raises(DataError, match="up to number 1, the stream goes on at 4"):
        feed.step()
    assert best(index) == [11, 10]


def test_a_busy_index_loses_nothing(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "WAIT_S", 0.02)
    index = LiveIndex(rows_of("feed-busy", {10: 1}), DotScorer())
    feed = ItemFeed(client, index)
    for item in (11, 12):
        send(client, rows_of("feed-busy", {item: item}))
    with index.pin(), pytest.raises(IndexBusy):
        feed.step()
    assert feed.number == 1
    feed.step()
    assert best(index) == [12, 11, 10]


def test_it_follows_until_told_to_stop(client: redis.Redis) -> None:
    index = LiveIndex(rows_of("feed-run", {10: 1}), DotScorer())
    stop, arrived = threading.Event(), threading.Event()
    upsert = index.upsert

    def noticed(rows: ItemRows) -> index_module.Applied:
        applied = upsert(rows)
        arrived.set()
        return applied

    index.upsert = noticed  # type: ignore[method-assign]
    thread = threading.Thread(target=ItemFeed(client, index).run, args=(stop,))
    thread.start()
    send(client, rows_of("feed-run", {11: 2}))
    assert arrived.wait(5)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert best(index) == [11, 10]


def test_redis_away_is_said() -> None:
    nobody = connect("redis://127.0.0.1:1/0", timeout_s=0.2)
    index = LiveIndex(rows_of("v", {10: 1}), DotScorer())
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        ItemFeed(nobody, index).step()
    with pytest.raises(StoreUnavailable, match="not sent"):
        send(nobody, rows_of("v", {11: 1}))


def test_deltas_travel_with_the_columns_they_have() -> None:
    back = unpack(*pack(Deltas("v", ["a", "b"], budget_R=torch.tensor([1.5, 2.5]))))
    assert isinstance(back, Deltas)
    assert (back.item_ids, back.bid_R, back.eligible_R) == (["a", "b"], None, None)
    assert back.budget_R is not None
    assert back.budget_R.tolist() == [1.5, 2.5]


def test_a_server_goes_on_past_what_was_lost_and_what_is_no_update(client: redis.Redis) -> None:
    index = LiveIndex(rows_of("feed-on", {10: 1}), DotScorer())
    feed = ItemFeed(client, index, is_strict=False)
    for item in (11, 12, 13):
        send(client, rows_of("feed-on", {item: item}))
    client.xtrim(stream_key("feed-on"), maxlen=1, approximate=False)
    client.xadd(stream_key("feed-on"), {"hello": "there"})
    send(client, rows_of("feed-on", {14: 14}))
    send(client, ItemRows.build("feed-on", Layout(embedding_dim=1), ["a"], [5.0]))
    client.delete(f"{stream_key('feed-on')}:number")
    send(client, rows_of("feed-on", {15: 15}))  # Redis lost its memory: numbers begin anew
    assert feed.step() == 5
    assert (feed.applied, feed.refused, feed.lost, feed.number) == (3, 2, 2 + 1, 1)
    assert best(index) == [15, 14, 13, 10]
