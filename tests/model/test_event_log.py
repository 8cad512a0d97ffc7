from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.dataset import DatasetDescription, load_description
from model.errors import DataError
from model.event_log import (
    NO_ORDER,
    REJECT_SCHEMA,
    RowGroup,
    canonical_events,
    check_log,
    concat_rejects,
    distinct_event_types,
    drop_duplicates,
    event_schema,
    list_files,
    log_end_us,
    offsets_of,
    read_items,
    read_log,
    read_row_group,
    read_users,
    reject_counts,
    row_groups,
    row_hash,
    sort_events,
)
from tests.builders import make_description, make_items, make_rows, make_users, write_dataset, write_log

SECOND = 1_000_000
DATA = Path(__file__).parents[2].parent / "shared" / "data"

PLAIN = DatasetDescription(
    name="plain", user_id_type="int64", item_id_type="int64", event_types={"click": "positive", "view": "neutral"}
)
STRINGS = DatasetDescription(
    name="strings", user_id_type="string", item_id_type="string", event_types={"click": "positive"}
)


def row(user_id=1, item_id=10, timestamp=100, event_type="click", **more):
    return {"user_id": user_id, "item_id": item_id, "event_type": event_type, "timestamp": timestamp, **more}


def columns(table, *names):
    return [tuple(values.values()) for values in table.select(list(names)).to_pylist()]


def real(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at {folder}")
    return folder


# Files


def test_list_files_of_one_file(tmp_path):
    path = write_log(tmp_path / "log.data", [row()])
    assert list_files(str(path)) == [str(path)]


def test_list_files_of_a_folder(tmp_path):
    for name in ("b/part-1.parquet", "a/part-2.parquet", "part-0.parquet", "a/_temporary/part-9.parquet", "no-ending"):
        write_log(tmp_path / name, [row()])
    for name in ("_SUCCESS", ".part-0.parquet.crc", "README.md", "dataset.yaml"):
        (tmp_path / name).write_text("not a part")
    names = ["a/part-2.parquet", "b/part-1.parquet", "no-ending", "part-0.parquet"]
    assert list_files(str(tmp_path)) == [f"{tmp_path}/{name}" for name in names]
    assert list_files(f"{tmp_path}/") == [f"{tmp_path}/{name}" for name in names]
    assert list_files(f"file://{tmp_path}") == [f"file://{tmp_path}/{name}" for name in names]


def test_list_files_keeps_relative_paths(tmp_path, monkeypatch):
    write_log(tmp_path / "log" / "part.parquet", [row()])
    monkeypatch.chdir(tmp_path)
    assert list_files("log") == ["log/part.parquet"]


def test_list_files_where_nothing_is(tmp_path):
    with pytest.raises(DataError, match=r"no event log at .*absent"):
        list_files(str(tmp_path / "absent"))
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(DataError, match=r"no Parquet files in .*found 1 files with other names"):
        list_files(str(tmp_path))


def test_not_parquet(tmp_path):
    path = tmp_path / "events.parquet"
    path.write_text("user_id,item_id\n1,2\n")
    with pytest.raises(DataError, match=r"events\.parquet is not a readable Parquet file"):
        row_groups(str(path))


def test_torn_file(tmp_path):
    path = write_log(tmp_path / "events.parquet", [row()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"events\.parquet is not a readable Parquet file"):
        read_log(str(path), PLAIN)


def test_row_groups(tmp_path):
    a = write_log(tmp_path / "a.parquet", [row() for _ in range(5)], row_group_size=2)
    pq.write_table(pq.read_table(a).slice(0, 0), tmp_path / "b.parquet")
    c = write_log(tmp_path / "c.parquet", [row()])
    assert row_groups(str(tmp_path)) == [
        RowGroup(str(a), 0, 0, 0, 2),
        RowGroup(str(a), 0, 1, 2, 2),
        RowGroup(str(a), 0, 2, 4, 1),
        RowGroup(str(c), 2, 0, 0, 1),
    ]
    found = [read_row_group(group, PLAIN, 1000 * SECOND)[0] for group in row_groups(str(tmp_path))]
    assert columns(pa.concat_tables(found), "source_file", "source_row") == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (2, 0),
    ]


# Schema


@pytest.mark.parametrize("missing", ["user_id", "item_id", "event_type", "timestamp", "surface", "device"])
def test_missing_column(tmp_path, missing):
    rows = [{name: value for name, value in raw.items() if name != missing} for raw in make_rows()]
    path = write_log(tmp_path / "events.parquet", rows)
    with pytest.raises(DataError, match=rf"events\.parquet: no column '{missing}' \(wanted .*\); found .*") as caught:
        check_log(str(path), make_description())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "wanted", "found"),
    [
        ("user_id", "7", "int64", "string"),
        ("user_id", 7.0, "int64", "double"),
        ("item_id", "7", "int64", "string"),
        ("event_type", 3, "string", "int64"),
        ("timestamp", 1.7e9, "int64 seconds or a timestamp", "double"),
        ("timestamp", "2024-01-01", "int64 seconds or a timestamp", "string"),
        ("device", 1.5, "string, integer or boolean", "double"),
        ("device", ["tv"], "string, integer or boolean", "list<element: string>"),
        ("step", 1.0, "an integer", "double"),
    ],
)
def test_mistyped_column(tmp_path, column, value, wanted, found):
    path = write_log(tmp_path / "events.parquet", [make_rows()[0] | {"step": 1} | {column: value}])
    with pytest.raises(DataError) as caught:
        read_log(str(path), make_description(order_column="step"))
    for part in (str(path), f"'{column}'", wanted, f"found {found}"):
        assert part in str(caught.value)


def test_int_ids_where_strings_are_declared(tmp_path):
    path = write_log(tmp_path / "events.parquet", [row()])
    with pytest.raises(DataError, match=r"'user_id' must be string .*, found int64"):
        read_log(str(path), STRINGS)


def test_unsigned_64_bit_ids_are_refused(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row()], pa.schema([("user_id", pa.uint64()), ("item_id", pa.int64())]))
    with pytest.raises(DataError, match=r"'user_id' must be int64 .*found uint64"):
        read_log(str(path), PLAIN)


def test_second_file_is_checked_too(tmp_path):
    write_log(tmp_path / "a.parquet", [row()])
    bad = write_log(tmp_path / "b.parquet", [{"user_id": 1, "item_id": 2, "timestamp": 3}])
    with pytest.raises(DataError, match="no column 'event_type'") as caught:
        read_log(str(tmp_path), PLAIN)
    assert str(bad) in str(caught.value)


def test_narrow_integers_are_widened(tmp_path):
    schema = pa.schema(
        [("user_id", pa.int8()), ("item_id", pa.uint32()), ("event_type", pa.string()), ("timestamp", pa.int32())]
    )
    path = write_log(tmp_path / "e.parquet", [row(user_id=-3, item_id=4_000_000_000)], schema)
    events, _ = read_log(str(path), PLAIN)
    assert events.schema == event_schema(PLAIN)
    assert columns(events, "user_id", "item_id", "timestamp_us") == [(-3, 4_000_000_000, 100 * SECOND)]


def test_dictionary_strings_are_strings(tmp_path):
    coded = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([("user_id", coded), ("item_id", coded), ("event_type", coded), ("timestamp", pa.int64())])
    path = write_log(tmp_path / "e.parquet", [row("b", "x"), row("a", "y")], schema)
    events, _ = read_log(str(path), STRINGS)
    assert columns(events, "user_id", "item_id", "event_type") == [("a", "y", "click"), ("b", "x", "click")]
    plain = write_log(tmp_path / "plain.parquet", [row("b", "x"), row("a", "y")])
    assert events.column("row_hash") == read_log(str(plain), STRINGS)[0].column("row_hash")


def test_log_without_event_type(tmp_path):
    description = DatasetDescription(
        name="d", user_id_type="int64", item_id_type="int64", event_types={"event": "positive"}
    )
    path = write_log(tmp_path / "e.parquet", [{"user_id": 1, "item_id": 2, "timestamp": 3}])
    events, rejects = read_log(str(path), description)
    assert events.column("event_type").to_pylist() == ["event"]
    assert rejects.num_rows == 0
    assert distinct_event_types(str(path)) == ["event"]


# Canonical rows


def test_canonical_rows(tmp_path):
    path = write_log(
        tmp_path / "e.parquet",
        [
            row(2, 20, 200, "view", surface="home", device=3, extra=1.5),
            row(1, 10, 100, "click", surface=None, device=None, extra=None),
        ],
    )
    group = row_groups(str(path))[0]
    events, rejects = read_row_group(group, make_description(), 1000 * SECOND)
    assert events.schema.names == [
        "user_id", "item_id", "event_type", "timestamp_us", "order", "source_file", "source_row", "row_hash",
        "surface", "device",
    ]  # fmt: skip
    rest = [name for name in events.schema.names if name != "row_hash"]
    assert columns(events, *rest) == [
        (2, 20, "view", 200_000_000, 0, 0, 0, "home", "3"),
        (1, 10, "click", 100_000_000, 0, 0, 1, None, None),
    ]
    assert rejects.num_rows == 0
    assert rejects.schema == REJECT_SCHEMA


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/Sao_Paulo"])
def test_arrow_timestamps(tmp_path, unit, zone):
    # 2017-10-15T03:00:00Z; a naive time is taken as UTC, a zone only changes how an instant is shown.
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.timestamp(unit, zone))])
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    table = pa.table(
        [pa.array([1]), pa.array([2]), pa.array([1_508_036_400 * per_second]).cast(pa.timestamp(unit, zone))], schema
    )
    description = DatasetDescription(
        name="d", user_id_type="int64", item_id_type="int64", event_types={"event": "positive"}
    )
    for name, options in {"with": {}, "without": {"write_statistics": False}}.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, **options)
        assert log_end_us(str(path), description) == 1_508_036_400_000_000
        events, _ = read_log(str(path), description)
        assert events.column("timestamp_us").to_pylist() == [1_508_036_400_000_000]


def test_nanoseconds_are_cut_towards_the_past():
    table = pa.table(
        {
            "user_id": [1, 1],
            "item_id": [1, 1],
            "event_type": ["click", "click"],
            "timestamp": pa.array([1_999, -1]).cast(pa.timestamp("ns")),
        }
    )
    events, _ = canonical_events(table, PLAIN, 0 + SECOND)
    assert events.column("timestamp_us").to_pylist() == [1, -1]


# Rows set aside


def one_bad(tmp_path, *rows, description=PLAIN, as_of_us=1000 * SECOND, schema=None):
    path = write_log(tmp_path / "events.parquet", [row(), *rows, row(item_id=11)], schema)
    events, rejects = read_log(str(path), description, as_of_us)
    assert columns(events, "item_id") == [(10,), (11,)]  # the rest goes on
    assert set(rejects.column("source_path").to_pylist()) == {str(path)}
    return columns(rejects, "source_row", "user_id", "item_id", "reason", "detail")


def test_null_user(tmp_path):
    assert one_bad(tmp_path, row(user_id=None)) == [(1, None, "10", "null_user", "")]


def test_null_item(tmp_path):
    assert one_bad(tmp_path, row(item_id=None)) == [(1, "1", None, "null_item", "")]


def test_null_timestamp(tmp_path):
    assert one_bad(tmp_path, row(timestamp=None)) == [(1, "1", "10", "null_timestamp", "")]


def test_undeclared_event_type(tmp_path):
    assert one_bad(tmp_path, row(event_type="swipe"), row(event_type=None)) == [
        (1, "1", "10", "undeclared_event_type", "swipe"),
        (2, "1", "10", "undeclared_event_type", "null"),
    ]


def test_future_timestamp(tmp_path):
    detail = "1970-01-01T00:16:41Z is after 1970-01-01T00:16:40Z"
    far = "9223372036854775807 microseconds is after 1970-01-01T00:16:40Z"
    assert one_bad(tmp_path, row(timestamp=1001), row(timestamp=2**62)) == [
        (1, "1", "10", "future_timestamp", detail),
        (2, "1", "10", "future_timestamp", far),
    ]


def test_half_of_a_large_log_in_the_future(tmp_path):
    count = 200_000
    seconds = pa.array(np.arange(count))
    table = pa.table({"user_id": seconds, "item_id": seconds, "event_type": ["click"] * count, "timestamp": seconds})
    events, rejects = canonical_events(table, PLAIN, 99_999 * SECOND)
    assert (events.num_rows, rejects.num_rows) == (100_000, 100_000)
    assert rejects.column("detail")[0].as_py() == "1970-01-02T03:46:40Z is after 1970-01-02T03:46:39Z"


def test_an_event_at_as_of_is_not_future(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row(timestamp=1000)])
    assert read_log(str(path), PLAIN, 1000 * SECOND)[0].num_rows == 1
    assert read_log(str(path), PLAIN, 1000 * SECOND - 1)[0].num_rows == 0


def test_identical_rows(tmp_path):
    path = tmp_path / "events.parquet"
    assert one_bad(tmp_path, row(), row()) == [
        (1, "1", "10", "duplicate", f"same as row 0 of {path}"),
        (2, "1", "10", "duplicate", f"same as row 0 of {path}"),
    ]


def test_first_reason_wins(tmp_path):
    bad = row(user_id=None, item_id=None, timestamp=None, event_type="swipe")
    assert one_bad(tmp_path, bad) == [(1, None, None, "null_user", "")]


def test_times_beyond_int64_microseconds(tmp_path):
    found = one_bad(tmp_path, row(timestamp=2**62), row(timestamp=-(2**62)))
    assert [reason for *_, reason, _ in found] == ["future_timestamp", "null_timestamp"]
    assert found[1][-1] == "-4611686018427387904 is before what int64 microseconds hold"


def test_milliseconds_in_a_column_of_seconds(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row(timestamp=1_700_000_000_000)])
    with pytest.raises(DataError, match=r"beyond the year 2200; wanted int64 seconds \(not milliseconds\)"):
        read_log(str(path), PLAIN)


def test_as_of_is_the_last_event_by_default(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row(timestamp=5), row(timestamp=9)])
    events, rejects = read_log(str(path), PLAIN)
    assert (events.num_rows, rejects.num_rows) == (2, 0)


def test_reject_counts(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row(), row(), row(), row(timestamp=None), row(timestamp=2000)])
    _, rejects = read_log(str(path), PLAIN, 1000 * SECOND)
    assert reject_counts(rejects) == {"duplicate": 2, "future_timestamp": 1, "null_timestamp": 1}
    assert reject_counts(concat_rejects([])) == {}
    assert concat_rejects([rejects, rejects]).num_rows == 8


def test_log_without_rows(tmp_path):
    schema = pa.schema(
        [("user_id", pa.int64()), ("item_id", pa.int64()), ("event_type", pa.string()), ("timestamp", pa.int64())]
    )
    path = write_log(tmp_path / "e.parquet", [], schema)
    events, rejects = read_log(str(path), PLAIN, as_of_us=0)
    assert (events.num_rows, rejects.num_rows) == (0, 0)
    assert events.schema == event_schema(PLAIN)
    with pytest.raises(DataError, match="no event with a timestamp"):
        read_log(str(path), PLAIN)


# The end of the log


@pytest.mark.parametrize("statistics", [True, False])
def test_log_end(tmp_path, statistics):
    options = {"row_group_size": 1, "write_statistics": statistics}
    write_log(tmp_path / "a.parquet", [row(timestamp=7), row(timestamp=900), row(timestamp=None)], **options)
    write_log(tmp_path / "b.parquet", [row(timestamp=8)], **options)
    assert log_end_us(str(tmp_path), PLAIN) == 900 * SECOND


def test_log_end_keeps_fractions(tmp_path):
    when = datetime(2024, 1, 1, 0, 0, 0, 123_456, UTC)
    path = write_log(tmp_path / "e.parquet", [row(timestamp=when)])
    assert log_end_us(str(path), PLAIN) == 1_704_067_200_123_456


# Order


def order_of(rows, description, tmp_path):
    path = write_log(tmp_path / "e.parquet", rows)
    return columns(read_log(str(path), description)[0], "user_id", "item_id")


def test_sorted_by_user_then_time(tmp_path):
    rows = [row(2, 1, 50), row(1, 2, 90), row(2, 3, 10), row(1, 4, 20)]
    assert order_of(rows, PLAIN, tmp_path) == [(1, 4), (1, 2), (2, 3), (2, 1)]


def test_ties_keep_the_order_of_the_file(tmp_path):
    rows = [row(1, item) for item in (5, 3, 9, 1)]
    assert order_of(rows, PLAIN, tmp_path) == [(1, 5), (1, 3), (1, 9), (1, 1)]


def test_order_column_decides_ties_and_null_comes_last(tmp_path):
    description = make_description(event_columns=[], context_columns=[], order_column="step")
    rows = [
        row(1, 50, 100, step=None),
        row(1, 51, 100, step=2),
        row(1, 52, 100, step=-1),
        row(1, 53, 99, step=7),  # time comes before order
        row(1, 54, 100, step=None),
        row(1, 55, 101, step=None),
    ]
    assert order_of(rows, description, tmp_path) == [(1, 53), (1, 52), (1, 51), (1, 50), (1, 54), (1, 55)]
    events, _ = read_log(str(tmp_path / "e.parquet"), description)
    assert events.column("order").to_pylist() == [7, -1, 2, NO_ORDER, NO_ORDER, NO_ORDER]
    assert NO_ORDER == 2**63 - 1


def test_order_column_of_nulls_only(tmp_path):
    description = make_description(event_columns=[], context_columns=[], order_column="step")
    assert order_of([row(1, 2, step=None), row(1, 1, step=None)], description, tmp_path) == [(1, 2), (1, 1)]


def test_ties_across_files_follow_the_sorted_paths(tmp_path):
    write_log(tmp_path / "b.parquet", [row(1, 1), row(1, 2)])
    write_log(tmp_path / "a.parquet", [row(1, 3)], row_group_size=1)
    write_log(tmp_path / "a" / "z.parquet", [row(1, 4)])
    events, _ = read_log(str(tmp_path), PLAIN)
    # "a.parquet" < "a/z.parquet" < "b.parquet", as "." sorts before "/"
    assert columns(events, "item_id", "source_file", "source_row") == [(3, 0, 0), (4, 1, 0), (1, 2, 0), (2, 2, 1)]


def test_order_column_comes_before_file_and_row(tmp_path):
    description = make_description(event_columns=[], context_columns=[], order_column="step")
    write_log(tmp_path / "a.parquet", [row(1, 1, step=3), row(1, 2, step=2)])
    write_log(tmp_path / "b.parquet", [row(1, 3, step=1), row(1, 4, step=2)])
    events, _ = read_log(str(tmp_path), description)
    assert columns(events, "item_id") == [(3,), (2,), (4,), (1,)]


def test_string_ids_sort_by_bytes(tmp_path):
    rows = [row("é", "x", 1), row("b", "y", 2), row("", "v", 9), row("B", "z", 3), row("b", "w", 1)]
    path = write_log(tmp_path / "e.parquet", rows)
    events, _ = read_log(str(path), STRINGS)
    assert columns(events, "user_id", "item_id") == [("", "v"), ("B", "z"), ("b", "w"), ("b", "y"), ("é", "x")]
    assert events.schema == event_schema(STRINGS)


def test_sort_does_not_depend_on_the_input_order(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        row(int(rng.integers(5)), int(rng.integers(9)), int(rng.integers(4)), step=int(rng.integers(3)))
        for _ in range(200)
    ]
    description = make_description(event_columns=[], context_columns=[], order_column="step")
    halves = pa.Table.from_pylist(rows[:100]), pa.Table.from_pylist(rows[100:])
    table = pa.concat_tables(
        [canonical_events(half, description, 1000 * SECOND, "", number)[0] for number, half in enumerate(halves)]
    )
    wanted = sorted(
        table.to_pylist(),
        key=lambda r: (r["user_id"], r["timestamp_us"], r["order"], r["source_file"], r["source_row"]),
    )
    for _ in range(3):
        shuffled = table.take(pa.array(rng.permutation(200)))
        assert sort_events(shuffled).to_pylist() == wanted
    assert sort_events(sort_events(table)).to_pylist() == wanted
    assert sort_events(table.slice(0, 0)).num_rows == 0


# Duplicates


def test_duplicates_across_files(tmp_path):
    a = write_log(tmp_path / "a.parquet", [row(1, 5), row(2, 6)])
    b = write_log(tmp_path / "b.parquet", [row(3, 7), row(1, 5)])
    events, rejects = read_log(str(tmp_path), PLAIN)
    assert columns(events, "user_id", "item_id") == [(1, 5), (2, 6), (3, 7)]
    assert columns(rejects, "source_path", "source_row", "reason", "detail") == [
        (str(b), 1, "duplicate", f"same as row 0 of {a}")
    ]


def test_duplicates_of_string_ids(tmp_path):
    path = write_log(tmp_path / "e.parquet", [row("u", "i"), row("u", "j"), row("u", "i")])
    events, rejects = read_log(str(path), STRINGS)
    assert columns(events, "item_id") == [("i",), ("j",)]
    assert columns(rejects, "source_row", "user_id", "item_id", "reason") == [(2, "u", "i", "duplicate")]


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp", "event_type", "price", "undeclared"])
def test_a_row_that_differs_in_any_column_stays(tmp_path, column):
    first = row(1, 2, 3, "click", price=1.0, undeclared="a")
    change = {"event_type": "view", "undeclared": "b"}.get(column, 99)
    path = write_log(tmp_path / "e.parquet", [first, first | {column: change}])
    events, rejects = read_log(str(path), PLAIN)
    assert (events.num_rows, rejects.num_rows) == (2, 0)


def test_duplicates_with_other_rows_between(tmp_path):
    rows = [row(1, 1, v=1), row(1, 1, v=2), row(1, 2, v=1), row(1, 1, v=1), row(1, 1, v=2), row(1, 1, v=3)]
    path = write_log(tmp_path / "e.parquet", rows)
    events, rejects = read_log(str(path), PLAIN)
    assert events.column("source_row").to_pylist() == [0, 1, 2, 5]
    assert columns(rejects, "source_row", "detail") == [
        (3, f"same as row 0 of {path}"),
        (4, f"same as row 1 of {path}"),
    ]


def test_drop_duplicates_without_paths():
    table, _ = canonical_events(pa.Table.from_pylist([row(), row()]), PLAIN, 1000 * SECOND, "x", file_number=4)
    _, rejects = drop_duplicates(table)
    assert columns(rejects, "source_path", "detail") == [("file 4", "same as row 0 of file 4")]
    assert drop_duplicates(table.slice(0, 0))[0].num_rows == 0


# Row hashes


def test_row_hash_is_the_same_everywhere():
    # Pinned: a change of these numbers makes old tails disagree with new logs.
    table = pa.table({"a": [1, -1, None], "b": ["", "eight by", "more than eight bytes"], "c": [0.5, None, 2.0]})
    assert row_hash(table).tolist() == [6193044835864541238, 4975446557445233523, 659232754314129784]


def hashes(values, kind=None):
    return row_hash(pa.table({"a": pa.array(values, kind)})).tolist()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.array([1, None], pa.int8()), pa.array([1, None], pa.int64())),
        (pa.array([0.5, None], pa.float32()), pa.array([0.5, None], pa.float64())),
        (pa.array([0.0]), pa.array([-0.0])),
        (pa.array([float("nan")]), pa.array(np.array([0x7FF8000000000001]).view(np.float64))),
        (pa.array(["a", None]), pa.array(["a", None], pa.large_string())),
        (pa.array(["a", None]), pa.array(["a", None], pa.string_view())),
        (pa.array(["a", "b", "a"]), pa.array(["a", "b", "a"]).dictionary_encode()),
        (pa.array(["x", "a", "b"]).slice(1), pa.array(["a", "b"])),
        (pa.array([[1], [2, 3], None]), pa.array([[1], [2, 3], None], pa.large_list(pa.int64()))),
        (pa.array([[9], [2, 3]]).slice(1), pa.array([[2, 3]])),
        (pa.array([5], pa.timestamp("s")), pa.array([5000], pa.timestamp("ms", "UTC"))),
    ],
)
def test_row_hash_sees_values_not_storage(left, right):
    assert row_hash(pa.table({"a": left})).tolist() == row_hash(pa.table({"a": right})).tolist()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0, 1, -1, 2**62, None]),
        pa.array([0, 1, 2**64 - 1, None], pa.uint64()),
        pa.array([0.0, 1.0, -1.0, float("nan"), float("inf"), None]),
        pa.array(["", "a", "b", "ab", "ba", "a\0", "aaaaaaaa", "aaaaaaaaa", "aaaaaaaab", None]),
        pa.array([b"", b"\0", b"\0\0", None]),
        pa.array([True, False, None]),
        pa.array([datetime(2024, 1, 1), datetime(2024, 1, 2), None]),
        pa.array([datetime(2024, 1, 1).date(), datetime(2024, 1, 2).date(), None]),
        pa.array([1, 2, None], pa.time32("s")),
        pa.array([1, 2, None], pa.duration("us")),
        pa.array([Decimal("1.10"), Decimal("1.20"), None]),
        pa.array([[], [1], [1, 2], [2, 1], [None], [None, 1], [0], None], pa.list_(pa.int64())),
        pa.array([["a"], ["a", "b"], ["ab"], ["b", "a"], [""], []]),
        pa.array([[[1], [2]], [[1, 2]], [[], [1, 2]], [[2], [1]]]),
        pa.array([[1, 2], [2, 1], None], pa.list_(pa.int64(), 2)),
        pa.array([{"x": 1, "y": 2}, {"x": 2, "y": 1}, {"x": 1, "y": None}, None]),
        pa.array([[("a", 1)], [("a", 2)], [("b", 1)], None], pa.map_(pa.string(), pa.int64())),
    ],
    ids=lambda values: str(values.type),
)
def test_row_hash_tells_values_apart(values):
    found = row_hash(pa.table({"a": values})).tolist()
    assert len(set(found)) == len(values)
    assert row_hash(pa.table({"a": values.take(pa.array([0, 0, 1]))})).tolist() == [found[0], found[0], found[1]]


def test_row_hash_of_columns():
    one, two, three = pa.array([1]), pa.array([2]), pa.array([None], pa.int64())
    swapped = row_hash(pa.table({"a": two, "b": one}))
    assert row_hash(pa.table({"a": one, "b": two})) != swapped
    assert row_hash(pa.table({"b": one, "a": two})) == swapped  # order of columns does not matter
    assert row_hash(pa.table({"a": two, "b": one, "c": three})) == swapped  # null is absent
    assert row_hash(pa.table({"a": two, "c": one})) != swapped


def test_row_hash_rarely_collides():
    numbers = np.arange(200_000)
    assert len(np.unique(row_hash(pa.table({"a": numbers, "b": numbers % 7})))) == 200_000
    assert len(np.unique(row_hash(pa.table({"a": pa.array(numbers).cast(pa.string())})))) == 200_000


def test_row_hash_does_not_depend_on_chunks():
    table = pa.table({"a": ["x", "y", "z"], "b": [[1], None, [2, 3]]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert row_hash(chunked).tolist() == row_hash(table).tolist()


# Offsets


@pytest.mark.parametrize(
    ("ids", "users", "offsets"),
    [
        ([], [], [0]),
        ([4], [4], [0, 1]),
        ([-1, -1, 3, 5, 5, 5], [-1, 3, 5], [0, 2, 3, 6]),
        (["b", "b", "a"], ["b", "a"], [0, 2, 3]),
    ],
)
def test_offsets(ids, users, offsets):
    array = pa.array(ids) if ids else pa.array([], pa.int64())
    for column in (array, pa.chunked_array([array.slice(0, 1), array.slice(1)])):
        found_users, found = offsets_of(column)
        assert found_users.to_pylist() == users
        assert found.tolist() == offsets
        assert found.dtype == np.int64


# Items and users


def test_read_items(tmp_path):
    schema = pa.schema(
        [
            ("item_id", pa.int32()),
            ("year", pa.int16()),
            ("tags", pa.list_(pa.string())),
            ("price", pa.float32()),
            ("born", pa.int64()),
            ("n_clicks", pa.int64()),
        ]
    )
    rows = [
        {"item_id": 5, "year": 1995, "tags": ["a", "b"], "price": 1.5, "born": 100, "n_clicks": 9},
        {"item_id": 3, "year": None, "tags": None, "price": None, "born": None, "n_clicks": 9},
    ]
    path = write_log(tmp_path / "items.parquet", rows, schema)
    description = make_description(
        item_columns={"year": "category", "tags": "categories", "price": "number"}, available_from="born"
    )
    items = read_items(str(path), description)
    assert items.schema == pa.schema(
        [
            ("item_id", pa.int64()),
            ("year", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("price", pa.float64()),
            ("available_from_us", pa.int64()),
        ]
    )
    assert [tuple(values.values()) for values in items.to_pylist()] == [
        (5, "1995", ["a", "b"], 1.5, 100 * SECOND),
        (3, None, None, None, None),
    ]


def test_availability_beyond_int64_microseconds(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 1, "born": -(2**62)}, {"item_id": 2, "born": 2**62}])
    items = read_items(str(path), make_description(item_columns={}, available_from="born"))
    assert items.column("available_from_us").to_pylist() == [None, 2**63 - 1]  # always, never


def test_read_items_without_columns(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": "x", "born": 3}])
    assert read_items(str(path), STRINGS).to_pylist() == [{"item_id": "x"}]


def test_items_may_be_a_folder_and_lists_may_be_empty(tmp_path):
    write_log(tmp_path / "b.parquet", [{"item_id": 1, "tags": []}])
    write_log(tmp_path / "a.parquet", [{"item_id": 2, "tags": [7]}])
    items = read_items(str(tmp_path), make_description(item_columns={"tags": "categories"}))
    assert items.to_pylist() == [{"item_id": 2, "tags": ["7"]}, {"item_id": 1, "tags": []}]


def test_item_twice(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 7}, {"item_id": 8}, {"item_id": 7}])
    with pytest.raises(DataError, match=r"items\.parquet: 1 ids occur more than once.*; 7 occurs 2 times"):
        read_items(str(path), PLAIN)


def test_item_without_id(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 7}, {"item_id": None}])
    with pytest.raises(DataError, match=r"1 rows have a null id, the first is row 1"):
        read_items(str(path), PLAIN)


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("category", 1.5, "string, integer or boolean"),
        ("categories", "a", "a list of strings"),
        ("categories", [1.5], "a list of strings"),
        ("number", "1.5", "a number"),
    ],
)
def test_mistyped_item_column(tmp_path, kind, value, wanted):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 7, "x": value}])
    with pytest.raises(DataError, match=rf"items\.parquet: column 'x' must be {wanted}"):
        read_items(str(path), make_description(item_columns={"x": kind}))


def test_missing_item_columns(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 7}])
    with pytest.raises(DataError, match=r"items\.parquet: no column 'x' \(wanted number\)"):
        read_items(str(path), make_description(item_columns={"x": "number"}))
    with pytest.raises(DataError, match=r"no column 'born' \(wanted int64 seconds or a timestamp\)"):
        read_items(str(path), make_description(item_columns={}, available_from="born"))


def test_mistyped_available_from(tmp_path):
    path = write_log(tmp_path / "items.parquet", [{"item_id": 7, "born": "2024"}])
    with pytest.raises(DataError, match=r"column 'born' must be int64 seconds or a timestamp, found string"):
        read_items(str(path), make_description(item_columns={}, available_from="born"))


def test_read_users(tmp_path):
    path = write_log(tmp_path / "users.parquet", [{"user_id": 3, "age": 18, "zip": "x"}, {"user_id": 1, "age": None}])
    users = read_users(str(path), make_description(user_columns=["age"]))
    assert users.schema == pa.schema([("user_id", pa.int64()), ("age", pa.string())])
    assert users.to_pylist() == [{"user_id": 3, "age": "18"}, {"user_id": 1, "age": None}]


def test_user_twice_or_without_column(tmp_path):
    path = write_log(tmp_path / "users.parquet", [{"user_id": 3}, {"user_id": 3}])
    with pytest.raises(DataError, match=r"3 occurs 2 times"):
        read_users(str(path), PLAIN)
    with pytest.raises(DataError, match=r"users\.parquet: no column 'gender'"):
        read_users(str(path), make_description())


# Whole data sets


def test_a_whole_small_data_set(tmp_path):
    folder = write_dataset(tmp_path, users=4, length=5)
    events, rejects = read_log(str(folder / "events.parquet"), make_description())
    users, offsets = offsets_of(events.column("user_id"))
    assert users.to_pylist() == [1, 2, 3, 4]
    assert offsets.tolist() == [0, 5, 10, 15, 20]
    assert rejects.num_rows == 0
    assert read_items(str(folder / "items.parquet"), make_description()).num_rows == make_items().num_rows
    assert read_users(str(folder / "users.parquet"), make_description()).to_pylist() == make_users(4).to_pylist()


@pytest.mark.parametrize(
    ("name", "events", "users", "items", "rejects", "types"),
    [
        ("ml-100k", 100_000, 943, 1_682, {}, {"rating": 100_000}),
        # 279 ratings without a time; nobody is lost by that.
        ("ml-1m", 999_930, 6_040, 3_883, {"null_timestamp": 279}, {"rating": 999_930}),
        ("online-retail", 394_834, 4_363, 3_676, {}, {"purchase": 386_359, "return": 8_475}),
        (
            "trivago-2019-sample", 87_608, 6_593, 107_603, {},
            {
                "view_image": 68_538, "clickout": 13_597, "view_info": 1_825, "view_rating": 1_445,
                "view_deals": 1_159, "search_item": 1_044,
            },
        ),
        ("globo-news", 2_988_179, 322_897, 46_033, {}, {"click": 2_988_179}),
    ],
)  # fmt: skip
def test_real_data_sets(name, events, users, items, rejects, types):
    folder = real(name)
    description = load_description(name)
    table, rejected = read_log(str(folder / "events.parquet"), description)
    assert table.num_rows == events
    assert reject_counts(rejected) == rejects
    found, offsets = offsets_of(table.column("user_id"))
    assert (len(found), offsets[-1]) == (users, events)
    assert len(found.unique()) == users
    counts = table.column("event_type").value_counts().to_pylist()
    assert {entry["values"]: entry["counts"] for entry in counts} == types
    assert read_items(str(folder / "items.parquet"), description).num_rows == items
    if description.user_columns:
        assert read_users(str(folder / "users.parquet"), description).num_rows == users


def test_ml_1m_order_is_the_published_sequence():
    # (timestamp, seq_pos) must give every user's seq_pos 0, 1, 2, ... once the rows without one are left out.
    folder = real("ml-1m")
    events, _ = read_log(str(folder / "events.parquet"), load_description("ml-1m"))
    order = events.column("order").to_numpy()
    placed = order != NO_ORDER
    assert placed.sum() == 999_611
    _, offsets = offsets_of(events.column("user_id").filter(pa.array(placed)))
    wanted = np.arange(placed.sum()) - np.repeat(offsets[:-1], np.diff(offsets))
    np.testing.assert_array_equal(order[placed], wanted)
