"""Crossing attention on the GPU: Triton kernels, forward and backward.

Whatever shares out the work, the arithmetic of one candidate is always the same (docs/decisions/0013):
- A history is read in chunks of a fixed number of events. Within a chunk softmax runs online; finished chunks are
  folded into a total, oldest first. One program may do all chunks, or each its own and a second kernel the folding:
  the same operations in the same order, so the same bits.
- A tile holds tokens of one request only, and no row of it looks at another. Its shape depends on dtype and channels
  alone, never on how many candidates there are.
- Nothing is added atomically. A history key's gradient is summed by one program over its request's tokens, in order.

No size is read from the device: launches are as large as the shapes alone allow, and programs without work end at once.
Of the requests' lengths, slots of a tile follow from the offsets alone: request r has those from offsets[r] // size + r
on, which are always enough, since floor((a + c) / size) - floor(a / size) + 1 >= ceil(c / size).

Legend: as in crossing_attention; M rows (tokens) of a tile, N events of a block, G chunks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from model.kernels.crossing_attention_gluon import (
    HopperTiles,
    choose_hopper_tiles,
    fills_waves,
    hopper_forward,
    is_hopper,
)

LOG2_E = 1.4426950408889634
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_IS_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
_SCRATCH_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of the kernels' tiles. `rows`, `keys` and `chunk` fix the bits of a result."""

    rows: int
    """Tokens of a program."""
    keys: int
    """History events of a block."""
    chunk: int
    """History events between two foldings; a multiple of keys."""
    num_warps: int
    num_stages: int
    query_gradient: "BackwardTiles"
    history_gradient: "BackwardTiles"
    is_split: bool | None = None
    """Whether each chunk has a program of its own; None: where there would be too few programs otherwise."""


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Of a kernel of the backward pass."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of a head: never dependent on how many candidates or events there are."""
    if dtype == torch.float32:
        small = BackwardTiles(32, 32, num_warps=4, num_stages=2)
        return Tiles(32, 32, 2048, num_warps=4, num_stages=2, query_gradient=small, history_gradient=small)
    backward = BackwardTiles(64, 64, num_warps=4, num_stages=2)
    rows, num_warps = (128, 8) if head_dim == 128 else (64, 4)
    return Tiles(rows, 64, 2048, num_warps, num_stages=3, query_gradient=backward, history_gradient=backward)


def choose_forward_tiles(
    query_THd: torch.Tensor, requests: int, longest_history: int | None = None
) -> Tiles | HopperTiles:
    """Tiles of the forward pass of the kernel for this device: that of crossing_attention_gluon, or the one here."""
    if is_hopper(query_THd):
        return choose_hopper_tiles(query_THd.shape[-1], fills_waves(query_THd, requests, longest_history))
    return choose_tiles(query_THd.shape[-1], query_THd.dtype)


def crossing_attention_kernel(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    *,
    tokens: int = 1,
    longest_history: int | None = None,
    tiles: Tiles | HopperTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As crossing_attention, with the log of the denominators. The caller has checked the shapes.

    tiles: of the forward pass, and so which kernel does it; for tests and for finding better ones.
    """
    tiles = tiles or choose_forward_tiles(query_THd, len(candidate_offsets) - 1, longest_history)
    with torch.cuda.device_of(query_THd):  # kernels start on the current device; on the CPU this does nothing
        out_THd, lse_TH = _CrossingAttention.apply(
            query_THd, key_self_TKd, value_self_TKd, history_key_SKd, history_value_SKd,
            candidate_offsets, history_offsets, tokens, longest_history, tiles,
        )  # fmt: skip
    return out_THd, lse_TH


class _CrossingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query, key_self, value_self, history_key, history_value, candidate_offsets, history_offsets,
        tokens: int, longest_history: int | None, tiles: Tiles | HopperTiles,
    ):  # fmt: skip
        query, key_self, value_self = _rows_apart(query), _rows_apart(key_self), _rows_apart(value_self)
        history_key, history_value = _rows_apart(history_key), _rows_apart(history_value)
        inputs = (query, key_self, value_self, history_key, history_value, candidate_offsets, history_offsets)
        sizes: dict[str, Any] = {"tokens": tokens, "longest_history": longest_history}
        if isinstance(tiles, HopperTiles):
            out, lse = hopper_forward(*inputs, **sizes, tiles=tiles)
            tiles = choose_tiles(query.shape[-1], query.dtype)
        else:
            out, lse = forward(*inputs, **sizes, tiles=tiles)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.tokens, ctx.tiles = tokens, tiles
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, out_gradient, _lse_gradient):
        gradients = backward(out_gradient, *ctx.saved_tensors, tokens=ctx.tokens, tiles=ctx.tiles)
        return (*gradients, None, None, None, None, None)


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    """The tensor with heads and channels packed, whatever lies between two rows: a slice of a projection stays."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def forward(
    query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor, history_key: torch.Tensor,
    history_value: torch.Tensor, candidate_offsets: torch.Tensor, history_offsets: torch.Tensor,
    *, tokens: int, longest_history: int | None, tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [T, H, d] and log of the denominators, f32 [T, H]."""
    num_tokens, heads, channels = query.shape
    out = query.new_empty(num_tokens, heads, channels)
    lse = query.new_empty(num_tokens, heads, dtype=torch.float32)
    if not num_tokens:
        return out, lse
    requests = len(candidate_offsets) - 1
    slots = num_tokens // tiles.rows + requests
    most_chunks = triton.cdiv(len(history_key) if longest_history is None else longest_history, tiles.chunk)
    is_split = most_chunks > 0 and tiles.is_split is not False
    if is_split and tiles.is_split is None:
        programs = max(triton.cdiv(num_tokens, tiles.rows), requests) * heads
        is_split = _is_split_worthwhile(query, programs, most_chunks)
    shared = {
        "heads": heads, "group": heads // key_self.shape[1], "requests": requests,
        "scale_log2": channels**-0.5 * LOG2_E, "TOKENS": tokens, "ROWS": tiles.rows, "D": channels,
        "num_warps": tiles.num_warps,
    }  # fmt: skip
    self_pair = (key_self, value_self, key_self.stride(0), value_self.stride(0))
    pair = (history_key, history_value, history_key.stride(0), history_value.stride(0))
    if is_split:
        part_GTHd = query.new_empty(most_chunks, num_tokens, heads, channels, dtype=torch.float32)
        part_max_GTH, part_sum_GTH = lse.new_empty(2, most_chunks, num_tokens, heads)
    else:
        part_GTHd, part_max_GTH, part_sum_GTH = out, lse, lse  # not looked at
    _forward_kernel[(slots * heads, most_chunks if is_split else 1)](
        query, query.stride(0), *self_pair, *pair, candidate_offsets, history_offsets, out, lse,
        part_GTHd, part_max_GTH, part_sum_GTH, num_tokens,
        **shared, KEYS=tiles.keys, CHUNK=tiles.chunk, IS_SPLIT=is_split,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    if is_split:
        _fold_kernel[(slots * heads,)](
            query, query.stride(0), *self_pair, candidate_offsets, history_offsets, out, lse,
            part_GTHd, part_max_GTH, part_sum_GTH, num_tokens, **shared, CHUNK=tiles.chunk,
        )  # fmt: skip
    return out, lse


def _is_split_worthwhile(query: torch.Tensor, programs: int, most_chunks: int) -> bool:
    """Whether programs of whole histories (so many, about) would leave over a quarter of the device idle."""
    scratch_bytes = query.numel() * 4 * most_chunks
    if not query.is_cuda or most_chunks <= 1 or scratch_bytes > _SCRATCH_LIMIT_BYTES:
        return False
    return 4 * programs < 3 * torch.cuda.get_device_properties(query.device).multi_processor_count


def backward(
    out_gradient: torch.Tensor, query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor,
    history_key: torch.Tensor, history_value: torch.Tensor, candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *, tokens: int, tiles: Tiles,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of query, own keys and values, history keys and values."""
    out_gradient = _rows_apart(out_gradient)
    if query.is_cuda and replace(tiles, is_split=None) == choose_tiles(query.shape[-1], query.dtype):
        from model.kernels import crossing_attention_gluon_backward as hopper

        if hopper.is_supported(query, history_key, history_value, out_gradient):
            return hopper.backward(
                out_gradient, query, key_self, value_self, history_key, history_value, candidate_offsets,
                history_offsets, out, lse, tokens=tokens,
            )  # fmt: skip
    delta = torch.empty_like(lse)
    kept = (query, key_self, value_self, history_key, history_value, candidate_offsets, history_offsets)
    query_g = query_gradient(out_gradient, *kept, out, lse, delta, tokens=tokens, tiles=tiles.query_gradient)
    own = self_gradients(out_gradient, *kept[:3], lse, delta, tokens=tokens)
    return query_g, *own, *history_gradients(out_gradient, *kept, lse, delta, tiles=tiles.history_gradient)


def query_gradient(
    out_gradient: torch.Tensor, query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor,
    history_key: torch.Tensor, history_value: torch.Tensor, candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    *, tokens: int, tiles: BackwardTiles,
) -> torch.Tensor:  # fmt: skip
    """The query's gradient; fills delta, f32 [T, H], which the others read."""
    num_tokens, heads, channels = query.shape
    requests = len(candidate_offsets) - 1
    gradient = query.new_empty(num_tokens, heads, channels)
    if num_tokens:
        _query_gradient_kernel[((num_tokens // tiles.rows + requests) * heads,)](
            query, query.stride(0), out_gradient, out_gradient.stride(0),
            key_self, value_self, key_self.stride(0), value_self.stride(0),
            history_key, history_value, history_key.stride(0), history_value.stride(0),
            candidate_offsets, history_offsets, out, lse, delta, gradient,
            heads=heads, group=heads // key_self.shape[1], scale=channels**-0.5, requests=requests, TOKENS=tokens,
            ROWS=tiles.rows, KEYS=tiles.keys, D=channels, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return gradient


def self_gradients(
    out_gradient: torch.Tensor, query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, *, tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of own keys and values."""
    num_tokens, key_heads, channels = key_self.shape
    key_g, value_g = (x.new_empty(num_tokens, key_heads, channels) for x in (key_self, value_self))
    if num_tokens:
        rows = 32
        _self_gradient_kernel[(triton.cdiv(num_tokens, rows) * key_heads,)](
            query, query.stride(0), out_gradient, out_gradient.stride(0),
            key_self, value_self, key_self.stride(0), value_self.stride(0), lse, delta, key_g, value_g, num_tokens,
            key_heads=key_heads, group=query.shape[1] // key_heads, scale=channels**-0.5, TOKENS=tokens,
            ROWS=rows, D=channels, num_warps=4,
        )  # fmt: skip
    return key_g, value_g


def history_gradients(
    out_gradient: torch.Tensor, query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor,
    history_key: torch.Tensor, history_value: torch.Tensor, candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, *, tiles: BackwardTiles,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of history keys and values."""
    events, key_heads, channels = history_key.shape
    requests = len(candidate_offsets) - 1
    key_g, value_g = (x.new_empty(events, key_heads, channels) for x in (history_key, history_value))
    if not len(query):
        return key_g.zero_(), value_g.zero_()
    if events:
        _history_gradient_kernel[((events // tiles.keys + requests) * key_heads,)](
            query, query.stride(0), out_gradient, out_gradient.stride(0),
            history_key, history_value, history_key.stride(0), history_value.stride(0),
            candidate_offsets, history_offsets, lse, delta, key_g, value_g,
            key_heads=key_heads, group=query.shape[1] // key_heads, scale=channels**-0.5, requests=requests,
            ROWS=tiles.rows, KEYS=tiles.keys, D=channels, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return key_g, value_g


@triton.jit
def _find_request(offsets, requests, slot, SIZE: tl.constexpr):
    """The request that a slot belongs to (the last r with offsets[r] // SIZE + r <= slot), by halving."""
    low = slot * 0
    high = low + requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_at_or_before = tl.load(offsets + middle) // SIZE + middle <= slot
        low = tl.where(is_at_or_before, middle, low)
        high = tl.where(is_at_or_before, high, middle - 1)
    return low


@triton.jit
def _dot(a, b, c):
    """a @ b + c, summed in f32; f32 products are not rounded to tf32."""
    if _IS_INTERPRETED and a.dtype == tl.bfloat16:  # which the interpreter's dot takes for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _read_block(
    query, key_at, value_at, key_stride, value_stride, start, end, largest, total, read, scale_log2,
    KEYS: tl.constexpr, D: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of online softmax (Milakov and Gimelshein 2018): scores as powers of two."""
    event_N = start + tl.arange(0, KEYS)
    channel_d = tl.arange(0, D)
    if IS_WHOLE:
        key_Nd = tl.load(key_at + event_N[:, None].to(tl.int64) * key_stride + channel_d[None, :])
        value_Nd = tl.load(value_at + event_N[:, None].to(tl.int64) * value_stride + channel_d[None, :])
    else:
        is_event = event_N[:, None] < end
        key_Nd = tl.load(key_at + event_N[:, None].to(tl.int64) * key_stride + channel_d[None, :], is_event, 0.0)
        value_Nd = tl.load(value_at + event_N[:, None].to(tl.int64) * value_stride + channel_d[None, :], is_event, 0.0)
    score_MN = _dot(query, tl.trans(key_Nd), tl.zeros([query.shape[0], KEYS], tl.float32))
    if not IS_WHOLE:
        score_MN = tl.where(event_N[None, :] < end, score_MN, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score_MN, 1) * scale_log2)
    share_MN = tl.math.exp2(tl.math.fma(score_MN, scale_log2, -new_largest[:, None]))
    shrink_M = tl.math.exp2(largest - new_largest)
    total = total * shrink_M + tl.sum(share_MN, 1)
    read = _dot(share_MN.to(value_Nd.dtype), value_Nd, read * shrink_M[:, None])
    return new_largest, total, read


@triton.jit
def _read_chunk(
    query, key_at, value_at, key_stride, value_stride, start, end, scale_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Events start..end of a history: largest score, sum of shares, and shares times values, of each row."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    read = tl.zeros([ROWS, D], tl.float32)
    whole_end = start + (end - start) // KEYS * KEYS
    for block in tl.range(start, whole_end, KEYS):
        largest, total, read = _read_block(
            query, key_at, value_at, key_stride, value_stride, block, end, largest, total, read, scale_log2,
            KEYS, D, True,
        )  # fmt: skip
    if whole_end < end:
        largest, total, read = _read_block(
            query, key_at, value_at, key_stride, value_stride, whole_end, end, largest, total, read, scale_log2,
            KEYS, D, False,
        )  # fmt: skip
    return largest, total, read


@triton.jit
def _fold(largest, total, read, chunk_largest, chunk_total, chunk_read):
    """A finished chunk joins the total. Fused multiply-adds are spelt out, so that no compiler chooses them."""
    new_largest = tl.maximum(largest, chunk_largest)
    old_M = tl.math.exp2(largest - new_largest)
    new_M = tl.math.exp2(chunk_largest - new_largest)
    total = tl.math.fma(total, old_M, chunk_total * new_M)
    read = tl.math.fma(read, tl.broadcast_to(old_M[:, None], read.shape), chunk_read * new_M[:, None])
    return new_largest, total, read


@triton.jit
def _add_self_and_store(
    query_ptr, query_stride, key_self, value_self, key_self_stride, value_self_stride, out, lse,
    row_M, is_row_M, head, key_head, heads, largest, total, read, scale_log2,
    TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The candidate's own tokens up to the row's, oldest first, then the division."""
    channel_d = tl.arange(0, D)
    is_row = is_row_M[:, None]
    query_Md = tl.load(query_ptr + row_M[:, None] * query_stride + head * D + channel_d[None, :], is_row, 0.0)
    query_Md = query_Md.to(tl.float32)
    place_M = row_M % TOKENS
    for token in tl.static_range(TOKENS):
        own_M = row_M - place_M + token
        key_Md = tl.load(key_self + own_M[:, None] * key_self_stride + key_head * D + channel_d[None, :], is_row, 0.0)
        value_Md = tl.load(
            value_self + own_M[:, None] * value_self_stride + key_head * D + channel_d[None, :], is_row, 0.0
        )
        score_M = tl.sum(query_Md * key_Md.to(tl.float32), 1) * scale_log2
        score_M = tl.where(token <= place_M, score_M, float("-inf"))
        new_largest = tl.maximum(largest, score_M)
        shrink_M = tl.math.exp2(largest - new_largest)
        share_M = tl.math.exp2(score_M - new_largest)
        total = tl.math.fma(total, shrink_M, share_M)
        read = tl.math.fma(
            read, tl.broadcast_to(shrink_M[:, None], read.shape), share_M[:, None] * value_Md.to(tl.float32)
        )
        largest = new_largest
    at_M = row_M * heads + head
    tl.store(out + at_M[:, None] * D + channel_d[None, :], (read / total[:, None]).to(out.dtype.element_ty), is_row)
    tl.store(lse + at_M, (largest + tl.math.log2(total)) / _LOG2_E, is_row_M)


@triton.jit
def _forward_kernel(
    query, query_stride, key_self, value_self, key_self_stride, value_self_stride,
    history_key, history_value, history_key_stride, history_value_stride, candidate_offsets, history_offsets, out, lse,
    part, part_max, part_sum, num_tokens, heads, group, requests, scale_log2,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Tokens of one tile and head over the whole history; where it is split, over one chunk, left in `part`."""
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    request = _find_request(candidate_offsets, requests, slot, ROWS)
    begin = tl.load(candidate_offsets + request)
    end = tl.load(candidate_offsets + request + 1)
    first = begin + (slot - begin // ROWS - request) * ROWS
    history_begin = tl.load(history_offsets + request)
    length = tl.load(history_offsets + request + 1) - history_begin
    chunk = tl.program_id(1)
    if first < end and (not IS_SPLIT or chunk * CHUNK < length):
        key_head = head // group
        row_M = (first + tl.arange(0, ROWS)).to(tl.int64)
        is_row_M = row_M < end
        channel_d = tl.arange(0, D)
        query_at = query + row_M[:, None] * query_stride + head * D + channel_d[None, :]
        query_Md = tl.load(query_at, is_row_M[:, None], 0.0)
        key_at = history_key + history_begin.to(tl.int64) * history_key_stride + key_head * D
        value_at = history_value + history_begin.to(tl.int64) * history_value_stride + key_head * D
        if IS_SPLIT:
            largest, total, read = _read_chunk(
                query_Md, key_at, value_at, history_key_stride, history_value_stride,
                chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), scale_log2, ROWS, KEYS, D,
            )  # fmt: skip
            at_M = (row_M + chunk * num_tokens) * heads + head
            tl.store(part_max + at_M, largest, is_row_M)
            tl.store(part_sum + at_M, total, is_row_M)
            tl.store(part + at_M[:, None] * D + channel_d[None, :], read, is_row_M[:, None])
        else:
            largest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            read = tl.zeros([ROWS, D], tl.float32)
            for start in tl.range(0, length, CHUNK, num_stages=1):
                chunk_largest, chunk_total, chunk_read = _read_chunk(
                    query_Md, key_at, value_at, history_key_stride, history_value_stride,
                    start, tl.minimum(start + CHUNK, length), scale_log2, ROWS, KEYS, D,
                )  # fmt: skip
                largest, total, read = _fold(largest, total, read, chunk_largest, chunk_total, chunk_read)
            _add_self_and_store(
                query, query_stride, key_self, value_self, key_self_stride, value_self_stride, out, lse,
                row_M, is_row_M, head, key_head, heads, largest, total, read, scale_log2, TOKENS, D,
            )  # fmt: skip


@triton.jit
def _fold_kernel(
    query, query_stride, key_self, value_self, key_self_stride, value_self_stride, candidate_offsets, history_offsets,
    out, lse, part, part_max, part_sum, num_tokens, heads, group, requests, scale_log2,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The chunks of one tile and head in their order, then what _forward_kernel does at its end."""
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    request = _find_request(candidate_offsets, requests, slot, ROWS)
    begin = tl.load(candidate_offsets + request)
    end = tl.load(candidate_offsets + request + 1)
    first = begin + (slot - begin // ROWS - request) * ROWS
    if first < end:
        length = tl.load(history_offsets + request + 1) - tl.load(history_offsets + request)
        row_M = (first + tl.arange(0, ROWS)).to(tl.int64)
        is_row_M = row_M < end
        channel_d = tl.arange(0, D)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        read = tl.zeros([ROWS, D], tl.float32)
        for chunk in tl.range(0, tl.cdiv(length, CHUNK)):
            at_M = (row_M + chunk * num_tokens) * heads + head
            chunk_largest = tl.load(part_max + at_M, is_row_M, 0.0)
            chunk_total = tl.load(part_sum + at_M, is_row_M, 0.0)
            chunk_read = tl.load(part + at_M[:, None] * D + channel_d[None, :], is_row_M[:, None], 0.0)
            largest, total, read = _fold(largest, total, read, chunk_largest, chunk_total, chunk_read)
        _add_self_and_store(
            query, query_stride, key_self, value_self, key_self_stride, value_self_stride, out, lse,
            row_M, is_row_M, head, head // group, heads, largest, total, read, scale_log2, TOKENS, D,
        )  # fmt: skip


@triton.jit
def _query_gradient_kernel(
    query, query_stride, out_gradient, out_gradient_stride, key_self, value_self, key_self_stride, value_self_stride,
    history_key, history_value, history_key_stride, history_value_stride, candidate_offsets, history_offsets,
    out, lse, delta, query_gradient, heads, group, scale, requests,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's queries; leaves delta (output times its gradient, summed over channels) for the others."""
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    request = _find_request(candidate_offsets, requests, slot, ROWS)
    begin = tl.load(candidate_offsets + request)
    end = tl.load(candidate_offsets + request + 1)
    first = begin + (slot - begin // ROWS - request) * ROWS
    if first < end:
        key_head = head // group
        history_begin = tl.load(history_offsets + request)
        length = tl.load(history_offsets + request + 1) - history_begin
        row_M = (first + tl.arange(0, ROWS)).to(tl.int64)
        is_row_M = row_M < end
        is_row = is_row_M[:, None]
        channel_d = tl.arange(0, D)
        at_M = row_M * heads + head
        query_Md = tl.load(query + row_M[:, None] * query_stride + head * D + channel_d[None, :], is_row, 0.0)
        gradient_at = out_gradient + row_M[:, None] * out_gradient_stride + head * D + channel_d[None, :]
        gradient_Md = tl.load(gradient_at, is_row, 0.0)
        out_Md = tl.load(out + at_M[:, None] * D + channel_d[None, :], is_row, 0.0)
        delta_M = tl.sum(out_Md.to(tl.float32) * gradient_Md.to(tl.float32), 1)
        tl.store(delta + at_M, delta_M, is_row_M)
        lse_M = tl.load(lse + at_M, is_row_M, float("inf")) * _LOG2_E
        key_at = history_key + history_begin.to(tl.int64) * history_key_stride + key_head * D
        value_at = history_value + history_begin.to(tl.int64) * history_value_stride + key_head * D
        result = tl.zeros([ROWS, D], tl.float32)
        for start in tl.range(0, length, KEYS):
            # Places behind the last event read it again, so that no load needs a mask, and get no share.
            event_N = start + tl.arange(0, KEYS)
            at_N = tl.minimum(event_N, length - 1).to(tl.int64)[:, None]
            key_Nd = tl.load(key_at + at_N * history_key_stride + channel_d[None, :])
            value_Nd = tl.load(value_at + at_N * history_value_stride + channel_d[None, :])
            nothing = tl.zeros([ROWS, KEYS], tl.float32)
            score_MN = _dot(query_Md, tl.trans(key_Nd), nothing)
            score_MN = tl.math.fma(score_MN, scale * _LOG2_E, -lse_M[:, None])
            share_MN = tl.math.exp2(tl.where(event_N[None, :] < length, score_MN, float("-inf")))
            share_gradient_MN = _dot(gradient_Md, tl.trans(value_Nd), nothing)
            score_gradient_MN = share_MN * (share_gradient_MN - delta_M[:, None])
            result = _dot(score_gradient_MN.to(key_Nd.dtype), key_Nd, result)
        query_Md = query_Md.to(tl.float32)
        gradient_Md = gradient_Md.to(tl.float32)
        place_M = row_M % TOKENS
        for token in tl.static_range(TOKENS):
            own = (row_M - place_M + token)[:, None]
            key_Md = tl.load(key_self + own * key_self_stride + key_head * D + channel_d[None, :], is_row, 0.0)
            value_Md = tl.load(value_self + own * value_self_stride + key_head * D + channel_d[None, :], is_row, 0.0)
            key_Md = key_Md.to(tl.float32)
            score_M = tl.sum(query_Md * key_Md, 1) * (scale * _LOG2_E) - lse_M
            share_M = tl.math.exp2(tl.where(token <= place_M, score_M, float("-inf")))
            share_gradient_M = tl.sum(gradient_Md * value_Md.to(tl.float32), 1)
            result += (share_M * (share_gradient_M - delta_M))[:, None] * key_Md
        result_at = query_gradient + at_M[:, None] * D + channel_d[None, :]
        tl.store(result_at, (result * scale).to(query_gradient.dtype.element_ty), is_row)


@triton.jit
def _self_gradient_kernel(
    query, query_stride, out_gradient, out_gradient_stride, key_self, value_self, key_self_stride, value_self_stride,
    lse, delta, key_gradient, value_gradient, num_tokens, key_heads, group, scale,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's own keys and values: from the candidate's tokens from theirs on, head after head."""
    key_head = tl.program_id(0) % key_heads
    heads = key_heads * group
    row_M = (tl.program_id(0) // key_heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row_M = row_M < num_tokens
    is_row = is_row_M[:, None]
    place_M = row_M % TOKENS
    channel_d = tl.arange(0, D)
    key_Md = tl.load(key_self + row_M[:, None] * key_self_stride + key_head * D + channel_d[None, :], is_row, 0.0)
    value_Md = tl.load(value_self + row_M[:, None] * value_self_stride + key_head * D + channel_d[None, :], is_row, 0.0)
    key_Md = key_Md.to(tl.float32)
    value_Md = value_Md.to(tl.float32)
    key_result = tl.zeros([ROWS, D], tl.float32)
    value_result = tl.zeros([ROWS, D], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        for later in tl.static_range(TOKENS):
            reader_M = row_M + later
            is_reader_M = is_row_M & (place_M + later < TOKENS)
            is_reader = is_reader_M[:, None]
            query_at = query + reader_M[:, None] * query_stride + head * D + channel_d[None, :]
            query_Md = tl.load(query_at, is_reader, 0.0).to(tl.float32)
            gradient_at = out_gradient + reader_M[:, None] * out_gradient_stride + head * D + channel_d[None, :]
            gradient_Md = tl.load(gradient_at, is_reader, 0.0).to(tl.float32)
            lse_M = tl.load(lse + reader_M * heads + head, is_reader_M, float("inf")) * _LOG2_E
            delta_M = tl.load(delta + reader_M * heads + head, is_reader_M, 0.0)
            share_M = tl.math.exp2(tl.sum(query_Md * key_Md, 1) * (scale * _LOG2_E) - lse_M)
            share_gradient_M = tl.sum(gradient_Md * value_Md, 1)
            key_result += (share_M * (share_gradient_M - delta_M))[:, None] * query_Md
            value_result += share_M[:, None] * gradient_Md
    at = (row_M[:, None] * key_heads + key_head) * D + channel_d[None, :]
    tl.store(key_gradient + at, (key_result * scale).to(key_gradient.dtype.element_ty), is_row)
    tl.store(value_gradient + at, value_result.to(value_gradient.dtype.element_ty), is_row)


@triton.jit
def _history_gradient_kernel(
    query, query_stride, out_gradient, out_gradient_stride, history_key, history_value, history_key_stride,
    history_value_stride, candidate_offsets, history_offsets, lse, delta, key_gradient, value_gradient,
    key_heads, group, scale, requests, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of history keys and values: all tokens of the request, in order, head after head."""
    slot = tl.program_id(0) // key_heads
    key_head = tl.program_id(0) % key_heads
    request = _find_request(history_offsets, requests, slot, KEYS)
    history_begin = tl.load(history_offsets + request)
    history_end = tl.load(history_offsets + request + 1)
    first = history_begin + (slot - history_begin // KEYS - request) * KEYS
    if first < history_end:
        heads = key_heads * group
        begin = tl.load(candidate_offsets + request)
        end = tl.load(candidate_offsets + request + 1)
        event_N = (first + tl.arange(0, KEYS)).to(tl.int64)
        is_event = (event_N < history_end)[:, None]
        channel_d = tl.arange(0, D)
        key_at = history_key + event_N[:, None] * history_key_stride + key_head * D + channel_d[None, :]
        value_at = history_value + event_N[:, None] * history_value_stride + key_head * D + channel_d[None, :]
        key_Nd = tl.load(key_at, is_event, 0.0)
        value_Nd = tl.load(value_at, is_event, 0.0)
        key_result = tl.zeros([KEYS, D], tl.float32)
        value_result = tl.zeros([KEYS, D], tl.float32)
        for member in tl.range(0, group, num_stages=1):
            head = key_head * group + member
            for start in tl.range(begin, end, ROWS):
                # Places behind the last token read it again, so that no load needs a mask, and have no share.
                row_M = start + tl.arange(0, ROWS)
                at_M = tl.minimum(row_M, end - 1).to(tl.int64)
                query_Md = tl.load(query + at_M[:, None] * query_stride + head * D + channel_d[None, :])
                gradient_Md = tl.load(
                    out_gradient + at_M[:, None] * out_gradient_stride + head * D + channel_d[None, :]
                )
                lse_M = tl.load(lse + at_M * heads + head) * _LOG2_E
                lse_M = tl.where(row_M < end, lse_M, float("inf"))
                delta_M = tl.load(delta + at_M * heads + head)
                nothing = tl.zeros([KEYS, ROWS], tl.float32)
                score_NM = _dot(key_Nd, tl.trans(query_Md), nothing)
                share_NM = tl.math.exp2(tl.math.fma(score_NM, scale * _LOG2_E, -lse_M[None, :]))
                value_result = _dot(share_NM.to(gradient_Md.dtype), gradient_Md, value_result)
                share_gradient_NM = _dot(value_Nd, tl.trans(gradient_Md), nothing)
                score_gradient_NM = share_NM * (share_gradient_NM - delta_M[None, :])
                key_result = _dot(score_gradient_NM.to(query_Md.dtype), query_Md, key_result)
        at = (event_N[:, None] * key_heads + key_head) * D + channel_d[None, :]
        tl.store(key_gradient + at, (key_result * scale).to(key_gradient.dtype.element_ty), is_event)
        tl.store(value_gradient + at, value_result.to(value_gradient.dtype.element_ty), is_event)
