"""Small real releases for tests: an untrained tower with random weights over a made-up catalogue."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.features import Vocabularies
from model.hybrid_tower import HybridTower
from model.release import Manifest, Registry

SMALL = TowerConfig(
    d_model=16, num_layers=2, num_heads=2, history_limit=12, embedding_dim=16, head_hidden=32, hash_rows=32,
    context_dim=16, session_limit=4, subject_limit=2,
)  # fmt: skip
VALUES = {"device": ("phone", "tv", "web"), "surface": ("feed", "search"), "country": ("br", "de", "jp")}


def make_description(*, ids: str = "int64") -> DatasetDescription:
    """Events click (positive) and view (neutral); the encoder reads surface, the head device and country."""
    return DatasetDescription.from_dict(
        {
            "name": "test",
            "user_id_type": ids,
            "item_id_type": ids,
            "event_types": {"click": "positive", "view": "neutral"},
            "event_columns": ["surface"],
            "context_columns": ["device"],
            "user_columns": ["country"],
            "item_columns": {"genres": "categories", "price": "number", "brand": "category"},
        }
    )


def make_items(count: int = 50, *, ids: str = "int64", seed: int = 0) -> pa.Table:
    """A catalogue; int64 items are 10, 11, ..., string items "i10", "i11", ..."""
    random = np.random.default_rng(seed)
    numbers = range(10, 10 + count)
    genres = ["drama", "comedy", "news", "sport"]
    return pa.table(
        {
            "item_id": pa.array(list(numbers)) if ids == "int64" else pa.array([f"i{n}" for n in numbers]),
            "genres": [list(random.choice(genres, random.integers(0, 3), replace=False)) for _ in numbers],
            "price": [None if n % 7 == 0 else float(random.random()) for n in numbers],
            "brand": [None if n % 5 == 0 else f"brand{n % 3}" for n in numbers],
        }
    )


def make_tower(
    *, seed: int = 0, config: TowerConfig = SMALL, description: DatasetDescription | None = None, num_items: int = 50
) -> tuple[HybridTower, pa.Table]:
    """An untrained tower with lively random weights, and its items."""
    description = description or make_description()
    items = make_items(num_items, ids=description.item_id_type)
    vocabularies = Vocabularies(
        event_types=tuple(description.event_type_names),
        columns={name: VALUES[name] for name in (*description.event_columns, *description.head_columns)},
    )
    torch.manual_seed(seed)
    tower = HybridTower.build(config, description, vocabularies, items)
    with torch.no_grad():
        tower.head.cold_state_D.normal_()
        for parameter in tower.head.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return tower.eval(), items


def make_release(
    registry: str | Path, *, seed: int = 0, config: TowerConfig = SMALL, description: DatasetDescription | None = None
) -> Manifest:
    """A release of an untrained tower in the registry; another seed gives other weights, so other versions."""
    tower, items = make_tower(seed=seed, config=config, description=description)
    return Registry(registry).write(tower, items, trained_until_us=1_600_000_000_000_000)
