"""Linear layers on the GPU with activation, residual or rotation in the same kernel: Triton, TMA loads, persistent
programs that each do every so-many-th tile, so that the loads of one tile run while another is finished.

Legend: M tokens of a tile, N channels out of a tile, K channels in.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.crossing_attention_triton import _dot


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Sizes of a kernel's tiles."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs: int = 1
    """Of each multiprocessor."""


def choose_tiles(columns: int, depth: int) -> LinearTiles:
    """Tiles of a layer of so many channels out and in."""
    width = min(128, triton.next_power_of_2(columns))
    return LinearTiles(128, width, min(64, depth & -depth), num_warps=8, num_stages=3)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 4 where kernels are interpreted, to share out the tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def linear_kernel(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    is_gelu: bool,
    residual: torch.Tensor | None,
    tiles: LinearTiles | None = None,
) -> torch.Tensor:
    """As linear. The caller has checked the shapes."""
    (tokens, depth), columns = input.shape, len(weight)
    tiles = tiles or choose_tiles(columns, depth)
    out = input.new_empty(tokens, columns)
    if not tokens:
        return out
    input = input if input.stride(1) == 1 else input.contiguous()
    count = triton.cdiv(tokens, tiles.rows) * triton.cdiv(columns, tiles.columns)
    _linear_kernel[(min(tiles.programs * processors(input.device), count),)](
        TensorDescriptor(input, [tokens, depth], [input.stride(0), 1], [tiles.rows, tiles.depth]),
        TensorDescriptor(weight, [columns, depth], [depth, 1], [tiles.columns, tiles.depth]),
        bias, out if residual is None else residual.contiguous(),
        TensorDescriptor(out, [tokens, columns], [columns, 1], [tiles.rows, tiles.columns]),
        tokens, columns, K=depth, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, IS_GELU=is_gelu,
        HAS_RESIDUAL=residual is not None, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def project_rotated_kernel(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tiles: LinearTiles | None = None,
) -> torch.Tensor:
    """As project_rotated. The caller has checked the shapes."""
    (tokens, depth), columns, half = input.shape, len(weight), cos.shape[1]
    tiles = tiles or choose_tiles(columns, depth)
    out = input.new_empty(tokens, 3, columns // 6 // half, 2 * half)
    if not tokens:
        return out
    input = input if input.stride(1) == 1 else input.contiguous()
    width = tiles.columns // 2
    while columns // 3 // 2 % width:  # a tile is of queries and keys, or of values
        width //= 2
    count = triton.cdiv(tokens, tiles.rows) * triton.cdiv(columns // 2, width)
    _project_kernel[(min(tiles.programs * processors(input.device), count),)](
        TensorDescriptor(input, [tokens, depth], [input.stride(0), 1], [tiles.rows, tiles.depth]),
        TensorDescriptor(weight, [columns, depth], [depth, 1], [width, tiles.depth]),
        bias, position, cos, sin, out, tokens, columns, K=depth, ROWS=tiles.rows, COLUMNS=width, DEPTH=tiles.depth,
        HALF=half, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def norm_kernel(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Layer norm (Ba et al. 2016) over channels, in f32: [T, K] in the input's dtype. weight, bias: f32 [K]."""
    tokens, channels = input.shape
    out = input.new_empty(tokens, channels)
    block = triton.next_power_of_2(channels)
    rows = max(1, 4096 // block)
    if tokens:
        _norm_kernel[(triton.cdiv(tokens, rows),)](
            input, input.stride(0), weight, bias, out, tokens, epsilon, K=channels, ROWS=rows, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _gelu(x):
    """x times the normal distribution's share below x, as a logistic function of an odd polynomial: within 3e-5."""
    square = tl.minimum(x * x, 36.0)
    exponent = x * (2.30112134 + square * (0.106775724 - 0.00101426306 * square))
    return x / (1.0 + tl.math.exp2(-exponent))


@triton.jit
def _linear_kernel(
    input, weight, bias, residual, out, tokens, columns, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, IS_GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(columns, COLUMNS)
    count = tl.cdiv(tokens, ROWS) * column_tiles
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        row = tile // column_tiles * ROWS
        column = tile % column_tiles * COLUMNS
        result = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            result = _dot(input.load([row, k]), tl.trans(weight.load([column, k])), result)
        column_N = column + tl.arange(0, COLUMNS)
        result += tl.load(bias + column_N, column_N < columns, 0.0)[None, :]
        if IS_GELU:
            result = _gelu(result)
        if HAS_RESIDUAL:
            row_M = row + tl.arange(0, ROWS)
            at = residual + row_M[:, None].to(tl.int64) * columns + column_N[None, :]
            result += tl.load(at, (row_M < tokens)[:, None] & (column_N < columns)[None, :], 0.0).to(tl.float32)
        out.store([row, column], result.to(residual.dtype.element_ty))


@triton.jit
def _project_kernel(
    input, weight, bias, position, cos, sin, out, tokens, columns, K: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """First and second halves of the same heads' channels are two products of one tile: rotating mixes no columns."""
    half_columns = columns // 2
    column_tiles = tl.cdiv(half_columns, COLUMNS)
    count = tl.cdiv(tokens, ROWS) * column_tiles
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        row = tile // column_tiles * ROWS
        column = tile % column_tiles * COLUMNS
        first = tl.zeros([ROWS, COLUMNS], tl.float32)
        second = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            input_MK = input.load([row, k])
            first = _dot(input_MK, tl.trans(weight.load([column, k])), first)
            second = _dot(input_MK, tl.trans(weight.load([half_columns + column, k])), second)
        column_N = column + tl.arange(0, COLUMNS)
        row_M = row + tl.arange(0, ROWS)
        is_row = (row_M < tokens)[:, None]
        first += tl.load(bias + column_N)[None, :]
        second += tl.load(bias + half_columns + column_N)[None, :]
        if column * 3 < columns:  # of queries or keys
            place_M = tl.load(position + row_M, row_M < tokens, 0)
            at = place_M[:, None] * HALF + (column_N % HALF)[None, :]
            cos_MN = tl.load(cos + at)
            sin_MN = tl.load(sin + at)
            turned = first * cos_MN - second * sin_MN
            second = first * sin_MN + second * cos_MN
            first = turned
        out_at = (
            out + row_M[:, None].to(tl.int64) * columns + (column_N // HALF * (2 * HALF) + column_N % HALF)[None, :]
        )
        tl.store(out_at, first.to(out.dtype.element_ty), is_row)
        tl.store(out_at + HALF, second.to(out.dtype.element_ty), is_row)


@triton.jit
def _norm_kernel(
    input, input_stride, weight, bias, out, tokens, epsilon, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel_K = tl.arange(0, BLOCK)
    is_channel = (channel_K < K)[None, :]
    is_value = (row_M < tokens)[:, None] & is_channel
    input_MK = tl.load(input + row_M[:, None].to(tl.int64) * input_stride + channel_K[None, :], is_value, 0.0)
    input_MK = input_MK.to(tl.float32)
    mean_M = tl.sum(input_MK, 1) / K
    centred = tl.where(is_channel, input_MK - mean_M[:, None], 0.0)
    scale_M = tl.math.rsqrt(tl.sum(centred * centred, 1) / K + epsilon)
    weight_K = tl.load(weight + channel_K, channel_K < K, 0.0)
    bias_K = tl.load(bias + channel_K, channel_K < K, 0.0)
    result = centred * scale_M[:, None] * weight_K[None, :] + bias_K[None, :]
    tl.store(out + row_M[:, None].to(tl.int64) * K + channel_K[None, :], result.to(out.dtype.element_ty), is_value)
