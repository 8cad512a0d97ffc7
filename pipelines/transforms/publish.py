"""States into Redis, fast, in Feast's own layout, and only forwards.

A row is written where (as-of seconds, fencing token) is at least what stands there: a zombie writer, a replay of an old
run and a clock behind all lose, and a repeated write changes nothing. The comparison and the write are one step on the
server, a Lua script that takes many rows a call. A row written by stock Feast carries no fence and counts as token 0.

Legend: U users, D state width, B bytes of a state that a codec made.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis
from numpy.typing import NDArray
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, NoScriptError, ReadOnlyError, RedisError
from redis.retry import Retry

from feature_repo import layout
from model.errors import ConfigError, DataError, StoreUnavailable
from model.state_codec import StateCodec

BATCH_ROWS: Final = 1000
"""Rows a round trip."""
ROWS_PER_CALL: Final = 50
"""Rows a script call. Redis serves nobody else during a call, so it must stay well below a millisecond."""
FUTURE_TOLERANCE_S: Final = 300
"""How far ahead of our clock an as-of time may be. A row from the future would block every later write."""
MAX_TOKEN: Final = 2**53 - 1
"""Lua counts in float64."""

PARSE_TIMESTAMP: Final = """
local byte = string.byte

-- Number and end of the protobuf varint at `at`.
local function varint(data, at)
  local value, scale = 0, 1
  for i = at, math.min(at + 9, #data) do
    local part = byte(data, i)
    if part < 128 then
      return value + part * scale, i + 1
    end
    value, scale = value + (part - 128) * scale, scale * 128
  end
  return nil, #data + 1
end

-- Whole seconds and nanoseconds of a google.protobuf.Timestamp; nil if it is none.
local function parse(data)
  local seconds, nanos, at = 0, 0, 1
  if byte(data, at) == 8 then
    seconds, at = varint(data, at + 1)
    if seconds and seconds >= 9223372036854775808 then
      seconds = -1 -- before 1970: earlier than any as-of time of ours, and float64 holds no more of it
    end
  end
  if byte(data, at) == 16 then
    nanos, at = varint(data, at + 1)
  end
  if not seconds or not nanos or at ~= #data + 1 then
    return nil
  end
  return seconds, nanos
end
"""
"""Lua: parse(data), whole seconds and nanoseconds of a stored event time."""

# KEYS: the users.  ARGV: 1 event time field, 2 its value, 3 fence field, 4 its value, 5 as-of seconds, 6 token,
# 7 state field, 8 history_until field, 9 state_version field, 10 its value, 11 encoded_at field, 12 its value, 13 the
# seconds an as-of time may be ahead, then the state and the history_until of each user.
# Returns how many rows were written; minus the seconds that the as-of time lies ahead of Redis's own clock where it
# does: the writer's clock may be the one that is wrong, and a row from the future would block every later write.
COMPARE_AND_SET: Final = (
    PARSE_TIMESTAMP
    + """
local ts_field, ts, fence_field, fence = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local as_of, token = tonumber(ARGV[5]), tonumber(ARGV[6])
local call = redis.call

local ahead = as_of - tonumber(call('TIME')[1])
if ahead > tonumber(ARGV[13]) then
  return -ahead
end

-- Whether the row that stands there gives way. A torn event time always does: nothing can be read from it.
local function may_write(old_ts, old_fence)
  if not old_ts then
    return true
  end
  if old_ts ~= ts then
    local seconds, nanos = parse(old_ts)
    if not seconds or seconds < as_of then
      return true
    end
    if seconds > as_of or nanos > 0 then
      return false
    end
  end
  if not old_fence or old_fence == fence then
    return true
  end
  local fenced_as_of, fenced_token = string.match(old_fence, '^(-?%d+):(%d+)$')
  return tonumber(fenced_as_of) ~= as_of or tonumber(fenced_token) <= token
end

local written = 0
for i, key in ipairs(KEYS) do
  local old = call('HMGET', key, ts_field, fence_field)
  if may_write(old[1], old[2]) then
    call('HSET', key, ARGV[7], ARGV[12 + 2 * i], ARGV[8], ARGV[13 + 2 * i], ARGV[9], ARGV[10], ARGV[11], ARGV[12],
         ts_field, ts, fence_field, fence)
    written = written + 1
  end
end
return written
"""
)


def sha_of(script: str) -> str:
    """The name by which Redis knows a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


SCRIPT_SHA: Final = sha_of(COMPARE_AND_SET)


class Pace:
    """Holds a writer down to so many rows a second, counted over all that share it."""

    def __init__(self, rows_per_s: float) -> None:
        """Raises ConfigError for a rate of 0 or below."""
        if not rows_per_s > 0:
            raise ConfigError(f"a rate must be above 0 rows/s, got {rows_per_s}")
        self._rows_per_s = rows_per_s
        self._free_at = 0.0

    def batch_rows(self, most: int) -> int:
        """Rows of a round trip, at most `most`: a hundredth of a second's worth. One long burst a second would keep the
        rate as well, and everybody else who asks Redis meanwhile would wait behind it."""
        return max(1, min(most, round(self._rows_per_s / 100)))

    def wait_for(self, rows: int) -> None:
        """Sleep until the rows sent before have taken their time, then count these."""
        now = time.monotonic()
        if self._free_at > now:
            time.sleep(self._free_at - now)
        self._free_at = max(self._free_at, now) + rows / self._rows_per_s


@dataclass(frozen=True, slots=True)
class PublishCounts:
    """What became of the rows of a publish."""

    written: int = 0
    """Rows that stand in Redis as given, whether or not they stood there before."""
    stale: int = 0
    """Rows that lost to a later as-of time or token."""
    rejected: int = 0
    """Rows never sent: a number that is not finite, or a time in the future."""

    def __add__(self, other: "PublishCounts") -> "PublishCounts":
        return PublishCounts(self.written + other.written, self.stale + other.stale, self.rejected + other.rejected)


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3) -> redis.Redis:
    """A client whose every wait is bounded: `timeout_s` a connect and a read, `retries` more attempts a command."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries),
    )


def check_clock(client: redis.Redis, as_of_us: int) -> None:
    """Raises ConfigError where an as-of time is in the future by Redis's clock, StoreUnavailable without an answer."""
    try:
        answer: Any = client.time()
    except RedisError as error:
        raise StoreUnavailable(f"Redis did not tell its time: {type(error).__name__}: {error}") from error
    ahead_s = as_of_us // 1_000_000 - int(answer[0])
    if ahead_s > FUTURE_TOLERANCE_S:
        raise ConfigError(
            f"the as-of time lies {ahead_s:,} s in the future by Redis's clock (allowed: {FUTURE_TOLERANCE_S} s); "
            "check this machine's clock and --as-of. Nothing was encoded"
        )


def publish_table(
    client_or_url: redis.Redis | str,
    table: pa.Table,
    state_version: str,
    token: int,
    *,
    codec: StateCodec | None = None,
    now_s: float | None = None,
    project: str = layout.PROJECT,
    batch_rows: int = BATCH_ROWS,
    pace: Pace | None = None,
) -> PublishCounts:
    """Writes the rows of a states table that are not older than what stands in Redis.

    table: columns user_id (int64 or string), state (list<float32>[D], or binary where there is a codec), state_version
    (string), history_until (int64 us), encoded_at (int64 us), event_timestamp (timestamp, whole seconds).
    state_version: what every row must carry.  token: the run's fencing token, 0 or more.  codec: that of the state
    version.  now_s: the clock in seconds; None reads it.  pace: holds the rows a second down; None sends as fast as
    Redis takes them.
    A repeated or interrupted publish may be repeated: equal (as-of, token) writes the same bytes again.
    Raises DataError for a table that is not of this kind (nothing is written), ConfigError where the as-of time lies in
    the future by Redis's clock (nothing of that time is written), StoreUnavailable where Redis does not answer or
    refuses writes (earlier batches are written).
    """
    if not 0 <= token <= MAX_TOKEN:
        raise DataError(f"token must be in [0, 2**53), got {token}")
    rows = _Rows.from_table(table, state_version, codec)
    keep = rows.publishable(time.time() if now_s is None else now_s)
    counts = PublishCounts(rejected=len(keep) - int(keep.sum()))
    if not keep.any():
        return counts
    if isinstance(client_or_url, str):
        with connect(client_or_url) as client:
            return counts + _publish(client, rows, keep, state_version, token, project, batch_rows, pace)
    return counts + _publish(client_or_url, rows, keep, state_version, token, project, batch_rows, pace)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The checked columns of a states table."""

    user_ids: NDArray[np.int64] | list[str]
    stored: NDArray[Any]
    """f32 [U, D]; the bytes of a codec: u8 [U, B]."""
    finite_U: NDArray[np.bool_]
    history_until_us: NDArray[np.int64]
    encoded_at_us: NDArray[np.int64]
    as_of_s: NDArray[np.int64]

    @classmethod
    def from_table(cls, table: pa.Table, state_version: str, codec: StateCodec | None) -> "_Rows":
        columns = {}
        for name in ("user_id", *layout.FEATURES, "event_timestamp"):
            if name not in table.column_names:
                raise DataError(f"states: column {name} is missing, got {table.column_names}")
            columns[name] = table.column(name).combine_chunks()
            if columns[name].null_count:
                raise DataError(f"states: column {name} holds {columns[name].null_count} nulls")
        others = pc.unique(columns["state_version"]).to_pylist()
        if others and others != [state_version]:
            raise DataError(f"states: every row must carry state_version {state_version!r}, got {others[:3]}")
        if not pa.types.is_timestamp(columns["event_timestamp"].type):
            raise DataError(f"states: event_timestamp must be a timestamp, got {columns['event_timestamp'].type}")
        event_us = columns["event_timestamp"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
        if (event_us % 1_000_000).any() or (event_us < 0).any():
            raise DataError("states: event_timestamp must be in whole seconds, 1970 or later")
        user_id_type = columns["user_id"].type
        if pa.types.is_integer(user_id_type):
            user_ids = columns["user_id"].cast(pa.int64()).to_numpy(zero_copy_only=False)
        elif pa.types.is_string(user_id_type) or pa.types.is_large_string(user_id_type):
            user_ids = columns["user_id"].to_pylist()
        else:
            raise DataError(f"states: user_id must be int64 or string, got {user_id_type}")
        stored, finite_U = _stored(columns["state"], codec)
        return cls(
            user_ids,
            stored,
            finite_U,
            columns["history_until"].cast(pa.int64()).to_numpy(),
            columns["encoded_at"].cast(pa.int64()).to_numpy(),
            event_us // 1_000_000,
        )

    def publishable(self, now_s: float) -> NDArray[np.bool_]:
        """bool [U]: finite, not from the future, and seen nothing later than its own as-of time."""
        return (
            self.finite_U
            & (self.as_of_s <= now_s + FUTURE_TOLERANCE_S)
            & (self.encoded_at_us <= (now_s + FUTURE_TOLERANCE_S) * 1e6)
            & (self.history_until_us <= self.encoded_at_us)
        )

    def groups(self, keep: NDArray[np.bool_]) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
        """(as-of seconds, encoded_at us, row numbers) of the rows to keep: one group for a run's table."""
        kept = np.flatnonzero(keep)
        times, which = np.unique(
            np.stack([self.as_of_s[kept], self.encoded_at_us[kept]], axis=1), axis=0, return_inverse=True
        )
        for group, (as_of_s, encoded_at_us) in enumerate(times.tolist()):
            yield as_of_s, encoded_at_us, kept[which.reshape(-1) == group]


def _stored(column: pa.Array, codec: StateCodec | None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """What goes into the field, and bool [U]: whether all its numbers are finite. Raises DataError."""
    if codec is None:
        state_UD = _state_matrix(column)
        return state_UD, np.logical_and.reduce(np.isfinite(state_UD), axis=1)
    data_UB = _byte_matrix(column, codec)
    if not len(data_UB):
        return data_UB, np.empty(0, np.bool_)
    try:
        return data_UB, np.logical_and.reduce(np.isfinite(codec.decode_rows(data_UB)), axis=1)
    except ValueError as error:
        raise DataError(f"states: {error}") from None


def _state_matrix(column: pa.Array) -> NDArray[np.float32]:
    """f32 [U, D] of a list column. Raises DataError for lists of different lengths."""
    if not (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        raise DataError(f"states: state must be a list of float32, got {column.type}")
    if column.type.value_type != pa.float32():
        raise DataError(f"states: state must be a list of float32, got {column.type}")
    values = column.flatten()
    if values.null_count:
        raise DataError(f"states: state holds {values.null_count} nulls")
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) > 1:
        raise DataError(f"states: every state must have the same length, got {sorted(widths)[:5]}")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(column), widths[0] if widths else 0)


def _byte_matrix(column: pa.Array, codec: StateCodec) -> NDArray[np.uint8]:
    """u8 [U, B] of a binary column. Raises DataError for values of different lengths."""
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"states: state must be binary, the bytes of {codec.name}, got {column.type}")
    sizes = pc.unique(pc.binary_length(column)).to_pylist()
    if len(sizes) > 1:
        raise DataError(f"states: every state must have the same number of bytes, got {sorted(sizes)[:5]}")
    if not sizes:
        return np.empty((0, 0), np.uint8)
    column = column.cast(pa.large_binary())
    start = int(np.frombuffer(column.buffers()[1], np.int64)[column.offset])
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[start : start + len(column) * sizes[0]]
    return data.reshape(len(column), sizes[0])


def _publish(
    client: redis.Redis,
    rows: _Rows,
    keep: NDArray[np.bool_],
    state_version: str,
    token: int,
    project: str,
    batch_rows: int,
    pace: Pace | None,
) -> PublishCounts:
    view = layout.view_name(state_version)
    state_field, version_field, until_field, encoded_field, timestamp_field = layout.row_fields(view)
    counts = PublishCounts()
    if pace is not None:
        batch_rows = pace.batch_rows(batch_rows)
    for as_of_s, encoded_at_us, group in rows.groups(keep):
        shared = [
            *(timestamp_field, layout.encode_timestamp(as_of_s)),
            *(layout.fence_field(view), layout.encode_fence(as_of_s, token)),
            *(as_of_s, token, state_field, until_field),
            *(version_field, layout.encode_string(state_version)),
            *(encoded_field, layout.encode_int64(encoded_at_us)),
            FUTURE_TOLERANCE_S,
        ]
        for start in range(0, len(group), batch_rows):
            batch = group[start : start + batch_rows]
            ids = rows.user_ids
            keys = layout.redis_keys(
                ids[batch] if isinstance(ids, np.ndarray) else [ids[row] for row in batch], project
            )
            values: list[bytes] = [b""] * (2 * len(batch))
            encode = layout.encode_states if rows.stored.dtype == np.float32 else layout.encode_blobs
            values[::2] = encode(rows.stored[batch])
            values[1::2] = layout.encode_int64s(rows.history_until_us[batch].tolist())
            if pace is not None:
                pace.wait_for(len(batch))
            written = _send(client, keys, shared, values)
            counts += PublishCounts(written=written, stale=len(batch) - written)
    return counts


def _send(client: redis.Redis, keys: list[bytes], shared: list[Any], values: list[bytes]) -> int:
    """One round trip; rows written. The script is loaded where the server does not know it (a restart forgets)."""
    try:
        try:
            return _call(client, keys, shared, values)
        except NoScriptError:
            client.script_load(COMPARE_AND_SET)
            return _call(client, keys, shared, values)
    except RedisError as error:
        kind = "is still loading" if isinstance(error, BusyLoadingError) else "did not take the states"
        kind = "is a read-only replica" if isinstance(error, ReadOnlyError) else kind
        raise StoreUnavailable(f"Redis {kind}: {type(error).__name__}: {str(error)[:300]}") from error


def _call(client: redis.Redis, keys: list[bytes], shared: list[Any], values: list[bytes]) -> int:
    with client.pipeline(transaction=False) as pipe:
        for start in range(0, len(keys), ROWS_PER_CALL):
            some = keys[start : start + ROWS_PER_CALL]
            pipe.evalsha(SCRIPT_SHA, len(some), *some, *shared, *values[2 * start : 2 * (start + ROWS_PER_CALL)])
        replies = pipe.execute()
    if min(replies) < 0:
        raise ConfigError(
            f"an as-of time lies {-min(replies):,} s in the future by Redis's clock (allowed: {FUTURE_TOLERANCE_S} s); "
            "check this machine's clock and --as-of. Nothing of it was written"
        )
    return sum(replies)
