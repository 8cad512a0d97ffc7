"""Which shard a user is in."""

import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest

from pipelines.transforms.read_shard import shard_of, shards_of, split_by_shard

INTS = [0, 1, -1, 42, 2**63 - 1, -(2**63)]
STRINGS = ["", "a", "user-42", "é", "雪", "a"]


@pytest.mark.parametrize("shards", [1, 3, 16, 1000])
def test_shard_is_the_crc32_of_the_id_bytes(shards: int) -> None:
    assert [shard_of(i, shards) for i in INTS] == [zlib.crc32(struct.pack("<q", i)) % shards for i in INTS]
    assert [shard_of(s, shards) for s in STRINGS] == [zlib.crc32(s.encode()) % shards for s in STRINGS]
    assert shards_of(pa.array(INTS), shards).tolist() == [shard_of(i, shards) for i in INTS]
    assert shards_of(pa.array(STRINGS), shards).tolist() == [shard_of(s, shards) for s in STRINGS]


def test_the_shards_of_known_users_never_change() -> None:
    assert shards_of(pa.array([1, 2, 3, 4, 5]), 16).tolist() == [shard_of(i, 16) for i in range(1, 6)]
    assert zlib.crc32(b"123456789") == 0xCBF43926  # the check value of this CRC
    assert shard_of("123456789", 2**32) == 0xCBF43926
    assert shards_of(pa.array([], pa.string()), 4).tolist() == []


def test_random_ids_match_zlib() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    assert shards_of(pa.array(ids), 97).tolist() == [shard_of(int(i), 97) for i in ids]


def test_rows_keep_their_order_within_a_shard() -> None:
    table = pa.table({"a": range(6)})
    parts = {n: part["a"].to_pylist() for n, part in split_by_shard(table, np.array([2, 0, 2, 0, 2, 3]), 4)}
    assert parts == {0: [1, 3], 2: [0, 2, 4], 3: [5]}
