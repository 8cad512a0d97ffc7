"""Ranking metrics over the whole catalogue: ranks, Recall@K, NDCG@K, MRR and bootstrap intervals.

Legend: B test events, N catalogue items, E embedding width, U users, R resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import ShapeError


def ranks_of(score_BN: torch.Tensor, target_B: torch.Tensor, excluded_BN: torch.Tensor | None = None) -> torch.Tensor:
    """Rank of each target among all items, 1 = best; ties go to the lower row, so ranks are deterministic.

    score_BN: f32|f64 [B, N], higher is better. target_B: i64 [B]; a value outside [0, N) is an item that cannot be
    ranked and gets rank N + 1. excluded_BN: bool [B, N], items that are no candidates; a target that is excluded
    itself gets rank N + 1 as well. Returns i64 [B]. Raises ShapeError.
    """
    size, num_items = score_BN.shape
    if target_B.shape != (size,) or (excluded_BN is not None and excluded_BN.shape != score_BN.shape):
        raise ShapeError(f"scores are [{size}, {num_items}]; targets {tuple(target_B.shape)} or the mask do not fit")
    valid_B = (target_B >= 0) & (target_B < num_items)
    target_B1 = target_B.clamp(0, num_items - 1)[:, None]
    own_B1 = score_BN.gather(1, target_B1)
    if excluded_BN is not None:
        valid_B = valid_B & ~excluded_BN.gather(1, target_B1)[:, 0]
        score_BN = score_BN.masked_fill(excluded_BN, -torch.inf)
    row_N = torch.arange(num_items, device=score_BN.device)
    ahead_BN = (score_BN > own_B1) | ((score_BN == own_B1) & (row_N < target_B1))
    rank_B = ahead_BN.sum(1) + 1
    return torch.where(valid_B, rank_B, num_items + 1)


def rank_catalogue(
    user_BE: torch.Tensor,
    item_NE: torch.Tensor,
    target_B: torch.Tensor,
    *,
    available_from_us_N: torch.Tensor | None = None,
    time_us_B: torch.Tensor | None = None,
    seen_rows: torch.Tensor | None = None,
    seen_offsets: torch.Tensor | None = None,
    chunk: int | None = None,
) -> NDArray[np.int64]:
    """Ranks of the targets by dot product among the whole catalogue, a chunk of test events at a time.

    user_BE, item_NE: f32 on one device. target_B: i64 [B].
    available_from_us_N: i64 [N] microseconds; an item is no candidate for an event before that time (time_us_B, i64).
    seen_rows, seen_offsets: rows each event must not be offered (i64 [S]) and where each event's begin (i64 [B + 1],
    on the CPU). The target itself is always a candidate unless it is not yet available.
    chunk: events at a time; by default as many as make 2**25 scores (2**28 on a GPU).
    Returns i64 [B]; see ranks_of for ties and for targets that cannot be ranked.
    """
    num_items = len(item_NE)
    if chunk is None:
        chunk = max(1, (2**28 if user_BE.is_cuda else 2**25) // max(num_items, 1))
    ranks = np.empty(len(user_BE), np.int64)
    device = item_NE.device
    for start in range(0, len(user_BE), chunk):
        end = min(start + chunk, len(user_BE))
        target = target_B[start:end].to(device)
        score_BN = user_BE[start:end].to(device) @ item_NE.T
        excluded_BN: torch.Tensor | None = None
        if available_from_us_N is not None and time_us_B is not None:
            excluded_BN = available_from_us_N.to(device) > time_us_B[start:end].to(device)[:, None]
        if seen_rows is not None and seen_offsets is not None:
            length = seen_offsets[start + 1 : end + 1] - seen_offsets[start:end]
            row = torch.repeat_interleave(torch.arange(end - start), length).to(device)
            column = seen_rows[int(seen_offsets[start]) : int(seen_offsets[end])].to(device)
            keep = (column < num_items) & (column != target[row])
            score_BN[row[keep], column[keep]] = -torch.inf
        ranks[start:end] = ranks_of(score_BN, target, excluded_BN).cpu().numpy()
    return ranks


def recall_at(rank_B: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """1 where the one relevant item is in the first k, else 0 (hit rate and recall are the same here). f64 [B]."""
    return (rank_B <= k).astype(np.float64)


def ndcg_at(rank_B: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """1 / log2(1 + rank) in the first k, else 0: one relevant item, so the ideal gain is 1. f64 [B].

    Source: Jarvelin and Kekalainen, Cumulated gain-based evaluation, TOIS 2002, with the log2(1 + rank) discount.
    """
    return np.where(rank_B <= k, 1.0 / np.log2(1.0 + rank_B), 0.0)


def reciprocal_rank(rank_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / rank, over the whole catalogue. f64 [B]; its mean is MRR."""
    return 1.0 / rank_B


def event_metrics(rank_B: NDArray[np.int64], ks: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Every metric of every event by name: recall@K and ndcg@K for each K, and mrr."""
    values = {f"recall@{k}": recall_at(rank_B, k) for k in ks}
    values |= {f"ndcg@{k}": ndcg_at(rank_B, k) for k in ks}
    return values | {"mrr": reciprocal_rank(rank_B)}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over test events and its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_means(
    values: Mapping[str, NDArray[np.float64]],
    user_B: NDArray[np.int64],
    *,
    resamples: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Mean of each metric over events, with a percentile interval from resampling whole users.

    values: f64 [B] by name. user_B: i64 [B], the user of each event. A user's events rise and fall together, so
    users, not events, are drawn (Efron and Tibshirani 1993, ch. 13); each gets a Poisson(1) number of copies.
    No events give nan. The same seed gives the same interval.
    """
    names = list(values)
    if not len(user_B):
        return {name: Estimate(np.nan, np.nan, np.nan) for name in names}
    value_BM = np.stack([values[name] for name in names], 1)
    means_RM = resampled_means(value_BM, user_B, resamples=resamples, seed=seed)
    low_M, high_M = np.quantile(means_RM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    mean_M = value_BM.mean(0)
    return {name: Estimate(float(mean_M[m]), float(low_M[m]), float(high_M[m])) for m, name in enumerate(names)}


def resampled_means(
    value_BM: NDArray[np.float64], user_B: NDArray[np.int64], *, resamples: int = 500, seed: int = 0
) -> NDArray[np.float64]:
    """Means over events in each resample of users, for intervals of what is made of several means: f64 [R, M].

    value_BM: f64 [B, M], M measures of each event, B at least 1. user_B: i64 [B]. See bootstrap_means.
    """
    _, user_index_B = np.unique(user_B, return_inverse=True)
    num_users = int(user_index_B.max()) + 1
    columns = [np.bincount(user_index_B, value_BM[:, m], num_users) for m in range(value_BM.shape[1])]
    sum_UM = np.stack([*columns, np.bincount(user_index_B, minlength=num_users).astype(np.float64)], 1)
    return np.concatenate([_resampled(weight_RU, sum_UM) for weight_RU in _weights(num_users, resamples, seed)])


def _weights(num_users: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    block = max(1, 2**22 // num_users)
    for start in range(0, resamples, block):
        weight_RU = rng.poisson(1.0, (min(block, resamples - start), num_users)).astype(np.float64)
        weight_RU[weight_RU.sum(1) == 0] = 1.0  # a resample of nobody: only with a handful of users
        yield weight_RU


def _resampled(weight_RU: NDArray[np.float64], sum_UM: NDArray[np.float64]) -> NDArray[np.float64]:
    total_RM = weight_RU @ sum_UM
    means: NDArray[np.float64] = total_RM[:, :-1] / total_RM[:, -1:]
    return means
