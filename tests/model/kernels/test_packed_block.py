"""A block between two attentions, and causal attention, against plain PyTorch in float64."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from model.config import TowerConfig
from model.crossing import finish, project, rotary_angles
from model.encoder import Block, Packing, packed_causal_attention
from model.errors import ConfigError, ShapeError
from model.kernels.packed_block import (
    Head,
    Tail,
    adjacent,
    between,
    between_products,
    between_reference,
    finish_products,
    stack,
)

pytest.importorskip("triton", reason="Triton is not installed")
from model.kernels.causal_attention import causal_attention_reference
from model.kernels.causal_attention_triton import CausalTiles, launch
from model.kernels.packed_block_triton import add_norm_kernel, norm_kernel, rotate_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2**-7.9 if torch.cuda.is_available() else 2**-6.9  # the interpreter cuts off where a GPU rounds
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU: Gluon has no interpreter")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def make_blocks(width: int, heads: int) -> list[Block]:
    """Weights that bfloat16 holds exactly, biases and norms that do something."""
    torch.manual_seed(0)
    blocks = [Block(TowerConfig(d_model=width, num_heads=heads, dropout=0.0)).to(DEVICE).eval() for _ in range(2)]
    for parameter in [p for block in blocks for p in block.parameters()]:
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).bfloat16().double()
    return blocks


def make_packing(lengths: Sequence[int], head_dim: int) -> tuple[Packing, torch.Tensor, torch.Tensor]:
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packing = Packing.of(offsets, head_dim, torch.zeros(total, dtype=torch.int64, device=DEVICE))
    angle_Ld = rotary_angles(torch.arange(64), head_dim).to(DEVICE)
    return packing, angle_Ld.cos(), angle_Ld.sin()


def unpaired(x_Thd: torch.Tensor) -> torch.Tensor:
    """Channels back in the block's order."""
    return torch.cat([x_Thd[..., 0::2], x_Thd[..., 1::2]], -1)


def assert_close(found: torch.Tensor, exact: torch.Tensor, slack: float) -> None:
    found, exact = found.detach(), exact.detach()
    error = (found.double() - exact).abs()
    assert error.norm() <= 8e-3 * exact.norm() + 1e-9
    assert bool((error <= exact.abs() * ROUNDING + slack).all()), float((error - exact.abs() * ROUNDING).max())


def check_between(
    way: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], width: int, heads: int, lengths: Sequence[int],
    has_tail: bool, has_head: bool, slack: float,
) -> None:  # fmt: skip
    """Against the blocks in float64; weights are rounded, except the reference's."""
    one, two = make_blocks(width, heads)
    packing, cos_Ld, sin_Ld = make_packing(lengths, width // heads)
    event_TD, attended_TD = draw(sum(lengths), width), draw(sum(lengths), width, seed=1)
    before_D = draw(width, seed=5, dtype=torch.float32)
    lacked_TD = event_TD.double() + before_D.double()
    exact_TD = finish(one, lacked_TD, attended_TD.double()) if has_tail else lacked_TD
    dtype = torch.float64 if way is between_reference else torch.bfloat16
    tail = Tail.of(one, dtype, before_D) if has_tail else None
    lacking_D = tail.lacking_D + one.ffn_out.bias.detach().float() if tail is not None else before_D
    head = Head.of(two, dtype, lacking_D) if has_head else None
    arguments = attended_TD if has_tail else None, tail, head, packing.position_T.int(), cos_Ld, sin_Ld
    found_TD, found = way(event_TD.clone(), *arguments)
    assert found_TD.dtype == torch.bfloat16
    assert_close(found_TD.double() + lacking_D, exact_TD, slack)
    if not has_head:
        assert found is None
        return
    assert found is not None
    query, key, value = project(two, exact_TD, packing)
    for mine, theirs in ((unpaired(found[:, 0]), query), (unpaired(found[:, 1]), key), (found[:, 2], value)):
        assert_close(mine, theirs, 1.5 * slack)


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (64, 1), (128, 2)])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("way", [between_reference, between_products])
def test_between_is_what_two_blocks_do(
    width: int, heads: int, has_tail: bool, has_head: bool, way: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    slack = 4e-2 if way is between_products else 3e-2  # the stream is rounded without what it lacks
    check_between(way, width, heads, [20, 1, 24], has_tail, has_head, slack)


@needs_hopper
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (256, 8), (512, 8), (512, 4)])
@pytest.mark.parametrize("lengths", [[20, 1, 24], [64] * 5 + [63], [50] * 400])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
def test_on_hopper_too(
    width: int, heads: int, lengths: Sequence[int], has_tail: bool, has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 histories of 50 are more tiles than a GPU has multiprocessors; at 512 channels the library takes two of the
    products, and may split their sums into parts in bfloat16 unless that is switched off."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    check_between(between, width, heads, lengths, has_tail, has_head, 4e-2)


@needs_hopper
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (512, 8)])
def test_a_token_has_the_same_bits_wherever_it_stands(width: int, heads: int) -> None:
    one, two = make_blocks(width, heads)
    tail, head = Tail.of(one, torch.bfloat16), Head.of(two, torch.bfloat16)
    _, cos_Ld, sin_Ld = make_packing([1], width // heads)
    event_TD, attended_TD = draw(20_000, width), draw(20_000, width, seed=1)
    order_T = torch.randperm(20_000, device=DEVICE)
    position_T = torch.arange(20_000, dtype=torch.int32, device=DEVICE) % 64
    first = between(event_TD.clone(), attended_TD, tail, head, position_T, cos_Ld, sin_Ld)
    for _ in range(3):
        second = between(event_TD[order_T], attended_TD[order_T], tail, head, position_T[order_T], cos_Ld, sin_Ld)
        assert torch.equal(first[0][order_T], second[0])
        assert first[1] is not None
        assert second[1] is not None
        assert torch.equal(first[1][order_T], second[1])


@needs_hopper
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (512, 8)])
@pytest.mark.parametrize("count", [0, 1, 300, 19_999, 20_000])
def test_rows_behind_the_count_change_nothing(width: int, heads: int, count: int) -> None:
    one, two = make_blocks(width, heads)
    tail, head = Tail.of(one, torch.bfloat16), Head.of(two, torch.bfloat16)
    _, cos_Ld, sin_Ld = make_packing([1], width // heads)
    event_TD, attended_TD = draw(20_000, width), draw(20_000, width, seed=1)
    position_T = torch.arange(20_000, dtype=torch.int32, device=DEVICE) % 64
    whole = between(event_TD.clone(), attended_TD, tail, head, position_T, cos_Ld, sin_Ld)
    event_TD[count:], attended_TD[count:] = torch.nan, torch.nan
    counted = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    part = between(event_TD, attended_TD, tail, head, position_T, cos_Ld, sin_Ld, count=counted)
    for mine, theirs in zip(part, whole, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine[:count], theirs[:count])


@needs_hopper
@pytest.mark.parametrize(("width", "order"), [(256, 0), (256, 1), (256, 2), (512, 0)])
def test_who_multiplies_when_does_not_matter(width: int, order: int) -> None:
    """Bit by bit: warpgroups with rows of their own against all rows, and with and without turns."""
    from model.kernels.packed_block_gluon import _fused, normed_product

    one, two = make_blocks(width, 4)
    tail, head = Tail.of(one, torch.bfloat16), Head.of(two, torch.bfloat16)
    _, cos_Ld, sin_Ld = make_packing([1], width // 4)
    event_TD, attended_TD = draw(40_000, width), draw(40_000, width, seed=1)
    position_T = torch.arange(40_000, dtype=torch.int32, device=DEVICE) % 64
    angles = position_T, cos_Ld, sin_Ld
    if width == 512:
        arguments = event_TD, tail.lacking_D, tail.ffn_in_FD, tail.ffn_in_bias_F, tail.epsilon
        assert_close(normed_product(*arguments), normed_product(*arguments, by_columns=False).double(), 1e-2)
        return
    first = between(event_TD.clone(), attended_TD, tail, head, *angles)
    second = _fused(event_TD, attended_TD, tail, head, *angles, None, order)
    for mine, theirs in zip(first, second, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def test_what_the_stream_lacks_adds_up() -> None:
    blocks = make_blocks(64, 2)
    heads, tails, lacking_D = stack(blocks, torch.bfloat16)
    one, two, three, four = (layer.bias.float() for block in blocks for layer in (block.out, block.ffn_out))
    wanted = (torch.zeros_like(one), one, one + two, one + two + three, one + two + three + four)
    found = (heads[0].lacking_D, tails[0].lacking_D, heads[1].lacking_D, tails[1].lacking_D, lacking_D)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine.float(), theirs)


def test_a_block_behind_its_attention_by_products() -> None:
    block = make_blocks(96, 3)[0]
    event_TD, attended_TD = draw(45, 96), draw(45, 96, seed=1)
    exact_TD = finish(block, event_TD.double(), attended_TD.double())
    assert_close(finish_products(block.bfloat16(), event_TD, attended_TD), exact_TD, 4e-2)


def test_add_and_norm() -> None:
    event_TD, added_TD = draw(37, 96), draw(37, 96, seed=1)
    bias_D, weight_D, norm_bias_D = (draw(96, seed=seed, dtype=torch.float32) for seed in (2, 3, 4))
    exact_TD = event_TD.double() + added_TD.double() + bias_D.double()
    total_TD, normed_TD = add_norm_kernel(event_TD, added_TD, bias_D, weight_D, norm_bias_D, 1e-5)
    normed = torch.nn.functional.layer_norm(exact_TD, (96,), weight_D.double(), norm_bias_D.double(), 1e-5)
    assert_close(total_TD, exact_TD, 1e-5)
    assert_close(normed_TD, normed, 1e-3)
    assert torch.equal(add_norm_kernel(event_TD, added_TD, bias_D, None, None, 0.0)[0], total_TD)


def test_norm_of_what_is_complete() -> None:
    event_TD, lacking_D = draw(37, 96), draw(96, seed=2, dtype=torch.float32)
    exact_TD = torch.nn.functional.layer_norm(event_TD.double() + lacking_D.double(), (96,), eps=1e-5)
    assert_close(norm_kernel(event_TD, lacking_D, 1e-5), exact_TD, 1e-3)


def test_a_rotation_in_place_is_the_heads() -> None:
    block = make_blocks(96, 3)[0]
    packing, cos_Ld, sin_Ld = make_packing([20, 1, 24], 32)
    event_TD, head = draw(45, 96), Head.of(block, torch.bfloat16)
    exact = between_reference(event_TD.double(), None, None, head, packing.position_T, cos_Ld, sin_Ld)[1]
    assert exact is not None
    normed_TD = torch.nn.functional.layer_norm(event_TD.double(), (96,), eps=head.epsilon)
    projected = torch.nn.functional.linear(normed_TD, head.qkv_ND.double()).bfloat16()
    found = rotate_kernel(projected, head.qkv_bias_N, 3, packing.position_T, cos_Ld, sin_Ld)
    assert (found.double() - exact).abs().max() < 3 * ROUNDING * exact.abs().max()


def test_scores_do_not_change_with_the_order_of_channels() -> None:
    weight = draw(3 * 2 * 32, 64, dtype=torch.float64)
    query, key, value = weight.chunk(3)
    paired = adjacent(weight, 2).chunk(3)
    assert torch.equal(paired[2], value)
    for head in range(2):
        part = slice(32 * head, 32 * head + 32)
        scores = query[part].T @ key[part]
        assert torch.allclose(paired[0][part].T @ paired[1][part], scores)
    assert torch.equal(paired[0][:4], query[[0, 16, 1, 17]])


@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 40, 17, 64, 0], [100], [2] * 9])
@pytest.mark.parametrize("tiles", [CausalTiles(32, 16, 4, 2), CausalTiles(16, 16, 4, 1)])
def test_causal_attention_matches_the_padded_one(lengths: Sequence[int], tiles: CausalTiles) -> None:
    offsets, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    query, key, value = draw(total, 3, 2, 32).unbind(1)  # rows lie apart
    packing = Packing.of(offsets, 32, torch.zeros(total, dtype=torch.int64, device=DEVICE))
    exact = packed_causal_attention(query.double(), key.double(), value.double(), packing)
    for found in (
        launch(query, key, value, packing.offsets, tiles),
        causal_attention_reference(query, key, value, packing.offsets),
    ):
        assert (found.double() - exact).norm() / exact.norm() < 5e-3


def test_blocks_of_keys_that_reach_beyond_a_tile_are_refused() -> None:
    """Keys before a tile are read without a mask: a block across its edge would count later ones, and those twice."""
    with pytest.raises(ConfigError, match="keys must divide rows, got 128 and 64"):
        CausalTiles(64, 128, 4, 2)


def test_what_does_not_fit_is_refused() -> None:
    block = make_blocks(64, 2)[0]
    packing, cos_Ld, sin_Ld = make_packing([3], 32)
    tail, head, event_TD = Tail.of(block, torch.bfloat16), Head.of(block, torch.bfloat16), draw(3, 64)
    rest = packing.position_T, cos_Ld, sin_Ld
    with pytest.raises(ShapeError, match="with a tail, and without one nothing"):
        between(event_TD, None, tail, head, *rest)
    with pytest.raises(ShapeError, match=r"must be \[3, 64\], got \[2, 64\]"):
        between(event_TD, event_TD[:2], tail, head, *rest)
    with pytest.raises(ShapeError, match="of 64 channels"):
        between(event_TD, None, None, replace(head, num_heads=4), *rest)
