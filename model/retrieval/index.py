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

import copy
import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.errors import IndexBusy, ShapeError
from model.kernels.interaction_score import MAX_SCALARS, ItemFeatures
from model.retrieval.rounding import LARGEST_CODE, coded, feedback, sensitivity
from model.retrieval.rows import NONE, Deltas, ItemId, ItemRows, Layout, check_ids, check_version
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import InteractionScorer
from model.retrieval.select import Found, select, select_exactly
from model.retrieval.streams import current, lent

if TYPE_CHECKING:
    from model.retrieval.fused import FusedSearches
    from model.retrieval.movers import RowMover

GROWTH = 1.5
DENSE = 2**22
"""Integer item ids below are looked up in an array of up to so many rows, 32 MB."""
WAIT_S = 5.0
"""Longest an update waits for requests that still read the table it is to be written into."""
_CODED, _CODED_FROM = ("code", "scalar", "scale"), "feature"


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
        self, layout: Layout, capacity: int, *, dtype: torch.dtype = torch.float32, device: Any = "cpu",
        scalar_room: int = 0,
    ) -> None:  # fmt: skip
        """capacity: rows there is room for.

        dtype: of embeddings and scalars, float32, bfloat16 or float64; or of embeddings, int8 or float8_e4m3fn.
        scalar_room: columns of scalars that a row has at least; those past the layout's hold zeros.
        Raises ShapeError for another dtype.
        """
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16, torch.float64, *LARGEST_CODE):
            raise ShapeError(f"rows must be float32, bfloat16, float64, int8 or float8_e4m3fn, got {dtype}")
        self.layout = layout
        self.dtype = dtype
        self.scalar_room = max(scalar_room, layout.scalars)
        self.capacity = capacity
        """Rows there is room for."""
        self.feedback_EE: torch.Tensor | None = None
        """How int8 and float8 rows are rounded, see `rounding.coded`."""
        self.count = 0
        """High-water mark: rows ever used, deleted ones included."""

        def room(name: str, width: int | None, fill: float | bool, kind: torch.dtype) -> None:
            shape = (capacity,) if width is None else (capacity, width)
            self.register_buffer(name, torch.full(shape, fill, dtype=kind, device=device))

        if dtype in LARGEST_CODE:
            room("code_NE", layout.embedding_dim, 0, torch.int8)  # float8 as its bits: few operations take it
            room("scalar_NS", self.scalar_room, 0, torch.bfloat16)
            room("scale_N", None, 1, torch.float32)
        else:
            room("feature_NF", layout.embedding_dim + self.scalar_room, 0, dtype)
        room("mask_NW", layout.mask_words, 0, torch.int64)
        room("category_N", None, NONE, torch.int64)
        room("advertiser_N", None, NONE, torch.int64)
        room("attribute_NA", layout.attributes, torch.nan, torch.float32)
        room("bid_N", None, 0, torch.float32)
        room("budget_N", None, 0, torch.float32)
        room("eligible_N", None, False, torch.bool)
        room("is_there_N", None, False, torch.bool)
        self.device = self.bid_N.device
        self.buffer_of = dict(self.named_buffers())
        """By name; to look one up in a module is slow, and updates do it much."""
        self._column_of = {name: name.rpartition("_")[0] for name in self.buffer_of}
        self.place_of = {
            name: (buffer.data_ptr(), math.prod(buffer.shape[1:]) * buffer.element_size())
            for name, buffer in self.buffer_of.items()
        }
        """Address, and bytes of a row."""
        self.bytes_a_row = sum(width for _, width in self.place_of.values())

    def items(self) -> ItemFeatures:
        """What kernels read of all rows, in place; scalars as wide as there is room for."""
        if self.dtype in LARGEST_CODE:
            codes = self.get_buffer("code_NE").view(self.dtype)
            return ItemFeatures(codes, self.get_buffer("scalar_NS"), self.get_buffer("scale_N"))
        feature_NF, width = self.get_buffer("feature_NF"), self.layout.embedding_dim
        return ItemFeatures(feature_NF[:, :width], feature_NF[:, width:])

    def features(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, F], what scorers read: as they lie in memory, or of int8 and float8 rows in float32."""
        if self.dtype not in LARGEST_CODE:
            return self.get_buffer("feature_NF")[rows, : self.layout.features]
        code_RE = self.get_buffer("code_NE")[rows].view(self.dtype).float()
        scaled_RE = code_RE * self.get_buffer("scale_N")[rows][:, None]
        return torch.cat([scaled_RE, self.get_buffer("scalar_NS")[rows, : self.layout.scalars].float()], dim=1)

    def used(self) -> "Columns":
        """What the graph reads, up to the high-water mark."""
        used = slice(self.count)
        names = (column.name for column in fields(Columns) if column.name != "feature_NF")
        return Columns(self.features(used), **{name: self.get_buffer(name)[used] for name in names})

    def are_there(self, rows: list[int]) -> list[bool]:
        """Which of the rows hold an item, and not a deleted one."""
        found: list[bool] = self.is_there_N[torch.tensor(rows, dtype=torch.int64, device=self.device)].tolist()
        return found

    @torch.no_grad()
    def write(self, row_R: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
        """Write rows of some columns, named without their axes; all on the table's device. row_R: i64, each once."""
        for name, value in self.stored(columns).items():
            self.buffer_of[name].index_copy_(0, row_R, value)

    def stored(self, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Columns, named without their axes, as the buffers keep them, by the buffers' names; where they are."""
        if "feature" in columns:
            columns = columns | self._features(columns["feature"])
        there = {name: columns.get(column) for name, column in self._column_of.items()}
        # Only what needs a cast is asked for one: another thread may come in at every call into PyTorch.
        return {
            name: value if value.dtype == self.buffer_of[name].dtype else value.to(self.buffer_of[name].dtype)
            for name, value in there.items() if value is not None
        }  # fmt: skip

    def _features(self, feature_RF: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns that embeddings and scalars are kept in."""
        width, missing = self.layout.embedding_dim, self.scalar_room - self.layout.scalars
        if missing:
            feature_RF = torch.nn.functional.pad(feature_RF, (0, missing))
        if self.dtype not in LARGEST_CODE:
            return {"feature": feature_RF}
        feature_RF = feature_RF.float()
        code_RE, scale_R = coded(feature_RF[:, :width], self.dtype, self.feedback_EE)
        return {"code": code_RE.view(torch.int8), "scalar": feature_RF[:, width:], "scale": scale_R}

    def copy_rows(self, source: "ItemTable", row_R: torch.Tensor, columns: Set[str]) -> None:
        """Take over rows of some columns, named as for `write`, from a table of the same layout and dtype.

        row_R: i64, on the tables' device.
        """
        for name in self.changed_with(columns):
            self.buffer_of[name].index_copy_(0, row_R, source.buffer_of[name][row_R])

    def changed_with(self, columns: Set[str]) -> list[str]:
        """The buffers that a write of these columns, named as for `write`, sets."""
        return [
            name for name, column in self._column_of.items()
            if (_CODED_FROM if column in _CODED else column) in columns
        ]  # fmt: skip

    def grown(self, capacity: int) -> "ItemTable":
        """A table of more room with the same rows."""
        table = ItemTable(
            self.layout, capacity, dtype=self.dtype, device=self.device, scalar_room=self.scalar_room
        )  # fmt: skip
        table.feedback_EE = self.feedback_EE
        for name, buffer in self.named_buffers():
            table.get_buffer(name)[: self.capacity].copy_(buffer)
        table.count = self.count
        return table


def scalars_read_at_once(scorer: nn.Module, dtype: torch.dtype) -> int:
    """Columns of scalars that the fastest kernel wants of a row, 0 where it does not compute this scorer."""
    if not isinstance(scorer, InteractionScorer) or dtype not in (torch.bfloat16, *LARGEST_CODE):
        return 0
    return MAX_SCALARS if scorer.scalars <= MAX_SCALARS else 0


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


@dataclass(frozen=True, slots=True)
class Behind:
    """Rows of some columns, named without their axes, that are to be taken over from another table."""

    row_R: NDArray[np.int64]
    """Each once."""
    columns: Set[str]


@dataclass(eq=False, slots=True)
class _Side:
    """One of the two tables."""

    table: ItemTable
    revision: int = 0
    readers: int = 0
    behind: list[Behind] = field(default_factory=list)
    """What the other side has newer."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """A table that no update touches while it is pinned."""

    table: ItemTable
    revision: int


class Ids:
    """Item ids by row, in an array, of which many are picked at once; it grows as a list does.

    What is read while another thread extends it is there already, in the old memory or the new.
    """

    def __init__(self) -> None:
        self._id_N = np.empty(16, object)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, rows: slice | list[int] | NDArray[np.int64]) -> list[Any]:
        """Ids of rows, each below the length."""
        found: list[Any] = self._id_N[rows].tolist()
        return found

    def extend(self, ids: list[Any]) -> None:
        """Ids of the rows that follow."""
        count = self._count + len(ids)
        if count > len(self._id_N):
            grown = np.empty(max(count, 2 * len(self._id_N)), object)
            grown[: self._count] = self._id_N[: self._count]
            self._id_N = grown
        self._id_N[self._count : count] = ids
        self._count = count

    def cut(self, count: int) -> None:
        """Forget the rows from count on."""
        self._id_N[count : self._count] = None
        self._count = count


class RowNumbers:
    """Item ids to rows. One thread adds and takes back, any number look up.

    Ids that are integers in [0, DENSE) are looked up in an array, a batch in a few calls, others one by one.
    """

    def __init__(self) -> None:
        self._row_of: dict[Any, int] = {}
        self._dense = np.full(1024, NONE, np.int64)
        """By id; all known ids in [0, DENSE) have their place here."""

    def get(self, item_id: ItemId) -> int | None:
        """The row, None where the item never had one."""
        return self._row_of.get(item_id)

    def of(self, item_ids: Sequence[ItemId]) -> NDArray[np.int64]:
        """[R], the items' rows, -1 where one never had any."""
        number_R = _integers(item_ids)
        if number_R is None:
            return np.fromiter(map(self._row_of.get, item_ids, repeat(NONE)), np.int64, len(item_ids))
        dense = self._dense  # another thread may put a larger one in its place
        row_R: NDArray[np.int64] = dense.take(number_R, mode="clip")
        if len(number_R) and number_R.max() >= len(dense):
            row_R[number_R >= len(dense)] = NONE
        return row_R

    def add(self, item_ids: list[Any], first: int) -> None:
        """Rows from the first on for ids that have none."""
        self._row_of.update(zip(item_ids, range(first, first + len(item_ids)), strict=True))
        row_of = {item: row for row, item in enumerate(item_ids, first) if _is_dense(item)}
        number_R = np.fromiter(row_of, np.int64, len(row_of))
        most = int(number_R.max(initial=-1))
        if most >= len(self._dense):
            grown = np.full(1 << most.bit_length(), NONE, np.int64)
            grown[: len(self._dense)] = self._dense
            self._dense = grown
        self._dense[number_R] = list(row_of.values())

    def remove(self, item_ids: list[Any]) -> None:
        """Forget ids that were just added."""
        for item in item_ids:
            del self._row_of[item]
        self._dense[np.fromiter(filter(_is_dense, item_ids), np.int64)] = NONE


def _is_dense(item_id: ItemId) -> bool:
    return isinstance(item_id, int | np.integer) and 0 <= item_id < DENSE


def _integers(item_ids: Sequence[ItemId]) -> NDArray[np.int64] | None:
    """The ids as an array; None unless all are integers in [0, DENSE)."""
    try:
        # An array takes no string or fraction for an integer.
        number_R = np.frombuffer(array("q", item_ids), np.int64)  # type: ignore[type-var]
    except (TypeError, OverflowError):
        return None
    is_dense = not len(number_R) or (number_R.min() >= 0 and number_R.max() < DENSE)
    return number_R if is_dense else None


class LiveIndex:
    """A catalogue of one embedding_version that is searched and updated at once.

    Any number of threads may search; updates are done one after another. An update is seen whole or not at all.
    """

    def __init__(
        self, rows: ItemRows, scorer: nn.Module, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: Any = "cpu", fused: bool | None = None, users: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """rows: the first items, in the order of their rows. capacity: rows there is room for; it grows by itself.

        scorer: the index takes a copy to its device; the caller's stays as it is.

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
        self.retrieval = Retrieval(rows.layout, copy.deepcopy(scorer)).to(device).eval()
        room = max(len(rows), capacity or 0, 1)
        scalar_room = scalars_read_at_once(scorer, dtype)
        tables = [
            ItemTable(rows.layout, room, dtype=dtype, device=device, scalar_room=scalar_room) for _ in range(2)
        ]  # fmt: skip
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
        self._rows = RowNumbers()
        self._ids = Ids()
        self._is_there_N = np.zeros(room, np.bool_)
        """is_there_N after the last update, so that none waits for the device to tell; and room to grow."""
        self._mover: RowMover | None = None  # the first rows go in column by column
        self.upsert(rows)
        if self._searches is not None:
            self._mover = row_mover(self.device)

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
            asked = Requests.build(requests, self.layout, lambda ids: self.row_array_of(ids, table.count))
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
        ids = [self._ids.of(row_K[:length]) for row_K, length in zip(row_BK, lengths, strict=True)]
        return Slates(ids, row_BK, utility_BK, self.embedding_version, pinned.revision)

    def item_ids(self, start: int = 0, end: int | None = None) -> list[ItemId]:
        """Ids of some rows, those of deleted items too, in the order of rows."""
        return self._ids.of(slice(start, len(self._ids) if end is None else min(end, len(self._ids))))

    def row_of(self, item_id: ItemId) -> int | None:
        """The row of an item, deleted or not, None where it never had one."""
        return self._rows.get(item_id)

    def rows_of(self, item_ids: Sequence[ItemId], count: int) -> list[int]:
        """Rows below count of those items that have one."""
        rows: list[int] = self.row_array_of(item_ids, count).tolist()
        return rows

    def row_array_of(self, item_ids: Sequence[ItemId], count: int) -> NDArray[np.int64]:
        """The same as an array."""
        row_X = self._rows.of(item_ids)
        return row_X[(row_X >= 0) & (row_X < count)]

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
            "is_there": torch.from_numpy(np.ones(len(rows), np.bool_)),
        }  # fmt: skip
        with self._writing:
            row_R = self._rows.of(rows.item_ids)
            known, new_R = len(self._ids), (row_R == NONE).nonzero()[0]
            new = [rows.item_ids[at] for at in new_R.tolist()]
            row_R[new_R] = np.arange(known, known + len(new))
            # A request finds a new item's row only in tables that have it: `rows_of` is asked with the table's count.
            self._ids.extend(new)
            self._rows.add(new, known)
            try:
                self._write(row_R, columns, len(self._ids))
            except BaseException:
                self._rows.remove(new)
                self._ids.cut(known)
                raise
            if len(self._ids) > len(self._is_there_N):
                more = int(len(self._ids) * GROWTH) - len(self._is_there_N)
                self._is_there_N = np.concatenate([self._is_there_N, np.zeros(more, np.bool_)])
            self._is_there_N[row_R] = True
            return Applied(len(row_R), 0, self.revision)

    def delete(self, embedding_version: str, item_ids: Sequence[ItemId]) -> Applied:
        """Take items away. Raises IndexMismatch, DataError for an id named twice, IndexBusy."""
        check_version("a deletion", embedding_version, self.embedding_version)
        check_ids(item_ids)
        with self._writing:
            row_R = self._rows.of(item_ids)
            row_R = row_R[self._are_there(row_R)]
            gone = torch.zeros(len(row_R), dtype=torch.bool)
            self._write(row_R, {"eligible": gone, "is_there": gone}, len(self._ids))
            self._is_there_N[row_R] = False
            return Applied(len(row_R), len(item_ids) - len(row_R), self.revision)

    def change(self, deltas: Deltas) -> Applied:
        """Set bids, budgets or eligibility; items that are not there, or deleted, stay so. Raises IndexMismatch."""
        check_version("a delta", deltas.embedding_version, self.embedding_version)
        with self._writing:
            row_R, columns = self._rows.of(deltas.item_ids), deltas.columns()
            are_there_R = self._are_there(row_R)
            if not are_there_R.all():
                row_R = row_R[are_there_R]
                columns = {name: value[torch.from_numpy(are_there_R)] for name, value in columns.items()}
            self._write(row_R, columns, len(self._ids))
            return Applied(len(row_R), len(are_there_R) - len(row_R), self.revision)

    def _are_there(self, row_R: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the rows hold an item, and not a deleted one."""
        are_there_R: NDArray[np.bool_] = self._is_there_N[row_R]
        are_there_R[row_R == NONE] = False
        return are_there_R

    def _write(self, row_R: NDArray[np.int64], columns: dict[str, torch.Tensor], count: int) -> None:
        """Write rows of some columns into the idle side, then swap the sides; all of it or, on an error, nothing."""
        with self._moved:
            idle, reading = self._idle, self._reading
            if not self._moved.wait_for(lambda: not idle.readers, WAIT_S):
                raise IndexBusy(
                    f"{idle.readers} requests still read, after {WAIT_S:g} s, the table this update is to be written to"
                )
        most = reading.table.capacity
        behind = [Behind(part.row_R[part.row_R < most], part.columns) for part in idle.behind]
        written = Behind(row_R, frozenset(columns))
        idle.behind = [*behind, written]  # until the swap: should the write fail, the next one copies these rows back
        outgrown = idle.table if count > idle.table.capacity else None
        with lent(self.device) as stream, current(stream):
            if outgrown is not None:
                idle.table = reading.table.grown(max(count, int(reading.table.capacity * GROWTH)))
                behind = []
            mover, taken = self._mover, sum(len(part.row_R) for part in behind)
            if mover is not None and mover.takes(idle.table, written.columns, len(row_R), taken):
                mover.write(idle.table, row_R, columns, reading.table, behind)
            else:
                for part in behind:
                    part_R = torch.from_numpy(part.row_R).to(self.device)
                    idle.table.copy_rows(reading.table, part_R, part.columns)
                there = {name: value.to(self.device) for name, value in columns.items()}
                idle.table.write(torch.from_numpy(row_R).to(self.device), there)
            idle.table.count = count
        if self._searches is not None and outgrown is not None:
            self._searches.move(outgrown, idle.table)
        idle.behind, reading.behind = [], [written]
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
            self.embedding_version, self.layout, self._ids.of(rows), feature_RF,
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


def row_mover(device: torch.device) -> "RowMover":
    """What writes updates by a kernel; needs Triton."""
    from model.retrieval.movers import RowMover

    return RowMover(device)


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
