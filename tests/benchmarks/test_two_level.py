"""The two-level benchmark, small on the CPU: its judges can fail, and every way answers and is recorded."""

import pytest
import torch

from benchmarks import two_level
from benchmarks.two_level import Size, best_of_all, by_product, check, make, measure, recall
from model.retrieval.two_level import TwoLevelIndex

SMALL = Size(3000, 16, 12, (3,), 32, 20, 1)


def test_recall_is_the_share_of_the_best() -> None:
    assert recall(torch.tensor([[1, 2, 3], [7, 8, -1]]), torch.tensor([[3, 2, 9], [8, 7, 6]])) == pytest.approx(2 / 3)


def test_items_and_users_are_of_length_one_and_near_to_each_other() -> None:
    items, users = make(SMALL, "cpu")
    assert items.dtype == torch.bfloat16
    assert torch.allclose(items.float().norm(dim=1), torch.ones(3000), atol=5e-3)
    nearest = best_of_all(items, users, 1)[0]
    assert nearest.min() > 0.75, "the item a user was made of: 1 / sqrt(1.25) = .89 in the mean"


def test_pieces_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pieces of 700 as by all at once; exact in float64."""
    items, users = (part.double() for part in make(SMALL, "cpu"))
    wanted = (users @ items.T).topk(50, dim=1).indices
    assert torch.equal(by_product(items, users, 50, 700), wanted)
    assert torch.equal(by_product(items, users, 50, 3000), wanted)
    monkeypatch.setattr(two_level, "PIECE", 700)
    assert recall(best_of_all(items.bfloat16(), users.float(), 50)[1], wanted) == 1


def test_the_check_notices_scores_that_are_off() -> None:
    items, users = make(SMALL, "cpu")
    index, best = TwoLevelIndex(two_level.VERSION, items), best_of_all(items, users, 20)
    check(index, users, best, SMALL)
    with pytest.raises(AssertionError, match="off by"):
        check(index, users, (best[0] + 1e-5, best[1]), SMALL)
    with pytest.raises(AssertionError):
        check(index, users, (best[0], best[1] + 1), SMALL)


def test_every_way_answers_and_all_codes_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_level, "MOST_BATCH", 16)
    found = {entry["measure"]: entry for entry in measure(SMALL, "cpu")}
    assert list(found) == ["index.3000.B1.ms", "index.3000.B32.ms", "index.3000.qps", "index.3000.recall"]
    assert found["index.3000.recall"]["value"] == 1, "of 2,048 survivors"
    assert found["index.3000.B1.ms"]["rival"].startswith("bfloat16 product and topk")
    note = found["index.3000.B32.ms"]["note"]
    assert note.startswith("all codes, 2048 wanted; 3 probes, 2048 wanted ")
    assert "tail of 3/4 on the host" in note
