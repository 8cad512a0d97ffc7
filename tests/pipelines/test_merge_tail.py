"""Tail and events become histories: by hand, and against a plain reference on random logs full of ties."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.transforms.merge_tail import Histories, empty_tail, merge_tail, to_tail

SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()), ("item_id", pa.int64()), ("event_type", pa.string()), ("timestamp_us", pa.int64()),
        ("order", pa.int64()), ("source_file", pa.int32()), ("source_row", pa.int64()), ("row_hash", pa.int64()),
        ("surface", pa.string()),
    ]
)  # fmt: skip


def events(*rows: tuple[int, int, int], file: int = 0, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows (user, item, time); a row's hash is that of the three, so equal rows are duplicates."""
    return pa.Table.from_pylist(
        [
            {
                "user_id": user, "item_id": item, "event_type": "click", "timestamp_us": time, "order": 0,
                "source_file": file, "source_row": place, "row_hash": user * 1_000_000 + item * 1000 + time,
                "surface": "feed",
            }
            for place, (user, item, time) in enumerate(rows)
        ],
        schema=schema,
    )  # fmt: skip


def first_day(table: pa.Table, limit: int = 3) -> Histories:
    return merge_tail(empty_tail(table.schema), table, limit)


def items(histories: Histories) -> dict[int, list[int]]:
    lists = to_tail(histories)
    return dict(zip(lists["user_id"].to_pylist(), lists["item_id"].to_pylist(), strict=True))


def test_latest_events_of_each_user_oldest_first() -> None:
    found = first_day(events((2, 10, 5), (1, 11, 9), (2, 12, 3), (2, 13, 8), (2, 14, 1), (1, 15, 4)))
    assert items(found) == {1: [15, 11], 2: [12, 10, 13]}
    assert found.new_U.astype(bool).tolist() == [True, True]
    assert found.offsets.tolist() == [0, 2, 5]


def test_order_column_then_file_then_row_break_ties() -> None:
    table = pa.concat_tables([events((1, 10, 5), (1, 11, 5), file=1), events((1, 12, 5), (1, 13, 5))])
    order = pa.array([0, 0, 0, -1], pa.int64())
    assert items(first_day(table.set_column(4, "order", order), 9)) == {1: [13, 12, 10, 11]}


def test_new_events_join_the_tail_and_idle_users_are_unchanged() -> None:
    day = first_day(events((1, 10, 1), (1, 11, 2), (2, 12, 1)))
    found = merge_tail(to_tail(day), events((1, 13, 3), (1, 14, 4), (3, 15, 3)), 3)
    assert items(found) == {1: [11, 13, 14], 2: [12], 3: [15]}
    assert found.new_U.tolist() == [2, 0, 1]


def test_late_event_counts_and_one_older_than_a_full_tail_does_not() -> None:
    day = to_tail(first_day(events((1, 10, 10), (1, 11, 20), (1, 12, 30), (2, 10, 10))))
    late = merge_tail(day, events((1, 13, 25), (2, 13, 5)), 3)
    assert items(late) == {1: [11, 13, 12], 2: [13, 10]}
    older = merge_tail(day, events((1, 13, 5)), 3)
    assert items(older) == {1: [10, 11, 12], 2: [10]}
    assert not older.new_U.any()


def test_whole_log_again_changes_nothing_even_among_ties_cut_off() -> None:
    log = events((1, 10, 5), (1, 11, 5), (1, 12, 5), (1, 13, 5), (1, 14, 5))
    day = first_day(log)
    assert items(day) == {1: [12, 13, 14]}
    again = merge_tail(to_tail(day), log, 3)
    assert items(again) == {1: [12, 13, 14]}
    assert not again.new_U.any()
    assert len(again.duplicates) == 0


def test_copies_in_the_input_are_duplicates_and_copies_of_the_tail_are_not() -> None:
    log = events((1, 10, 1), (1, 10, 1), (1, 11, 2), (1, 10, 1))
    day = first_day(log)
    assert items(day) == {1: [10, 11]}
    assert day.duplicates["source_row"].to_pylist() == [1, 3]
    next_day = merge_tail(to_tail(day), events((1, 11, 2), (1, 12, 3), (1, 12, 3)), 3)
    assert items(next_day) == {1: [10, 11, 12]}
    assert next_day.duplicates["item_id"].to_pylist() == [12]
    assert not merge_tail(to_tail(day), events((1, 10, 1)), 3).new_U.any()


def test_nothing_at_all() -> None:
    found = first_day(SCHEMA.empty_table())
    assert items(found) == {}
    assert found.offsets.tolist() == [0]


def test_string_ids_sort_by_their_bytes() -> None:
    schema = SCHEMA.set(0, pa.field("user_id", pa.string()))
    table = events((1, 10, 1), (2, 11, 1), (3, 12, 1)).set_column(0, "user_id", pa.array(["é", "b", "B"]))
    found = first_day(table.cast(schema))
    assert found.users.to_pylist() == ["B", "b", "é"]


@pytest.mark.parametrize("seed", range(20))
def test_day_by_day_equals_one_rebuild(seed: int) -> None:
    """Random logs with many ties, late events and duplicates, in files that sort by day: every way of feeding them
    gives the same tails."""
    random = np.random.default_rng(seed)
    limit = int(random.integers(1, 6))
    days = []
    for file in range(3):
        rows = [
            (int(random.integers(4)), int(random.integers(3)), int(random.integers(4 * file, 4 * file + 6)))
            for _ in range(random.integers(0, 15))
        ]
        days.append(events(*rows, file=file))
    reference: dict[int, list[int]] = {}
    seen: set[int] = set()
    log = [row for day in days for row in day.to_pylist()]
    for row in sorted(log, key=lambda r: (r["timestamp_us"], r["source_file"], r["source_row"])):
        if row["row_hash"] not in seen:
            seen.add(row["row_hash"])
            reference.setdefault(row["user_id"], []).append(row["item_id"])
    wanted = {user: reference[user][-limit:] for user in sorted(reference)}

    rebuilt = first_day(pa.concat_tables(days), limit)
    assert items(rebuilt) == wanted
    shuffled = pa.concat_tables(days).take(pa.array(random.permutation(len(log))))
    assert to_tail(first_day(shuffled, limit)).equals(to_tail(rebuilt))

    whole_log = to_tail(first_day(days[0], limit))
    for day in (2, 3):
        whole_log = to_tail(merge_tail(whole_log, pa.concat_tables(days[:day]), limit))
    assert whole_log.equals(to_tail(rebuilt))


@pytest.mark.parametrize("seed", range(10))
def test_new_files_only_equal_one_rebuild(seed: int) -> None:
    """As above, with only the day's file each day; no copies, since a copy of a row cut off long ago looks new."""
    random = np.random.default_rng(100 + seed)
    limit = int(random.integers(1, 6))
    days = []
    for file in range(3):
        users = random.integers(0, 3, 12)
        times = random.integers(4 * file, 4 * file + 6, 12)
        rows = [(int(users[i]), file * 12 + i, int(times[i])) for i in range(12)]
        days.append(events(*rows, file=file))
    tail = empty_tail(SCHEMA)
    for day in days:
        tail = to_tail(merge_tail(tail, day, limit))
    assert tail.equals(to_tail(first_day(pa.concat_tables(days), limit)))
