"""Items to vectors: the embedder the encoder reads, and the tower whose output meets the user embedding.

Legend: N catalogue items, H hash rows, I = N + H item rows, D channels, E embedding width, L values of a list column.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import DataError, ShapeError
from model.features import Featuriser, frequent_values
from model.live_items import LiveItems


@dataclass(frozen=True, slots=True)
class ItemShape:
    """What fixes the shape of an item embedder's weights."""

    num_items: int
    category_sizes: Mapping[str, int]
    """Vocabulary size of each category column, the codes 0 (absent) and 1 (unknown) included."""
    category_widths: Mapping[str, int]
    """Values kept of each category column."""
    numbers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "num_items": self.num_items,
            "category_sizes": dict(self.category_sizes),
            "category_widths": dict(self.category_widths),
            "numbers": list(self.numbers),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict."""
        return cls(
            values["num_items"], values["category_sizes"], values["category_widths"], tuple(values["numbers"])
        )  # fmt: skip


class ItemEmbedder(nn.Module):
    """An item's id (learned, or hashed where the item was never trained on) plus its declared features.

    Item features live in buffers, so a set of weights carries the catalogue it was trained with.
    """

    hash_row_I: torch.Tensor
    id_row_I: torch.Tensor
    number_IF: torch.Tensor

    def __init__(self, config: TowerConfig, shape: ItemShape) -> None:
        super().__init__()
        self.shape = shape
        self.num_rows = shape.num_items + config.hash_rows
        self.item_dropout = config.item_dropout
        width = config.d_model
        self.id_embedding = nn.Embedding(self.num_rows, width)
        nn.init.normal_(self.id_embedding.weight, std=width**-0.5)
        self.category_embeddings = nn.ModuleDict()
        for name, size in shape.category_sizes.items():
            embedding = nn.Embedding(size, width, padding_idx=0)
            nn.init.normal_(embedding.weight, std=width**-0.5)
            with torch.no_grad():
                embedding.weight[0].zero_()
            self.category_embeddings[_safe(name)] = embedding
            codes_IL = torch.zeros(self.num_rows, shape.category_widths[name], dtype=torch.int64)
            self.register_buffer(f"codes_{_safe(name)}", codes_IL)
        self.number_projection = nn.Linear(2 * len(shape.numbers), width) if shape.numbers else None
        self.register_buffer("number_IF", torch.zeros(self.num_rows, 2 * len(shape.numbers)))
        rows = torch.arange(self.num_rows)
        self.register_buffer("hash_row_I", rows.clone())
        self.register_buffer("id_row_I", rows)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """index: i64 [...], in [0, I); index + I is the same item, known by its hash row only, as before training.

        Returns f32 [..., D].
        """
        unknown = index >= self.num_rows
        index = index - self.num_rows * unknown
        row = torch.where(unknown, self.hash_row_I[index], self.id_row_I[index])
        if self.training and self.item_dropout > 0:
            drop = torch.rand(index.shape, device=index.device) < self.item_dropout
            row = torch.where(drop, self.hash_row_I[index], row)
        vector: torch.Tensor = self.id_embedding(row)
        for name in self.shape.category_sizes:
            codes = getattr(self, f"codes_{_safe(name)}")[index]
            count = (codes > 0).sum(-1, keepdim=True).clamp(min=1)
            vector = vector + self.category_embeddings[_safe(name)](codes).sum(-2) / count
        if self.number_projection is not None:
            vector = vector + self.number_projection(self.number_IF[index])
        return vector

    @torch.no_grad()
    def use_hash_rows(self, trained_N: torch.Tensor) -> None:
        """Know every catalogue item that training never saw by its hash row, which dropout has trained.

        trained_N: bool [N], True where the item occurred in training.
        """
        count = self.shape.num_items
        if trained_N.shape != (count,):
            raise ShapeError(f"trained_N must have shape [{count}], got {list(trained_N.shape)}")
        rows = torch.arange(count, device=self.id_row_I.device)
        self.id_row_I[:count] = torch.where(trained_N.to(rows.device), rows, self.hash_row_I[:count])


def _safe(name: str) -> str:
    """A column's name as a module's name: dots are PyTorch's."""
    return name.replace(".", "__")


def build_item_embedder(
    config: TowerConfig, description: DatasetDescription, featuriser: Featuriser, items: pa.Table
) -> ItemEmbedder:
    """An embedder whose buffers hold the catalogue's features.

    items: item_id (the featuriser's rows, in order) and the declared item columns; kinds `category` (one value),
    `categories` (list<string>) and `number` (standardised here; absent = 0, with a flag).
    Raises DataError where the items are not the featuriser's.
    """
    if not items["item_id"].combine_chunks().equals(featuriser.item_ids):
        raise DataError("the items table must hold the featuriser's item ids in their order")
    sizes: dict[str, int] = {}
    codes: dict[str, torch.Tensor] = {}
    numbers: list[str] = []
    number_columns: list[np.ndarray[Any, Any]] = []
    for name, kind in description.item_columns.items():
        column = items[name].combine_chunks()
        if kind == "number":
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            present = np.isfinite(values)
            mean, spread = (values[present].mean(), values[present].std()) if present.any() else (0.0, 1.0)
            number_columns += [np.where(present, (values - mean) / (spread or 1.0), 0.0), present.astype(np.float64)]
            numbers.append(name)
            continue
        if kind == "category":
            present_N = pc.is_valid(column).to_numpy(zero_copy_only=False)
            ends = pa.array(np.concatenate([[0], np.cumsum(present_N)]), pa.int32())
            column = pa.ListArray.from_arrays(ends, column.drop_null().cast(pa.string()))
        codes_NL, sizes[name] = _list_codes(column, config.category_limit)
        codes[name] = torch.zeros(featuriser.num_rows, codes_NL.shape[1], dtype=torch.int64)
        codes[name][: featuriser.num_items] = torch.from_numpy(codes_NL)
    shape = ItemShape(featuriser.num_items, sizes, {name: c.shape[1] for name, c in codes.items()}, tuple(numbers))
    embedder = ItemEmbedder(config, shape)
    for name, codes_IL in codes.items():
        getattr(embedder, f"codes_{_safe(name)}").copy_(codes_IL)
    if numbers:
        embedder.number_IF[: featuriser.num_items] = torch.from_numpy(np.stack(number_columns, 1)).float()
    embedder.hash_row_I[: featuriser.num_items] = torch.from_numpy(featuriser.catalogue_hash_rows())
    return embedder


def _list_codes(column: pa.Array, limit: int) -> tuple[np.ndarray[Any, Any], int]:
    """Codes of a list column, at most `limit` values an item: i64 [N, L], and the vocabulary's size."""
    flat = column.flatten().cast(pa.string())
    parent_R = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    known = pc.is_valid(flat).to_numpy(zero_copy_only=False)
    flat, parent_R = flat.drop_null(), parent_R[known]
    vocabulary = frequent_values(pa.chunked_array([flat]), 50_000)
    code_R = pc.index_in(flat, value_set=pa.array(vocabulary, pa.string())).fill_null(-1).to_numpy() + 2
    position_R = np.arange(len(parent_R)) - np.searchsorted(parent_R, parent_R)
    kept = position_R < limit
    width = int(position_R[kept].max()) + 1 if kept.any() else 1
    codes_NL = np.zeros((len(column), width), np.int64)
    codes_NL[parent_R[kept], position_R[kept]] = code_R[kept]
    return codes_NL, len(vocabulary) + 2


class ItemTower(nn.Module):
    """Item rows to unit vectors in the space where users and items meet."""

    def __init__(self, config: TowerConfig, embedder: ItemEmbedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.temperature = config.temperature
        self.live = LiveItems(config) if config.live_windows_h else None
        self.projection = nn.Linear(config.d_model, config.embedding_dim)
        if config.d_model == config.embedding_dim:
            with torch.no_grad():
                self.projection.weight.zero_().fill_diagonal_(1.0)
                self.projection.bias.zero_()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """index: i64 [...], as ItemEmbedder takes it. Returns f32 [..., E], L2-normalised."""
        return F.normalize(self.projection(self.embedder(index)), dim=-1)

    def table(self, *, with_unknown: bool = False, chunk: int = 65_536) -> torch.Tensor:
        """All rows: f32 [I, E], catalogue first, then the hash rows; with_unknown: [2I, E], then each as unknown."""
        rows = torch.arange(self.embedder.num_rows * (1 + with_unknown), device=self.projection.weight.device)
        return torch.cat([self(part) for part in torch.split(rows, chunk)])

    def is_known(self, index: torch.Tensor) -> torch.Tensor:
        """Whether an item is known by an id of its own: bool, the index's shape. index: as ItemEmbedder takes it."""
        row = index.clamp(max=self.embedder.num_rows - 1)
        return (index < self.embedder.shape.num_items) & (self.embedder.id_row_I[row] == index)
