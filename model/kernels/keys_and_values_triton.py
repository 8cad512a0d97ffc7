"""Keys and values on the GPU on their way to attention: rotated after their product, widened from a cache of bytes.

Legend: E events, T tokens, h heads, d channels of a head, G pairs of an event and a head, of a program.
"""

import torch
import triton
import triton.language as tl

_ROTATED_PAIRS, _WIDENED_PAIRS = 32, 64
"""Of a program: so few that a thread has registers for them and a multiprocessor holds as many threads as it can."""


def rotate_in_place(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turns the first `heads` heads of every token to its position: channel j of a head with channel d / 2 + j.

    x: bf16 or f16 [T, at least h d], rows contiguous.  cos, sin: f32 [T, 1, d / 2], d a power of 2. Computed in f32.
    Source: rotary embedding (Su et al. 2021, equation 34).
    """
    if len(x):
        _rotate_kernel[(triton.cdiv(len(x) * heads, _ROTATED_PAIRS),)](
            x, x.stride(0), cos, sin, len(x) * heads, HEADS=heads, HALF=cos.shape[-1], PAIRS=_ROTATED_PAIRS,
            num_warps=4,
        )  # fmt: skip


def widen(
    key: torch.Tensor, value: torch.Tensor, key_scale: torch.Tensor, value_scale: torch.Tensor, request: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Keys and values of bytes times their scales, each [E, h, d] in the dtype.

    key, value: float8_e4m3fn or int8 [E, h, d], contiguous, d a power of 2, 8 or more.
    key_scale, value_scale: f32 [R, h].  request: i64 [E].
    """
    events, heads, channels = key.shape
    out = torch.empty(2, events, heads, channels, dtype=dtype, device=key.device)
    if events:
        _widen_kernel[(triton.cdiv(events * heads, _WIDENED_PAIRS), 2)](
            key, value, key_scale, value_scale, request, out, events * heads,
            HEADS=heads, D=channels, PAIRS=_WIDENED_PAIRS, num_warps=4,
        )  # fmt: skip
    return out[0], out[1]


@triton.jit
def _rotate_kernel(x, stride, cos, sin, pairs, HEADS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    pair_G = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    token_G, head_G = pair_G // HEADS, pair_G % HEADS
    channel_h = tl.arange(0, HALF)
    is_pair = (pair_G < pairs)[:, None]
    at = x + token_G[:, None].to(tl.int64) * stride + head_G[:, None] * (2 * HALF) + channel_h[None, :]
    angle_at = token_G[:, None] * HALF + channel_h[None, :]
    cos_Gh, sin_Gh = tl.load(cos + angle_at, is_pair, 1.0), tl.load(sin + angle_at, is_pair, 0.0)
    first, second = tl.load(at, is_pair, 0.0).to(tl.float32), tl.load(at + HALF, is_pair, 0.0).to(tl.float32)
    tl.store(at, (first * cos_Gh - second * sin_Gh).to(x.dtype.element_ty), is_pair)
    tl.store(at + HALF, (first * sin_Gh + second * cos_Gh).to(x.dtype.element_ty), is_pair)


@triton.jit
def _widen_kernel(
    key, value, key_scale, value_scale, request, out, pairs, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr
):
    if tl.program_id(1):
        key = value
        key_scale = value_scale
        out += tl.cast(pairs, tl.int64) * D
    pair_G = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair_G < pairs
    channel_d = tl.max_contiguous(tl.arange(0, D), 8)  # more a thread, and numbers would change hands to be stored
    at = pair_G[:, None].to(tl.int64) * D + channel_d[None, :]
    wide_Gd = tl.load(key + at, is_pair[:, None], 0.0).to(tl.float32)
    scale_at = tl.load(request + pair_G // HEADS, is_pair, 0) * HEADS + pair_G % HEADS
    wide_Gd *= tl.load(key_scale + scale_at, is_pair, 0.0)[:, None]
    tl.store(out + at, wide_Gd.to(out.dtype.element_ty), is_pair[:, None])
