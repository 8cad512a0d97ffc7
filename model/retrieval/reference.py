"""What retrieval means: one request at a time, one item at a time, in NumPy and float64.

Slow on purpose. The graph must give the same rows in the same order; tests and benchmarks hold it to that.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from model.retrieval.rows import FIELDS, ItemRows
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import InteractionScorer

Floats = NDArray[np.float64]


def dot_scores(rows: ItemRows, user_E: Floats) -> Floats:
    """f64 [1, N]: one task, the dot product."""
    return (_numpy(rows.feature_RF)[:, : len(user_E)] @ user_E)[None]


def interaction_scores(rows: ItemRows, user_E: Floats, scorer: InteractionScorer) -> Floats:
    """f64 [T, N]: the MLP over [user, item, user * item, scalars] as written, item after item, and the dot product."""
    weight_IH, bias_H = _numpy(scorer.weight_IH), _numpy(scorer.bias_H)
    second_GH, second_G = _numpy(scorer.second.weight), _numpy(scorer.second.bias)
    out_TG, out_T = _numpy(scorer.out.weight), _numpy(scorer.out.bias)
    dot_T = np.zeros(len(out_T)) if scorer.dot_T is None else _numpy(scorer.dot_T)
    scores = []
    for feature_F in _numpy(rows.feature_RF):
        item_E, scalar_S = feature_F[: len(user_E)], feature_F[len(user_E) :]
        first_H = np.maximum(np.concatenate([user_E, item_E, user_E * item_E, scalar_S]) @ weight_IH + bias_H, 0)
        second = np.maximum(second_GH @ first_H + second_G, 0)
        scores.append(1 / (1 + np.exp(-(out_TG @ second + out_T + dot_T * (user_E @ item_E)))))
    return np.array(scores, np.float64).reshape(len(rows), len(out_T)).T


def utilities(rows: ItemRows, score_TN: Floats, request: Request) -> Floats:
    """f64 [N]: the weighted sum of an item's task scores, times bid ** bid_power."""
    bid_R = _numpy(rows.bid_R)
    return np.array(
        [
            sum(weight * score for weight, score in zip(request.task_weights, score_TN[:, n], strict=True))
            * bid_R[n] ** request.bid_power
            for n in range(len(rows))
        ],
        np.float64,
    )


def is_allowed(rows: ItemRows, n: int, request: Request) -> bool:
    """Whether the request may be shown row n."""
    if not bool(rows.eligible_R[n]) or float(rows.budget_R[n]) < request.min_budget:
        return False
    if rows.item_ids[n] in set(request.seen) | set(request.blocked):
        return False
    for name, (start, end) in zip(FIELDS, rows.layout.spans(), strict=True):
        has = _bits(rows.mask_RW[n, start:end])
        wanted, unwanted = set(request.required.get(name, ())), set(request.forbidden.get(name, ()))
        if (wanted and not has & wanted) or has & unwanted:
            return False
    for attribute, (least, most) in request.ranges.items():
        value = float(rows.attribute_RA[n, attribute])
        is_open = (least, most) == (-np.inf, np.inf)
        if not is_open and not least <= value <= most:  # also where the value is NaN
            return False
    return True


def walk(rows: ItemRows, utility_N: Floats, allowed: list[bool], plan: Plan) -> list[int]:
    """Rows taken by the greedy walk, at most plan.walked: by falling utility, equal ones by row, none above its cap."""
    taken: list[int] = []
    of_advertiser: dict[int, int] = {}
    of_category: dict[int, int] = {}
    for n in sorted(range(len(rows)), key=lambda n: (-utility_N[n] if np.isfinite(utility_N[n]) else np.inf, n)):
        advertiser, category = int(rows.advertiser_R[n]), int(rows.category_R[n])
        if not allowed[n] or not np.isfinite(utility_N[n]):
            continue
        if is_full(advertiser, of_advertiser, plan.advertiser_cap) or is_full(category, of_category, plan.category_cap):
            continue
        of_advertiser[advertiser] = of_advertiser.get(advertiser, 0) + 1
        of_category[category] = of_category.get(category, 0) + 1
        taken.append(n)
        if len(taken) == plan.walked:
            break
    return taken


def is_full(group: int, taken: dict[int, int], cap: int | None) -> bool:
    """Whether no more of a group may be taken; -1 is no group."""
    return cap is not None and group >= 0 and taken.get(group, 0) >= cap


def slate(rows: ItemRows, utility_N: Floats, allowed: list[bool], plan: Plan, seed: int) -> list[int]:
    """The request's rows, best first: the walk's first ones and, in the walk's order, those drawn among the next."""
    taken = walk(rows, utility_N, allowed, plan)
    firm = plan.k - plan.explored
    candidates = taken[firm:]
    drawn = set(sorted(candidates, key=lambda n: draw_key(n, seed))[: plan.explored])
    return taken[:firm] + [n for n in candidates if n in drawn]


def search(rows: ItemRows, score_TN: Floats, request: Request, plan: Plan) -> list[int]:
    """The whole of it, from the scores."""
    allowed = [is_allowed(rows, n, request) for n in range(len(rows))]
    return slate(rows, utilities(rows, score_TN, request), allowed, plan, request.seed)


def draw_key(row: int, seed: int) -> int:
    """splitmix64 of (splitmix64 of the seed) plus the row, without its lowest bit."""
    return _splitmix((_splitmix(seed % 2**64) + row) % 2**64) >> 1


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _bits(words: torch.Tensor) -> set[int]:
    return {
        64 * place + bit for place, word in enumerate(words.tolist()) for bit in range(64) if (word % 2**64) >> bit & 1
    }


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.detach().cpu().double().numpy()
