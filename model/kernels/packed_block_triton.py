"""A Transformer block between two attentions on the GPU: Triton.

The fused kernel holds 128 tokens' residual stream in registers from the output projection to the next block's norm, and
reads the weights once for them; weights come by TMA. Neighbouring channels turn together, so that a rotation stays
within a thread.

Legend: M tokens of a tile, D channels, C channels of a chunk of the hidden part or of queries, keys and values.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.crossing_attention_triton import _IS_INTERPRETED, _dot
from model.kernels.packed_block import Head, Tail

ROWS, CHUNK, NUM_WARPS, NUM_STAGES = 128, 64, 8, 2


def between_kernel(
    event: torch.Tensor,
    attended: torch.Tensor | None,
    tail: Tail | None,
    head: Head | None,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rows: int = ROWS,
    chunk: int = CHUNK,
    num_warps: int = NUM_WARPS,
    num_stages: int = NUM_STAGES,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As between, at a width of FUSED_WIDTHS. The caller has checked the shapes."""
    (tokens, width), half = event.shape, cos.shape[1]
    event = event.contiguous()
    out = event if tail is None else torch.empty_like(event)
    qkv = None if head is None else event.new_empty(tokens, 3, head.num_heads, 2 * half)
    if not tokens:
        return out, qkv
    attended = event if attended is None else attended.contiguous()
    # What a variant lacks it does not read: anything of the right kind stands for it.
    none, square = event.new_empty(0, dtype=torch.float32), event
    behind = (
        (square, none, none, none, square, none, square, none)
        if tail is None
        else (
            tail.out_DD, tail.out_bias_D, tail.norm_D, tail.norm_bias_D, tail.ffn_in_FD, tail.ffn_in_bias_F,
            tail.ffn_out_DF, tail.ffn_out_bias_D,
        )
    )  # fmt: skip
    before = (none, none, square, none) if head is None else (
        head.norm_D, head.norm_bias_D, head.qkv_ND, head.qkv_bias_N
    )  # fmt: skip
    out_weight, out_bias, tail_norm, tail_norm_bias, in_weight, in_bias, up_weight, up_bias = behind
    head_norm, head_norm_bias, qkv_weight, qkv_bias = before

    def block(x: torch.Tensor, height: int, breadth: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [height, breadth])

    _between_kernel[(triton.cdiv(tokens, rows),)](
        event, block(attended, rows, chunk), block(out_weight, width, chunk), out_bias, tail_norm, tail_norm_bias,
        block(in_weight, chunk, width), in_bias, block(up_weight, width, chunk), up_bias,
        head_norm, head_norm_bias, block(qkv_weight, chunk, width), qkv_bias, position, cos, sin,
        out, event if qkv is None else qkv, tokens,
        0.0 if tail is None else tail.epsilon, 0.0 if head is None else head.epsilon,
        D=width, HIDDEN=len(in_weight) if tail is not None else 0, HALF=half, ROWS=rows, CHUNK=chunk,
        HAS_TAIL=tail is not None, HAS_HEAD=head is not None, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, qkv


def add_norm_kernel(
    event: torch.Tensor,
    added: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """event + added + bias, and its layer norm (Ba et al. 2016), both [T, D] in the event's dtype, computed in f32.

    Without `added` the event as it came, without `norm` the sum in both places. bias, norm, norm_bias: f32 [D].
    """
    tokens, width = event.shape
    event = event.contiguous()
    total = event if added is None else torch.empty_like(event)
    normed = total if norm is None else torch.empty_like(event)
    tile = norm_tile(width)
    if tokens:
        _add_norm_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            event, event if added is None else added, bias, norm, norm_bias, total, normed, tokens, epsilon,
            D=width, HAS_ADDED=added is not None, HAS_NORM=norm is not None, **tile,
        )  # fmt: skip
    return total, normed


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
def _normed(x_MD, norm, norm_bias, epsilon, D: tl.constexpr):
    """Layer norm over D channels, f32."""
    channel_D = tl.arange(0, D)
    centred = x_MD - (tl.sum(x_MD, 1) / D)[:, None]
    scale_M = tl.math.rsqrt(tl.sum(centred * centred, 1) / D + epsilon)
    return centred * scale_M[:, None] * tl.load(norm + channel_D)[None, :] + tl.load(norm_bias + channel_D)[None, :]


@triton.jit
def _moved(x_MD, at, is_row):
    """The tile by way of memory that is written later: read from there it is laid out in shared memory, where the
    products find it, and leaves the registers to what they sum up. Without this half of them would spill."""
    tl.store(at, x_MD, is_row)
    tl.debug_barrier()
    return tl.load(at, is_row, 0.0)


@triton.jit
def _between_kernel(
    event, attended, out_weight, out_bias, tail_norm, tail_norm_bias, in_weight, in_bias, up_weight, up_bias,
    head_norm, head_norm_bias, qkv_weight, qkv_bias, position, cos, sin, out, qkv, tokens, tail_epsilon, head_epsilon,
    D: tl.constexpr, HIDDEN: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_TAIL: tl.constexpr, HAS_HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    row_M = row + tl.arange(0, ROWS)
    is_row = row_M < tokens
    channel_D = tl.arange(0, D)
    dtype = event.dtype.element_ty
    at = row_M[:, None].to(tl.int64) * D + channel_D[None, :]
    if HAS_TAIL:
        hidden_MD = tl.zeros([ROWS, D], tl.float32)
        for start in range(0, D, CHUNK):
            hidden_MD = _dot(attended.load([row, start]), tl.trans(out_weight.load([0, start])), hidden_MD)
        hidden_MD += tl.load(event + at, is_row[:, None], 0.0).to(tl.float32) + tl.load(out_bias + channel_D)[None, :]
        normed_MD = _normed(hidden_MD, tail_norm, tail_norm_bias, tail_epsilon, D).to(dtype)
        normed_MD = _moved(normed_MD, out + at, is_row[:, None])
        hidden_MD += tl.load(up_bias + channel_D)[None, :]
        for start in range(0, HIDDEN, CHUNK):
            fed_MC = _gelu(_projected(normed_MD, in_weight, in_bias, start, ROWS, CHUNK)).to(dtype)
            hidden_MD = _dot(fed_MC, tl.trans(up_weight.load([0, start])), hidden_MD)
        tl.store(out + at, hidden_MD.to(dtype), is_row[:, None])
    else:
        hidden_MD = tl.load(event + at, is_row[:, None], 0.0).to(tl.float32)
    if HAS_HEAD:
        normed_MD = _normed(hidden_MD, head_norm, head_norm_bias, head_epsilon, D).to(dtype)
        qkv_at = qkv + row_M[:, None].to(tl.int64) * (3 * D)
        normed_MD = _moved(normed_MD, qkv_at + channel_D[None, :], is_row[:, None])
        pair_C = tl.arange(0, CHUNK // 2)
        place_M = tl.load(position + row_M, is_row, 0)
        angle_at = place_M[:, None] * HALF + (pair_C % HALF)[None, :]
        cos_MC = tl.load(cos + angle_at)
        sin_MC = tl.load(sin + angle_at)
        for start in range(0, 2 * D, CHUNK):  # queries and keys
            read_MC = _projected(normed_MD, qkv_weight, qkv_bias, start, ROWS, CHUNK)
            if CHUNK % (2 * HALF):  # else every chunk is of whole heads, whose angles are the same
                angle_at = place_M[:, None] * HALF + ((start // 2 + pair_C) % HALF)[None, :]
                cos_MC = tl.load(cos + angle_at)
                sin_MC = tl.load(sin + angle_at)
            first, second = tl.split(tl.reshape(read_MC, [ROWS, CHUNK // 2, 2]))
            turned = tl.join(first * cos_MC - second * sin_MC, first * sin_MC + second * cos_MC)
            read_MC = tl.reshape(turned, [ROWS, CHUNK]).to(dtype)
            tl.store(qkv_at + (start + tl.arange(0, CHUNK))[None, :], read_MC, is_row[:, None])
        for start in range(2 * D, 3 * D, CHUNK):  # values
            read_MC = _projected(normed_MD, qkv_weight, qkv_bias, start, ROWS, CHUNK).to(dtype)
            tl.store(qkv_at + (start + tl.arange(0, CHUNK))[None, :], read_MC, is_row[:, None])


@triton.jit
def _projected(input_MD, weight, bias, start, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of a linear layer's channels, f32 [M, C]."""
    out_MC = _dot(input_MD, tl.trans(weight.load([start, 0])), tl.zeros([ROWS, CHUNK], tl.float32))
    return out_MC + tl.load(bias + start + tl.arange(0, CHUNK))[None, :]


@triton.jit
def _add_norm_kernel(
    event, added, bias, norm, norm_bias, total, normed, tokens, epsilon,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel_D = tl.arange(0, BLOCK)
    is_channel = channel_D < D
    is_value = (row_M < tokens)[:, None] & is_channel[None, :]
    at = row_M[:, None].to(tl.int64) * D + channel_D[None, :]
    total_MD = tl.load(event + at, is_value, 0.0).to(tl.float32)
    if HAS_ADDED:
        total_MD += tl.load(added + at, is_value, 0.0).to(tl.float32)
        total_MD += tl.load(bias + channel_D, is_channel, 0.0)[None, :]
        tl.store(total + at, total_MD.to(total.dtype.element_ty), is_value)
    if HAS_NORM:
        mean_M = tl.sum(total_MD, 1) / D
        centred = tl.where(is_channel[None, :], total_MD - mean_M[:, None], 0.0)
        scale_M = tl.math.rsqrt(tl.sum(centred * centred, 1) / D + epsilon)
        result = centred * scale_M[:, None] * tl.load(norm + channel_D, is_channel, 0.0)[None, :]
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
