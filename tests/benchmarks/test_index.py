"""The item index benchmark, small on the CPU: its check can fail, its sides agree, its judge of tears is right."""

import numpy as np
import pytest
import torch

from benchmarks import index
from benchmarks.index import (
    GROUP,
    Case,
    HostRules,
    Load,
    Loaded,
    Reads,
    Window,
    check,
    check_kernels,
    compare,
    group_rows,
    make_requests,
    make_rows,
    rows_are_torn,
    slate_is_torn,
    torn_entry,
    torn_slates,
    updates,
)
from model.retrieval import reference
from model.retrieval.index import LiveIndex, Slates
from model.retrieval.rules import Plan, Requests
from model.retrieval.scorer import InteractionScorer


def test_every_side_answers_and_is_recorded_by_batch() -> None:
    entries = compare("cpu", 600, (1, 2), Plan(k=40, advertiser_cap=3), repeats=1)
    assert [entry["measure"] for entry in entries] == ["index.B1.ms", "index.B2.ms"]
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


def test_the_record_of_torn_reads_says_how_many_answers_were_looked_at() -> None:
    reads = Reads(1200, 0, {1, 2, 5})
    assert torn_entry(reads, 1200)["note"] == "of 1,200 answers looked at, over 3 revisions"
    assert torn_entry(reads, 5000)["note"].endswith("over 3 revisions; 5,000 were wanted, cut off after 50 s")


def test_slates_of_a_batch_must_be_alike() -> None:
    """Utilities 9 for all of group 0; users of length 1 and 2."""
    scale_B = np.array([1, 2, 1], np.float32)
    row_BK = np.tile(np.arange(GROUP), (3, 1))
    utility_BK = np.full((3, GROUP), 9, np.float32) * scale_B[:, None]
    item_ids = [list(range(GROUP)) for _ in range(3)]
    assert torn_slates(Slates(item_ids, row_BK, utility_BK, "v", 1), scale_B) == 0
    other_BK = utility_BK.copy()
    other_BK[1, 3] = 9
    assert torn_slates(Slates(item_ids, row_BK, other_BK, "v", 1), scale_B) == 1
    assert torn_slates(Slates(item_ids, row_BK, utility_BK + 1, "v", 1), scale_B) == 3
    assert torn_slates(Slates([*item_ids[:2], item_ids[2][:-1]], row_BK, utility_BK, "v", 1), scale_B) == 1


def test_the_host_s_rules_give_the_folded_rival_s_rows() -> None:
    rows, (users, requests), plan = make_rows(500), make_requests(1, 500), Plan(k=40, advertiser_cap=3)
    live = LiveIndex(rows, InteractionScorer(256, 16))
    with live.pin() as pinned, torch.inference_mode():
        columns = pinned.table.used()
        asked = Requests.build(requests, rows.layout, lambda ids: live.rows_of(ids, 500))
        case = Case(live.retrieval, columns, users, asked, plan, 500)
        slate = HostRules.of(columns, asked, plan).slate(case.scores()[0, 0].numpy())
        assert slate.tolist() == case.folded()[1][0].tolist() == case.as_written()[1][0].tolist()


def test_latency_under_updates_is_told_for_each_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is updated in loaded windows alone, ten times a second."""
    changes: list[int] = []
    whole = LiveIndex.change
    monkeypatch.setattr(
        LiveIndex, "change", lambda self, deltas: changes.append(len(deltas.item_ids)) or whole(self, deltas)
    )
    entries = updates("cpu", 300, Plan(k=20, advertiser_cap=3), rounds=2, window_s=0.2)
    assert [entry["measure"] for entry in entries] == [
        "index.updates_600.p99_ratio", "index.updates_6000.p99_ratio", "index.updates_6000.fed.p99_ratio",
        "index.updates_60000.p99_ratio",
    ]  # fmt: skip
    assert [entry["target"] for entry in entries] == [1.05, 1.05, None, None]
    assert all(entry["value"] > 0 and "nothing against nothing: p50" in entry["note"] for entry in entries)
    assert set(changes) <= {54, 240, 0}, "of 300 items, those that do not come whole"
    assert 7 <= len(changes) <= 9 * 3, "four windows to warm up, then five; two of them need redis"


def test_percentiles_are_those_of_all_requests_of_all_windows() -> None:
    """Quiet 1 to 100 ms, p99 99.01; loaded twice that but for one window's ten requests of 500 ms."""
    ones = [float(number) for number in range(1, 101)]
    quiet = [Window(ones[:50], []), Window(ones[50:], [])]
    twice = [Window([2 * one for one in window.request_ms], [3.0, 5.0]) for window in quiet]
    loaded = Loaded(Load(600), quiet, twice)
    assert loaded.ratio(50) == loaded.ratio(99) == 2
    assert "4 batches of 4 ms, longest 5: 100 requests" in loaded.line()
    worse = Loaded(Load(600), quiet, [twice[0], Window([*twice[1].request_ms, *[500.0] * 10], [])])
    assert worse.at(99, worse.loaded) == 500


def test_the_interval_is_of_windows_drawn_again() -> None:
    """Windows all alike leave nothing to chance; of one with 4 x and two with 2 x, some draws have none or only it."""
    quiet = [Window([1.0] * 100, []) for _ in range(3)]
    assert Loaded(Load(600), quiet, [Window([2.0] * 100, [])] * 3).interval(99) == (2, 2)
    unlike = Loaded(Load(600), quiet, [Window([4.0] * 100, []), *[Window([2.0] * 100, [])] * 2])
    assert unlike.ratio(99) == 4
    assert unlike.interval(99) == (2, 4)
    assert unlike.told(50) == "2.000 x (2.000 to 4.000)"


def test_windows_of_a_pair_are_drawn_together() -> None:
    """A machine that is ten times slower for a while meets both windows of a pair, and the ratio not at all."""
    quiet = [Window([pace] * 50, []) for pace in (1.0, 10.0, 1.0, 10.0)]
    loaded = [Window([2 * window.request_ms[0]] * 50, []) for window in quiet]
    assert Loaded(Load(600), quiet, loaded).interval(99) == (2, 2)
    assert Loaded(Load(600), quiet, loaded).interval(50) == (2, 2)


def test_an_update_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LiveIndex, deltas: object) -> None:
        raise OSError("broken off")

    monkeypatch.setattr(LiveIndex, "change", fail)
    with pytest.raises(OSError, match="broken off"):
        updates("cpu", 300, Plan(k=20, advertiser_cap=3), rounds=1, window_s=0.2)


def test_the_kernels_are_checked_and_the_check_notices_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    plan = Plan(k=20, advertiser_cap=2)
    check_kernels("cpu", 150, plan)
    monkeypatch.setattr(reference, "is_full", lambda group, taken, cap: False)
    with pytest.raises(AssertionError, match="request 0"):
        check_kernels("cpu", 150, plan)


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
    monkeypatch.setattr(index, "torn_reads", lambda *_, **__: Reads(answers=10, torn=1))
    monkeypatch.setattr(index, "check", lambda *_: None)
    with pytest.raises(AssertionError, match="1 torn"):
        index.main(["--device", "cpu", "--quick"])
