"""Gradients of crossing attention on Hopper: plan and the candidates' own part anywhere, the whole on such a GPU."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
from model.kernels import crossing_attention_gluon_backward as hopper
from model.kernels.crossing_attention_triton import LOG2_E, choose_tiles
from tests.model.kernels.test_crossing_attention import (
    DEVICE,
    Case,
    check_against_float64,
    repeated,
    run,
    run_kernel,
)

IS_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
RAGGED = [
    Case([130, 64, 1], [257, 64, 65], heads=4),
    Case([0, 70, 0, 5, 0], [300, 0, 17, 1000, 3]),
    Case([33, 50], [100, 700], tokens=3, heads=6, key_heads=2),
    Case([70, 0, 31], [129, 5, 640], tokens=4, heads=4, key_heads=1),
    Case([100, 3], [0, 1], tokens=2),
]


def prepare(case: Case, inputs: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor) -> list[torch.Tensor]:
    """Plan, counts, statistics, and gradients of the own keys and values; the plan of the history from `slots` on."""
    query, key_self, value_self, history_key, _, out_gradient = inputs
    offsets = [x.to(query.device) for x in case.offsets()]
    requests = len(case.candidates)
    slots = len(query) // hopper.TILE + requests
    plan = torch.full((slots + len(history_key) // hopper.TILE + requests, 8), -1, dtype=torch.int32, device=DEVICE)
    counts = plan.new_empty(2)
    statistics = lse.new_full((2 + case.tokens, case.heads * slots * hopper.TILE), float("nan"))
    gradients = torch.full_like(key_self, float("nan")), torch.full_like(value_self, float("nan"))
    rows = 1024 // case.head_dim
    hopper._prepare_kernel[(2 * requests + slots * (hopper.TILE // rows) * case.key_heads,)](
        query, query.stride(0), out_gradient, out_gradient.stride(0), key_self, value_self, key_self.stride(0),
        value_self.stride(0), *offsets, out, lse, statistics, *gradients, plan, counts, case.key_heads,
        case.heads // case.key_heads, case.head_dim**-0.5, requests, slots,
        TOKENS=case.tokens, ROWS=rows, D=case.head_dim, BLOCK=2, IS_CHAINED=False, num_warps=4,
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


@pytest.mark.parametrize("number", range(len(RAGGED)))
def test_plan_lists_every_tile_once_most_work_first(number: int) -> None:
    case = replace(RAGGED[number], head_dim=64)
    inputs = [x.to(DEVICE) for x in case.draw()]
    out, lse = torch.zeros_like(inputs[0]), inputs[0].new_zeros(inputs[0].shape[:2])
    plan, counts, *_ = prepare(case, inputs, out, lse)
    slots = len(inputs[0]) // hopper.TILE + len(case.candidates)
    candidates, histories = (x.tolist() for x in case.offsets())
    for of_history, (own, other) in enumerate(((candidates, histories), (histories, candidates))):
        wanted = []
        for r in sorted(range(len(own) - 1), key=lambda r: other[r] - other[r + 1]):  # a stable sort
            base = (candidates[r] // hopper.TILE + r) * hopper.TILE
            for row in range(own[r], own[r + 1], hopper.TILE):
                padded = base if of_history else base + row - own[r]
                wanted.append([row, own[r + 1], other[r], other[r + 1] - other[r], padded])
        found = plan[slots * of_history :][: len(wanted), :5].tolist()
        assert counts[of_history] == len(wanted)
        assert found == wanted


@pytest.mark.skipif(not IS_HOPPER, reason="its instructions are those of Hopper GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("number", range(len(RAGGED)))
def test_whole_matches_float64_with_equal_bits_in_every_run(number: int, head_dim: int, dtype: torch.dtype) -> None:
    case = replace(RAGGED[number], head_dim=head_dim, dtype=dtype)
    tiles = choose_tiles(head_dim, dtype)
    check_against_float64(case, tiles, seed=number)
    found = run_kernel(case, number, tiles)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(found, run_kernel(case, number, tiles), strict=True))


@pytest.mark.skipif(not IS_HOPPER, reason="its instructions are those of Hopper GPUs")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [64, 128, 192])
def test_equal_bits_where_each_item_is_done_in_a_few_tiles(tokens: int, head_dim: int) -> None:
    """Then an item's own tiles are copied over those of the one before as soon as these are free."""
    case = Case([tokens] * 16, [3000] * 16, head_dim=head_dim, dtype=torch.bfloat16)
    tiles = choose_tiles(head_dim, case.dtype)
    found = run_kernel(case, tokens, tiles)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(found, run_kernel(case, tokens, tiles), strict=True))
