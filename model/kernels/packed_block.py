"""A Transformer block between two attentions, for inference: output projection, feed-forward and residuals of one
block, norm and rotated projection of the next.

Of a narrow model (256 channels) activations between products cost more in memory traffic than the products in
arithmetic; so there all of it is one kernel, whose hidden part never leaves the chip. Wider models take the library's
products, with a kernel for what lies between them.

Legend: T tokens, D channels, F channels of the feed-forward's hidden part, h heads, d channels of a head, L positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.encoder import Block
from model.errors import ShapeError

FUSED_WIDTHS = (64, 128, 256)
"""Widths at which one kernel does all: more does not fit into a multiprocessor's registers."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Weights of a block behind its attention: matrices in the tokens' dtype, vectors in f32."""

    out_DD: torch.Tensor
    out_bias_D: torch.Tensor
    norm_D: torch.Tensor
    norm_bias_D: torch.Tensor
    ffn_in_FD: torch.Tensor
    ffn_in_bias_F: torch.Tensor
    ffn_out_DF: torch.Tensor
    ffn_out_bias_D: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> "Tail":
        """A copy."""
        return cls(
            *_pair(block.out, dtype), *_pair(block.ffn_norm, torch.float32), *_pair(block.ffn_in, dtype),
            *_pair(block.ffn_out, dtype), block.ffn_norm.eps,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Head:
    """Weights of a block before its attention: matrices in the tokens' dtype, vectors in f32."""

    norm_D: torch.Tensor
    norm_bias_D: torch.Tensor
    qkv_ND: torch.Tensor
    """N = 3 D; of queries and keys the two channels that turn together are neighbours, as `adjacent` leaves them."""
    qkv_bias_N: torch.Tensor
    num_heads: int
    epsilon: float

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> "Head":
        """A copy."""
        weight, bias = (adjacent(x, block.num_heads) for x in _pair(block.qkv, dtype))
        norm = _pair(block.attention_norm, torch.float32)
        return cls(*norm, weight, bias, block.num_heads, block.attention_norm.eps)


def _pair(module: torch.nn.Linear | torch.nn.LayerNorm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return module.weight.detach().to(dtype, copy=True), module.bias.detach().to(torch.float32, copy=True)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The events behind the block whose attention gave `attended_TD`, [T, D] (without a tail: as they came), and what
    the next block's attention reads: queries, keys and values, [T, 3, h, d] (without a head: None).

    event_TD, attended_TD: bf16 or f16; on the CPU any float.  position_T: i64.  cos_Ld, sin_Ld: f32 [L, d / 2].
    Sums, norms, GELU (Hendrycks and Gimpel 2016; on CUDA within 1e-3 of the exact one) and residuals in f32. No
    gradient flows. A token's result has the same bits among any others of as many. Raises ShapeError.
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
    if width in FUSED_WIDTHS:
        from model.kernels.packed_block_triton import between_kernel

        return between_kernel(*arguments)
    return between_products(*arguments)


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

    def linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TK, weight_NK.to(wide), bias_N.to(wide))

    def norm(x_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        return F.layer_norm(x_TD, weight_D.shape, weight_D.to(wide), bias_D.to(wide), epsilon)

    hidden_TD = event_TD.to(wide)
    if tail is not None and attended_TD is not None:
        hidden_TD = hidden_TD + linear(attended_TD.to(wide), tail.out_DD, tail.out_bias_D)
        normed_TD = norm(hidden_TD, tail.norm_D, tail.norm_bias_D, tail.epsilon)
        fed_TF = F.gelu(linear(normed_TD, tail.ffn_in_FD, tail.ffn_in_bias_F))
        hidden_TD = hidden_TD + linear(fed_TF, tail.ffn_out_DF, tail.ffn_out_bias_D)
    if head is None:
        return hidden_TD.to(dtype), None
    normed_TD = norm(hidden_TD, head.norm_D, head.norm_bias_D, head.epsilon)
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
    from model.kernels.packed_block_triton import add_norm_kernel, rotate_kernel

    fed_TD = None
    if tail is not None and attended_TD is not None:
        projected_TD = F.linear(attended_TD, tail.out_DD)
        event_TD, normed_TD = add_norm_kernel(
            event_TD, projected_TD, tail.out_bias_D, tail.norm_D, tail.norm_bias_D, tail.epsilon
        )
        bias_F = tail.ffn_in_bias_F.to(event_TD.dtype)
        fed_TF = torch._addmm_activation(bias_F, normed_TD, tail.ffn_in_FD.t(), use_gelu=True)
        fed_TD = F.linear(fed_TF, tail.ffn_out_DF)
    bias_D = None if tail is None else tail.ffn_out_bias_D
    if head is None:
        return add_norm_kernel(event_TD, fed_TD, bias_D, None, None, 0.0)[0], None
    event_TD, normed_TD = add_norm_kernel(event_TD, fed_TD, bias_D, head.norm_D, head.norm_bias_D, head.epsilon)
    qkv_TN = F.linear(normed_TD, head.qkv_ND)
    return event_TD, rotate_kernel(qkv_TN, head.qkv_bias_N, head.num_heads, position_T, cos_Ld, sin_Ld)
