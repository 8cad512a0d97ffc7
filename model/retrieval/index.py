"""The item index as a module: the catalogue as buffers, live updates, and snapshots that no request sees half of.

    ItemTable   buffers with a capacity: rows [0, count) are in use, the rest is room to grow
    Retrieval   the graph: scorer, utility, filters, caps, exploration, top-k
    LiveIndex   two tables of one embedding_version, one being read while the other is written
    IndexHolder the index that answers; whole indices swap by one assignment

Isolation. A request pins the table that is being read and keeps it to its end. An update is written into the other
table, which no request reads, first brought up to date by copying the rows that only the last update changed; then one
assignment makes it the table that new requests read. An update costs time in proportion to its rows, not to the
catalogue, and memory twice the catalogue's; addresses stay fixed, as CUDA graphs need.

A row belongs to one item for the life of an index: an item deleted and brought again takes its old row, and rows go up
in the order in which items came. Rebuild the index and swap it in to drop the rows of items that are gone.
"""

import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.errors import IndexBusy, ShapeError
from model.kernels.interaction_score import ItemFeatures
from model.retrieval.rounding import LARGEST_CODE, coded, feedback, sensitivity
from model.retrieval.rows import NONE, Deltas, ItemId, ItemRows, Layout, check_ids, check_version
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.select import Found, select, select_exactly
from model.retrieval.streams import lent

if TYPE_CHECKING:
    from model.retrieval.fused import FusedSearches

GROWTH = 1.5
WAIT_S = 5.0
"""Longest an update waits for requests that still read the table it is to be written into."""
_CODED, _CODED_FROM = ("code", "scalar", "scale"), "feature"
MOST_STAGED_BYTES = 2**25
"""Of an update that goes to the device as one block of page-locked memory, which PyTorch keeps; a larger one goes
column by column from where it lies."""
ALIGNMENT = 16


class ItemTable(nn.Module):
    """The catalogue as buffers, one row an item.

    Embeddings and scalars are the float columns of `feature_NF`; or embeddings are int8 or float8 (`code_NE`), to be
    multiplied by their row's scale, and scalars bfloat16 beside them.
    """

    mask_NW: torch.Tensor
    category_N: torch.Tensor
    advertiser_N: torch.Tensor
    attribute_NA: torch.Tensor
    bid_N: torch.Tensor
    budget_N: torch.Tensor
    eligible_N: torch.Tensor
    is_there_N: torch.Tensor
    """Not deleted. For updates; requests read eligibility, which a deletion takes too."""

    def __init__(
        self, layout: Layout, capacity: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> None:
        """capacity: rows there is room for.

        dtype: of embeddings and scalars, float32, bfloat16 or float64; or of embeddings, int8 or float8_e4m3fn.
        Raises ShapeError for another one.
        """
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16, torch.float64, *LARGEST_CODE):
            raise ShapeError(f"rows must be float32, bfloat16, float64, int8 or float8_e4m3fn, got {dtype}")
        self.layout = layout
        self.dtype = dtype
        self.feedback_EE: torch.Tensor | None = None
        """How int8 and float8 rows are rounded, see `rounding.coded`."""
        self.count = 0
        """High-water mark: rows ever used, deleted ones included."""

        def room(name: str, width: int | None, fill: float | bool, kind: torch.dtype) -> None:
            shape = (capacity,) if width is None else (capacity, width)
            self.register_buffer(name, torch.full(shape, fill, dtype=kind, device=device))

        if dtype in LARGEST_CODE:
            room("code_NE", layout.embedding_dim, 0, torch.int8)  # float8 as its bits: few operations take it
            room("scalar_NS", layout.scalars, 0, torch.bfloat16)
            room("scale_N", None, 1, torch.float32)
        else:
            room("feature_NF", layout.features, 0, dtype)
        room("mask_NW", layout.mask_words, 0, torch.int64)
        room("category_N", None, NONE, torch.int64)
        room("advertiser_N", None, NONE, torch.int64)
        room("attribute_NA", layout.attributes, torch.nan, torch.float32)
        room("bid_N", None, 0, torch.float32)
        room("budget_N", None, 0, torch.float32)
        room("eligible_N", None, False, torch.bool)
        room("is_there_N", None, False, torch.bool)

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return len(self.bid_N)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.bid_N.device

    def items(self) -> ItemFeatures:
        """What kernels read of all rows, in place."""
        if self.dtype in LARGEST_CODE:
            codes = self.get_buffer("code_NE").view(self.dtype)
            return ItemFeatures(codes, self.get_buffer("scalar_NS"), self.get_buffer("scale_N"))
        feature_NF, width = self.get_buffer("feature_NF"), self.layout.embedding_dim
        return ItemFeatures(feature_NF[:, :width], feature_NF[:, width:])

    def features(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, F], what scorers read: as they lie in memory, or of int8 and float8 rows in float32."""
        if self.dtype not in LARGEST_CODE:
            return self.get_buffer("feature_NF")[rows]
        code_RE = self.get_buffer("code_NE")[rows].view(self.dtype).float()
        scaled_RE = code_RE * self.get_buffer("scale_N")[rows][:, None]
        return torch.cat([scaled_RE, self.get_buffer("scalar_NS")[rows].float()], dim=1)

    def used(self) -> "Columns":
        """What the graph reads, up to the high-water mark."""
        used = slice(self.count)
        names = (column.name for column in fields(Columns) if column.name != "feature_NF")
        return Columns(self.features(used), **{name: self.get_buffer(name)[used] for name in names})

    def are_there(self, rows: list[int]) -> list[bool]:
        """Which of the rows hold an item, and not a deleted one."""
        found: list[bool] = self.is_there_N[torch.tensor(rows, dtype=torch.int64, device=self.device)].tolist()
        return found

    def write(self, row_R: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
        """Write rows of some columns, named without their axes; all on the table's device. row_R: i64, each once."""
        if self.dtype in LARGEST_CODE and "feature" in columns:
            columns = columns | self._coded(columns["feature"].float())
        for name, buffer in self.named_buffers():
            value = columns.get(name.rpartition("_")[0])
            if value is not None:
                buffer.index_copy_(0, row_R, value.to(buffer.dtype))

    def _coded(self, feature_RF: torch.Tensor) -> dict[str, torch.Tensor]:
        width = self.layout.embedding_dim
        code_RE, scale_R = coded(feature_RF[:, :width], self.dtype, self.feedback_EE)
        return {"code": code_RE.view(torch.int8), "scalar": feature_RF[:, width:], "scale": scale_R}

    def copy_rows(self, source: "ItemTable", row_R: torch.Tensor, columns: Set[str]) -> None:
        """Take over rows of some columns, named as for `write`, from a table of the same layout and dtype.

        row_R: i64, on the tables' device.
        """
        for name, buffer in self.named_buffers():
            column = name.rpartition("_")[0]
            if (_CODED_FROM if column in _CODED else column) not in columns:
                continue
            buffer.index_copy_(0, row_R, source.get_buffer(name)[row_R])

    def grown(self, capacity: int) -> "ItemTable":
        """A table of more room with the same rows."""
        table = ItemTable(self.layout, capacity, dtype=self.dtype, device=self.device)
        table.feedback_EE = self.feedback_EE
        for name, buffer in self.named_buffers():
            table.get_buffer(name)[: self.capacity].copy_(buffer)
        table.count = self.count
        return table


def packed(values: dict[str, torch.Tensor], is_pinned: bool) -> torch.Tensor:
    """The tensors, on the CPU, side by side: u8, in page-locked memory or not."""
    size = sum(_aligned(value.nbytes) for value in values.values())
    block = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
    for name, part in unpacked(block, values).items():
        part.copy_(values[name])
    return block


def unpacked(block: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of what `packed` made of such tensors, wherever the block is."""
    parts, start = {}, 0
    for name, value in values.items():
        parts[name] = block[start : start + value.nbytes].view(value.dtype).view(value.shape)
        start += _aligned(value.nbytes)
    return parts


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def sent(values: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of the CPU on a device, by one copy where they are few; ready on the current stream."""
    if device.type == "cpu":
        return values
    if sum(value.nbytes for value in values.values()) > MOST_STAGED_BYTES:
        return {name: value.to(device) for name, value in values.items()}
    return unpacked(packed(values, is_pinned=True).to(device, non_blocking=True), values)


@dataclass(frozen=True, slots=True)
class Columns:
    """The rows in use, as the graph reads them."""

    feature_NF: torch.Tensor
    mask_NW: torch.Tensor
    category_N: torch.Tensor
    advertiser_N: torch.Tensor
    attribute_NA: torch.Tensor
    bid_N: torch.Tensor
    budget_N: torch.Tensor
    eligible_N: torch.Tensor


class Retrieval(nn.Module):
    """The graph from users to slates. Only rows and utilities leave it."""

    def __init__(self, layout: Layout, scorer: nn.Module) -> None:
        """scorer: float users [B, E] and features [N, F] to f32 [B, T, N] (`scorer.Scorer`)."""
        super().__init__()
        self.layout = layout
        self.scorer = scorer

    def forward(
        self, columns: Columns, user_BE: torch.Tensor, requests: Requests, plan: Plan, pool: int, rounds: int
    ) -> Found:
        """One pass of fixed shape, exact where `is_exact_B`: see `select.select`.

        user_BE: float [B, E], on the device of the columns.
        """
        utility_BN = self.utilities(columns, user_BE, requests)
        allowed_BN = self.allowed(columns, requests)
        return select(utility_BN, allowed_BN, groups_of(columns), requests.seed_B, plan, pool=pool, rounds=rounds)

    def utilities(
        self, columns: Columns, user_BE: torch.Tensor, requests: Requests, bonus_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """f32 [B, N]: sum over tasks of weight * score, times bid ** bid_power. bonus_BN: f32, added to each score."""
        score_BTN = self.scorer(user_BE, columns.feature_NF)
        if bonus_BN is not None:
            score_BTN = score_BTN + bonus_BN[:, None]
        if score_BTN.shape[1] != requests.weight_BT.shape[1]:
            raise ShapeError(
                f"the scorer has {score_BTN.shape[1]} tasks, the requests weigh {requests.weight_BT.shape[1]}"
            )
        # A power in float64, rounded to float32, is the same on every device.
        factor_BN = columns.bid_N.double() ** requests.bid_power_B[:, None]
        utility_BN: torch.Tensor = (score_BTN * requests.weight_BT[:, :, None]).sum(1).float() * factor_BN.float()
        return utility_BN

    def allowed(self, columns: Columns, requests: Requests) -> torch.Tensor:
        """bool [B, N]: what each request may be shown."""
        allowed_BN = columns.eligible_N & (columns.budget_N >= requests.min_budget_B[:, None])
        for start, end in self.layout.spans():
            asks_B = torch.zeros(len(requests), dtype=torch.bool, device=allowed_BN.device)
            has_BN = torch.zeros_like(allowed_BN)
            for word in range(start, end):
                required_B, forbidden_B = requests.required_BW[:, word, None], requests.forbidden_BW[:, word, None]
                mask_N = columns.mask_NW[:, word]
                asks_B = asks_B | (required_B[:, 0] != 0)
                has_BN = has_BN | ((mask_N & required_B) != 0)
                allowed_BN = allowed_BN & ((mask_N & forbidden_B) == 0)
            allowed_BN = allowed_BN & (has_BN | ~asks_B[:, None])
        for attribute in range(self.layout.attributes):
            value_N = columns.attribute_NA[:, attribute]
            lower_B, upper_B = requests.lower_BA[:, attribute, None], requests.upper_BA[:, attribute, None]
            is_open_B = lower_B.isneginf() & upper_B.isposinf()
            allowed_BN = allowed_BN & (((value_N >= lower_B) & (value_N <= upper_B)) | is_open_B)
        place_X = requests.excluded_of_X * allowed_BN.shape[1] + requests.excluded_X
        return allowed_BN.flatten().index_fill(0, place_X, False).view_as(allowed_BN)

    def search(
        self, columns: Columns, user_BE: torch.Tensor, requests: Requests, plan: Plan,
        bonus_BN: torch.Tensor | None = None,
    ) -> Found:  # fmt: skip
        """The exact slates, whatever pool it takes; scores are computed once. See `select.select_exactly`."""
        utility_BN = self.utilities(columns, user_BE, requests, bonus_BN)
        allowed_BN = self.allowed(columns, requests)
        return select_exactly(utility_BN, allowed_BN, groups_of(columns), requests.seed_B, plan)


def groups_of(columns: Columns) -> dict[str, torch.Tensor]:
    """What caps count, by the plan's names."""
    return {"advertiser": columns.advertiser_N, "category": columns.category_N}


@dataclass(frozen=True, slots=True)
class Slates:
    """The answer to a batch, on the CPU, and what it was made of."""

    item_ids: list[list[Any]]
    """Best first, at most k each."""
    row_BK: NDArray[np.int64]
    """-1 past the end of a slate."""
    utility_BK: NDArray[np.float32]
    """-inf past the end of a slate."""
    embedding_version: str
    revision: int
    """Updates the index had seen."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an update."""

    changed: int
    """Rows written."""
    unknown: int
    """Items that the index does not hold; their part of the update was left out."""
    revision: int


@dataclass(eq=False, slots=True)
class _Side:
    """One of the two tables."""

    table: ItemTable
    revision: int = 0
    readers: int = 0
    behind_R: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Rows that the other side has newer, of the columns `behind`."""
    behind: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pinned:
    """A table that no update touches while it is pinned."""

    table: ItemTable
    revision: int


class LiveIndex:
    """A catalogue of one embedding_version that is searched and updated at once.

    Any number of threads may search; updates are done one after another. An update is seen whole or not at all.
    """

    def __init__(
        self, rows: ItemRows, scorer: nn.Module, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: Any = "cpu", fused: bool | None = None, users: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """rows: the first items, in the order of their rows. capacity: rows there is room for; it grows by itself.

        dtype: of embeddings and scalars; see `ItemTable`. fused: whether batches are answered by the kernels of
        `fused.py`; by default on a GPU. users: float [U, E], a sample of the release's user embeddings, some hundreds;
        int8 and float8 rows are then rounded so that the scorer's scores of such users are off least (`rounding`).
        Raises ShapeError for users of another width, IndexMismatch for a scorer that was loaded with a release of
        another embedding_version.
        """
        self.embedding_version = rows.embedding_version
        if (version := getattr(scorer, "embedding_version", None)) is not None:
            check_version("a scorer", version, self.embedding_version)
        self.layout = rows.layout
        self.retrieval = Retrieval(rows.layout, scorer).to(device).eval()
        room = max(len(rows), capacity or 0, 1)
        tables = [ItemTable(rows.layout, room, dtype=dtype, device=device) for _ in range(2)]
        if users is not None and dtype in LARGEST_CODE:
            if users.ndim != 2 or users.shape[1] != rows.layout.embedding_dim or not len(users):
                raise ShapeError(f"users must have shape [U, {rows.layout.embedding_dim}], got {list(users.shape)}")
            made_EE = feedback(sensitivity(self.retrieval.scorer, users.to(device), rows.feature_RF.to(device)))
            for table in tables:
                table.feedback_EE = made_EE
        self._reading, self._idle = _Side(tables[0]), _Side(tables[1])
        self._moved = threading.Condition()
        self._writing = threading.Lock()
        is_cuda = tables[0].device.type == "cuda"
        if is_cuda:
            torch.cuda.current_stream(tables[0].device).synchronize()  # which fills them; updates are on other streams
        self._searches = fused_searches(self.retrieval) if (is_cuda if fused is None else fused) else None
        self._row_of: dict[Any, int] = {}
        self._ids: list[Any] = []
        self._is_there = bytearray()
        """By row: is_there_N after the last update, for updates; so that none waits for the device to tell."""
        self.upsert(rows)

    def __len__(self) -> int:
        """Items there are."""
        with self.pin() as pinned:
            return int(pinned.table.is_there_N.sum())

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._reading.table.device

    @property
    def revision(self) -> int:
        """Updates applied."""
        return self._reading.revision

    @property
    def walked_again(self) -> int:
        """Requests that the kernels' pool was too small for, and that were answered by `select_exactly`."""
        return 0 if self._searches is None else self._searches.walked_again

    def prepare(self, plan: Plan, requests: int = 1, tasks: int = 1) -> None:
        """Compile kernels and capture CUDA graphs for such batches ahead of the first one; nothing on the CPU.

        Any plan with as many results or fewer and the same kinds of caps is ready then, if it does not explore.
        """
        if self._searches is not None:
            with self._writing:
                for side in (self._reading, self._idle):
                    self._searches.prepare(side.table, plan, requests, tasks)

    # Requests

    @contextmanager
    def pin(self) -> Iterator[Pinned]:
        """The table as it is now, for as long as the block lasts; on a GPU, end the block after reading the results."""
        with self._moved:
            side = self._reading
            side.readers += 1
            pinned = Pinned(side.table, side.revision)
        try:
            yield pinned
        finally:
            with self._moved:
                side.readers -= 1
                self._moved.notify_all()

    def search(
        self, user_BE: NDArray[np.float32] | torch.Tensor, requests: Sequence[Request], plan: Plan,
        embedding_version: str, *, bonus: Callable[[int], torch.Tensor] | None = None,
        scalars: Callable[[int], torch.Tensor] | None = None,
    ) -> Slates:  # fmt: skip
        """The slates of a batch, all of one revision.

        user_BE: float [B, E], made by a release of `embedding_version`. bonus: number of rows N to f32 [B, N] on the
        index's device, what the request knows of items and no row holds; added to each score. scalars: to f32 [N, S],
        read in the place of those that rows hold.
        Raises IndexMismatch for users of another version, ShapeError, DataError; on a GPU IndexBusy, see `streams`.
        """
        check_version("a request", embedding_version, self.embedding_version)
        user_BE = torch.as_tensor(user_BE)
        if user_BE.shape != (len(requests), self.layout.embedding_dim):
            raise ShapeError(
                f"users of {len(requests)} requests must have shape [{len(requests)}, {self.layout.embedding_dim}], "
                f"got {list(user_BE.shape)}"
            )
        with self.pin() as pinned, torch.inference_mode():
            table = pinned.table
            asked = Requests.build(requests, self.layout, lambda ids: self.rows_of(ids, table.count))
            if self._searches is not None and bonus is None and scalars is None:
                found = self._searches.search(table, user_BE, asked, plan)
            else:
                columns, bonus_BN = table.used(), None if bonus is None else bonus(table.count)
                if scalars is not None:
                    embedding_NE = columns.feature_NF[:, : self.layout.embedding_dim]
                    feature_NF = torch.cat([embedding_NE, scalars(table.count).to(embedding_NE.dtype)], dim=1)
                    columns = replace(columns, feature_NF=feature_NF)
                found = self.retrieval.search(columns, user_BE.to(table.device), asked.to(table.device), plan, bonus_BN)
            row_BK, utility_BK = found.row_BK.cpu().numpy(), found.utility_BK.cpu().numpy()
            lengths = found.length_B.tolist()
        ids = [
            list(map(self._ids.__getitem__, row_K[:length].tolist()))
            for row_K, length in zip(row_BK, lengths, strict=True)
        ]
        return Slates(ids, row_BK, utility_BK, self.embedding_version, pinned.revision)

    def item_ids(self, start: int = 0, end: int | None = None) -> list[ItemId]:
        """Ids of some rows, those of deleted items too, in the order of rows."""
        return self._ids[start:end]

    def row_of(self, item_id: ItemId) -> int | None:
        """The row of an item, deleted or not, None where it never had one."""
        return self._row_of.get(item_id)

    def rows_of(self, item_ids: Sequence[ItemId], count: int) -> list[int]:
        """Rows below count of those items that have one."""
        return [row for row in map(self._row_of.get, item_ids) if row is not None and row < count]

    # Updates

    def upsert(self, rows: ItemRows) -> Applied:
        """Bring new items, or all columns of known ones. Raises IndexMismatch, ShapeError, IndexBusy."""
        check_version("an upsert", rows.embedding_version, self.embedding_version)
        if rows.layout != self.layout:
            raise ShapeError(f"the index has rows of {self.layout}, got {rows.layout}")
        columns = {
            "feature": rows.feature_RF, "mask": rows.mask_RW, "category": rows.category_R,
            "advertiser": rows.advertiser_R, "attribute": rows.attribute_RA, "bid": rows.bid_R,
            "budget": rows.budget_R, "eligible": rows.eligible_R,
            "is_there": torch.ones(len(rows), dtype=torch.bool),
        }  # fmt: skip
        with self._writing:
            known = len(self._ids)
            new = [item for item in rows.item_ids if item not in self._row_of]
            # A request finds a new item's row only in tables that have it: `rows_of` is asked with the table's count.
            self._ids += new
            self._row_of.update((item, known + place) for place, item in enumerate(new))
            places = [self._row_of[item] for item in rows.item_ids]
            try:
                self._write(places, columns, len(self._ids))
            except BaseException:
                for item in new:
                    del self._row_of[item]
                del self._ids[known:]
                raise
            self._is_there.extend(bytes(len(new)))
            for place in places:
                self._is_there[place] = True
            return Applied(len(places), 0, self.revision)

    def delete(self, embedding_version: str, item_ids: Sequence[ItemId]) -> Applied:
        """Take items away. Raises IndexMismatch, DataError for an id named twice, IndexBusy."""
        check_version("a deletion", embedding_version, self.embedding_version)
        check_ids(item_ids)
        with self._writing:
            places = self._places(item_ids)
            gone = torch.zeros(len(places), dtype=torch.bool)
            self._write(places, {"eligible": gone, "is_there": gone}, len(self._ids))
            for place in places:
                self._is_there[place] = False
            return Applied(len(places), len(item_ids) - len(places), self.revision)

    def change(self, deltas: Deltas) -> Applied:
        """Set bids, budgets or eligibility; items that are not there, or deleted, stay so. Raises IndexMismatch."""
        check_version("a delta", deltas.embedding_version, self.embedding_version)
        with self._writing:
            places = self._places(deltas.item_ids)
            there = {self._ids[row] for row in places}
            there_R = torch.tensor([item in there for item in deltas.item_ids], dtype=torch.bool)
            columns = {name: torch.as_tensor(value)[there_R] for name, value in deltas.columns().items()}
            self._write(places, columns, len(self._ids))
            return Applied(len(places), len(there_R) - len(places), self.revision)

    def _places(self, item_ids: Sequence[ItemId]) -> list[int]:
        """Rows of those items that are there, in their order."""
        return [row for row in self.rows_of(item_ids, len(self._ids)) if self._is_there[row]]

    @torch.no_grad()
    def _write(self, places: list[int], columns: dict[str, torch.Tensor], count: int) -> None:
        """Write rows of some columns into the idle side, then swap the sides; all of it or, on an error, nothing."""
        row_R = torch.tensor(places, dtype=torch.int64)
        with self._moved:
            idle, reading = self._idle, self._reading
            if not self._moved.wait_for(lambda: not idle.readers, WAIT_S):
                raise IndexBusy(
                    f"{idle.readers} requests still read, after {WAIT_S:g} s, the table this update is to be written to"
                )
        behind_R, behind = idle.behind_R, idle.behind
        # Until the swap: should the write fail, the next one copies these rows back.
        idle.behind_R = torch.cat([behind_R, row_R]).unique()  # type: ignore[no-untyped-call]
        idle.behind = behind | columns.keys()
        behind_R = behind_R[behind_R < reading.table.capacity]
        with lent(self.device) as stream, torch.cuda.stream(stream):
            there = sent({"row": row_R, "behind": behind_R, **columns}, self.device)
            row_there_R, behind_there_R = there.pop("row"), there.pop("behind")
            outgrown = idle.table if count > idle.table.capacity else None
            if outgrown is not None:
                idle.table = reading.table.grown(max(count, int(reading.table.capacity * GROWTH)))
            elif len(behind_R):
                idle.table.copy_rows(reading.table, behind_there_R, behind)
            idle.table.write(row_there_R, there)
            idle.table.count = count
        if self._searches is not None and outgrown is not None:
            self._searches.move(outgrown, idle.table)
        idle.behind_R, idle.behind = torch.zeros(0, dtype=torch.int64), frozenset()
        reading.behind_R, reading.behind = row_R, frozenset(columns)
        idle.revision = reading.revision + 1
        with self._moved:
            self._reading, self._idle = idle, reading

    def copy_of_rows(self, item_ids: Sequence[ItemId]) -> ItemRows:
        """Items that are there, as an upsert would bring them (unknown ones left out); all of one revision."""
        with self.pin() as pinned:
            table = pinned.table
            known = self.rows_of(item_ids, table.count)
            rows = [row for row, there in zip(known, table.are_there(known), strict=True) if there]
            picked = {name.rpartition("_")[0]: buffer[rows].cpu() for name, buffer in table.named_buffers()}
            feature_RF = table.features(torch.tensor(rows, dtype=torch.int64, device=table.device)).float().cpu()
        return ItemRows(
            self.embedding_version, self.layout, [self._ids[row] for row in rows], feature_RF,
            picked["mask"], picked["category"], picked["advertiser"], picked["attribute"], picked["bid"],
            picked["budget"], picked["eligible"],
        )  # fmt: skip


def fused_searches(retrieval: Retrieval) -> "FusedSearches | None":
    """What answers by kernels, or None where Triton is not installed."""
    try:
        from model.retrieval.fused import FusedSearches
    except ImportError:
        return None
    return FusedSearches(retrieval)


class IndexHolder:
    """The index that answers. Requests keep the one they began with; a new one is seen by the next request."""

    def __init__(self, index: LiveIndex) -> None:
        self._index = index

    @property
    def index(self) -> LiveIndex:
        """The index for a request to keep."""
        return self._index

    def swap(self, index: LiveIndex) -> LiveIndex:
        """Let another index answer, of any embedding_version; the one before."""
        before, self._index = self._index, index
        return before
