"""Causal attention on Hopper: the plan of tiles anywhere, the whole on such a GPU."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
from model.encoder import Packing
from model.kernels.causal_attention import causal_attention, causal_attention_reference, plan_causal
from model.kernels.causal_attention_gluon import HopperCausalTiles, choose_tiles, launch, plan_tiles
from model.kernels.crossing_attention_gluon import is_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_HOPPER = DEVICE == "cuda" and is_hopper(torch.empty(0, 1, 64, dtype=torch.bfloat16, device=DEVICE))
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="Gluon's kernel needs a Hopper GPU")
RAGGED = [0, 1, 300, 0, 64, 65, 128, 5, 1000, 63, 129, 0, 192, 193, 2, 0]


def starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def draw(events: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, whose rows lie apart."""
    drawn = torch.randn(events, 3, heads, head_dim, generator=torch.Generator().manual_seed(0))
    return (2 * drawn).to(dtype).to(DEVICE).unbind(1)


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("users", [1, 16, 1500])
def test_the_plan_has_every_tile_once_those_with_most_keys_first(users: int, rows: int) -> None:
    random = np.random.default_rng(users)
    lengths = np.clip(np.exp(random.normal(4, 1.5, users)), 1, 900).astype(np.int64) * random.integers(0, 2, users)
    lengths[users // 2] = 2 * rows + 1
    offsets = starts(lengths.tolist())
    begins = offsets.tolist()
    tiles = {
        (begins[u] + first, first, n - first) for u, n in enumerate(lengths.tolist()) for first in range(0, n, rows)
    }
    for longest in (int(lengths.max()), 1200):
        plan = plan_tiles(offsets, begins[-1], longest, rows)
        assert plan[0, :2].tolist() == [len(tiles), 0]
        assert len(plan) > len(tiles)
        found = [tuple(tile) for tile in plan[1 : 1 + len(tiles), :3].tolist()]
        assert set(found) == tiles
        order = [first for _, first, _ in found]
        assert order == sorted(order, reverse=True)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [[1], RAGGED, [2048, 3], [1] * 300, [0, 0, 7, 0]])
def test_it_matches_float64(lengths: Sequence[int], head_dim: int, dtype: torch.dtype) -> None:
    offsets = starts(lengths)
    query, key, value = draw(sum(lengths), 3, head_dim, dtype)
    exact = causal_attention_reference(query.double(), key.double(), value.double(), offsets)
    with torch.inference_mode():
        found = causal_attention(query, key, value, offsets, max(lengths))
    assert found.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert (found.double() - exact).norm() < 1.5 * rounding * exact.norm()
    assert (found.double() - exact).abs().max() < 4 * rounding * value.abs().max()


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_user_has_the_same_bits_in_any_company(head_dim: int) -> None:
    """Also beside NaN in other users and behind the last, and however many warpgroups share keys."""
    tiles = choose_tiles(head_dim)
    others = tiles, HopperCausalTiles(2, 1, 1, is_overlapped=False), HopperCausalTiles(3, 2, 1, is_overlapped=True)
    offsets, longest = starts(RAGGED), max(RAGGED)
    query, key, value = draw(sum(RAGGED) + 100, 2, head_dim, torch.bfloat16)
    company = launch(query, key, value, offsets, longest, tiles)
    for begin, end in itertools.pairwise(offsets.tolist()):
        if begin == end:
            continue
        spoilt = [torch.full_like(x, float("nan")) for x in (query, key, value)]
        for bad, good in zip(spoilt, (query, key, value), strict=True):
            bad[begin:end] = good[begin:end]
        found = launch(spoilt[0], spoilt[1], spoilt[2], offsets, longest, tiles)
        assert torch.equal(found[begin:end], company[begin:end])
        for other in others:
            alone = launch(query[begin:end], key[begin:end], value[begin:end], starts([end - begin]), 2048, other)
            assert torch.equal(alone, company[begin:end])


def test_no_plan_where_none_is_needed() -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    assert plan_causal(offsets, 3, 3, 64) is None
    assert plan_causal(offsets.to(DEVICE), 3, 3, 32) is None
    assert plan_causal(offsets[:1].to(DEVICE), 0, 0, 64) is None
    assert Packing.of(offsets.long(), 64, torch.zeros(3, dtype=torch.int64)).plan is None


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_plan_serves_every_layer(head_dim: int) -> None:
    """Of few items and of many: each launch leaves the plan as it found it."""
    for lengths in ([5], RAGGED, [700] * 40):
        offsets, longest, events = starts(lengths), max(lengths), sum(lengths)
        query, key, value = draw(events, 3, head_dim, torch.bfloat16)
        plan = plan_causal(offsets, events, longest, head_dim)
        assert plan is not None
        with torch.inference_mode():
            alone = causal_attention(query, key, value, offsets, longest)
            for layer in (query, value, query):
                found = causal_attention(layer, key, value, offsets, longest, plan)
                assert plan[0, 1].item() == 0
        assert torch.equal(found, alone)


@needs_hopper
def test_a_packing_brings_the_plan_of_its_histories() -> None:
    time_us_T = torch.zeros(sum(RAGGED), dtype=torch.int64, device=DEVICE)
    packing = Packing.of(starts(RAGGED).cpu().long(), 64, time_us_T)
    expected = plan_causal(packing.offsets, sum(RAGGED), max(RAGGED), 64)
    assert packing.plan is not None
    assert expected is not None
    tiles = int(expected[0, 0])
    assert torch.equal(packing.plan[: tiles + 1, :2], expected[: tiles + 1, :2])


@needs_hopper
def test_a_cuda_graph_holds_it_whatever_the_lengths() -> None:
    """Captured with some offsets, replayed with others of the same shapes: nothing of them was read on the host."""
    offsets, other = starts([300, 4, 0, 0]), starts([10, 90, 200, 4])
    query, key, value = draw(304, 2, 64, torch.bfloat16)
    exact = launch(query, key, value, other, 400, choose_tiles(64))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(query, key, value, offsets, 400, choose_tiles(64))
    offsets.copy_(other)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, exact)
