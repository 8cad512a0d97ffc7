"""Causal attention of packed histories on Hopper, forward only: one warpgroup fetches by TMA, others do the arithmetic.

Programs stay: each takes tiles of one history and head off a plan, those with the most keys first, until none is left.
The fetching warpgroup runs ahead into the next tile, so that queries and keys are there when the others come to it.
Each of these has 64 rows; they share the tile's blocks of 64 keys, read from the newest back to the oldest: only the
first is cut by the diagonal or by the history's end. TMA fetches what lies past that end (zeros past the tensor); its
scores are masked and its values cleared, since 0 times NaN is NaN.

Gluon has no interpreter: only a Hopper GPU runs this.

Legend: M rows (events that ask) of a warpgroup, N keys of a block, d channels of a head.
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

from model.kernels.crossing_attention_gluon import LOG2_E, _descriptor, _for_tma

_ROWS: gl.constexpr = gl.constexpr(64)
_KEYS: gl.constexpr = _ROWS  # so that a warpgroup's newest block holds its own rows
# Names that Triton 3.6 and later versions do not share.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@dataclass(frozen=True, slots=True)
class HopperCausalTiles:
    """How work is cut. The bits of a result do not depend on it."""

    warpgroups: int
    """Of 64 rows each, sharing a program's keys: 2 or 3."""
    stages: int
    """Blocks of keys, and as many of values, on their way at once."""
    programs_per_sm: int
    is_overlapped: bool
    """Whether a block's scores are on their way while the shares of the block before it meet their values."""

    @property
    def rows(self) -> int:
        """Of a tile."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """A thread's at launch, and in a warpgroup that multiplies; the fetching one needs 24."""
        at_launch = min(65536 // (self.programs_per_sm * 128 * (self.warpgroups + 1)) // 8 * 8, 168)
        return at_launch, min((at_launch * (self.warpgroups + 1) - 24) // self.warpgroups // 8 * 8, 240)


def choose_tiles(head_dim: int) -> HopperCausalTiles:
    """Tiles for heads of 64 or 128 channels: the fastest of nine and of four measured on an H200."""
    if head_dim == 64:
        return HopperCausalTiles(warpgroups=2, stages=4, programs_per_sm=2, is_overlapped=False)
    return HopperCausalTiles(warpgroups=3, stages=3, programs_per_sm=1, is_overlapped=True)


@torch.library.custom_op("hybrid_tower::causal_attention_hopper", mutates_args=())
def causal_attention_hopper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int,
    plan: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As causal_attention. The caller has checked dtypes; a custom operator, so that compiled callers hold it whole."""
    return launch(query, key, value, offsets, longest, choose_tiles(query.shape[-1]), plan)


@causal_attention_hopper.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int,
    plan: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return query.new_empty(query.shape)


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int,
    tiles: HopperCausalTiles, plan: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The kernel on given tiles; rows may lie apart (slices of a projection), heads and channels not.

    plan: plan_tiles' for the tiles' rows, or None to make it here.
    """
    query, key, value = (
        _for_tma(x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()) for x in (query, key, value)
    )
    events, heads, channels = query.shape
    out = query.new_empty(events, heads, channels)
    users = len(offsets) - 1
    if not events or not users:
        return out
    if plan is None:
        plan = plan_tiles(offsets, events, longest, tiles.rows)
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    programs = min(processors * tiles.programs_per_sm, (len(plan) - 1) * heads)
    at_launch, registers = tiles.registers
    _causal_kernel[(programs,)](
        _descriptor(query, 64), _descriptor(key, 64), _descriptor(value, 64), out, plan, heads,
        channels**-0.5 * LOG2_E, D=channels, STAGES=tiles.stages, WARPGROUPS=tiles.warpgroups,
        REGISTERS=registers, IS_OVERLAPPED=tiles.is_overlapped, num_warps=4, maxnreg=at_launch,
    )  # fmt: skip
    return out


def plan_tiles(offsets: torch.Tensor, events: int, longest: int, rows: int) -> torch.Tensor:
    """Tiles of all histories, those with the most keys first: i32 [1 + slots, 4].

    Row 0: how many there are, and how many were taken: none before and after a launch, so that one plan serves many,
    one after the other. Then of each tile: its first row among all, that row's position in its history, the history's
    rows from there on, and nothing. Rows behind the last tile hold anything.
    """
    users = len(offsets) - 1
    plan = offsets.new_empty(1 + events // rows + users, 4)
    levels = triton.cdiv(max(min(longest, events), 1), rows)
    block = min(triton.next_power_of_2(users), 1024)
    _plan_kernel[(levels,)](offsets, plan, users, ROWS=rows, BLOCK=block, num_warps=4)
    return plan


@triton.jit(do_not_specialize=["users"])
def _plan_kernel(offsets, plan, users, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles number program_id(0) of all histories, behind those of higher numbers."""
    number = tl.program_id(0)
    place = 1
    for start in range(0, users, BLOCK):
        user = start + tl.arange(0, BLOCK)
        begin = tl.load(offsets + user, user < users, 0)
        end = tl.load(offsets + user + 1, user < users, 0)
        place += tl.sum(tl.maximum(tl.cdiv(end - begin, ROWS) - 1 - number, 0))
    for start in range(0, users, BLOCK):
        user = start + tl.arange(0, BLOCK)
        begin = tl.load(offsets + user, user < users, 0)
        end = tl.load(offsets + user + 1, user < users, 0)
        first = number * ROWS
        is_tile = (first < end - begin).to(tl.int32)
        at = plan + 4 * (place + tl.cumsum(is_tile) - 1)
        tl.store(at, begin + first, is_tile > 0)
        tl.store(at + 1, first, is_tile > 0)
        tl.store(at + 2, end - begin - first, is_tile > 0)
        place += tl.sum(is_tile)
    if number == 0:
        tl.store(plan, place - 1)
        tl.store(plan + 1, 0)


@gluon.jit
def _fetch(
    query_desc, key_desc, value_desc, plan, heads, buffers, barriers,
    D: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """The fetching warpgroup: takes items, tells the others of them, then queries, keys and values as room is made."""
    query_tiles, key_tiles, value_tiles, items = buffers
    query_full, query_free, key_full, value_full, free, item_full, item_free = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    field = gl.arange(0, 4, FOUR)
    count = gl.load(plan) * heads
    item = gl.program_id(0)
    taken = 0
    turn = 0
    while item < count:
        head = item % heads
        at = plan + 4 * (1 + item // heads)
        row = gl.load(at)
        first = gl.load(at + 1)
        left = gl.load(at + 2)
        mbarrier.wait(item_free.index(taken & 1), (taken >> 1) & 1 ^ 1)
        items.index(taken & 1).store(
            gl.where(field == 0, row, gl.where(field == 1, first, gl.where(field == 2, left, head)))
        )
        _barrier()
        mbarrier.arrive(item_full.index(taken & 1), count=1)
        mbarrier.wait(query_free.index(taken & 1), (taken >> 1) & 1 ^ 1)
        query_came = query_full.index(taken & 1)
        mbarrier.expect(query_came, WARPGROUPS * query_desc.block_type.nbytes)
        for w in gl.static_range(WARPGROUPS):
            query_tile = query_tiles.index((taken & 1) * WARPGROUPS + w)
            _tma_load(query_desc, [row + w * _ROWS, head * D], query_came, query_tile)
        blocks = (first + gl.minimum(left, WARPGROUPS * _ROWS) + _KEYS - 1) // _KEYS
        for i in range(blocks):
            key_at = row - first + (blocks - 1 - i) * _KEYS
            stage = turn % STAGES
            phase = (turn // STAGES) & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(key_full.index(stage), key_desc.block_type.nbytes)
            _tma_load(key_desc, [key_at, head * D], key_full.index(stage), key_tiles.index(stage))
            mbarrier.expect(value_full.index(stage), value_desc.block_type.nbytes)
            _tma_load(value_desc, [key_at, head * D], value_full.index(stage), value_tiles.index(stage))
            turn += 1
        taken += 1
        ticket = gl.atomic_add(plan + 1, 1, sem="relaxed")
        if ticket == count - 1:  # the last of all: one was drawn behind every item
            gl.store(plan + 1, 0)
        item = gl.num_programs(0) + ticket
    mbarrier.wait(item_free.index(taken & 1), (taken >> 1) & 1 ^ 1)
    items.index(taken & 1).store(gl.full([4], -1, gl.int32, FOUR))
    _barrier()
    mbarrier.arrive(item_full.index(taken & 1), count=1)


@gluon.jit
def _look(items, taken):
    """An item's first row, its position in the history, the history's rows from there on, and head, or -1 for none."""
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    field = gl.arange(0, 4, FOUR)
    item = items.index(taken & 1).load(FOUR)
    row = gl.sum(gl.where(field == 0, item, 0), 0)
    first = gl.sum(gl.where(field == 1, item, 0), 0)
    left = gl.sum(gl.where(field == 2, item, 0), 0)
    head = gl.sum(gl.where(field == 3, item, 0), 0)
    return row, first, left, head


@gluon.jit
def _clear_past(tile, limit, D: gl.constexpr):
    """Zeros in the rows of a block of values from `limit` on. Several warpgroups may do it at once."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    PART: gl.constexpr = 1024 // D
    row = gl.arange(0, PART, gl.SliceLayout(1, WIDE))
    for start in gl.static_range(0, _KEYS, PART):
        if limit < start + PART:
            part = tile.slice(start, PART)
            value = part.load(WIDE)
            part.store(gl.where(row[:, None] < limit - start, value, gl.zeros_like(value)))
    fence_async_shared()
    _barrier()


@gluon.jit
def _mask(score):
    """Row m keeps columns up to m. Column 8 a + 2 b + c: b is a thread's, a and c are a register's, so that a thread
    compares constants with one number a row and holds no others through the loops."""
    split = score.reshape([_ROWS, _KEYS // 8, 4, 2])
    SPLIT: gl.constexpr = split.type.layout
    row_M = gl.arange(0, _ROWS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, SPLIT))))
    a = gl.arange(0, _KEYS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, SPLIT))))
    b = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, SPLIT))))
    c = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, SPLIT))))
    room = row_M[:, None, None, None] - (2 * b)[None, None, :, None]
    split = gl.where((8 * a)[None, :, None, None] + c[None, None, None, :] <= room, split, float("-inf"))
    return gl.convert_layout(split.reshape([_ROWS, _KEYS]), score.type.layout, assert_trivial=True)


@gluon.jit
def _largest_of_row(score):
    """[M]: of the columns that one thread holds in pairs of pairs, so that no comparison waits for all before it."""
    return gl.max(gl.max(gl.max(gl.max(score.reshape([_ROWS, _KEYS // 32, 4, 4, 2]), 4), 2), 1), 1)


@gluon.jit
def _sum_of_thread(share):
    """[M, 4] sums of the columns that one thread holds; four threads have a row."""
    return gl.sum(gl.sum(gl.sum(share.reshape([_ROWS, _KEYS // 32, 4, 4, 2]), 4), 2), 1)


@gluon.jit
def _read(
    query_tile, query_free, key_tiles, value_tiles, barriers, turn, blocks, limit, scale_log2,
    D: gl.constexpr, IS_OVERLAPPED: gl.constexpr,
):  # fmt: skip
    """Shares times values and the shares' sums of 64 rows over blocks, newest first, and the next turn.

    Of the newest block row m sees keys up to m, and `limit` keys are the history's.
    """
    _, _, key_full, value_full, free, _, _ = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SHARES: gl.constexpr = gl.DotOperandLayout(0, READ, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, READ)
    dtype: gl.constexpr = key_tiles.dtype
    nothing = gl.zeros([_ROWS, _KEYS], gl.float32, SCORES)
    read = gl.zeros([_ROWS, D], gl.float32, READ)

    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    mbarrier.wait(key_full.index(stage), phase)
    score = warpgroup_mma(query_tile, key_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    if limit < _KEYS:
        mbarrier.wait(value_full.index(stage), phase)
        _clear_past(value_tiles.index(stage), limit, D)
    score = _mask(score)
    largest = _largest_of_row(score) * scale_log2
    share = gl.exp2(gl.fma(score, scale_log2, -gl.convert_layout(largest, gl.SliceLayout(1, SCORES))[:, None]))
    total = _sum_of_thread(share)
    THREAD: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    operand = gl.convert_layout(share.to(dtype), SHARES)
    for _block in range(1, blocks):
        next_stage = (turn + 1) % STAGES
        next_phase = ((turn + 1) // STAGES) & 1
        if not IS_OVERLAPPED:
            mbarrier.wait(value_full.index(stage), phase)
            read = warpgroup_mma(operand, value_tiles.index(stage), read, is_async=True)
            read = warpgroup_mma_wait(0, deps=[read])
            mbarrier.arrive(free.index(stage), count=1)
        mbarrier.wait(key_full.index(next_stage), next_phase)
        score = warpgroup_mma(
            query_tile, key_tiles.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if IS_OVERLAPPED:
            mbarrier.wait(value_full.index(stage), phase)
            read = warpgroup_mma(operand, value_tiles.index(stage), read, is_async=True)
            score = warpgroup_mma_wait(1, deps=[score])
        else:
            score = warpgroup_mma_wait(0, deps=[score])
        # Softmax as it goes (Milakov and Gimelshein 2018).
        new_largest = gl.maximum(largest, _largest_of_row(score) * scale_log2)
        shrink = gl.exp2(largest - new_largest)
        largest = new_largest
        if IS_OVERLAPPED:
            # The values have come long ago. ptxas moves no work past a wait: the row maximum stays beside the product.
            mbarrier.wait(value_full.index(stage), phase)
            read = warpgroup_mma_wait(0, deps=[read])
            mbarrier.arrive(free.index(stage), count=1)
        share = gl.exp2(gl.fma(score, scale_log2, -gl.convert_layout(largest, gl.SliceLayout(1, SCORES))[:, None]))
        total = gl.fma(total, gl.convert_layout(shrink, THREAD)[:, None], _sum_of_thread(share))
        read = read * gl.convert_layout(shrink, ROW)[:, None]
        operand = gl.convert_layout(share.to(dtype), SHARES)
        turn += 1
        stage = next_stage
        phase = next_phase
    mbarrier.arrive(query_free, count=1)
    mbarrier.wait(value_full.index(stage), phase)
    read = warpgroup_mma(operand, value_tiles.index(stage), read, is_async=True)
    read = warpgroup_mma_wait(0, deps=[read])
    mbarrier.arrive(free.index(stage), count=1)
    return read, gl.convert_layout(gl.sum(total, 1), ROW), turn + 1


@gluon.jit
def _attend(
    shared, w: gl.constexpr, D: gl.constexpr, WARPGROUPS: gl.constexpr, IS_OVERLAPPED: gl.constexpr
):  # fmt: skip
    """Warpgroup w: its 64 rows of one tile after the other."""
    out, heads, buffers, barriers, scale_log2 = shared
    query_tiles, key_tiles, value_tiles, items = buffers
    query_full, query_free, key_full, value_full, free, item_full, item_free = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    taken = 0
    turn = 0
    mbarrier.wait(item_full.index(0), 0)
    row, first, left, head = _look(items, taken)
    while head >= 0:
        own_left = left - w * _ROWS  # the history's rows from this warpgroup's first on
        blocks = gl.where(own_left > 0, first // _KEYS + w + 1, 0)
        # Blocks for warpgroups with later rows: only handed on.
        for _block in range((first + gl.minimum(left, WARPGROUPS * _ROWS) + _KEYS - 1) // _KEYS - blocks):
            stage = turn % STAGES
            phase = (turn // STAGES) & 1
            mbarrier.wait(key_full.index(stage), phase)
            mbarrier.wait(value_full.index(stage), phase)
            mbarrier.arrive(free.index(stage), count=1)
            turn += 1
        mbarrier.wait(query_full.index(taken & 1), (taken >> 1) & 1)
        if blocks > 0:
            read, total, turn = _read(
                query_tiles.index((taken & 1) * WARPGROUPS + w), query_free.index(taken & 1), key_tiles, value_tiles,
                barriers, turn, blocks, own_left, scale_log2, D, IS_OVERLAPPED,
            )  # fmt: skip
            # Looked up again, so that the loop need not keep them.
            row, _, left, head = _look(items, taken)
            row_M = w * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, READ))
            channel_d = gl.arange(0, D, gl.SliceLayout(0, READ))
            at_M = (row + row_M).to(gl.int64) * heads + head
            result = (read * (1 / total)[:, None]).to(out.dtype.element_ty)
            gl.store(out + at_M[:, None] * D + channel_d[None, :], result, (row_M < left)[:, None])
        else:
            mbarrier.arrive(query_free.index(taken & 1), count=1)
        mbarrier.arrive(item_free.index(taken & 1), count=1)
        taken += 1
        mbarrier.wait(item_full.index(taken & 1), (taken >> 1) & 1)
        row, first, left, head = _look(items, taken)


@gluon.jit
def _causal_kernel(
    query_desc, key_desc, value_desc, out, plan, heads, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    IS_OVERLAPPED: gl.constexpr,
):  # fmt: skip
    """Tiles off the plan until none is left."""
    dtype: gl.constexpr = query_desc.dtype
    buffers = (
        # Of two items: the next one's come while this one's are read.
        gl.allocate_shared_memory(dtype, [2 * WARPGROUPS, _ROWS, D], query_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, _KEYS, D], key_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, _KEYS, D], value_desc.layout),
        gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    query_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=WARPGROUPS)
    for i in gl.static_range(2):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_free.index(i), count=WARPGROUPS)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_free.index(i), count=WARPGROUPS)
    barriers = (query_full, query_free, key_full, value_full, free, item_full, item_free)
    shared = (out, heads, buffers, barriers, scale_log2)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_fetch, (query_desc, key_desc, value_desc, plan, heads, buffers, barriers, D, WARPGROUPS)),
                (_attend, (shared, 0, D, WARPGROUPS, IS_OVERLAPPED)),
                (_attend, (shared, 1, D, WARPGROUPS, IS_OVERLAPPED)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_fetch, (query_desc, key_desc, value_desc, plan, heads, buffers, barriers, D, WARPGROUPS)),
                (_attend, (shared, 0, D, WARPGROUPS, IS_OVERLAPPED)),
                (_attend, (shared, 1, D, WARPGROUPS, IS_OVERLAPPED)),
                (_attend, (shared, 2, D, WARPGROUPS, IS_OVERLAPPED)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
