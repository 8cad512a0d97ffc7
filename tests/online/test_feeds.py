"""The threads that keep indexes up to date: Redis that goes and comes back, faults that nobody foresaw, an end."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from deploy.redis_server import start_redis
from model.item_index import ItemIndex
from model.records import Context
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan
from online.feeds import Feeds
from online.item_feed import send
from online.items import ServedItems, Wishes
from online.stream import connect
from tests.online.helpers import wait_until


def make_items(version: str) -> ServedItems:
    return ServedItems.of_snapshot(ItemIndex(version, pa.array([1]), torch.zeros(1, 2)))


def rows_of(version: str, *items: int) -> ItemRows:
    return ItemRows.build(version, Layout(embedding_dim=2), list(items), np.ones((len(items), 2)))


def ids_of(items: ServedItems) -> set[Any]:
    return set(items.search(np.ones(2, np.float32), Plan(k=100), Wishes(), Context(), 0).item_ids)


def make_feeds(url: str) -> Feeds:
    return Feeds(url, live_hours=1.0, max_events=10)


def test_redis_that_lost_its_memory_is_followed_on(tmp_path: Path) -> None:
    items = make_items("feeds-restart")
    with start_redis(tmp_path) as server:
        feeds = make_feeds(server.url)
        with connect(server.url) as client:
            send(client, rows_of("feeds-restart", 2, 3))
        feeds.start(items)
        assert ids_of(items) == {1, 2, 3}, "caught up"
        server.restart()
        with connect(server.url) as client:
            send(client, rows_of("feeds-restart", 4))
        wait_until(lambda: ids_of(items) == {1, 2, 3, 4})
        assert feeds._following[0].updates.lost == 1
        feeds.close()


def test_without_redis_an_index_is_served_and_catches_up_later(tmp_path: Path) -> None:
    items = make_items("feeds-late")
    with start_redis(tmp_path) as server:
        server.stop()
        feeds = make_feeds(server.url)
        started = time.monotonic()
        feeds.start(items)
        assert time.monotonic() - started < 5
        assert ids_of(items) == {1}
        server.start()
        with connect(server.url) as client:
            send(client, rows_of("feeds-late", 2))
        wait_until(lambda: ids_of(items) == {1, 2})
        feeds.close()


def test_a_fault_does_not_end_the_thread(redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = make_items("feeds-fault")
    feeds = make_feeds(redis_server)
    faults = iter([RuntimeError("a fault"), RuntimeError("another")])
    upsert = items.index.upsert

    def failing(rows: ItemRows) -> Any:
        for fault in faults:
            raise fault
        return upsert(rows)

    monkeypatch.setattr(items.index, "upsert", failing)
    with connect(redis_server) as client:
        send(client, rows_of("feeds-fault", 2))
    feeds.start(items)
    wait_until(lambda: ids_of(items) == {1, 2})
    feeds.close()


def test_whoever_is_stopped_ends_and_the_others_go_on(redis_server: str) -> None:
    first, second = make_items("feeds-a"), make_items("feeds-b")
    told: list[int] = []
    feeds = Feeds(redis_server, live_hours=1.0, max_events=10, on_change=lambda following: told.append(len(following)))
    before = threading.active_count()
    feeds.start(first)
    feeds.start(second)
    assert threading.active_count() == before + 2
    feeds.stop(first)
    wait_until(lambda: threading.active_count() == before + 1)
    with connect(redis_server) as client:
        send(client, rows_of("feeds-a", 2))
        send(client, rows_of("feeds-b", 2))
    wait_until(lambda: ids_of(second) == {1, 2})
    assert ids_of(first) == {1}
    feeds.close()
    wait_until(lambda: threading.active_count() == before)
    assert told == [1, 2, 1]
