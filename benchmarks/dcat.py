"""Crossing attention beside what a user would pick today, and beside the physical floor.

python -m benchmarks.dcat --device cuda [--backward] [--rows S2048 ragged] [--tune] [--no-record]
python -m benchmarks.dcat --device cpu --quick     # checks the logic on tiny shapes, kernels in Triton's interpreter

Every row is checked against float64 first (output, gradients, the same bits however the work is shared out, and for a
candidate alone), then timed beside its rivals: CUDA graphs, events, caches flushed, all arms in turn, medians.
Rivals: attention to the history by cuDNN, FlashAttention-2 or its variable-length form, with the candidate's own token
merged through the logarithm of the denominator; FlexAttention; and histories repeated for each candidate ("repeated",
quoted for the record: any deduplication beats it).

Legend: R requests, C candidates, S history events, H heads, D channels of a head, T candidates of all requests.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.results import record, versions

Tensors = tuple[torch.Tensor, ...]
Step = Callable[[], Any]

MATMUL_FLOPS_PER_S = 793e12
COPY_BYTES_PER_S = 3.02e12
"""Ceilings measured on an H100 80GB HBM3: the floors are of that card, whatever card runs this."""
FLUSH_BYTES = 256 << 20
aten = torch.ops.aten


BACKWARD_SETTINGS = {
    "query": [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 32, 8, 3), (128, 128, 8, 2),
    ],
    "history": [
        (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3),
        (64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 2),
    ],
}  # fmt: skip
"""Of the two kernels of the backward pass: rows, keys, warps and stages that --tune tries."""


@dataclass(frozen=True, slots=True)
class Row:
    """A shape, and how many times its floor we aim at."""

    candidates: tuple[int, ...]
    histories: tuple[int, ...]
    heads: int
    head_dim: int
    target: float | None
    train_target: float | None = None
    title: str = ""

    @property
    def name(self) -> str:
        """As it stands in the measures."""
        shape = f"S{self.histories[0]}_C{self.candidates[0]}_R{len(self.histories)}_H{self.heads}_D{self.head_dim}"
        return self.title or shape

    @property
    def is_uniform(self) -> bool:
        """Whether all requests are alike, so that rivals may take one batch without gaps."""
        return len(set(self.candidates)) == 1 and len(set(self.histories)) == 1

    def floor_ms(self, *, is_training: bool = False) -> float:
        """The larger of the time of its products and that of the bytes it must move, each once.

        Training: 2 products forward and 5 backward; keys and values read twice and their gradients written, of the
        candidates 13 tensors moved in place of 4.
        """
        pairs = sum(c * (s + 1) for c, s in zip(self.candidates, self.histories, strict=True))
        width_bytes = 2 * self.heads * self.head_dim
        flops = (14 if is_training else 4) * self.heads * self.head_dim * pairs
        kept, own = 2 * sum(self.histories) * width_bytes, sum(self.candidates) * width_bytes
        moved = 3 * kept + 13 * own if is_training else kept + 4 * own
        return 1e3 * max(flops / MATMUL_FLOPS_PER_S, moved / COPY_BYTES_PER_S)


def uniform(
    s: int, c: int, r: int, h: int, d: int, target: float | None, train_target: float | None = None
) -> Row:  # fmt: skip
    """R requests of C candidates and S events each."""
    return Row((c,) * r, (s,) * r, h, d, target, train_target)


def ragged() -> Row:
    """32 requests of 64 to 1,024 candidates and 64 to 16,384 events, log-normal, one of the longest among them."""
    random = np.random.RandomState(3)  # the lengths of the recorded baselines
    histories = np.clip(np.exp(random.normal(math.log(2500), 1.1, 32)), 64, 16384).astype(int)
    histories[0] = 16384
    candidates = random.randint(64, 1025, 32)
    return Row(tuple(candidates.tolist()), tuple(histories.tolist()), 8, 64, 1.6, title="ragged")


def all_rows() -> list[Row]:
    """What is measured on a GPU."""
    return [
        uniform(512, 128, 32, 8, 64, 1.40),
        uniform(2048, 512, 16, 8, 64, 1.60, 1.90),
        uniform(2048, 512, 16, 4, 128, 1.30, 1.60),
        uniform(8192, 128, 16, 8, 64, 1.10, 1.50),
        uniform(8192, 512, 8, 8, 64, 1.50),
        uniform(8192, 512, 8, 4, 128, 1.18, 1.50),
        uniform(16384, 1024, 8, 8, 64, 1.45, 1.70),
        uniform(16384, 1024, 8, 4, 128, 1.10),
        uniform(16384, 128, 1, 8, 64, 1.60),
        uniform(16384, 512, 1, 4, 128, 1.60),
        ragged(),
    ]


QUICK = [
    uniform(96, 20, 2, 2, 32, None, 1.0),
    Row((8, 0, 24), (40, 64, 96), 2, 32, None, 1.0, title="ragged"),
]


@dataclass(frozen=True, slots=True)
class Problem:
    """Random inputs of a row, packed as our kernel takes them."""

    row: Row
    tensors: Tensors
    """Query, own key and value [T, H, D], history key and value [sum of S, H, D]."""
    gradient: torch.Tensor
    candidate_offsets: torch.Tensor
    history_offsets: torch.Tensor

    @classmethod
    def draw(cls, row: Row, device: torch.device) -> "Problem":
        """In bfloat16."""
        random = torch.Generator(device).manual_seed(0)
        own, events = sum(row.candidates), sum(row.histories)
        drawn = [
            torch.randn(n, row.heads, row.head_dim, device=device, generator=random).bfloat16()
            for n in (own, own, own, events, events, own)
        ]
        starts = [
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
            for lengths in (row.candidates, row.histories)
        ]
        return cls(row, tuple(drawn[:5]), drawn[5], *starts)

    def ours(self, tiles: Any = None, tensors: Tensors | None = None) -> torch.Tensor:
        """Crossing attention's output."""
        from model.kernels.crossing_attention_triton import crossing_attention_kernel

        out, _ = crossing_attention_kernel(
            *(tensors or self.tensors), self.candidate_offsets, self.history_offsets,
            longest_history=max(self.row.histories), tiles=tiles,
        )  # fmt: skip
        return out

    def requests(self) -> Iterator[tuple[slice, slice]]:
        """Of each request the candidates' rows and the history's."""
        starts, events = (np.cumsum([0, *x]).tolist() for x in (self.row.candidates, self.row.histories))
        for (a, b), (c, d) in zip(itertools.pairwise(starts), itertools.pairwise(events), strict=True):
            yield slice(a, b), slice(c, d)

    def batched(self) -> Tensors:
        """Query, own and history keys and values as [R, H, ., D], each contiguous; of a uniform row."""
        shape = (len(self.row.histories), -1, self.row.heads, self.row.head_dim)
        return tuple(x.reshape(shape).transpose(1, 2).contiguous() for x in self.tensors)

    def packed(self, out_RHCD: torch.Tensor) -> torch.Tensor:
        """A batched output as ours is."""
        return out_RHCD.transpose(1, 2).reshape(self.tensors[0].shape)


# Checks


def exact(problem: Problem, own: slice, history: slice, head: int) -> Tensors:
    """Output and gradients of one request and head in float64."""
    places = (own, own, own, history, history)
    leaves = [x[place, head].double().requires_grad_() for x, place in zip(problem.tensors, places, strict=True)]
    query, key, value, history_key, history_value = leaves
    with torch.enable_grad():
        score = torch.cat([query @ history_key.T, (query * key).sum(-1, keepdim=True)], -1) * query.shape[-1] ** -0.5
        share = score.softmax(-1)
        out = share[:, :-1] @ history_value + share[:, -1:] * value
    return (out.detach(), *torch.autograd.grad(out, leaves, problem.gradient[own, head].double()))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Length of the difference over the length of what is wanted; NaN counts as infinite."""
    ratio = float((found.double() - wanted).norm() / wanted.norm())
    return ratio if math.isfinite(ratio) else math.inf


def error_of(problem: Problem, found: Sequence[torch.Tensor]) -> float:
    """Largest error of output (and gradients, where given) over the first and last request that have candidates."""
    chosen = [pair for pair in problem.requests() if pair[0].start < pair[0].stop]
    worst = 0.0
    for (own, history), head in ((chosen[0], 0), (chosen[-1], problem.row.heads - 1)):
        places = (own, own, own, own, history, history)
        for one, place, two in zip(found, places, exact(problem, own, history, head), strict=False):
            worst = max(worst, off(one[place, head], two))
    return worst


def check(problem: Problem, *, is_training: bool) -> float:
    """The error against float64. Raises AssertionError where ours is wrong or its bits depend on its company."""
    from model.kernels.crossing_attention_triton import choose_forward_tiles

    out = problem.ours()
    found = [out]
    if is_training:
        found = list(training_step(problem, problem.ours)())
        again = training_step(problem, problem.ours)()
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True)), "other bits in another run"
    error = error_of(problem, found)
    assert error < (2e-2 if is_training else 1e-2), (
        f"{problem.row.name}: off by {error:.1e} of the exact result's length"
    )
    tiles = choose_forward_tiles(out, len(problem.candidate_offsets) - 1, max(problem.row.histories))
    for is_split in (False, True):
        assert torch.equal(out, problem.ours(replace(tiles, is_split=is_split))), f"other bits with {is_split=}"
    own, history = next(pair for pair in problem.requests() if pair[0].start < pair[0].stop)
    last = slice(own.stop - 1, own.stop)
    places = (last, last, last, history, history)
    alone = replace(
        problem,
        row=replace(problem.row, candidates=(1,), histories=(history.stop - history.start,)),
        tensors=tuple(x[place] for x, place in zip(problem.tensors, places, strict=True)),
        candidate_offsets=torch.tensor([0, 1], dtype=torch.int32, device=out.device),
        history_offsets=torch.tensor([0, history.stop - history.start], dtype=torch.int32, device=out.device),
    )
    # The interpreter's products are numpy's, which round a row by its place in the matrix; a GPU's do not.
    if out.is_cuda:
        assert torch.equal(alone.ours(), out[last]), "other bits alone than in company"
    else:
        torch.testing.assert_close(alone.ours(), out[last], rtol=2e-2, atol=2e-2)
    return error


# Rivals


def merge_self(
    read: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> Tensors:
    """Output and log of the denominator once the candidate's own token has joined what it read of the history."""
    score = (query.float() * key.float()).sum(-1) * scale
    largest = torch.maximum(lse, score)
    old, new = torch.exp(lse - largest), torch.exp(score - largest)
    total = old + new
    out = read.float() * (old / total)[..., None] + value.float() * (new / total)[..., None]
    return out.to(query.dtype), largest + torch.log(total)


def self_gradients(
    gradient: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, query_gradient: torch.Tensor, scale: float,
) -> Tensors:  # fmt: skip
    """Gradients of query, own key and own value, given the part of the query's that comes through the history."""
    dout, q, k, v = gradient.float(), query.float(), key.float(), value.float()
    share = torch.exp((q * k).sum(-1) * scale - lse)
    score = share * ((dout * v).sum(-1) - (dout * out.float()).sum(-1)) * scale
    of_query = query_gradient.float() + score[..., None] * k
    return of_query.to(query.dtype), (score[..., None] * q).to(query.dtype), (share[..., None] * dout).to(query.dtype)


@cache
def compiled(function: Callable[..., Tensors], device: str) -> Callable[..., Tensors]:
    """Fused for a GPU, as it is for the CPU."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def read_history(library: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Any:
    """Output, log of denominators [R, H, C] and all else of history attention by the library's own operator."""
    if not query.is_cuda:
        score = query.float() @ key.float().transpose(-1, -2) * scale
        return (score.softmax(-1) @ value.float()).to(query.dtype), score.logsumexp(-1), None
    if library == "FlashAttention-2":
        kept = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
    else:
        kept = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, False, False, scale=scale)
    return kept[0], kept[1].reshape(query.shape[:3]), kept


class _Merged(torch.autograd.Function):
    """A library's history attention with the own token merged; its backward gets the merged output and denominator."""

    @staticmethod
    def forward(ctx: Any, query, key, value, history_key, history_value, library):  # type: ignore[no-untyped-def]
        scale = query.shape[-1] ** -0.5
        read, lse, kept = read_history(library, query, history_key, history_value, scale)
        out, lse = compiled(merge_self, query.device.type)(read, lse, query, key, value, scale)
        ctx.save_for_backward(query, key, value, history_key, history_value, out, lse)
        ctx.library, ctx.kept = library, kept
        return out

    @staticmethod
    def backward(ctx: Any, gradient):  # type: ignore[no-untyped-def]
        query, key, value, history_key, history_value, out, lse = ctx.saved_tensors
        scale, kept = query.shape[-1] ** -0.5, ctx.kept
        if not query.is_cuda:
            share = torch.exp(query.float() @ history_key.float().mT * scale - lse[..., None])
            through = gradient.float() @ history_value.float().mT
            score = share * (through - (gradient.float() * out.float()).sum(-1, keepdim=True)) * scale
            parts = (score @ history_key.float(), score.mT @ query.float(), share.mT @ gradient.float())
        elif ctx.library == "FlashAttention-2":
            parts = aten._scaled_dot_product_flash_attention_backward(
                gradient, query, history_key, history_value, out, lse, *kept[2:6], 0.0, False, *kept[6:8], scale=scale
            )
        else:
            parts = aten._scaled_dot_product_cudnn_attention_backward(
                gradient, query, history_key, history_value, out, lse.reshape(kept[1].shape), *kept[6:8], None,
                *kept[2:6], 0.0, False, scale=scale,
            )  # fmt: skip
        own = compiled(self_gradients, query.device.type)(gradient, out, lse, query, key, value, parts[0], scale)
        return (*own, parts[1].to(query.dtype), parts[2].to(query.dtype), None)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to do a row."""

    name: str
    step: Step
    to_ours: Callable[[Any], list[torch.Tensor]]
    """What the step returns as our output (and gradients)."""
    factor: float = 1.0
    """Times the step's time: where only a part could be run."""
    is_checked: bool = True


def forward_rivals(problem: Problem) -> Iterator[Callable[[], Arm]]:
    """What else could do the forward pass."""
    row, scale = problem.row, problem.row.head_dim**-0.5
    device = problem.gradient.device
    if row.is_uniform:
        for library in ("cuDNN", "FlashAttention-2"):

            def batched(library: str = library) -> Arm:
                query, key, value, history_key, history_value = problem.batched()
                merge = compiled(merge_self, device.type)

                def step() -> torch.Tensor:
                    read, lse, _ = read_history(library, query, history_key, history_value, scale)
                    return merge(read, lse, query, key, value, scale)[0]

                return Arm(f"{library}, merged", step, lambda out: [problem.packed(out)])

            yield batched
        yield lambda: repeated(problem)
    if device.type == "cuda":
        yield lambda: variable_length(problem)
    yield lambda: flex_arm(problem, is_training=False)


def variable_length(problem: Problem) -> Arm:
    """FlashAttention-2 over packed requests."""
    query, key, value, history_key, history_value = problem.tensors
    row, scale = problem.row, problem.row.head_dim**-0.5
    merge = compiled(merge_self, "cuda")

    def step() -> torch.Tensor:
        read, lse_HT, *_ = aten._flash_attention_forward(
            query, history_key, history_value, problem.candidate_offsets, problem.history_offsets,
            max(row.candidates), max(row.histories), 0.0, False, False, scale=scale,
        )  # fmt: skip
        return merge(read, lse_HT.transpose(0, 1), query, key, value, scale)[0]

    return Arm("varlen FlashAttention-2, merged", step, lambda out: [out])


def flex_arm(problem: Problem, *, is_training: bool) -> Arm:
    """FlexAttention over histories and own tokens side by side, under a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = problem.gradient.device
    attention, make_mask = flex_attention, create_block_mask
    if device.type == "cuda":
        attention, make_mask = (torch.compile(f, dynamic=False) for f in (flex_attention, create_block_mask))
    row, events = problem.row, sum(problem.row.histories)
    if row.is_uniform:
        query, key, value, history_key, history_value = problem.batched()
        length, own = row.histories[0], row.candidates[0]
        gradient = problem.gradient.reshape(len(row.histories), own, row.heads, row.head_dim).transpose(1, 2)

        def is_seen(batch: Any, head: Any, i: Any, j: Any) -> Any:
            return (j < length) | (j - length == i)
    else:
        query, key, value, history_key, history_value = (x.transpose(0, 1)[None].contiguous() for x in problem.tensors)
        length, own = events, sum(row.candidates)
        gradient = problem.gradient.transpose(0, 1)[None]
        request = torch.arange(len(row.histories), device=device)
        request_T = request.repeat_interleave(torch.tensor(row.candidates, device=device))
        of_key = torch.cat([request.repeat_interleave(torch.tensor(row.histories, device=device)), request_T])

        def is_seen(batch: Any, head: Any, i: Any, j: Any) -> Any:
            return (of_key[j] == request_T[i]) & ((j < length) | (j - length == i))

    leaves = [query, torch.cat([history_key, key], 2), torch.cat([history_value, value], 2)]
    mask = make_mask(is_seen, None, None, own, length + own, device=device)

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(-1, row.heads, row.head_dim)

    if not is_training:
        return Arm("FlexAttention", lambda: attention(*leaves, block_mask=mask), lambda out: [back(out)])
    leaves = [x.requires_grad_() for x in leaves]

    def step() -> Tensors:
        out = attention(*leaves, block_mask=mask)
        return (out, *torch.autograd.grad(out, leaves, gradient))

    def to_ours(found: Tensors) -> list[torch.Tensor]:
        out, query_g, key_g, value_g = found
        own_parts = [back(x[:, :, length:]) for x in (key_g, value_g)]
        return [back(out), back(query_g), *own_parts, *(back(x[:, :, :length]) for x in (key_g, value_g))]

    return Arm("FlexAttention", step, to_ours)


def repeated(problem: Problem) -> Arm:
    """Every candidate's history before it, causal; on as many candidates as fit, scaled to all."""
    row = problem.row
    query, key, value, history_key, history_value = problem.batched()
    events, total = row.histories[0], sum(row.candidates)
    bytes_each = 4 * 2 * (events + 1) * row.heads * row.head_dim
    count = total if total * bytes_each < 12e9 else min(total, max(8, (1 << 17) // events))
    index = torch.arange(count, device=query.device)
    r, c = index % len(row.histories), index // len(row.histories) % row.candidates[0]
    queries, keys, values = (
        torch.cat([history[r], own[r, :, c][:, :, None]], 2)
        for history, own in ((history_key, query), (history_key, key), (history_value, value))
    )

    def step() -> torch.Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    return Arm("repeated", step, lambda out: [out], factor=total / count, is_checked=False)


def training_step(problem: Problem, attention: Callable[..., torch.Tensor]) -> Callable[[], Tensors]:
    """Output and all gradients of ours."""
    leaves = tuple(x.detach().requires_grad_() for x in problem.tensors)

    def step() -> Tensors:
        out = attention(tensors=leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, problem.gradient))

    return step


def training_rivals(problem: Problem) -> Iterator[Callable[[], Arm]]:
    """What else could do both passes."""
    if problem.row.is_uniform:
        for library in ("cuDNN", "FlashAttention-2"):

            def batched(library: str = library) -> Arm:
                leaves = tuple(x.detach().requires_grad_() for x in problem.batched())
                shape = (len(problem.row.histories), -1, problem.row.heads, problem.row.head_dim)
                gradient = problem.gradient.reshape(shape).transpose(1, 2).contiguous()

                def step() -> Tensors:
                    out = _Merged.apply(*leaves, library)  # type: ignore[no-untyped-call]
                    return (out.detach(), *torch.autograd.grad(out, leaves, gradient))

                def to_ours(found: Tensors) -> list[torch.Tensor]:
                    return [x.transpose(1, 2).flatten(0, 1) for x in found]

                return Arm(f"{library}, merged", step, to_ours)

            yield batched
    yield lambda: flex_arm(problem, is_training=True)


# Timing


def median_ms(step: Step, device: torch.device, budget_s: float = 0.15) -> float:
    """Of 5 to 50 runs with cold caches."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - started)
    flush = flush_buffer()

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        return begin, end

    begin, end = timed()
    torch.cuda.synchronize()
    count = int(min(50, max(5, 1e3 * budget_s / max(begin.elapsed_time(end), 1e-3))))
    runs = [timed() for _ in range(count)]
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in runs)


@cache
def flush_buffer() -> torch.Tensor:
    """Larger than the GPU's second-level cache."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def graphed(step: Step, device: torch.device) -> Step:
    """The step as replays of a CUDA graph, so that no launch is waited for."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step, step()  # the step too: it owns the tensors that the graph reads

    def replay() -> Any:
        graph.replay()
        return kept[1]

    replay()
    torch.cuda.synchronize()
    return replay


def ready(make: Callable[[], Arm], problem: Problem) -> Arm | None:
    """The arm, checked and captured; None, with a line, where this machine's libraries cannot do it."""
    name = "a rival"
    try:
        arm = make()
        name = arm.name
        step = graphed(arm.step, problem.gradient.device)
        if arm.is_checked:
            error = error_of(problem, arm.to_ours(step()))
            if error > 2e-2:
                raise ArithmeticError(f"off by {error:.1e}")
        return replace(arm, step=step)
    except Exception as error:  # libraries refuse in many ways; a rival that fails is no reason to measure nothing
        print(f"  {name}: not here: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None


def compare(row: Row, device: torch.device, repeats: int, *, is_training: bool) -> list[dict[str, Any]]:
    """Check a row, time all arms in turn, print, and give the entries to record."""
    kind = "train" if is_training else "fwd"
    problem = Problem.draw(row, device)
    error = check(problem, is_training=is_training)
    floor = row.floor_ms(is_training=is_training)
    print(f"{kind} {row.name}: floor {floor:.4f} ms, ours off by {error:.1e}", flush=True)
    step: Step = training_step(problem, problem.ours) if is_training else problem.ours
    arms = [Arm("ours", graphed(step, device), lambda out: [out])]
    rivals = training_rivals(problem) if is_training else forward_rivals(problem)
    arms += [arm for make in rivals if (arm := ready(make, problem)) is not None]
    rounds = [[arm.factor * median_ms(arm.step, device) for arm in arms] for _ in range(repeats)]
    times = {arm.name: statistics.median(column) for arm, column in zip(arms, zip(*rounds, strict=True), strict=True)}
    for arm, column in zip(arms, zip(*rounds, strict=True), strict=True):
        spread = (max(column) - min(column)) / times[arm.name]
        print(
            f"  {arm.name:34} {times[arm.name]:9.4f} ms  x{times[arm.name] / floor:6.2f}  spread {spread:.1%}",
            flush=True,
        )
    ours = times.pop("ours")
    shown = ", ".join(f"{name} {ms:.4f}" for name, ms in times.items())
    note = f"ours {ours:.4f} ms, floor {floor:.4f}; {shown}; error {error:.1e}"
    prefix = f"dcat.{kind}.{row.name}"
    target = row.train_target if is_training else row.target
    best = min((name for name in times if name != "repeated"), key=times.__getitem__, default=None)
    entries: list[dict[str, Any]] = [
        {
            "measure": f"{prefix}.floor_ratio", "value": round(ours / floor, 3), "unit": "x floor", "target": target,
            "rival": best, "rival_value": best and round(times[best] / floor, 3), "note": note,
        }
    ]  # fmt: skip
    if best is not None:
        entries.append(
            {
                "measure": f"{prefix}.over_best_rival", "value": round(times[best] / ours, 3), "unit": "x as fast",
                "target": target and round(times[best] / floor / target, 3), "rival": best, "rival_value": 1,
            }
        )  # fmt: skip
    return entries


def tune(row: Row, device: torch.device, *, is_training: bool) -> None:
    """Print the times of a few tiles, the fastest last; what is faster here goes into choose_tiles by hand."""
    problem = Problem.draw(row, device)
    if is_training:
        tune_backward(problem)
        return
    from model.kernels.crossing_attention_triton import choose_tiles

    chosen = choose_tiles(row.head_dim, torch.bfloat16)
    shapes = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8), (128, 64, 4), (256, 64, 8)]
    tried = [
        replace(chosen, rows=rows, keys=keys, num_warps=warps, num_stages=stages, chunk=chunk)
        for (rows, keys, warps), stages, chunk in itertools.product(shapes, (2, 3, 4), (1024, 2048, 4096))
    ]
    if device.type != "cuda":
        tried = [replace(chosen, rows=16, keys=16, chunk=32)]
    steps = [(str(tiles), lambda tiles=tiles: [problem.ours(tiles)]) for tiles in tried]
    rank(steps, lambda found: error_of(problem, found), device, row.floor_ms())


def tune_backward(problem: Problem) -> None:
    """The gradients of queries and those of histories are kernels of their own, each on tiles of its own.

    The floors shown are of their own products alone: 3 and 4 of the size of the forward pass's 2.
    """
    from model.kernels import crossing_attention_triton as kernels

    row, device = problem.row, problem.gradient.device
    out, lse = kernels.crossing_attention_kernel(
        *problem.tensors, problem.candidate_offsets, problem.history_offsets, longest_history=max(row.histories)
    )
    delta = torch.empty_like(lse)
    kept = (problem.gradient, *problem.tensors, problem.candidate_offsets, problem.history_offsets)
    settings = BACKWARD_SETTINGS if device.type == "cuda" else {"query": [(16, 16, 4, 2)], "history": [(16, 16, 4, 2)]}

    def of_query(tiles: kernels.BackwardTiles) -> list[torch.Tensor]:
        return [out, kernels.query_gradient(*kept, out, lse, delta, tokens=1, tiles=tiles)]

    def of_history(tiles: kernels.BackwardTiles) -> list[torch.Tensor]:
        return list(kernels.history_gradients(*kept, lse, delta, tiles=tiles))

    def history_error(found: Sequence[torch.Tensor]) -> float:
        own, history = next(pair for pair in problem.requests() if pair[0].start < pair[0].stop)
        wanted = exact(problem, own, history, 0)[4:]
        return max(off(one[history, 0], two) for one, two in zip(found, wanted, strict=True))

    of_query(kernels.choose_tiles(row.head_dim, torch.bfloat16).query_gradient)  # leaves delta
    kinds: list[tuple[str, Callable[[Any], list[torch.Tensor]], Callable[[Sequence[torch.Tensor]], float]]] = [
        ("query", of_query, lambda found: error_of(problem, found)), ("history", of_history, history_error)
    ]  # fmt: skip
    for products, (name, kernel, error) in zip((3, 4), kinds, strict=True):
        print(f" gradient of the {name}", flush=True)
        tried = [kernels.BackwardTiles(*setting) for setting in settings[name]]
        steps = [(str(tiles), lambda tiles=tiles, kernel=kernel: kernel(tiles)) for tiles in tried]  # type: ignore[misc]
        rank(steps, error, device, products * row.floor_ms(is_training=True) / 7)


def rank(
    steps: Sequence[tuple[str, Callable[[], list[torch.Tensor]]]],
    error: Callable[[Sequence[torch.Tensor]], float], device: torch.device, floor: float,
) -> None:  # fmt: skip
    """Print the ten fastest, the fastest last."""
    found = []
    for name, step in steps:
        try:
            found.append((median_ms(graphed(step, device), device, 0.05), error(step()), name))
        except Exception as problem:  # too much shared memory, too many registers
            print(f"  {name}: {type(problem).__name__}: {str(problem)[:80]}", flush=True)
    for ms, off_by, name in sorted(found, key=lambda one: -one[0])[-10:]:
        print(f"  {ms:.4f} ms x{ms / floor:.2f} error {off_by:.1e} {name}", flush=True)


def ceilings(device: torch.device) -> str:
    """This card's own rates, for whoever reads the ratios of another card than that of the floors."""
    one, two = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(one)
    source = torch.randint(0, 1 << 30, (1 << 28,), device=device, dtype=torch.int32)
    copy = torch.empty_like(source)
    flops = 2 * 8192**3 / median_ms(lambda: torch.mm(one, two, out=product), device) / 1e9
    moved = 2 * source.nbytes / median_ms(lambda: copy.copy_(source), device) / 1e9
    return f"here {flops:.0f} TFLOP/s, {moved:.2f} TB/s; floors at 793 and 3.02"


def main(argv: Sequence[str] | None = None) -> int:
    """Check, compare, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.dcat", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument("--backward", action="store_true", help="both passes too, of the rows with a target for them")
    parser.add_argument("--tune", action="store_true", help="print the times of a few tiles; records nothing")
    parser.add_argument("--tune-backward", action="store_true", help="of the backward pass alone")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; records nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        if not args.quick:
            parser.error("on the CPU kernels run in an interpreter: only --quick, which checks and measures nothing")
        os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels load
    from torch._dynamo import config as compiler  # which loads Triton: not before the variable above is set

    # A rival compiled for every shape must not fall back to eager after the first few.
    compiler.recompile_limit, compiler.accumulated_recompile_limit = 256, 4096
    rows = [row for row in (QUICK if args.quick else all_rows()) if any(part in row.name for part in args.rows)]
    card = ceilings(device) if device.type == "cuda" else ""
    print(card, flush=True)
    entries: list[dict[str, Any]] = []
    kinds = (True,) if args.tune_backward else (False, True) if args.backward else (False,)
    for row, is_training in itertools.product(rows, kinds):
        if is_training and row.train_target is None:
            continue
        if args.tune or args.tune_backward:
            print(f"{'train' if is_training else 'fwd'} {row.name}", flush=True)
            tune(row, device, is_training=is_training)
        else:
            with torch.set_grad_enabled(is_training):
                entries += compare(row, device, 1 if args.quick else args.repeats, is_training=is_training)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if entries and device.type == "cuda" and not args.quick and not args.no_record:
        installed = versions("torch", "triton", "numpy")
        record(
            "dcat",
            [
                {**entry, "versions": installed, "note": "; ".join(x for x in (entry.get("note"), card) if x)}
                for entry in entries
            ],
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
