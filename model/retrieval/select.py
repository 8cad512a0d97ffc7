"""From utilities to slates: exact greedy selection without a loop over items.

The definition is `reference.walk`: go over the allowed items by falling utility, equal ones by row; take an item unless
its advertiser or category is full; stop at k. Here the walk is done over a pool of the best candidates at once:

- Order. Utility and row are packed into one int64 whose order is that of the walk, so ties are never up to topk.
- One cap. An item is taken where fewer than cap items of its group stand before it: its rank in a stable sort by group.
- Two caps. What is taken depends on what was taken before, of either group: take[i] = f(take[0..i-1]). Starting from
  "all", each round computes f for every item at once. Where two rounds agree on the first n items, those are right: the
  first one by f's definition, each next because all before it are. Every round settles at least one item more.
- Exactness is told, not hoped for: `is_exact_B` says whether the settled part of the pool held enough items, or the
  pool held every allowed item. `select_exactly` widens pool and rounds where it did not.
"""

from typing import NamedTuple

import torch

from model.retrieval.rules import Plan

LEAST_POOL = 1024
POOL_PER_RESULT = 4
"""Candidates looked at first, for each item the walk has to find, where there are caps."""
ROUNDS = 3
"""Rounds of settling two caps at first."""
NOT_ALLOWED = torch.iinfo(torch.int64).min
"""Key of an item that may not be shown; below the key of any utility."""
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, of splitmix64, as int64
_MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Found(NamedTuple):
    """Slates of a batch, best first; places past `length_B` hold row -1 and utility -inf."""

    row_BK: torch.Tensor
    utility_BK: torch.Tensor
    length_B: torch.Tensor
    is_exact_B: torch.Tensor


def walk_keys(utility_BN: torch.Tensor, allowed_BN: torch.Tensor, row_BN: torch.Tensor) -> torch.Tensor:
    """i64 [B, N], larger first in the walk: utility's order above, lower rows first below it.

    utility_BN: f32. row_BN: i64, or [N]. A utility that is not finite is not allowed. -0.0 ties with 0.0.
    """
    bits_BN = (utility_BN + 0.0).view(torch.int32)
    ordered_BN = torch.where(bits_BN < 0, bits_BN ^ 0x7FFFFFFF, bits_BN)
    # (ordered << 32) | (0xFFFFFFFF - row), with no constant that compilers take for an int32.
    key_BN = ((ordered_BN.long() + 1) << 32) - 1 - row_BN
    return torch.where(allowed_BN & utility_BN.isfinite(), key_BN, NOT_ALLOWED)


def select(
    utility_BN: torch.Tensor, allowed_BN: torch.Tensor, group_N: dict[str, torch.Tensor], seed_B: torch.Tensor,
    plan: Plan, *, pool: int, rounds: int,
) -> Found:  # fmt: skip
    """The slates of a batch.

    utility_BN: f32. allowed_BN: bool. group_N: i64 by the plan's caps, -1 for none. seed_B: i64.
    pool: candidates looked at, at most N. rounds: of settling two caps.
    """
    row_N = torch.arange(utility_BN.shape[1], device=utility_BN.device)
    top = walk_keys(utility_BN, allowed_BN, row_N).topk(pool, dim=1)
    row_BP, is_allowed_BP = top.indices, top.values != NOT_ALLOWED
    groups = [(group_N[name][row_BP], cap) for name, cap in plan.caps.items()]
    take_BP, is_settled_BP = within_caps(is_allowed_BP, groups, rounds)
    has_all_B = (
        ~is_allowed_BP[:, -1] if pool < utility_BN.shape[1] else torch.ones_like(seed_B, dtype=torch.bool)
    )  # fmt: skip
    is_exact_B = ((take_BP & is_settled_BP).sum(1) >= plan.walked) | (has_all_B & is_settled_BP.all(1))
    place_BQ, is_taken_BQ = first_places(take_BP, plan.walked)
    row_BQ = row_BP.gather(1, place_BQ)
    if plan.explored:
        is_taken_BQ = drawn(row_BQ, is_taken_BQ, seed_B, plan)
        place_BK, is_taken_BK = first_places(is_taken_BQ, plan.k)
        row_BK = row_BQ.gather(1, place_BK)
    else:
        row_BK, is_taken_BK = row_BQ, is_taken_BQ
    utility_BK = utility_BN.gather(1, row_BK).masked_fill(~is_taken_BK, -torch.inf)
    return Found(row_BK.masked_fill(~is_taken_BK, -1), utility_BK, is_taken_BK.sum(1), is_exact_B)


def select_exactly(
    utility_BN: torch.Tensor,
    allowed_BN: torch.Tensor,
    group_N: dict[str, torch.Tensor],
    seed_B: torch.Tensor,
    plan: Plan,
) -> Found:
    """`select` with pool and rounds growing until every request of the batch is answered exactly."""
    rows = utility_BN.shape[1]
    if not rows:
        row_BK = torch.full((len(seed_B), plan.k), -1, device=seed_B.device)
        none_B = torch.zeros_like(seed_B)
        return Found(row_BK, torch.full_like(row_BK, -torch.inf, dtype=torch.float32), none_B, none_B == 0)
    pool, rounds = first_pool(plan, rows), ROUNDS
    while True:
        found = select(utility_BN, allowed_BN, group_N, seed_B, plan, pool=pool, rounds=rounds)
        if bool(found.is_exact_B.all()):
            return found
        pool, rounds = min(rows, pool * 4), rounds * 4


def first_pool(plan: Plan, rows: int) -> int:
    """Candidates to look at first: what the walk needs, and room for what the caps skip."""
    return min(rows, max(LEAST_POOL, plan.walked * POOL_PER_RESULT) if plan.caps else plan.walked)


def within_caps(
    is_allowed_BP: torch.Tensor, groups: list[tuple[torch.Tensor, int]], rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """take_BP, what the walk takes of the pool, and is_settled_BP, up to where that is certain.

    groups: (i64 [B, P], cap) of each cap.
    """
    settled_BP = torch.ones_like(is_allowed_BP)
    counters = [(GroupCounter(group_BP), group_BP < 0, cap) for group_BP, cap in groups]
    take_BP = is_allowed_BP
    if len(counters) > 1:
        for _ in range(rounds):
            take_BP = _round(take_BP, is_allowed_BP, counters)
        before_BP = take_BP
    if counters:
        take_BP = _round(take_BP, is_allowed_BP, counters)
    if len(counters) > 1:
        settled_BP = (take_BP == before_BP).int().cumprod(1).bool()
    return take_BP, settled_BP


def _round(
    take_BP: torch.Tensor, is_allowed_BP: torch.Tensor, counters: list[tuple["GroupCounter", torch.Tensor, int]]
) -> torch.Tensor:
    fits_BP = is_allowed_BP
    for counter, is_free_BP, cap in counters:
        fits_BP = fits_BP & ((counter.before(take_BP) < cap) | is_free_BP)
    return fits_BP


class GroupCounter:
    """Counts, for each item, the taken items of its group that stand before it."""

    def __init__(self, group_BP: torch.Tensor) -> None:
        """group_BP: i64, in the order of the walk."""
        by_group = group_BP.sort(dim=1, stable=True)
        self._order_BP = by_group.indices
        place_BP = torch.arange(group_BP.shape[1], device=group_BP.device).expand_as(group_BP)
        is_first_BP = torch.ones_like(group_BP, dtype=torch.bool)
        is_first_BP[:, 1:] = by_group.values[:, 1:] != by_group.values[:, :-1]
        self._start_BP = torch.where(is_first_BP, place_BP, 0).cummax(1).values

    def before(self, take_BP: torch.Tensor) -> torch.Tensor:
        """i64 [B, P]."""
        sorted_BP = take_BP.gather(1, self._order_BP).long()
        before_BP = sorted_BP.cumsum(1) - sorted_BP
        in_group_BP = before_BP - before_BP.gather(1, self._start_BP)
        return torch.empty_like(in_group_BP).scatter_(1, self._order_BP, in_group_BP)


def first_places(take_BP: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the first `count` taken items, in order: i64 [B, count], and whether there are so many, bool."""
    number_BP = take_BP.cumsum(1) - 1
    slot_BP = torch.where(take_BP & (number_BP < count), number_BP, count)  # the slot past the end takes the others
    place_BP = torch.arange(take_BP.shape[1], device=take_BP.device).expand_as(slot_BP)
    place_BC = torch.zeros(len(take_BP), count + 1, dtype=torch.int64, device=take_BP.device)
    place_BC = place_BC.scatter_(1, slot_BP, place_BP)[:, :count]
    there_BC = torch.arange(count, device=take_BP.device) < take_BP.sum(1, keepdim=True)
    return place_BC * there_BC, there_BC


def drawn(row_BQ: torch.Tensor, is_taken_BQ: torch.Tensor, seed_B: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Of the items walked, those that the slate shows: the first ones, and a draw among the next.

    The draw takes the candidates of the smallest draw keys; they stay in the order of the walk.
    """
    firm = plan.k - plan.explored
    key_BM = draw_keys(row_BQ[:, firm:], seed_B)
    key_BM = key_BM.masked_fill(~is_taken_BQ[:, firm:], torch.iinfo(torch.int64).max)
    order_BM = key_BM.argsort(dim=1, stable=True)
    rank_BM = torch.empty_like(order_BM)
    rank_BM.scatter_(1, order_BM, torch.arange(key_BM.shape[1], device=key_BM.device).expand_as(order_BM))
    is_drawn_BM = (rank_BM < plan.explored) & is_taken_BQ[:, firm:]
    return torch.cat([is_taken_BQ[:, :firm], is_drawn_BM], dim=1)


def draw_keys(row_BM: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """Pseudo-random i64 in [0, 2**63), of row and seed alone: splitmix64 of seed's mix plus row."""
    return (_splitmix(_splitmix(seed_B)[:, None] + row_BM) >> 1) & 0x7FFFFFFFFFFFFFFF


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
