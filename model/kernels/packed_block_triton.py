"""What lies between the library's products in a Transformer block on the GPU: norms and the rotation. Triton.

Neighbouring channels turn together, so that a rotation stays within a thread.

Legend: M tokens of a tile, D channels, N channels of queries, keys and values, C pairs of them.
"""

import torch
import triton
import triton.language as tl


def add_norm_kernel(
    event: torch.Tensor,
    added: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """event + added + bias, and its layer norm (Ba et al. 2016), both [T, D] in the event's dtype, computed in f32.

    Without `added`, which a bias comes with, the event as it came; without `norm` the sum in both places.
    bias, norm, norm_bias: f32 [D].
    """
    event = event.contiguous()
    total = event if added is None else torch.empty_like(event)
    normed = total if norm is None else torch.empty_like(event)
    _launch(event, added, bias, norm, norm_bias, total, normed, epsilon)
    return total, normed


def norm_kernel(event: torch.Tensor, lacking: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The layer norm of event + lacking, without weight and bias: [T, D]. lacking: f32 [D]."""
    event = event.contiguous()
    normed = torch.empty_like(event)
    _launch(event, None, lacking, None, None, event, normed, epsilon)
    return normed


def _launch(
    event: torch.Tensor, added: torch.Tensor | None, bias: torch.Tensor | None, norm: torch.Tensor | None,
    norm_bias: torch.Tensor | None, total: torch.Tensor, normed: torch.Tensor, epsilon: float,
) -> None:  # fmt: skip
    tokens, width = event.shape
    tile = norm_tile(width)
    if tokens:
        _add_norm_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            event, added, bias, norm, norm_bias, total, normed, tokens, epsilon, D=width, HAS_ADDED=added is not None,
            HAS_BIAS=bias is not None, HAS_NORM=normed is not total, IS_SCALED=norm is not None, **tile,
        )  # fmt: skip


def norm_tile(width: int) -> dict[str, int]:
    """What a program of a norm takes: whole rows to a warp, so that no sum of a row waits for another warp."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, 2048 // block), "num_warps": max(1, block // 2048)}


def rotate_kernel(
    qkv: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Adds the bias and turns queries and keys, in place: [T, 3, h, d]. qkv: [T, 3 h d]."""
    tokens, columns = qkv.shape
    block = triton.next_power_of_2(columns // 2)
    rows = max(1, 2048 // block)
    if tokens:
        _rotate_kernel[(triton.cdiv(tokens, rows),)](
            qkv, bias, position, cos, sin, tokens, COLUMNS=columns, HALF=cos.shape[1], ROWS=rows, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return qkv.view(tokens, 3, num_heads, 2 * cos.shape[1])


@triton.jit
def _add_norm_kernel(
    event, added, bias, norm, norm_bias, total, normed, tokens, epsilon,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, IS_SCALED: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel_D = tl.arange(0, BLOCK)
    is_channel = channel_D < D
    is_value = (row_M < tokens)[:, None] & is_channel[None, :]
    at = row_M[:, None].to(tl.int64) * D + channel_D[None, :]
    total_MD = tl.load(event + at, is_value, 0.0).to(tl.float32)
    if HAS_BIAS:
        total_MD += tl.load(bias + channel_D, is_channel, 0.0)[None, :]
    if HAS_ADDED:
        total_MD += tl.load(added + at, is_value, 0.0).to(tl.float32)
        tl.store(total + at, total_MD.to(total.dtype.element_ty), is_value)
    if HAS_NORM:
        mean_M = tl.sum(total_MD, 1) / D
        centred = tl.where(is_channel[None, :], total_MD - mean_M[:, None], 0.0)
        scale_M = tl.math.rsqrt(tl.sum(centred * centred, 1) / D + epsilon)
        result = centred * scale_M[:, None]
        if IS_SCALED:
            result *= tl.load(norm + channel_D, is_channel, 0.0)[None, :]
            result += tl.load(norm_bias + channel_D, is_channel, 0.0)[None, :]
        tl.store(normed + at, result.to(normed.dtype.element_ty), is_value)


@triton.jit
def _rotate_kernel(
    qkv, bias, position, cos, sin, tokens,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs of neighbouring channels; those of values are only given their bias."""
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_N = tl.arange(0, 2 * BLOCK)
    pair_C = tl.arange(0, BLOCK)
    is_row = row_M < tokens
    is_value = is_row[:, None] & (column_N < COLUMNS)[None, :]
    at = qkv + row_M[:, None].to(tl.int64) * COLUMNS + column_N[None, :]
    read_MN = tl.load(at, is_value, 0.0).to(tl.float32) + tl.load(bias + column_N, column_N < COLUMNS, 0.0)[None, :]
    is_turned = is_row[:, None] & (pair_C < COLUMNS // 3)[None, :]
    angle_at = tl.load(position + row_M, is_row, 0)[:, None] * HALF + (pair_C % HALF)[None, :]
    cos_MC = tl.load(cos + angle_at, is_turned, 1.0)
    sin_MC = tl.load(sin + angle_at, is_turned, 0.0)
    first, second = tl.split(tl.reshape(read_MN, [ROWS, BLOCK, 2]))
    read_MN = tl.reshape(tl.join(first * cos_MC - second * sin_MC, first * sin_MC + second * cos_MC), [ROWS, 2 * BLOCK])
    tl.store(at, read_MN.to(qkv.dtype.element_ty), is_value)
