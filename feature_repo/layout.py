"""Feast's Redis bytes, without Feast: keys, field names and values of a stored user state.

Feast 0.67 keeps all feature views of a user in one Redis hash. The key is the entity key (serialisation version 3)
followed by the project; a feature's field is the murmur3 of "view:feature" in 4 bytes; values are `feast.types.Value`
messages; `_ts:<view>` holds the event time as `google.protobuf.Timestamp`. We add one field of our own per view, the
fence, which stock Feast neither reads nor writes. `tests/feature_repo/test_layout.py` holds every function to the bytes
of the installed Feast.

Pure: bytes in, bytes out; the standard library and numpy only.

A state stands as an Array(Float32), or, where the release has a codec, as Bytes that the codec makes and reads; callers
hand in the codec of the view's version (None: there is none).

Legend: U users, D state width, B bytes of a state that a codec made.
"""

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PROJECT = "hybrid_tower"
"""The Feast project. Redis keys end in it, so no other project sharing the Redis may be a suffix of it."""

ENTITY = "user_id"
"""Entity and join key."""

SERVICE = "user_state"
"""The FeatureService that stock Feast clients ask for."""

FEATURES = ("state", "state_version", "history_until", "encoded_at")
"""Features of a view, in the order of `row_fields`."""

ROW_LENGTH = len(FEATURES) + 1
"""Values of a row: the features and the event time."""

_VALUE_TYPE_STRING = 2  # feast.types.ValueType.Enum
_VALUE_TYPE_INT64 = 4
_STRING_VAL = 2 << 3 | 2  # feast.types.Value: field number << 3 | wire type
_INT64_VAL = 4 << 3
_BYTES_VAL = 1 << 3 | 2
_FLOAT_LIST_VAL = b"\x82\x01"  # field 16, wire type 2
_LIST_VAL = 1 << 3 | 2  # feast.types.FloatList.val, packed
_TIMESTAMP_SECONDS = 1 << 3
_TWO_63 = 1 << 63
_TWO_64 = 1 << 64


class Codec(Protocol):
    """What turns states into the bytes of one field and back (model.state_codec)."""

    def encode(self, state_UW: NDArray[np.float32]) -> NDArray[np.uint8]:
        """f32 [U, D] to u8 [U, B]."""
        ...

    def decode(self, data: bytes) -> NDArray[np.float32]:
        """f32 [D]. Raises ValueError for bytes that no state has."""
        ...


class LayoutError(ValueError):
    """A stored row is torn, truncated, ill-typed or missing a field, or an id cannot be a key."""


@dataclass(frozen=True, slots=True)
class StateRow:
    """One user's row of one view, as stored.

    Equality compares the vector bit for bit, so a NaN equals itself.
    """

    state: NDArray[np.float32]
    """f32 [D]; read-only where it was decoded without a codec."""
    state_version: str
    history_until_us: int
    """Time of the last event the state has seen."""
    encoded_at_us: int
    """As-of time of the run that wrote it."""
    event_timestamp_s: int
    """As-of time in whole seconds, by which Feast orders writes."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StateRow):
            return NotImplemented
        return (
            self.state_version == other.state_version
            and self.history_until_us == other.history_until_us
            and self.encoded_at_us == other.encoded_at_us
            and self.event_timestamp_s == other.event_timestamp_s
            and self.state.dtype == other.state.dtype
            and self.state.shape == other.state.shape
            and self.state.tobytes() == other.state.tobytes()
        )

    def __hash__(self) -> int:
        return hash((self.state.tobytes(), self.state_version, self.history_until_us, self.encoded_at_us))

    def is_finite(self) -> bool:
        """Whether every number of the state is finite."""
        return bool(np.isfinite(self.state).all())


# Names


def view_name(state_version: str) -> str:
    """The FeatureView that holds the states of `state_version`."""
    return f"user_state__{state_version}"


@functools.lru_cache(maxsize=4096)
def field_name(view: str, feature: str) -> bytes:
    """Hash field of one feature: murmur3 of "view:feature", 4 bytes little-endian."""
    return struct.pack("<I", murmur3_32(f"{view}:{feature}".encode()))


@functools.lru_cache(maxsize=1024)
def timestamp_field(view: str) -> bytes:
    """Hash field of the view's event time."""
    return b"_ts:" + view.encode()


def fence_field(view: str) -> bytes:
    """Hash field of the view's fence: who wrote the row that stands there. Ours; Feast never touches it."""
    return field_name(view, "_fence")


def row_fields(view: str) -> list[bytes]:
    """The hash fields of a row: the features in the order of `FEATURES`, then the event time.

    The values that HMGET gives for these fields, in this order, are what `decode_row` takes.
    """
    return [*(field_name(view, feature) for feature in FEATURES), timestamp_field(view)]


def murmur3_32(data: bytes) -> int:
    """MurmurHash3 x86 32-bit of `data`, seed 0, unsigned. Algorithm: Austin Appleby, public domain."""
    hashed = 0
    blocks = len(data) // 4
    for (block,) in struct.iter_unpack("<I", data[: blocks * 4]):
        hashed ^= _murmur_mix(block)
        hashed = (hashed << 13 | hashed >> 19) & 0xFFFFFFFF
        hashed = (hashed * 5 + 0xE6546B64) & 0xFFFFFFFF
    tail = data[blocks * 4 :]
    if tail:
        hashed ^= _murmur_mix(int.from_bytes(tail, "little"))
    hashed ^= len(data)
    hashed = ((hashed ^ hashed >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    hashed = ((hashed ^ hashed >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return hashed ^ hashed >> 16


def _murmur_mix(block: int) -> int:
    block = (block * 0xCC9E2D51) & 0xFFFFFFFF
    block = (block << 15 | block >> 17) & 0xFFFFFFFF
    return (block * 0x1B873593) & 0xFFFFFFFF


# Keys


@functools.lru_cache(maxsize=16)
def _key_ends(project: str) -> tuple[bytes, bytes, bytes]:
    """What stands before an int64 id, before a string id's length, and after either."""
    entity = ENTITY.encode()
    head = struct.pack("<III", 1, _VALUE_TYPE_STRING, len(entity)) + entity
    return (
        head + struct.pack("<II", _VALUE_TYPE_INT64, 8),
        head + struct.pack("<I", _VALUE_TYPE_STRING),
        project.encode(),
    )


def redis_key(user_id: int | str, project: str = PROJECT) -> bytes:
    """Key of the user's hash. The bytes of the int 7 and the string "7" differ, as they do in Feast.

    Raises LayoutError for an int outside int64 and for a string that UTF-8 cannot express.
    """
    before_int, before_string, end = _key_ends(project)
    try:
        if isinstance(user_id, str):
            data = user_id.encode()
            return before_string + struct.pack("<I", len(data)) + data + end
        return before_int + struct.pack("<q", user_id) + end
    except (struct.error, UnicodeEncodeError) as error:
        raise LayoutError(f"user id must be an int64 or a UTF-8 string, got {user_id!r}: {error}") from None


def redis_keys(user_ids: NDArray[np.int64] | Sequence[str], project: str = PROJECT) -> list[bytes]:
    """`redis_key` of many users: i64 [U] or U strings. Raises LayoutError."""
    if not isinstance(user_ids, np.ndarray):
        return [redis_key(user_id, project) for user_id in user_ids]
    if user_ids.dtype != np.int64 or user_ids.ndim != 1:
        raise LayoutError(f"user ids must be int64 of one dimension, got {user_ids.dtype} {user_ids.shape}")
    before, _, after = _key_ends(project)
    ids = np.ascontiguousarray(user_ids, dtype="<i8").view(np.uint8).reshape(-1, 8)
    return _glue(before, ids, after)


def _glue(before: bytes, middle_UB: NDArray[np.uint8], after: bytes = b"") -> list[bytes]:
    """U messages `before + middle_UB[u] + after`, built in one buffer."""
    start, stop = len(before), len(before) + middle_UB.shape[1]
    length = stop + len(after)
    whole = np.empty((middle_UB.shape[0], length), np.uint8)
    whole[:, :start] = np.frombuffer(before, np.uint8)
    whole[:, start:stop] = middle_UB
    whole[:, stop:] = np.frombuffer(after, np.uint8)
    data = whole.tobytes()
    return [data[at : at + length] for at in range(0, len(data), length)]


def is_user_key(key: bytes, project: str = PROJECT) -> bool:
    """Whether a Redis key is that of a user's hash of the project."""
    before_int, before_string, end = _key_ends(project)
    return key.startswith((before_int, before_string)) and key.endswith(end)


# Values


def encode_state(state: NDArray[np.float32], codec: Codec | None = None) -> bytes:
    """f32 [D] as a Feast Array(Float32) value; by a codec, as a Bytes value."""
    if codec is not None:
        return encode_blobs(codec.encode(state[None]))[0]
    data = np.ascontiguousarray(state, dtype="<f4").tobytes()
    return _state_head(len(data)) + data


def encode_states(state_UD: NDArray[np.float32]) -> list[bytes]:
    """f32 [U, D] as U Feast Array(Float32) values; many times faster than one by one."""
    if state_UD.ndim != 2:
        raise LayoutError(f"states must have the shape [U, D], got {state_UD.shape}")
    data = np.ascontiguousarray(state_UD, dtype="<f4")
    width = 4 * data.shape[1]
    if not width:
        return [_state_head(0)] * data.shape[0]
    return _glue(_state_head(width), data.view(np.uint8))


def encode_blobs(data_UB: NDArray[np.uint8]) -> list[bytes]:
    """u8 [U, B] as U Feast Bytes values."""
    if data_UB.ndim != 2:
        raise LayoutError(f"stored states must have the shape [U, B], got {data_UB.shape}")
    return _glue(bytes((_BYTES_VAL,)) + _varint(data_UB.shape[1]), data_UB)


def encode_string(value: str) -> bytes:
    """A Feast String value."""
    data = value.encode()
    return bytes((_STRING_VAL,)) + _varint(len(data)) + data


def encode_int64(value: int) -> bytes:
    """A Feast Int64 value."""
    return bytes((_INT64_VAL,)) + _varint(value)


def encode_int64s(values: Iterable[int]) -> list[bytes]:
    """Feast Int64 values."""
    return [encode_int64(value) for value in values]


def encode_timestamp(seconds: int) -> bytes:
    """Whole seconds since the epoch as `google.protobuf.Timestamp`; the epoch itself is the empty message."""
    return bytes((_TIMESTAMP_SECONDS,)) + _varint(seconds) if seconds else b""


def encode_fence(as_of_s: int, token: int) -> bytes:
    """Fence of a row: ASCII "as-of seconds:token".

    It names the as-of time it belongs to: after stock Feast has overwritten the row the fence no longer matches the
    event time, and the row counts as token 0.
    """
    return b"%d:%d" % (as_of_s, token)


def decode_fence(value: bytes | None) -> tuple[int, int] | None:
    """(as-of seconds, token) of a stored fence; None without one. Raises LayoutError."""
    if value is None:
        return None
    as_of_s, _, token = value.partition(b":")
    try:
        return int(as_of_s), int(token)
    except ValueError:
        raise LayoutError(f"fence: wanted seconds:token, got {value!r}") from None


@functools.lru_cache(maxsize=64)
def _state_head(size: int) -> bytes:
    """What stands before `size` bytes of packed floats. No floats make an empty list, without the inner field."""
    if not size:
        return _FLOAT_LIST_VAL + b"\x00"
    inner = bytes((_LIST_VAL,)) + _varint(size)
    return _FLOAT_LIST_VAL + _varint(len(inner) + size) + inner


@functools.lru_cache(maxsize=1024)
def _state_head_of(length: int) -> bytes | None:
    """The head that a whole state message of `length` bytes must have; None where no message is so long."""
    for size in range(max(0, length - 14) // 4 * 4, length + 1, 4):
        if len(_state_head(size)) + size == length:
            return _state_head(size)
    return None


def _varint(value: int) -> bytes:
    """Protobuf varint of an int64; negative numbers take ten bytes."""
    if not -_TWO_63 <= value < _TWO_63:
        raise LayoutError(f"wanted an int64, got {value}")
    rest = int(value) % _TWO_64
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _read_varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    """(unsigned number, where it ends). Raises LayoutError."""
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        if byte < 0x80:
            return (value | byte << shift) & (_TWO_64 - 1), at
        value |= (byte & 0x7F) << shift
        shift += 7
    raise LayoutError(f"{name}: the number is truncated or too long")


def _signed(value: int) -> int:
    return value - _TWO_64 if value >= _TWO_63 else value


# Rows


def encode_row(row: StateRow, view: str, codec: Codec | None = None) -> dict[bytes, bytes]:
    """The hash fields and values of a row, byte for byte what Feast writes. A NaN passes: the writers refuse it."""
    state, state_version, history_until, encoded_at, timestamp = row_fields(view)
    return {
        state: encode_state(row.state, codec),
        state_version: encode_string(row.state_version),
        history_until: encode_int64(row.history_until_us),
        encoded_at: encode_int64(row.encoded_at_us),
        timestamp: encode_timestamp(row.event_timestamp_s),
    }


def decode_row(values: Sequence[bytes | None], codec: Codec | None = None) -> StateRow | None:
    """The row in the values of `row_fields`, or None for an unknown user (every value is None).

    The state is a read-only view of the stored bytes, or what the codec makes of them. What it should hold (version,
    length, finite numbers) is for the caller to check. Raises LayoutError, which names the field, where
    the row is not whole.
    """
    if len(values) != ROW_LENGTH:
        raise LayoutError(f"row: wanted {ROW_LENGTH} values, got {len(values)}")
    state, state_version, history_until, encoded_at, timestamp = values
    if state is None or state_version is None or history_until is None or encoded_at is None or timestamp is None:
        if all(value is None for value in values):
            return None
        names = (*FEATURES, "event timestamp")
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        raise LayoutError(f"{', '.join(missing)}: missing from the row")
    return StateRow(
        _decode_state(state) if codec is None else _decode_blob(state, codec),
        _decode_string(state_version, "state_version"),
        _decode_int64(history_until, "history_until"),
        _decode_repeated_int64(encoded_at, "encoded_at"),
        decode_timestamp(timestamp),
    )


def _decode_state(data: bytes) -> NDArray[np.float32]:
    head = _state_head_of(len(data))
    if head is None or not data.startswith(head):
        if not data.startswith(_FLOAT_LIST_VAL):
            raise LayoutError(
                f"state: wanted a list of float32, got a value that begins with {data[:2].hex() or 'nothing'}"
            )
        raise LayoutError(f"state: its {len(data)} bytes are not what its length prefix says")
    return np.frombuffer(data, "<f4", offset=len(head))


def _decode_blob(data: bytes, codec: Codec) -> NDArray[np.float32]:
    if not data or data[0] != _BYTES_VAL:
        raise LayoutError(f"state: wanted bytes, got a value that begins with {data[:1].hex() or 'nothing'}")
    length, at = _read_varint(data, 1, "state")
    if len(data) - at != length:
        raise LayoutError(f"state: wanted {length} bytes, got {len(data) - at}")
    try:
        return codec.decode(data[at:])
    except ValueError as error:
        raise LayoutError(f"state: {error}") from None


# The version and the two as-of times are the same in every row of a run, so what they decode to is remembered.


@functools.lru_cache(maxsize=256)
def _decode_string(data: bytes, name: str) -> str:
    if not data or data[0] != _STRING_VAL:
        raise LayoutError(f"{name}: wanted a string, got a value that begins with {data[:1].hex() or 'nothing'}")
    length, at = _read_varint(data, 1, name)
    if len(data) - at != length:
        raise LayoutError(f"{name}: wanted {length} bytes, got {len(data) - at}")
    try:
        return data[at:].decode()
    except UnicodeDecodeError as error:
        raise LayoutError(f"{name}: {error}") from None


def _decode_int64(data: bytes, name: str) -> int:
    if not data or data[0] != _INT64_VAL:
        raise LayoutError(f"{name}: wanted an int64, got a value that begins with {data[:1].hex() or 'nothing'}")
    value, at = _read_varint(data, 1, name)
    if at != len(data):
        raise LayoutError(f"{name}: {len(data) - at} bytes too many")
    return _signed(value)


_decode_repeated_int64 = functools.lru_cache(maxsize=256)(_decode_int64)


@functools.lru_cache(maxsize=256)
def decode_timestamp(data: bytes) -> int:
    """Seconds since the epoch of a stored event time; a part of a second is dropped. Raises LayoutError."""
    seconds = at = 0
    if data[:1] == b"\x08":
        seconds, at = _read_varint(data, 1, "event timestamp")
    if data[at : at + 1] == b"\x10":
        _, at = _read_varint(data, at + 1, "event timestamp")
    if at != len(data):
        raise LayoutError(f"event timestamp: {data.hex()} is not a timestamp")
    return _signed(seconds)
