"""Rows of a release's catalogue, from its snapshot of embeddings and the item columns its description names for rules.

A rule's values are numbered in sorted order over the catalogue, so bits and groups differ from one release to the next:
requests name values, and whoever sends rows numbers them by the `RuleNames` of the version they are for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.dataset import DatasetDescription
from model.errors import DataError
from model.item_index import ItemIndex
from model.retrieval.rows import FIELDS, NONE, WORD_BITS, ItemRows, Layout

MAX_VALUES = 4096
"""Most values of a column that becomes a bitmask."""


@dataclass(frozen=True)
class RuleNames:
    """What bits, groups and attributes of an embedding_version's rows stand for."""

    values: Mapping[str, Sequence[str]]
    """By rule (category, country, language; main_category, advertiser): the value of each number. A rule without a
    column has none, and its numbers mean what the sender of rows says."""
    attributes: Sequence[str]
    scalars: int = 0
    """Of a row, where the release's scorer reads any; a server counts them and reads no others."""

    @classmethod
    def of(cls, description: DatasetDescription, catalogue: pa.Table, scalars: int = 0) -> Self:
        """catalogue: item_id and the declared item columns. Raises DataError where a bitmask has too many values."""
        values = {}
        for rule, column in description.item_rules.items():
            if rule == "attributes":
                continue
            flat = catalogue[column].combine_chunks()
            flat = flat.flatten() if description.item_columns[column] == "categories" else flat
            values[rule] = sorted(pc.unique(flat.drop_null().cast(pa.string())).to_pylist())
            if rule in FIELDS and len(values[rule]) > MAX_VALUES:
                raise DataError(
                    f"item_rules.{rule} may have at most {MAX_VALUES} values, column {column} has {len(values[rule])}"
                )
        return cls(values, tuple(description.item_rules.get("attributes", ())), scalars)

    @cached_property
    def number_of(self) -> dict[str, dict[str, int]]:
        """Rule -> value -> number."""
        return {rule: {value: n for n, value in enumerate(values)} for rule, values in self.values.items()}

    def layout(self, embedding_dim: int) -> Layout:
        """Of this version's rows: one word a field at least."""
        words = [max(1, -(-len(self.values.get(name, ())) // WORD_BITS)) for name in FIELDS]
        return Layout(
            embedding_dim=embedding_dim, scalars=self.scalars, attributes=len(self.attributes),
            words=(words[0], words[1], words[2]),
        )  # fmt: skip


NO_NAMES = RuleNames({}, ())


def catalogue_rows(
    snapshot: ItemIndex,
    description: DatasetDescription | None = None,
    catalogue: pa.Table | None = None,
    scalars: int = 0,
) -> tuple[ItemRows, RuleNames]:
    """Rows of a snapshot in its order, and what their numbers stand for; see `rows_of_items`.

    catalogue: item_id and the declared item columns of the same items in the same order; None without rules.
    Raises DataError.
    """
    if description is None or not description.item_rules or catalogue is None:
        catalogue = pa.table({"item_id": snapshot.item_ids})
        names = RuleNames({}, (), scalars)
        return rows_of_items(snapshot.embedding_version, catalogue, snapshot.item_NE, None, names), names
    if not catalogue["item_id"].combine_chunks().equals(snapshot.item_ids):
        raise DataError("the catalogue and the item snapshot must hold the same items in the same order")
    names = RuleNames.of(description, catalogue, scalars)
    return rows_of_items(snapshot.embedding_version, catalogue, snapshot.item_NE, description, names), names


def rows_of_items(
    embedding_version: str, items: pa.Table, embedding_RE: Any, description: DatasetDescription | None, names: RuleNames
) -> ItemRows:
    """Rows of items, by the columns that the description names for rules; a value without a number is left out.

    items: item_id and those columns; besides, where there are such, bid, budget and eligible. What no column tells is
    none, unknown, bid 1, budget 0, eligible. Raises DataError, ShapeError.
    """
    columns = {} if description is None or not description.item_rules else _columns(description, items, names)
    for name in ("bid", "budget", "eligible"):
        if name in items.column_names:
            if items[name].null_count:
                raise DataError(f"column {name} must have a value in every row")
            columns[f"{name}_R"] = torch.from_numpy(items[name].to_numpy(zero_copy_only=False).copy())
    layout = names.layout(len(embedding_RE[0]) if len(embedding_RE) else 1)
    return ItemRows.build(embedding_version, layout, items["item_id"].to_pylist(), embedding_RE, **columns)


def _columns(description: DatasetDescription, catalogue: pa.Table, names: RuleNames) -> dict[str, Any]:
    rules, count = description.item_rules, catalogue.num_rows
    columns: dict[str, Any] = {}
    layout = names.layout(1)
    mask_RW = np.zeros((count, layout.mask_words), np.uint64)
    for name, (start, _) in zip(FIELDS, layout.spans(), strict=True):
        if name not in rules:
            continue
        column = catalogue[rules[name]].combine_chunks()
        parent_V = np.arange(count)
        if description.item_columns[rules[name]] == "categories":
            parent_V = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
            column = column.flatten()
        bit_V = _numbers(column, names.values[name])
        parent_V, bit_V = parent_V[bit_V >= 0], bit_V[bit_V >= 0]
        np.bitwise_or.at(
            mask_RW, (parent_V, start + bit_V // WORD_BITS), np.uint64(1) << (bit_V % WORD_BITS).astype(np.uint64)
        )
    columns["mask_RW"] = torch.from_numpy(mask_RW.view(np.int64))
    for rule, name in (("main_category", "category_R"), ("advertiser", "advertiser_R")):
        if rule in rules:
            numbers = _numbers(catalogue[rules[rule]].combine_chunks(), names.values[rule])
            columns[name] = torch.from_numpy(np.where(numbers < 0, NONE, numbers))
    if names.attributes:
        arrays = [catalogue[name].cast(pa.float64()).to_numpy().astype(np.float32) for name in names.attributes]
        columns["attribute_RA"] = torch.from_numpy(np.stack(arrays, 1))
    return columns


def _numbers(column: pa.Array, values: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of a column's values, -1 where null: i64."""
    found = pc.index_in(column.cast(pa.string()), value_set=pa.array(values, pa.string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]
