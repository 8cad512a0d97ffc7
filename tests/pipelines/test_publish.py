import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from deploy.redis_server import start_redis
from feature_repo import layout
from feature_repo.layout import StateRow
from model.errors import ConfigError, DataError, StoreUnavailable
from model.state_codec import StateCodec
from pipelines.transforms import publish
from pipelines.transforms.publish import PublishCounts, connect, publish_table

AS_OF_S = 1_507_950_000
_versions = (f"{number:016x}" for number in count(0xAB00))


@pytest.fixture
def client(redis_server: str) -> Iterator[redis.Redis]:
    with connect(redis_server) as client:
        yield client


@pytest.fixture
def version() -> str:
    """A state version of the test's own, so that tests share a Redis."""
    return next(_versions)


def make_table(
    version: str, user_ids: Any = (1, 2, 3), states: Any = None, as_of_s: Any = AS_OF_S, **columns: Any
) -> pa.Table:
    """States of a run: three users of width 4 unless told otherwise."""
    users = len(user_ids)
    if states is None:
        states = np.arange(users * 4, dtype=np.float32).reshape(users, 4) / 8
    as_of_us = np.broadcast_to(np.asarray(as_of_s, np.int64) * 1_000_000, users)
    made: dict[str, Any] = {
        "user_id": pa.array(list(user_ids)),
        "state": pa.array([list(state) for state in states], pa.list_(pa.float32())),
        "state_version": pa.array([version] * users, pa.string()),
        "history_until": pa.array(as_of_us - np.arange(users) - 1),
        "encoded_at": pa.array(as_of_us),
        "event_timestamp": pa.array(as_of_us, pa.timestamp("us", "UTC")),
    }
    return pa.table(made | columns)


def stored(client: redis.Redis, user_id: int | str, version: str) -> StateRow | None:
    values = client.hmget(layout.redis_key(user_id), layout.row_fields(layout.view_name(version)))
    return layout.decode_row(values)


def hash_of(client: redis.Redis, user_id: int | str, version: str) -> dict[bytes, bytes]:
    """The stored fields of one view."""
    view = layout.view_name(version)
    fields = [*layout.row_fields(view), layout.fence_field(view)]
    values = client.hmget(layout.redis_key(user_id), fields)
    return {field: value for field, value in zip(fields, values, strict=True) if value is not None}


@pytest.mark.parametrize("user_ids", [[5, -6, 2**63 - 1], ["", "ž", "🦊"]])
def test_rows_read_back_as_given(client: redis.Redis, version: str, user_ids: list[int | str]) -> None:
    table = make_table(version, user_ids)
    assert publish_table(client, table, version, 7) == PublishCounts(written=3)
    for number, user_id in enumerate(user_ids):
        expected = StateRow(
            state=(np.arange(4, dtype=np.float32) + 4 * number) / 8,
            state_version=version,
            history_until_us=AS_OF_S * 1_000_000 - number - 1,
            encoded_at_us=AS_OF_S * 1_000_000,
            event_timestamp_s=AS_OF_S,
        )
        assert stored(client, user_id, version) == expected
        fields = hash_of(client, user_id, version)
        fence = fields.pop(layout.fence_field(layout.view_name(version)))
        assert fields == layout.encode_row(expected, layout.view_name(version))
        assert layout.decode_fence(fence) == (AS_OF_S, 7)


def test_more_rows_than_a_batch(client: redis.Redis, version: str) -> None:
    users = 2 * publish.ROWS_PER_CALL + 7
    states = np.random.default_rng(0).normal(size=(users, 5)).astype(np.float32)
    table = make_table(version, range(users), states)
    counts = publish_table(client, table, version, 1, batch_rows=publish.ROWS_PER_CALL + 1)
    assert counts == PublishCounts(written=users)
    for user in range(users):
        row = stored(client, user, version)
        assert row is not None
        assert row.state.tolist() == states[user].tolist()


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        ((AS_OF_S, 5), (AS_OF_S, 5), True),  # a repeat
        ((AS_OF_S, 5), (AS_OF_S, 6), True),  # the same day again, by a later run
        ((AS_OF_S, 5), (AS_OF_S, 4), False),  # a zombie writer
        ((AS_OF_S, 5), (AS_OF_S + 1, 1), True),  # a later day
        ((AS_OF_S, 5), (AS_OF_S - 1, 9), False),  # a replay of an earlier day
        ((AS_OF_S, 9), (AS_OF_S, 10), True),  # numbers, not text
        ((999_999_999, 1), (1_000_000_000, 1), True),
        ((0, 1), (1, 1), True),  # the epoch is the empty timestamp
        ((0, 2), (0, 1), False),
        ((AS_OF_S, 2**53 - 2), (AS_OF_S, 2**53 - 1), True),
        ((AS_OF_S, 2**53 - 1), (AS_OF_S, 2**53 - 2), False),
    ],
)
def test_a_write_never_goes_backwards(
    client: redis.Redis, version: str, first: tuple[int, int], second: tuple[int, int], wins: bool
) -> None:
    publish_table(client, make_table(version, as_of_s=first[0]), version, first[1])
    before = hash_of(client, 1, version)
    table = make_table(version, states=[[9, 9]] * 3, as_of_s=second[0])
    counts = publish_table(client, table, version, second[1])
    assert counts == (PublishCounts(written=3) if wins else PublishCounts(stale=3))
    row = stored(client, 1, version)
    assert row is not None
    assert row.event_timestamp_s == (second if wins else first)[0]
    assert (row.state.tolist() == [9, 9]) is wins
    assert wins or hash_of(client, 1, version) == before


def test_a_repeat_leaves_the_same_bytes(client: redis.Redis, version: str) -> None:
    table = make_table(version)
    publish_table(client, table, version, 3)
    before = hash_of(client, 1, version)
    assert publish_table(client, table, version, 3) == PublishCounts(written=3)
    assert hash_of(client, 1, version) == before


def put_stock_row(client: redis.Redis, user_id: int, version: str, timestamp: bytes) -> None:
    """A row as `feast materialize` leaves it: the fence, if there is one, stays behind."""
    row = StateRow(np.ones(2, np.float32), version, 1, 1, AS_OF_S)
    fields = layout.encode_row(row, layout.view_name(version))
    fields[layout.timestamp_field(layout.view_name(version))] = timestamp
    client.hset(layout.redis_key(user_id), mapping=fields)


@pytest.mark.parametrize(
    ("timestamp", "wins"),
    [
        (layout.encode_timestamp(AS_OF_S), True),  # no fence is token 0
        (layout.encode_timestamp(AS_OF_S - 1), True),
        (layout.encode_timestamp(AS_OF_S + 1), False),
        (layout.encode_timestamp(AS_OF_S) + b"\x10\x01", False),  # a nanosecond later
        (layout.encode_timestamp(AS_OF_S - 1) + b"\x10\xff\x93\xeb\xdc\x03", True),
        (layout.encode_timestamp(-86_400), True),
        (b"\x08", True),  # torn: nothing can be read from it
        (b"rubbish", True),
    ],
)
def test_rows_of_stock_feast_count_as_token_zero(
    client: redis.Redis, version: str, timestamp: bytes, wins: bool
) -> None:
    put_stock_row(client, 1, version, timestamp)
    counts = publish_table(client, make_table(version, [1]), version, 0)
    assert counts == (PublishCounts(written=1) if wins else PublishCounts(stale=1))


def test_a_fence_left_behind_by_stock_feast_does_not_count(client: redis.Redis, version: str) -> None:
    publish_table(client, make_table(version, [1], as_of_s=AS_OF_S - 10), version, 99)
    put_stock_row(client, 1, version, layout.encode_timestamp(AS_OF_S))
    assert publish_table(client, make_table(version, [1]), version, 1) == PublishCounts(written=1)


def test_a_damaged_fence_does_not_block(client: redis.Redis, version: str) -> None:
    publish_table(client, make_table(version, [1]), version, 9)
    client.hset(layout.redis_key(1), layout.fence_field(layout.view_name(version)), b"rubbish")
    assert publish_table(client, make_table(version, [1]), version, 1) == PublishCounts(written=1)


def test_versions_share_a_user_without_touching(client: redis.Redis, version: str) -> None:
    other = next(_versions)
    publish_table(client, make_table(version, [1], [[1]]), version, 9)
    publish_table(client, make_table(other, [1], [[2, 2]], as_of_s=AS_OF_S - 100), other, 1)
    rows = [stored(client, 1, version), stored(client, 1, other)]
    assert [row.state.tolist() for row in rows if row] == [[1], [2, 2]]


def test_rows_of_several_times_in_one_table(client: redis.Redis, version: str) -> None:
    publish_table(client, make_table(version, [1, 2, 3]), version, 1)
    table = make_table(version, [1, 2, 3], as_of_s=[AS_OF_S + 1, AS_OF_S - 1, AS_OF_S + 2])
    assert publish_table(client, table, version, 1) == PublishCounts(written=2, stale=1)


def test_non_finite_and_future_rows_are_rejected_and_counted(client: redis.Redis, version: str) -> None:
    states = np.ones((6, 2), np.float32)
    states[0, 1], states[1, 0], states[2, 0] = np.nan, np.inf, -np.inf
    as_of_s = np.full(6, AS_OF_S)
    as_of_s[3] = AS_OF_S + publish.FUTURE_TOLERANCE_S + 1
    until = as_of_s * 1_000_000
    until[4] += 1  # has seen an event after its own as-of time
    table = make_table(version, range(10, 16), states, as_of_s, history_until=pa.array(until))
    assert publish_table(client, table, version, 1, now_s=AS_OF_S) == PublishCounts(written=1, rejected=5)
    rows = [stored(client, user, version) for user in range(10, 16)]
    assert [row is not None for row in rows] == [False] * 5 + [True]


@pytest.mark.parametrize("codec", [StateCodec("float16"), StateCodec("int8"), StateCodec("int8", tokens=2)])
def test_bytes_of_a_codec_go_to_redis_as_they_are(client: redis.Redis, version: str, codec: StateCodec) -> None:
    states = np.array([[1, 2, 3, -4], [np.nan, 1, 1, 1], [0, 0, 0, 0], [5, 6, 7, 8]], np.float32)
    blobs = pa.array([row.tobytes() for row in codec.encode(states)], pa.binary())
    table = make_table(version, [10, 11, 12, 13], states, state=blobs)
    counts = publish_table(client, table.slice(1), version, 1, codec=codec)
    assert counts == PublishCounts(written=2, rejected=1)
    assert publish_table(client, table.slice(0, 1), version, 1, codec=codec) == PublishCounts(written=1)
    assert stored(client, 11, version) is None
    view = layout.view_name(version)
    for user, blob, state in ((10, blobs[0], states[0]), (12, blobs[2], states[2]), (13, blobs[3], states[3])):
        values = client.hmget(layout.redis_key(user), layout.row_fields(view))
        assert values[0].endswith(blob.as_py())
        row = layout.decode_row(values, codec)
        assert row is not None
        assert row.state.tolist() == pytest.approx(state.tolist(), abs=0.04)
        assert values == [*layout.encode_row(replace(row, state=state), view, codec).values()]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1.0]] * 3, pa.list_(pa.float32())), "binary, the bytes of int8, got list"),
        (pa.array([b"12345", b"123456", b"12345"]), "same number of bytes, got \\[5, 6\\]"),
        (pa.array([b"123"] * 3), "got 3 bytes"),
        (pa.array([b"12345", None, b"12345"]), "1 nulls"),
    ],
)
def test_bytes_of_another_kind_are_refused(client: redis.Redis, version: str, column: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        publish_table(client, make_table(version, state=column), version, 1, codec=StateCodec("int8"))
    with pytest.raises(DataError, match="list of float32, got binary"):
        publish_table(client, make_table(version, state=pa.array([b"12345"] * 3)), version, 1)


def test_an_empty_table_is_nothing(version: str) -> None:
    empty = make_table(version).slice(0, 0)
    assert publish_table("redis://127.0.0.1:1/0", empty, version, 1) == PublishCounts()
    empty = make_table(version, state=pa.array([b""] * 3)).slice(0, 0)
    assert publish_table("redis://127.0.0.1:1/0", empty, version, 1, codec=StateCodec("int8")) == PublishCounts()


def test_fixed_size_lists_and_sliced_tables(client: redis.Redis, version: str) -> None:
    states = pa.FixedSizeListArray.from_arrays(pa.array(range(6), pa.float32()), 2)
    table = make_table(version, [1, 2, 3], state=states)
    assert publish_table(client, table.slice(1), version, 1) == PublishCounts(written=2)
    row = stored(client, 2, version)
    assert row is not None
    assert row.state.tolist() == [2, 3]
    assert stored(client, 1, version) is None
    sliced = pa.concat_tables([make_table(version), make_table(version, [4, 5])]).slice(2)
    assert publish_table(client, sliced, version, 1) == PublishCounts(written=3)
    row = stored(client, 3, version)
    assert row is not None
    assert row.state.tolist() == [1, 1.125, 1.25, 1.375]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"state_version": pa.array(["v", "v", "other"])}, "every row must carry state_version"),
        ({"state": pa.array([[1.0], [1.0, 2.0], [1.0]], pa.list_(pa.float32()))}, "the same length"),
        ({"state": pa.array([[1.0]] * 3, pa.list_(pa.float64()))}, "list of float32"),
        ({"state": pa.array([[1.0], [None], [1.0]], pa.list_(pa.float32()))}, "1 nulls"),
        ({"state": pa.array([[1.0], None, [1.0]], pa.list_(pa.float32()))}, "1 nulls"),
        ({"user_id": pa.array([1, None, 2])}, "column user_id holds 1 nulls"),
        ({"user_id": pa.array([1.0, 2.0, 3.0])}, "user_id must be int64 or string"),
        ({"event_timestamp": pa.array([1, 2, 3])}, "must be a timestamp"),
        ({"event_timestamp": pa.array([-1_000_000] * 3, pa.timestamp("us", "UTC"))}, "1970"),
        ({"event_timestamp": pa.array([1_500_000] * 3, pa.timestamp("us", "UTC"))}, "whole seconds"),
    ],
)
def test_a_table_of_another_kind_is_refused(
    client: redis.Redis, version: str, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        publish_table(client, make_table(version, **columns), version, 1)
    assert stored(client, 1, version) is None


def test_a_missing_column_and_a_bad_token_are_refused(client: redis.Redis, version: str) -> None:
    with pytest.raises(DataError, match="encoded_at is missing"):
        publish_table(client, make_table(version).drop_columns(["encoded_at"]), version, 1)
    for token in (-1, 2**53):
        with pytest.raises(DataError, match="token"):
            publish_table(client, make_table(version), version, token)


def test_stock_feast_fields_of_others_stay(client: redis.Redis, version: str) -> None:
    key = layout.redis_key(77)
    client.hset(key, mapping={b"theirs": b"1", b"_ts:theirs": b"2"})
    publish_table(client, make_table(version, [77]), version, 1)
    assert client.hmget(key, [b"theirs", b"_ts:theirs"]) == [b"1", b"2"]


def test_a_server_that_forgot_the_script(client: redis.Redis, version: str) -> None:
    publish_table(client, make_table(version), version, 1)
    client.script_flush()
    assert publish_table(client, make_table(version), version, 1) == PublishCounts(written=3)


def test_an_outage_ends_in_store_unavailable_and_a_restart_heals(tmp_path: Path, version: str) -> None:
    with start_redis(tmp_path, persist=True) as server, connect(server.url, timeout_s=0.3, retries=2) as client:
        publish_table(client, make_table(version), version, 1)
        server.stop()
        with pytest.raises(StoreUnavailable, match="did not take the states"):
            publish_table(client, make_table(version), version, 2)
        server.start()
        assert publish_table(client, make_table(version), version, 2) == PublishCounts(written=3)
        server.pause()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            publish_table(client, make_table(version), version, 3)
        assert time.monotonic() - started < 10
        server.resume()
        assert publish_table(client, make_table(version), version, 3) == PublishCounts(written=3)


def test_a_full_server_is_store_unavailable(tmp_path: Path, version: str) -> None:
    with (
        start_redis(tmp_path, options=["--maxmemory", "1"]) as server,
        pytest.raises(StoreUnavailable, match="OOM"),
    ):
        publish_table(server.url, make_table(version), version, 1)


def test_a_writer_whose_clock_is_ahead_changes_nothing(client: redis.Redis, version: str) -> None:
    """Its own check passes, since it asks its own clock; Redis's clock refuses."""
    publish_table(client, make_table(version), version, 1)
    before = [hash_of(client, user, version) for user in (1, 2, 3)]
    ahead_s = int(time.time()) + 3600
    table = make_table(version, states=[[9, 9]] * 3, as_of_s=ahead_s)
    with pytest.raises(ConfigError, match=r"3,(599|600) s in the future by Redis's clock"):
        publish_table(client, table, version, 2, now_s=ahead_s)
    assert [hash_of(client, user, version) for user in (1, 2, 3)] == before


def test_a_pace_holds_rows_down() -> None:
    pace = publish.Pace(1000)
    started = time.monotonic()
    for _ in range(3):
        pace.wait_for(50)  # the first at once, the others each 50 ms after the one before
    assert time.monotonic() - started >= 0.1
    assert publish.Pace(1000).batch_rows(500) == 10  # a hundredth of a second's worth
    assert publish.Pace(1e6).batch_rows(500) == 500
    assert publish.Pace(3).batch_rows(500) == 1
    with pytest.raises(ConfigError, match="above 0 rows/s"):
        publish.Pace(0)
