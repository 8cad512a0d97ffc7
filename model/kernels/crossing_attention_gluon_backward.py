"""Gradients of crossing attention on Hopper: warp-specialised Gluon kernels fed by the tensor memory accelerator.

Three launches, none of which waits for the host:
- `_prepare_kernel` lists the tiles of all requests, those of the most work first, and does what is a candidate's alone:
  delta (output times its gradient, summed over channels), the gradients of its own keys and values, and its own scores'
  gradients.
- `_query_kernel` reads the history for tiles of 128 tokens, `_history_kernel` the tokens for blocks of 128 events.

The last two are alike: one program a multiprocessor takes item after item of the plan. One of its warps copies tiles
into shared memory, some ahead; two groups of four warps, of 64 rows each, multiply. All that stands on the left of a
product is in registers or stays in shared memory: no score passes through shared memory, nothing is added atomically,
and every sum has one order. The next item's entry of the plan, and of 64 channels its own tiles, come while this one's
are multiplied; results leave in pieces of 16 bytes a thread. Neither group waits for the other between items: each has
its own tiles and barriers, and may be ahead by as many copied tiles as wait.

When a buffer is copied into again:
- All are filled by copies alone, which count down a `ready` barrier; readers take items and stages in order, so none is
  ever a whole phase behind. One thread of a group arrives at `free` after a barrier of its four warps.
- A group's own two tiles: read by its products, which are waited for; of 64 channels read into registers and given up
  before any product has been waited for that takes them, so `fence_async_shared` puts those reads before the next copy.
- Copied tiles: both groups arrive at `free` once they have waited for the last product that reads the tile.
- Denominators and delta come and go with their tile of queries: the last product that reads it takes what was computed
  of them.
- Results change layout in memory that is nobody else's, between barriers of the group.

The three launches overlap: `_query_kernel` waits for `_prepare_kernel`, then lets `_history_kernel` start wherever a
program ends; that one waits for `_query_kernel` at its own end, so that whatever comes next may rely on both.

A copied block may reach into the next request. Scores of such events are masked; tokens beyond a request have an
infinite denominator, for which the statistics of a request are laid out in whole tiles (`padded` rows a head: request
r has rows from (offsets[r] // 128 + r) * 128 on). What another request holds there must be finite.

Legend: as in crossing_attention; M tokens, N events of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from model.kernels.crossing_attention_gluon import _allow_next, _wait_for_last
from model.kernels.crossing_attention_triton import LOG2_E

TILE = 128
"""Tokens or events of an item, half of them for each group of warps."""
_ENTRY = 8
_TILE: tl.constexpr = tl.constexpr(TILE)
_ENTRY_SIZE: tl.constexpr = tl.constexpr(_ENTRY)
_OWN_VALUES = 1024
"""Of one tensor, in a program that does what is a candidate's alone."""
_REGISTERS = 168
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # until Triton 3.6
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How far ahead a kernel copies. `block` fixes the bits of a result."""

    block: int
    """Rows of a copied tile: events for gradients of queries, tokens for gradients of the history."""
    stages: int
    """Copied tiles at most waiting."""
    left_in_registers: bool
    """Whether the item's own two tiles are read into registers at once, or stay in shared memory."""


def choose_pipelines(head_dim: int) -> tuple[Pipeline, Pipeline]:
    """Of gradients of queries, and of the history."""
    if head_dim == 64:
        return Pipeline(64, 4, True), Pipeline(64, 4, True)
    return Pipeline(64, 4, False), Pipeline(64, 3, False)


def is_supported(
    query: torch.Tensor, history_key: torch.Tensor, history_value: torch.Tensor, out_gradient: torch.Tensor
) -> bool:
    """Whether device, dtype, channels and strides are such as these kernels take; all are packed but for rows."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in (64, 128)
        and len(query) > 0
        and len(history_key) > 0
        and all(_is_copyable(x) for x in (query, history_key, history_value, out_gradient))
    )


def _is_copyable(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read its rows: all in steps of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def backward(
    out_gradient: torch.Tensor, query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor,
    history_key: torch.Tensor, history_value: torch.Tensor, candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *, tokens: int,
    pipelines: tuple[Pipeline, Pipeline] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of query, own keys and values, history keys and values, as the Triton kernels' `backward`.

    Of inputs that `is_supported` accepts. pipelines: for tests and for finding better ones.
    """
    of_queries, of_history = pipelines or choose_pipelines(query.shape[-1])
    num_tokens, heads, channels = query.shape
    key_heads, requests = key_self.shape[1], len(candidate_offsets) - 1
    group, scale = heads // key_heads, channels**-0.5
    query_g, key_self_g, value_self_g, history_key_g, history_value_g = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (query, key_self, value_self, history_key, history_value)
    )
    slots = num_tokens // TILE + requests
    padded = slots * TILE
    plan = torch.empty(slots + len(history_key) // TILE + requests, _ENTRY, dtype=torch.int32, device=query.device)
    counts = torch.empty(2, dtype=torch.int32, device=query.device)
    statistics = lse.new_empty(2 + tokens, heads * padded)
    part = _OWN_VALUES // channels
    _prepare_kernel[(2 * requests + slots * (TILE // part) * key_heads,)](
        query, query.stride(0), out_gradient, out_gradient.stride(0), key_self, value_self, key_self.stride(0),
        value_self.stride(0), candidate_offsets, history_offsets, out, lse, statistics, key_self_g, value_self_g,
        plan, counts, key_heads, group, scale, requests, slots,
        TOKENS=tokens, ROWS=part, D=channels, BLOCK=256, IS_CHAINED=True, num_warps=4,
    )  # fmt: skip
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    query_desc, gradient_desc = (_rows_desc(x, TILE // 2) for x in (query, out_gradient))
    key_desc, value_desc = (_rows_desc(x, of_queries.block) for x in (history_key, history_value))
    _query_kernel[(processors,)](
        query_desc, gradient_desc, key_desc, value_desc, statistics, key_self, key_self.stride(0), query_g,
        plan, counts, heads, group, scale, padded, heads * padded,
        TOKENS=tokens, D=channels, N=of_queries.block, STAGES=of_queries.stages,
        LEFT_IN_REGISTERS=of_queries.left_in_registers, num_warps=4, maxnreg=_REGISTERS, launch_pdl=True,
    )  # fmt: skip
    query_desc, gradient_desc = (_rows_desc(x, of_history.block) for x in (query, out_gradient))
    key_desc, value_desc = (_rows_desc(x, TILE // 2) for x in (history_key, history_value))
    lse_desc, delta_desc = (_line_desc(statistics[i], of_history.block) for i in range(2))
    _history_kernel[(processors,)](
        query_desc, gradient_desc, key_desc, value_desc, lse_desc, delta_desc, history_key_g, history_value_g,
        plan[slots:], counts, key_heads, group, scale, padded,
        D=channels, M=of_history.block, STAGES=of_history.stages,
        LEFT_IN_REGISTERS=of_history.left_in_registers, num_warps=4, maxnreg=_REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return query_g, key_self_g, value_self_g, history_key_g, history_value_g


def _rows_desc(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Blocks of rows and one head of [rows, heads, channels]."""
    total, heads, channels = x.shape
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    return TensorDescriptor(x, [total, heads * channels], [x.stride(0), 1], [rows, channels], layout)


def _line_desc(x: torch.Tensor, length: int) -> TensorDescriptor:
    """Pieces of a float32 vector."""
    return TensorDescriptor(x, [len(x)], [1], [length], gl.NVMMASharedLayout(0, 32, rank=1))


@triton.jit(do_not_specialize=["key_heads", "group", "requests", "slots"])
def _prepare_kernel(
    query, query_stride, out_gradient, out_gradient_stride, key_self, value_self, key_self_stride, value_self_stride,
    candidate_offsets, history_offsets, out, lse, statistics, key_gradient, value_gradient, plan, counts,
    key_heads, group, scale, requests, slots,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """The plan, two programs a request; what is a candidate's alone, a program for each part of a tile and key head."""
    if IS_CHAINED:
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < 2 * requests:
        _plan(candidate_offsets, history_offsets, plan, counts, program // 2, program % 2, requests, slots, BLOCK)
    else:
        _own_gradients(
            query, query_stride, out_gradient, out_gradient_stride, key_self, value_self, key_self_stride,
            value_self_stride, candidate_offsets, out, lse, statistics, key_gradient, value_gradient,
            program - 2 * requests, key_heads, group, scale, requests, slots * _TILE, TOKENS, ROWS, D, BLOCK,
        )  # fmt: skip


@triton.jit
def _plan(
    candidate_offsets, history_offsets, plan, counts, request, of_history, requests, slots, BLOCK: tl.constexpr
):  # fmt: skip
    """Entries of one request's tiles: of tokens for gradients of queries (0), of events for those of the history (1).

    Requests of the most work a tile come first, equal ones in their order. An entry: first row of the tile, end of the
    request's rows, begin and number of the rows that it reads, and the row in the padded statistics.
    """
    own = candidate_offsets
    other = history_offsets
    if of_history:
        own = history_offsets
        other = candidate_offsets
    begin = tl.load(own + request)
    end = tl.load(own + request + 1)
    other_begin = tl.load(other + request)
    work = tl.load(other + request + 1) - other_begin
    position = begin * 0
    total = begin * 0
    for start in tl.range(0, requests, BLOCK):
        r = start + tl.arange(0, BLOCK)
        is_there = r < requests
        length = tl.load(own + r + 1, is_there, 0) - tl.load(own + r, is_there, 0)
        its_work = tl.load(other + r + 1, is_there, 0) - tl.load(other + r, is_there, 0)
        tiles = (length + _TILE - 1) // _TILE
        is_before = (its_work > work) | ((its_work == work) & (r < request))
        position += tl.sum(tl.where(is_before, tiles, 0))
        total += tl.sum(tiles)
    if request == 0:
        tl.store(counts + of_history, total)
    padded_row = (tl.load(candidate_offsets + request) // _TILE + request) * _TILE
    for first in tl.range(begin, end, _TILE * BLOCK):
        tile = tl.arange(0, BLOCK)
        row = first + tile * _TILE
        is_tile = row < end
        at = plan + (of_history * slots + position + (first - begin) // _TILE + tile) * _ENTRY_SIZE
        tl.store(at, row, is_tile)
        tl.store(at + 1, end, is_tile)
        tl.store(at + 2, other_begin, is_tile)
        tl.store(at + 3, work, is_tile)
        tl.store(at + 4, tl.where(of_history != 0, padded_row, padded_row + row - begin), is_tile)


@triton.jit
def _own_gradients(
    query, query_stride, out_gradient, out_gradient_stride, key_self, value_self, key_self_stride, value_self_stride,
    candidate_offsets, out, lse, statistics, key_gradient, value_gradient, program, key_heads, group, scale, requests,
    padded, TOKENS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a part of a tile's own keys and values, and the statistics of its tokens.

    Those are planes of f32 [heads, padded]: the logarithm of the denominator to base 2 (infinite beyond the request),
    delta (0 there), and of the candidate's tokens up to this one the gradients of the scores, before scaling.
    """
    parts: tl.constexpr = _TILE // ROWS
    key_head = program % key_heads
    part = program // key_heads % parts
    slot = program // key_heads // parts
    plane = (key_heads * group).to(tl.int64) * padded
    # The slot's request is the last r with offsets[r] // _TILE + r <= slot; all are looked at, at once.
    request = slot * 0 - 1
    for start in tl.range(0, requests, BLOCK):
        r = start + tl.arange(0, BLOCK)
        is_begun = (r < requests) & (tl.load(candidate_offsets + r, r < requests, 0) // _TILE + r <= slot)
        request += tl.sum(is_begun.to(tl.int32))
    begin = tl.load(candidate_offsets + request)
    end = tl.load(candidate_offsets + request + 1)
    first = begin + (slot - begin // _TILE - request) * _TILE
    if first < end:
        place_in_tile_M = part * ROWS + tl.arange(0, ROWS)
        row_M = (first + place_in_tile_M).to(tl.int64)
        is_row_M = row_M < end
        is_row = is_row_M[:, None]
        place_M = row_M % TOKENS
        channel_d = tl.arange(0, D)
        key_at = key_self + row_M[:, None] * key_self_stride + key_head * D + channel_d[None, :]
        value_at = value_self + row_M[:, None] * value_self_stride + key_head * D + channel_d[None, :]
        key_Md = tl.load(key_at, is_row, 0.0).to(tl.float32)
        value_Md = tl.load(value_at, is_row, 0.0).to(tl.float32)
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
                at_M = reader_M * (key_heads * group) + head
                out_Md = tl.load(out + at_M[:, None] * D + channel_d[None, :], is_reader, 0.0).to(tl.float32)
                delta_M = tl.sum(out_Md * gradient_Md, 1)
                lse_M = tl.load(lse + at_M, is_reader_M, float("inf")) * _LOG2_E
                share_M = tl.math.exp2(tl.sum(query_Md * key_Md, 1) * (scale * _LOG2_E) - lse_M)
                score_gradient_M = share_M * (tl.sum(gradient_Md * value_Md, 1) - delta_M)
                key_result += score_gradient_M[:, None] * query_Md
                value_result += share_M[:, None] * gradient_Md
                # Tiles are whole candidates or not: the reader's row may be in the next tile, which follows here.
                padded_M = slot * _TILE + place_in_tile_M + later
                statistics_at = statistics + head.to(tl.int64) * padded + padded_M
                if later == 0:
                    tl.store(statistics_at, lse_M)
                    tl.store(statistics_at + plane, delta_M)
                tl.store(statistics_at + (2 + place_M) * plane, score_gradient_M, is_reader_M)
        at = (row_M[:, None] * key_heads + key_head) * D + channel_d[None, :]
        tl.store(key_gradient + at, (key_result * scale).to(key_gradient.dtype.element_ty), is_row)
        tl.store(value_gradient + at, value_result.to(value_gradient.dtype.element_ty), is_row)


@gluon.jit
def _load_entry(plan, item, items, heads):
    """First row, end, begin of the rows read, their number, and padded row of an item (of the last item beyond it)."""
    at = plan + gl.minimum(item, items - 1) // heads * _ENTRY_SIZE
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)


@gluon.jit
def _store_rows(target, result_d, first, end, heads, head, W: gl.constexpr, D: gl.constexpr):
    """Writes 64 rows of a head, those before the end, to [rows, heads, D], 16 bytes a thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    result_d = gl.convert_layout(result_d.to(target.dtype.element_ty), layout)
    # Places hang on the item throughout: kept beside the accumulators from item to item they would be spilled.
    row = first + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    channel_d = head * D + gl.arange(0, D, gl.SliceLayout(0, layout))
    at = target + (row.to(gl.int64) * (heads * D))[:, None] + channel_d[None, :]
    gl.store(at, result_d, (row < end)[:, None])


@gluon.jit
def _copy_own(
    one_desc, two_desc, one_buffers, two_buffers, item_ready, item_free, item_number, first, column, W: gl.constexpr
):  # fmt: skip
    """Copies the two tiles of 64 rows of an item that are a group's of warps, once it has done with its last ones."""
    mbarrier.wait(item_free.index(W), (item_number & 1) ^ 1)
    ready = item_ready.index(W)
    mbarrier.expect(ready, 2 * one_desc.block_type.nbytes)
    _copy(one_desc, [first + W * 64, column], ready, one_buffers.index(W))
    _copy(two_desc, [first + W * 64, column], ready, two_buffers.index(W))


# Gradients of queries


@gluon.jit
def _query_producer(
    query_desc, gradient_desc, key_desc, value_desc, buffers, barriers, plan, counts, heads, group,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies each item's queries and gradients of the output, then the history block by block."""
    query_buffers, gradient_buffers, key_buffers, value_buffers = buffers
    item_ready, item_free, key_ready, key_free, value_ready, value_free = barriers
    items = gl.load(counts) * heads
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        item_number = item // gl.num_programs(0)
        first, _, history_begin, length, _ = _load_entry(plan, item, items, heads)
        head = item % heads
        _copy_own(
            query_desc, gradient_desc, query_buffers, gradient_buffers, item_ready, item_free, item_number, first,
            head * D, 0,
        )  # fmt: skip
        column = head // group * D
        blocks = gl.cdiv(length, N)
        # The second group may be behind by as many blocks as wait: its own tiles follow them.
        until_second = STAGES - 1
        for block in range(blocks):
            # The last block, which may be ragged, is read first.
            row = history_begin + gl.where(block == 0, blocks - 1, block - 1) * N
            stage = number % STAGES
            phase = (number // STAGES & 1) ^ 1
            mbarrier.wait(key_free.index(stage), phase)
            mbarrier.expect(key_ready.index(stage), key_desc.block_type.nbytes)
            _copy(key_desc, [row, column], key_ready.index(stage), key_buffers.index(stage))
            mbarrier.wait(value_free.index(stage), phase)
            mbarrier.expect(value_ready.index(stage), value_desc.block_type.nbytes)
            _copy(value_desc, [row, column], value_ready.index(stage), value_buffers.index(stage))
            number += 1
            until_second -= 1
            if until_second == 0:
                _copy_own(
                    query_desc, gradient_desc, query_buffers, gradient_buffers, item_ready, item_free, item_number,
                    first, head * D, 1,
                )  # fmt: skip
        if until_second > 0:
            _copy_own(
                query_desc, gradient_desc, query_buffers, gradient_buffers, item_ready, item_free, item_number, first,
                head * D, 1,
            )  # fmt: skip


@gluon.jit
def _query_consumer(
    statistics, key_self, key_self_stride, query_gradient, buffers, barriers, plan, counts, heads, group, scale,
    padded, plane,
    W: gl.constexpr, TOKENS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    LEFT_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 queries an item: dQ = dS K, dS = P * (dO V^T - delta), P = exp2(Q K^T - lse).

    The product with the last block's keys runs while this block's scores become shares.
    """
    query_buffers, gradient_buffers, key_buffers, value_buffers = buffers
    item_ready, item_free, key_ready, key_free, value_ready, value_free = barriers
    dtype: gl.constexpr = key_buffers.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    score_left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    row_M = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, score_layout))
    own_row_M = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    channel_d = gl.arange(0, D, gl.SliceLayout(0, layout))
    column_N = gl.arange(0, N, gl.SliceLayout(0, score_layout))
    nothing = gl.zeros([64, N], gl.float32, score_layout)
    plane = plane.to(gl.int64)
    items = gl.load(counts) * heads
    next_first, next_end, _, next_length, next_padded_row = _load_entry(plan, gl.program_id(0), items, heads)
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        item_number = item // gl.num_programs(0)
        first = next_first
        end = next_end
        length = next_length
        padded_row = next_padded_row
        next_first, next_end, _, next_length, next_padded_row = _load_entry(
            plan, item + gl.num_programs(0), items, heads
        )
        head = item % heads
        statistics_at = statistics + head.to(gl.int64) * padded + padded_row
        lse_M = gl.load(statistics_at + row_M)
        delta_M = gl.load(statistics_at + plane + row_M)
        # The candidate's own tokens, up to the query's.
        result = gl.zeros([64, D], gl.float32, layout)
        key_at = key_self + first.to(gl.int64) * key_self_stride + head // group * D
        place_M = (first + own_row_M) % TOKENS
        is_row_M = first + own_row_M < end
        for token in gl.static_range(TOKENS):
            is_read_M = is_row_M & (token <= place_M)
            score_gradient_M = gl.load(statistics_at + (2 + token) * plane + own_row_M, is_read_M, 0.0)
            offset = (own_row_M - place_M + token)[:, None] * key_self_stride + channel_d[None, :]
            key_Md = gl.load(key_at + offset, is_read_M[:, None], 0.0)
            result += score_gradient_M[:, None] * key_Md.to(gl.float32)
        mbarrier.wait(item_ready.index(W), item_number & 1)
        query_Md = query_buffers.index(W)
        gradient_Md = gradient_buffers.index(W)
        if LEFT_IN_REGISTERS:
            query_Md = query_Md.load(left)
            gradient_Md = gradient_Md.load(left)
            fence_async_shared()
            mbarrier.arrive(item_free.index(W), count=1)
        blocks = gl.cdiv(length, N)
        if blocks > 0:
            stage = number % STAGES
            phase = number // STAGES & 1
            mbarrier.wait(key_ready.index(stage), phase)
            score = warpgroup_mma(
                query_Md, key_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(value_ready.index(stage), phase)
            through = warpgroup_mma(
                gradient_Md, value_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            score_MN, through_MN = warpgroup_mma_wait(0, deps=[score, through])
            mbarrier.arrive(value_free.index(stage), count=1)
            share_MN = gl.exp2(score_MN * (scale * _LOG2_E) - lse_M[:, None])
            share_MN = gl.where(column_N[None, :] < length - (blocks - 1) * N, share_MN, 0.0)
            score_gradient_MN = share_MN * (through_MN - delta_M[:, None])
            score_gradient_MN = gl.convert_layout(score_gradient_MN.to(dtype), score_left)
            following = number + 1
            phase = following // STAGES & 1
            mbarrier.wait(key_ready.index(following % STAGES), phase, pred=blocks > 1)
            mbarrier.wait(value_ready.index(following % STAGES), phase, pred=blocks > 1)
            for block in range(1, blocks):
                last = stage
                number += 1
                stage = number % STAGES
                score = warpgroup_mma(
                    query_Md, key_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                through = warpgroup_mma(
                    gradient_Md, value_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                product = warpgroup_mma(score_gradient_MN, key_buffers.index(last), result, is_async=True)
                score_MN = warpgroup_mma_wait(2, deps=[score])
                share_MN = gl.exp2(score_MN * (scale * _LOG2_E) - lse_M[:, None])
                # These waits are for the next block; their branches keep the arithmetic beside the products in flight.
                following = number + 1
                phase = following // STAGES & 1
                mbarrier.wait(key_ready.index(following % STAGES), phase, pred=block + 1 < blocks)
                through_MN = warpgroup_mma_wait(1, deps=[through])
                mbarrier.arrive(value_free.index(stage), count=1)
                next_MN = share_MN * (through_MN - delta_M[:, None])
                mbarrier.wait(value_ready.index(following % STAGES), phase, pred=block + 1 < blocks)
                result = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(key_free.index(last), count=1)
                score_gradient_MN = gl.convert_layout(next_MN.to(dtype), score_left)
            product = warpgroup_mma(score_gradient_MN, key_buffers.index(stage), result, is_async=True)
            result = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(key_free.index(stage), count=1)
            number += 1
        if not LEFT_IN_REGISTERS:
            mbarrier.arrive(item_free.index(W), count=1)
        _store_rows(query_gradient, result * scale, first, end, heads, head, W, D)


@gluon.jit(do_not_specialize=["heads", "group"])
def _query_kernel(
    query_desc, gradient_desc, key_desc, value_desc, statistics, key_self, key_self_stride, query_gradient,
    plan, counts, heads, group, scale, padded, plane,
    TOKENS: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    LEFT_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of queries: items of 128 tokens of one request and head, over blocks of its history."""
    dtype: gl.constexpr = query_desc.dtype
    query_buffers = gl.allocate_shared_memory(dtype, [2, 64, D], query_desc.layout)
    gradient_buffers = gl.allocate_shared_memory(dtype, [2, 64, D], query_desc.layout)
    key_buffers = gl.allocate_shared_memory(dtype, [STAGES, N, D], key_desc.layout)
    value_buffers = gl.allocate_shared_memory(dtype, [STAGES, N, D], key_desc.layout)
    item_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(item_ready.index(w), count=1)
        mbarrier.init(item_free.index(w), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(i), count=1)
        mbarrier.init(key_free.index(i), count=2)
        mbarrier.init(value_ready.index(i), count=1)
        mbarrier.init(value_free.index(i), count=2)
    # The gradients of the history may start where a program here ends: what both read is there from now on.
    _wait_for_last(gl.program_id(0))
    _allow_next(gl.program_id(0))
    buffers = (query_buffers, gradient_buffers, key_buffers, value_buffers)
    barriers = (item_ready, item_free, key_ready, key_free, value_ready, value_free)
    gl.warp_specialize(
        [
            (
                _query_consumer,
                (
                    statistics, key_self, key_self_stride, query_gradient, buffers, barriers, plan, counts, heads,
                    group, scale, padded, plane, 0, TOKENS, D, N, STAGES, LEFT_IN_REGISTERS,
                ),
            ),
            (
                _query_consumer,
                (
                    statistics, key_self, key_self_stride, query_gradient, buffers, barriers, plan, counts, heads,
                    group, scale, padded, plane, 1, TOKENS, D, N, STAGES, LEFT_IN_REGISTERS,
                ),
            ),
            (
                _query_producer,
                (
                    query_desc, gradient_desc, key_desc, value_desc, buffers, barriers, plan, counts, heads, group,
                    D, N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Gradients of the history


@gluon.jit
def _history_producer(
    query_desc, gradient_desc, key_desc, value_desc, lse_desc, delta_desc, buffers, barriers, plan, counts, key_heads,
    group, padded, D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies each item's keys and values, then the request's tokens tile by tile, head after head of the group."""
    query_buffers, gradient_buffers, lse_buffers, delta_buffers, key_buffers, value_buffers = buffers
    item_ready, item_free, query_ready, query_free, gradient_ready, gradient_free = barriers
    items = gl.load(counts + 1) * key_heads
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        item_number = item // gl.num_programs(0)
        first, _, begin, rows, padded_row = _load_entry(plan, item, items, key_heads)
        key_head = item % key_heads
        _copy_own(
            key_desc, value_desc, key_buffers, value_buffers, item_ready, item_free, item_number, first, key_head * D,
            0,
        )  # fmt: skip
        until_second = STAGES - 1
        for member in range(group):
            head = key_head * group + member
            line = head * padded + padded_row
            for row in range(0, rows, M):
                stage = number % STAGES
                phase = (number // STAGES & 1) ^ 1
                mbarrier.wait(query_free.index(stage), phase)
                ready = query_ready.index(stage)
                mbarrier.expect(ready, query_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
                _copy(query_desc, [begin + row, head * D], ready, query_buffers.index(stage))
                _copy(lse_desc, [line + row], ready, lse_buffers.index(stage))
                _copy(delta_desc, [line + row], ready, delta_buffers.index(stage))
                mbarrier.wait(gradient_free.index(stage), phase)
                ready = gradient_ready.index(stage)
                mbarrier.expect(ready, gradient_desc.block_type.nbytes)
                _copy(gradient_desc, [begin + row, head * D], ready, gradient_buffers.index(stage))
                number += 1
                until_second -= 1
                if until_second == 0:
                    _copy_own(
                        key_desc, value_desc, key_buffers, value_buffers, item_ready, item_free, item_number, first,
                        key_head * D, 1,
                    )  # fmt: skip
        if until_second > 0:
            _copy_own(
                key_desc, value_desc, key_buffers, value_buffers, item_ready, item_free, item_number, first,
                key_head * D, 1,
            )  # fmt: skip


@gluon.jit
def _history_consumer(
    key_gradient, value_gradient, buffers, barriers, plan, counts, key_heads, group, scale,
    W: gl.constexpr, D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    LEFT_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 events an item: dV = P^T dO, dK = dS^T Q, all scores with events as rows."""
    query_buffers, gradient_buffers, lse_buffers, delta_buffers, key_buffers, value_buffers = buffers
    item_ready, item_free, query_ready, query_free, gradient_ready, gradient_free = barriers
    dtype: gl.constexpr = key_buffers.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    score_left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    column: gl.constexpr = gl.SliceLayout(0, score_layout)
    nothing = gl.zeros([64, M], gl.float32, score_layout)
    items = gl.load(counts + 1) * key_heads
    next_first, next_end, _, next_rows, _ = _load_entry(plan, gl.program_id(0), items, key_heads)
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        item_number = item // gl.num_programs(0)
        first = next_first
        end = next_end
        tiles = gl.cdiv(next_rows, M) * group
        next_first, next_end, _, next_rows, _ = _load_entry(plan, item + gl.num_programs(0), items, key_heads)
        key_head = item % key_heads
        key_result = gl.zeros([64, D], gl.float32, layout)
        value_result = gl.zeros([64, D], gl.float32, layout)
        mbarrier.wait(item_ready.index(W), item_number & 1)
        key_Nd = key_buffers.index(W)
        value_Nd = value_buffers.index(W)
        if LEFT_IN_REGISTERS:
            key_Nd = key_Nd.load(left)
            value_Nd = value_Nd.load(left)
            fence_async_shared()
            mbarrier.arrive(item_free.index(W), count=1)
        if D > 64:
            if tiles > 0:
                # Registers are short: of a tile's two products with shares only the key's waits for the next scores.
                stage = number % STAGES
                phase = number // STAGES & 1
                mbarrier.wait(query_ready.index(stage), phase)
                score = warpgroup_mma(
                    key_Nd, query_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                mbarrier.wait(gradient_ready.index(stage), phase)
                through = warpgroup_mma(
                    value_Nd, gradient_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                lse_M = lse_buffers.index(stage).load(column)
                score_NM = warpgroup_mma_wait(1, deps=[score])
                share_NM = gl.exp2(score_NM * (scale * _LOG2_E) - lse_M[None, :])
                share_left_NM = gl.convert_layout(share_NM.to(dtype), score_left)
                through_NM = warpgroup_mma_wait(0, deps=[through])
                value_product = warpgroup_mma(share_left_NM, gradient_buffers.index(stage), value_result, is_async=True)
                delta_M = delta_buffers.index(stage).load(column)
                score_gradient_NM = share_NM * (through_NM - delta_M[None, :])
                value_result = warpgroup_mma_wait(0, deps=[value_product])
                mbarrier.arrive(gradient_free.index(stage), count=1)
                score_gradient_left_NM = gl.convert_layout(score_gradient_NM.to(dtype), score_left)
                for _ in range(1, tiles):
                    last = stage
                    number += 1
                    stage = number % STAGES
                    phase = number // STAGES & 1
                    mbarrier.wait(query_ready.index(stage), phase)
                    mbarrier.wait(gradient_ready.index(stage), phase)
                    score = warpgroup_mma(
                        key_Nd, query_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                    )
                    through = warpgroup_mma(
                        value_Nd, gradient_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                    )
                    key_product = warpgroup_mma(
                        score_gradient_left_NM, query_buffers.index(last), key_result, is_async=True
                    )
                    lse_M = lse_buffers.index(stage).load(column)
                    score_NM = warpgroup_mma_wait(2, deps=[score])
                    share_NM = gl.exp2(score_NM * (scale * _LOG2_E) - lse_M[None, :])
                    through_NM, key_result = warpgroup_mma_wait(0, deps=[through, key_product])
                    mbarrier.arrive(query_free.index(last), count=1)
                    share_left_NM = gl.convert_layout(share_NM.to(dtype), score_left)
                    value_product = warpgroup_mma(
                        share_left_NM, gradient_buffers.index(stage), value_result, is_async=True
                    )
                    delta_M = delta_buffers.index(stage).load(column)
                    score_gradient_NM = share_NM * (through_NM - delta_M[None, :])
                    value_result = warpgroup_mma_wait(0, deps=[value_product])
                    mbarrier.arrive(gradient_free.index(stage), count=1)
                    score_gradient_left_NM = gl.convert_layout(score_gradient_NM.to(dtype), score_left)
                key_product = warpgroup_mma(
                    score_gradient_left_NM, query_buffers.index(stage), key_result, is_async=True
                )
                key_result = warpgroup_mma_wait(0, deps=[key_product])
                mbarrier.arrive(query_free.index(stage), count=1)
                number += 1
        elif tiles > 0:
            # Both products with a tile's shares run beside the next one's scores.
            stage = number % STAGES
            phase = number // STAGES & 1
            mbarrier.wait(query_ready.index(stage), phase)
            score = warpgroup_mma(
                key_Nd, query_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(gradient_ready.index(stage), phase)
            through = warpgroup_mma(
                value_Nd, gradient_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            lse_M = lse_buffers.index(stage).load(column)
            delta_M = delta_buffers.index(stage).load(column)
            score_NM, through_NM = warpgroup_mma_wait(0, deps=[score, through])
            share_NM = gl.exp2(score_NM * (scale * _LOG2_E) - lse_M[None, :])
            score_gradient_NM = share_NM * (through_NM - delta_M[None, :])
            share_left_NM = gl.convert_layout(share_NM.to(dtype), score_left)
            score_gradient_left_NM = gl.convert_layout(score_gradient_NM.to(dtype), score_left)
            following = number + 1
            phase = following // STAGES & 1
            mbarrier.wait(query_ready.index(following % STAGES), phase, pred=tiles > 1)
            mbarrier.wait(gradient_ready.index(following % STAGES), phase, pred=tiles > 1)
            for tile in range(1, tiles):
                last = stage
                number += 1
                stage = number % STAGES
                score = warpgroup_mma(
                    key_Nd, query_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                through = warpgroup_mma(
                    value_Nd, gradient_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                value_product = warpgroup_mma(share_left_NM, gradient_buffers.index(last), value_result, is_async=True)
                key_product = warpgroup_mma(
                    score_gradient_left_NM, query_buffers.index(last), key_result, is_async=True
                )
                lse_M = lse_buffers.index(stage).load(column)
                score_NM = warpgroup_mma_wait(3, deps=[score])
                share_NM = gl.exp2(score_NM * (scale * _LOG2_E) - lse_M[None, :])
                following = number + 1
                phase = following // STAGES & 1
                mbarrier.wait(query_ready.index(following % STAGES), phase, pred=tile + 1 < tiles)
                delta_M = delta_buffers.index(stage).load(column)
                through_NM = warpgroup_mma_wait(2, deps=[through])
                score_gradient_NM = share_NM * (through_NM - delta_M[None, :])
                mbarrier.wait(gradient_ready.index(following % STAGES), phase, pred=tile + 1 < tiles)
                value_result, key_result = warpgroup_mma_wait(0, deps=[value_product, key_product])
                mbarrier.arrive(gradient_free.index(last), count=1)
                mbarrier.arrive(query_free.index(last), count=1)
                share_left_NM = gl.convert_layout(share_NM.to(dtype), score_left)
                score_gradient_left_NM = gl.convert_layout(score_gradient_NM.to(dtype), score_left)
            value_product = warpgroup_mma(share_left_NM, gradient_buffers.index(stage), value_result, is_async=True)
            key_product = warpgroup_mma(score_gradient_left_NM, query_buffers.index(stage), key_result, is_async=True)
            value_result, key_result = warpgroup_mma_wait(0, deps=[value_product, key_product])
            mbarrier.arrive(gradient_free.index(stage), count=1)
            mbarrier.arrive(query_free.index(stage), count=1)
            number += 1
        if not LEFT_IN_REGISTERS:
            mbarrier.arrive(item_free.index(W), count=1)
        _store_rows(value_gradient, value_result, first, end, key_heads, key_head, W, D)
        _store_rows(key_gradient, key_result * scale, first, end, key_heads, key_head, W, D)


@gluon.jit(do_not_specialize=["key_heads", "group"])
def _history_kernel(
    query_desc, gradient_desc, key_desc, value_desc, lse_desc, delta_desc, key_gradient, value_gradient,
    plan, counts, key_heads, group, scale, padded,
    D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    LEFT_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of the history: items of 128 events of one request and key head, over its tokens in order."""
    dtype: gl.constexpr = query_desc.dtype
    query_buffers = gl.allocate_shared_memory(dtype, [STAGES, M, D], query_desc.layout)
    gradient_buffers = gl.allocate_shared_memory(dtype, [STAGES, M, D], query_desc.layout)
    lse_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    key_buffers = gl.allocate_shared_memory(dtype, [2, 64, D], key_desc.layout)
    value_buffers = gl.allocate_shared_memory(dtype, [2, 64, D], key_desc.layout)
    item_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gradient_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gradient_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(item_ready.index(w), count=1)
        mbarrier.init(item_free.index(w), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(query_ready.index(i), count=1)
        mbarrier.init(query_free.index(i), count=2)
        mbarrier.init(gradient_ready.index(i), count=1)
        mbarrier.init(gradient_free.index(i), count=2)
    buffers = (query_buffers, gradient_buffers, lse_buffers, delta_buffers, key_buffers, value_buffers)
    barriers = (item_ready, item_free, query_ready, query_free, gradient_ready, gradient_free)
    gl.warp_specialize(
        [
            (
                _history_consumer,
                (
                    key_gradient, value_gradient, buffers, barriers, plan, counts, key_heads, group, scale,
                    0, D, M, STAGES, LEFT_IN_REGISTERS,
                ),
            ),
            (
                _history_consumer,
                (
                    key_gradient, value_gradient, buffers, barriers, plan, counts, key_heads, group, scale,
                    1, D, M, STAGES, LEFT_IN_REGISTERS,
                ),
            ),
            (
                _history_producer,
                (
                    query_desc, gradient_desc, key_desc, value_desc, lse_desc, delta_desc, buffers, barriers, plan,
                    counts, key_heads, group, padded, D, M, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    # Whoever waits for this kernel waits for the gradients of queries too.
    _wait_for_last(gl.program_id(0))
