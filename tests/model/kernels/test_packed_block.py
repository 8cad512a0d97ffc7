"""A block between two attentions, and causal attention, against plain PyTorch in float64."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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


def rounded_between(
    event_TD: torch.Tensor, attended_TD: torch.Tensor | None, tail: Tail | None, head: Head | None,
    position_T: torch.Tensor, cos_Ld: torch.Tensor, sin_Ld: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """between in float64, rounded to bfloat16 where a way may round: what products read, and what is stored."""

    def linear(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return x_TK.double() @ weight_NK.double().T

    def norm(x_TD: torch.Tensor, of: Tail | Head) -> torch.Tensor:
        lacked_TD = x_TD.double() + of.lacking_D.double()
        return torch.nn.functional.layer_norm(lacked_TD, lacked_TD.shape[1:], eps=of.epsilon).bfloat16()

    if tail is not None and attended_TD is not None:
        event_TD = event_TD.double() + linear(attended_TD, tail.out_DD)
        # At 256 channels the kernel keeps the stream in registers.
        event_TD = event_TD if event_TD.shape[1] == 256 else event_TD.bfloat16().double()
        fed_TF = torch.nn.functional.gelu(linear(norm(event_TD, tail), tail.ffn_in_FD) + tail.ffn_in_bias_F.double())
        event_TD = (event_TD + linear(fed_TF.bfloat16(), tail.ffn_out_DF)).bfloat16()
    if head is None:
        return event_TD, None
    read_TN = linear(norm(event_TD, head), head.qkv_ND) + head.qkv_bias_N.double()
    read = read_TN.view(len(event_TD), 3, head.num_heads, -1)
    first, second = read[:, :2, :, 0::2], read[:, :2, :, 1::2]
    cos, sin = (x[position_T][:, None, None].double() for x in (cos_Ld, sin_Ld))
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return event_TD, torch.cat([turned, read[:, 2:]], 1).bfloat16()


def assert_as_close(found: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor) -> None:
    """No farther from what is exact than the same steps rounded: on the whole by a quarter (GELU is approximate, sums
    are f32), at the worst element, of up to 10 million, by a factor of two."""
    error, allowed = ((x.double() - exact).abs().detach() for x in (found, rounded))
    assert error.norm() <= 1.25 * allowed.norm() + 1e-9, float(error.norm() / allowed.norm())
    assert error.max() <= 2 * allowed.max() + 1e-9, float(error.max() / allowed.max())


def check_between(
    way: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], width: int, heads: int, lengths: Sequence[int],
    has_tail: bool, has_head: bool, slack: float | None,
) -> None:  # fmt: skip
    """Against the blocks in float64; weights are rounded, except the reference's. slack: of an element beside its
    rounding; None: as far off as rounded_between is."""
    one, two = make_blocks(width, heads)
    packing, cos_Ld, sin_Ld = make_packing(lengths, width // heads)
    event_TD, attended_TD = draw(sum(lengths), width), draw(sum(lengths), width, seed=1)
    before_D = draw(width, seed=5, dtype=torch.float32)
    lacked_TD = event_TD.double() + before_D.double()
    exact_TD = finish(one, lacked_TD, attended_TD.double()) if has_tail else lacked_TD
    dtype = torch.float64 if way is between_reference and slack is not None else torch.bfloat16
    tail = Tail.of(one, dtype, before_D) if has_tail else None
    lacking_D = tail.lacking_D + one.ffn_out.bias.detach().float() if tail is not None else before_D
    head = Head.of(two, dtype, lacking_D) if has_head else None
    arguments = attended_TD if has_tail else None, tail, head, packing.position_T.int(), cos_Ld, sin_Ld
    found_TD, found = way(event_TD.clone(), *arguments)
    rounded_TD, rounded = rounded_between(event_TD, *arguments)
    assert found_TD.dtype == torch.bfloat16
    if slack is None:
        assert_as_close(found_TD.double() + lacking_D, rounded_TD.double() + lacking_D, exact_TD)
    else:
        assert_close(found_TD.double() + lacking_D, exact_TD, slack)
    if not has_head:
        assert found is None
        return
    assert found is not None
    assert rounded is not None
    exact = project(two, exact_TD, packing)
    for part in range(3):
        mine, allowed = (unpaired(x[:, part]) if part < 2 else x[:, part] for x in (found, rounded))
        if slack is None:
            assert_as_close(mine, allowed, exact[part])
        else:
            assert_close(mine, exact[part], 1.5 * slack)


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (64, 1), (128, 2)])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("way", [between_reference, between_products])
def test_between_is_what_two_blocks_do(
    width: int, heads: int, has_tail: bool, has_head: bool, way: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    slack = 4e-2 if way is between_products else 3e-2  # the stream is rounded without what it lacks
    check_between(way, width, heads, [20, 1, 24], has_tail, has_head, slack)


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (256, 4)])
def test_rounding_alone_is_no_farther_off(width: int, heads: int) -> None:
    """What the test on Hopper allows is itself within the other ways' slack, and no error of one element is."""
    check_between(rounded_between, width, heads, [20, 1, 24], has_tail=True, has_head=True, slack=4e-2)
    check_between(between_reference, width, heads, [20, 1, 24], has_tail=True, has_head=True, slack=None)

    def one_is_wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        found_TD, found = rounded_between(*arguments)
        found_TD[3, 5] += 0.25
        return found_TD, found

    with pytest.raises(AssertionError):
        check_between(one_is_wrong, width, heads, [20, 1, 24], has_tail=True, has_head=True, slack=None)


@needs_hopper
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (256, 8), (512, 8), (512, 4)])
@pytest.mark.parametrize("lengths", [[20, 1, 24], [64] * 5 + [63], [50] * 400])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
def test_on_hopper_too(width: int, heads: int, lengths: Sequence[int], has_tail: bool, has_head: bool) -> None:
    """400 histories of 50 are more tiles than a GPU has multiprocessors."""
    check_between(between, width, heads, lengths, has_tail, has_head, None)


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
    following = torch.nn.LayerNorm(96).to(event_TD)
    normed_TD = torch.nn.functional.layer_norm(exact_TD, (96,))
    found_TD, found_normed_TD = finish_products(block.bfloat16(), event_TD, attended_TD, following)
    assert_close(found_TD, exact_TD, 4e-2)
    assert_close(found_normed_TD, normed_TD, 4e-2)


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
