"""Reads event logs, items and users from Parquet, for training and for the batch job alike.

Everything here takes and returns Arrow tables. Rows that cannot be used are set aside with a reason (the reject
table) and the rest goes on; a file that cannot be used raises DataError.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.dataset import DatasetDescription
from model.errors import DataError

log = logging.getLogger(__name__)

REJECT_SCHEMA = pa.schema(
    [
        ("source_path", pa.string()),
        ("source_row", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""Rows set aside."""

NO_ORDER = np.iinfo(np.int64).max
"""What a null in the order column becomes: last among ties."""

DEFAULT_EVENT_TYPE = "event"
"""The type of every row of a log without an event_type column."""

_INT64 = np.iinfo(np.int64)
_LATEST_PLAUSIBLE_US = 7_258_118_400_000_000  # 2200-01-01
_UNIT_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
_PARQUET_UNITS = {"milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of one file of a log: the unit of reading."""

    path: str
    file_number: int
    """Index of the file in the sorted paths."""
    index: int
    """Index of the row group in its file."""
    first_row: int
    """Row of the file at which it starts."""
    num_rows: int


def event_schema(description: DatasetDescription) -> pa.Schema:
    """Schema of the canonical event table."""
    return pa.schema(
        [
            ("user_id", description.user_id_arrow),
            ("item_id", description.item_id_arrow),
            ("event_type", pa.string()),
            ("timestamp_us", pa.int64()),
            ("order", pa.int64()),
            ("source_file", pa.int32()),
            ("source_row", pa.int64()),
            ("row_hash", pa.int64()),
            *((name, pa.string()) for name in description.log_columns),
        ]
    )


# Files


def list_files(uri: str) -> list[str]:
    """Parquet files of a log, sorted: the file itself, or all parts in a folder and its subfolders.

    Names beginning with `_` or `.` are passed over, and in a folder so are names with another ending than .parquet,
    .pq or none. A local path stays as it was given (relative or not); a URL keeps its protocol.
    Raises DataError when nothing is there.
    """
    uri = str(uri)
    fs, root = fsspec.core.url_to_fs(uri)
    if fs.isfile(root):
        return [uri]
    if not fs.isdir(root):
        raise DataError(f"no event log at {uri}: wanted a Parquet file or a folder of them, found nothing")
    root = root.rstrip("/")
    names = []
    others = 0
    for path in fs.find(root):
        name = path[len(root) + 1 :]
        parts = PurePosixPath(name).parts
        if any(part[0] in "_." for part in parts) or PurePosixPath(name).suffix not in (".parquet", ".pq", ""):
            others += 1
        else:
            names.append(name)
    if not names:
        raise DataError(f"no Parquet files in {uri}: found {others} files with other names")
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    """Opens one Parquet file, local or remote. DataError when it is not there, not Parquet or damaged."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        handle = fs.open(inner, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error
    with handle:
        try:
            with pq.ParquetFile(handle) as file:
                yield file
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def log_schema(uri: str) -> pa.Schema:
    """Arrow schema of the log's first file."""
    with _open(list_files(uri)[0]) as file:
        return file.schema_arrow


def row_groups(uri: str) -> list[RowGroup]:
    """All row groups of a log that hold rows, by file, then by place in the file."""
    groups = []
    for number, path in enumerate(list_files(uri)):
        with _open(path) as file:
            first = 0
            for index in range(file.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                if rows:
                    groups.append(RowGroup(path, number, index, first, rows))
                first += rows
    return groups


def check_log(uri: str, description: DatasetDescription) -> None:
    """Checks the columns of every file of a log. Raises DataError as check_schema does."""
    for path in list_files(uri):
        with _open(path) as file:
            check_schema(path, file.schema_arrow, description)


def check_schema(path: str, schema: pa.Schema, description: DatasetDescription) -> None:
    """Raises DataError naming file, column, wanted and found when `schema` lacks or mistypes a declared column."""
    _check_id(path, schema, "user_id", description.user_id_type)
    _check_id(path, schema, "item_id", description.item_id_type)
    kind = _column_type(path, schema, "timestamp", "int64 seconds or a timestamp")
    if not (_is_narrow_int(kind) or pa.types.is_timestamp(kind)):
        raise _mistyped(path, "timestamp", "int64 seconds or a timestamp", kind)
    if "event_type" in schema.names or DEFAULT_EVENT_TYPE not in description.event_types:
        kind = _column_type(path, schema, "event_type", "string")
        if not is_string(kind) and not pa.types.is_null(kind):
            raise _mistyped(path, "event_type", "string", kind)
    if description.order_column is not None:
        kind = _column_type(path, schema, description.order_column, "an integer up to int64")
        if not _is_narrow_int(kind) and not pa.types.is_null(kind):
            raise _mistyped(path, description.order_column, "an integer up to int64", kind)
    for name in description.log_columns:
        _check_category(path, schema, name)


# The event log


def log_end_us(uri: str, description: DatasetDescription) -> int:
    """Latest timestamp of any row of a log, int64 microseconds: from Parquet statistics, else by reading the column.

    Raises DataError when no row has a timestamp, or when the latest lies after the year 2200 (milliseconds in a
    column of seconds look like that).
    """
    latest = None
    for path in list_files(uri):
        with _open(path) as file:
            check_schema(path, file.schema_arrow, description)
            for index in range(file.num_row_groups):
                found = _group_end_us(file, index)
                if found is not None and (latest is None or found > latest):
                    latest = found
    if latest is None:
        raise DataError(f"{uri} has no event with a timestamp")
    if latest > _LATEST_PLAUSIBLE_US:
        raise DataError(
            f"{uri}: the latest timestamp is {latest // 1_000_000} seconds after 1970, beyond the year 2200; wanted "
            f"int64 seconds (not milliseconds) or an Arrow timestamp. Give an as-of time to set such rows aside."
        )
    return latest


def _group_end_us(file: pq.ParquetFile, index: int) -> int | None:
    kind = file.schema_arrow.field("timestamp").type
    group = file.metadata.row_group(index)
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema != "timestamp" or column.physical_type not in ("INT32", "INT64"):
            continue
        statistics = column.statistics
        if statistics is None or not statistics.has_min_max:
            continue
        if not pa.types.is_timestamp(kind):
            return _clamp(int(statistics.max) * 1_000_000)
        logical = json.loads(statistics.logical_type.to_json())
        unit = _PARQUET_UNITS.get(logical.get("timeUnit", ""))
        if unit is not None:
            return _clamp(int(statistics.max_raw) * _UNIT_NS[unit] // 1000)
    values = file.read_row_group(index, columns=["timestamp"]).column("timestamp")
    largest = pc.max(_timestamp_units(values)[0]).as_py()
    return None if largest is None else _clamp(largest * _timestamp_units(values)[1] // 1000)


def _clamp(value: int) -> int:
    return max(_INT64.min, min(_INT64.max, value))


def distinct_event_types(uri: str) -> list[str]:
    """Event types that occur in a log, sorted; `event` alone where it has no such column."""
    found: set[str] = set()
    for path in list_files(uri):
        with _open(path) as file:
            if "event_type" not in file.schema_arrow.names:
                found.add(DEFAULT_EVENT_TYPE)
                continue
            for index in range(file.num_row_groups):
                column = file.read_row_group(index, columns=["event_type"]).column("event_type")
                found.update(_as_string(column).unique().drop_null().to_pylist())
    return sorted(found) or [DEFAULT_EVENT_TYPE]


def read_row_group(group: RowGroup, description: DatasetDescription, as_of_us: int) -> tuple[pa.Table, pa.Table]:
    """One row group as (canonical event table, reject table), rows in file order.

    A row is set aside for a null id or timestamp, an undeclared event type, or a time later than `as_of_us` (int64
    microseconds); the first of these that holds is its reason. A time outside of int64 microseconds counts as later
    when it is, else as null. Raises DataError for missing or mistyped columns.
    """
    with _open(group.path) as file:
        check_schema(group.path, file.schema_arrow, description)
        table = file.read_row_group(group.index)
    if table.num_rows != group.num_rows:
        raise DataError(f"{group.path}: row group {group.index} has {table.num_rows} rows, had {group.num_rows}")
    return canonical_events(table, description, as_of_us, group.path, group.file_number, group.first_row)


def canonical_events(
    table: pa.Table,
    description: DatasetDescription,
    as_of_us: int,
    path: str = "",
    file_number: int = 0,
    first_row: int = 0,
) -> tuple[pa.Table, pa.Table]:
    """Rows of a log file, all its columns, as (canonical event table, reject table). See read_row_group.

    `first_row` is the row of the file at which `table` starts.
    """
    rows = table.num_rows
    user_id = _cast(table.column("user_id"), description.user_id_arrow)
    item_id = _cast(table.column("item_id"), description.item_id_arrow)
    if "event_type" in table.column_names:
        event_type = _as_string(table.column("event_type"))
    else:
        event_type = _repeat(DEFAULT_EVENT_TYPE, rows)
    timestamp_us, early = _timestamps(table.column("timestamp"))
    known_type = pc.fill_null(pc.is_in(event_type, value_set=pa.array(description.event_type_names)), False)

    timestamp_null = _numpy_bool(pc.is_null(table.column("timestamp")))
    reason = np.zeros(rows, np.int8)
    for number, bad in (
        (1, _numpy_bool(pc.is_null(user_id))),
        (2, _numpy_bool(pc.is_null(item_id))),
        (3, timestamp_null | early),
        (4, ~_numpy_bool(known_type)),
        (5, timestamp_us > as_of_us),
    ):
        reason[(reason == 0) & bad] = number

    if description.order_column is None:
        order = np.zeros(rows, np.int64)
    else:
        order = _numpy_int(table.column(description.order_column), fill=NO_ORDER)
    columns: list[Any] = [
        user_id,
        item_id,
        event_type,
        pa.array(timestamp_us),
        pa.array(order),
        pa.array(np.full(rows, file_number, np.int32)),
        pa.array(np.arange(first_row, first_row + rows, dtype=np.int64)),
        pa.array(row_hash(table)),
        *(_as_string(table.column(name)) for name in description.log_columns),
    ]
    events = pa.Table.from_arrays(columns, schema=event_schema(description))
    if not reason.any():
        return events, REJECT_SCHEMA.empty_table()

    set_aside = np.flatnonzero(reason)
    wanted = ["user_id", "item_id", "event_type", "timestamp_us", "source_row"]
    seen = events.select(wanted).take(pa.array(set_aside))
    code = reason[set_aside]
    rejects = make_rejects(
        seen,
        _repeat(path, len(set_aside)),
        pa.array(_REASONS, pa.string()).take(pa.array(code)),
        _details(seen, table.column("timestamp").take(pa.array(set_aside)), code, as_of_us),
    )
    return events.filter(pa.array(reason == 0)), rejects


_REASONS = ("", "null_user", "null_item", "null_timestamp", "undeclared_event_type", "future_timestamp")


def _details(seen: pa.Table, raw_time: pa.ChunkedArray, code: NDArray[np.int8], as_of_us: int) -> pa.Array:
    """What to say of each row set aside. Whole logs are replayed day by day, so there may be millions."""
    details = _repeat("", len(code))
    if (code == 3).any():
        ticks = _timestamp_units(raw_time)[0].cast(pa.string())
        early = pc.binary_join_element_wise(ticks, "is before what int64 microseconds hold", " ")
        details = pc.if_else(pc.and_(pa.array(code == 3), pc.is_valid(ticks)), early, details)
    if (code == 4).any():
        details = pc.if_else(pa.array(code == 4), pc.fill_null(_one_chunk(seen.column("event_type")), "null"), details)
    if (code == 5).any():
        time_us = _one_chunk(seen.column("timestamp_us"))
        near = pc.and_(pa.array(code == 5), pc.less(time_us, _LATEST_PLAUSIBLE_US))
        text = pc.if_else(near, time_us, 0).cast(pa.timestamp("us")).cast(pa.string())  # 2017-10-15 03:00:00.000000
        text = pc.replace_substring(pc.replace_substring(text, " ", "T"), ".000000", "")
        text = pc.if_else(
            near,
            pc.binary_join_element_wise(text, "Z", ""),
            pc.binary_join_element_wise(time_us.cast(pa.string()), "microseconds", " "),
        )
        late = pc.binary_join_element_wise(text, f"is after {show_time(as_of_us)}", " ")
        details = pc.if_else(pa.array(code == 5), late, details)
    return details


def _repeat(value: str, count: int) -> pa.Array:
    return pa.array([value], pa.string()).take(pa.array(np.zeros(count, np.int64)))


def make_rejects(
    events: pa.Table,
    source_paths: Sequence[str] | pa.Array,
    reasons: Sequence[str] | pa.Array,
    details: Sequence[str] | pa.Array,
) -> pa.Table:
    """A reject table from rows with user_id, item_id and source_row, and one path, reason and detail for each."""
    texts = [
        values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())
        for values in (source_paths, reasons, details)
    ]
    return pa.Table.from_arrays(
        [
            texts[0],
            events.column("source_row"),
            _as_string(events.column("user_id")),
            _as_string(events.column("item_id")),
            *texts[1:],
        ],
        schema=REJECT_SCHEMA,
    )


def concat_rejects(tables: Iterable[pa.Table]) -> pa.Table:
    """Reject tables one after another; none gives an empty table."""
    return pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables])


def reject_counts(rejects: pa.Table) -> dict[str, int]:
    """Rows set aside by reason, reasons sorted; reasons that do not occur are left out."""
    counts = rejects.column("reason").value_counts().to_pylist()
    return dict(sorted((entry["values"], entry["counts"]) for entry in counts))


def read_log(uri: str, description: DatasetDescription, as_of_us: int | None = None) -> tuple[pa.Table, pa.Table]:
    """A whole log as (event table, reject table): by user, in event order, duplicates set aside.

    `as_of_us`: int64 microseconds, later events are set aside; None: the log's last event.
    Raises DataError as read_row_group and log_end_us do.
    """
    paths = list_files(uri)
    check_log(uri, description)
    if as_of_us is None:
        as_of_us = log_end_us(uri, description)
    events = [event_schema(description).empty_table()]
    rejects = []
    for group in row_groups(uri):
        good, bad = read_row_group(group, description, as_of_us)
        events.append(good)
        rejects.append(bad)
    table, duplicates = drop_duplicates(sort_events(pa.concat_tables(events)), paths)
    rejected = concat_rejects([*rejects, duplicates])
    if rejected.num_rows:
        log.warning("%s: %d rows set aside: %s", uri, rejected.num_rows, reject_counts(rejected))
    return table, rejected


def sort_events(table: pa.Table) -> pa.Table:
    """Sorts a canonical event table by user_id, then (timestamp_us, order, source_file, source_row).

    Strings sort by their UTF-8 bytes, as on every machine. The result has one chunk a column.
    """
    table = table.combine_chunks()
    keys = [_numpy_int(table.column(name)) for name in ("source_row", "source_file", "order", "timestamp_us")]
    keys.append(_codes(table.column("user_id")))
    if _is_sorted(keys):
        return table
    varied = [key for key in keys if len(key) and key.min() != key.max()]
    if len(varied) > 1 and _is_sorted(keys[:2]):
        varied = [key for key in keys[2:] if key.min() != key.max()]  # the sort is stable: file and row are in place
    if not varied:
        return table
    return table.take(pa.array(np.lexsort(varied))).combine_chunks()


def drop_duplicates(table: pa.Table, paths: Sequence[str] = ()) -> tuple[pa.Table, pa.Table]:
    """Sets aside all but the first of rows equal in user_id, item_id, timestamp_us and row_hash.

    `table`: sorted as by sort_events.  `paths`: the sorted paths of the log, for the rejects' source_path; without
    them it reads "file 3".  Returns (event table, reject table); the detail names the row that was kept.
    """
    time = _numpy_int(table.column("timestamp_us"))
    user = _codes(table.column("user_id"))
    tied = np.zeros(len(time), bool)
    if len(time):
        same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        tied[1:] |= same
        tied[:-1] |= same
    rows = np.flatnonzero(tied)
    if not len(rows):
        return table, REJECT_SCHEMA.empty_table()
    tie_group = np.cumsum(~np.concatenate([[False], same])[rows])
    some = table.select(["item_id", "row_hash"]).take(pa.array(rows))
    keys = [_numpy_int(some.column("row_hash")), _codes(some.column("item_id")), tie_group]
    by_key = np.lexsort(keys)  # stable: equal rows stay in event order
    repeat = np.zeros(len(rows), bool)
    first = np.arange(len(rows))
    if len(rows) > 1:
        equal = np.logical_and.reduce([key[by_key][1:] == key[by_key][:-1] for key in keys])
        repeat[by_key[1:]] = equal
        starts = np.maximum.accumulate(np.where(np.concatenate([[True], ~equal]), np.arange(len(rows)), 0))
        first[by_key] = by_key[starts]
    if not repeat.any():
        return table, REJECT_SCHEMA.empty_table()
    dropped = rows[repeat]
    kept = rows[first[repeat]]
    place = table.select(["user_id", "item_id", "source_file", "source_row"])
    gone = place.take(pa.array(dropped))
    origin = place.take(pa.array(kept))
    files = gone.column("source_file").to_pylist()
    details = [
        f"same as row {row} of {_path(paths, number)}"
        for number, row in zip(
            origin.column("source_file").to_pylist(), origin.column("source_row").to_pylist(), strict=True
        )
    ]
    rejects = make_rejects(gone, [_path(paths, number) for number in files], ["duplicate"] * len(files), details)
    keep = np.ones(len(time), bool)
    keep[dropped] = False
    return table.filter(pa.array(keep)).combine_chunks(), rejects


def offsets_of(user_ids: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """Where each user's events begin and end in a column sorted (or at least grouped) by user, without nulls.

    Returns (the U users in order of appearance, int64 or string as given; offsets int64 [U+1], rising from 0 to T):
    events of user u are rows offsets[u] to offsets[u+1].
    """
    column = _one_chunk(user_ids)
    codes = _codes(column)
    if not len(codes):
        return column, np.zeros(1, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(codes[1:] != codes[:-1]) + 1])
    return column.take(pa.array(starts)), np.concatenate([starts, [len(codes)]]).astype(np.int64)


# Items and users


def read_items(uri: str, description: DatasetDescription) -> pa.Table:
    """Items as item_id, the declared item columns, and available_from_us (int64, nullable) where declared.

    A category comes as string, categories as list<string>, a number as float64; all nullable. File order is kept.
    Raises DataError for missing or mistyped columns, a null id, or an id that occurs twice.
    """
    parts = []
    for path in list_files(uri):
        with _open(path) as file:
            schema = file.schema_arrow
            _check_id(path, schema, "item_id", description.item_id_type)
            for name, kind in description.item_columns.items():
                _check_item_column(path, schema, name, kind)
            if description.available_from is not None:
                found = _column_type(path, schema, description.available_from, "int64 seconds or a timestamp")
                if not (_is_narrow_int(found) or pa.types.is_timestamp(found) or pa.types.is_null(found)):
                    raise _mistyped(path, description.available_from, "int64 seconds or a timestamp", found)
            wanted = dict.fromkeys(["item_id", *description.item_columns])
            if description.available_from is not None:
                wanted[description.available_from] = None
            table = file.read(columns=list(wanted))
        columns = {"item_id": _cast(table.column("item_id"), description.item_id_arrow)}
        for name, kind in description.item_columns.items():
            columns[name] = _item_column(table.column(name), kind)
        if description.available_from is not None:
            raw = table.column(description.available_from)
            time_us, early = _timestamps(raw)
            mask = _numpy_bool(pc.is_null(raw)) | early
            columns["available_from_us"] = pa.array(time_us, mask=mask)
        parts.append(pa.table(columns))
    items = pa.concat_tables(parts).combine_chunks()
    _check_unique(uri, items.column("item_id"))
    return items


def read_users(uri: str, description: DatasetDescription) -> pa.Table:
    """Users as user_id and the declared user columns, each as string (nullable). File order is kept.

    Raises DataError for missing or mistyped columns, a null id, or an id that occurs twice.
    """
    parts = []
    for path in list_files(uri):
        with _open(path) as file:
            _check_id(path, file.schema_arrow, "user_id", description.user_id_type)
            for name in description.user_columns:
                _check_category(path, file.schema_arrow, name)
            table = file.read(columns=["user_id", *description.user_columns])
        columns = {"user_id": _cast(table.column("user_id"), description.user_id_arrow)}
        for name in description.user_columns:
            columns[name] = _as_string(table.column(name))
        parts.append(pa.table(columns))
    users = pa.concat_tables(parts).combine_chunks()
    _check_unique(uri, users.column("user_id"))
    return users


def _check_item_column(path: str, schema: pa.Schema, name: str, kind: str) -> None:
    if kind == "category":
        _check_category(path, schema, name)
        return
    found = _column_type(path, schema, name, kind)
    if pa.types.is_null(found):
        return
    if kind == "categories":
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        if not is_list or not (_is_category(found.value_type) or pa.types.is_null(found.value_type)):
            raise _mistyped(path, name, "a list of strings (categories)", found)
    elif not (pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)):
        raise _mistyped(path, name, "a number", found)


def _item_column(column: pa.ChunkedArray, kind: str) -> pa.Array:
    if kind == "category":
        return _as_string(column)
    if kind == "number":
        return _cast(column, pa.float64())
    return _cast(column, pa.list_(pa.string()))


def _check_unique(uri: str, ids: pa.ChunkedArray) -> None:
    if ids.null_count:
        row = int(np.flatnonzero(_numpy_bool(pc.is_null(ids)))[0])
        raise DataError(f"{uri}: {ids.null_count} rows have a null id, the first is row {row}")
    counts = ids.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = repeated[0].as_py()
        raise DataError(
            f"{uri}: {len(repeated)} ids occur more than once, wanted one row each; "
            f"{first['values']!r} occurs {first['counts']} times"
        )


# Row hashes


def row_hash(table: pa.Table) -> NDArray[np.int64]:
    """One int64 per row over all columns: equal rows give equal hashes on every machine and in every run.

    The order of columns does not matter, nor the width of integers and floats, the unit of timestamps, nor how a
    string is stored; a null counts as an absent column. int64 [rows].
    """
    total = np.zeros(table.num_rows, np.uint64)
    for name, column in zip(table.column_names, table.columns, strict=True):
        seed = _hash_array(pa.array([name]))[0]
        array = _one_chunk(column)
        part = _mix(_hash_array(array) + seed)
        if array.null_count:
            part[_numpy_bool(pc.is_null(array))] = 0
        total += part
    return _mix(total).view(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which every input bit reaches every output bit (the finaliser of splitmix64)."""
    value = value ^ (value >> np.uint64(30))
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def _hash_array(array: pa.Array) -> NDArray[np.uint64]:
    """One uint64 per value; what null slots give is meaningless."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _hash_array(array.storage)
    if pa.types.is_dictionary(kind):
        if not len(array.dictionary):
            return np.zeros(len(array), np.uint64)
        return _hash_array(array.dictionary)[_numpy_int(array.indices)]
    if pa.types.is_null(kind):
        return np.zeros(len(array), np.uint64)
    if pa.types.is_boolean(kind):
        return _numpy_bool(pc.fill_null(array, False)).astype(np.uint64)
    if pa.types.is_uint64(kind):
        return np.asarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False))
    if pa.types.is_integer(kind):
        return _numpy_int(array).view(np.uint64)
    if pa.types.is_floating(kind):
        values = _one_chunk(pc.fill_null(array, 0.0)).to_numpy(zero_copy_only=False).astype(np.float64)
        values = values + 0.0  # -0.0 becomes 0.0
        values[np.isnan(values)] = np.nan
        return np.asarray(values.view(np.uint64))
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time(kind):
        width = pa.int32() if pa.types.is_time32(kind) else pa.int64()
        return _numpy_int(array.view(width)).view(np.uint64) * np.uint64(_UNIT_NS[kind.unit])  # may wrap: only a hash
    if pa.types.is_date32(kind):
        return _numpy_int(array.view(pa.int32())).view(np.uint64)
    if pa.types.is_date64(kind):
        return _numpy_int(array.cast(pa.date32()).view(pa.int32())).view(np.uint64)
    if is_string(kind) or _is_binary(kind):
        return _hash_bytes(array.cast(pa.large_binary()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return _hash_lists(array)
    if pa.types.is_fixed_size_list(kind):
        return _hash_lists(array.cast(pa.large_list(kind.value_type)))
    if pa.types.is_struct(kind):
        total = np.zeros(len(array), np.uint64)
        for number in range(kind.num_fields):
            field = pc.struct_field(array, [number])
            part = _mix(_hash_array(field) + _hash_array(pa.array([kind.field(number).name]))[0])
            part[_numpy_bool(pc.is_null(field))] = 0
            total += part
        return total
    if pa.types.is_decimal(kind):
        return _hash_array(array.cast(pa.string()))
    return _hash_array(pa.array([None if v is None else repr(v) for v in array.to_pylist()], pa.string()))


def _hash_bytes(array: pa.Array) -> NDArray[np.uint64]:
    """Hashes a large_binary array eight bytes at a time, all values at once."""
    count = len(array)
    _, offset_buffer, data = array.buffers()
    if not count:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + count + 1]
    start = offsets[:-1]
    length = np.diff(offsets)
    value = _mix(length.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    if not length.max(initial=0):
        return value
    base = int(start[0])
    raw = np.zeros(int(offsets[-1]) - base + 8, np.uint8)
    raw[:-8] = np.frombuffer(data, np.uint8)[base : int(offsets[-1])]
    words = np.ndarray((len(raw) - 7,), "<u8", raw, strides=(1,))  # the word at every byte
    active = np.arange(count)
    done = 0
    while True:
        active = active[length[active] > done]
        if not len(active):
            return value
        word = words[start[active] - base + done].astype(np.uint64)
        left = length[active] - done
        used = np.minimum(left, 8).astype(np.uint64)
        word &= np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - np.uint64(8) * used)
        value[active] = _mix(value[active] ^ word) + np.uint64(0x9E3779B97F4A7C15)
        done += 8


def _hash_lists(array: pa.Array) -> NDArray[np.uint64]:
    """Order-sensitive sum over the elements of each list."""
    count = len(array)
    if pa.types.is_map(array.type):
        array = array.cast(pa.large_list(pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])))
    flat = array.flatten()  # leaves out what null lists point at
    lengths = _numpy_int(pc.fill_null(pc.list_value_length(array), 0))
    element = _mix(_hash_array(flat))
    if flat.null_count:
        element[_numpy_bool(pc.is_null(flat))] = np.uint64(0xD6E8FEB86659FD93)
    ends = np.cumsum(lengths)
    position = (np.arange(len(flat)) - np.repeat(ends - lengths, lengths)).astype(np.uint64)
    sums = np.zeros(len(flat) + 1, np.uint64)
    np.cumsum(_mix(element + position * np.uint64(0x9E3779B97F4A7C15)), out=sums[1:])  # wraps: only a hash
    return np.asarray(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64)).reshape(count)


# Types and conversions


def is_string(kind: pa.DataType) -> bool:
    """Whether values of this type are strings, also when dictionary-encoded."""
    if pa.types.is_dictionary(kind):
        return is_string(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _is_narrow_int(kind: pa.DataType) -> bool:
    """An integer whose every value fits into int64."""
    if pa.types.is_dictionary(kind):
        return _is_narrow_int(kind.value_type)
    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _is_category(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_category(kind.value_type)
    return is_string(kind) or bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _column_type(path: str, schema: pa.Schema, name: str, wanted: str) -> pa.DataType:
    places = schema.get_all_field_indices(name)
    if len(places) > 1:
        raise DataError(f"{path}: column {name!r} occurs {len(places)} times, wanted once")
    if not places:
        raise DataError(
            f"{path}: no column {name!r} (wanted {wanted}); found {', '.join(schema.names) or 'no columns'}"
        )
    return schema.field(places[0]).type


def _mistyped(path: str, name: str, wanted: str, found: pa.DataType) -> DataError:
    return DataError(f"{path}: column {name!r} must be {wanted}, found {found}")


def _check_id(path: str, schema: pa.Schema, name: str, wanted: str) -> None:
    kind = _column_type(path, schema, name, wanted)
    if not (_is_narrow_int(kind) if wanted == "int64" else is_string(kind)):
        raise _mistyped(path, name, f"{wanted} (as the dataset description says)", kind)


def _check_category(path: str, schema: pa.Schema, name: str) -> None:
    wanted = "string, integer or boolean (a category)"
    kind = _column_type(path, schema, name, wanted)
    if not _is_category(kind) and not pa.types.is_null(kind):
        raise _mistyped(path, name, wanted, kind)


def _one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _cast(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = _one_chunk(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array if array.type == kind else array.cast(kind)


def _as_string(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return _cast(column, pa.string())


def _numpy_int(column: pa.Array | pa.ChunkedArray, fill: int = 0) -> NDArray[np.int64]:
    array = _cast(column, pa.int64())
    if array.null_count:
        array = pc.fill_null(array, fill)
    return np.asarray(array.to_numpy(zero_copy_only=False), np.int64)


def _numpy_bool(column: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(_one_chunk(column).to_numpy(zero_copy_only=False), bool)


def _timestamp_units(column: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, int]:
    """The plain integers of a timestamp column and the nanoseconds one of them lasts."""
    array = _one_chunk(column)
    if pa.types.is_timestamp(array.type):
        return array.view(pa.int64()), _UNIT_NS[array.type.unit]
    return _cast(array, pa.int64()), _UNIT_NS["s"]


def _timestamps(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(microseconds, whether too early for them) of int64 seconds or timestamps of any unit; too late gives the max."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool)
    array, unit_ns = _timestamp_units(column)
    values = _numpy_int(array)
    if unit_ns == 1:
        return values // 1000, np.zeros(len(values), bool)
    factor = unit_ns // 1000
    early = values < _INT64.min // factor + 1
    late = values > _INT64.max // factor
    return np.where(late, _INT64.max, np.where(early | late, 0, values) * factor), early


def show_time(time_us: int) -> str:
    """ISO 8601 in UTC for messages, or the plain number of microseconds where no calendar reaches."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return f"{time_us} microseconds"


def _codes(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Integers that sort and compare as the ids do: the ids themselves, or the rank of a string by its bytes."""
    array = _one_chunk(column)
    if not is_string(array.type):
        return _numpy_int(array)
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    by_bytes = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(by_bytes), np.int64)
    rank[by_bytes] = np.arange(len(by_bytes))
    codes = _numpy_int(encoded.indices)
    return rank[codes] if len(rank) else codes


def _is_sorted(keys: Sequence[NDArray[np.int64]]) -> bool:
    """Whether rows already rise by these keys, the last of them first in weight (as np.lexsort takes them)."""
    if not keys or len(keys[0]) < 2:
        return True
    fine = np.ones(len(keys[0]) - 1, bool)  # neighbours equal in the keys weighed so far count as fine
    for key in keys:
        fine = (key[:-1] < key[1:]) | ((key[:-1] == key[1:]) & fine)
    return bool(fine.all())


def _path(paths: Sequence[str], number: int) -> str:
    return paths[number] if 0 <= number < len(paths) else f"file {number}"
