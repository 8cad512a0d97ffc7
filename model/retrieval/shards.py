"""What an index cut into shards would have answered, and the dial from there to the global answer.

In a sharded system each shard fills its quota, ceil(k / shards), from its own items and under its own caps; the parts
are merged by utility and cut to k. Business rules tuned to that (a cap of 2 an advertiser that really means 2 a shard)
give other slates under a global walk. `slates_at` goes there in steps: what both slates hold stays; at dial d a share d
of the items that only the global one holds come in, best first, and as large a share of those that only the local one
holds go, worst first. d = 0 is the local slate, d = 1 the global one; in between, caps are kept by neither's count.
`shifts` says what each step changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import ConfigError
from model.retrieval.index import LiveIndex, groups_of
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.select import NOT_ALLOWED, select_exactly, walk_keys

Ints = NDArray[np.int64]


def local_slates(
    utility_BN: torch.Tensor, allowed_BN: torch.Tensor, group_N: dict[str, torch.Tensor], seed_B: torch.Tensor,
    plan: Plan, shards: int,
) -> torch.Tensor:  # fmt: skip
    """row_BK of the merged shards, -1 past the end; row r is in shard r % shards. Inputs as in `select.select`."""
    if shards < 1:
        raise ConfigError(f"shards must be at least 1, got {shards}")
    own_plan = replace(plan, k=-(-plan.k // shards))
    rows = []
    for shard in range(shards):
        groups = {name: value_N[shard::shards] for name, value_N in group_N.items()}
        own = select_exactly(utility_BN[:, shard::shards], allowed_BN[:, shard::shards], groups, seed_B, own_plan)
        rows.append(torch.where(own.row_BK >= 0, own.row_BK * shards + shard, -1))
    return by_utility(torch.cat(rows, dim=1), utility_BN, plan.k)


def slates_at(
    dial: float, global_row_BK: torch.Tensor, local_row_BK: torch.Tensor, utility_BN: torch.Tensor
) -> torch.Tensor:
    """row_BK between the local (dial 0) and the global slate (dial 1), by falling utility, -1 past the end."""
    if not 0 <= dial <= 1:
        raise ConfigError(f"the dial goes from 0 (local) to 1 (global), got {dial}")
    is_both_BKK = global_row_BK[:, :, None] == local_row_BK[:, None, :]
    is_new_BK = ~is_both_BKK.any(2) & (global_row_BK >= 0)
    is_old_BK = ~is_both_BKK.any(1) & (local_row_BK >= 0)
    came_B, gone_B = (_rounded(dial * only_BK.sum(1)) for only_BK in (is_new_BK, is_old_BK))
    comes_BK = is_new_BK & (is_new_BK.cumsum(1) <= came_B[:, None])
    goes_BK = is_old_BK & (is_old_BK.cumsum(1) > (is_old_BK.sum(1) - gone_B)[:, None])
    keeps_BK = (local_row_BK >= 0) & ~goes_BK
    row_BM = torch.where(torch.cat([keeps_BK, comes_BK], 1), torch.cat([local_row_BK, global_row_BK], 1), -1)
    return by_utility(row_BM, utility_BN, global_row_BK.shape[1])


def by_utility(row_BM: torch.Tensor, utility_BN: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` rows in the order of the walk; -1 is no row, there and past the end."""
    utility_BM = utility_BN.gather(1, row_BM.clamp_min(0)) if utility_BN.shape[1] else row_BM.float()
    best = walk_keys(utility_BM, row_BM >= 0, row_BM).topk(min(count, row_BM.shape[1]), dim=1)
    return row_BM.gather(1, best.indices).masked_fill(best.values == NOT_ALLOWED, -1)


def _rounded(share_B: torch.Tensor) -> torch.Tensor:
    return (share_B + 0.5).floor().long()


@dataclass(frozen=True, slots=True)
class Shift:
    """Slates at one place of the dial, means over the requests that have any results."""

    dial: float
    overlap: float
    """Share of the slate that the global slate holds too."""
    advertisers: float
    """Different advertisers of a slate."""
    largest_advertiser: float
    """Share of a slate that its most frequent advertiser has."""
    advertiser_shift: float
    """Share of the slate that would have to change advertiser to be composed like the global one (total variation)."""
    category_shift: float
    """The same of main categories."""
    bid: float
    """Mean bid, currency units."""
    utility: float
    """Sum of utilities."""

    def line(self) -> str:
        """One row of the report."""
        return (
            f"dial {self.dial:.2f}: {self.overlap:.1%} of the global slate, {self.advertisers:.1f} advertisers "
            f"(largest {self.largest_advertiser:.1%}), shift of advertisers {self.advertiser_shift:.1%} and "
            f"categories {self.category_shift:.1%}, mean bid {self.bid:.4g}, utility {self.utility:.5g}"
        )


def shifts(
    index: LiveIndex, user_BE: torch.Tensor, requests: Sequence[Request], plan: Plan, shards: int,
    dials: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[Shift]:  # fmt: skip
    """How the composition of these requests' slates shifts from local to global; all of one revision."""
    with index.pin() as pinned, torch.inference_mode():
        table, graph = pinned.table, index.retrieval
        columns = table.used()
        asked = Requests.build(requests, index.layout, lambda ids: index.rows_of(ids, table.count)).to(table.device)
        utility_BN = graph.utilities(columns, user_BE.to(table.device), asked)
        parts = utility_BN, graph.allowed(columns, asked), groups_of(columns), asked.seed_B, plan
        global_row_BK = select_exactly(*parts).row_BK
        local_row_BK = local_slates(*parts, shards)
        slates = {dial: slates_at(dial, global_row_BK, local_row_BK, utility_BN).cpu().numpy() for dial in dials}
        advertiser_N, category_N = columns.advertiser_N.cpu().numpy(), columns.category_N.cpu().numpy()
        bid_N, utility = columns.bid_N.cpu().numpy(), utility_BN.cpu().numpy()
        wanted = global_row_BK.cpu().numpy()
    found = []
    for dial, row_BK in slates.items():
        figures = [
            _figures(row_K[row_K >= 0], best_K[best_K >= 0], advertiser_N, category_N, bid_N, utility_N)
            for row_K, best_K, utility_N in zip(row_BK, wanted, utility, strict=True)
            if (row_K >= 0).any()
        ]
        means = np.mean(figures, axis=0) if figures else np.zeros(7)
        found.append(Shift(dial, *means.tolist()))
    return found


def _figures(
    row: Ints, best: Ints, advertiser_N: Ints, category_N: Ints, bid_N: NDArray[np.float32],
    utility_N: NDArray[np.float32],
) -> list[float]:  # fmt: skip
    """Shift's figures of one slate, in its order."""
    own = np.unique(advertiser_N[row], return_counts=True)[1]
    return [
        len(np.intersect1d(row, best)) / len(row), float(len(own)), own.max() / len(row),
        variation(advertiser_N[row], advertiser_N[best]), variation(category_N[row], category_N[best]),
        float(bid_N[row].mean()), float(utility_N[row].astype(np.float64).sum()),
    ]  # fmt: skip


def variation(one: Ints, two: Ints) -> float:
    """Total variation distance of two lists' shares of each value: 0 alike, 1 nothing in common. Neither is empty."""
    values = np.unique(np.concatenate([one, two]))
    share_of_one, share_of_two = (
        np.bincount(np.searchsorted(values, part), minlength=len(values)) / len(part) for part in (one, two)
    )
    return float(np.abs(share_of_one - share_of_two).sum() / 2)
