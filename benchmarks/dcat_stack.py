"""A whole ranking stack: histories read once and candidates crossing them, beside stacks that read them again.

python -m benchmarks.dcat_stack --device cuda [--only serve train] [--no-record]
python -m benchmarks.dcat_stack --device cpu --quick      # checks the logic on tiny shapes; measures nothing

Serving: 12 layers of width 768, histories of 992 events, 656 candidates of each of 8 requests, bfloat16.
- ours: context pass and crossing pass; and the crossing pass alone over kept keys and values ("decode"), which may be
  quantised to 1 byte a number: they become bfloat16 again, layer by layer, within the time measured. "fp8 products":
  linear layers but the output projection multiply 8 bits too.
- each candidate with its own history through FlashAttention: on a slice of the candidates, scaled to all.
- prefill: history and candidates of a request in one pass through scaled_dot_product_attention under a dense mask, the
  history computed again for every request (what UniPinRec compares its decode with, fp8 or not); once more with the
  same fp8 products as ours.
All arms are compiled, captured in CUDA graphs and timed in turn. Before that: ours against the dense stack in float64
on a small case, and in bfloat16 at full size against a float32 run, where its error may be twice the rival's at most.
What fp8 does to a ranking: candidates scored by fixed random heads, and how many of the best stay among the best.

Training: 4 layers of width 256, histories of 512 events, 16 candidates each; forward, backward, optimiser. The rival
gives every candidate its own history (causal FlashAttention over packed sequences). Same weights, data and seed: the
two loss curves may differ as much as the rival's own in bfloat16 and in float16 do. Both arms'
steps are timed as replays of a CUDA graph each, and launched one by one.

Legend: R requests, E events, T candidates, S events of a history, C candidates of a request, D channels, h heads,
d channels of a head, L length of history and candidates.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.dcat import Step, graphed, median_ms, off
from benchmarks.results import record, versions
from model.config import TowerConfig
from model.crossing import (
    ContextPass,
    KeyValueCache,
    behind_histories,
    compiled,
    finish,
    project,
    rotary_angles,
)
from model.encoder import Block, Packing, packed_causal_attention
from model.kernels.quantised_product import FP8, QuantisedBlock

THEME = "dcat"
STEPS = 200
OWN_PART = 32
"""Candidates that the arm of repeated histories is timed on."""
HEADS = 16
"""Random heads that rankings are compared with."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a stack and of what it reads: requests all alike."""

    layers: int
    width: int
    heads: int
    history: int
    candidates: int
    requests: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def blocks(self, dropout: float = 0.0) -> list[Block]:
        """Fresh blocks, always with the same weights."""
        torch.manual_seed(0)
        config = TowerConfig(
            d_model=self.width, num_heads=self.heads, num_layers=self.layers, history_limit=self.history,
            dropout=dropout,
        )  # fmt: skip
        return [Block(config) for _ in range(self.layers)]

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded events [E, D] and candidates [T, D], the same numbers in every dtype."""
        random = torch.Generator().manual_seed(1)
        counts = (self.requests * self.history, self.requests * self.candidates)
        event_ED, candidate_TD = (torch.randn(n, self.width, generator=random).bfloat16() for n in counts)
        return event_ED.to(device, dtype), candidate_TD.to(device, dtype)

    def offsets(self, of_each: int) -> torch.Tensor:
        """i64 [R + 1], on the CPU."""
        return torch.arange(self.requests + 1) * of_each


SERVING = Shape(12, 768, 12, 992, 656, 8)
TRAINING = Shape(4, 256, 4, 512, 16, 64)
QUICK_SERVING = Shape(2, 64, 2, 24, 6, 2)
QUICK_TRAINING = Shape(2, 32, 2, 12, 4, 4)


def dense_stack(
    blocks: Sequence[Block], event_ED: torch.Tensor, candidate_TD: torch.Tensor, shape: Shape, *, is_compiled: bool,
    is_quantised: bool = False,
) -> Step:  # fmt: skip
    """The undivided stack, history and candidates of a request side by side under a dense mask: [T, D] on a call.

    is_quantised: with fp8 products.
    """
    device, length = event_ED.device, shape.history + shape.candidates
    place_L = torch.arange(length, device=device)
    is_history_L = place_L < shape.history
    is_seen_LL = torch.where(is_history_L, place_L <= place_L[:, None], place_L == place_L[:, None])
    mask_LL = torch.where(is_seen_LL, 0.0, float("-inf")).to(event_ED.dtype)
    position_L = torch.minimum(torch.arange(length), torch.tensor(shape.history)).repeat(shape.requests)
    angle_Td = rotary_angles(position_L, shape.head_dim).to(device)[:, None]
    packing = Packing(
        offsets=(shape.offsets(length)).to(device, torch.int32),
        user_T=torch.arange(shape.requests, device=device).repeat_interleave(length),
        position_T=position_L.to(device), longest=length, cos_Td=angle_Td.cos(), sin_Td=angle_Td.sin(),
        time_us_T=torch.zeros(len(position_L), dtype=torch.int64, device=device),
    )  # fmt: skip
    before, behind = (compiled(project), compiled(finish)) if is_compiled else (project, finish)
    ways = [QuantisedBlock.of(block) for block in blocks] if is_quantised else []

    def attended(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        query, key, value = (x.unflatten(0, (shape.requests, length)).transpose(1, 2) for x in parts)
        out_RhLd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LL)
        return out_RhLd.transpose(1, 2).flatten(0, 1)

    def step() -> torch.Tensor:
        both = (event_ED.unflatten(0, (shape.requests, -1)), candidate_TD.unflatten(0, (shape.requests, -1)))
        hidden_TD = torch.cat(both, 1).flatten(0, 1)
        normed = ways[0].begin(hidden_TD) if ways else None
        for i, block in enumerate(blocks):
            if normed is None:
                hidden_TD = behind(block, hidden_TD, attended(before(block, hidden_TD, packing)))
                continue
            attended_TD = attended(ways[i].project(hidden_TD, normed, packing))
            # The last block's sum is normed once too often: what the loop reads is never None.
            following = blocks[min(i + 1, len(blocks) - 1)].attention_norm
            hidden_TD, normed = ways[i].finish(hidden_TD, attended_TD, following)
        return hidden_TD.unflatten(0, (shape.requests, length))[:, shape.history :].flatten(0, 1)

    return step


def own_packing(shape: Shape, device: torch.device) -> Packing:
    """Of every candidate behind a copy of its history."""
    length, sequences = shape.history + 1, shape.requests * shape.candidates
    time_us_T = torch.zeros(sequences * length, dtype=torch.int64, device=device)
    return Packing.of(torch.arange(sequences + 1) * length, shape.head_dim, time_us_T)


def own_histories(
    blocks: Sequence[Block], event_ED: torch.Tensor, candidate_TD: torch.Tensor, shape: Shape, packing: Packing,
    *, is_compiled: bool,
) -> Step:  # fmt: skip
    """Each candidate behind a copy of its history, packed, causal: [T, D] on a call."""
    before, behind = (compiled(project), compiled(finish)) if is_compiled else (project, finish)
    last_T = packing.offsets[1:].long() - 1

    def step() -> torch.Tensor:
        history = event_ED.unflatten(0, (shape.requests, 1, shape.history)).expand(-1, shape.candidates, -1, -1)
        own = candidate_TD.unflatten(0, (shape.requests, shape.candidates, 1))
        hidden = torch.cat([history, own], 2).flatten(0, 2)
        for block in blocks:
            query, key, value = before(block, hidden, packing)
            hidden = behind(block, hidden, library_attention(query, key, value, packing))
        return hidden[last_T]

    return step


def library_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """The library's variable-length FlashAttention where it is; rivals do not read our kernels."""
    if query_Thd.is_cuda and query_Thd.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        lengths = (packing.offsets, packing.offsets, packing.longest, packing.longest)
        return varlen_attn(query_Thd, key_Thd, value_Thd, *lengths, window_size=(-1, 0))  # type: ignore[return-value]
    return packed_causal_attention(query_Thd, key_Thd, value_Thd, packing)


@dataclass(frozen=True, slots=True)
class Ours:
    """The two passes over prepared places: what a CUDA graph holds."""

    context: ContextPass
    events: Packing
    candidates: Packing
    cache: KeyValueCache
    """Of a context pass done before."""
    event_ED: torch.Tensor
    candidate_TD: torch.Tensor

    @classmethod
    def prepare(
        cls, context: ContextPass, event_ED: torch.Tensor, candidate_TD: torch.Tensor, shape: Shape
    ) -> "Ours":  # fmt: skip
        """Runs the context pass once."""
        offsets = shape.offsets(shape.history)
        time_us_E = torch.zeros(len(event_ED), dtype=torch.int64, device=event_ED.device)
        cache, _ = context(event_ED, offsets, time_us_E)
        return cls(
            context, Packing.of(offsets, shape.head_dim, time_us_E),
            behind_histories(shape.offsets(shape.candidates), cache, 1), cache, event_ED, candidate_TD,
        )  # fmt: skip

    def both(self) -> torch.Tensor:
        """Context pass and crossing pass."""
        layers, _ = self.context.read(self.event_ED, self.events)
        return self.context.cross_packed(self.candidate_TD, self.candidates, replace(self.cache, layers=layers))

    def decode(self, cache: KeyValueCache) -> torch.Tensor:
        """The crossing pass over what is kept."""
        return self.context.cross_packed(self.candidate_TD, self.candidates, cache)


@torch.no_grad()
def check_small() -> float:
    """Largest difference of the two passes from the undivided stack, in float64 on the CPU; asserts 1e-11."""
    shape = replace(QUICK_SERVING, layers=3, history=37, candidates=9, requests=3)
    blocks = [block.double().eval() for block in shape.blocks()]
    event_ED, candidate_TD = shape.draw(torch.float64, torch.device("cpu"))
    exact = dense_stack(blocks, event_ED, candidate_TD, shape, is_compiled=False)()
    ours = Ours.prepare(ContextPass(blocks), event_ED, candidate_TD, shape)
    own_places = own_packing(shape, torch.device("cpu"))
    own = own_histories(blocks, event_ED, candidate_TD, shape, own_places, is_compiled=False)()
    worst = max(float((found - exact).abs().max()) for found in (ours.both(), ours.decode(ours.cache), own))
    assert worst < 1e-11, f"the two passes are off by {worst:.1e} in float64"
    return worst


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two rankings of each request's candidates, by random heads."""

    best_10: float
    """Share of the best 10 of one that are among the best 10 of the other."""
    best_100: float
    rank_correlation: float
    """Spearman's."""

    def __str__(self) -> str:
        return f"best 10 {self.best_10:.3f}, best 100 {self.best_100:.3f}, rank correlation {self.rank_correlation:.5f}"


def agreement(found_TD: torch.Tensor, wanted_TD: torch.Tensor, shape: Shape) -> Agreement:
    """Scores are dot products with random vectors, in float64; all is averaged over requests and heads."""
    random = torch.Generator().manual_seed(4)
    head_Dk = torch.randn(shape.width, HEADS, generator=random, dtype=torch.float64).to(found_TD.device)
    found, wanted = (
        (x.double() @ head_Dk).unflatten(0, (shape.requests, -1)).transpose(1, 2) for x in (found_TD, wanted_TD)
    )

    def share(best: int) -> float:
        count = min(best, shape.candidates)
        one, two = (torch.zeros_like(x).scatter_(-1, x.topk(count).indices, 1.0) for x in (found, wanted))
        return float((one * two).sum(-1).mean() / count)

    ranks = [x.argsort(-1).argsort(-1).double() for x in (found, wanted)]
    one, two = (x - x.mean(-1, keepdim=True) for x in ranks)
    correlation = (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))
    return Agreement(share(10), share(100), float(correlation.mean()))


@torch.inference_mode()
def serve(device: torch.device, shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """Check, time in turn, and the entries to record."""
    print(f"float64, small: two passes off the undivided stack by {check_small():.1e}", flush=True)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_compiled = device.type == "cuda"
    exact_blocks = [block.to(device).eval() for block in shape.blocks()]
    event_ED, candidate_TD = shape.draw(torch.float32, device)
    exact = dense_stack(exact_blocks, event_ED, candidate_TD, shape, is_compiled=False)().double()
    blocks = [copy.deepcopy(block).to(half) for block in exact_blocks]
    event_ED, candidate_TD = shape.draw(half, device)
    ours = Ours.prepare(ContextPass(blocks, is_compiled=is_compiled), event_ED, candidate_TD, shape)
    ours_fp8 = Ours.prepare(
        ContextPass(blocks, is_compiled=is_compiled, product_dtype=FP8), event_ED, candidate_TD, shape
    )
    caches = {"bfloat16": ours.cache, "fp8": ours.cache.quantised(torch.float8_e4m3fn)}
    caches["int8"] = ours.cache.quantised(torch.int8)
    prefill = dense_stack(blocks, event_ED, candidate_TD, shape, is_compiled=is_compiled)
    part = replace(shape, requests=1, candidates=min(OWN_PART, shape.candidates))
    slices = event_ED[: shape.history], candidate_TD[: part.candidates]
    own = own_histories(blocks, *slices, part, own_packing(part, device), is_compiled=is_compiled)
    prefill_fp8 = dense_stack(blocks, event_ED, candidate_TD, shape, is_compiled=is_compiled, is_quantised=True)
    steps: dict[str, Step] = {
        "context and crossing": ours.both, "context and crossing, fp8 products": ours_fp8.both,
        "prefill": prefill, "prefill, fp8 products": prefill_fp8, "own histories": own,
    }  # fmt: skip
    for name, cache in caches.items():
        steps[f"decode, {name}"] = lambda cache=cache: ours.decode(cache)  # type: ignore[misc]
        steps[f"decode, {name}, fp8 products"] = lambda cache=cache: ours_fp8.decode(cache)  # type: ignore[misc]
    found = {name: step() for name, step in steps.items()}
    errors = {name: off(x, exact[: len(x)]) for name, x in found.items()}
    rankings = {
        f"{name} and {other}": agreement(found[name], wanted, shape)
        for name, other, wanted in (
            ("decode, bfloat16", "float32", exact),
            ("decode, fp8", "decode, bfloat16", found["decode, bfloat16"]),
            ("decode, bfloat16, fp8 products", "decode, bfloat16", found["decode, bfloat16"]),
            ("decode, fp8, fp8 products", "decode, bfloat16", found["decode, bfloat16"]),
            ("decode, fp8, fp8 products", "float32", exact),
        )
    }
    for name, one in rankings.items():
        print(f"  {name}: {one}", flush=True)
    del found
    for name in ("context and crossing", "decode, bfloat16"):
        assert errors[name] <= 2 * errors["prefill"] + 1e-5, f"{name} is off by {errors[name]:.1e}"
    factor = {"own histories": shape.requests * shape.candidates / part.candidates}
    ready = {name: graphed(step, device) for name, step in steps.items()}
    rounds = [{name: factor.get(name, 1.0) * median_ms(step, device) for name, step in ready.items()}
              for _ in range(repeats)]  # fmt: skip
    ms = {name: statistics.median(one[name] for one in rounds) for name in steps}
    for name in steps:
        spread = (max(one[name] for one in rounds) - min(one[name] for one in rounds)) / ms[name]
        kept = f", {caches[name[8:]].num_bytes / 1e6:.0f} MB kept" if name[8:] in caches else ""
        print(f"  {name:34} {ms[name]:10.3f} ms  off {errors[name]:.1e}  spread {spread:.1%}{kept}", flush=True)
    note = (
        "; ".join(f"{name} {ms[name]:.3f} ms (off {errors[name]:.1e})" for name in steps)
        + f"; own histories: {part.candidates} candidates of one request timed, scaled to "
        f"{shape.requests * shape.candidates}; rankings by {HEADS} random heads: "
        + "; ".join(f"{name}: {one}" for name, one in rankings.items())
    )

    def entry(measure: str, rival: str, mine: str, target: float | None, remark: str = "") -> dict[str, Any]:
        return {
            "measure": f"dcat.stack.{measure}", "value": round(ms[rival] / ms[mine], 2), "unit": "x as fast",
            "target": target, "rival": rival, "rival_value": 1, "note": remark + note,
        }  # fmt: skip

    against_fp8 = (
        f"fp8 kept and fp8 products over the bfloat16 prefill; over a prefill with the same fp8 products "
        f"{ms['prefill, fp8 products'] / ms['decode, fp8, fp8 products']:.2f} x; "
    )
    return [
        entry("over_flash_self_attention", "own histories", "context and crossing", 7.0),
        entry("over_sdpa_prefill", "prefill", "decode, bfloat16", 3.0),
        entry("fp8_over_sdpa_prefill", "prefill", "decode, fp8, fp8 products", 3.92, against_fp8),
        entry("fp8_over_fp8_prefill", "prefill, fp8 products", "decode, fp8, fp8 products", None),
        entry("fp8_kept_over_sdpa_prefill", "prefill", "decode, fp8", None),
        entry("int8_over_sdpa_prefill", "prefill", "decode, int8, fp8 products", None),
        entry("both_passes_over_sdpa_prefill", "prefill", "context and crossing", None),
        entry("both_passes_fp8_over_sdpa_prefill", "prefill", "context and crossing, fp8 products", None),
    ]


# Training


class Ranker(nn.Module):
    """Items embedded, the stack, one logit a candidate: by the two passes or with a history for each candidate."""

    def __init__(self, shape: Shape, items: int, *, is_deduplicated: bool, is_compiled: bool, **options: Any) -> None:
        super().__init__()
        self.shape, self.is_deduplicated = shape, is_deduplicated
        blocks = shape.blocks()
        self.item = nn.Embedding(items, shape.width)
        self.out = nn.Linear(shape.width, 1)
        self.context = ContextPass(blocks, "in training", is_compiled=is_compiled, **options)
        self.is_compiled = is_compiled
        self.places: tuple[Packing, ...] = ()

    def place(self, device: torch.device) -> "Ranker":
        """Works out where everything stands, which is the same in every step and the host's work. Returns itself."""
        shape = self.shape
        if not self.is_deduplicated:
            self.places = (own_packing(shape, device),)
            return self
        time_us_E = torch.zeros(shape.requests * shape.history, dtype=torch.int64, device=device)
        events = Packing.of(shape.offsets(shape.history), shape.head_dim, time_us_E)
        self.places = events, behind_histories(shape.offsets(shape.candidates), self.cache(events, ()), 1)
        return self

    def cache(self, events: Packing, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> KeyValueCache:
        """What candidates cross; without layers only to place them by."""
        shape = self.shape
        nothing = events.cos_Td.new_empty(0, shape.heads, shape.head_dim)
        kept = tuple(layers) or ((nothing, nothing),)
        return KeyValueCache(kept, shape.offsets(shape.history), events.offsets, events.user_T, self.context.version)

    def forward(self, history_RS: torch.Tensor, candidate_RC: torch.Tensor) -> torch.Tensor:
        """Logits [R x C]."""
        shape = self.shape
        assert self.places, "place comes first"
        event_ED, candidate_TD = self.item(history_RS).flatten(0, 1), self.item(candidate_RC).flatten(0, 1)
        if self.is_deduplicated:
            events, candidates = self.places
            layers, _ = self.context.read(event_ED, events)
            hidden_TD = self.context.cross_packed(candidate_TD, candidates, self.cache(events, layers))
        else:
            blocks, packing = [layer.block for layer in self.context._layers()], self.places[0]
            hidden_TD = own_histories(blocks, event_ED, candidate_TD, shape, packing, is_compiled=self.is_compiled)()
        return self.out(hidden_TD).flatten()  # type: ignore[no-any-return]


def examples(shape: Shape, items: int, device: torch.device, steps: int) -> list[tuple[torch.Tensor, ...]]:
    """Items of histories and candidates and what is to be told: whether a candidate's kind is among the two that its
    history has most of, 1 in 8 told wrongly."""
    random = torch.Generator().manual_seed(2)
    kinds, made = 8, []
    for _ in range(steps):
        liked_R2 = torch.randint(0, kinds, (shape.requests, 2), generator=random)
        is_liked = torch.rand(shape.requests, shape.history, generator=random) < 0.5
        which = torch.randint(0, 2, is_liked.shape, generator=random)
        kind_RS = torch.where(
            is_liked, liked_R2.gather(1, which), torch.randint(0, kinds, is_liked.shape, generator=random)
        )
        row_RS = torch.randint(0, items // kinds, is_liked.shape, generator=random)
        candidate_RC = torch.randint(0, items, (shape.requests, shape.candidates), generator=random)
        told_RC = (candidate_RC[..., None] % kinds == liked_R2[:, None]).any(-1)
        told_RC ^= torch.rand(told_RC.shape, generator=random) < 0.125
        made.append((row_RS * kinds + kind_RS, candidate_RC, told_RC.float().flatten()))
    return [tuple(x.to(device) for x in one) for one in made]


class Arm:
    """A ranker in training."""

    def __init__(self, ranker: Ranker, device: torch.device, dtype: torch.dtype | None) -> None:
        """dtype: of matrix products; None: float32."""
        self.ranker, self.device, self.dtype = ranker.to(device).place(device), device, dtype
        is_cuda = device.type == "cuda"
        self.optimiser = torch.optim.AdamW(ranker.parameters(), lr=3e-4, fused=is_cuda, capturable=is_cuda)
        self.scale = 1024.0 if dtype == torch.float16 else 1.0

    def step(self, example: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Forward, backward, optimiser; the loss, on the device."""
        history_RS, candidate_RC, told_T = example
        self.optimiser.zero_grad(set_to_none=True)
        mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.dtype is not None:  # a weight is cast where it is used: a graph may hold no copy made outside it
            mode = torch.autocast(self.device.type, self.dtype, cache_enabled=False)
        with mode:
            loss = F.binary_cross_entropy_with_logits(self.ranker(history_RS, candidate_RC), told_T)
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]
        if self.scale != 1:
            torch._foreach_div_([p.grad for p in self.ranker.parameters() if p.grad is not None], self.scale)
        self.optimiser.step()
        return loss.detach()

    def graphed(self, example: tuple[torch.Tensor, ...]) -> "GraphedArm":
        """The same training goes on as replays of one CUDA graph that holds a whole step; this arm's own steps are
        over. On CUDA."""
        inputs = tuple(x.clone() for x in example)
        torch.cuda.empty_cache()  # each stream and each graph has memory of its own
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(inputs)
        return GraphedArm(self, graph, inputs, loss)

    def losses(self, made: Sequence[tuple[torch.Tensor, ...]]) -> list[float]:
        """Of one step an example."""
        return torch.stack([self.step(one) for one in made]).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class GraphedArm:
    """A ranker in training, a step being one launch."""

    arm: Arm
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    loss: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Of the ranker."""
        return self.arm.device

    def step(self, example: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Forward, backward, optimiser; the loss, on the device, until the next step."""
        for mine, theirs in zip(self.inputs, example, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.loss


def step_ms(arm: Arm | GraphedArm, made: Sequence[tuple[torch.Tensor, ...]], count: int) -> float:
    """Of one step, `count` in a row."""
    wait(arm.device)
    started = time.perf_counter()
    for example in itertools.islice(itertools.cycle(made), count):
        arm.step(example)
    wait(arm.device)
    return 1e3 * (time.perf_counter() - started) / count


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(arm: Arm, example: tuple[torch.Tensor, ...]) -> float:
    """Most memory of a step beyond what stood before it; 0 on the CPU, which does not count."""
    if arm.device.type != "cuda":
        return 0.0
    wait(arm.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step(example)
    wait(arm.device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def check_gradients() -> float:
    """Largest difference of loss and gradients between the two ways, float64 on the CPU; asserts 1e-11."""
    shape = replace(QUICK_TRAINING, requests=3)
    rankers = [
        Ranker(shape, 64, is_deduplicated=a, is_compiled=False, is_recomputed=b).double()
        for a, b in ((True, False), (True, True), (False, False))
    ]
    for ranker in rankers:
        ranker.place(torch.device("cpu"))
    for ranker in rankers[1:]:
        ranker.load_state_dict(rankers[0].state_dict())
    history_RS, candidate_RC, told_T = examples(shape, 64, torch.device("cpu"), 1)[0]
    found = []
    for ranker in rankers:
        loss = F.binary_cross_entropy_with_logits(ranker(history_RS, candidate_RC), told_T.double())
        found.append([loss.detach(), *torch.autograd.grad(loss, list(ranker.parameters()))])
    worst = max(float((a - b).abs().max()) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert worst < 1e-11, f"loss or gradients differ by {worst:.1e}"
    return worst


def train(device: torch.device, shape: Shape, repeats: int, steps: int) -> list[dict[str, Any]]:
    """Check, loss curves, times; the entry to record."""
    print(f"float64, small: loss and gradients differ by {check_gradients():.1e}", flush=True)
    is_compiled = device.type == "cuda"
    items = 4096 if device.type == "cuda" else 64
    half = torch.bfloat16 if device.type == "cuda" else None
    made = examples(shape, items, device, steps)

    def arm(*, is_deduplicated: bool, dtype: torch.dtype | None = half, **options: Any) -> Arm:
        torch.manual_seed(3)
        ranker = Ranker(shape, items, is_deduplicated=is_deduplicated, is_compiled=is_compiled, **options)
        return Arm(ranker, device, dtype)

    kinds: dict[str, Callable[[], Arm]] = {
        "ours": lambda: arm(is_deduplicated=True),
        "ours, recomputed": lambda: arm(is_deduplicated=True, is_recomputed=True),
        "naive": lambda: arm(is_deduplicated=False),
    }
    curves = {name: kinds[name]().losses(made) for name in ("ours", "naive")}
    other = torch.float16 if device.type == "cuda" else torch.bfloat16
    curves["naive, other rounding"] = arm(is_deduplicated=False, dtype=other).losses(made)
    for name, curve in curves.items():
        shown = " ".join(f"{loss:.4f}" for loss in curve[:: max(1, steps // 10)])
        print(f"  {name:24} {shown} ... {curve[-1]:.4f}", flush=True)
    ours_gap, noise = (
        max(abs(a - b) for a, b in zip(curves[name], curves["naive"], strict=True))
        for name in ("ours", "naive, other rounding")
    )
    print(f"  largest difference from naive: ours {ours_gap:.2e}, naive in another rounding {noise:.2e}", flush=True)
    assert ours_gap <= noise + 1e-5, f"the loss curve is off by {ours_gap:.2e}, rounding alone by {noise:.2e}"
    eager = {name: make() for name, make in kinds.items()}
    memory = {name: peak_mb(arm, made[0]) for name, arm in eager.items()}
    arms: dict[str, Arm | GraphedArm] = dict(eager)
    if device.type == "cuda":
        # Weights and data are as before: a graph must go on where steps one by one would.
        for name in ("ours", "naive"):
            graph, check = kinds[name]().graphed(made[0]), kinds[name]()
            expected = [check.step(example) for example in (*[made[0]] * 3, *made[1:4])][3:]
            found = [graph.step(example).clone() for example in made[1:4]]
            worst = max(float((a - b).abs()) for a, b in zip(found, expected, strict=True))
            assert worst < 1e-3, f"a graph's losses are off by {worst:.1e}"
            arms[f"{name}, graphed"] = graph
    count = 10 if device.type == "cuda" else 1
    rounds: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        one = {name: step_ms(arm, made, count) for name, arm in arms.items()}
        rounds += [one] if repeat else []
    ms = {name: statistics.median(one[name] for one in rounds) for name in arms}
    shown = {
        name: f"{name} {ms[name]:.2f} ms" + (f", {memory[name]:.0f} MB" if name in memory else "") for name in arms
    }
    for line in shown.values():
        print(f"  {line}", flush=True)
    way = ", graphed" if device.type == "cuda" else ""
    eager_gain, gain = ms["naive"] / ms["ours"], ms[f"naive{way}"] / ms[f"ours{way}"]
    print(f"  launched one by one {eager_gain:.2f} x, as graphs {gain:.2f} x", flush=True)
    return [
        {
            "measure": "dcat.train_step.over_naive", "value": round(gain, 2), "unit": "x as fast",
            "target": 3.0, "rival": "naive", "rival_value": 1,
            "note": "; ".join(shown.values()) + f"; launched one by one {eager_gain:.2f} x"
            + f"; {steps} steps, largest difference of the losses from the naive ones {ours_gap:.1e}, of two naive "
            f"runs in bfloat16 and float16 {noise:.1e}; last loss {curves['ours'][-1]:.4f}",
        }
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Check, compare, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.dcat_stack", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=("serve", "train"), default=("serve", "train"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes; records nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the loss curves")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu" and not args.quick:
        parser.error("these shapes are a GPU's: on the CPU only --quick, which checks and measures nothing")
    repeats = 1 if args.quick else args.repeats
    entries: list[dict[str, Any]] = []
    with fixed_sizes():
        if "serve" in args.only:
            entries += serve(device, QUICK_SERVING if args.quick else SERVING, repeats)
        if "train" in args.only:
            shape, steps = (QUICK_TRAINING, 5) if args.quick else (TRAINING, args.steps)
            entries += train(device, shape, repeats, steps)
    for entry in entries:
        print(f"{entry['measure']} {entry['value']} (target {entry['target']})", flush=True)
    if device.type == "cuda" and not args.quick and not args.no_record:
        installed = versions("torch", "triton", "numpy")
        record(THEME, [{**entry, "versions": installed} for entry in entries])
    return 0


@contextlib.contextmanager
def fixed_sizes() -> Iterator[None]:
    """All arms compiled for each size they meet, none for sizes in general."""
    from torch._dynamo import config

    with config.patch(recompile_limit=64, accumulated_recompile_limit=1024, automatic_dynamic_shapes=False):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
