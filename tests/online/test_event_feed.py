"""Events over a real Redis: what is kept, what is forgotten, what is lost, and when counts are made."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
import torch

from model.dataset import DatasetDescription
from model.errors import DataError, StoreUnavailable
from model.item_index import read_snapshot, write_snapshot
from model.release import Registry
from online.event_feed import BUSY_SHARE, STREAM, EventFeed, Reason, keys_of, send_events
from online.items import LiveModel, ServedItems
from online.stream import connect
from tests.releases import SMALL, make_description, make_release

CONFIG = replace(SMALL, live_windows_h=(1.0, 3.0), live_dim=4, live_bucket_s=60)
HOUR_US = 3_600_000_000
MINUTE_US = 60_000_000
NOW_US = 1_800_000_000_000_000 // MINUTE_US * MINUTE_US
LONG_AGO_US = 1_600_000_000_000_000
"""Before any entry of these tests was appended."""


class Clock:
    """A clock that a test moves, in microseconds and seconds."""

    def __init__(self) -> None:
        self.us = NOW_US
        self.seconds = 0.0


@pytest.fixture
def client(redis_server: str) -> Iterator[redis.Redis]:
    with connect(redis_server) as client:
        client.delete(STREAM, f"{STREAM}:number")
        yield client
        client.delete(STREAM, f"{STREAM}:number")


def make_feed(
    folder: Path, client: redis.Redis, *, ids: str = "int64", clock: Clock | None = None, **options: Any
) -> EventFeed:
    manifest = make_release(folder, seed=4, config=CONFIG, description=make_description(ids=ids))
    registry = Registry(folder)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    snapshot = read_snapshot(registry, manifest.embedding_version)
    live = LiveModel(release.items, CONFIG, manifest.description)
    items = ServedItems.of_snapshot(snapshot, live=live)
    clock = clock or Clock()
    options = {"live_hours": 24.0, "max_events": 1000} | options
    return EventFeed(client, items, now_us=lambda: clock.us, clock=lambda: clock.seconds, **options)


def events(*rows: tuple[Any, Any, float], kind: str = "click") -> pa.Table:
    """(user, item, minutes before NOW)."""
    user, item, minute = zip(*rows, strict=True)
    time_us = [NOW_US - int(m * MINUTE_US) for m in minute]
    return pa.table({"user_id": user, "item_id": item, "event_type": [kind] * len(rows), "timestamp_us": time_us})


def put(client: redis.Redis, table: pa.Table, **options: Any) -> int:
    """As if it were sent at NOW; entries never trimmed, for their ids tell the real time."""
    return send_events(client, table, now_us=0, **options)


def count_of(feed: EventFeed, item: int) -> int:
    """Events of a catalogue item (10, 11, ...) before the last bucket."""
    counted = feed._items.counted
    assert counted is not None
    if counted.counts is None:
        return 0
    bucket = counted.counts.bucket(torch.tensor([counted.until_us]))
    return int(counted.counts.items.since(torch.tensor([item - 10]), bucket)[0])


def test_counts_hold_what_came_before_the_bucket_and_move_on_with_the_clock(
    tmp_path: Path, client: redis.Redis
) -> None:
    clock = Clock()
    feed = make_feed(tmp_path, client, clock=clock)
    put(client, events((1, 10, 5), (2, 10, 0.5), (3, 10, -0.5), (4, 11, 9), (5, 77, 3)))
    put(client, events((6, 10, 7), kind="view"))
    assert feed.step(1) == 2
    assert (count_of(feed, 10), count_of(feed, 11), feed.kept) == (2, 1, 4 + 1)
    first = feed._items.counted
    clock.us += MINUTE_US // 2
    feed.step(1)
    assert feed._items.counted is first, "no bucket has ended"
    clock.us += MINUTE_US
    clock.seconds = 1.0
    feed.step(1)
    assert count_of(feed, 10) == 3, "and nobody sent anything"
    put(client, events((9, 10, 6)))
    feed.step(1)
    assert count_of(feed, 10) == 4, "late, but counted at once"


def test_counting_takes_no_more_than_its_share(tmp_path: Path, client: redis.Redis, monkeypatch: Any) -> None:
    clock = Clock()
    feed = make_feed(tmp_path, client, clock=clock)
    count = feed._items.count

    def slow(*args: Any, **options: Any) -> None:
        clock.seconds += 2.0
        count(*args, **options)

    monkeypatch.setattr(feed._items, "count", slow)
    put(client, events((1, 10, 5)))
    feed.step(1)
    assert count_of(feed, 10) == 1
    put(client, events((2, 10, 5)))
    for after_s, wanted in ((2.0 / BUSY_SHARE - 0.1, 1), (0.2, 2)):
        clock.seconds += after_s
        feed.step(1)
        assert count_of(feed, 10) == wanted


def test_what_is_old_or_too_much_is_forgotten_and_said(tmp_path: Path, client: redis.Redis) -> None:
    feed = make_feed(tmp_path, client, live_hours=10.0, max_events=3)
    put(client, events((1, 10, 601), (2, 10, 599), (3, 10, 30)), since_us=NOW_US - 20 * HOUR_US)
    feed.step(1)
    counted = feed._items.counted
    assert counted is not None
    assert (count_of(feed, 10), feed.refused) == (2, {Reason.TOO_OLD: 1})
    assert (counted.since_us, counted.is_short) == (NOW_US - 10 * HOUR_US, False)
    feed._count_at = 0.0
    put(client, events((4, 10, 20), (5, 10, 10)))
    feed.step(1)
    counted = feed._items.counted
    assert counted is not None
    assert count_of(feed, 10) == 3
    assert counted.since_us == NOW_US - 30 * MINUTE_US
    assert counted.is_short, "30 minutes of the 3 hours"


def test_entries_trimmed_before_they_were_read_are_counted(tmp_path: Path, client: redis.Redis) -> None:
    feed = make_feed(tmp_path, client)
    put(client, events((1, 10, 5)), since_us=LONG_AGO_US)
    feed.step(1)
    assert feed._since_us == LONG_AGO_US
    for user in (2, 3, 4):
        put(client, events((user, 10, 5)))
    client.xtrim(STREAM, maxlen=1, approximate=False)
    feed.step(1)
    assert feed.lost == 2
    assert feed._since_us is not None
    assert feed._since_us > LONG_AGO_US, "what was lost is not whole"


def test_a_stream_that_was_trimmed_is_whole_from_its_first_entry_on(tmp_path: Path, client: redis.Redis) -> None:
    put(client, events((1, 10, 5)), since_us=LONG_AGO_US)
    put(client, events((2, 10, 5)))
    client.xtrim(STREAM, maxlen=1, approximate=False)
    feed = make_feed(tmp_path, client)
    feed.step(1)
    entry = client.xinfo_stream(STREAM)["first-entry"][0].decode()  # type: ignore[index]
    assert (feed.lost, feed._since_us) == (0, int(entry.partition("-")[0]) * 1000)


def test_old_entries_go(client: redis.Redis) -> None:
    """By Redis's clock; MINID with ~ leaves what shares a node with what stays, so many entries."""
    for user in range(300):
        send_events(client, events((user, 10, 5)), keep_h=1.0, now_us=0)
    last: Any = client.xinfo_stream(STREAM)["last-entry"][0]  # type: ignore[index]
    after_us = int(last.decode().partition("-")[0]) * 1000
    send_events(client, events((1, 10, 5)), keep_h=1.0, now_us=after_us + 2 * HOUR_US)
    assert client.xlen(STREAM) < 150


def test_string_ids(tmp_path: Path, client: redis.Redis) -> None:
    feed = make_feed(tmp_path, client, ids="string")
    put(client, events(("anna", "i10", 5), ("bob", "i11", 4), ("bob", "i11", 4), ("bob", "nowhere", 4)))
    put(client, events((1, 2, 3)))
    feed.step(1)
    assert (count_of(feed, 10), count_of(feed, 11)) == (1, 1)
    assert feed.refused == {Reason.UNREADABLE: 1, Reason.DUPLICATE: 1}
    assert len(set(keys_of(pa.array([f"u{n}" for n in range(1000)])).tolist())) == 1000


def test_two_positive_events_of_one_moment_are_two(tmp_path: Path, client: redis.Redis) -> None:
    description = make_description()
    both = DatasetDescription.from_dict(
        description.to_dict() | {"event_types": {"click": "positive", "buy": "positive"}}
    )
    feed = make_feed(tmp_path, client)
    feed._live = replace(feed._live, description=both)
    for kind in ("click", "buy", "click"):
        put(client, events((1, 10, 5), kind=kind))
    feed.step(1)
    assert (count_of(feed, 10), feed.refused) == (2, {Reason.DUPLICATE: 1})


def test_redis_away_and_columns_missing(tmp_path: Path, client: redis.Redis) -> None:
    nobody = connect("redis://127.0.0.1:1/0", timeout_s=0.2)
    with pytest.raises(StoreUnavailable, match="was not sent"):
        put(nobody, events((1, 10, 5)))
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        make_feed(tmp_path, nobody).step(1)
    with pytest.raises(DataError, match="missing: event_type"):
        put(client, events((1, 10, 5)).drop_columns(["event_type"]))


def test_ties_keep_the_order_of_arrival(tmp_path: Path, client: redis.Redis) -> None:
    """Items 10, 11, 12 at one time: 11 follows 10, 12 follows 11, whatever their ids."""
    feed = make_feed(tmp_path, client)
    put(client, events((1, 12, 5), (1, 10, 5)))
    put(client, events((1, 11, 5)))
    feed.step(1)
    counted = feed._items.counted
    assert counted is not None
    assert counted.counts is not None
    rows = np.arange(counted.counts.num_rows)
    followers = {int(row): counted.counts.followers(torch.tensor([row]))[1].tolist() for row in rows}
    assert {row: items for row, items in followers.items() if items} == {2: [0], 0: [1]}
