"""Context pass and crossing pass together against the undivided Transformer over history and candidate."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.crossing import ContextPass, KeyValueCache, fingerprint
from model.encoder import Block, Packing
from model.errors import ConfigError, ShapeError, StateMismatch
from tests.releases import SMALL

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_blocks(dtype: torch.dtype = torch.float64, **changes: Any) -> list[Block]:
    torch.manual_seed(5)
    return [Block(replace(SMALL, num_layers=3, dropout=0.0, **changes)).to(dtype) for _ in range(3)]


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def draw(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(count, SMALL.d_model, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_cache(context: ContextPass, histories: list[int], dtype: torch.dtype = torch.float64) -> KeyValueCache:
    total = sum(histories)
    return context(draw(total, dtype, 1), offsets_of(histories), torch.arange(total))[0]


def undivided(blocks: list[Block], sequence_LD: torch.Tensor) -> torch.Tensor:
    """One history, or one history and one candidate, through every block."""
    length = len(sequence_LD)
    packing = Packing.of(torch.tensor([0, length]), SMALL.d_model // SMALL.num_heads, torch.arange(length))
    for block in blocks:
        sequence_LD, _ = block(sequence_LD, packing)
    return sequence_LD


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_two_passes_are_the_undivided_transformer(tokens: int, dtype: torch.dtype) -> None:
    blocks = make_blocks(dtype)
    histories, candidates = [7, 0, 1, 30], [3, 2, 0, 5]
    event_ED, candidate_TD = draw(sum(histories), dtype, 1), draw(sum(candidates) * tokens, dtype, 2)
    event_ED.requires_grad_(), candidate_TD.requires_grad_()
    context = ContextPass(blocks)
    offsets, candidate_offsets = offsets_of(histories), offsets_of(candidates) * tokens
    cache, _ = context(event_ED, offsets, torch.arange(len(event_ED)))
    found = context.cross(candidate_TD, candidate_offsets, cache, tokens=tokens)

    wanted = []
    for r, (history, own) in enumerate(
        zip(event_ED.split(histories), candidate_TD.split([tokens * c for c in candidates]), strict=True)
    ):
        each = own.split(tokens) if candidates[r] else ()
        wanted += [undivided(blocks, torch.cat([history, candidate]))[-tokens:] for candidate in each]
    exact = torch.cat(wanted)
    assert (found - exact).abs().max() <= TOLERANCE[dtype]

    weights = [event_ED, candidate_TD, *context.parameters()]
    gradient = draw(len(exact), dtype, 3)
    for one, two in zip(
        torch.autograd.grad(found, weights, gradient), torch.autograd.grad(exact, weights, gradient), strict=True
    ):
        assert (one - two).abs().max() <= TOLERANCE[dtype] * 10 * max(1, float(two.abs().max()))


def test_hidden_states_of_histories_where_they_are_wanted() -> None:
    blocks = make_blocks()
    event_ED = draw(9, torch.float64, 1)
    context = ContextPass(blocks)
    cache, hidden_ED = context(event_ED, offsets_of([4, 5]), torch.arange(9), is_hidden_wanted=True)
    assert hidden_ED is not None
    exact = torch.cat([undivided(blocks, part) for part in event_ED.split([4, 5])])
    assert (hidden_ED - exact).abs().max() <= 1e-12
    without, nothing = context(event_ED, offsets_of([4, 5]), torch.arange(9))
    assert nothing is None
    for one, two in zip(cache.layers, without.layers, strict=True):
        assert (one[0] - two[0]).abs().max() <= 1e-12
        assert (one[1] - two[1]).abs().max() <= 1e-12


def test_the_last_layer_of_the_context_pass_ends_with_its_keys() -> None:
    context = ContextPass(make_blocks())
    used = []
    for i, layer in enumerate(context._layers()):
        layer.block.ffn_in.register_forward_hook(lambda *_, i=i: used.append(i))
    make_cache(context, [4])
    assert used == [0, 1]


def test_a_cache_knows_its_size() -> None:
    """3 layers, keys and values, 6 events of 16 channels of 8 bytes."""
    cache = make_cache(ContextPass(make_blocks()), [4, 2, 0])
    assert cache.num_bytes == 3 * 2 * 6 * 16 * 8
    assert cache.dtype == torch.float64
    assert cache.longest == 4


def test_recomputed_layers_have_the_same_gradients() -> None:
    blocks = make_blocks()
    found = []
    for is_recomputed in (False, True):
        context = ContextPass(blocks, "a", is_recomputed=is_recomputed)
        event_ED, candidate_TD = draw(9, torch.float64, 1).requires_grad_(), draw(3, torch.float64, 2)
        cache, _ = context(event_ED, offsets_of([5, 4]), torch.arange(9))
        out = context.cross(candidate_TD, offsets_of([2, 1]), cache)
        found.append(torch.autograd.grad(out.square().sum(), [event_ED, *context.parameters()]))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float8_e4m3fn, 0.04), (torch.int8, 0.01)])
def test_a_quantised_cache_is_a_byte_a_number_and_near(dtype: torch.dtype, allowed: float) -> None:
    """Rounding to 3 bits behind the point is off by 1 in 16 at most, to 127 steps by half a step of the largest."""
    context = ContextPass(make_blocks())
    cache = make_cache(context, [7, 0, 12])
    small = cache.quantised(dtype)
    assert small.dtype == dtype
    assert small.num_bytes == cache.num_bytes // 8 + 3 * 2 * (3 * SMALL.num_heads) * 4  # f32 scales of 3 requests
    for i in range(3):
        for one, two in zip(small.read(i), cache.read(i), strict=True):
            assert one.dtype == torch.float64
            assert (one - two).norm() / two.norm() < allowed
    candidate_TD, offsets = draw(4, torch.float64, 2), offsets_of([2, 1, 1])
    exact = context.cross(candidate_TD, offsets, cache)
    assert 0 < (context.cross(candidate_TD, offsets, small) - exact).norm() / exact.norm() < allowed


def test_what_a_request_keeps_does_not_depend_on_its_company() -> None:
    context = ContextPass(make_blocks())
    event_ED = draw(12, torch.float64, 1)
    both = context(event_ED, offsets_of([5, 7]), torch.arange(12))[0].quantised(torch.int8)
    alone = context(event_ED[5:], offsets_of([7]), torch.arange(7))[0].quantised(torch.int8)
    for one, two in zip(both.scales, alone.scales, strict=True):
        torch.testing.assert_close(one[0][1:], two[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(one[1][1:], two[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_in_fp8_are_near(dtype: torch.dtype) -> None:
    """Each factor is off by 2.6 % of its size on average, each branch is added to a stream that is as it was."""
    blocks = make_blocks(dtype)
    quantised = ContextPass(blocks, product_dtype=torch.float8_e4m3fn)
    exact, found = ContextPass(blocks), {}
    for name, context in (("exact", exact), ("quantised", quantised)):
        cache, hidden_ED = context(draw(19, dtype, 1), offsets_of([7, 0, 12]), torch.arange(19), is_hidden_wanted=True)
        assert hidden_ED is not None
        crossed_TD = context.cross(draw(4, dtype, 2), offsets_of([2, 1, 1]), cache)
        found[name] = [hidden_ED, crossed_TD, *itertools.chain(*cache.layers)]
    for one, two in zip(found["quantised"], found["exact"], strict=True):
        assert one.dtype == dtype
        assert not one.requires_grad
        assert 1e-3 < (one - two).norm() / two.norm() < 0.05


def test_a_cache_made_with_either_products_is_read_with_either() -> None:
    blocks = make_blocks(torch.float32)
    exact, quantised = ContextPass(blocks), ContextPass(blocks, product_dtype=torch.float8_e4m3fn)
    wanted, *found = (
        reader.cross(draw(5, torch.float32, 2), offsets_of([3, 2]), make_cache(maker, [7, 12], torch.float32))
        for maker, reader in ((exact, exact), (exact, quantised), (quantised, exact))
    )
    for one in found:
        assert 1e-3 < (one - wanted).norm() / wanted.norm() < 0.05


def test_a_candidate_in_fp8_alone_and_among_others() -> None:
    """A token's scale is its own: company changes no more than the order in which the CPU sums."""
    context = ContextPass(make_blocks(torch.float32), product_dtype=torch.float8_e4m3fn)
    cache = make_cache(context, [7, 12], torch.float32)
    candidate_TD = draw(5, torch.float32, 2)
    candidate_TD[1] *= 1e4
    among = context.cross(candidate_TD, offsets_of([5, 0]), cache)
    alone = context.cross(candidate_TD[3:4], offsets_of([1, 0]), cache)
    assert (among[3:4] - alone).abs().max() < 1e-2 * alone.norm()  # a step of e4m3 where a sum lies on its edge


def test_other_dtypes_and_widths_of_products_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"or in torch\.float8_e4m3fn, got torch\.int8"):
        ContextPass(make_blocks(), product_dtype=torch.int8)
    with pytest.raises(ConfigError, match="multiples of 16 channels"):
        ContextPass(make_blocks(d_model=24, num_heads=2), product_dtype=torch.float8_e4m3fn)


def test_a_cache_is_quantised_once_and_to_a_byte() -> None:
    cache = make_cache(ContextPass(make_blocks()), [4])
    with pytest.raises(ConfigError, match="float8_e4m3fn or int8, got one asked for torch"):
        cache.quantised(torch.float16)
    with pytest.raises(ConfigError, match="got one quantised already"):
        cache.quantised(torch.int8).quantised(torch.int8)


def test_a_cache_of_other_weights_is_refused() -> None:
    blocks = make_blocks()
    context = ContextPass(blocks)
    cache = make_cache(context, [4])
    with torch.no_grad():
        blocks[1].ffn_out.bias[3] += 1e-6
    other = ContextPass(blocks)
    with pytest.raises(StateMismatch, match=f"of version {other.version}, got one of {context.version}"):
        other.cross(draw(1, torch.float64, 2), offsets_of([1]), cache)


def test_the_fingerprint_is_of_the_weights_alone() -> None:
    assert fingerprint(ContextPass(make_blocks())) == fingerprint(ContextPass(make_blocks()))
    assert fingerprint(ContextPass(make_blocks())) != fingerprint(ContextPass(make_blocks(torch.float32)))


def test_what_does_not_fit_is_refused() -> None:
    context = ContextPass(make_blocks(), version="a")
    cache = make_cache(context, [4, 3])
    with pytest.raises(ShapeError, match="of the cache's 2 requests, got 1"):
        context.cross(draw(2, torch.float64, 2), offsets_of([2]), cache)
    with pytest.raises(ShapeError, match=r"in multiples of 2, got \[0, 1, 4\]"):
        context.cross(draw(4, torch.float64, 2), offsets_of([1, 3]), cache, tokens=2)
    with pytest.raises(ShapeError, match="must have 2 layers, got 3"):
        ContextPass(make_blocks()[:2], version="a").cross(draw(2, torch.float64, 2), offsets_of([1, 1]), cache)
    with pytest.raises(ConfigError, match="without a relative bias"):
        ContextPass(make_blocks(relative_bias=True))
    with pytest.raises(ConfigError, match="at least 1 block, got 0"):
        ContextPass([])


@pytest.mark.parametrize("product_dtype", [None, torch.float8_e4m3fn])
def test_no_candidates_at_all(product_dtype: torch.dtype | None) -> None:
    context = ContextPass(make_blocks(), product_dtype=product_dtype)
    found = context.cross(draw(0, torch.float64, 2), offsets_of([0, 0]), make_cache(context, [4, 0]))
    assert found.shape == (0, 16)
