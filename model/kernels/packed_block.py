"""A Transformer block between two attentions, for inference: output projection, feed-forward and residuals of one
block, norm and rotated projection of the next.

Between products activations cost memory traffic. On Hopper, at 256 channels, all of it is one kernel, whose hidden part
never leaves the chip; at 512 a kernel takes each norm with the product behind it. Elsewhere the library's products add
to the residual stream in place, with a kernel for each norm and one for the rotation.

Two things are worked out once, with the weights. A norm's own weight and bias go into the product behind it. The
residual stream is kept without the biases of the products that add to it: they are the same for every token, and what
the stream lacks by them is added where it is normed.

Legend: T tokens, D channels, F channels of the feed-forward's hidden part, h heads, d channels of a head, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.encoder import Block
from model.errors import ShapeError

HOPPER_WIDTHS = (256, 512)
"""Widths that the kernels for Hopper know."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Weights of a block behind its attention: matrices in the tokens' dtype, vectors in f32."""

    out_DD: torch.Tensor
    lacking_D: torch.Tensor
    """What the residual stream lacks before the feed-forward: the output projection's bias and those before it."""
    ffn_in_FD: torch.Tensor
    ffn_in_bias_F: torch.Tensor
    ffn_out_DF: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype, lacking_D: torch.Tensor | None = None) -> "Tail":
        """A copy. lacking_D: what the stream lacks before the block; None: nothing."""
        wide = torch.promote_types(dtype, torch.float32)
        out_bias_D = block.out.bias.detach().to(wide, copy=True)
        return cls(
            block.out.weight.detach().to(dtype, copy=True),
            out_bias_D if lacking_D is None else lacking_D + out_bias_D,
            *_normed(block.ffn_norm, block.ffn_in, dtype),
            block.ffn_out.weight.detach().to(dtype, copy=True),
            block.ffn_norm.eps,
        )


@dataclass(frozen=True, slots=True)
class Head:
    """Weights of a block before its attention: matrices in the tokens' dtype, vectors in f32."""

    lacking_D: torch.Tensor
    """What the residual stream lacks before the block."""
    qkv_ND: torch.Tensor
    """N = 3 D; of queries and keys the two channels that turn together are neighbours, as `adjacent` leaves them."""
    qkv_bias_N: torch.Tensor
    num_heads: int
    epsilon: float

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype, lacking_D: torch.Tensor | None = None) -> "Head":
        """A copy. lacking_D: what the stream lacks before the block; None: nothing."""
        weight_ND, bias_N = (adjacent(x, block.num_heads) for x in _normed(block.attention_norm, block.qkv, dtype))
        lacking_D = torch.zeros_like(bias_N[: weight_ND.shape[1]]) if lacking_D is None else lacking_D
        return cls(lacking_D, weight_ND, bias_N, block.num_heads, block.attention_norm.eps)


def stack(blocks: Sequence[Block], dtype: torch.dtype) -> tuple[list[Head], list[Tail], torch.Tensor]:
    """Heads and tails of a Transformer, and what the stream lacks behind the last block."""
    heads, tails = [], []
    lacking_D = torch.zeros_like(blocks[0].out.bias, dtype=torch.promote_types(dtype, torch.float32))
    for block in blocks:
        heads.append(Head.of(block, dtype, lacking_D))
        tails.append(Tail.of(block, dtype, lacking_D))
        lacking_D = tails[-1].lacking_D + block.ffn_out.bias.detach().to(lacking_D.dtype)
    return heads, tails, lacking_D


def _normed(norm: torch.nn.LayerNorm, linear: torch.nn.Linear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the linear layer that reads what is normed without the norm's own."""
    weight_ND = linear.weight.detach()
    bias_N = linear.bias.detach() + weight_ND @ norm.bias.detach()
    return (weight_ND * norm.weight.detach()).to(dtype), bias_N.to(torch.promote_types(dtype, torch.float32))


def adjacent(x_N: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a projection to queries, keys and values: of a head's queries and keys channel j and channel d / 2 + j
    next to one another. Scores do not change: queries and keys are put in order alike. [N, ...]."""
    two_thirds = len(x_N) // 3 * 2
    turned = x_N[:two_thirds].reshape(2 * num_heads, 2, -1, *x_N.shape[1:]).transpose(1, 2)
    return torch.cat([turned.flatten(0, 2), x_N[two_thirds:]]).contiguous()


def between(
    event_TD: torch.Tensor,
    attended_TD: torch.Tensor | None,
    tail: Tail | None,
    head: Head | None,
    position_T: torch.Tensor,
    cos_Ld: torch.Tensor,
    sin_Ld: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The residual stream behind the block whose attention gave `attended_TD`, [T, D] (without a tail: as it came), and
    what the next block's attention reads: queries, keys and values, [T, 3, h, d] (without a head: None).

    event_TD: the stream before the block, without what the tail or head says it lacks; what comes back may stand in its
    place.  event_TD, attended_TD: bf16 or f16; on the CPU any float.  position_T: i32 or i64.  cos_Ld, sin_Ld: f32
    [L, d / 2].  count: i32 [1], on the device; rows from there on may hold anything, before and after.  Sums, norms and
    GELU (Hendrycks and Gimpel 2016; on CUDA within 1e-3 of the exact one) in f32. No gradient flows. A token's result
    has the same bits among any others of as many. Raises ShapeError.
    Source: pre-norm blocks (Xiong et al. 2020), rotary embedding (Su et al. 2021, equation 34).
    """
    width = event_TD.shape[1]
    if (tail is None) != (attended_TD is None):
        raise ShapeError("between needs what attention gave with a tail, and without one nothing")
    if attended_TD is not None and attended_TD.shape != event_TD.shape:
        raise ShapeError(f"what attention gave must be {list(event_TD.shape)}, got {list(attended_TD.shape)}")
    if head is not None and (head.qkv_ND.shape[1] != width or width != 2 * cos_Ld.shape[1] * head.num_heads):
        raise ShapeError(
            f"the head must be of {width} channels with cos and sin of half a head's, got {list(head.qkv_ND.shape)}, "
            f"{head.num_heads} heads and {list(cos_Ld.shape)}"
        )
    arguments = event_TD, attended_TD, tail, head, position_T, cos_Ld, sin_Ld
    if not event_TD.is_cuda:
        return between_reference(*arguments)
    if is_hopper(event_TD, tail, cos_Ld):
        from model.kernels.packed_block_gluon import between_hopper

        return between_hopper(*arguments, count)
    return between_products(*arguments)


def is_hopper(event_TD: torch.Tensor, tail: Tail | None, cos_Ld: torch.Tensor) -> bool:
    """Whether the kernels for Hopper take it: their widths, half precision, whole heads and hidden channels in 128."""
    return (
        event_TD.is_cuda
        and torch.cuda.get_device_capability(event_TD.device)[0] == 9
        and event_TD.shape[1] in HOPPER_WIDTHS
        and event_TD.dtype in (torch.bfloat16, torch.float16)
        and 64 % cos_Ld.shape[1] == 0
        and (tail is None or len(tail.ffn_in_FD) % 128 == 0)
    )


def finish_products(
    block: Block, input_TD: torch.Tensor, attended_TD: torch.Tensor, following: torch.nn.LayerNorm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block behind its attention, [T, D], on CUDA in half precision, without dropout: the library's products with
    GELU (by the hyperbolic tangent, within 5e-4 of the exact one) in the first of the feed-forward's, and a kernel for
    what lies between them; and what the following block's norm makes of it (None: the same). No gradient flows."""
    from model.kernels.packed_block_triton import add_norm_kernel

    norm = block.ffn_norm
    hidden_TD, normed_TD = add_norm_kernel(
        input_TD, F.linear(attended_TD, block.out.weight), block.out.bias, norm.weight, norm.bias, norm.eps
    )
    fed_TF = torch._addmm_activation(block.ffn_in.bias, normed_TD, block.ffn_in.weight.t(), use_gelu=True)
    fed_TD = F.linear(fed_TF, block.ffn_out.weight)
    after = (None, None, 0.0) if following is None else (following.weight, following.bias, following.eps)
    return add_norm_kernel(hidden_TD, fed_TD, block.ffn_out.bias, *after)


def between_reference(
    event_TD: torch.Tensor,
    attended_TD: torch.Tensor | None,
    tail: Tail | None,
    head: Head | None,
    position_T: torch.Tensor,
    cos_Ld: torch.Tensor,
    sin_Ld: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As between, on any device; rounded where it returns."""
    dtype, wide = event_TD.dtype, torch.promote_types(event_TD.dtype, torch.float32)

    def linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x_TK, weight_NK.to(wide), None if bias_N is None else bias_N.to(wide))

    def norm(x_TD: torch.Tensor, lacking_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        return F.layer_norm(x_TD + lacking_D.to(wide), lacking_D.shape, eps=epsilon)

    hidden_TD = event_TD.to(wide)
    if tail is not None and attended_TD is not None:
        hidden_TD = hidden_TD + linear(attended_TD.to(wide), tail.out_DD)
        normed_TD = norm(hidden_TD, tail.lacking_D, tail.epsilon)
        fed_TF = F.gelu(linear(normed_TD, tail.ffn_in_FD, tail.ffn_in_bias_F))
        hidden_TD = hidden_TD + linear(fed_TF, tail.ffn_out_DF)
    if head is None:
        return hidden_TD.to(dtype), None
    normed_TD = norm(hidden_TD, head.lacking_D, head.epsilon)
    qkv = linear(normed_TD, head.qkv_ND, head.qkv_bias_N).reshape(len(event_TD), 3, head.num_heads, -1)
    first, second = qkv[:, :2, :, 0::2], qkv[:, :2, :, 1::2]
    cos, sin = (x[position_T][:, None, None].to(wide) for x in (cos_Ld, sin_Ld))
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return hidden_TD.to(dtype), torch.cat([turned, qkv[:, 2:]], 1).to(dtype)


def between_products(
    event_TD: torch.Tensor,
    attended_TD: torch.Tensor | None,
    tail: Tail | None,
    head: Head | None,
    position_T: torch.Tensor,
    cos_Ld: torch.Tensor,
    sin_Ld: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As between, on CUDA at any width: the library's products, rounded after each."""
    from model.kernels.packed_block_triton import norm_kernel, rotate_kernel

    if tail is not None and attended_TD is not None:
        event_TD = event_TD.addmm_(attended_TD, tail.out_DD.t())
        normed_TD = norm_kernel(event_TD, tail.lacking_D, tail.epsilon)
        bias_F = tail.ffn_in_bias_F.to(event_TD.dtype)
        fed_TF = torch._addmm_activation(bias_F, normed_TD, tail.ffn_in_FD.t(), use_gelu=True)
        event_TD = event_TD.addmm_(fed_TF, tail.ffn_out_DF.t())
    if head is None:
        return event_TD, None
    qkv_TN = F.linear(norm_kernel(event_TD, head.lacking_D, head.epsilon), head.qkv_ND)
    return event_TD, rotate_kernel(qkv_TN, head.qkv_bias_N, head.num_heads, position_T, cos_Ld, sin_Ld)
