"""Linear layers in 8 bits for inference: both factors in float8_e4m3fn, each row with a scale of its own.

A row is a token of the activations, or an output channel of the weights. Since a token's scale depends on that token
alone, so does its result. Activations are rounded where they are made: by the norm before a product, or behind the
product whose GELU they are. The latter's scale is known before it is computed, from a bound of its largest magnitude,
so nothing is read twice; e4m3 has an exponent, and a scale larger than need be costs no precision until values fall
below 2**-15 of the bound. Context, choice and what was measured: decision 26.

Legend: T tokens, K channels summed over, N output channels, D channels of the residual stream, F channels of the
feed-forward's hidden part, h heads, d channels of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.encoder import Block, Packing
from model.errors import ConfigError, ShapeError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""That e4m3 holds."""
ROUNDING = 2.0**-4
"""Most that rounding to e4m3 changes a number by, relative to it."""
MULTIPLE = 16
"""Of the channels of both factors: the matrix units' loads are of so many bytes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix in 1 byte a number."""

    value_NK: torch.Tensor
    """float8_e4m3fn [N, K], contiguous."""
    scale_N: torch.Tensor
    """f32: what the row's numbers are multiplied by."""

    def wide(self) -> torch.Tensor:
        """f32 [N, K]: the numbers that are meant."""
        return self.value_NK.float() * self.scale_N[:, None]


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of a linear layer."""

    weight: Rows
    bias_N: torch.Tensor
    """f32."""
    longest: float
    """Euclidean length of the weights' longest row."""
    largest_bias: float

    @classmethod
    def of(cls, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> "Linear":
        """A copy. Raises ConfigError for channels that are not multiples of 16."""
        if weight_NK.shape[0] % MULTIPLE or weight_NK.shape[1] % MULTIPLE:
            raise ConfigError(f"products in fp8 need multiples of {MULTIPLE} channels, got {list(weight_NK.shape)}")
        weight, bias_N = round_rows(weight_NK.detach().float()), bias_N.detach().to(torch.float32, copy=True)
        return cls(weight, bias_N, float(weight.wide().norm(dim=1).max()), float(bias_N.abs().max()))

    def bound(self, length_T: torch.Tensor) -> torch.Tensor:
        """f32 [T]: nothing that the layer gives for a token is larger (Cauchy-Schwarz), nor what GELU makes of it.

        length_T: Euclidean length of each token's input, before it was rounded.
        """
        return length_T * ((1 + ROUNDING) * self.longest) + self.largest_bias


def round_rows(x_NK: torch.Tensor, largest_N: torch.Tensor | None = None) -> Rows:
    """Each row scaled so that its largest magnitude (or the bound given) becomes the largest of e4m3, and rounded.

    x_NK: f32.  largest_N: f32.  A row of zeros has scale 1.
    """
    largest_N = x_NK.abs().amax(1) if largest_N is None else largest_N
    scale_N = torch.where(largest_N > 0, largest_N / LARGEST, 1.0)
    return Rows((x_NK / scale_N[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale_N)


def norm_rows(hidden_TD: torch.Tensor, norm: nn.LayerNorm) -> tuple[Rows, torch.Tensor]:
    """Layer norm (Ba et al. 2016), rounded, and the Euclidean length of each row before, f32 [T]. Computed in f32."""
    if hidden_TD.is_cuda:
        from model.kernels.quantised_product_triton import norm_rows_kernel

        return norm_rows_kernel(hidden_TD, norm.weight, norm.bias, norm.eps)
    return norm_rows_reference(hidden_TD, norm)


def norm_rows_reference(hidden_TD: torch.Tensor, norm: nn.LayerNorm) -> tuple[Rows, torch.Tensor]:
    """As norm_rows, on any device."""
    normed_TD = F.layer_norm(hidden_TD.float(), (hidden_TD.shape[1],), norm.weight.float(), norm.bias.float(), norm.eps)
    return round_rows(normed_TD), normed_TD.norm(dim=1)


def product(x: Rows, layer: Linear, residual_TN: torch.Tensor) -> torch.Tensor:
    """residual + layer(x) in the residual's dtype, [T, N]; summed in f32. Raises ShapeError."""
    check_product(x, layer, residual_TN)
    if residual_TN.is_cuda:
        from model.kernels.quantised_product_triton import product_kernel

        return product_kernel(x, layer, residual_TN)
    return product_reference(x, layer, residual_TN)


def product_reference(x: Rows, layer: Linear, residual_TN: torch.Tensor) -> torch.Tensor:
    """As product, on any device."""
    return (residual_TN + F.linear(x.wide(), layer.weight.wide(), layer.bias_N)).to(residual_TN.dtype)


def gelu_product(x: Rows, length_T: torch.Tensor, layer: Linear) -> Rows:
    """GELU (Hendrycks and Gimpel 2016; on CUDA within 1e-3 of the exact one) of layer(x), rounded, [T, N].

    length_T: as norm_rows gives it.  Raises ShapeError.
    """
    check_product(x, layer, None)
    if x.value_NK.is_cuda:
        from model.kernels.quantised_product_triton import gelu_product_kernel

        return gelu_product_kernel(x, length_T, layer)
    return gelu_product_reference(x, length_T, layer)


def gelu_product_reference(x: Rows, length_T: torch.Tensor, layer: Linear) -> Rows:
    """As gelu_product, on any device."""
    return round_rows(F.gelu(F.linear(x.wide(), layer.weight.wide(), layer.bias_N)), layer.bound(length_T))


def rotated_product(
    x: Rows, layer: Linear, cos_Td: torch.Tensor, sin_Td: torch.Tensor, turned: int, dtype: torch.dtype
) -> torch.Tensor:
    """layer(x), of which the first `turned` channels are rotated to their positions: [T, N].

    layer: its output channels in the order that `paired` gives; those of the result are in the order before.
    cos_Td, sin_Td: f32 [T, 1, d / 2].  turned: queries and keys, a multiple of d.  Raises ShapeError.
    Source: rotary embedding (Su et al. 2021, equation 34).
    """
    check_product(x, layer, None)
    if x.value_NK.is_cuda:
        from model.kernels.quantised_product_triton import rotated_product_kernel

        return rotated_product_kernel(x, layer, cos_Td, sin_Td, turned, dtype)
    return rotated_product_reference(x, layer, cos_Td, sin_Td, turned, dtype)


def rotated_product_reference(
    x: Rows, layer: Linear, cos_Td: torch.Tensor, sin_Td: torch.Tensor, turned: int, dtype: torch.dtype
) -> torch.Tensor:
    """As rotated_product, on any device."""
    out_TN, half = F.linear(x.wide(), layer.weight.wide(), layer.bias_N), cos_Td.shape[-1]
    first, second = out_TN.reshape(len(out_TN), out_TN.shape[1] // (2 * half), half, 2).unbind(-1)
    cos, sin = (x.expand_as(first) for x in (cos_Td, sin_Td))
    is_turned = (torch.arange(first.shape[1], device=first.device) < turned // (2 * half))[:, None]
    turned_first = torch.where(is_turned, first * cos - second * sin, first)
    turned_second = torch.where(is_turned, first * sin + second * cos, second)
    return torch.cat([turned_first, turned_second], -1).flatten(1).to(dtype)


def paired(x_N: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Output channels of all heads ([N, ...], N a multiple of heads): of each, channel j and channel d / 2 + j next to
    one another."""
    return x_N.reshape(num_heads, 2, -1, *x_N.shape[1:]).transpose(1, 2).flatten(0, 2).contiguous()


def check_product(x: Rows, layer: Linear, residual_TN: torch.Tensor | None) -> None:
    """Raises ShapeError."""
    (tokens, channels), (outputs, wanted) = x.value_NK.shape, layer.weight.value_NK.shape
    if channels != wanted:
        raise ShapeError(f"the layer takes {wanted} channels, got {channels}")
    if residual_TN is not None and residual_TN.shape != (tokens, outputs):
        raise ShapeError(f"the residual must be {[tokens, outputs]}, got {list(residual_TN.shape)}")


Normed = tuple[Rows, torch.Tensor]
"""What norm_rows gives."""


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """A Transformer block whose products but one are of 8 bits: a copy of its weights, which does not follow them.

    The output projection, a twelfth of the block's arithmetic, stays in the tokens' dtype: rounding what attention
    gives would cost as much time as its product saves.
    """

    block: Block
    qkv: Linear
    keys_and_values: Linear
    """The last two thirds of qkv."""
    ffn_in: Linear
    ffn_out: Linear

    @classmethod
    def of(cls, block: Block) -> "QuantisedBlock":
        """Raises ConfigError for channels that are not multiples of 16."""
        width, heads = block.out.weight.shape[0], block.num_heads
        weight, bias = (paired(x.detach(), 3 * heads) for x in (block.qkv.weight, block.qkv.bias))
        return cls(
            block, Linear.of(weight, bias), Linear.of(weight[width:], bias[width:]),
            Linear.of(block.ffn_in.weight, block.ffn_in.bias), Linear.of(block.ffn_out.weight, block.ffn_out.bias),
        )  # fmt: skip

    def begin(self, hidden_TD: torch.Tensor) -> Normed:
        """What `project` reads."""
        return norm_rows(hidden_TD, self.block.attention_norm)

    def project(
        self, hidden_TD: torch.Tensor, normed: Normed, packing: Packing
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [T, h, d]; queries and keys rotated to their positions."""
        width, angles = hidden_TD.shape[1], (packing.cos_Td, packing.sin_Td)
        qkv_TN = rotated_product(normed[0], self.qkv, *angles, 2 * width, hidden_TD.dtype)
        query, key, value = qkv_TN.view(len(qkv_TN), 3, self.block.num_heads, width // self.block.num_heads).unbind(1)
        return query, key, value

    def project_keys_and_values(
        self, hidden_TD: torch.Tensor, normed: Normed, packing: Packing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As project, without the queries."""
        width, angles = hidden_TD.shape[1], (packing.cos_Td, packing.sin_Td)
        both_TN = rotated_product(normed[0], self.keys_and_values, *angles, width, hidden_TD.dtype)
        key, value = both_TN.view(len(both_TN), 2, self.block.num_heads, width // self.block.num_heads).unbind(1)
        return key, value

    def finish(
        self, hidden_TD: torch.Tensor, attended_Thd: torch.Tensor, following: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, Normed | None]:
        """The block behind its attention, and what the following block's norm makes of it."""
        out = self.block.out
        projected_TD = F.linear(attended_Thd.flatten(1), out.weight)
        hidden_TD, (normed, length_T) = add_norm_rows(hidden_TD, projected_TD, out.bias, self.block.ffn_norm)
        fed = gelu_product(normed, length_T, self.ffn_in)
        hidden_TD = product(fed, self.ffn_out, hidden_TD)
        return hidden_TD, None if following is None else norm_rows(hidden_TD, following)


def add_norm_rows(
    hidden_TD: torch.Tensor, added_TD: torch.Tensor, bias_D: torch.Tensor, norm: nn.LayerNorm
) -> tuple[torch.Tensor, Normed]:
    """hidden + added + bias in hidden's dtype, and as norm_rows its norm, taken before rounding."""
    if hidden_TD.is_cuda:
        from model.kernels.quantised_product_triton import add_norm_rows_kernel

        return add_norm_rows_kernel(hidden_TD, added_TD, bias_D, norm.weight, norm.bias, norm.eps)
    total_TD = hidden_TD + added_TD + bias_D
    return total_TD, norm_rows_reference(total_TD, norm)
