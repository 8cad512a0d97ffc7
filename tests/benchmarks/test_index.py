"""The item index benchmark, small on the CPU: its check can fail, its sides agree, its judge of tears is right."""

import numpy as np
import pytest

from benchmarks import index
from benchmarks.index import GROUP, Reads, check, compare, group_rows, make_rows, rows_are_torn, slate_is_torn
from model.retrieval import reference
from model.retrieval.rules import Plan


def test_every_side_answers_and_is_recorded_by_batch() -> None:
    entries = compare("cpu", 600, (1, 2), Plan(k=40, advertiser_cap=3), repeats=1)
    assert [entry["measure"] for entry in entries] == [
        "index.B1.ms", "index.B1.over_plain", "index.B2.ms", "index.B2.over_plain",
    ]  # fmt: skip
    assert entries[0]["target"] == 0.075
    assert all(entry["value"] > 0 and entry["rival_value"] > 0 for entry in entries)


def test_the_check_notices_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(k=20, advertiser_cap=2)
    check("cpu", 300, plan)
    monkeypatch.setattr(reference, "is_full", lambda group, taken, cap: False)
    with pytest.raises(AssertionError, match="request 0"):
        check("cpu", 300, plan)


def test_the_catalogue_has_one_category_bit_an_item() -> None:
    rows = make_rows(500)
    bits = rows.mask_RW[:, 0].numpy().view(np.uint64)
    assert (bits == np.uint64(1) << rows.category_R.numpy().astype(np.uint64)).all()


def test_slates_with_part_of_a_group_or_two_numbers_are_torn() -> None:
    """Group 0 is items 0 to 7, group 1 items 8 to 15; a row of number 3 has utility 9."""
    both = list(range(2 * GROUP))
    nines_and_fours = np.array([9.0] * GROUP + [4.0] * GROUP, np.float32)
    assert not slate_is_torn(both, nines_and_fours)
    assert not slate_is_torn([], nines_and_fours)
    assert slate_is_torn(both[:-1], nines_and_fours), "half a deletion"
    assert slate_is_torn(both, np.array([9.0] * (GROUP - 1) + [4.0] * (GROUP + 1), np.float32)), "two numbers"
    assert slate_is_torn(list(range(GROUP)), np.full(GROUP, 6.0, np.float32)), "score 2, bid 3"


def test_rows_whose_fields_differ_are_torn() -> None:
    rows = group_rows(0, 5)
    assert not rows_are_torn(rows)
    rows.budget_R[3] = 6
    assert rows_are_torn(rows)


def test_main_checks_and_records_nothing_small(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(index, "record", lambda theme, entries: recorded.append(theme))
    assert index.main(["--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "torn reads: 0 of 2,0" in printed
    assert "dial 1.00: 100.0% of the global slate" in printed
    assert not recorded


def test_torn_answers_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "torn_reads", lambda *_: Reads(answers=10, torn=1))
    monkeypatch.setattr(index, "check", lambda *_: None)
    with pytest.raises(AssertionError, match="1 torn"):
        index.main(["--device", "cpu", "--quick"])
