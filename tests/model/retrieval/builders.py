"""Item rows and requests whose numbers are exact in float32, so that ties are ties in every arithmetic."""

import numpy as np

from model.retrieval.rows import FIELDS, ItemRows, Layout
from model.retrieval.rules import Plan, Request

VERSION = "a" * 16
LAYOUT = Layout(embedding_dim=4, scalars=2, attributes=2, words=(2, 1, 1))


def make_rows(rng: np.random.Generator, count: int, *, version: str = VERSION, first_id: int = 1000) -> ItemRows:
    """Rows of few different values: embeddings in quarters, bids powers of four, half of the bitmask words empty."""
    rows = (count, LAYOUT.mask_words)
    return ItemRows.build(
        version, LAYOUT, list(range(first_id, first_id + count)), rng.integers(-2, 3, (count, 4)) / 4,
        scalar_RS=rng.integers(-1, 2, (count, 2)) / 2,
        mask_RW=rng.choice([0, 1, 2, 3, -(2**63), 5], rows),
        category_R=rng.integers(-1, 4, count), advertiser_R=rng.integers(-1, 8, count),
        attribute_RA=rng.choice([0, 1, 2, np.nan], (count, 2)), bid_R=rng.choice([0.25, 1, 4, 16], count),
        budget_R=rng.integers(0, 4, count), eligible_R=rng.random(count) < 0.9,
    )  # fmt: skip


def make_request(rng: np.random.Generator, rows: ItemRows, tasks: int = 1) -> Request:
    """A request with some wishes of every kind."""

    def bits(chance: float) -> dict[str, list[int]]:
        return {
            name: rng.choice([0, 1, 2, 63], rng.integers(1, 3)).tolist() for name in FIELDS if rng.random() < chance
        }

    some = rng.choice(rows.item_ids, rng.integers(0, max(len(rows) // 4, 1) + 1)).tolist() if len(rows) else []
    return Request(
        task_weights=(rng.integers(-1, 3, tasks) / 2).tolist(), bid_power=float(rng.choice([0, 0.5, 1])),
        required=bits(0.2), forbidden=bits(0.2),
        ranges={0: (0.0, float(rng.integers(0, 3)))} if rng.random() < 0.3 else {},
        min_budget=float(rng.integers(0, 2)), seen=some[::2], blocked=[*some[1::2], -5],
        seed=int(rng.integers(-(2**63), 2**63)),
    )  # fmt: skip


def make_plan(rng: np.random.Generator, most: int) -> Plan:
    """A plan with caps and exploration, or without."""
    share = float(rng.choice([0, 0, 0.1, 0.5, 1]))
    k = int(rng.integers(1, most + 1))
    return Plan(
        k=k, advertiser_cap=int(rng.integers(1, 6)) if rng.random() < 0.7 else None,
        category_cap=int(rng.integers(1, 12)) if rng.random() < 0.5 else None,
        exploration_share=share, exploration_window=k + int(rng.integers(0, 10)),
    )  # fmt: skip
