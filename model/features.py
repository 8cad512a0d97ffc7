"""Records to tensors: the only featuriser, used by training, the batch job and the service.

Legend: U users, T packed events, B requests, N catalogue items, H hash rows, C categorical columns,
K session limit, M subject limit, Q query width.

Every categorical field counts 0 = absent, 1 = a value not in the vocabulary, 2... = the vocabulary's values.
An item is its catalogue row in [0, N), or `N + hash(id) % H` when it is not in the catalogue.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError, ShapeError
from model.records import Context, Id

GAP_BUCKETS = 33
"""Buckets of a time span: 0 = absent, then one for each doubling of (1 + seconds)."""
HOURS = 25
"""0 = absent, then the 24 hours of the UTC day."""
WEEKDAYS = 8
"""0 = absent, then Monday to Sunday, UTC."""
_SECOND_US = 1_000_000
_HOUR_US = 3600 * _SECOND_US
_DAY_US = 24 * _HOUR_US


def gap_bucket(gap_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket of a time span: 1 + floor(log2(1 + seconds)), at most GAP_BUCKETS - 1; spans below 0 count as 0.

    gap_us: i64 [...], microseconds. Returns i64 [...], in [1, GAP_BUCKETS).
    """
    seconds = np.maximum(gap_us, 0) // _SECOND_US
    _, exponent = np.frexp((seconds + 1).astype(np.float64))  # exact: 1 + seconds < 2**53
    return np.minimum(exponent, GAP_BUCKETS - 1).astype(np.int64)


def hour_of(time_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hour of the UTC day, 1 to 24. time_us: i64 [...]."""
    return time_us % _DAY_US // _HOUR_US + 1


def weekday_of(time_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """Day of the week, 1 = Monday to 7 = Sunday, UTC. time_us: i64 [...]."""
    return (time_us // _DAY_US + 3) % 7 + 1  # 1970-01-01 was a Thursday


def hash_ids(ids: pa.Array | Sequence[Id]) -> NDArray[np.uint64]:
    """A fixed hash of item ids: splitmix64 of an int64 (Steele et al. 2014), CRC-32 of a string's UTF-8 bytes."""
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        if pa.types.is_integer(ids.type):
            return _splitmix64(ids.to_numpy(zero_copy_only=False).astype(np.int64))
        ids = ids.to_pylist()
    if len(ids) and isinstance(ids[0], str):
        return np.fromiter((zlib.crc32(str(i).encode()) for i in ids), np.uint64, len(ids))
    return _splitmix64(np.asarray(ids, np.int64))


def _splitmix64(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = ids.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """Values of every categorical field, in the order that numbers them from 2."""

    event_types: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    """Event, context and user columns by name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"event_types": list(self.event_types), "columns": {k: list(v) for k, v in self.columns.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict."""
        return cls(tuple(values["event_types"]), {k: tuple(v) for k, v in values["columns"].items()})


def build_vocabularies(
    description: DatasetDescription, events: pa.Table, users: pa.Table | None, *, limit: int = 50_000
) -> Vocabularies:
    """Values seen in a log, the `limit` most frequent of each column, sorted.

    events: canonical event table. users: user_id and the user columns, or None.
    Raises DataError where user columns are declared and no users are given.
    """
    if description.user_columns and users is None:
        raise DataError(f"the description declares user columns {list(description.user_columns)}; no users were given")
    columns = {name: events[name] for name in (*description.event_columns, *description.context_columns)}
    if users is not None:
        columns |= {name: users[name] for name in description.user_columns}
    return Vocabularies(
        event_types=tuple(description.event_type_names),
        columns={name: frequent_values(values, limit) for name, values in columns.items()},
    )


def frequent_values(values: pa.ChunkedArray, limit: int) -> tuple[str, ...]:
    """The `limit` most frequent non-null values, as strings, sorted."""
    counts = pc.value_counts(values.drop_null().cast(pa.string()))
    pairs = [(-count.as_py(), value.as_py()) for value, count in zip(*counts.flatten(), strict=True)]
    return tuple(sorted(value for _, value in sorted(pairs)[:limit]))


@dataclass(frozen=True, slots=True)
class EventFeatures:
    """Packed histories, user after user, oldest event first."""

    item_T: torch.Tensor
    """i64 [T], in [0, N + H)."""
    type_T: torch.Tensor
    """i64 [T]."""
    gap_T: torch.Tensor
    """i64 [T], bucket of the time since the user's event before; 0 at a history's start."""
    column_TC: torch.Tensor
    """i64 [T, C], the description's event columns."""
    time_us_T: torch.Tensor
    """i64 [T]; not a model input."""
    offsets: torch.Tensor
    """i64 [U + 1], on the CPU, rising from 0 to T."""

    def to(self, device: torch.device | str) -> "EventFeatures":
        """The same features on a device; offsets stay on the CPU."""
        return EventFeatures(
            self.item_T.to(device), self.type_T.to(device), self.gap_T.to(device), self.column_TC.to(device),
            self.time_us_T.to(device), self.offsets,
        )  # fmt: skip

    def window(self, start_U: torch.Tensor, end_U: torch.Tensor) -> "EventFeatures":
        """Histories cut out of the packed events: user u's are start_U[u] up to, without, end_U[u].

        start_U, end_U: i64 [U'], on the CPU; each window must lie inside one user's events. The first event of a
        window has no event before it, so its gap becomes 0, as if the history began there.
        """
        length_U = end_U - start_U
        offsets = torch.zeros(len(length_U) + 1, dtype=torch.int64)
        torch.cumsum(length_U, 0, out=offsets[1:])
        index_T = torch.arange(int(offsets[-1])) + torch.repeat_interleave(start_U - offsets[:-1], length_U)
        gap_T = self.gap_T[index_T]
        gap_T[offsets[:-1][length_U > 0]] = 0
        return EventFeatures(
            self.item_T[index_T], self.type_T[index_T], gap_T, self.column_TC[index_T], self.time_us_T[index_T], offsets
        )

    def latest(self, limit: int) -> "EventFeatures":
        """Each history's last `limit` events."""
        start_U, end_U = self.offsets[:-1], self.offsets[1:]
        if not bool((end_U - start_U > limit).any()):
            return self
        return self.window(torch.maximum(start_U, end_U - limit), end_U)


@dataclass(frozen=True, slots=True)
class ContextFeatures:
    """What is known at request time, one row a request; 0 wherever something is absent."""

    category_BC: torch.Tensor
    """i64 [B, C], the description's head columns (context, then user columns)."""
    hour_B: torch.Tensor
    weekday_B: torch.Tensor
    age_B: torch.Tensor
    """i64 [B], bucket of request time minus the time of the state's last event."""
    session_item_BK: torch.Tensor
    """i64 [B, K], oldest first, left-aligned; entries from session_length_B on are 0 and not read."""
    session_type_BK: torch.Tensor
    session_gap_BK: torch.Tensor
    """i64 [B, K], bucket of request time minus event time."""
    session_length_B: torch.Tensor
    subject_item_BM: torch.Tensor
    subject_weight_BM: torch.Tensor
    """f32 [B, M], confidence; 0 where there is no subject."""
    query_BQ: torch.Tensor
    """f32 [B, Q]."""

    def to(self, device: torch.device | str) -> "ContextFeatures":
        """The same features on a device."""
        return ContextFeatures(*(getattr(self, f.name).to(device) for f in fields(self)))


class ContextArrays(NamedTuple):
    """ContextFeatures as the featuriser writes them, for code that does without tensors."""

    code_BF: NDArray[np.int64]
    """i64 [B, 3 + C]: hour, weekday, age, then the head columns."""
    session_3BK: NDArray[np.int64]
    """i64 [3, B, K]: items, types, gaps."""
    session_length_B: NDArray[np.int64]
    subject_item_BM: NDArray[np.int64]
    subject_weight_BM: NDArray[np.float32]
    query_BQ: NDArray[np.float32]


class Featuriser:
    """Turns event tables and contexts into tensors. Pure: the same input gives the same tensors everywhere."""

    def __init__(
        self,
        description: DatasetDescription,
        vocabularies: Vocabularies,
        item_ids: pa.Array,
        config: TowerConfig,
    ) -> None:
        """item_ids: the catalogue's ids in row order, int64 or string as the description declares.

        Raises ConfigError where the vocabularies lack a declared column, DataError where ids are null or repeat.
        """
        head_columns = tuple(description.head_columns)
        missing = [name for name in (*description.event_columns, *head_columns) if name not in vocabularies.columns]
        if missing:
            raise ConfigError(f"the vocabularies lack the columns {missing}")
        if isinstance(item_ids, pa.ChunkedArray):
            item_ids = item_ids.combine_chunks()
        if item_ids.null_count or len(item_ids.unique()) != len(item_ids):
            raise DataError(f"the catalogue's {len(item_ids)} item ids must be unique and not null")
        self.description = description
        self.vocabularies = vocabularies
        self.config = config
        self.item_ids = item_ids
        self.num_items = len(item_ids)
        self.event_columns = tuple(description.event_columns)
        self.head_columns = head_columns
        self._type_set = pa.array(vocabularies.event_types, pa.string())
        self._column_sets = {name: pa.array(values, pa.string()) for name, values in vocabularies.columns.items()}
        self._type_codes = {value: code for code, value in enumerate(vocabularies.event_types, 2)}
        self._column_codes = {
            name: {value: code for code, value in enumerate(values, 2)}
            for name, values in vocabularies.columns.items()
        }  # fmt: skip
        self._rows: dict[Id, int] | None = None

    @property
    def num_rows(self) -> int:
        """N + H: how many rows an item table has."""
        return self.num_items + self.config.hash_rows

    def item_rows(self, ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Rows of items: the catalogue's, or a hash row. ids: int64 or string [n], no nulls. Returns i64 [n]."""
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks()
        if ids.type != self.item_ids.type:
            ids = ids.cast(self.item_ids.type)
        found = pc.index_in(ids, value_set=self.item_ids)
        rows: NDArray[np.int64] = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        unknown = rows < 0
        if unknown.any():
            rows[unknown] = self._hash_rows(ids.filter(pa.array(unknown)))
        return rows

    def _hash_rows(self, ids: pa.Array | Sequence[Id]) -> NDArray[np.int64]:
        return self.num_items + (hash_ids(ids) % np.uint64(self.config.hash_rows)).astype(np.int64)

    def catalogue_hash_rows(self) -> NDArray[np.int64]:
        """The row each catalogue item would have were it unknown: i64 [N], in [N, N + H)."""
        return self._hash_rows(self.item_ids)

    def events(self, table: pa.Table, offsets: NDArray[np.int64]) -> EventFeatures:
        """Features of packed histories.

        table: item_id, event_type, timestamp_us and the event columns; users one after another, oldest event first.
        offsets: i64 [U + 1]. Raises ShapeError where the offsets do not span the table.
        """
        offsets = np.ascontiguousarray(offsets, np.int64)
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != table.num_rows or (np.diff(offsets) < 0).any():
            raise ShapeError(
                f"offsets must rise from 0 to the table's {table.num_rows} rows, got {len(offsets)} values"
                + (f" from {offsets[0]} to {offsets[-1]}" if len(offsets) else "")
            )
        time_us_T = table["timestamp_us"].to_numpy().astype(np.int64)
        gap_T = np.zeros(len(time_us_T), np.int64)
        if len(time_us_T):
            gap_T[1:] = gap_bucket(np.diff(time_us_T))
            starts = offsets[:-1]
            gap_T[starts[starts < len(gap_T)]] = 0
        column_TC = np.zeros((len(time_us_T), len(self.event_columns)), np.int64)
        for c, name in enumerate(self.event_columns):
            column_TC[:, c] = _codes(table[name], self._column_sets[name])
        return EventFeatures(
            item_T=torch.from_numpy(self.item_rows(table["item_id"])),
            type_T=torch.from_numpy(_codes(table["event_type"], self._type_set)),
            gap_T=torch.from_numpy(gap_T),
            column_TC=torch.from_numpy(column_TC),
            time_us_T=torch.from_numpy(time_us_T.copy()),
            offsets=torch.from_numpy(offsets.copy()),
        )

    def categories(self, columns: Mapping[str, pa.ChunkedArray | pa.Array], num_rows: int) -> NDArray[np.int64]:
        """Head categories of rows held as columns; a column that is not given is absent. Returns i64 [B, C]."""
        category_BC = np.zeros((num_rows, len(self.head_columns)), np.int64)
        for c, name in enumerate(self.head_columns):
            if name in columns:
                category_BC[:, c] = _codes(columns[name], self._column_sets[name])
        return category_BC

    def contexts(self, contexts: Sequence[Context], history_until_us: Sequence[int | None]) -> ContextFeatures:
        """`context_arrays` as tensors."""
        arrays = self.context_arrays(contexts, history_until_us)
        code_BF, session_3BK = torch.from_numpy(arrays.code_BF), torch.from_numpy(arrays.session_3BK)
        hour_B, weekday_B, age_B = code_BF[:, :3].T.contiguous()
        return ContextFeatures(
            code_BF[:, 3:].contiguous(), hour_B, weekday_B, age_B,
            session_3BK[0], session_3BK[1], session_3BK[2], torch.from_numpy(arrays.session_length_B),
            torch.from_numpy(arrays.subject_item_BM), torch.from_numpy(arrays.subject_weight_BM),
            torch.from_numpy(arrays.query_BQ),
        )  # fmt: skip

    def context_arrays(self, contexts: Sequence[Context], history_until_us: Sequence[int | None]) -> ContextArrays:
        """Features of request contexts.

        history_until_us: time of the last event the user's state has seen, None for a cold start; session events
        at or before it are dropped, since the state holds them.
        Raises ShapeError where the two differ in length or a query vector has not the declared width.
        """
        if len(contexts) != len(history_until_us):
            raise ShapeError(f"{len(contexts)} contexts and {len(history_until_us)} history times")
        config = self.config
        size, sessions, subjects = len(contexts), config.session_limit, config.subject_limit
        code_BF = np.zeros((size, 3 + len(self.head_columns)), np.int64)
        session_3BK = np.zeros((3, size, sessions), np.int64)
        session_length_B = np.zeros(size, np.int64)
        subject_item_BM = np.zeros((size, subjects), np.int64)
        subject_weight_BM = np.zeros((size, subjects), np.float32)
        query_BQ = np.zeros((size, config.query_dim), np.float32)
        for b, (context, until_us) in enumerate(zip(contexts, history_until_us, strict=True)):
            now_us = context.timestamp_us
            if now_us is not None:
                code_BF[b, 0] = now_us % _DAY_US // _HOUR_US + 1
                code_BF[b, 1] = (now_us // _DAY_US + 3) % 7 + 1
                if until_us is not None:
                    code_BF[b, 2] = _gap_bucket_of(now_us - until_us)
            if context.features:
                for f, name in enumerate(self.head_columns, 3):
                    value = context.features.get(name)
                    if value is not None:
                        code_BF[b, f] = self._column_codes[name].get(value, 1)
            if context.session_events:
                fresh = [e for e in context.session_events if until_us is None or e.timestamp_us > until_us]
                for k, event in enumerate(fresh[-sessions:]):
                    session_3BK[0, b, k] = self._row_of(event.item_id)
                    session_3BK[1, b, k] = self._type_codes.get(event.event_type, 1)
                    session_3BK[2, b, k] = 0 if now_us is None else _gap_bucket_of(now_us - event.timestamp_us)
                session_length_B[b] = min(len(fresh), sessions)
            if context.subject_items:
                best = sorted(context.subject_items, key=lambda subject: -subject.confidence)[:subjects]
                for m, subject in enumerate(best):
                    subject_item_BM[b, m] = self._row_of(subject.item_id)
                    subject_weight_BM[b, m] = subject.confidence
            if context.query_vector is not None:
                if context.query_vector.shape != (config.query_dim,):
                    raise ShapeError(
                        f"a query vector must have {config.query_dim} values, got {context.query_vector.shape}"
                    )
                query_BQ[b] = context.query_vector
        return ContextArrays(code_BF, session_3BK, session_length_B, subject_item_BM, subject_weight_BM, query_BQ)

    def _row_of(self, item_id: Id) -> int:
        if self._rows is None:
            self._rows = {value: row for row, value in enumerate(self.item_ids.to_pylist())}
        row = self._rows.get(item_id)
        return int(self._hash_rows([item_id])[0]) if row is None else row


def _gap_bucket_of(gap_us: int) -> int:
    """gap_bucket of one span, without an array."""
    return min(math.frexp(max(gap_us, 0) // _SECOND_US + 1)[1], GAP_BUCKETS - 1)


def _codes(values: pa.Array | pa.ChunkedArray, vocabulary: pa.Array) -> NDArray[np.int64]:
    """Codes of categorical values: 0 null, 1 unknown, 2... the vocabulary's. Returns i64 [n]."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    found = pc.add(pc.index_in(values, value_set=vocabulary, skip_nulls=True), 2)
    codes = pc.if_else(pc.is_valid(values), pc.fill_null(found, 1), 0)
    result: NDArray[np.int64] = codes.to_numpy(zero_copy_only=False).astype(np.int64)
    return result
