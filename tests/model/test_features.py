"""The featuriser: codes, gaps and context tensors, worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.errors import ConfigError, DataError, ShapeError
from model.features import Featuriser, Vocabularies, frequent_values, gap_bucket, hash_ids, hour_of, weekday_of
from model.records import Context, Event, SubjectItem
from tests.releases import SMALL, VALUES, make_description

SECOND = 1_000_000
MONDAY_NINE = 1_600_074_000 * SECOND  # 2020-09-14 09:00:00 UTC, a Monday


def make_featuriser(ids: str = "int64") -> Featuriser:
    items = pa.array([10, 20, 30]) if ids == "int64" else pa.array(["a", "b", "c"])
    return Featuriser(make_description(ids=ids), Vocabularies(("click", "view"), VALUES), items, SMALL)


def event_table(rows: list[tuple[object, str, int, str | None]]) -> pa.Table:
    item, kind, time_us, surface = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.table(
        {
            "item_id": pa.array(item, None if rows else pa.int64()),
            "event_type": pa.array(kind, pa.string()),
            "timestamp_us": pa.array(time_us, pa.int64()),
            "surface": pa.array(surface, pa.string()),
        }
    )


def test_a_gap_doubles_from_bucket_to_bucket() -> None:
    seconds = np.array([-5, 0, 0.9, 1, 2, 3, 6.999, 7, 2**40])
    assert gap_bucket((seconds * SECOND).astype(np.int64)).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 32]


def test_the_clock_is_utc() -> None:
    times = np.array([0, MONDAY_NINE, MONDAY_NINE + 6 * 86_400 * SECOND - 1])
    assert hour_of(times).tolist() == [1, 10, 9]
    assert weekday_of(times).tolist() == [4, 1, 7]  # a Thursday, a Monday, and a microsecond before Sunday, 09:00


def test_ids_hash_alike_from_arrays_and_lists() -> None:
    assert hash_ids(pa.array([1, -7])).tolist() == hash_ids([1, -7]).tolist()
    assert hash_ids(["a"]).tolist() == [0xE8B7BE43]  # CRC-32 of "a"
    assert hash_ids([0]).tolist() == [0xE220A8397B1DCDAF]  # the first output of splitmix64 seeded with 0
    assert hash_ids(pa.array([], pa.string())).tolist() == []


def test_events_become_codes_rows_and_gaps() -> None:
    featuriser = make_featuriser()
    table = event_table(
        [
            (20, "click", 0, "feed"),
            (30, "view", 3 * SECOND, None),
            (99, "never declared", 3 * SECOND, "elsewhere"),
            (10, "click", 9 * SECOND, "search"),
        ]
    )
    features = featuriser.events(table, np.array([0, 3, 3, 4]))
    unknown = 3 + int(hash_ids([99])[0] % 32)
    assert features.item_T.tolist() == [1, 2, unknown, 0]
    assert features.type_T.tolist() == [2, 3, 1, 2]
    assert features.gap_T.tolist() == [0, 3, 1, 0]  # 0 s is a gap; a history's first event has none
    assert features.column_TC.tolist() == [[2], [0], [1], [3]]
    assert features.offsets.tolist() == [0, 3, 3, 4]


def test_a_window_forgets_what_came_before_it() -> None:
    table = event_table([(10, "click", t * SECOND, None) for t in (0, 1, 8, 9, 100)])
    features = make_featuriser().events(table, np.array([0, 4, 5])).latest(2)
    assert features.offsets.tolist() == [0, 2, 3]
    assert features.time_us_T.tolist() == [8 * SECOND, 9 * SECOND, 100 * SECOND]
    assert features.gap_T.tolist() == [0, 2, 0]
    again = make_featuriser().events(table.slice(2, 3), np.array([0, 2, 3]))
    assert torch.equal(again.gap_T, features.gap_T)


def test_offsets_that_do_not_span_the_table_are_refused() -> None:
    table = event_table([(10, "click", 0, None)])
    for offsets in ([0], [0, 2], [1, 1], [0, 1, 0, 1], []):
        with pytest.raises(ShapeError, match="offsets must rise from 0 to the table's 1 rows"):
            make_featuriser().events(table, np.array(offsets, np.int64))


def test_a_context_becomes_codes() -> None:
    featuriser = make_featuriser()
    context = Context(
        features={"device": "tv", "country": "atlantis"},
        timestamp_us=MONDAY_NINE,
        session_events=(
            Event(10, "click", MONDAY_NINE - 100 * SECOND),
            Event(30, "view", MONDAY_NINE - 7 * SECOND),
            Event(99, "bogus", MONDAY_NINE),
        ),
        subject_items=(SubjectItem(20, 0.25), SubjectItem(30, 0.75), SubjectItem(10, 0.5)),
    )
    features = featuriser.contexts([context, Context()], [MONDAY_NINE - 100 * SECOND, None])
    assert features.category_BC.tolist() == [[3, 1], [0, 0]]
    assert features.hour_B.tolist() == [10, 0]
    assert features.weekday_B.tolist() == [1, 0]
    assert features.age_B.tolist() == [7, 0]
    assert features.session_length_B.tolist() == [2, 0]  # the event at the state's own time is in the state
    assert features.session_item_BK.tolist()[0] == [2, 3 + int(hash_ids([99])[0] % 32), 0, 0]
    assert features.session_type_BK.tolist()[0] == [3, 1, 0, 0]
    assert features.session_gap_BK.tolist()[0] == [4, 1, 0, 0]
    assert features.subject_item_BM.tolist()[0] == [2, 0]  # the two most confident
    assert features.subject_weight_BM.tolist()[0] == [0.75, 0.5]


def test_the_session_keeps_its_latest_events() -> None:
    events = tuple(Event(10 * (1 + n % 3), "click", n * SECOND) for n in range(1, 8))
    features = make_featuriser().contexts([Context(session_events=events)], [2 * SECOND])
    assert features.session_length_B.tolist() == [4]
    assert features.session_item_BK.tolist() == [[1, 2, 0, 1]]  # events 4 to 7: items 20, 30, 10, 20
    assert features.session_gap_BK.tolist() == [[0, 0, 0, 0]]  # no request time, no gap


def test_rows_of_a_table_and_of_one_request_agree() -> None:
    for ids, known in (("int64", [10, 20, 30, 5, -1]), ("string", ["a", "b", "c", "zz", ""])):
        featuriser = make_featuriser(ids)
        rows = featuriser.item_rows(pa.array(known))
        one_by_one = featuriser.contexts(
            [Context(session_events=(Event(item, "click", 1),)) for item in known], [None] * len(known)
        )
        assert one_by_one.session_item_BK[:, 0].tolist() == rows.tolist()


def test_columns_and_contexts_give_the_same_categories() -> None:
    featuriser = make_featuriser()
    devices = ["tv", None, "toaster", "phone"]
    from_columns = featuriser.categories({"device": pa.array(devices)}, 4)
    contexts = [Context(features={} if d is None else {"device": d}) for d in devices]
    assert from_columns.tolist() == featuriser.contexts(contexts, [None] * 4).category_BC.tolist()


def test_a_catalogue_with_repeated_ids_is_refused() -> None:
    with pytest.raises(DataError, match="unique"):
        Featuriser(make_description(), Vocabularies(("click",), VALUES), pa.array([1, 1]), SMALL)


def test_a_missing_vocabulary_is_named() -> None:
    with pytest.raises(ConfigError, match="surface"):
        Featuriser(make_description(), Vocabularies(("click",), {}), pa.array([1]), SMALL)


def test_a_query_vector_of_another_width_is_refused() -> None:
    context = Context(query_vector=np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="must have 0 values"):
        make_featuriser().contexts([context], [None])


def test_the_most_frequent_values_are_kept_in_order_of_name() -> None:
    column = pa.chunked_array([["b", "a", None, "c", "c", "b"]])
    assert frequent_values(column, 2) == ("b", "c")
