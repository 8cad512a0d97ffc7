"""The layout against hand-worked bytes, and against the installed Feast's own functions (one subprocess)."""

import base64
import contextlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import mmh3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import layout
from feature_repo.layout import LayoutError, StateRow
from model.state_codec import StateCodec

VERSION = "0123456789abcdef"
VIEW = layout.view_name(VERSION)
INT64 = st.integers(-(2**63), 2**63 - 1)
NUMBERS = [0, 1, 7, -1, -(2**63), 2**63 - 1, 10**12]
STRINGS = ["", "7", "a", "user-42", "žluťoučký", "用户", "🦊", "a\x00b"]
IDS: list[int | str] = [*NUMBERS, *STRINGS]


def make_row(state: Any = (0.5, -2.0), **changes: Any) -> StateRow:
    row = StateRow(
        state=np.asarray(state, np.float32),
        state_version=VERSION,
        history_until_us=1_507_949_999_123_456,
        encoded_at_us=1_507_950_000_000_000,
        event_timestamp_s=1_507_950_000,
    )
    return replace(row, **changes)


def values_of(row: StateRow) -> list[bytes]:
    encoded = layout.encode_row(row, VIEW)
    return [encoded[field] for field in layout.row_fields(VIEW)]


def test_key_by_hand() -> None:
    head = b"\x01\0\0\0\x02\0\0\0\x07\0\0\0user_id"
    assert layout.redis_key(258) == head + b"\x04\0\0\0\x08\0\0\0\x02\x01\0\0\0\0\0\0hybrid_tower"
    assert layout.redis_key("ab", "p") == head + b"\x02\0\0\0\x02\0\0\0abp"


def test_row_by_hand() -> None:
    assert values_of(make_row(history_until_us=300, encoded_at_us=-1, event_timestamp_s=1)) == [
        b"\x82\x01\x0a\x0a\x08\x00\x00\x00\x3f\x00\x00\x00\xc0",
        b"\x12\x10" + VERSION.encode(),
        b"\x20\xac\x02",
        b"\x20" + b"\xff" * 9 + b"\x01",
        b"\x08\x01",
    ]


def test_row_fields_are_the_features_and_the_event_time() -> None:
    fields = layout.row_fields("v")
    assert fields[:4] == [layout.field_name("v", feature) for feature in layout.FEATURES]
    assert fields[4] == b"_ts:v"
    assert len(set(fields)) == layout.ROW_LENGTH
    # Feast takes every field that begins with "_ts:" for a view of its own when it deletes one.
    assert not layout.fence_field("v").startswith(b"_ts:")


@given(st.binary(max_size=40))
def test_murmur3_is_mmh3(data: bytes) -> None:
    assert layout.murmur3_32(data) == mmh3.hash(data, signed=False)


@given(st.lists(st.floats(width=32), max_size=70), st.text(max_size=20), INT64, INT64, INT64)
def test_round_trip(state: list[float], version: str, until: int, encoded: int, seconds: int) -> None:
    row = StateRow(np.array(state, np.float32), version, until, encoded, seconds)
    assert layout.decode_row(values_of(row)) == row


@pytest.mark.parametrize("width", [0, 1, 2, 30, 31, 32, 33, 64, 256, 4095, 4096, 5000])
def test_every_width_round_trips(width: int) -> None:
    row = make_row(np.arange(width))
    assert layout.decode_row(values_of(row)) == row
    assert layout.encode_states(row.state[None]) == [layout.encode_state(row.state)]


def test_unknown_user_is_none() -> None:
    assert layout.decode_row([None] * layout.ROW_LENGTH) is None


def test_nan_decodes_and_says_so() -> None:
    row = layout.decode_row(values_of(make_row([1.0, math.nan])))
    assert row is not None
    assert not row.is_finite()
    assert make_row().is_finite()


@pytest.mark.parametrize("index", range(layout.ROW_LENGTH))
def test_a_missing_field_is_named(index: int) -> None:
    values: list[bytes | None] = [*values_of(make_row())]
    values[index] = None
    with pytest.raises(LayoutError, match=f"^{[*layout.FEATURES, 'event timestamp'][index]}: missing"):
        layout.decode_row(values)


@pytest.mark.parametrize("width", [2, 40, 5000])
@pytest.mark.parametrize("index", range(layout.ROW_LENGTH))
def test_every_truncation_is_refused(index: int, width: int) -> None:
    whole = values_of(make_row(np.arange(width)))
    name = [*layout.FEATURES, "event timestamp"][index]
    for length in {0, 1, 2, 3, 4, 5, 6, len(whole[index]) // 2, len(whole[index]) - 4, len(whole[index]) - 1}:
        if not 0 <= length < len(whole[index]) or (name == "event timestamp" and length == 0):
            continue  # the empty timestamp is the epoch
        torn = [*whole]
        torn[index] = torn[index][:length]
        with pytest.raises(LayoutError, match=name):
            layout.decode_row(torn)


@pytest.mark.parametrize("codec", [StateCodec("float16"), StateCodec("int8"), StateCodec("int8", tokens=4)])
def test_a_state_of_a_codec(codec: StateCodec) -> None:
    row = make_row(np.linspace(-2, 3, 128))
    values = [*layout.encode_row(row, VIEW, codec).values()]
    stored = codec.encode(row.state[None]).tobytes()
    assert values[0] == b"\x0a" + layout._varint(len(stored)) + stored  # field 1 of feast.types.Value
    found = layout.decode_row(values, codec)
    assert found == replace(row, state=codec.decode(stored))
    for length in (0, 1, 2, 3, len(values[0]) // 2, len(values[0]) - 1):
        with pytest.raises(LayoutError, match="state"):
            layout.decode_row([values[0][:length], *values[1:]], codec)
    with pytest.raises(LayoutError, match=r"wanted .* bytes"):
        layout.decode_row([values[0] + b"\0", *values[1:]], codec)
    with pytest.raises(LayoutError, match="state: wanted bytes"):  # a list of float32
        layout.decode_row(values_of(row), codec)
    with pytest.raises(LayoutError, match="state: wanted a list of float32"):
        layout.decode_row(values)
    odd = layout.encode_blobs(np.zeros((1, 3), np.uint8))[0]
    with pytest.raises(LayoutError, match=r"state: .* got 3 bytes"):
        layout.decode_row([odd, *values[1:]], codec)


@given(st.binary(max_size=12))
@settings(max_examples=200)
def test_any_bytes_of_a_codec_decode_or_raise_layout_error(data: bytes) -> None:
    values = values_of(make_row())
    for codec in (StateCodec("float16"), StateCodec("int8"), StateCodec("int8", tokens=2)):
        with contextlib.suppress(LayoutError):
            assert isinstance(layout.decode_row([data, *values[1:]], codec), StateRow)
        blob = layout.encode_blobs(np.frombuffer(data, np.uint8)[None])[0]
        with contextlib.suppress(LayoutError):
            assert isinstance(layout.decode_row([blob, *values[1:]], codec), StateRow)


@pytest.mark.parametrize("index", range(layout.ROW_LENGTH))
def test_trailing_bytes_are_refused(index: int) -> None:
    values = values_of(make_row())
    for extra in (b"\x00", b"\x00" * 4, b"\x10\x00\x10\x00"):
        torn = [*values]
        torn[index] += extra
        with pytest.raises(LayoutError):
            layout.decode_row(torn)


@given(st.data())
@settings(max_examples=200)
def test_any_bytes_decode_or_raise_layout_error(data: st.DataObject) -> None:
    values = values_of(make_row())
    index = data.draw(st.integers(0, layout.ROW_LENGTH - 1))
    mutable = bytearray(values[index])
    mutable[data.draw(st.integers(0, len(mutable) - 1))] = data.draw(st.integers(0, 255))
    values[index] = bytes(mutable)
    with contextlib.suppress(LayoutError):
        assert isinstance(layout.decode_row(values), StateRow)


def test_fields_of_another_type_are_refused() -> None:
    state, version, until, _, timestamp = values_of(make_row())
    for torn in ([version, version, until, until, timestamp], [state, until, until, until, timestamp]):
        with pytest.raises(LayoutError, match="wanted"):
            layout.decode_row(torn)
    with pytest.raises(LayoutError, match="encoded_at: wanted an int64"):
        layout.decode_row([state, version, until, version, timestamp])
    with pytest.raises(LayoutError, match="wanted 5 values, got 4"):
        layout.decode_row([state, version, until, until])
    with pytest.raises(LayoutError, match="state_version"):
        layout.decode_row([state, b"\x12\x02\xff\xfe", until, until, timestamp])


@pytest.mark.parametrize("user_id", [2**63, -(2**63) - 1, "\ud800"])
def test_an_id_that_is_no_key_is_refused(user_id: int | str) -> None:
    with pytest.raises(LayoutError, match="user id"):
        layout.redis_key(user_id)


def test_bulk_equals_one_by_one() -> None:
    ids = np.array(NUMBERS, np.int64)
    assert layout.redis_keys(ids) == [layout.redis_key(int(i)) for i in ids]
    assert layout.redis_keys(ids[::2], "p") == [layout.redis_key(int(i), "p") for i in ids[::2]]
    assert layout.redis_keys(STRINGS) == [layout.redis_key(i) for i in STRINGS]
    assert layout.redis_keys(ids[:0]) == []
    states = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    assert layout.encode_states(states) == [layout.encode_state(state) for state in states]
    assert layout.encode_states(states[:, :0]) == [layout.encode_state(state[:0]) for state in states]
    assert layout.encode_int64s([3, -3]) == [layout.encode_int64(3), layout.encode_int64(-3)]
    with pytest.raises(LayoutError, match="int64"):
        layout.redis_keys(ids.astype(np.int32))


def test_fence_round_trips() -> None:
    assert layout.decode_fence(layout.encode_fence(-5, 12)) == (-5, 12)
    assert layout.decode_fence(None) is None
    with pytest.raises(LayoutError, match="fence"):
        layout.decode_fence(b"rubbish")


def test_layout_imports_neither_feast_nor_redis() -> None:
    code = (
        "import sys, feature_repo.layout; "
        "bad = {m.partition('.')[0] for m in sys.modules} & {'feast', 'redis', 'google', 'mmh3', 'torch', 'pyarrow'}; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FEAST_BYTES = """
import base64, json, sys
from datetime import datetime, timezone
import numpy as np
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Value
from google.protobuf.timestamp_pb2 import Timestamp

asked = json.load(sys.stdin)
def key(user_id):
    value = Value(string_val=user_id) if isinstance(user_id, str) else Value(int64_val=user_id)
    return _redis_key("hybrid_tower", EntityKey(join_keys=["user_id"], entity_values=[value]), 3)
def state(bits):
    return Value(float_list_val=FloatList(val=np.array(bits, np.uint32).view(np.float32))).SerializeToString()
def timestamp(seconds):
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(seconds, timezone.utc))
    return stamp.SerializeToString()
answers = {
    "keys": [key(i) for i in asked["ids"]],
    "fields": [_mmh3(f) for f in asked["fields"]],
    "states": [state(bits) for bits in asked["states"]],
    "blobs": [Value(bytes_val=base64.b64decode(b)).SerializeToString() for b in asked["blobs"]],
    "strings": [Value(string_val=s).SerializeToString() for s in asked["strings"]],
    "ints": [Value(int64_val=i).SerializeToString() for i in asked["ints"]],
    "timestamps": [timestamp(i) for i in asked["timestamps"]],
}
print(json.dumps({k: [base64.b64encode(b).decode() for b in v] for k, v in answers.items()}))
"""


def test_bytes_equal_feasts_own() -> None:
    rng = np.random.default_rng(1)
    ids = [*IDS, *(int(i) for i in rng.integers(-(2**63), 2**63, 200, dtype=np.int64)), "x" * 300]
    states = [rng.normal(size=width).astype(np.float32) for width in (0, 1, 31, 32, 64, 256, 4097)]
    states += [np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3.4e38], np.float32)]
    blobs = [rng.bytes(size) for size in (0, 1, 68, 127, 128, 20_000)]
    ints = [0, 1, -1, 127, 128, 2**31, 2**63 - 1, -(2**63), 1_507_950_000_000_000]
    timestamps = [0, 1, 127, 128, 1_507_950_000, 4_000_000_000, -1, -86_400]
    views = [layout.view_name(version) for version in (VERSION, "", "ffffffffffffffff")]
    pairs = [(view, feature) for view in views for feature in [*layout.FEATURES, "ž"]]
    strings = [i for i in ids if isinstance(i, str)]
    question = {
        "ids": ids,
        "fields": [f"{view}:{feature}" for view, feature in pairs],
        "states": [state.view(np.uint32).tolist() for state in states],
        "blobs": [base64.b64encode(blob).decode() for blob in blobs],
        "strings": strings,
        "ints": ints,
        "timestamps": timestamps,
    }
    done = subprocess.run(
        [sys.executable, "-c", FEAST_BYTES], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    feasts = {k: [base64.b64decode(b) for b in v] for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    assert feasts["keys"] == [layout.redis_key(i) for i in ids]
    assert feasts["fields"] == [layout.field_name(view, feature) for view, feature in pairs]
    assert feasts["states"] == [layout.encode_state(state) for state in states]
    assert feasts["blobs"] == [layout.encode_blobs(np.frombuffer(blob, np.uint8)[None])[0] for blob in blobs]
    assert feasts["strings"] == [layout.encode_string(s) for s in strings]
    assert feasts["ints"] == [layout.encode_int64(i) for i in ints]
    assert feasts["timestamps"] == [layout.encode_timestamp(i) for i in timestamps]
    assert [layout.decode_timestamp(b) for b in feasts["timestamps"]] == timestamps
