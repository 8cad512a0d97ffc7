"""Retrieval of a batch on the GPU as one CUDA graph of few kernels; the answers are those of `Retrieval.search`.

A FusedSearch belongs to one table, plan and batch size: its graph reads the table where it lies. A batch is written
into page-locked memory as one block, copied by one transfer; the slates come back by another. What the kernels leave
undone is told by `is_exact_B` and done by the caller (`select.select_exactly` over the utilities, still there).

Scores: the interaction MLP with bfloat16 weights by its own kernels, any other scorer as it is, inside the same graph.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from model.errors import ShapeError
from model.kernels import slate_triton as slate
from model.kernels.interaction_score import InteractionWeights, ItemFeatures, why_not
from model.kernels.interaction_score_triton import Folded, fold, score, vector_of
from model.retrieval.index import ItemTable, Retrieval
from model.retrieval.rules import Plan, Requests
from model.retrieval.scorer import InteractionScorer
from model.retrieval.select import LEAST_POOL, POOL_PER_RESULT, ROUNDS, Found, drawn, first_places

POOL_WITHOUT_CAPS = 2
"""Room in the pool for each item the walk has to find, where nothing is skipped: keys come in by whole bins."""
LEAST_EXCLUDED = 1024
"""Room for excluded rows of a request."""
ALIGNMENT = 256


class Block:
    """A batch's numbers side by side: the same parts in page-locked memory and on the device."""

    def __init__(self, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        """parts: dtype and shape of each, the one that is rarely full last."""
        self._start: dict[str, int] = {}
        size = 0
        for name, (dtype, shape) in parts.items():
            self._start[name] = size
            size += -(-dtype.itemsize * int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        self.here_bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.there_bytes = self.here_bytes if device.type == "cpu" else torch.zeros_like(self.here_bytes, device=device)
        self.here = self._views(self.here_bytes, parts)
        self.there = self._views(self.there_bytes, parts)

    def _views(
        self, memory: torch.Tensor, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, torch.Tensor]:
        views = {}
        for name, (dtype, shape) in parts.items():
            start = self._start[name]
            views[name] = memory[start : start + dtype.itemsize * int(np.prod(shape))].view(dtype).view(shape)
        return views

    def send(self, last: str, count: int) -> None:
        """Copy to the device, of the part `last` only the first `count` rows."""
        part = self.here[last]
        end = self._start[last] + count * part.element_size() * part[:1].numel()
        if self.there_bytes is not self.here_bytes:
            self.there_bytes[:end].copy_(self.here_bytes[:end], non_blocking=True)

    def fetch(self) -> None:
        """Copy all from the device."""
        if self.there_bytes is not self.here_bytes:
            self.here_bytes.copy_(self.there_bytes, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is made for."""

    plan: Plan
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
                "head": (torch.int32, (4,)), "user": (torch.float32, (requests, layout.embedding_dim)),
                "weight": (torch.float32, (requests, shape.tasks)), "bid_power": (torch.float64, (requests,)),
                "required": (torch.int64, per_word), "forbidden": (torch.int64, per_word),
                "lower": (torch.float32, per_attribute), "upper": (torch.float32, per_attribute),
                "min_budget": (torch.float32, (requests,)), "seed": (torch.int64, (requests,)),
                "excluded": (torch.int32, (shape.excluded, 2)),
            }, device,
        )  # fmt: skip
        self.found = Block(
            {
                "row": (torch.int32, (requests, plan.walked)), "utility": (torch.float32, (requests, plan.walked)),
                "length": (torch.int32, (requests,)), "is_exact": (torch.int32, (requests,)),
            }, device,
        )  # fmt: skip
        self.work = slate.Work.empty(requests, table.capacity, pool_of(plan), device)
        self.run = 0
        self.weights = interaction_weights(retrieval.scorer, table)
        self.score_BTN = torch.empty(requests, shape.tasks, table.capacity, device=device)
        if self.weights is not None:
            self.folded = Folded.empty(requests, self.weights, layout.embedding_dim)
        there = self.asked.there
        self.rules = slate.Rules(
            table.mask_NW, table.eligible_N, table.budget_N, table.attribute_NA, table.bid_N, there["weight"],
            there["bid_power"], there["required"], there["forbidden"], there["lower"], there["upper"],
            there["min_budget"], there["excluded"], there["head"], layout.words,
        )  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def launch(self) -> None:
        """All kernels of a run, on the current stream."""
        self.launch_scores_beside_begin()
        self.launch_selection()

    def launch_scores_beside_begin(self) -> None:
        """Scores, and beside them the clearing of counts and marking of excluded rows."""
        if self._side is None:
            slate.begin(self.rules, self.work)
            self.launch_scores()
            return
        main = torch.cuda.current_stream(self.table.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            slate.begin(self.rules, self.work)
        self.launch_scores()
        main.wait_stream(self._side)

    def launch_scores(self) -> None:
        """score_BTN of the batch's users."""
        user_BE = self.asked.there["user"]
        if self.weights is None:
            self.score_BTN = self.retrieval.scorer(user_BE, self.table.feature_NF)
            return
        items = item_features(self.table)
        fold(user_BE, self.weights, self.folded, vector_of(items.embedding_NE))
        count = self.asked.there["head"]
        if hopper is not None and hopper.fits(items, self.weights):
            hopper.score(self.folded, items, self.weights, self.score_BTN, count)
        else:
            score(self.folded, items, self.weights, self.score_BTN, count)

    def launch_selection(self) -> None:
        """Slates from the scores."""
        plan, found = self.shape.plan, self.found.there
        columns = {"advertiser": self.table.advertiser_N, "category": self.table.category_N}
        groups, caps = [columns[name] for name in plan.caps], list(plan.caps.values())
        slate.apply(self.score_BTN, self.rules, self.work)
        slate.gather(self.rules, self.work)
        slate.order(groups, self.work)
        slate.within(caps, ROUNDS, self.work)
        placed = slate.Placed(found["row"], found["utility"], found["length"], found["is_exact"])
        slate.place(len(caps), plan.walked, ROUNDS, self.work, placed)
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

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the CUDA graph. Other threads may use the device meanwhile, but none may capture."""
        self.fill_head(0, 0)
        stream = torch.cuda.Stream(self.table.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.table.device))
        with torch.cuda.stream(stream):
            self.launch()  # compiles
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.launch()

    def fill_head(self, items: int, excluded: int) -> None:
        """The batch's own numbers: items there are, excluded rows, the next run."""
        if self.run == 2**31 - 1:
            self.work.stamp_BN.zero_()
            self.run = 0
        self.run += 1
        self.asked.here["head"][:3] = torch.tensor([items, excluded, self.run], dtype=torch.int32)

    def fill(self, user_BE: torch.Tensor, asked: Requests, items: int) -> None:
        """Write a batch, on the CPU, into the page-locked memory; requests that it lacks get nothing."""
        count, excluded = len(asked), len(asked.excluded_X)
        if count > self.shape.requests or excluded > self.shape.excluded:
            raise ShapeError(
                f"the graph is for {self.shape.requests} requests and {self.shape.excluded} excluded rows, got {count} "
                f"and {excluded}"
            )
        here = self.asked.here
        self.fill_head(items, excluded)
        here["user"][:count] = user_BE
        for name, value in (
            ("weight", asked.weight_BT), ("bid_power", asked.bid_power_B), ("required", asked.required_BW),
            ("forbidden", asked.forbidden_BW), ("lower", asked.lower_BA), ("upper", asked.upper_BA),
            ("min_budget", asked.min_budget_B), ("seed", asked.seed_B),
        ):  # fmt: skip
            here[name][:count] = value
        here["min_budget"][count:] = torch.inf
        here["excluded"][:excluded, 0] = asked.excluded_X
        here["excluded"][:excluded, 1] = asked.excluded_of_X

    @torch.inference_mode()
    def search(self, user_BE: torch.Tensor, asked: Requests, items: int) -> Found:
        """The slates of a batch, on the CPU; exact where `is_exact_B`. items: rows of the table that are in use."""
        self.fill(user_BE, asked, items)
        self.asked.send("excluded", len(asked.excluded_X))
        if self.graph is not None:
            self.graph.replay()
        else:
            self.launch()
        self.found.fetch()
        if self.table.device.type == "cuda":
            torch.cuda.current_stream(self.table.device).synchronize()
        count, k, here = len(asked), self.shape.plan.k, self.found.here
        return Found(
            here["row"][:count, :k].long(), here["utility"][:count, :k].clone(), here["length"][:count].long(),
            here["is_exact"][:count] != 0,
        )  # fmt: skip


def pool_of(plan: Plan) -> int:
    """Candidates the kernels look at, a power of two."""
    return int(
        triton.next_power_of_2(max(LEAST_POOL, plan.walked * (POOL_PER_RESULT if plan.caps else POOL_WITHOUT_CAPS)))
    )


def interaction_weights(scorer: Any, table: ItemTable) -> InteractionWeights | None:
    """The scorer's weights for the kernels, or None where the kernels cannot compute it on this table."""
    if not isinstance(scorer, InteractionScorer) or table.feature_NF.dtype != torch.bfloat16:
        return None
    layout = table.layout
    hidden = scorer.second.in_features, scorer.second.out_features
    if why_not(layout.embedding_dim, layout.scalars, hidden, scorer.weight_IH.dtype) is not None:
        return None
    return InteractionWeights(
        scorer.weight_IH.detach().contiguous(), scorer.bias_H.detach().float(),
        scorer.second.weight.detach().T.contiguous(), scorer.second.bias.detach().float(),
        scorer.out.weight.detach().float().contiguous(), scorer.out.bias.detach().float(),
    )  # fmt: skip


def item_features(table: ItemTable) -> ItemFeatures:
    """What the kernels read of a table."""
    width = table.layout.embedding_dim
    return ItemFeatures(table.feature_NF[:, :width], table.feature_NF[:, width:])


try:
    from model.kernels import interaction_score_hopper as hopper
except ImportError:  # a Triton without Gluon
    hopper = None  # type: ignore[assignment]
