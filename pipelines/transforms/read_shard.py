"""Row groups of the log become chunks of events, each chunk of one shard of users."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict

import apache_beam as beam
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.event_log import RowGroup, read_row_group
from model.records import Id
from pipelines.io import to_chunks
from pipelines.runs import RunPlan
from pipelines.transforms.encode_shard import EVENTS, REJECTS, SENTINEL
from pipelines.transforms.merge_tail import whole

_SENTINELS = b""
"""The source element that makes every shard exist, whether or not it has events."""


def shard_of(user_id: Id, shards: int) -> int:
    """The shard of a user: CRC-32 of the id's bytes (little-endian int64, or UTF-8) modulo the number of shards."""
    data = user_id.to_bytes(8, "little", signed=True) if isinstance(user_id, int) else user_id.encode()
    return zlib.crc32(data) % shards


def shards_of(user_ids: pa.Array, shards: int) -> NDArray[np.int64]:
    """shard_of of every id. user_ids: int64 or string [n], no nulls. Returns i64 [n]."""
    if pa.types.is_int64(user_ids.type):
        return _crc32_of_int64(user_ids.to_numpy()) % shards
    encoded = user_ids.dictionary_encode()
    shard = np.array([shard_of(user_id, shards) for user_id in encoded.dictionary.to_pylist()], np.int64)
    return shard[encoded.indices.to_numpy()] if len(shard) else shard


def _crc32_table() -> NDArray[np.uint32]:
    """Remainder of each byte, polynomial 0xEDB88320 (the one of zlib)."""
    remainder = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        remainder = np.where(remainder & 1, np.uint32(0xEDB88320), np.uint32(0)) ^ (remainder >> np.uint32(1))
    return remainder


_CRC32 = _crc32_table()


def _crc32_of_int64(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """zlib.crc32 of each value's eight little-endian bytes, all values at once."""
    crc = np.full(len(values), 0xFFFFFFFF, np.uint32)
    for byte in values.astype("<i8").view(np.uint8).reshape(-1, 8).T:
        crc = _CRC32[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return (crc ^ np.uint32(0xFFFFFFFF)).astype(np.int64)


def split_by_shard(table: pa.Table, shard: NDArray[np.int64], shards: int) -> Iterator[tuple[int, pa.Table]]:
    """(shard, its rows) for every shard that has rows; rows keep their order."""
    order = np.argsort(shard, kind="stable")
    bounds = np.searchsorted(shard[order], np.arange(shards + 1))
    ordered = table.take(pa.array(order))
    for number in range(shards):
        if bounds[number + 1] > bounds[number]:
            yield number, ordered.slice(bounds[number], bounds[number + 1] - bounds[number])


def sources(groups: list[RowGroup]) -> list[tuple[int, bytes]]:
    """The elements the job begins with: the shards' sentinels, then one for each row group."""
    described = [json.dumps(asdict(group)).encode() for group in groups]
    return list(enumerate([_SENTINELS, *described]))


class ReadShard(beam.DoFn):
    """Element of `sources`. Gives (shard, chunk): events and rejects of the shard's users, or the empty sentinel.

    A row set aside travels to its user's shard, or to shard 0 when it names none.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
        plan = self._plan
        if element[1] == _SENTINELS:
            yield from ((shard, SENTINEL) for shard in range(plan.shards))
            return
        group = RowGroup(**json.loads(element[1]))
        events, rejects = read_row_group(group, plan.description, plan.as_of_us)
        events = events.select(plan.chunk_schema.names)
        shard = shards_of(whole(events["user_id"]), plan.shards)
        for number, rows in split_by_shard(events, shard, plan.shards):
            for chunk in to_chunks(rows):
                yield number, EVENTS + chunk
        for number, rows in split_by_shard(rejects, self._shards_of_rejects(rejects), plan.shards):
            for chunk in to_chunks(rows):
                yield number, REJECTS + chunk

    def _shards_of_rejects(self, rejects: pa.Table) -> NDArray[np.int64]:
        ids = whole(rejects["user_id"])
        shard = np.zeros(len(ids), np.int64)
        known = ids.is_valid().to_numpy(zero_copy_only=False)
        shard[known] = shards_of(ids.drop_null().cast(self._plan.description.user_id_arrow), self._plan.shards)
        return shard
