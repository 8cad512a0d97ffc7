"""Item updates as a Redis stream: senders append, every server applies all of it to its own index, in order.

    hybrid_tower:items:{<embedding_version>}          the stream: number, kind, data (Parquet bytes)
    hybrid_tower:items:{<embedding_version>}:number   how many updates were ever appended

Redis trims streams and a reader is not told what it missed, so every update carries a number, given in the same step
that appends it. A reader that finds a number missing stops: its index lacks an update, and must be built anew.
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
from redis.exceptions import RedisError

from model.errors import DataError, IndexBusy, IndexMismatch, ShapeError, StoreUnavailable
from model.retrieval.index import LiveIndex
from model.retrieval.rows import Deltas, ItemId, ItemRows, read_rows, write_rows

log = logging.getLogger(__name__)

BATCH = 100
"""Most updates read at once."""
RETRY_S = 0.5
_APPEND = """
local number = redis.call('INCR', KEYS[2])
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*', 'number', number, 'kind', ARGV[1], 'data', ARGV[2])
return number
"""


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
    key = stream_key(update.embedding_version)
    try:
        number: Any = client.eval(_APPEND, 2, key, f"{key}:number", kind, data, str(keep))
    except RedisError as error:
        raise StoreUnavailable(f"the update was not sent: {type(error).__name__}: {error}") from error
    return int(number)


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

    def __init__(self, client: redis.Redis, index: LiveIndex, *, entry: str = "0-0", number: int = 0) -> None:
        """entry, number: the last update that the index holds already; by default none.

        The client's socket time-out must be longer than the waits asked of `step`.
        """
        self._client, self._index = client, index
        self.entry, self.number = entry, number
        self.applied = self.refused = 0

    def step(self, wait_ms: int = 1000) -> int:
        """Apply what there is, waiting at most so long for it; how many updates were read.

        An update that cannot be applied (broken, of another version) is counted, logged and passed over.
        Raises DataError where updates were lost, StoreUnavailable, IndexBusy; the next call takes up where this ended.
        """
        try:
            answer: Any = self._client.xread(
                {stream_key(self._index.embedding_version): self.entry}, count=BATCH, block=wait_ms
            )
        except RedisError as error:
            raise StoreUnavailable(f"item updates cannot be read: {type(error).__name__}: {error}") from error
        entries = answer[0][1] if answer else []
        for entry, fields in entries:
            self._take(entry.decode(), fields)
        return len(entries)

    def run(self, stop: threading.Event) -> None:
        """Follow until told to stop, waiting while Redis is away. Raises DataError where updates were lost."""
        while not stop.is_set():
            try:
                self.step()
            except (StoreUnavailable, IndexBusy) as error:
                log.warning("item feed: %s; trying again", error)
                stop.wait(RETRY_S)

    def _take(self, entry: str, fields: dict[bytes, bytes]) -> None:
        number = int(fields.get(b"number", b"-1"))
        if number != self.number + 1:
            raise DataError(
                f"the index holds item updates up to number {self.number}, the stream goes on at {number}: "
                "those between are lost, build the index anew"
            )
        try:
            apply(self._index, unpack(fields.get(b"kind", b"").decode(), fields.get(b"data", b"")))
            self.applied += 1
        except (DataError, ShapeError, IndexMismatch) as error:
            self.refused += 1
            log.error("item update %d is passed over: %s", number, error)
        self.entry, self.number = entry, number


def _id_array(item_ids: list[ItemId]) -> pa.Array:
    return pa.array(item_ids, pa.string() if item_ids and isinstance(item_ids[0], str) else pa.int64())
