"""Item updates as a Redis stream: senders append, every server applies all of it to its own index, in order.

    hybrid_tower:items:{<embedding_version>}          the stream: number, kind, data (Parquet bytes)
    hybrid_tower:items:{<embedding_version>}:number   how many updates were ever appended

Every update carries a number (`online.stream`). Where one is missing, the index lacks an update: a strict reader stops,
for the index must be built anew; a server counts what was lost and goes on, since each update holds values, not
differences, and is right for its own items whatever came before.
"""

import io
import logging
import threading
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import redis
import torch

from model.errors import DataError, IndexBusy, IndexMismatch, ShapeError, StoreUnavailable
from model.retrieval.index import LiveIndex
from model.retrieval.rows import Deltas, ItemId, ItemRows, read_rows, write_rows
from online.stream import Entry, append, read

log = logging.getLogger(__name__)

RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Deletion:
    """Items to take away."""

    embedding_version: str
    item_ids: list[Any]


Update = ItemRows | Deltas | Deletion


def stream_key(embedding_version: str) -> str:
    """The stream of an embedding_version's updates."""
    return f"hybrid_tower:items:{{{embedding_version}}}"


def send(client: redis.Redis, update: Update, *, keep: int = 100_000) -> int:
    """Append an update; its number. keep: about how many of the latest updates stay. Raises StoreUnavailable."""
    kind, data = pack(update)
    return append(client, stream_key(update.embedding_version), {"kind": kind, "data": data}, keep=keep)


def pack(update: Update) -> tuple[str, bytes]:
    """Kind and Parquet bytes of an update."""
    file = io.BytesIO()
    if isinstance(update, ItemRows):
        write_rows(update, file)
        return "upsert", file.getvalue()
    columns: dict[str, Any] = {"item_id": _id_array(update.item_ids)}
    if isinstance(update, Deltas):
        columns |= {name: value.numpy() for name, value in update.columns().items()}
    table = pa.table(columns).replace_schema_metadata({"embedding_version": update.embedding_version})
    pq.write_table(table, file, compression="zstd")
    return "change" if isinstance(update, Deltas) else "delete", file.getvalue()


def unpack(kind: str, data: bytes) -> Update:
    """The update. Raises DataError, ShapeError."""
    try:
        if kind == "upsert":
            return read_rows(io.BytesIO(data))
        table = pq.read_table(io.BytesIO(data))
        version = (table.schema.metadata or {})[b"embedding_version"].decode()
        item_ids = table["item_id"].to_pylist()
        if kind == "delete":
            return Deletion(version, item_ids)
        if kind == "change":
            values = {name: table[name].to_numpy().copy() for name in table.column_names if name != "item_id"}
            return Deltas(version, item_ids, **{f"{name}_R": torch.as_tensor(value) for name, value in values.items()})
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"an update of kind {kind} cannot be read: {error!r}") from None
    raise DataError(f"updates are upsert, change or delete, got {kind!r}")


def check_id_type(index: LiveIndex, update: Update) -> None:
    """Raises DataError for items that are named by another kind of id than those of the index."""
    there = index.item_ids(0, 1)
    if there and update.item_ids and type(update.item_ids[0]) is not type(there[0]):
        raise DataError(f"item ids are {type(there[0]).__name__} here, got {update.item_ids[0]!r}")


def apply(index: LiveIndex, update: Update) -> None:
    """Apply an update. Raises IndexMismatch, DataError, ShapeError, IndexBusy."""
    if isinstance(update, ItemRows):
        index.upsert(update)
    elif isinstance(update, Deltas):
        index.change(update)
    else:
        index.delete(update.embedding_version, update.item_ids)


class ItemFeed:
    """Follows the stream of an index's embedding_version. One thread at a time."""

    def __init__(
        self, client: redis.Redis, index: LiveIndex, *, entry: str = "0-0", number: int = 0, is_strict: bool = True
    ) -> None:
        """entry, number: the last update that the index holds already; by default none.

        is_strict: stop where updates were lost; else count them and go on.
        The client's socket time-out must be longer than the waits asked of `step`.
        """
        self._client, self._index = client, index
        self._is_strict = is_strict
        self.entry, self.number = entry, number
        self.applied = self.refused = self.lost = 0

    def step(self, wait_ms: int = 1000) -> int:
        """Apply what there is, waiting at most so long for it; how many updates were read.

        An update that cannot be applied (broken, of another version) is counted, logged and passed over.
        Raises DataError where updates were lost (if strict), StoreUnavailable, IndexBusy; the next call takes up where
        this ended.
        """
        entries = read(self._client, stream_key(self._index.embedding_version), self.entry, wait_ms)
        for entry in entries:
            self._take(entry)
        return len(entries)

    def run(self, stop: threading.Event) -> None:
        """Follow until told to stop, waiting while Redis is away. Raises DataError where updates were lost."""
        while not stop.is_set():
            try:
                self.step()
            except (StoreUnavailable, IndexBusy) as error:
                log.warning("item feed: %s; trying again", error)
                stop.wait(RETRY_S)

    def _take(self, entry: Entry) -> None:
        lost = 0
        if entry.number < 0 and not self._is_strict:
            self.refused += 1
            self.entry = entry.id
            log.error("an entry of the item stream is passed over: it has no number")
            return
        if entry.number != self.number + 1:
            gap = (
                f"the index holds item updates up to number {self.number}, the stream goes on at {entry.number}: "
                "those between are lost"
            )
            if self._is_strict:
                raise DataError(f"{gap}, build the index anew")
            lost = max(1, entry.number - self.number - 1)
            log.error("%s; going on with those that follow", gap)
        try:
            update = unpack(entry.fields.get(b"kind", b"").decode(errors="replace"), entry.fields.get(b"data", b""))
            check_id_type(self._index, update)
            apply(self._index, update)
            self.applied += 1
        except (DataError, ShapeError, IndexMismatch) as error:
            self.refused += 1
            log.error("item update %d is passed over: %s", entry.number, error)
        self.lost += lost
        self.entry, self.number = entry.id, entry.number


def _id_array(item_ids: list[ItemId]) -> pa.Array:
    return pa.array(item_ids, pa.string() if item_ids and isinstance(item_ids[0], str) else pa.int64())
