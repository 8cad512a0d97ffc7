"""Rows of the item index: their layout, batches of them, and their Parquet file.

One row an item. Besides the embedding and scalars that the scorer reads, a row holds what the rules read: bitmasks of
categories, countries and languages, the main category and the advertiser (-1: none, never capped), numeric attributes
(NaN: unknown), bid, budget and whether the item may be shown at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.errors import ConfigError, DataError, IndexMismatch, ShapeError

ItemId = int | str
FIELDS = ("category", "country", "language")
"""The bitmasks of a row, in the order of their words."""
WORD_BITS = 64
NONE = -1
"""Main category or advertiser of an item without one."""
_VERSION_KEY = b"embedding_version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Widths of a row. All rows of an index share them."""

    embedding_dim: int
    scalars: int = 0
    attributes: int = 0
    words: tuple[int, int, int] = (1, 1, 1)
    """int64 words of the category, country and language masks."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 1 or self.scalars < 0 or self.attributes < 0:
            raise ConfigError(
                f"wanted embedding_dim of at least 1 and no negative widths, got {self.embedding_dim}, "
                f"{self.scalars} scalars, {self.attributes} attributes"
            )
        if len(self.words) != len(FIELDS) or min(self.words) < 0:
            raise ConfigError(f"words must be three counts of words for {', '.join(FIELDS)}, got {self.words}")

    @property
    def features(self) -> int:
        """F, what the scorer reads of a row: embedding, then scalars."""
        return self.embedding_dim + self.scalars

    @property
    def mask_words(self) -> int:
        """W."""
        return sum(self.words)

    def spans(self) -> list[tuple[int, int]]:
        """First and last-but-one word of each field's mask."""
        return [(sum(self.words[:place]), sum(self.words[: place + 1])) for place in range(len(self.words))]

    def mask(self, bits: Mapping[str, Sequence[int]]) -> list[int]:
        """The W words with these bits set, field by field. Raises DataError for a bit that has no place."""
        words = [0] * self.mask_words
        for name, numbers in bits.items():
            if name not in FIELDS:
                raise DataError(f"bitmasks are of {', '.join(FIELDS)}, got {name!r}")
            place = FIELDS.index(name)
            start, room = sum(self.words[:place]), self.words[place] * WORD_BITS
            for bit in numbers:
                if not 0 <= bit < room:
                    raise DataError(f"{name} must be in [0, {room}), got {bit}")
                words[start + bit // WORD_BITS] |= 1 << bit % WORD_BITS
        return [word - 2**64 if word >= 2**63 else word for word in words]


@dataclass(frozen=True, slots=True)
class ItemRows:
    """A batch of rows, on the CPU; what fills an index and what an upsert brings."""

    embedding_version: str
    layout: Layout
    item_ids: list[Any]
    """int or str [R], each once."""
    feature_RF: torch.Tensor
    """f32: embedding, then scalars."""
    mask_RW: torch.Tensor
    """i64: words of category, country and language."""
    category_R: torch.Tensor
    """i64: main category, -1 for none."""
    advertiser_R: torch.Tensor
    """i64, -1 for none."""
    attribute_RA: torch.Tensor
    """f32, NaN where unknown."""
    bid_R: torch.Tensor
    """f32, at least 0, currency units."""
    budget_R: torch.Tensor
    """f32, at least 0, currency units left."""
    eligible_R: torch.Tensor
    """bool."""

    def __post_init__(self) -> None:
        rows, layout = len(self.item_ids), self.layout
        wanted = {
            "feature_RF": ((rows, layout.features), torch.float32), "mask_RW": ((rows, layout.mask_words), torch.int64),
            "category_R": ((rows,), torch.int64), "advertiser_R": ((rows,), torch.int64),
            "attribute_RA": ((rows, layout.attributes), torch.float32), "bid_R": ((rows,), torch.float32),
            "budget_R": ((rows,), torch.float32), "eligible_R": ((rows,), torch.bool),
        }  # fmt: skip
        for name, (shape, dtype) in wanted.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ShapeError(
                    f"{name} must be {dtype} of shape {list(shape)}, got {value.dtype} of {list(value.shape)}"
                )
        check_ids(self.item_ids)
        check_finite("embedding and scalars", self.item_ids, self.feature_RF.isfinite().all(1))
        check_money("bid", self.item_ids, self.bid_R)
        check_money("budget", self.item_ids, self.budget_R)

    def __len__(self) -> int:
        return len(self.item_ids)

    @classmethod
    def build(
        cls, embedding_version: str, layout: Layout, item_ids: Sequence[ItemId], embedding_RE: Any, *,
        scalar_RS: Any = None, mask_RW: Any = None, category_R: Any = None, advertiser_R: Any = None,
        attribute_RA: Any = None, bid_R: Any = None, budget_R: Any = None, eligible_R: Any = None,
    ) -> Self:  # fmt: skip
        """Rows of arrays or lists; left out means 0, none, unknown, bid 1, budget 0, eligible. Raises ShapeError."""
        rows = len(item_ids)

        def made(value: Any, dtype: torch.dtype, default: torch.Tensor) -> torch.Tensor:
            return default if value is None else torch.as_tensor(value, dtype=dtype).reshape(default.shape)

        try:
            feature_RF = torch.cat(
                [
                    made(embedding_RE, torch.float32, torch.zeros(rows, layout.embedding_dim)),
                    made(scalar_RS, torch.float32, torch.zeros(rows, layout.scalars)),
                ],
                dim=1,
            )
            return cls(
                embedding_version, layout, list(item_ids), feature_RF,
                made(mask_RW, torch.int64, torch.zeros(rows, layout.mask_words, dtype=torch.int64)),
                made(category_R, torch.int64, torch.full((rows,), NONE)),
                made(advertiser_R, torch.int64, torch.full((rows,), NONE)),
                made(attribute_RA, torch.float32, torch.full((rows, layout.attributes), torch.nan)),
                made(bid_R, torch.float32, torch.ones(rows)), made(budget_R, torch.float32, torch.zeros(rows)),
                made(eligible_R, torch.bool, torch.ones(rows, dtype=torch.bool)),
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            raise ShapeError(f"{rows} rows of {layout} cannot be made of these: {error}") from None


@dataclass(frozen=True, slots=True)
class Deltas:
    """New bids, budgets or eligibility of items: values, not differences, so sending a batch twice changes nothing."""

    embedding_version: str
    item_ids: list[Any]
    bid_R: torch.Tensor | None = None
    budget_R: torch.Tensor | None = None
    eligible_R: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given = self.columns()
        for name, value in given.items():
            if tuple(value.shape) != (len(self.item_ids),):
                raise ShapeError(f"{name} must have shape [{len(self.item_ids)}], got {list(value.shape)}")
        check_ids(self.item_ids)
        for name in ("bid", "budget"):
            if name in given:
                check_money(name, self.item_ids, given[name])

    def columns(self) -> dict[str, torch.Tensor]:
        """What is changed, by column."""
        values = {"bid": self.bid_R, "budget": self.budget_R, "eligible": self.eligible_R}
        return {name: value for name, value in values.items() if value is not None}


def check_ids(item_ids: Sequence[ItemId]) -> None:
    """Raises DataError where an id comes twice: which of its rows would count?"""
    if len(set(item_ids)) == len(item_ids):
        return
    seen: set[ItemId] = set()
    twice = next(item for item in item_ids if item in seen or seen.add(item))  # type: ignore[func-returns-value]
    raise DataError(f"an item may come once in a batch, {twice!r} comes twice")


def check_finite(what: str, item_ids: Sequence[ItemId], is_finite_R: torch.Tensor) -> None:
    """Raises DataError that names the first item whose values are not finite."""
    if not bool(is_finite_R.all()):
        raise DataError(f"{what} must be finite, those of item {item_ids[int(is_finite_R.int().argmin())]!r} are not")


def check_money(what: str, item_ids: Sequence[ItemId], value_R: torch.Tensor) -> None:
    """Raises DataError that names the first item whose bid or budget is negative or not finite."""
    is_fine_R = value_R.isfinite() & (value_R >= 0)
    if not bool(is_fine_R.all()):
        first = int(is_fine_R.int().argmin())
        raise DataError(f"{what} must be finite and at least 0, item {item_ids[first]!r} has {float(value_R[first])}")


def check_version(what: str, came: str, wanted: str) -> None:
    """Raises IndexMismatch, naming both, where an update or request is of another embedding_version than the index."""
    if came != wanted:
        raise IndexMismatch(f"{what} is of embedding version {came}, the index of {wanted}")


# Parquet


def row_schema(rows: ItemRows) -> pa.Schema:
    """Columns of the file; its embedding_version is in the schema's metadata."""
    id_type = pa.string() if rows.item_ids and isinstance(rows.item_ids[0], str) else pa.int64()
    floats, longs = pa.list_(pa.float32()), pa.list_(pa.int64())
    return pa.schema(
        [
            ("item_id", id_type), ("embedding", floats), ("scalars", floats),
            *((f"{name}_mask", longs) for name in FIELDS),
            ("category", pa.int64()), ("advertiser", pa.int64()), ("attributes", floats),
            ("bid", pa.float32()), ("budget", pa.float32()), ("eligible", pa.bool_()),
        ],
        metadata={_VERSION_KEY: rows.embedding_version.encode()},
    )  # fmt: skip


def write_rows(rows: ItemRows, path: str | Path | BinaryIO) -> None:
    """Write a batch of rows as one Parquet file (zstd). path: or an open file."""
    layout = rows.layout
    width = layout.embedding_dim
    columns = {
        "item_id": rows.item_ids,
        "embedding": list(rows.feature_RF[:, :width].numpy()), "scalars": list(rows.feature_RF[:, width:].numpy()),
        "category": rows.category_R.numpy(), "advertiser": rows.advertiser_R.numpy(),
        "attributes": list(rows.attribute_RA.numpy()), "bid": rows.bid_R.numpy(), "budget": rows.budget_R.numpy(),
        "eligible": rows.eligible_R.numpy(),
    }  # fmt: skip
    for name, (start, end) in zip(FIELDS, layout.spans(), strict=True):
        columns[f"{name}_mask"] = list(rows.mask_RW[:, start:end].numpy())
    pq.write_table(pa.table(columns, schema=row_schema(rows)), path, compression="zstd")


def read_rows(path: str | Path | BinaryIO) -> ItemRows:
    """The rows of a Parquet file; columns other than item_id and embedding may be absent (see ItemRows.build).

    Raises DataError for a file without an embedding_version, a column that is needed, or lists all of one length.
    """
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    absent = [name for name in ("item_id", "embedding") if name not in table.column_names]
    if _VERSION_KEY not in metadata or absent:
        raise DataError(f"{path} must name its embedding_version and have item_id and embedding; it lacks {absent}")
    lists = {
        name: _matrix(table, name, path)
        for name in ("embedding", "scalars", *(f"{field}_mask" for field in FIELDS), "attributes")
    }
    width = {name: matrix.shape[1] for name, matrix in lists.items()}
    words = [width[f"{field}_mask"] for field in FIELDS]
    layout = Layout(
        embedding_dim=width["embedding"], scalars=width["scalars"], attributes=width["attributes"],
        words=(words[0], words[1], words[2]),
    )  # fmt: skip
    plain = {
        f"{name}_R": _plain(table, name, path)
        for name in ("category", "advertiser", "bid", "budget", "eligible")
        if name in table.column_names
    }
    return ItemRows.build(
        metadata[_VERSION_KEY].decode(), layout, table["item_id"].to_pylist(), lists["embedding"],
        scalar_RS=lists["scalars"], mask_RW=np.concatenate([lists[f"{field}_mask"] for field in FIELDS], axis=1),
        attribute_RA=lists["attributes"], **plain,
    )  # fmt: skip


def _plain(table: pa.Table, name: str, path: str | Path | BinaryIO) -> Any:
    if table[name].null_count:
        raise DataError(f"column {name} of {path} must have a value in every row")
    return table[name].to_numpy(zero_copy_only=False).copy()


def _matrix(table: pa.Table, name: str, path: str | Path | BinaryIO) -> Any:
    """A list column as an array [R, width]; width 0 where the column is absent or no row has a value."""
    rows = table.num_rows
    dtype = np.int64 if name.endswith("_mask") else np.float32
    if name not in table.column_names:
        return np.zeros((rows, 0), dtype)
    column = table[name].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    lengths = set(pa.compute.list_value_length(column).to_pylist())
    if len(lengths) > 1 or None in lengths:
        raise DataError(f"lists of {name} in {path} must all have one length, got {sorted(map(str, lengths))}")
    return values.reshape(rows, -1) if rows else np.zeros((0, 0), dtype)
