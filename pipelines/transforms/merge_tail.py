"""Yesterday's tail and today's events become each user's history. Arrow in, Arrow out; no files, no Beam.

Legend: U users, T events of all users, L the history limit.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Index = NDArray[np.int64]

_POSITION_COLUMNS = ("source_file", "source_row")


@dataclass(frozen=True, slots=True)
class Histories:
    """The latest events of every user of a shard."""

    users: pa.Array
    """[U], ascending."""
    offsets: Index
    """[U + 1]: user u's events are offsets[u] to offsets[u + 1] of `events`, oldest first."""
    events: pa.Table
    """[T]: item_id, event_type, timestamp_us, order, row_hash and the event columns."""
    new_U: Index
    """[U]: events of the history that the tail it was merged with did not hold."""
    duplicates: pa.Table
    """Rows of the input that equal an earlier row of the input, with all their columns."""

    def rows_of(self, users: Index) -> Index:
        """Positions in `events` of these users' events, user after user."""
        lengths = self.offsets[users + 1] - self.offsets[users]
        starts = np.cumsum(lengths) - lengths
        rows: Index = np.arange(int(lengths.sum())) + np.repeat(self.offsets[users] - starts, lengths)
        return rows


def tail_columns(events: pa.Schema) -> list[str]:
    """Columns of a chunk of events that a tail keeps: all but the user and the place in the input."""
    return [name for name in events.names if name not in ("user_id", *_POSITION_COLUMNS)]


def empty_tail(events: pa.Schema) -> pa.Table:
    """The tail of a shard that has none, for events of this schema."""
    lists = [(name, pa.list_(events.field(name).type)) for name in tail_columns(events)]
    return pa.schema([events.field("user_id"), *lists]).empty_table()


def to_tail(histories: Histories) -> pa.Table:
    """One row a user, one list a column: what tomorrow's run merges with."""
    offsets = pa.array(histories.offsets.astype(np.int32))
    columns = {"user_id": histories.users}
    for name in histories.events.column_names:
        columns[name] = pa.ListArray.from_arrays(offsets, whole(histories.events[name]))
    return pa.table(columns)


def merge_tail(tail: pa.Table, events: pa.Table, limit: int) -> Histories:
    """Each user's latest `limit` events of tail and input together, without duplicates, in event order.

    tail: a table of to_tail. events: chunks as the reader sends them, in any order.
    Event order is (timestamp, order, file, row). The tail keeps its own order among ties, for file and row number
    the input of its day. Where the input holds a tail's event again (the whole log is passed every day), that event
    tells where among its ties the input's other rows stand, so a tie cut off yesterday stays cut off. Input rows that
    the tail does not hold come after the tail's ties.
    A tail event found again is no duplicate: it was seen. Copies within the input are.
    """
    names = tail_columns(events.schema)
    tail_length = pc.fill_null(pc.list_value_length(whole(tail["row_hash"])), 0).to_numpy(zero_copy_only=False)
    old = pa.table({name: whole(tail[name]).flatten() for name in names}, schema=_without_position(events.schema))
    rows = pa.concat_tables([old, events.select(names)])
    users, code = _ranked(pa.concat_arrays([whole(tail["user_id"]), whole(events["user_id"])]))
    user = np.concatenate([np.repeat(code[: len(tail)], tail_length), code[len(tail) :]])
    time, order, row_hash = (_ints(rows[name]) for name in ("timestamp_us", "order", "row_hash"))
    is_new = np.arange(len(user)) >= len(old)

    place = np.full(len(user), -1, np.int64)  # rank in the input by (file, row); -1: only in the tail
    arrival = np.lexsort((_ints(events["source_row"]), _ints(events["source_file"])))
    place[len(old) + arrival] = np.arange(len(events))

    copy_order = np.lexsort((place, row_hash, user))
    first = np.ones(len(user), np.bool_)
    first[1:] = (np.diff(user[copy_order]) != 0) | (np.diff(row_hash[copy_order]) != 0)
    starts = np.flatnonzero(first)
    head = np.repeat(copy_order[starts], np.diff(starts, append=len(user)))
    again = copy_order[~first]
    head_of_again = head[~first]
    next_to_head = np.flatnonzero(~first) - 1 == np.repeat(starts, np.diff(starts, append=len(user)))[~first]
    seen = next_to_head & ~is_new[head_of_again]
    place[head_of_again[seen]] = place[again[seen]]
    duplicate = np.sort(again[~seen])

    if len(old):
        tie = np.zeros(len(old), np.int64)
        tie[1:] = np.cumsum(_differs(user[: len(old)], time[: len(old)], order[: len(old)]))
        width = len(events) + 1
        place[: len(old)] = np.maximum.accumulate(tie * width + place[: len(old)] + 1) - tie * width - 1

    kept = np.ones(len(user), np.bool_)
    kept[again] = False
    candidates = np.flatnonzero(kept)
    sort = (place[candidates], order[candidates], time[candidates], user[candidates])
    ordered = candidates[np.lexsort(sort)]  # stable: the tail's own order decides what is still equal
    counts = np.bincount(user, weights=kept, minlength=len(users)).astype(np.int64)
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(ordered))
    latest = ordered[from_end <= limit]
    lengths = np.minimum(counts, limit)

    return Histories(
        users=users,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        events=rows.take(pa.array(latest)),
        new_U=np.bincount(user[latest], weights=is_new[latest], minlength=len(users)).astype(np.int64),
        duplicates=events.take(pa.array(duplicate - len(old))),
    )


def _differs(*columns: Index) -> NDArray[np.bool_]:
    """Whether each row but the first differs from the one before it."""
    differ: NDArray[np.bool_] = np.logical_or.reduce([np.diff(column) != 0 for column in columns])
    return differ


def _ranked(ids: pa.Array) -> tuple[pa.Array, Index]:
    """The distinct ids, ascending, and each id's rank among them."""
    encoded = ids.dictionary_encode()
    ascending = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(ascending), np.int64)
    rank[ascending] = np.arange(len(ascending))
    return encoded.dictionary.take(pa.array(ascending)), rank[encoded.indices.to_numpy(zero_copy_only=False)]


def whole(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _ints(column: pa.ChunkedArray) -> Index:
    return np.asarray(column.to_numpy(), np.int64)


def _without_position(events: pa.Schema) -> pa.Schema:
    return pa.schema([events.field(name) for name in tail_columns(events)])
