"""Expected values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from model.errors import ShapeError
from model.metrics import bootstrap_means, event_metrics, ndcg_at, rank_catalogue, ranks_of, recall_at, reciprocal_rank


def test_ranks_count_from_one_and_ties_go_to_the_lower_row():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    assert ranks_of(scores, torch.tensor([3, 0])).tolist() == [3, 1]
    assert ranks_of(scores, torch.tensor([2, 3])).tolist() == [2, 4]


def test_excluded_items_do_not_count_and_an_excluded_target_is_last():
    scores = torch.tensor([[0.9, 0.8, 0.7]] * 2)
    excluded = torch.tensor([[True, False, False], [False, False, True]])
    assert ranks_of(scores, torch.tensor([2, 2]), excluded).tolist() == [2, 4]


def test_a_target_outside_the_catalogue_cannot_be_ranked():
    assert ranks_of(torch.tensor([[0.9, 0.8]] * 2), torch.tensor([2, -1])).tolist() == [3, 3]


def test_ranks_refuse_what_does_not_fit():
    with pytest.raises(ShapeError):
        ranks_of(torch.zeros(2, 3), torch.tensor([0]))


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_catalogue_ranks_with_births_and_seen_items(chunk):
    items = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    users = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([2, 2, 0])
    options = {"chunk": chunk}
    assert rank_catalogue(users, items, target, **options).tolist() == [3, 3, 4]
    born = {"available_from_us_N": torch.tensor([0, 50, 0, 0]), "time_us_B": torch.tensor([10, 50, 10])}
    assert rank_catalogue(users, items, target, **born, **options).tolist() == [2, 3, 3]
    # the first event saw item 0; the third saw items 3 and 0, but 0 is its target and stays
    seen = {"seen_rows": torch.tensor([0, 3, 0, 99]), "seen_offsets": torch.tensor([0, 1, 1, 4])}
    assert rank_catalogue(users, items, target, **seen, **options).tolist() == [2, 3, 3]


def test_metrics_by_hand():
    rank = np.array([1, 3, 21])
    assert recall_at(rank, 20).tolist() == [1, 1, 0]
    assert recall_at(rank, 2).tolist() == [1, 0, 0]
    assert ndcg_at(rank, 20) == pytest.approx([1, 1 / math.log2(4), 0])
    assert reciprocal_rank(rank) == pytest.approx([1, 1 / 3, 1 / 21])
    values = event_metrics(rank, (2, 20))
    assert sorted(values) == ["mrr", "ndcg@2", "ndcg@20", "recall@2", "recall@20"]
    assert values["ndcg@20"].mean() == pytest.approx(0.5)


def test_bootstrap_resamples_users_not_events():
    # one user with 100 events that agree, 99 users with one each: the interval must be far wider than for 199
    # independent events (about +- 0.07)
    user = np.concatenate([np.zeros(100, np.int64), np.arange(1, 100)])
    hit = np.concatenate([np.ones(100), np.zeros(99)])
    found = bootstrap_means({"recall@20": hit}, user, resamples=400, seed=1)["recall@20"]
    assert found.value == pytest.approx(100 / 199)
    assert found.low < 0.05
    assert found.high > 0.65


def test_bootstrap_of_equal_users_has_the_binomial_width():
    rng = np.random.default_rng(0)
    hit = (rng.random(2000) < 0.3).astype(np.float64)
    found = bootstrap_means({"x": hit}, np.arange(2000), resamples=1000)["x"]
    half = 1.96 * math.sqrt(found.value * (1 - found.value) / 2000)
    assert found.low == pytest.approx(found.value - half, abs=0.003)
    assert found.high == pytest.approx(found.value + half, abs=0.003)
    assert found == bootstrap_means({"x": hit}, np.arange(2000), resamples=1000)["x"]


def test_no_events_give_nan():
    found = bootstrap_means({"x": np.zeros(0)}, np.zeros(0, np.int64))["x"]
    assert math.isnan(found.value)
    assert math.isnan(found.low)
