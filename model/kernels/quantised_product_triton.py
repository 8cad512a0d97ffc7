"""Linear layers in 8 bits on the GPU: Triton. Both factors come by TMA; what follows a product is done on its sums.

On Hopper the matrix units sum e4m3 products with about 14 bits; that is not made up for, since rounding the factors
costs a hundred times as much.

Legend: M tokens of a tile, C output channels of a tile, K channels summed over, D channels of the residual stream.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.crossing_attention_triton import _IS_INTERPRETED
from model.kernels.packed_block_triton import norm_tile
from model.kernels.quantised_product import FP8, LARGEST, ROUNDING, Linear, Rows

_LARGEST: tl.constexpr = tl.constexpr(LARGEST)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of a product."""

    rows: int
    columns: int
    step: int
    """Channels summed over at a time."""
    num_warps: int
    num_stages: int


RESIDUAL_TILES = GELU_TILES = Tiles(128, 128, 128, 4, 3)
ROTATED_TILES = Tiles(64, 256, 128, 4, 2)
"""The fastest of nine on an H200, of 5,248 tokens and 768 channels."""


def product_kernel(x: Rows, layer: Linear, residual: torch.Tensor, tiles: Tiles | None = None) -> torch.Tensor:
    """As product. The caller has checked the shapes."""
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, layer, out, tiles or RESIDUAL_TILES, residual=residual.contiguous())
    return out


def gelu_product_kernel(x: Rows, length: torch.Tensor, layer: Linear, tiles: Tiles | None = None) -> Rows:
    """As gelu_product. The caller has checked the shapes."""
    out = x.value_NK.new_empty(len(x.value_NK), len(layer.bias_N))
    scale = torch.empty_like(x.scale_N)
    _launch(
        x, layer, out, tiles or GELU_TILES, length=length, longest=(1 + ROUNDING) * layer.longest,
        largest_bias=layer.largest_bias, out_scale=scale,
    )  # fmt: skip
    return Rows(out, scale)


def rotated_product_kernel(
    x: Rows,
    layer: Linear,
    cos: torch.Tensor,
    sin: torch.Tensor,
    turned: int,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """As rotated_product. The caller has checked the shapes."""
    out = torch.empty(len(x.value_NK), len(layer.bias_N), dtype=dtype, device=x.value_NK.device)
    _launch(x, layer, out, tiles or ROTATED_TILES, cos=cos, sin=sin, turned=turned, HALF=cos.shape[-1])
    return out


def _launch(x: Rows, layer: Linear, out: torch.Tensor, tiles: Tiles, **what: Any) -> None:
    (tokens, channels), outputs = x.value_NK.shape, len(layer.bias_N)
    if not tokens:
        return
    step = min(tiles.step, triton.next_power_of_2(channels))
    everything = {
        "residual": None, "length": None, "longest": 0.0, "largest_bias": 0.0, "out_scale": None, "cos": None,
        "sin": None, "turned": 0, "HALF": 0,
    } | what  # fmt: skip

    def block(matrix: torch.Tensor, height: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [height, step])

    _product_kernel[(triton.cdiv(tokens, tiles.rows) * triton.cdiv(outputs, tiles.columns),)](
        block(x.value_NK, tiles.rows), block(layer.weight.value_NK, tiles.columns), x.scale_N, layer.weight.scale_N,
        layer.bias_N, out, tokens, outputs, **everything,
        K=channels, ROWS=tiles.rows, COLUMNS=tiles.columns, STEP=step,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def norm_rows_kernel(
    hidden: torch.Tensor, norm: torch.Tensor, norm_bias: torch.Tensor, epsilon: float
) -> tuple[Rows, torch.Tensor]:
    """As norm_rows."""
    return _add_norm_rows(hidden.contiguous(), None, None, None, norm, norm_bias, epsilon)


def add_norm_rows_kernel(
    hidden: torch.Tensor, added: torch.Tensor, bias: torch.Tensor, norm: torch.Tensor, norm_bias: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, tuple[Rows, torch.Tensor]]:  # fmt: skip
    """As add_norm_rows."""
    total = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return total, _add_norm_rows(hidden.contiguous(), added, bias, total, norm, norm_bias, epsilon)


def _add_norm_rows(
    hidden: torch.Tensor, added: torch.Tensor | None, bias: torch.Tensor | None, total: torch.Tensor | None,
    norm: torch.Tensor, norm_bias: torch.Tensor, epsilon: float,
) -> tuple[Rows, torch.Tensor]:  # fmt: skip
    tokens, width = hidden.shape
    value = torch.empty(tokens, width, dtype=FP8, device=hidden.device)
    scale, length = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    tile = norm_tile(width)
    if tokens:
        _add_norm_rows_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            hidden, added, bias, total, norm, norm_bias, value, scale, length, tokens, epsilon, D=width, **tile
        )
    return Rows(value, scale), length


@triton.jit
def _gelu(x):
    """x times the normal distribution's share below x, by the hyperbolic tangent of an odd polynomial."""
    square = tl.minimum(x * x, 36.0)
    angle = x * (0.79750788 + square * (0.03700564577 - 0.000351516787 * square))
    if _IS_INTERPRETED:
        tangent = 2.0 / (1.0 + tl.math.exp(-2.0 * angle)) - 1.0
    else:
        tangent = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    half = 0.5 * x
    return tl.math.fma(half, tangent, half)


@triton.jit
def _rounded(x):
    """To the nearest of e4m3."""
    if _IS_INTERPRETED:  # whose conversion loses what rounding carries: it is given numbers that e4m3 holds
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        shift = 1.5 * 2.0**14
        x = tl.where(tl.abs(x) < 2.0**-6, (x + shift) - shift, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def _dot(a, b, c):
    if _IS_INTERPRETED:  # whose dot may take 8 bits for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c)


@triton.jit
def _product_kernel(
    x, weight, x_scale, weight_scale, bias, out, tokens, outputs,
    residual, length, longest, largest_bias, out_scale, cos, sin, turned, HALF: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T, and what follows: a residual is added, or GELU rounded (`length`), or channels turned
    (`cos`)."""
    across = tl.cdiv(outputs, COLUMNS)
    row = tl.program_id(0) // across * ROWS
    column = tl.program_id(0) % across * COLUMNS
    sum_MC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, STEP):
        sum_MC = _dot(x.load([row, start]), tl.trans(weight.load([column, start])), sum_MC)
    row_M = row + tl.arange(0, ROWS)
    column_C = column + tl.arange(0, COLUMNS)
    is_row = row_M < tokens
    is_column = column_C < outputs
    scale_M = tl.load(x_scale + row_M, is_row, 0.0)
    sum_MC = sum_MC * scale_M[:, None] * tl.load(weight_scale + column_C, is_column, 0.0)[None, :]
    sum_MC += tl.load(bias + column_C, is_column, 0.0)[None, :]
    at_M = row_M.to(tl.int64) * outputs
    if cos is not None:
        # Neighbours turn together, and all heads of a tile by the same angles: [M, heads, channels of half a head].
        HEADS: tl.constexpr = COLUMNS // (2 * HALF)
        first, second = tl.split(tl.reshape(sum_MC, [ROWS, HEADS, HALF, 2]))
        channel_h = tl.arange(0, HALF)
        head_column_H = column + tl.arange(0, HEADS) * (2 * HALF)
        angle_at = row_M[:, None] * HALF + channel_h[None, :]
        is_turned = (head_column_H < turned)[None, :, None]
        cos_MHh = tl.where(is_turned, tl.load(cos + angle_at, is_row[:, None], 1.0)[:, None, :], 1.0)
        sin_MHh = tl.where(is_turned, tl.load(sin + angle_at, is_row[:, None], 0.0)[:, None, :], 0.0)
        at = out + at_M[:, None, None] + head_column_H[None, :, None] + channel_h[None, None, :]
        is_pair = is_row[:, None, None] & (head_column_H < outputs)[None, :, None]
        tl.store(at, (first * cos_MHh - second * sin_MHh).to(out.dtype.element_ty), is_pair)
        tl.store(at + HALF, (first * sin_MHh + second * cos_MHh).to(out.dtype.element_ty), is_pair)
    else:
        at = at_M[:, None] + column_C[None, :]
        is_value = is_row[:, None] & is_column[None, :]
        if length is not None:
            bound_M = tl.load(length + row_M, is_row, 0.0) * longest + largest_bias
            fed_scale_M = tl.where(bound_M > 0, bound_M / _LARGEST, 1.0)
            fed_MC = _rounded(_gelu(sum_MC) * (1.0 / fed_scale_M)[:, None])
            tl.store(out + at, fed_MC, is_value)
            if column == 0:
                tl.store(out_scale + row_M, fed_scale_M, is_row)
        else:
            sum_MC += tl.load(residual + at, is_value, 0.0).to(tl.float32)
            tl.store(out + at, sum_MC.to(out.dtype.element_ty), is_value)


@triton.jit
def _add_norm_rows_kernel(
    hidden, added, bias, total, norm, norm_bias, value, scale, length, tokens, epsilon,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel_D = tl.max_contiguous(tl.arange(0, BLOCK), 8)  # more a thread, and bytes would change hands to be stored
    is_row = row_M < tokens
    is_channel = channel_D < D
    is_value = is_row[:, None] & is_channel[None, :]
    at = row_M[:, None].to(tl.int64) * D + channel_D[None, :]
    total_MD = tl.load(hidden + at, is_value, 0.0).to(tl.float32)
    if added is not None:
        total_MD += tl.load(added + at, is_value, 0.0).to(tl.float32)
        total_MD += tl.load(bias + channel_D, is_channel, 0.0).to(tl.float32)[None, :]
        tl.store(total + at, total_MD.to(total.dtype.element_ty), is_value)
    mean_M = tl.sum(total_MD, 1) / D
    centred = tl.where(is_channel[None, :], total_MD - mean_M[:, None], 0.0)
    deviation_M = tl.math.rsqrt(tl.sum(centred * centred, 1) / D + epsilon)
    result = centred * deviation_M[:, None] * tl.load(norm + channel_D, is_channel, 0.0).to(tl.float32)[None, :]
    result += tl.load(norm_bias + channel_D, is_channel, 0.0).to(tl.float32)[None, :]
    largest_M = tl.max(tl.abs(result), 1)
    scale_M = tl.where(largest_M > 0, largest_M / _LARGEST, 1.0)
    tl.store(value + at, _rounded(result * (1.0 / scale_M)[:, None]), is_value)
    tl.store(scale + row_M, scale_M, is_row)
    tl.store(length + row_M, tl.sqrt(tl.sum(result * result, 1)), is_row)
