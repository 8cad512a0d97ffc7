"""Gradients of crossing attention on Hopper: plan and the candidates' own part anywhere, the whole on such a GPU."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
from model.kernels import crossing_attention_gluon_backward as hopper
from model.kernels.crossing_attention_triton import LOG2_E, choose_tiles, crossing_attention_kernel
from tests.model.kernels.test_crossing_attention import (
    DEVICE,
    Case,
    assert_no_worse,
    poisoned,
    repeated,
    run,
)

IS_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
RAGGED = [
    Case([130, 64, 1], [257, 64, 65], heads=4),
    Case([0, 70, 0, 5, 0], [300, 0, 17, 1000, 3]),
    Case([33, 50], [100, 700], tokens=3, heads=6, key_heads=2),
    Case([70, 0, 31], [129, 5, 640], tokens=4, heads=4, key_heads=1),
    Case([100, 3], [0, 1], tokens=2),
]
LONG = [
    Case([130, 1, 9], [9000, 4097, 4096], heads=1, key_heads=1),
    Case([40, 12], [5000, 70], tokens=3, heads=2, key_heads=1),
    Case([7], [40000], heads=1, key_heads=1),
]
"""Histories of several parts, of the most parts, and ragged ones."""


def prepare(
    case: Case, inputs: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, part_blocks: int = 0, most: int = 8,
    has_own: bool = True,
) -> list[torch.Tensor]:  # fmt: skip
    """Plan, counts, statistics, and gradients of the own keys and values; the plan of the history from `slots` on.

    Without a part of their own to do for candidates, programs do the plan only.
    """
    query, key_self, value_self, history_key, _, out_gradient = inputs
    offsets = [x.to(query.device) for x in case.offsets()]
    requests = len(case.candidates)
    slots = len(query) // hopper.TILE + requests
    items = len(history_key) // (hopper.TILE * max(part_blocks, 1)) + requests
    plan = torch.full((slots + items, 8), -1, dtype=torch.int32, device=DEVICE)
    counts = plan.new_empty(2)
    statistics = lse.new_full((2 + case.tokens, case.heads * slots * hopper.TILE), float("nan"))
    gradients = torch.full_like(key_self, float("nan")), torch.full_like(value_self, float("nan"))
    rows = 1024 // case.head_dim
    own_programs = slots * (hopper.TILE // rows) * case.key_heads if has_own else 0
    hopper._prepare_kernel[(2 * requests + own_programs,)](
        query, query.stride(0), out_gradient, out_gradient.stride(0), key_self, value_self, key_self.stride(0),
        value_self.stride(0), *offsets, out, lse, statistics, *gradients, plan, counts, case.key_heads,
        case.heads // case.key_heads, case.head_dim**-0.5, requests, slots,
        TOKENS=case.tokens, ROWS=rows, D=case.head_dim, BLOCK=2, PART_BLOCKS=part_blocks, MOST_PARTS=most, num_warps=4,
    )  # fmt: skip
    return [x.cpu() for x in (plan, counts, statistics, *gradients)]


@pytest.mark.parametrize(("number", "head_dim"), [(0, 64), (1, 64), (2, 128), (3, 64), (4, 64)])
def test_own_part_and_statistics(number: int, head_dim: int) -> None:
    """Own gradients; for each request whole tiles of denominators and delta; scores' gradients that complete dQ."""
    case = replace(RAGGED[number], head_dim=head_dim)
    inputs = case.draw()
    out, lse, *exact = run(repeated, case, inputs)
    on_device = [x.to(DEVICE) for x in inputs]
    _, _, statistics, key_g, value_g = prepare(case, on_device, out.to(DEVICE), lse.to(DEVICE))
    torch.testing.assert_close(key_g, exact[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value_g, exact[2], rtol=1e-4, atol=1e-5)
    query, key_self, _, history_key, history_value, out_gradient = inputs
    delta_TH = (out * out_gradient).sum(-1)
    statistics = statistics.unflatten(1, (case.heads, -1))
    bounds = (itertools.pairwise(x.tolist()) for x in case.offsets())
    for r, ((begin, end), (first, last)) in enumerate(zip(*bounds, strict=True)):
        base = (begin // hopper.TILE + r) * hopper.TILE
        rows, whole = end - begin, -(-(end - begin) // hopper.TILE) * hopper.TILE
        tile = statistics[:, :, base : base + whole]
        torch.testing.assert_close(tile[0, :, :rows], lse[begin:end].T * LOG2_E, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tile[1, :, :rows], delta_TH[begin:end].T, rtol=1e-4, atol=1e-5)
        assert (tile[0, :, rows:] == float("inf")).all()
        assert (tile[1, :, rows:] == 0).all()
        for head in range(case.heads):
            key_head = head * case.key_heads // case.heads
            keys, values = history_key[first:last, key_head], history_value[first:last, key_head]
            share = (query[begin:end, head] @ keys.T * case.head_dim**-0.5 - lse[begin:end, head, None]).exp()
            through = out_gradient[begin:end, head] @ values.T
            gradient = share * (through - delta_TH[begin:end, head, None]) @ keys
            for row in range(begin, end):
                place = row % case.tokens
                own = key_self[row - place : row + 1, key_head]
                gradient[row - begin] += tile[2 : 3 + place, head, row - begin] @ own
            torch.testing.assert_close(
                gradient * case.head_dim**-0.5, exact[0][begin:end, head], rtol=1e-4, atol=1e-5
            )  # fmt: skip


def parts_of(length: int, part_blocks: int, most: int) -> list[int]:
    """Blocks of each item of a history: one, or as many as divide the parts that its length asks for evenly."""
    blocks = -(-length // hopper.TILE)
    each = -(-blocks // max(min(-(-blocks // part_blocks), most), 1)) if part_blocks else 1
    return [min(each, blocks - first) for first in range(0, blocks, max(each, 1))]


@pytest.mark.parametrize(("part_blocks", "most"), [(0, 8), (2, 8), (1, 3), (32, 8)])
@pytest.mark.parametrize("number", range(len(RAGGED)))
def test_plan_lists_every_tile_once_most_work_first(number: int, part_blocks: int, most: int) -> None:
    case = replace(RAGGED[number], head_dim=64)
    inputs = [x.to(DEVICE) for x in case.draw()]
    out, lse = torch.zeros_like(inputs[0]), inputs[0].new_zeros(inputs[0].shape[:2])
    plan, counts, *_ = prepare(case, inputs, out, lse, part_blocks, most, has_own=False)
    slots = len(inputs[0]) // hopper.TILE + len(case.candidates)
    candidates, histories = (x.tolist() for x in case.offsets())
    for of_history, (own, other) in enumerate(((candidates, histories), (histories, candidates))):
        items = [parts_of(b - a, of_history * part_blocks, most) for a, b in itertools.pairwise(own)]
        work = [
            (b - a) * max(blocks, default=0) for (a, b), blocks in zip(itertools.pairwise(other), items, strict=True)
        ]
        wanted = []
        for r in sorted(range(len(items)), key=lambda r: -work[r]):  # a stable sort
            base = (candidates[r] // hopper.TILE + r) * hopper.TILE
            row = own[r]
            for item, blocks in enumerate(items[r]):
                padded = base if of_history else base + row - own[r]
                wanted.append([row, own[r + 1], other[r], other[r + 1] - other[r], padded, item, blocks])
                row += blocks * hopper.TILE
        found = plan[slots * of_history :][: len(wanted), :7].tolist()
        assert counts[of_history] == len(wanted)
        assert found == wanted


@pytest.mark.parametrize(("number", "part_blocks", "most"), [(0, 2, 8), (1, 1, 3), (2, 2, 8), (3, 1, 3), (4, 2, 8)])
def test_parts_add_up_to_the_gradients_of_queries(number: int, part_blocks: int, most: int) -> None:
    """The sums that the items of the plan would leave, computed here, and the kernel that adds them up."""
    case = replace(RAGGED[number], head_dim=64)
    inputs = case.draw()
    out, lse, *exact = run(repeated, case, inputs)
    on_device = [x.to(DEVICE) for x in inputs]
    plan, counts, statistics, *_ = prepare(case, on_device, out.to(DEVICE), lse.to(DEVICE), part_blocks, most)
    query, key_self, _, history_key, history_value, out_gradient = inputs
    slots, group, scale = len(query) // hopper.TILE + len(case.candidates), case.heads // case.key_heads, 64**-0.5
    denominators, delta = (x.unflatten(0, (case.heads, -1)) for x in statistics[:2])
    sums = torch.full((most, *denominators.shape, 64), float("nan"))
    for entry in plan[slots : slots + int(counts[1])].tolist():
        first, end, begin, rows, padded_row, part, blocks, _ = entry
        events, own = slice(first, min(first + blocks * hopper.TILE, end)), slice(begin, begin + rows)
        tile = slice(padded_row, padded_row + rows)
        for head in range(case.heads):
            keys, values = history_key[events, head // group], history_value[events, head // group]
            share = torch.exp2(query[own, head] @ keys.T * (scale * LOG2_E) - denominators[head, tile, None])
            through = out_gradient[own, head] @ values.T
            sums[part, head, tile] = share * (through - delta[head, tile, None]) @ keys
    sums, statistics, plan, counts = (x.to(DEVICE) for x in (sums, statistics, plan, counts))
    found = torch.full_like(on_device[0], float("nan"))
    padded = slots * hopper.TILE
    hopper._sum_kernel[(slots * (hopper.TILE // 32) * case.heads,)](
        sums, statistics, on_device[1], key_self.stride(0), found, plan, counts, case.heads, group, scale, padded,
        case.heads * padded, TOKENS=case.tokens, ROWS=32, D=64, PART_BLOCKS=part_blocks, MOST_PARTS=most, num_warps=4,
    )  # fmt: skip
    torch.testing.assert_close(found.cpu(), exact[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not IS_HOPPER, reason="its instructions are those of Hopper GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("number", range(len(RAGGED) + len(LONG)))
def test_whole_matches_float64_with_equal_bits_in_every_run(number: int, head_dim: int, dtype: torch.dtype) -> None:
    case = replace([*RAGGED, *LONG][number], head_dim=head_dim, dtype=dtype)
    inputs = [x.to(DEVICE) for x in case.draw(number)]
    exact = run(repeated, case, [x.double() for x in inputs])
    attention = partial(crossing_attention_kernel, tiles=choose_tiles(head_dim, dtype))
    with poisoned():
        found = run(attention, case, inputs)
    assert_no_worse(found, run(repeated, case, inputs), exact, factor=2)
    for _ in range(9):
        with poisoned():
            assert all(torch.equal(a, b) for a, b in zip(found, run(attention, case, inputs), strict=True))


@pytest.mark.skipif(not IS_HOPPER, reason="its instructions are those of Hopper GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4])
def test_parts_do_not_hang_on_the_company(tokens: int, dtype: torch.dtype) -> None:
    """Gradients of a candidate with 9,001 events, alone and beside others, one of a longer history."""
    company = Case([300, 1, 40], [9001, 77, 33000], tokens, heads=2, head_dim=64, dtype=dtype)
    inputs = [x.to(DEVICE) for x in company.draw()]
    tiles = choose_tiles(64, dtype)
    among = run(crossing_attention_kernel, company, inputs, tiles=tiles)
    alone = replace(company, candidates=[1], histories=[9001])
    for candidate in (0, 127, 128, 299):
        own = slice(candidate * tokens, (candidate + 1) * tokens)
        part = [*(x[own] for x in inputs[:3]), *(x[:9001] for x in inputs[3:5]), inputs[5][own]]
        found = run(crossing_attention_kernel, alone, part, tiles=tiles)
        for one, two in zip(found[2:5], among[2:5], strict=True):
            assert torch.equal(one, two[own])
