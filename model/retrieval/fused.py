"""Retrieval of a batch on the GPU as one CUDA graph of few kernels; the answers are those of `Retrieval.search`.

    FusedSearch     one table, kind of plan and batch size: its graph reads the table where it lies, on a stream lent
                    for the run (`streams`). A batch is written into page-locked memory as one block, which the
                    first kernel brings; the last writes slates there. What is left undone is told by `is_exact_B`
    FusedSearches   those of an index, made as they are needed, each for one thread at a time; where an answer was not
                    exact, the utilities are still there and `select_exactly` walks them

Scores: the interaction MLP with bfloat16 weights, with a dot product beside it or not, and the dot product alone, of
bfloat16, int8 and float8 rows, by their own kernels; any other scorer as it is, inside the same graph.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from model.errors import IndexBusy, ShapeError
from model.kernels import slate_triton as slate
from model.kernels.dot_score_triton import ROW_DTYPES, dot_scores
from model.kernels.interaction_score import InteractionWeights, why_not
from model.kernels.interaction_score_triton import Folded, fold, score, vector_of
from model.retrieval.index import ItemTable, Retrieval
from model.retrieval.rules import MAX_RESULTS, Plan, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.select import LEAST_POOL, POOL_PER_RESULT, ROUNDS, Found, drawn, first_places, select_exactly
from model.retrieval.streams import Current, captured, lent

POOL_WITHOUT_CAPS = 2
"""Room in the pool for each item the walk has to find, where nothing is skipped: keys come in by whole bins."""
LEAST_EXCLUDED = 1024
"""Room for excluded rows of a request."""
LEAST_RESULTS = 128
MOST_REQUESTS = 64
MOST_BYTES = 2**31
"""Of a FusedSearch's memory for every item and request, which bounds its batch."""
MOST_SEARCHES = 64
"""FusedSearches kept of an index; the one not used for longest goes."""
ALIGNMENT = 256


class Block:
    """A batch's numbers side by side: the same parts in page-locked memory and on the device."""

    def __init__(self, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        """parts: dtype and shape of each."""
        self._start: dict[str, int] = {}
        size = 0
        for name, (dtype, shape) in parts.items():
            self._start[name] = size
            size += -(-dtype.itemsize * int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        self.here_bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.there_bytes = self.here_bytes if device.type == "cpu" else torch.zeros_like(self.here_bytes, device=device)
        views = self._views(self.here_bytes, parts)
        self.here = {name: part.numpy() for name, part in views.items()}
        self._part = {name: (part.data_ptr(), part.dtype, part.nbytes) for name, part in views.items()}
        self.there = self._views(self.there_bytes, parts)
        self.mapped = views
        """The page-locked parts as tensors, which kernels may write to."""

    def _views(
        self, memory: torch.Tensor, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, torch.Tensor]:
        views = {}
        for name, (dtype, shape) in parts.items():
            start = self._start[name]
            views[name] = memory[start : start + dtype.itemsize * int(np.prod(shape))].view(dtype).view(shape)
        return views

    def put(self, name: str, value: torch.Tensor) -> None:
        """Write the first rows of a part, in a third of an assignment's time. value: contiguous, on the CPU."""
        address, dtype, room = self._part[name]
        size = value.nbytes
        assert value.dtype == dtype, name
        assert size <= room, name
        assert value.is_contiguous(), name
        ctypes.memmove(address, value.data_ptr(), size)

    def send(self) -> None:
        """Copy all to the device, by a kernel."""
        if self.there_bytes is not self.here_bytes:
            slate.bring(self.here_bytes.view(torch.int64), self.there_bytes.view(torch.int64))

    def fetch(self) -> None:
        """Copy all from the device."""
        if self.there_bytes is not self.here_bytes:
            self.here_bytes.copy_(self.there_bytes, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is made for."""

    plan: Plan
    """Its caps are of the plan's kinds; their numbers are the batch's own."""
    requests: int
    tasks: int
    excluded: int
    """Room for excluded rows of all requests."""


class FusedSearch:
    """One batch size's search of one table. Not for two threads at a time."""

    def __init__(self, retrieval: Retrieval, table: ItemTable, shape: Shape) -> None:
        layout, device = table.layout, table.device
        requests, plan = shape.requests, shape.plan
        self.retrieval, self.table, self.shape = retrieval, table, shape
        per_word, per_attribute = (requests, layout.mask_words), (requests, layout.attributes)
        self.asked = Block(
            {
                "head": (torch.int32, (5,)), "user": (torch.float32, (requests, layout.embedding_dim)),
                "weight": (torch.float32, (requests, shape.tasks)), "bid_power": (torch.float64, (requests,)),
                "required": (torch.int64, per_word), "forbidden": (torch.int64, per_word),
                "lower": (torch.float32, per_attribute), "upper": (torch.float32, per_attribute),
                "min_budget": (torch.float32, (requests,)), "seed": (torch.int64, (requests,)),
                "excluded": (torch.int64, (shape.excluded,)), "excluded_of": (torch.int64, (shape.excluded,)),
            }, device,
        )  # fmt: skip
        self.found = Block(
            {
                "row": (torch.int32, (requests, plan.walked)), "utility": (torch.float32, (requests, plan.walked)),
                "length": (torch.int32, (requests,)), "is_exact": (torch.int32, (requests,)),
            }, device,
        )  # fmt: skip
        is_chained = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self.work = slate.Work.empty(requests, table.capacity, pool_of(plan), device, is_chained)
        self.run = 0
        self.weights = interaction_weights(retrieval.scorer, table)
        self.score_BTN = torch.empty(requests, shape.tasks, table.capacity, device=device)
        self.is_dot = isinstance(retrieval.scorer, DotScorer) and table.dtype in ROW_DTYPES
        if self.weights is not None:
            self._check_tasks(len(self.weights.out_bias_T))
            self.folded = Folded.empty(requests, self.weights, layout.embedding_dim, table.capacity)
            self.is_hopper = hopper is not None and hopper.fits(table.items(), self.weights)
        elif self.is_dot:
            self._check_tasks(1)
        there = self.asked.there
        self.rules = slate.Rules(
            table.mask_NW, table.eligible_N, table.budget_N, table.attribute_NA, table.bid_N, there["weight"],
            there["bid_power"], there["required"], there["forbidden"], there["lower"], there["upper"],
            there["min_budget"], there["excluded"], there["excluded_of"], there["head"], layout.words,
        )  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # which fills the memory; runs are on other streams

    def launch(self) -> None:
        """A run, on the current stream: the batch to the device, its slates back.

        The last kernel writes them into page-locked memory, unless some of their places are drawn.
        """
        self.asked.send()
        is_drawn = bool(self.shape.plan.explored)
        self.launch_kernels(self.found.there if is_drawn else self.found.mapped, is_first=False)
        if is_drawn:
            self.found.fetch()

    def launch_kernels(self, found: dict[str, torch.Tensor] | None = None, *, is_first: bool = True) -> None:
        """All but the copies. found: where slates go, by default the device. is_first: no kernel brings the batch."""
        slate.ready(self.rules, self.work, is_first=is_first)
        self.launch_scores()
        self.launch_selection(found or self.found.there)

    def launch_scores(self) -> None:
        """score_BTN of the batch's users, and the keys they make."""
        user_BE, count = self.asked.there["user"], self.asked.there["head"]
        if self.weights is not None:
            items, chained = self.table.items(), self.is_hopper and self.folded.dot_B1N is None and self.work.is_chained
            fold(user_BE, self.weights, self.folded, vector_of(items.embedding_NE), is_chained=chained)
            if self.folded.dot_B1N is not None:
                dot_scores(user_BE, items, self.folded.dot_B1N, count)
            if self.is_hopper:
                hopper.score(self.folded, items, self.weights, self.score_BTN, count, (self.rules, self.work))
                return
            score(self.folded, items, self.weights, self.score_BTN, count)
        elif self.is_dot:
            dot_scores(user_BE, self.table.items(), self.score_BTN, count)
        else:
            self.score_BTN = self.retrieval.scorer(user_BE, self.table.features(slice(None)))
            self._check_tasks(self.score_BTN.shape[1])
        slate.apply(self.score_BTN, self.rules, self.work)

    def _check_tasks(self, tasks: int) -> None:
        if tasks != self.shape.tasks:
            raise ShapeError(f"the scorer has {tasks} tasks, the requests weigh {self.shape.tasks}")

    def launch_selection(self, found: dict[str, torch.Tensor]) -> None:
        """Slates from the keys."""
        plan = self.shape.plan
        columns = {"advertiser": self.table.advertiser_N, "category": self.table.category_N}
        groups = [columns[name] for name in plan.caps]
        slate.bound(self.work)
        slate.gather(groups, self.rules, self.work)
        slate.order(len(groups), self.rules, self.work)
        if len(groups) > 1:
            slate.within(ROUNDS, self.rules, self.work)
        placed = slate.Placed(found["row"], found["utility"], found["length"], found["is_exact"])
        slate.place(len(groups), plan.walked, ROUNDS, self.work, placed)
        if plan.explored:
            self._explore()

    def _explore(self) -> None:
        plan, found = self.shape.plan, self.found.there
        row_BQ, utility_BQ = found["row"].long(), found["utility"].clone()
        is_taken_BQ = drawn(row_BQ, row_BQ >= 0, self.asked.there["seed"], plan)
        place_BK, is_taken_BK = first_places(is_taken_BQ, plan.k)
        found["row"][:, : plan.k] = row_BQ.gather(1, place_BK).masked_fill(~is_taken_BK, -1).int()
        found["utility"][:, : plan.k] = utility_BQ.gather(1, place_BK).masked_fill(~is_taken_BK, -torch.inf)
        found["length"].copy_(is_taken_BK.sum(1))

    def capture(self) -> None:
        """Make the CUDA graph of a run, on a GPU."""
        self.graph = self.captured(self.launch)

    def captured(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The CUDA graph of a launch; None on the CPU."""
        return captured(self.table.device, launch)

    def fill(self, user_BE: torch.Tensor, asked: Requests, items: int, plan: Plan) -> None:
        """Write a batch, on the CPU, into the page-locked memory; requests that it lacks get nothing."""
        count, excluded = len(asked), len(asked.excluded_X)
        if count > self.shape.requests or excluded > self.shape.excluded:
            raise ShapeError(
                f"the graph is for {self.shape.requests} requests and {self.shape.excluded} excluded rows, got {count} "
                f"and {excluded}"
            )
        self._check_tasks(asked.weight_BT.shape[1])
        if self.run == 2**31 - 1:
            self.work.stamp_BN.zero_()
            self.run = 0
        self.run += 1
        here, put, caps = self.asked.here, self.asked.put, list(plan.caps.values())
        here["head"][: 3 + len(caps)] = [items, excluded, self.run, *caps]
        put("user", user_BE.float().contiguous())
        put("weight", asked.weight_BT)
        put("bid_power", asked.bid_power_B)
        put("required", asked.required_BW)
        put("forbidden", asked.forbidden_BW)
        put("lower", asked.lower_BA)
        put("upper", asked.upper_BA)
        put("min_budget", asked.min_budget_B)
        put("seed", asked.seed_B)
        put("excluded", asked.excluded_X)
        put("excluded_of", asked.excluded_of_X)
        if count < self.shape.requests:
            here["min_budget"][count:] = np.inf

    def search(self, user_BE: torch.Tensor, asked: Requests, items: int, plan: Plan | None = None) -> Found:
        """The slates of a batch, on the CPU; exact where `is_exact_B`. items: rows of the table that are in use.

        plan: whose graph this is (`kind_of`); by default the shape's own.
        """
        plan = plan or self.shape.plan
        user_BE = user_BE.cpu()  # on the caller's stream
        with lent(self.table.device) as stream:
            self.fill(user_BE, asked, items, plan)
            if self.graph is not None:
                with Current(stream):
                    self.graph.replay()
            else:
                with torch.cuda.stream(stream), torch.inference_mode():
                    self.launch()
        count, k, here = len(asked), plan.k, self.found.here
        found = (
            here["row"][:count, :k].astype(np.int64), here["utility"][:count, :k].copy(),
            np.minimum(here["length"][:count], k).astype(np.int64), here["is_exact"][:count] != 0,
        )  # fmt: skip
        return Found(*map(torch.from_numpy, found))

    def utilities(self, items: int) -> tuple[torch.Tensor, torch.Tensor]:
        """utility_BN, 0 where not allowed, and allowed_BN, of the batch just searched; on the table's device."""
        key_BN = self.work.key_BN[:, :items]
        allowed_BN = key_BN != slate.NO_KEY
        utility_BN = torch.where(key_BN < 0, key_BN ^ 0x7FFFFFFF, key_BN).view(torch.float32)
        return torch.where(allowed_BN, utility_BN, 0), allowed_BN

    @torch.inference_mode()
    def walk_again(self, which_R: torch.Tensor, asked: Requests, items: int, plan: Plan) -> Found:
        """Exact slates of some requests of the batch just searched, from the utilities that it left; on the CPU."""
        with lent(self.table.device) as stream, torch.cuda.stream(stream):
            which_R = which_R.to(self.table.device)
            utility_RN, allowed_RN = (part_BN[which_R] for part_BN in self.utilities(items))
            groups = {"advertiser": self.table.advertiser_N[:items], "category": self.table.category_N[:items]}
            seed_R = asked.seed_B.to(self.table.device)[which_R]
            found = select_exactly(utility_RN, allowed_RN, groups, seed_R, plan)
            return Found(*(part.cpu() for part in found))


class FusedSearches:
    """The FusedSearches of an index. Any number of threads may search."""

    def __init__(self, retrieval: Retrieval) -> None:
        self.retrieval = retrieval
        self.walked_again = 0
        """Requests whose pool was too small, so that their utilities were walked again."""
        self._lock = threading.Lock()
        self._free: OrderedDict[tuple[ItemTable, Shape], list[FusedSearch]] = OrderedDict()

    def search(self, table: ItemTable, user_BE: torch.Tensor, asked: Requests, plan: Plan) -> Found:
        """The exact slates of a batch of any size, on the CPU. user_BE: float, on any device. asked: on the CPU.

        The table must not change meanwhile. Raises ShapeError, IndexBusy where the device has no stream left.
        """
        most = most_requests(table)
        if len(asked) > most:
            parts = [
                self.search(table, user_BE[start : start + most], asked.part(start, start + most), plan)
                for start in range(0, len(asked), most)
            ]
            return Found(*(torch.cat(part) for part in zip(*parts, strict=True)))
        shape = shape_of(plan, asked)
        search = self._take(table, shape)
        try:
            found = self._exactly(search, user_BE, asked, plan)
        except IndexBusy:  # it has not begun, or is done
            self._give_back(search)
            raise
        self._give_back(search)
        return found

    def _exactly(self, search: FusedSearch, user_BE: torch.Tensor, asked: Requests, plan: Plan) -> Found:
        found = search.search(user_BE, asked, search.table.count, plan)
        if not bool(found.is_exact_B.all()):
            which_R = (~found.is_exact_B).nonzero()[:, 0]
            again = search.walk_again(which_R, asked, search.table.count, plan)
            for part, mended in zip(found, again, strict=True):
                part[which_R] = mended
            with self._lock:
                self.walked_again += len(which_R)
        return found

    def prepare(self, table: ItemTable, plan: Plan, requests: int, tasks: int) -> None:
        """Have one ready for such batches."""
        requests = _power(min(requests, most_requests(table)))
        self._give_back(self._take(table, Shape(kind_of(plan), requests, tasks, requests * LEAST_EXCLUDED)))

    def move(self, before: ItemTable, table: ItemTable) -> None:
        """Have the same ready for a table as for the one it replaces, which nobody reads any more."""
        with self._lock:
            shapes = [shape for owner, shape in self._free if owner is before]
            for shape in shapes:
                del self._free[before, shape]
        for shape in shapes:
            self._give_back(self._take(table, shape))

    def _take(self, table: ItemTable, shape: Shape) -> FusedSearch:
        with self._lock:
            free = self._free.get((table, shape))
            if free:
                return free.pop()
        search = FusedSearch(self.retrieval, table, shape)
        search.capture()
        return search

    def _give_back(self, search: FusedSearch) -> None:
        with self._lock:
            key = search.table, search.shape
            self._free.setdefault(key, []).append(search)
            self._free.move_to_end(key)
            while sum(map(len, self._free.values())) > MOST_SEARCHES:
                oldest = next(iter(self._free))
                if len(self._free[oldest]) > 1:
                    self._free[oldest].pop()
                else:
                    del self._free[oldest]


@lru_cache(1024)
def kind_of(plan: Plan) -> Plan:
    """The plan whose graph answers this one too: more results begin with the fewer, caps are numbers on the device."""
    caps = dict.fromkeys((f"{name}_cap" for name in plan.caps), 1)
    if plan.explored:
        return replace(plan, **caps)
    return Plan(k=min(max(_power(plan.k), LEAST_RESULTS), MAX_RESULTS), **caps)


def shape_of(plan: Plan, asked: Requests) -> Shape:
    """What a batch wants to be searched by."""
    requests = _power(len(asked))
    excluded = max(_power(len(asked.excluded_X)), requests * LEAST_EXCLUDED)
    return Shape(kind_of(plan), requests, asked.weight_BT.shape[1], excluded)


def most_requests(table: ItemTable) -> int:
    """Requests of a batch: a power of two for which keys, factors, stamps and scores have room."""
    most = MOST_BYTES // (16 * table.capacity)
    return max(1, min(MOST_REQUESTS, _power(most + 1) // 2))


def _power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()


def pool_of(plan: Plan) -> int:
    """Candidates the kernels look at, a power of two."""
    return _power(max(LEAST_POOL, plan.walked * (POOL_PER_RESULT if plan.caps else POOL_WITHOUT_CAPS)))


def interaction_weights(scorer: Any, table: ItemTable) -> InteractionWeights | None:
    """The scorer's weights for the kernels, or None where the kernels cannot compute it on this table."""
    if not isinstance(scorer, InteractionScorer) or table.dtype not in ROW_DTYPES:
        return None
    layout = table.layout
    hidden = scorer.second.in_features, scorer.second.out_features
    if why_not(layout.embedding_dim, layout.scalars, hidden, scorer.weight_IH.dtype) is not None:
        return None
    return InteractionWeights(
        scorer.weight_IH.detach().contiguous(), scorer.bias_H.detach().float(),
        scorer.second.weight.detach().T.half().contiguous(), scorer.second.bias.detach().float(),
        scorer.out.weight.detach().float().contiguous(), scorer.out.bias.detach().float(),
        None if scorer.dot_T is None else scorer.dot_T.detach().float(),
    )  # fmt: skip


try:
    from model.kernels import interaction_score_hopper as hopper
except ImportError:  # a Triton without Gluon
    hopper = None  # type: ignore[assignment]
