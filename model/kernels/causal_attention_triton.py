"""Causal attention of packed histories on the GPU, forward only: Triton kernels for inference.

A tile holds events of one history; blocks of keys before the tile are read without a mask, those across it with one.
Slots of a tile follow from the offsets as in crossing_attention_triton; the last slots start first, so that where
histories are sorted by length, as the encoder's batches are, the longest work begins first.

Legend: M rows (events that ask) of a tile, N keys of a block, d channels of a head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from model.errors import ConfigError
from model.kernels.crossing_attention_triton import LOG2_E, _dot, _find_request


@dataclass(frozen=True, slots=True)
class CausalTiles:
    """Sizes of the kernel's tiles: keys divide rows, else a block read without a mask would reach into the tile."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.rows % self.keys:
            raise ConfigError(f"keys must divide rows, got {self.keys} and {self.rows}")


def choose_tiles(head_dim: int) -> CausalTiles:
    """Tiles of a head: at 64 channels the fastest of ten measured on an H100."""
    if head_dim == 128:
        return CausalTiles(128, 64, num_warps=8, num_stages=3)
    return CausalTiles(64, 64, num_warps=4, num_stages=2)


@torch.library.custom_op("hybrid_tower::causal_attention", mutates_args=())
def causal_attention_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """As causal_attention. The caller has checked dtypes; a custom operator, so that compiled callers hold it whole."""
    return launch(query, key, value, offsets, choose_tiles(query.shape[-1]))


@causal_attention_kernel.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, tiles: CausalTiles
) -> torch.Tensor:
    """The kernel on given tiles; rows may lie apart (slices of a projection), heads and channels not."""
    query, key, value = (
        x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (query, key, value)
    )
    events, heads, channels = query.shape
    out = query.new_empty(events, heads, channels)
    users = len(offsets) - 1
    if not events:
        return out
    _causal_kernel[((events // tiles.rows + users) * heads,)](
        query, key, value, query.stride(0), key.stride(0), value.stride(0), offsets, out, users, heads,
        channels**-0.5 * LOG2_E, ROWS=tiles.rows, KEYS=tiles.keys, D=channels,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("hybrid_tower::last_attention", mutates_args=())
def last_attention_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """As last_attention. The caller has checked dtypes."""
    query, key, value = (
        x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (query, key, value)
    )
    users, heads, channels = query.shape
    out = query.new_empty(users, heads, channels)
    if users:
        _last_kernel[(users, heads)](
            query, key, value, query.stride(0), key.stride(0), value.stride(0), offsets, out, heads,
            channels**-0.5 * LOG2_E, KEYS=16384 // channels, D=channels, num_warps=8,
        )  # fmt: skip
    return out


@last_attention_kernel.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


@triton.jit
def _block(
    query_Md, key_at, value_at, key_stride, value_stride, start, length, row_M, largest, total, read, scale_log2,
    KEYS: tl.constexpr, D: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """One block of online softmax (Milakov and Gimelshein 2018): scores as powers of two."""
    event_N = start + tl.arange(0, KEYS)
    channel_d = tl.arange(0, D)
    key_ptr = key_at + event_N[:, None].to(tl.int64) * key_stride + channel_d[None, :]
    value_ptr = value_at + event_N[:, None].to(tl.int64) * value_stride + channel_d[None, :]
    if IS_MASKED:
        key_Nd = tl.load(key_ptr, event_N[:, None] < length, 0.0)
        value_Nd = tl.load(value_ptr, event_N[:, None] < length, 0.0)
    else:
        key_Nd = tl.load(key_ptr)
        value_Nd = tl.load(value_ptr)
    score_MN = _dot(query_Md, tl.trans(key_Nd), tl.zeros([query_Md.shape[0], KEYS], tl.float32))
    if IS_MASKED:
        score_MN = tl.where(event_N[None, :] <= row_M[:, None], score_MN, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score_MN, 1) * scale_log2)
    share_MN = tl.math.exp2(tl.math.fma(score_MN, scale_log2, -new_largest[:, None]))
    shrink_M = tl.math.exp2(largest - new_largest)
    total = total * shrink_M + tl.sum(share_MN, 1)
    read = _dot(share_MN.to(value_Nd.dtype), value_Nd, read * shrink_M[:, None])
    return new_largest, total, read


@triton.jit
def _causal_kernel(
    query, key, value, query_stride, key_stride, value_stride, offsets, out, users, heads, scale_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Events of one tile and head over their history up to themselves."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slot = program // heads
    head = program % heads
    user = _find_request(offsets, users, slot, ROWS)
    begin = tl.load(offsets + user)
    length = tl.load(offsets + user + 1) - begin
    first = (slot - begin // ROWS - user) * ROWS
    if first < length:
        row_M = first + tl.arange(0, ROWS)
        is_row = (row_M < length)[:, None]
        channel_d = tl.arange(0, D)
        at_M = (begin + row_M).to(tl.int64)
        query_Md = tl.load(query + at_M[:, None] * query_stride + head * D + channel_d[None, :], is_row, 0.0)
        key_at = key + begin.to(tl.int64) * key_stride + head * D
        value_at = value + begin.to(tl.int64) * value_stride + head * D
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        read = tl.zeros([ROWS, D], tl.float32)
        for start in tl.range(0, first, KEYS):
            largest, total, read = _block(
                query_Md, key_at, value_at, key_stride, value_stride, start, length, row_M, largest, total, read,
                scale_log2, KEYS, D, False,
            )  # fmt: skip
        for start in tl.range(first, tl.minimum(first + ROWS, length), KEYS):
            largest, total, read = _block(
                query_Md, key_at, value_at, key_stride, value_stride, start, length, row_M, largest, total, read,
                scale_log2, KEYS, D, True,
            )  # fmt: skip
        out_at = out + (at_M[:, None] * heads + head) * D + channel_d[None, :]
        tl.store(out_at, (read / total[:, None]).to(out.dtype.element_ty), is_row)


@triton.jit
def _last_kernel(
    query, key, value, query_stride, key_stride, value_stride, offsets, out, heads, scale_log2,
    KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One user and head: the query over all events, by online softmax, block by block from the first."""
    user = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    begin = tl.load(offsets + user).to(tl.int64)
    length = tl.load(offsets + user + 1) - begin.to(tl.int32)
    channel_d = tl.arange(0, D)
    query_d = tl.load(query + user * query_stride + head * D + channel_d).to(tl.float32) * scale_log2
    key_at = key + begin * key_stride + head * D
    value_at = value + begin * value_stride + head * D
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    read_d = tl.zeros([D], tl.float32)
    for start in tl.range(0, length, KEYS):
        event_N = start + tl.arange(0, KEYS)
        is_event_N = event_N < length
        at_N = event_N[:, None].to(tl.int64)
        key_Nd = tl.load(key_at + at_N * key_stride + channel_d[None, :], is_event_N[:, None], 0.0)
        value_Nd = tl.load(value_at + at_N * value_stride + channel_d[None, :], is_event_N[:, None], 0.0)
        score_N = tl.where(is_event_N, tl.sum(key_Nd.to(tl.float32) * query_d[None, :], 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score_N, 0))
        share_N = tl.math.exp2(score_N - new_largest)
        shrink = tl.math.exp2(largest - new_largest)
        total = total * shrink + tl.sum(share_N, 0)
        read_d = read_d * shrink + tl.sum(share_N[:, None] * value_Nd.to(tl.float32), 0)
        largest = new_largest
    read_d = read_d / tl.where(length > 0, total, 1.0)
    tl.store(out + (user * heads + head) * D + channel_d, read_d.to(out.dtype.element_ty))
