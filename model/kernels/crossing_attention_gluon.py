"""Crossing attention's forward pass on Hopper: one warpgroup fetches by TMA, others multiply and take exponentials.

As in `crossing_attention_triton`, a history is read in chunks of a fixed size that are folded oldest first, by one
program or each by its own, with the same bits (docs/decisions/0013). What differs:
- A warpgroup has 64 rows of its own and one order of operations, so how many of them share a program's keys is free.
- A candidate's own tokens come first, while the first keys are on their way; the total lives in shared memory.
- Within a chunk the newest block comes first: the only one that may reach past the history's end. TMA fetches what
  lies there (zeros past the tensor); its scores are masked and its values cleared, since 0 times NaN is NaN.
- Programs take the longest histories first, so that none of them is left alone at the end.
- Keys of a block are fetched before the values of the block before it: that is how they are wanted.

The backward pass is in `crossing_attention_gluon_backward`. Gluon has no interpreter: only a Hopper GPU runs this.

Legend: as in crossing_attention; M rows (tokens) of a warpgroup, N events of a block, G chunks.
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

LOG2_E = 1.4426950408889634
_LOG2_E: gl.constexpr = gl.constexpr(LOG2_E)
_SCRATCH_LIMIT_BYTES = 256 << 20
_ROWS: gl.constexpr = gl.constexpr(64)
_MOST_RANKED = 32
_FOLDED_ROWS = 8
# Names that Triton 3.6 and later versions do not share.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """How work is cut. `keys` and `chunk` fix the bits of a result, the others do not."""

    keys: int
    """History events of a block."""
    chunk: int
    """History events between two foldings; a multiple of keys."""
    warpgroups: int
    """Of 64 tokens each, sharing a program's keys: 1 or 2."""
    stages: int
    """Blocks of keys, and as many of values, on their way at once."""
    programs_per_sm: int = 1
    is_split: bool | None = None
    """Whether each chunk has a program of its own; None: where there would be too few programs otherwise."""
    in_turns: bool = False
    """Whether two warpgroups of a program begin their products in turn."""


def choose_hopper_tiles(head_dim: int, fills_waves: bool = False) -> HopperTiles:
    """Tiles for heads of 64 or 128 channels; the same bits whether or not `fills_waves` holds."""
    if head_dim == 128:
        return HopperTiles(keys=128, chunk=2048, warpgroups=2, stages=2)
    if fills_waves:
        return HopperTiles(keys=128, chunk=2048, warpgroups=2, stages=3, in_turns=True)
    return HopperTiles(keys=128, chunk=2048, warpgroups=1, stages=2, programs_per_sm=2)


def fills_waves(query: torch.Tensor, requests: int, longest_history: int | None) -> bool:
    """Whether histories are known to be long, and programs of 128 tokens fill one to four waves of multiprocessors.

    Filled is nine tenths, if the requests are of one size: nothing is read from the device. Such programs are then 1 to
    4 % faster than two of 64 tokens a multiprocessor, and slower in every other measured case (docs/decisions/0013).
    """
    if longest_history is None or longest_history < 4096 or not len(query):
        return False
    num_tokens, heads, _ = query.shape
    multiprocessors: int = torch.cuda.get_device_properties(query.device).multi_processor_count
    waves: int = triton.cdiv(requests * triton.cdiv(num_tokens, 128 * requests) * heads, multiprocessors)
    return waves <= 4 and 10 * num_tokens * heads >= 9 * 128 * waves * multiprocessors


def is_hopper(query: torch.Tensor) -> bool:
    """Whether this file's kernel takes the query: bf16 or f16 heads of 64 or 128 channels, on compute capability 9."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in (64, 128)
        and torch.cuda.get_device_capability(query.device)[0] == 9
    )


def hopper_forward(
    query: torch.Tensor, key_self: torch.Tensor, value_self: torch.Tensor, history_key: torch.Tensor,
    history_value: torch.Tensor, candidate_offsets: torch.Tensor, history_offsets: torch.Tensor,
    *, tokens: int, longest_history: int | None, tiles: HopperTiles,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [T, H, d] and log of the denominators, f32 [T, H]; heads and channels of each tensor are packed."""
    num_tokens, heads, channels = query.shape
    out = query.new_empty(num_tokens, heads, channels)
    lse = query.new_empty(num_tokens, heads, dtype=torch.float32)
    if not num_tokens:
        return out, lse
    requests = len(candidate_offsets) - 1
    rows = 64 * tiles.warpgroups
    holders = min(requests, num_tokens // tokens)  # of candidates; each but the last row of its tiles may be in vain
    slots = (num_tokens - holders) // rows + holders
    most_chunks = triton.cdiv(len(history_key) if longest_history is None else longest_history, tiles.chunk)
    is_split = most_chunks > 0 and tiles.is_split is not False
    if is_split and tiles.is_split is None:
        is_split = _is_split_worthwhile(query, max(triton.cdiv(num_tokens, rows), requests) * heads, most_chunks)
    if is_split:
        part_GTHd = query.new_empty(most_chunks, num_tokens, heads, channels, dtype=torch.float32)
        part_max_GTH, part_sum_GTH = lse.new_empty(2, most_chunks, num_tokens, heads)
    else:
        part_GTHd, part_max_GTH, part_sum_GTH = out, lse, lse  # not looked at
    order = candidate_offsets  # not looked at
    if requests > _MOST_RANKED:
        order = candidate_offsets.new_empty(slots, 2)
        _order_kernel[(triton.cdiv(requests, 32),)](
            candidate_offsets, history_offsets, order, requests, slots, ROWS=rows, BLOCK=32
        )
    query, history_key, history_value = _for_tma(query), _for_tma(history_key), _for_tma(history_value)
    key_self, value_self = _for_tma(key_self), _for_tma(value_self)
    shared = {
        "num_tokens": num_tokens, "events": len(history_key), "heads": heads, "group": heads // key_self.shape[1],
        "requests": requests, "scale_log2": channels**-0.5 * LOG2_E, "TOKENS": tokens, "D": channels,
        "CHUNK": tiles.chunk, "IS_ONE": requests == 1, "enable_fp_fusion": False,
    }  # fmt: skip
    self_pair = (key_self, value_self, key_self.stride(0), value_self.stride(0))
    launch, worker_registers = _registers(tiles)
    _forward_kernel[(slots * heads, most_chunks if is_split else 1)](
        _descriptor(query, 64), _descriptor(history_key if len(history_key) else query, tiles.keys),
        _descriptor(history_value if len(history_value) else query, tiles.keys), _descriptor(key_self, 64),
        _descriptor(value_self, 64), query, query.stride(0), *self_pair,
        candidate_offsets, history_offsets, order, out, lse, part_GTHd, part_max_GTH, part_sum_GTH,
        **shared, KEYS=tiles.keys, STAGES=tiles.stages, WARPGROUPS=tiles.warpgroups, MOST_RANKED=_MOST_RANKED,
        REGISTERS=worker_registers, IS_RANKED=requests <= _MOST_RANKED,
        ARE_EVEN=len(history_key) == requests * (longest_history or 0), IS_SPLIT=is_split,
        IN_TURNS=tiles.in_turns and tiles.warpgroups == 2, num_warps=4, maxnreg=launch,
    )  # fmt: skip
    if is_split:
        _fold_kernel[(triton.cdiv(num_tokens, _FOLDED_ROWS) * heads,)](
            query, query.stride(0), *self_pair, candidate_offsets, history_offsets, out, lse,
            part_GTHd, part_max_GTH, part_sum_GTH, **shared, ROWS=_FOLDED_ROWS, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return out, lse


def _for_tma(x_SHd: torch.Tensor) -> torch.Tensor:
    """The tensor with rows where TMA can fetch them: at multiples of 16 bytes, none over another."""
    is_apart = len(x_SHd) <= 1 or x_SHd.stride(0) >= x_SHd.shape[1] * x_SHd.shape[2]
    is_aligned = x_SHd.data_ptr() % 16 == 0 and (len(x_SHd) <= 1 or x_SHd.stride(0) % 8 == 0)
    return x_SHd if is_apart and is_aligned else x_SHd.clone(memory_format=torch.contiguous_format)


def _descriptor(x_SHd: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of [S, H * d], for boxes of so many rows of one head."""
    count, heads, channels = x_SHd.shape
    dtype = gl.bfloat16 if x_SHd.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, channels], dtype)
    stride = x_SHd.stride(0) if count > 1 else heads * channels
    return TensorDescriptor(x_SHd, [count, heads * channels], [stride, 1], [rows, channels], layout)


def _registers(tiles: HopperTiles) -> tuple[int, int]:
    """Registers a thread at launch and of a multiplying warpgroup; the fetching one needs 24."""
    at_launch = min(65536 // (tiles.programs_per_sm * 128 * (tiles.warpgroups + 1)) // 8 * 8, 168)
    return at_launch, min((at_launch * (tiles.warpgroups + 1) - 24) // tiles.warpgroups // 8 * 8, 240)


def _is_split_worthwhile(query: torch.Tensor, programs: int, most_chunks: int) -> bool:
    """Whether programs of whole histories (so many, about) would leave over a quarter of the device idle."""
    scratch_bytes = query.numel() * 4 * most_chunks
    if most_chunks <= 1 or scratch_bytes > _SCRATCH_LIMIT_BYTES:
        return False
    return 4 * programs < 3 * torch.cuda.get_device_properties(query.device).multi_processor_count


@triton.jit
def _order_kernel(
    candidate_offsets, history_offsets, order, requests, slots, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """order[slot] = (request, first token) of a tile, tiles of the longest histories first; request -1 past the last.

    Program p places the tiles of requests p * BLOCK on. Requests past the last have no tokens, so no tiles.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin_r = tl.load(candidate_offsets + tl.minimum(r, requests))
    tiles_r = tl.cdiv(tl.load(candidate_offsets + tl.minimum(r + 1, requests)) - begin_r, ROWS)
    length_r = tl.load(history_offsets + tl.minimum(r + 1, requests)) - tl.load(
        history_offsets + tl.minimum(r, requests)
    )
    start_r = tl.zeros([BLOCK], tl.int32)
    total = 0
    for first in range(0, requests, BLOCK):
        q = first + tl.arange(0, BLOCK)
        begin_q = tl.load(candidate_offsets + tl.minimum(q, requests))
        tiles_q = tl.cdiv(tl.load(candidate_offsets + tl.minimum(q + 1, requests)) - begin_q, ROWS)
        length_q = tl.load(history_offsets + tl.minimum(q + 1, requests)) - tl.load(
            history_offsets + tl.minimum(q, requests)
        )
        is_before = (length_q[None, :] > length_r[:, None]) | (
            (length_q[None, :] == length_r[:, None]) & (q[None, :] < r[:, None])
        )
        start_r += tl.sum(tl.where(is_before, tiles_q[None, :], 0), 1)
        total += tl.sum(tiles_q)
    for tile in range(0, tl.max(tiles_r)):
        at_r = order + 2 * (start_r + tile)
        tl.store(at_r, r, tile < tiles_r)
        tl.store(at_r + 1, begin_r + tile * ROWS, tile < tiles_r)
    for first in range(total + tl.program_id(0) * BLOCK, slots, tl.num_programs(0) * BLOCK):
        slot = first + tl.arange(0, BLOCK)
        tl.store(order + 2 * slot, -1, slot < slots)
        tl.store(order + 2 * slot + 1, 0, slot < slots)


@gluon.jit
def _rank(
    candidate_offsets, history_offsets, requests, slot, ROWS: gl.constexpr, MOST: gl.constexpr, ARE_EVEN: gl.constexpr
):
    """First token of a slot as _order_kernel places them, end of its request's tokens, begin and length of its history.

    Zeros past the last tile. Every warp works it out for itself, a lane for each request. ARE_EVEN: all histories are
    of one length, so that tiles stay in the order of their requests.
    """
    PAIRS: gl.constexpr = gl.BlockedLayout([1, MOST], [32, 1], [4, 1], [1, 0])
    r = gl.arange(0, MOST, gl.SliceLayout(1, PAIRS))
    begin_r = gl.load(candidate_offsets + gl.minimum(r, requests))
    end_r = gl.load(candidate_offsets + gl.minimum(r + 1, requests))
    history_r = gl.load(history_offsets + gl.minimum(r, requests))
    length_r = gl.load(history_offsets + gl.minimum(r + 1, requests)) - history_r
    tiles_r = (end_r - begin_r + ROWS - 1) // ROWS
    q = gl.arange(0, MOST, gl.SliceLayout(0, PAIRS))
    tiles_q = gl.convert_layout(tiles_r, gl.SliceLayout(0, PAIRS))
    is_before = q[None, :] < r[:, None]
    if not ARE_EVEN:
        length_q = gl.convert_layout(length_r, gl.SliceLayout(0, PAIRS))
        is_before = (length_q[None, :] > length_r[:, None]) | ((length_q[None, :] == length_r[:, None]) & is_before)
    zeros = gl.zeros([MOST, MOST], gl.int32, PAIRS)
    start_r = gl.sum(gl.where(is_before, tiles_q[None, :] + zeros, zeros), 1)
    is_mine = (start_r <= slot) & (slot < start_r + tiles_r)
    first = gl.sum(gl.where(is_mine, begin_r + (slot - start_r) * ROWS, 0), 0)
    end = gl.sum(gl.where(is_mine, end_r, 0), 0)
    history = gl.sum(gl.where(is_mine, history_r, 0), 0)
    length = gl.sum(gl.where(is_mine, length_r, 0), 0)
    return first, end, history, length


@gluon.jit
def _allow_next(any_number):
    """The kernel launched next may start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1
    )


@gluon.jit
def _wait_for_last(any_number):
    """Until the kernel launched before is done."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1)


@gluon.jit
def _own_of_tiles(query_tile, own_key, own_value, scale_log2, LAYOUT: gl.constexpr):
    """What _read_own gives where each row is a candidate, of tiles that have been fetched."""
    query_Md = query_tile.load(LAYOUT).to(gl.float32)
    key_Md = own_key.load(LAYOUT).to(gl.float32)
    value_Md = own_value.load(LAYOUT).to(gl.float32)
    score_M = gl.sum(query_Md * key_Md, 1) * scale_log2
    return score_M, gl.full([_ROWS], 1.0, gl.float32, gl.SliceLayout(1, LAYOUT)), value_Md


@gluon.jit
def _read_own(
    query, query_stride, key_self, value_self, key_self_stride, value_self_stride, row_M, is_row_M, head, key_head,
    scale_log2, TOKENS: gl.constexpr, D: gl.constexpr, PRODUCTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Largest score, sum of shares, and shares times values, of each row's own tokens up to itself, oldest first.

    Results are in LAYOUT, as the rows are. PRODUCTS: where scores are summed, whose order it fixes.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    product_row_M = gl.convert_layout(row_M, gl.SliceLayout(1, PRODUCTS))
    is_product = gl.convert_layout(is_row_M, gl.SliceLayout(1, PRODUCTS))[:, None]
    product_place_M = product_row_M % TOKENS
    product_d = gl.arange(0, D, gl.SliceLayout(0, PRODUCTS))
    query_at = query + product_row_M[:, None] * query_stride + head * D + product_d[None, :]
    query_Md = gl.load(query_at, is_product, 0.0).to(gl.float32)
    channel_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    place_M = row_M % TOKENS
    largest = gl.full([row_M.shape[0]], float("-inf"), gl.float32, ROW)
    total = gl.zeros([row_M.shape[0]], gl.float32, ROW)
    read = gl.zeros([row_M.shape[0], D], gl.float32, LAYOUT)
    for token in gl.static_range(TOKENS):
        own_M = product_row_M - product_place_M + token
        key_at = key_self + own_M[:, None] * key_self_stride + key_head * D + product_d[None, :]
        key_Md = gl.load(key_at, is_product, 0.0).to(gl.float32)
        own_M = row_M - place_M + token
        value_at = value_self + own_M[:, None] * value_self_stride + key_head * D + channel_d[None, :]
        value_Md = gl.load(value_at, is_row_M[:, None], 0.0).to(gl.float32)
        score_M = gl.convert_layout(gl.sum(query_Md * key_Md, 1) * scale_log2, ROW)
        score_M = gl.where(token <= place_M, score_M, float("-inf"))
        new_largest = gl.maximum(largest, score_M)
        shrink_M = gl.exp2(largest - new_largest)
        share_M = gl.exp2(score_M - new_largest)
        total = gl.fma(total, shrink_M, share_M)
        read = gl.fma(read, shrink_M[:, None], share_M[:, None] * value_Md)
        largest = new_largest
    return largest, total, read


@gluon.jit
def _fold(largest, total, read, chunk_largest, chunk_total, chunk_read):
    """A finished chunk joins the total."""
    new_largest = gl.maximum(largest, chunk_largest)
    old_M = gl.exp2(largest - new_largest)
    new_M = gl.exp2(chunk_largest - new_largest)
    total = gl.fma(total, old_M, chunk_total * new_M)
    read = gl.fma(read, old_M[:, None], chunk_read * new_M[:, None])
    return new_largest, total, read


@gluon.jit
def _store(out, lse, row_M, is_row_M, head, heads, largest, total, read, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Shares times values over their sum, and the logarithm of the denominator."""
    at_M = row_M * heads + head
    channel_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    result = (read * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    gl.store(out + at_M[:, None] * D + channel_d[None, :], result, is_row_M[:, None])
    gl.store(lse + at_M, (largest + gl.log2(total)) / _LOG2_E, is_row_M)


@gluon.jit
def _fetch(
    shared, D: gl.constexpr, KEYS: gl.constexpr, CHUNK: gl.constexpr, WARPGROUPS: gl.constexpr, HAS_OWN: gl.constexpr
):
    """The fetching warpgroup: queries of each that has any, then blocks of keys and values as they are freed."""
    work, descs, buffers, barriers = shared
    query_desc, key_desc, value_desc, own_key_desc, own_value_desc = descs
    first, end, history_begin, length, first_chunk, last_chunk, head, key_head = work
    query_tiles, key_tiles, value_tiles, own_tiles = buffers
    query_full, key_full, key_free, value_full, value_free, _ = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    for w in gl.static_range(WARPGROUPS):
        if first + w * _ROWS < end:
            row = first + w * _ROWS
            ALL: gl.constexpr = (3 if HAS_OWN else 1) * query_desc.block_type.nbytes
            mbarrier.expect(query_full.index(w), ALL)
            _tma_load(query_desc, [row, head * D], query_full.index(w), query_tiles.index(w))
            if HAS_OWN:
                _tma_load(own_key_desc, [row, key_head * D], query_full.index(w), own_tiles.index(2 * w))
                _tma_load(own_value_desc, [row, key_head * D], query_full.index(w), own_tiles.index(2 * w + 1))
    turn = 0
    for chunk in range(first_chunk, last_chunk):
        chunk_end = gl.minimum(chunk * CHUNK + CHUNK, length)
        blocks = (chunk_end - chunk * CHUNK + KEYS - 1) // KEYS
        newest = history_begin + chunk * CHUNK + (blocks - 1) * KEYS
        # Keys of a block before values of the one before it: they are wanted so.
        for i in range(blocks + 1):
            if i < blocks:
                stage = (turn + i) % STAGES
                mbarrier.wait(key_free.index(stage), (((turn + i) // STAGES) & 1) ^ 1)
                mbarrier.expect(key_full.index(stage), key_desc.block_type.nbytes)
                _tma_load(key_desc, [newest - i * KEYS, key_head * D], key_full.index(stage), key_tiles.index(stage))
            if i > 0:
                before = turn + i - 1
                stage = before % STAGES
                mbarrier.wait(value_free.index(stage), ((before // STAGES) & 1) ^ 1)
                mbarrier.expect(value_full.index(stage), value_desc.block_type.nbytes)
                _tma_load(
                    value_desc, [newest - (i - 1) * KEYS, key_head * D], value_full.index(stage),
                    value_tiles.index(stage),
                )  # fmt: skip
        turn += blocks


@gluon.jit
def _clear_past(tile, limit, KEYS: gl.constexpr, D: gl.constexpr):
    """Zeros in the rows of a block of values from `limit` on, by one warpgroup."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for start in gl.static_range(0, KEYS, 32):
        part = tile.slice(start, 32)
        row = start + gl.arange(0, 32, gl.SliceLayout(1, WIDE))
        value = part.load(WIDE)
        part.store(gl.where(row[:, None] < limit, value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _sum_of_thread(share, KEYS: gl.constexpr):
    """[M, 4] sums of the columns that one thread holds; four threads have a row."""
    return gl.sum(gl.sum(share.reshape([_ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def _max_of_row(score, KEYS: gl.constexpr):
    """The largest score of each row, by short chains."""
    return gl.max(gl.max(gl.max(gl.max(score.reshape([_ROWS, 4, KEYS // 32, 4, 2]), 4), 2), 1), 1)


@gluon.jit
def _take_turn(any_number, w: gl.constexpr):
    """Wait until the other warpgroup has given warpgroup w its turn."""
    if w == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1)


@gluon.jit
def _give_turn(any_number, w: gl.constexpr):
    """Warpgroup w may go on."""
    if w == 0:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [any_number], gl.int32, False, 1)


@gluon.jit
def _read_chunk(
    query_tile, key_tiles, value_tiles, barriers, turn, blocks, limit, scale_log2,
    w: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """Blocks of a chunk, newest first, of which the newest has `limit` events: what _fold takes, and the next turn.

    The scores of a block are on their way while the shares of the block before it meet their values.
    """
    _, key_full, key_free, value_full, value_free, value_cleared = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SHARES: gl.constexpr = gl.DotOperandLayout(0, READ, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, READ)
    dtype: gl.constexpr = key_tiles.dtype
    nothing = gl.zeros([_ROWS, KEYS], gl.float32, SCORES)
    read = gl.zeros([_ROWS, D], gl.float32, READ)

    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    mbarrier.wait(key_full.index(stage), phase)
    score = warpgroup_mma(query_tile, key_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(key_free.index(stage), count=1)
    if limit < KEYS:
        # One warpgroup clears what the others then read.
        if w == 0:
            mbarrier.wait(value_full.index(stage), phase)
            _clear_past(value_tiles.index(stage), limit, KEYS, D)
            _barrier()
            mbarrier.arrive(value_cleared, count=1)
        else:
            mbarrier.wait(value_cleared, 0)
    event_N = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    score = gl.where(event_N[None, :] < limit, score, float("-inf"))
    largest = gl.convert_layout(_max_of_row(score, KEYS), gl.SliceLayout(1, SCORES)) * scale_log2
    share = gl.exp2(gl.fma(score, scale_log2, -largest[:, None]))
    total = _sum_of_thread(share, KEYS)
    THREAD: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    operand = gl.convert_layout(share.to(dtype), SHARES)
    next_stage = (turn + 1) % STAGES
    next_phase = ((turn + 1) // STAGES) & 1
    if IN_TURNS and w == 1 and blocks > 1:
        _give_turn(turn, 0)
    for block in range(1, blocks):
        if IN_TURNS:
            _take_turn(turn, w)
        mbarrier.wait(key_full.index(next_stage), next_phase)
        score = warpgroup_mma(
            query_tile, key_tiles.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        mbarrier.wait(value_full.index(stage), phase)
        read = warpgroup_mma(operand, value_tiles.index(stage), read, is_async=True)
        if IN_TURNS:
            if w == 0:
                _give_turn(turn, 1)
            elif block + 1 < blocks:
                _give_turn(turn, 0)
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(key_free.index(next_stage), count=1)
        # Softmax as it goes (Milakov and Gimelshein 2018).
        row_max = gl.convert_layout(_max_of_row(score, KEYS), gl.SliceLayout(1, SCORES))
        new_largest = gl.maximum(largest, row_max * scale_log2)
        shrink = gl.exp2(largest - new_largest)
        largest = new_largest
        # The values have come long ago. ptxas moves no work past a wait: the row maximum stays beside the product.
        mbarrier.wait(value_full.index(stage), phase)
        read = warpgroup_mma_wait(0, deps=[read])
        mbarrier.arrive(value_free.index(stage), count=1)
        share = gl.exp2(gl.fma(score, scale_log2, -largest[:, None]))
        total = gl.fma(total, gl.convert_layout(shrink, THREAD)[:, None], _sum_of_thread(share, KEYS))
        read = read * gl.convert_layout(shrink, ROW)[:, None]
        operand = gl.convert_layout(share.to(dtype), SHARES)
        turn += 1
        stage = next_stage
        phase = next_phase
        next_stage = (turn + 1) % STAGES
        next_phase = ((turn + 1) // STAGES) & 1
    mbarrier.wait(value_full.index(stage), phase)
    read = warpgroup_mma(operand, value_tiles.index(stage), read, is_async=True)
    read = warpgroup_mma_wait(0, deps=[read])
    mbarrier.arrive(value_free.index(stage), count=1)
    return gl.convert_layout(largest, ROW), gl.convert_layout(gl.sum(total, 1), ROW), read, turn + 1


@gluon.jit
def _attend(
    shared, w: gl.constexpr, TOKENS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, CHUNK: gl.constexpr,
    IS_SPLIT: gl.constexpr, IN_TURNS: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: its 64 rows over the chunks."""
    work, pointers, sizes, buffers, barriers, scale_log2 = shared
    first, end, _, length, first_chunk, last_chunk, head, key_head = work
    query, key_self, value_self, out, lse, part, part_max, part_sum = pointers
    query_stride, key_self_stride, value_self_stride, num_tokens, heads = sizes
    query_tiles, key_tiles, value_tiles, own_tiles = buffers
    query_full, key_full, key_free, value_full, value_free, _ = barriers
    STAGES: gl.constexpr = key_tiles.type.shape[0]
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_M = (first + w * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, READ))).to(gl.int64)
    is_row_M = row_M < end
    turn = 0
    if first + w * _ROWS < end:
        if IS_SPLIT:
            mbarrier.wait(query_full.index(w), 0)
            chunk_end = gl.minimum(first_chunk * CHUNK + CHUNK, length) - first_chunk * CHUNK
            blocks = (chunk_end + KEYS - 1) // KEYS
            limit = chunk_end - (blocks - 1) * KEYS
            largest, total, read, turn = _read_chunk(
                query_tiles.index(w), key_tiles, value_tiles, barriers, turn, blocks, limit, scale_log2,
                w, KEYS, D, IN_TURNS,
            )  # fmt: skip
            at_M = (row_M + first_chunk * num_tokens) * heads + head
            channel_d = gl.arange(0, D, gl.SliceLayout(0, READ))
            gl.store(part_max + at_M, largest, is_row_M)
            gl.store(part_sum + at_M, total, is_row_M)
            gl.store(part + at_M[:, None] * D + channel_d[None, :], read, is_row_M[:, None])
        else:
            totals = own_tiles._reinterpret(
                gl.float32, [WARPGROUPS, _ROWS, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
            )
            if TOKENS == 1:
                mbarrier.wait(query_full.index(w), 0)
                largest, total, read = _own_of_tiles(
                    query_tiles.index(w), own_tiles.index(2 * w), own_tiles.index(2 * w + 1), scale_log2, READ
                )
                _barrier()  # the total takes the place of the tiles
            else:
                largest, total, read = _read_own(
                    query, query_stride, key_self, value_self, key_self_stride, value_self_stride, row_M, is_row_M,
                    head, key_head, scale_log2, TOKENS, D, READ, READ,
                )  # fmt: skip
                mbarrier.wait(query_full.index(w), 0)
            totals.index(w).store(read)
            for chunk in range(first_chunk, last_chunk):
                chunk_end = gl.minimum(chunk * CHUNK + CHUNK, length) - chunk * CHUNK
                blocks = (chunk_end + KEYS - 1) // KEYS
                limit = chunk_end - (blocks - 1) * KEYS
                chunk_largest, chunk_total, chunk_read, turn = _read_chunk(
                    query_tiles.index(w), key_tiles, value_tiles, barriers, turn, blocks, limit, scale_log2,
                    w, KEYS, D, IN_TURNS,
                )  # fmt: skip
                read = totals.index(w).load(READ)
                largest, total, read = _fold(largest, total, read, chunk_largest, chunk_total, chunk_read)
                totals.index(w).store(read)
            read = totals.index(w).load(READ)
            _store(out, lse, row_M, is_row_M, head, heads, largest, total, read, D, READ)
    else:
        # Without rows: only hand the blocks on.
        for chunk in range(first_chunk, last_chunk):
            blocks = (gl.minimum(CHUNK, length - chunk * CHUNK) + KEYS - 1) // KEYS
            if IN_TURNS and w == 1 and blocks > 1:
                _give_turn(turn, 0)
            for block in range(blocks):
                if IN_TURNS and block > 0:
                    _take_turn(turn, w)
                    if w == 0:
                        _give_turn(turn, 1)
                    elif block + 1 < blocks:
                        _give_turn(turn, 0)
                stage = turn % STAGES
                phase = (turn // STAGES) & 1
                mbarrier.wait(key_full.index(stage), phase)
                mbarrier.arrive(key_free.index(stage), count=1)
                mbarrier.wait(value_full.index(stage), phase)
                mbarrier.arrive(value_free.index(stage), count=1)
                turn += 1


# One code, and so the same bits, whatever the counts.
@gluon.jit(do_not_specialize=["num_tokens", "events", "requests"])
def _forward_kernel(
    query_desc, key_desc, value_desc, own_key_desc, own_value_desc, query, query_stride, key_self, value_self,
    key_self_stride, value_self_stride, candidate_offsets, history_offsets, order, out, lse, part, part_max, part_sum,
    num_tokens, events, heads, group, requests, scale_log2,
    TOKENS: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, MOST_RANKED: gl.constexpr, REGISTERS: gl.constexpr, IS_RANKED: gl.constexpr,
    IS_ONE: gl.constexpr, ARE_EVEN: gl.constexpr, IS_SPLIT: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """Tokens of one tile and head over the whole history; where it is split, over one chunk, left in `part`."""
    slot = gl.program_id(0) // heads
    head = gl.program_id(0) % heads
    if IS_SPLIT:
        _allow_next(slot)
    if IS_ONE:
        # Its offsets are known: 0 and all.
        first = slot * (WARPGROUPS * _ROWS)
        end = num_tokens
        history_begin = 0
        length = events
    elif IS_RANKED:
        first, end, history_begin, length = _rank(
            candidate_offsets, history_offsets, requests, slot, WARPGROUPS * _ROWS, MOST_RANKED, ARE_EVEN
        )
    else:
        request = gl.load(order + 2 * slot)
        first = gl.load(order + 2 * slot + 1)
        is_tile = request >= 0
        request = gl.maximum(request, 0)
        end = gl.where(is_tile, gl.load(candidate_offsets + request + 1), first)
        history_begin = gl.load(history_offsets + request)
        length = gl.load(history_offsets + request + 1) - history_begin
    if IS_SPLIT:
        first_chunk = gl.program_id(1)
        last_chunk = first_chunk + 1
        end = gl.where(first_chunk * CHUNK < length, end, first)
    else:
        first_chunk = 0
        last_chunk = (length + CHUNK - 1) // CHUNK
    last_chunk = gl.where(first < end, last_chunk, first_chunk)
    key_head = head // group

    dtype: gl.constexpr = query_desc.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [WARPGROUPS, _ROWS, D], query_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], key_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], value_desc.layout),
        gl.allocate_shared_memory(dtype, [0 if IS_SPLIT else 2 * WARPGROUPS, _ROWS, D], query_desc.layout),
    )
    query_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_cleared = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for w in gl.static_range(WARPGROUPS):
        mbarrier.init(query_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=WARPGROUPS)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=WARPGROUPS)
    mbarrier.init(value_cleared, count=1)
    barriers = (query_full, key_full, key_free, value_full, value_free, value_cleared)
    pointers = (query, key_self, value_self, out, lse, part, part_max, part_sum)
    sizes = (query_stride, key_self_stride, value_self_stride, num_tokens, heads)
    work = (first, end, history_begin, length, first_chunk, last_chunk, head, key_head)
    shared = (work, pointers, sizes, buffers, barriers, scale_log2)
    descs = (query_desc, key_desc, value_desc, own_key_desc, own_value_desc)
    fetch = (work, descs, buffers, barriers)
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_fetch, (fetch, D, KEYS, CHUNK, WARPGROUPS, TOKENS == 1 and not IS_SPLIT)),
                (_attend, (shared, 0, TOKENS, D, KEYS, CHUNK, IS_SPLIT, IN_TURNS, WARPGROUPS)),
            ],
            [4],
            [REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_fetch, (fetch, D, KEYS, CHUNK, WARPGROUPS, TOKENS == 1 and not IS_SPLIT)),
                (_attend, (shared, 0, TOKENS, D, KEYS, CHUNK, IS_SPLIT, IN_TURNS, WARPGROUPS)),
                (_attend, (shared, 1, TOKENS, D, KEYS, CHUNK, IS_SPLIT, IN_TURNS, WARPGROUPS)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )


@gluon.jit
def _load_part(part, part_max, part_sum, row_M, chunks_M, chunk, num_tokens, head, heads, D: gl.constexpr):
    """What a chunk left of each row; of a chunk that a row's history does not have, what changes nothing."""
    channel_d = gl.arange(0, D, gl.SliceLayout(0, row_M.type.layout.parent))
    has_chunk_M = chunk < chunks_M
    at_M = (row_M + chunk * num_tokens) * heads + head
    read = gl.load(part + at_M[:, None] * D + channel_d[None, :], has_chunk_M[:, None], 0.0)
    total = gl.load(part_sum + at_M, has_chunk_M, 0.0)
    largest = gl.load(part_max + at_M, has_chunk_M, float("-inf"))
    return largest, total, read


@gluon.jit(do_not_specialize=["num_tokens", "events", "requests"])
def _fold_kernel(
    query, query_stride, key_self, value_self, key_self_stride, value_self_stride, candidate_offsets, history_offsets,
    out, lse, part, part_max, part_sum, num_tokens, events, heads, group, requests, scale_log2,
    TOKENS: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr, IS_ONE: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of a head, of any requests: their own tokens, then the chunks in their order, as _attend does it."""
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, WIDE)
    PAIRS: gl.constexpr = gl.BlockedLayout([1, ROWS], [1, 32], [4, 1], [1, 0])
    head = gl.program_id(0) % heads
    first = gl.program_id(0) // heads * ROWS
    row_M = (first + gl.arange(0, ROWS, ROW)).to(gl.int64)
    is_row_M = row_M < num_tokens
    if IS_ONE:
        most_chunks = (events + CHUNK - 1) // CHUNK
        chunks_M = gl.where(is_row_M, most_chunks, 0)
    else:
        pair_row_M = first + gl.arange(0, ROWS, gl.SliceLayout(1, PAIRS))
        request_M = pair_row_M * 0 - 1
        for low in range(0, requests, 32):
            q = low + gl.arange(0, 32, gl.SliceLayout(0, PAIRS))
            begin_q = gl.load(candidate_offsets + q, q < requests, 0x7FFFFFFF)
            request_M += gl.sum((begin_q[None, :] <= pair_row_M[:, None]).to(gl.int32), 1)
        request_M = gl.convert_layout(request_M, ROW)
        length_M = gl.load(history_offsets + request_M + 1) - gl.load(history_offsets + request_M)
        chunks_M = gl.where(is_row_M, (length_M + CHUNK - 1) // CHUNK, 0)
        most_chunks = gl.max(chunks_M, 0)
    largest, total, read = _read_own(
        query, query_stride, key_self, value_self, key_self_stride, value_self_stride, row_M, is_row_M, head,
        head // group, scale_log2, TOKENS, D, PRODUCTS, WIDE,
    )  # fmt: skip
    _wait_for_last(first)
    AT_ONCE: gl.constexpr = 1024 // D
    for chunk in range(0, most_chunks, AT_ONCE):
        parts = ()
        highest = largest
        for i in gl.static_range(AT_ONCE):
            left = _load_part(part, part_max, part_sum, row_M, chunks_M, chunk + i, num_tokens, head, heads, D)
            parts += (left,)  # type: ignore[assignment]
            highest = gl.maximum(highest, left[0])
        # Changes nothing, but ptxas then loads all of them before it folds the first.
        largest = gl.where(highest == float("inf"), highest, largest)
        for i in gl.static_range(AT_ONCE):
            largest, total, read = _fold(largest, total, read, parts[i][0], parts[i][1], parts[i][2])
    _store(out, lse, row_M, is_row_M, head, heads, largest, total, read, D, WIDE)
