"""The scorer's benchmark: its summary by hand, its rival without crossing, its records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.scorer import Budget, LateScorer, entries, read_seeds, show, summary, write_seed
from model.training.scorer import Line


def one_seed(seed: int, **ranks: list[int]) -> dict[str, Any]:
    return {
        "seed": seed, "user_B": np.array([0, 0, 1, 2]), "seen_item_B": np.array([True, True, True, False]),
        "ranks": {arm: np.array(rank) for arm, rank in ranks.items()}, "total": 9, "catalogue": 500,
        "tower": {"train_seconds": 30.0}, "scorers": {"scorer": [{"step": 0}, {"step": 700 + seed}]},
    }  # fmt: skip


FOUND = [
    one_seed(
        0, dot=[1, 101, 200, 300], count=[1, 2, 200, 9], late=[1, 100, 200, 300], crossing=[1, 90, 80, 300],
        scorer=[1, 2, 3, 300],
    ),
    one_seed(
        1, dot=[1, 99, 200, 300], count=[1, 2, 200, 9], late=[1, 2, 200, 300], crossing=[1, 2, 200, 300],
        scorer=[1, 2, 3, 100],
    ),
]  # fmt: skip


def test_recall_and_differences_by_hand() -> None:
    made = summary(FOUND)
    cells = made["all"]["recall@100"]
    assert {arm: cell["value"] for arm, cell in cells.items()} == {
        "dot": 0.375, "count": 0.75, "late": 0.5, "crossing": 0.625, "scorer": 0.875
    }  # fmt: skip
    assert cells["scorer"]["seeds"] == [0.75, 1.0]
    assert cells["scorer"]["spread"] == pytest.approx(0.25 / 2**0.5)
    assert cells["scorer"]["less_dot"]["seeds"] == [0.5, 0.5]
    assert cells["scorer"]["less_late"]["value"] == 0.375
    assert cells["dot"]["less_dot"] == {"value": 0.0, "seeds": [0.0, 0.0], "low": 0.0, "high": 0.0}
    assert cells["scorer"]["less_dot"]["low"] <= 0.5 <= cells["scorer"]["less_dot"]["high"]
    assert made["all"]["recall@20"]["scorer"]["value"] == 0.75
    assert (made["item_unseen"]["events"], made["item_seen"]["users"]) == (1, 2)
    assert made["item_unseen"]["recall@100"]["scorer"]["seeds"] == [0.0, 1.0]
    assert "0.8750" in show("ml-1m", made)
    (entry,) = entries("ml-1m", FOUND, made)
    assert entry["measure"] == "index.scorer.ml1m.recall@100"
    assert (entry["value"], entry["rival_value"]) == (0.875, 0.375)
    assert "by seed +0.5000, +0.5000" in entry["note"]
    assert "their scorers 700 steps or more" in entry["note"]


def test_the_rival_without_crossing_by_hand() -> None:
    """2 (1 * 3 + 2 * 4) + 10 * 0.5 = 27, for a catalogue and for items of each user."""
    module = LateScorer(2, Line(2.0, torch.tensor([0.5]), 0.0))
    user_BE, feature_NF = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 10.0]])
    assert module.logits(user_BE, feature_NF).tolist() == [[[27.0]]]
    assert module.logits(user_BE, feature_NF[None]).tolist() == [[[27.0]]]


def test_an_arm_s_time_by_hand() -> None:
    """60 s at 1 s a ranking: .3 * 60 - 1 = 17, so 10 validations, 11 rankings, 49 s of steps, of which 20 are asked."""
    assert Budget.of(60.0, 1.0, 20.0) == Budget(20.0, 10)
    assert Budget.of(30.0, 1.0, 60.0) == Budget(21.0, 8)
    assert Budget.of(30.0, 4.0, 60.0) == Budget(22.0, 1)
    assert Budget.of(-5.0, 4.0, 60.0) == Budget(2.0, 1), "late already: the least there is"


def test_seeds_with_all_arms_are_read_again(tmp_path: Path) -> None:
    write_seed(tmp_path, FOUND[0] | {"dataset": "ml-1m"})
    half = FOUND[1] | {"dataset": "ml-1m", "ranks": {"dot": FOUND[1]["ranks"]["dot"]}}
    write_seed(tmp_path, half)
    (found,) = read_seeds(tmp_path, "ml-1m")
    assert summary([found]) == summary(FOUND[:1])
    write_seed(tmp_path, FOUND[1] | {"dataset": "ml-1m"})
    assert summary(read_seeds(tmp_path, "ml-1m")) == summary(FOUND)
    assert not read_seeds(tmp_path, "globo-news")
