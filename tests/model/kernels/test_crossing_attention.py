"""Crossing attention against plain softmax attention in float64 over histories repeated for every candidate."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import ShapeError
from model.kernels.crossing_attention import check_kernel, crossing_attention, crossing_attention_reference

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from model.kernels.crossing_attention_gluon import (
    HopperTiles,
    _order_kernel,
    choose_hopper_tiles,
    fills_waves,
    is_hopper,
)
from model.kernels.crossing_attention_triton import BackwardTiles, Tiles, choose_tiles, crossing_attention_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_BACKWARD = BackwardTiles(16, 16, num_warps=4, num_stages=2)
SMALL = Tiles(
    16, 16, 32, num_warps=4, num_stages=2, query_gradient=SMALL_BACKWARD, history_gradient=SMALL_BACKWARD
)  # fmt: skip
NAMES = ("out", "lse", "query", "key_self", "value_self", "history_key", "history_value")


@dataclass(frozen=True)
class Case:
    """Candidates and history events of each request, and what a token looks like."""

    candidates: Sequence[int]
    histories: Sequence[int]
    tokens: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32

    def offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [np.cumsum([0, *lengths]) for lengths in (np.multiply(self.candidates, self.tokens), self.histories)]
        return tuple(torch.tensor(end, dtype=torch.int32) for end in ends)  # type: ignore[return-value]

    def draw(self, seed: int = 0) -> list[torch.Tensor]:
        """Query, own keys and values, history keys and values, and a gradient of the output; on the CPU."""
        random = torch.Generator().manual_seed(seed)
        own, events = sum(self.candidates) * self.tokens, sum(self.histories)
        shapes = [(own, self.heads), (own, self.key_heads), (own, self.key_heads), *[(events, self.key_heads)] * 2]
        shapes.append((own, self.heads))
        return [torch.randn(*shape, self.head_dim, generator=random).to(self.dtype) for shape in shapes]


def repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, history_key: torch.Tensor, history_value: torch.Tensor,
    candidate_offsets: torch.Tensor, history_offsets: torch.Tensor, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Every candidate's history repeated before it, and plain attention under a mask, in the dtype of the inputs."""
    group = query.shape[1] // key.shape[1]
    outs, lses = [query[:0]], [query[:0, :, 0]]
    for r, (begin, end) in enumerate(itertools.pairwise(candidate_offsets.tolist())):
        first, last = history_offsets[r : r + 2].tolist()
        for start in range(begin, end, tokens):
            own = slice(start, start + tokens)
            keys, values = (
                torch.cat([history[first:last], mine[own]]).repeat_interleave(group, 1)
                for history, mine in ((history_key, key), (history_value, value))
            )
            score = torch.einsum("qhd,khd->hqk", query[own], keys) * query.shape[-1] ** -0.5
            place = torch.arange(len(keys), device=keys.device)
            hidden = place > (last - first + torch.arange(tokens, device=keys.device))[:, None]
            score = score.masked_fill(hidden, float("-inf"))
            outs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), values))
            lses.append(score.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).new_empty(5).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    attention: Callable[..., Any], case: Case, inputs: Sequence[torch.Tensor], **options: Any
) -> list[torch.Tensor]:
    """Output, log of denominators, and the five gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    offsets = [x.to(leaves[0].device) for x in case.offsets()]
    out, lse = attention(*leaves, *offsets, tokens=case.tokens, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs[5], materialize_grads=True)]


def run_kernel(case: Case, seed: int = 0, tiles: Tiles | HopperTiles = SMALL) -> list[torch.Tensor]:
    inputs = [x.to(DEVICE) for x in case.draw(seed)]
    with poisoned():
        return [x.cpu() for x in run(crossing_attention_kernel, case, inputs, tiles=tiles)]


def assert_no_worse(
    found: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], factor: float
) -> None:
    """Each error (root mean square) is at most `factor` times that of plain PyTorch, or float32 rounding."""
    for name, one, two, three in zip(NAMES, found, plain, exact, strict=True):
        assert one.shape == three.shape, name
        assert one.isfinite().all(), name
        if three.numel():
            error, allowed = ((x.double() - three).square().mean().sqrt() for x in (one, two))
            rounding = 4 * torch.finfo(torch.float32).eps * max(1.0, float(three.abs().max()))
            assert error <= factor * allowed + rounding, f"{name}: {error:.2e}, plain {allowed:.2e}"


def check_against_float64(case: Case, tiles: Tiles | HopperTiles, seed: int = 0) -> None:
    inputs = case.draw(seed)
    exact = run(repeated, case, [x.double() for x in inputs])
    assert_no_worse(run_kernel(case, seed, tiles), run(repeated, case, inputs), exact, factor=2)


def sweep() -> list[Case]:
    """Ragged cases at random; each dtype with each number of tokens, head dims and head groups in turn."""
    random = np.random.default_rng(7)
    cases = []
    for tokens, dtype in itertools.product((1, 2, 3, 4), (torch.float32, torch.bfloat16, torch.float16)):
        requests = int(random.integers(1, 5))
        heads, key_heads = [(1, 1), (2, 1), (2, 2), (4, 2), (3, 1)][len(cases) % 5]
        candidates = random.integers(0, 24 // tokens, requests)
        histories = random.integers(0, 90, requests) * random.integers(0, 2, requests)
        candidates[0] += 1
        histories[0] = random.integers(33, 200)
        cases.append(
            Case(candidates.tolist(), histories.tolist(), tokens, heads, key_heads, (32, 64, 128)[tokens % 3], dtype)
        )
    return cases


@pytest.mark.parametrize("number", range(len(sweep())))
def test_matches_float64(number: int) -> None:
    check_against_float64(sweep()[number], replace(SMALL, is_split=number % 2 == 1), seed=number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_chosen_tiles_match_float64(head_dim: int, dtype: torch.dtype) -> None:
    case = Case([70, 5], [300, 90], heads=2, key_heads=1, head_dim=head_dim, dtype=dtype)
    check_against_float64(case, choose_tiles(head_dim, dtype))


@pytest.mark.parametrize(
    ("candidates", "histories"),
    [([], []), ([0], [0]), ([0, 0], [5, 0]), ([3], [0]), ([0, 2, 0], [40, 0, 3]), ([1] * 9, [1] * 9), ([17], [1])],
)
@pytest.mark.parametrize("is_split", [False, True])
def test_nothing_in_places(candidates: list[int], histories: list[int], is_split: bool) -> None:
    check_against_float64(Case(candidates, histories, tokens=2), replace(SMALL, is_split=is_split))


def test_equal_scores_are_worked_out_by_hand() -> None:
    """A query of zeros reads the mean: of 3 history events and its own token, then of those and the next."""
    case = Case([1], [3], tokens=2, heads=1, key_heads=1)
    query, key, _, history_key, _, _ = case.draw()
    value = torch.tensor([5.0, 12.0])[:, None, None].expand(2, 1, 32)
    history_value = torch.tensor([1.0, 2.0, 4.0])[:, None, None].expand(3, 1, 32)
    tensors = [x.to(DEVICE) for x in (query * 0, key, value, history_key, history_value, *case.offsets())]
    out, lse = crossing_attention_kernel(*tensors, tokens=2, tiles=SMALL)
    torch.testing.assert_close(out[:, 0, 0].cpu(), torch.tensor([12 / 4, 24 / 5]))
    torch.testing.assert_close(lse[:, 0].cpu(), torch.tensor([4.0, 5.0]).log())


def test_large_scores_do_not_overflow() -> None:
    """Scores of hundreds. In the backward pass shares come from score minus lse: rounding grows as these do."""
    case = Case([4], [70], dtype=torch.float32)
    query, *rest = case.draw()
    inputs = [query * 300, *rest]
    found = [x.cpu() for x in run(crossing_attention_kernel, case, [x.to(DEVICE) for x in inputs], tiles=SMALL)]
    exact = run(repeated, case, [x.double() for x in inputs])
    largest = float(exact[1].abs().max())
    assert largest > 500
    for name, one, two in zip(NAMES, found, exact, strict=True):
        size = 1000 if "key" in name else 4  # of what a share is multiplied with: a query for keys, else values
        assert (one - two).abs().max() <= torch.finfo(torch.float32).eps * largest * size, name


def test_rows_may_lie_apart() -> None:
    """Parts of one projection are read where they are."""
    case = Case([5, 3], [40, 20], tokens=2)
    inputs = [x.to(DEVICE) for x in case.draw()]
    query, key, value = torch.stack(inputs[:3], 1).unbind(1)
    history_key, history_value = torch.stack(inputs[3:5], 1).unbind(1)
    assert not query.is_contiguous()
    apart = run(
        crossing_attention_kernel, case, [query, key, value, history_key, history_value, inputs[5]], tiles=SMALL
    )
    together = run(crossing_attention_kernel, case, inputs, tiles=SMALL)
    assert all(torch.equal(one, two) for one, two in zip(apart, together, strict=True))


def test_the_same_bits_in_every_run() -> None:
    case = Case([20, 7], [75, 40], heads=4, key_heads=2, dtype=torch.bfloat16)
    first, second = run_kernel(case), run_kernel(case)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_out_the_work_changes_no_bit(dtype: torch.dtype) -> None:
    case = Case([20, 3, 1], [100, 0, 33], tokens=2, dtype=dtype)
    whole, split = (run_kernel(case, tiles=replace(SMALL, is_split=is_split)) for is_split in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(whole, split, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.usefixtures("row_by_row")
def test_a_candidate_has_the_same_bits_alone_and_in_company(tokens: int, dtype: torch.dtype) -> None:
    """Also the same gradient of its own query, key and value."""
    case = Case([11, 27, 6], [40, 77, 0], tokens=tokens, dtype=dtype)
    inputs = case.draw()
    company = run_kernel(case)
    starts, events = case.offsets()
    for request, candidate in ((0, 10), (1, 9), (1, 26), (2, 3)):
        first = int(starts[request]) + candidate * tokens
        own, history = slice(first, first + tokens), slice(int(events[request]), int(events[request + 1]))
        alone = [x[own] for x in inputs[:3]] + [x[history] for x in inputs[3:5]] + [inputs[5][own]]
        one = replace(case, candidates=[1], histories=[case.histories[request]])
        tiles = replace(SMALL, is_split=request == 1)
        found = run(crossing_attention_kernel, one, [x.to(DEVICE) for x in alone], tiles=tiles)
        for name, single, among in zip(NAMES[:5], found, company, strict=False):
            assert torch.equal(single.cpu(), among[own]), f"{name} of candidate {candidate} of request {request}"


@pytest.mark.parametrize("requests", [1, 5, 32, 70])
def test_the_longest_histories_come_first(requests: int) -> None:
    """Every tile has a slot, those of longer histories before those of shorter ones; what is left is marked."""
    random = np.random.default_rng(requests)
    candidates, histories = random.integers(0, 40, requests), random.integers(0, 6, requests) * 100
    offsets = [x.to(DEVICE) for x in Case(candidates.tolist(), histories.tolist()).offsets()]
    starts = offsets[0].tolist()
    tiles = {(r, first) for r in range(requests) for first in range(starts[r], starts[r + 1], 16)}
    slots = len(tiles) + 40
    order = torch.full((slots, 2), -7, dtype=torch.int32, device=DEVICE)
    _order_kernel[(triton.cdiv(requests, 32),)](*offsets, order, requests, slots, ROWS=16, BLOCK=32)
    found = [tuple(pair) for pair in order.tolist()]
    assert set(found[: len(tiles)]) == tiles
    lengths = [int(histories[r]) for r, _ in found[: len(tiles)]]
    assert lengths == sorted(lengths, reverse=True)
    assert found[len(tiles) :] == [(-1, 0)] * 40


ON_HOPPER = DEVICE == "cuda" and is_hopper(torch.empty(0, 1, 64, dtype=torch.bfloat16, device=DEVICE))
HOPPER_TILES_64 = [choose_hopper_tiles(64, is_full) for is_full in (False, True)]
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="Gluon's kernel needs a Hopper GPU")


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_split", [False, True])
def test_hopper_matches_float64(is_split: bool, head_dim: int, tokens: int, dtype: torch.dtype) -> None:
    case = Case([40, 0, 23, 2], [1100, 7, 0, 129], tokens, heads=4, key_heads=2, head_dim=head_dim, dtype=dtype)
    check_against_float64(case, replace(choose_hopper_tiles(head_dim), is_split=is_split), seed=tokens)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("tiles", HOPPER_TILES_64, ids=str)
def test_hopper_matches_float64_with_every_number_of_blocks(tiles: HopperTiles, tokens: int) -> None:
    """1 to 5 and 16 to 18 blocks of a history, full and ragged, and second warpgroups without rows."""
    histories = [128, 200, 384, 511, 640, 2048, 2049, 2304]
    case = Case([40, 9, 1, 80, 3, 2, 43, 5], histories, tokens, head_dim=64, dtype=torch.bfloat16)
    check_against_float64(case, replace(tiles, is_split=False), seed=tokens)


@pytest.mark.parametrize(
    ("candidates", "requests", "history", "expected"),
    [
        (128, 16, 8192, True),
        (512, 8, 8192, True),
        (1024, 8, 16384, True),
        (1000, 8, 4096, True),  # 95 % of four waves
        (512, 16, 2048, False),  # short histories
        (512, 8, 4095, False),
        (512, 8, None, False),
        (128, 1, 16384, False),  # 6 % of a wave
        (128, 14, 8192, False),  # 85 %
        (128, 17, 8192, False),  # 52 % of two waves
        (192, 10, 8192, False),  # half of the programs would be half empty
        (64, 16, 8192, False),  # all of them would be
        (1280, 8, 16384, False),  # five waves
        (1, 0, 8192, False),
    ],
)
def test_hopper_tiles_follow_histories_and_waves(
    candidates: int, requests: int, history: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 heads on the 132 multiprocessors of an H100."""
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert fills_waves(torch.empty(candidates * requests, 8, 64), requests, history) is expected
    assert choose_hopper_tiles(64, expected).in_turns is expected


@needs_hopper
@pytest.mark.parametrize(
    ("head_dim", "tiles"),
    [
        *((64, tiles) for tiles in HOPPER_TILES_64),
        *((128, replace(choose_hopper_tiles(128), warpgroups=warpgroups)) for warpgroups in (1, 2)),
    ],
    ids=str,
)
def test_hopper_has_the_same_bits_alone_and_however_work_is_shared_out(head_dim: int, tiles: HopperTiles) -> None:
    """Also beside 60 requests, with a table of tiles, and beside NaN in other requests."""
    case = Case([9, 150, 3] * 20, [3000, 2055, 0] * 20, tokens=1, head_dim=head_dim, dtype=torch.bfloat16)
    inputs = [x.to(DEVICE) for x in case.draw()]
    starts, events = (x.to(DEVICE) for x in case.offsets())
    chosen = choose_hopper_tiles(head_dim)
    company = crossing_attention_kernel(*inputs[:5], starts, events, tiles=replace(chosen, is_split=False))
    own, history = slice(9, 159), slice(3000, 5055)
    spoilt = [torch.full_like(x, float("nan")) for x in inputs[:5]]
    for place, bad, good in zip((own, own, own, history, history), spoilt, inputs, strict=False):
        bad[place] = good[place]
    for is_split in (False, True):
        changed = replace(tiles, is_split=is_split)
        found = crossing_attention_kernel(*inputs[:5], starts, events, tiles=changed)
        assert all(torch.equal(one, two) for one, two in zip(found, company, strict=True))
        found = crossing_attention_kernel(*spoilt, starts, events, tiles=changed)
        assert all(torch.equal(one[own], two[own]) for one, two in zip(found, company, strict=True))
        for candidate in (9, 100, 158):
            single = slice(candidate, candidate + 1)
            alone = [x[single] for x in inputs[:3]] + [x[history] for x in inputs[3:5]]
            offsets = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (1, 2055)]
            found = crossing_attention_kernel(*alone, *offsets, tiles=changed)
            assert all(torch.equal(one, two[single]) for one, two in zip(found, company, strict=True))


@needs_hopper
@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_has_the_same_bits_for_histories_of_one_length(head_dim: int, tokens: int, requests: int) -> None:
    """Told so by the host, or not; of more chunks than are folded at once; right besides."""
    length = 17 * 2048 + 300
    case = Case([70, 1, 9][:requests], [length] * requests, tokens, head_dim=head_dim, dtype=torch.bfloat16)
    inputs = [x.to(DEVICE) for x in case.draw()[:5]]
    offsets = [x.to(DEVICE) for x in case.offsets()]
    found = [
        crossing_attention_kernel(
            *inputs, *offsets, tokens=tokens, longest_history=longest,
            tiles=replace(choose_hopper_tiles(head_dim), is_split=is_split),
        )
        for longest in (length, None) for is_split in (False, True)
    ]  # fmt: skip
    for others in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(others, found[0], strict=True))
    wanted = crossing_attention_reference(*(x.double() for x in inputs), *offsets, tokens=tokens)[0]
    assert float((found[0][0] - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_holds_it_whatever_the_lengths() -> None:
    """Captured with some offsets, replayed with others of the same shapes: nothing of them was read on the host."""
    case, other = Case([300, 4], [5000, 70], dtype=torch.bfloat16), Case([4, 300], [70, 5000], dtype=torch.bfloat16)
    inputs = [x.to(DEVICE) for x in case.draw()[:5]]
    offsets = [x.to(DEVICE) for x in case.offsets()]
    crossing_attention(*inputs, *offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = crossing_attention(*inputs, *offsets)
    for one in (case, other):
        for held, new in zip(offsets, one.offsets(), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(kept, crossing_attention(*inputs, *offsets))


def test_reference_matches_float64() -> None:
    """The reference of the kernel is itself right, and is what the CPU runs."""
    case = Case([5, 0, 9, 2], [30, 7, 0, 61], tokens=3, heads=4, key_heads=2, head_dim=8, dtype=torch.float64)
    inputs = case.draw()
    exact = run(repeated, case, inputs)
    public = run(lambda *args, **options: crossing_attention(*args, return_lse=True, **options), case, inputs)
    for found in (run(crossing_attention_reference, case, inputs), public):
        for name, one, two in zip(NAMES, found, exact, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_the_dtype_stays() -> None:
    case = Case([2], [3], dtype=torch.bfloat16)
    *inputs, _ = case.draw()
    out, lse = crossing_attention(*inputs, *case.offsets(), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(crossing_attention(*inputs, *case.offsets()), out)


WRONG: list[tuple[str, Callable[[list[torch.Tensor]], None], int, str]] = [
    ("query", lambda x: x.__setitem__(0, x[0][0]), 2, r"query must be \[tokens, heads, channels\], got \[2, 32\]"),
    ("heads", lambda x: x.__setitem__(0, x[0].repeat(1, 2, 1)[:, :3]), 2, "multiple of the key heads, got 3 and 2"),
    ("own keys", lambda x: x.__setitem__(1, x[1][:4]), 2, r"key_self must be \[6, 2, 32\], got \[4, 2, 32\]"),
    ("values", lambda x: x.__setitem__(4, x[4][:4]), 2, r"history_value must be \[9, 2, 32\], got \[4, 2, 32\]"),
    ("dtype", lambda x: x.__setitem__(2, x[2].half()), 2, "value_self must be torch.float32 .* got torch.float16"),
    ("device", lambda x: x.__setitem__(3, x[3].to("meta")), 2, "history_key must be on cpu .* got meta"),
    ("offsets", lambda x: x.__setitem__(5, x[5].long()), 2, r"candidate_offsets must be int32 .* torch.int64 \[3\]"),
    ("requests", lambda x: x.__setitem__(6, x[6][:2]), 2, "of the same requests, got 2 and 1"),
    ("tokens", lambda x: None, 5, "1 to 4 and divide the 6 in all, got 5"),
    ("multiples", lambda x: None, 3, r"candidate_offsets must rise from 0 to 6 in multiples of 3, got \[0, 4, 6\]"),
    ("end", lambda x: x.__setitem__(6, x[6] - 1), 2, r"history_offsets must rise from 0 to 9 .* got \[-1, 4, 8\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "tokens", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_does_not_fit_is_refused(change: Callable[[list[torch.Tensor]], None], tokens: int, message: str) -> None:
    case = Case([2, 1], [5, 4], tokens=2)
    tensors = [*case.draw()[:5], *case.offsets()]
    change(tensors)
    with pytest.raises(ShapeError, match=message):
        crossing_attention(*tensors, tokens=tokens)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(1, 1, 64, dtype=torch.float64), "must be bfloat16, float16 or float32, got torch.float64"),
        (torch.zeros(1, 1, 48), "32, 64 or 128 channels, got 48"),
    ],
)
def test_what_no_kernel_does_is_refused_on_cuda(query: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_kernel(query)
