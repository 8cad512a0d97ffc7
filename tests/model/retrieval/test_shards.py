"""The dial from local to global top-k, by hand."""

import numpy as np
import pytest
import torch

from model.errors import ConfigError
from model.retrieval.index import LiveIndex
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import DotScorer
from model.retrieval.select import select_exactly
from model.retrieval.shards import local_slates, shifts, slates_at, variation

# Shard 0 has rows 0, 2, 4, 6 and shard 1 rows 1, 3, 5, 7.
UTILITY = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0]])
ALLOWED = torch.ones(1, 8, dtype=torch.bool)
SEED = torch.tensor([0])


def test_each_shard_fills_its_quota() -> None:
    """k = 4, two shards: the best two of each, 9 and 8, 4 and 3. Global would be rows 0, 2, 4, 6."""
    assert local_slates(UTILITY, ALLOWED, {}, SEED, Plan(k=4), 2).tolist() == [[0, 2, 7, 5]]
    assert local_slates(UTILITY, ALLOWED, {}, SEED, Plan(k=4), 1).tolist() == [[0, 2, 4, 6]]
    assert local_slates(UTILITY, ALLOWED, {}, SEED, Plan(k=3), 2).tolist() == [[0, 2, 7]], "quota 2 each, cut to 3"
    assert local_slates(UTILITY, ALLOWED, {}, SEED, Plan(k=4), 9).tolist() == [[0, 2, 4, 6]], "a row a shard"


def test_caps_hold_within_a_shard_only() -> None:
    """All of one advertiser with a cap of 1: one of each shard, though the global walk takes one in all."""
    groups = {"advertiser": torch.zeros(8, dtype=torch.int64)}
    plan = Plan(k=4, advertiser_cap=1)
    assert local_slates(UTILITY, ALLOWED, groups, SEED, plan, 2).tolist() == [[0, 7, -1, -1]]
    assert select_exactly(UTILITY, ALLOWED, groups, SEED, plan).row_BK.tolist() == [[0, -1, -1, -1]]


@pytest.mark.parametrize(
    ("dial", "rows"),
    [(0, [0, 2, 7, 5]), (0.2, [0, 2, 7, 5]), (0.5, [0, 2, 4, 7]), (0.8, [0, 2, 4, 6]), (1, [0, 2, 4, 6])],
)
def test_the_dial_goes_from_local_to_global(dial: float, rows: list[int]) -> None:
    """Rows 4 and 6 come in, best first; 7 and 5 go, worst first; half of each is one."""
    assert slates_at(dial, torch.tensor([[0, 2, 4, 6]]), torch.tensor([[0, 2, 7, 5]]), UTILITY).tolist() == [rows]


@pytest.mark.parametrize(("dial", "rows"), [(0, [7, 5, -1]), (0.33, [7, 5, -1]), (0.67, [7, -1, -1]), (1, [7, -1, -1])])
def test_short_slates_stay_what_they_are_at_the_ends(dial: float, rows: list[int]) -> None:
    """Globally row 7 alone, locally rows 7 and 5."""
    assert slates_at(dial, torch.tensor([[7, -1, -1]]), torch.tensor([[7, 5, -1]]), UTILITY).tolist() == [rows]


@pytest.mark.parametrize("seed", range(10))
def test_the_ends_of_the_dial_are_the_two_slates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    utility = torch.from_numpy(rng.integers(0, 9, (3, 90)).astype(np.float32))
    allowed = torch.from_numpy(rng.random((3, 90)) < 0.8)
    groups = {
        "advertiser": torch.from_numpy(rng.integers(-1, 5, 90)),
        "category": torch.from_numpy(rng.integers(0, 9, 90)),
    }
    plan = Plan(k=20, advertiser_cap=3, category_cap=2, exploration_share=0.2, exploration_window=9)
    parts = utility, allowed, groups, torch.arange(3), plan
    best, local = select_exactly(*parts).row_BK, local_slates(*parts, 4)
    assert torch.equal(slates_at(1, best, local, utility), best)
    assert torch.equal(slates_at(0, best, local, utility), local)
    assert not torch.equal(best, local)


def test_variation_is_the_share_that_differs() -> None:
    """Shares 1/2, 1/2 of 1 and 2 against 1/4, 3/4 of 2 and 3: |1/2| + |1/2 - 1/4| + |3/4|, halved."""
    assert variation(np.array([1, 2]), np.array([2, 3, 3, 3])) == 0.75
    assert variation(np.array([1, 2]), np.array([2, 1, 1, 2])) == 0


def test_the_report_counts_what_shifts() -> None:
    """Scores are UTILITY. Even rows are advertiser 0 and bid 1, odd ones advertiser 1 and bid 3.

    Locally rows 0, 2, 7, 5; globally 0, 2, 4, 6, all of advertiser 0.
    """
    rows = ItemRows.build(
        "v", Layout(embedding_dim=1), list(range(8)), UTILITY[0].tolist(),
        advertiser_R=[0, 1] * 4, category_R=[5] * 8, bid_R=[1, 3] * 4,
    )  # fmt: skip
    index = LiveIndex(rows, DotScorer())
    local, best = shifts(index, torch.ones(2, 1), [Request()] * 2, Plan(k=4), 2, dials=(0.0, 1.0))
    assert (local.overlap, local.advertisers, local.largest_advertiser) == (0.5, 2, 0.5)
    assert (local.advertiser_shift, local.category_shift, local.bid, local.utility) == (0.5, 0, 2, 24)
    assert (best.overlap, best.advertisers, best.advertiser_shift, best.bid, best.utility) == (1, 1, 0, 1, 30)
    assert "50.0% of the global slate" in local.line()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        local_slates(UTILITY, ALLOWED, {}, SEED, Plan(k=4), 0)
    with pytest.raises(ConfigError, match=r"from 0 \(local\) to 1 \(global\), got 1\.5"):
        slates_at(1.5, torch.zeros(1, 1), torch.zeros(1, 1), UTILITY)
