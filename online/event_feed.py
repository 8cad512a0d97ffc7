"""Events of now as a Redis stream, and the counts that releases with live item features are scored with.

    hybrid_tower:{events}          the stream: number, data (Parquet: user_id, item_id, event_type, timestamp_us), and
                                   since: from this time on this entry and those after it hold all events
    hybrid_tower:{events}:number   how many entries were ever appended

Senders append batches; every server reads the retained part of the stream when it starts and follows it. What is
retained is by time (`send_events(keep_h=)`), and a server forgets events of the same age (`Settings.live_hours`), so
that servers count alike however long they run.

Legend: P events that are kept.
"""

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis
from numpy.typing import NDArray

from model.dataset import DatasetDescription
from model.errors import DataError
from model.features import hash_ids
from model.live_search import longest_window_us
from online.guard import MAX_CLOCK_SKEW_US
from online.items import ServedItems
from online.stream import BATCH, Entry, append, read

log = logging.getLogger(__name__)

STREAM = "hybrid_tower:{events}"
COLUMNS = ("user_id", "item_id", "event_type", "timestamp_us")
BUSY_SHARE = 0.1
"""Most of one core that counting may take: after a count of t seconds the next one waits for t / BUSY_SHARE."""
_HOUR_US = 3_600_000_000
_SECOND_US = 1_000_000

Ints = NDArray[np.int64]


class Reason:
    """Why an event is not counted; those of the event log's reject table, and two of the stream's own."""

    NULL_USER = "null_user"
    NULL_ITEM = "null_item"
    NULL_TIMESTAMP = "null_timestamp"
    FUTURE_TIMESTAMP = "future_timestamp"
    UNDECLARED_EVENT_TYPE = "undeclared_event_type"
    DUPLICATE = "duplicate"
    TOO_OLD = "too_old"
    """Older than what servers keep."""
    UNREADABLE = "unreadable"
    """A whole entry: no Parquet, or other columns or kinds of ids."""


def send_events(
    client: redis.Redis,
    events: pa.Table,
    *,
    keep_h: float = 168.0,
    since_us: int | None = None,
    now_us: int | None = None,
) -> int:
    """Append a batch of events, best up to some thousands at a time; its number.

    events: user_id, item_id, event_type, timestamp_us, as in the canonical event table. keep_h: entries appended longer
    ago may go. since_us: with this entry and those after it, all events from this time on are in the stream; a backfill
    says so in its first batch. Raises DataError for missing columns, StoreUnavailable.
    """
    missing = [name for name in COLUMNS if name not in events.column_names]
    if missing:
        raise DataError(f"events must have the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    file = io.BytesIO()
    pq.write_table(events.select(COLUMNS), file, compression="zstd")
    fields: dict[str, str | bytes] = {"data": file.getvalue()}
    if since_us is not None:
        fields["since"] = str(since_us)
    now_us = time.time_ns() // 1000 if now_us is None else now_us
    return append(client, STREAM, fields, keep_since_us=now_us - int(keep_h * _HOUR_US))


@dataclass(frozen=True, slots=True)
class Events:
    """Positive events, in the order of arrival."""

    user_P: Ints
    """A key of each user: the id, or a 64-bit hash of a string."""
    item_P: Ints
    """A key of each item, likewise."""
    hash_P: NDArray[np.uint64]
    """`hash_ids` of the items."""
    type_P: Ints
    """A key of each event type."""
    time_us_P: Ints

    def __len__(self) -> int:
        return len(self.time_us_P)

    @classmethod
    def joined(cls, parts: Iterable["Events"]) -> "Events":
        """One part after another."""
        columns = zip(*(part.columns() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def columns(self) -> tuple[Any, ...]:
        """All columns, in the order of the fields."""
        return self.user_P, self.item_P, self.hash_P, self.type_P, self.time_us_P

    def rows(self, index: Ints | NDArray[np.bool_]) -> "Events":
        """Some of them."""
        return Events(*(column[index] for column in self.columns()))


_LONGS = np.zeros(0, np.int64)
_NONE = Events(_LONGS, _LONGS, _LONGS.view(np.uint64), _LONGS, _LONGS)


def keys_of(ids: pa.Array) -> Ints:
    """int64 ids as they are, strings as 64 bits of BLAKE2b."""
    if pa.types.is_integer(ids.type):
        return ids.to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids.to_pylist())
    return np.frombuffer(b"".join(digests), np.int64)


def read_events(
    data: bytes, description: DatasetDescription, now_us: int, refuse: Callable[[str, int], None]
) -> Events:
    """The positive events of an entry; others are told to `refuse`, by reason and number. Raises DataError."""
    try:
        table = pq.read_table(io.BytesIO(data))
        columns = [table[name].combine_chunks() for name in COLUMNS]
        kinds = (description.user_id_arrow, description.item_id_arrow, pa.string(), pa.int64())
        for name, column, kind in zip(COLUMNS, columns, kinds, strict=True):
            is_same = column.type == kind or (pa.types.is_integer(column.type) and pa.types.is_integer(kind))
            if not is_same and not pa.types.is_null(column.type):
                raise DataError(f"events must have {name} of {kind}, got {column.type}")
        user, item, event_type, time_us = (c.cast(kind) for c, kind in zip(columns, kinds, strict=True))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"a batch of events cannot be read: {error!r}") from None
    is_good_P = np.ones(table.num_rows, bool)
    ahead_us = pa.scalar(now_us + MAX_CLOCK_SKEW_US, pa.int64())
    for reason, bad in (
        (Reason.NULL_USER, pc.is_null(user)),
        (Reason.NULL_ITEM, pc.is_null(item)),
        (Reason.NULL_TIMESTAMP, pc.is_null(time_us)),
        (Reason.UNDECLARED_EVENT_TYPE, pc.invert(pc.is_in(event_type, pa.array(description.event_type_names)))),
        (Reason.FUTURE_TIMESTAMP, pc.fill_null(pc.greater(time_us, ahead_us), False)),
    ):
        bad_P = bad.to_numpy(zero_copy_only=False) & is_good_P
        if bad_P.any():
            refuse(reason, int(bad_P.sum()))
        is_good_P &= ~bad_P
    is_good_P &= pc.is_in(event_type, pa.array(description.positive_types)).to_numpy(zero_copy_only=False)
    kept = pa.array(is_good_P)
    user, item, event_type, time_us = (column.filter(kept) for column in (user, item, event_type, time_us))
    type_P = pc.index_in(event_type, pa.array(description.event_type_names))
    return Events(
        keys_of(user), keys_of(item), hash_ids(item), type_P.to_numpy(zero_copy_only=False).astype(np.int64),
        time_us.to_numpy(zero_copy_only=False).astype(np.int64),
    )  # fmt: skip


class EventFeed:
    """Follows the events and keeps the counts of one index. One thread at a time."""

    def __init__(
        self, client: redis.Redis, items: ServedItems, *, live_hours: float, max_events: int,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """live_hours: older events are forgotten. max_events: the latest are kept, the others too."""
        assert items.live is not None, "counts are for releases with live features"
        self._client, self._items, self._live = client, items, items.live
        self._keep_us, self._max_events = int(live_hours * _HOUR_US), max_events
        self._now_us, self._clock = now_us, clock
        self.entry, self.number = "0-0", 0
        self.refused: dict[str, int] = {}
        """Events that are not counted, by `Reason`."""
        self.lost = 0
        """Entries that were trimmed before they were read."""
        self._events = _NONE
        self._new: list[Events] = []
        self._since_us: int | None = None
        self._forgotten_us = 0
        """Events from before it are not kept."""
        self.read_until_us = 0
        """When the stream was last read to its end; 0 for never."""
        self._counted_until_us = 0
        self._row_keys = np.zeros(0, np.int64)
        self._count_at = 0.0
        if self._keep_us < longest_window_us(self._live.config):
            log.warning(
                "counts reach back %g h at most, and release features count over %g h: answers will say that they are "
                "short", live_hours, self._live.config.live_windows_h[-1],
            )  # fmt: skip

    def step(self, wait_ms: int = 1000) -> int:
        """Take what there is, waiting at most so long for it, and count where it is time; entries read.

        What cannot be read is counted and passed over. Raises StoreUnavailable.
        """
        started_us = self._now_us()
        entries = read(self._client, STREAM, self.entry, wait_ms)
        for entry in entries:
            self._take(entry)
        if len(entries) < BATCH:
            # Empty: nothing had come when the wait ended. Else: what came after this batch was appended since.
            self.read_until_us = started_us if entries else self._now_us()
            self.count_if_due()
        return len(entries)

    @property
    def kept(self) -> int:
        """Events there are."""
        return len(self._events) + sum(map(len, self._new))

    def count_if_due(self) -> bool:
        """Count anew where a bucket has ended or events of an earlier one have come, unless that was just done."""
        bucket_us = self._live.config.live_bucket_s * _SECOND_US
        until_us = self.read_until_us // bucket_us * bucket_us
        has_late = any(int(events.time_us_P.min()) < until_us for events in self._new)
        if self._clock() < self._count_at or (until_us == self._counted_until_us and not has_late):
            return False
        started = self._clock()
        self._count(until_us)
        ended = self._clock()
        self._count_at = ended + (ended - started) / BUSY_SHARE
        return True

    def _take(self, entry: Entry) -> None:
        if entry.number < 0:
            self._refuse(Reason.UNREADABLE, 1)
            self.entry = entry.id
            return
        if entry.number != self.number + 1 and self.number:
            self.lost += max(1, entry.number - self.number - 1)
            self._since_us = None
            log.error(
                "events were trimmed before they were read, between number %d and %d; counts are whole from there on",
                self.number, entry.number,
            )  # fmt: skip
        if self._since_us is None:
            self._since_us = entry.appended_us
        try:
            if b"since" in entry.fields:
                self._since_us = min(self._since_us, int(entry.fields[b"since"]))
            events = read_events(entry.fields.get(b"data", b""), self._live.description, self._now_us(), self._refuse)
            if len(events):
                self._new.append(events)
        except (DataError, ValueError) as error:
            self._refuse(Reason.UNREADABLE, 1)
            log.error("entry %d of the events is passed over: %s", entry.number, error)
        self.entry, self.number = entry.id, entry.number

    def _refuse(self, reason: str, count: int) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + count

    def _count(self, until_us: int) -> None:
        self._merge()
        index, events = self._items.index, self._events
        with index.pin() as pinned:
            new = index.item_ids(len(self._row_keys), pinned.table.count)
        keys = keys_of(pa.array(new, self._live.description.item_id_arrow))
        self._row_keys = np.concatenate([self._row_keys, keys])
        num_rows = len(self._row_keys)
        order_R = np.argsort(self._row_keys, kind="stable")
        sorted_R = self._row_keys[order_R]
        place_P = np.minimum(np.searchsorted(sorted_R, events.item_P), num_rows - 1)
        hash_row_P = num_rows + (events.hash_P % np.uint64(self._live.config.hash_rows)).astype(np.int64)
        row_P = np.where(sorted_R[place_P] == events.item_P, order_R[place_P], hash_row_P)
        in_order = np.lexsort((events.time_us_P, events.user_P))  # stable: ties in the order of arrival
        user_P = np.unique(events.user_P, return_inverse=True)[1]
        reach_us = self.read_until_us if self._since_us is None else self._since_us
        self._items.count(
            user_P[in_order], row_P[in_order], events.time_us_P[in_order], num_rows,
            since_us=min(until_us, max(reach_us, self._forgotten_us)), until_us=until_us, is_behind=False,
        )  # fmt: skip
        self._counted_until_us = until_us

    def _merge(self) -> None:
        """Join the new events to the others; drop duplicates, what is too old, and what is too much."""
        events = Events.joined([self._events, *self._new])
        known = len(self._events)
        self._new = []
        key_P = _mixed(events)
        first = np.sort(np.unique(key_P, return_index=True)[1])
        if len(first) < len(events):
            self._refuse(Reason.DUPLICATE, len(events) - len(first))
            known = int(np.searchsorted(first, known))
            events = events.rows(first)
        self._forgotten_us = max(self._forgotten_us, self.read_until_us - self._keep_us)
        is_kept_P = events.time_us_P >= self._forgotten_us
        late = int((~is_kept_P[known:]).sum())
        if late:
            self._refuse(Reason.TOO_OLD, late)
        events = events.rows(is_kept_P)
        excess = len(events) - self._max_events
        if excess > 0:
            self._forgotten_us = int(np.partition(events.time_us_P, excess)[excess])
            events = events.rows(events.time_us_P >= self._forgotten_us)
        self._events = events


def _mixed(events: Events) -> NDArray[np.uint64]:
    """64 bits of user, item, type and time: equal for the same event sent twice."""
    mixed = np.zeros(len(events), np.uint64)
    with np.errstate(over="ignore"):
        for column in (events.user_P, events.item_P, events.type_P, events.time_us_P):
            mixed = hash_ids(pa.array((mixed ^ column.view(np.uint64)).view(np.int64)))
    return mixed
