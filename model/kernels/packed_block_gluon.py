"""A Transformer block between two attentions on Hopper: one warpgroup fetches by TMA, two multiply.

Each multiplying warpgroup has 64 tokens of its own, which stay in shared memory, normed, while the weights of a whole
layer stream past in blocks that both warpgroups read. They share no barrier but those of the blocks, so one norms,
takes GELU, turns or stores while the other multiplies. All three go over the same tiles: those that hold one of the
first `count` tokens, which is read before they part.

At 256 channels one kernel does all of it: the residual stream stays in registers from the output projection to the next
block's norm, and the hidden part never leaves them. At 512 channels it does not fit; there a kernel takes norm and
product, with GELU or the rotation behind it, and the library's products add to the stream in place.

Gluon has no interpreter: only a Hopper GPU runs this.

Legend: M tokens of a warpgroup, D channels, N channels of a block of 128, K channels that a block sums over.
"""

import torch
import triton
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

from model.kernels.packed_block import Head, Tail

_ROWS: gl.constexpr = gl.constexpr(64)
_WIDE: gl.constexpr = gl.constexpr(128)
_REGISTERS: gl.constexpr = gl.constexpr(240)
_LAUNCH_REGISTERS = 168
# Names that Triton 3.6 and later versions do not share.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


def between_hopper(
    event: torch.Tensor,
    attended: torch.Tensor | None,
    tail: Tail | None,
    head: Head | None,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As between, at a width of HOPPER_WIDTHS. The caller has checked the shapes."""
    angles = position, cos, sin
    if tail is None or attended is None:
        return event, None if head is None else _project(event, head, *angles, count)
    if event.shape[1] == 256:
        return _fused(event, attended, tail, head, *angles, count)
    event.addmm_(attended, tail.out_DD.t())
    fed = normed_product(event, tail.lacking_D, tail.ffn_in_FD, tail.ffn_in_bias_F, tail.epsilon, count=count)
    event.addmm_(fed, tail.ffn_out_DF.t())
    return event, None if head is None else _project(event, head, *angles, count)


def _project(
    event: torch.Tensor, head: Head, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    count: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    qkv = normed_product(
        event, head.lacking_D, head.qkv_ND, head.qkv_bias_N, head.epsilon, turn_by=(position, cos, sin), count=count
    )
    return qkv.view(len(event), 3, head.num_heads, 2 * cos.shape[1])


def normed_product(
    event: torch.Tensor,
    lacking: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    turn_by: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer norm (without weight and bias) of event + lacking, times weight^T, plus bias: [T, N].

    Of what comes out GELU is taken, or, given positions with cos and sin, its first two thirds are turned.
    event: bf16 or f16 [T, D], D of 256 or 512.  lacking: f32 [D].  weight: [N, D], N a multiple of 128.  count: as in
    between.
    """
    (tokens, width), columns = event.shape, len(weight)
    out = event.new_empty(tokens, columns)
    position, cos, sin = (event, lacking, lacking) if turn_by is None else turn_by
    summed = 128 if width == 256 else 64
    if tokens:
        _normed_product_kernel[(_programs(event),)](
            _descriptor(event, 64, summed), _descriptor(weight, 128, summed), _descriptor(out, 64, 128),
            lacking, bias, position, cos, sin, count, tokens, epsilon,
            D=width, COLUMNS=columns, HALF=cos.shape[-1], STAGES=4,
            IS_TURNED=turn_by is not None, num_warps=4, maxnreg=_LAUNCH_REGISTERS,
        )  # fmt: skip
    return out


def _fused(
    event: torch.Tensor, attended: torch.Tensor, tail: Tail, head: Head | None, position: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    tokens, width = event.shape
    qkv = None if head is None else event.new_empty(tokens, 3 * width)
    # What there is no head for is not read: anything of the right kind stands for it.
    qkv_weight, qkv_bias, head_lacking, head_epsilon = (
        (tail.out_DD, tail.lacking_D, tail.lacking_D, 0.0)
        if head is None
        else (head.qkv_ND, head.qkv_bias_N, head.lacking_D, head.epsilon)
    )
    if tokens:
        rows = _descriptor(event, 64, 128)
        _between_kernel[(_programs(event),)](
            event, rows, _descriptor(attended, 64, 128), rows if qkv is None else _descriptor(qkv, 64, 128),
            *(_descriptor(x, 128, 128) for x in (tail.out_DD, tail.ffn_in_FD, tail.ffn_out_DF, qkv_weight)),
            tail.lacking_D, tail.ffn_in_bias_F, head_lacking, qkv_bias, position, cos, sin, count, tokens,
            tail.epsilon, head_epsilon, HIDDEN=len(tail.ffn_in_FD), HALF=cos.shape[1], STAGES=4,
            HAS_HEAD=head is not None, num_warps=4, maxnreg=_LAUNCH_REGISTERS,
        )  # fmt: skip
    return event, None if head is None or qkv is None else qkv.view(tokens, 3, head.num_heads, 2 * cos.shape[1])


def _programs(event: torch.Tensor) -> int:
    processors = torch.cuda.get_device_properties(event.device).multi_processor_count
    return int(min(processors, triton.cdiv(len(event), 128)))


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


@gluon.jit
def _gelu(x):
    """Hendrycks and Gimpel 2016, by the hyperbolic tangent."""
    angle = x * gl.fma(x * x, 0.0356774081, 0.7978845608)
    tangent = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [angle], dtype=gl.float32, is_pure=True, pack=1
    )
    half = 0.5 * x
    return gl.fma(half, tangent, half)


@gluon.jit
def _pairs(x_MN):
    """First and second of neighbouring channels, [M, 64] each."""
    return gl.split(x_MN.reshape([_ROWS, _WIDE // 2, 2]))


@gluon.jit
def _turn(x_MN, cos_MC, sin_MC):
    """Neighbouring channels by their angles."""
    first, second = _pairs(x_MN)
    first = gl.convert_layout(first, cos_MC.type.layout, assert_trivial=True)
    second = gl.convert_layout(second, cos_MC.type.layout, assert_trivial=True)
    turned = gl.join(first * cos_MC - second * sin_MC, first * sin_MC + second * cos_MC)
    return gl.convert_layout(turned.reshape([_ROWS, _WIDE]), x_MN.type.layout, assert_trivial=True)


@gluon.jit
def _angles(position, cos, sin, row_M, tokens, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """cos and sin of 64 pairs of channels, [M, 64]: heads divide them, so all blocks have the same."""
    place_M = gl.load(position + row_M, row_M < tokens, 0).to(gl.int32)
    pair_C = gl.arange(0, _WIDE // 2, gl.SliceLayout(0, LAYOUT)) % HALF
    at_MC = place_M[:, None] * HALF + pair_C[None, :]
    return gl.load(cos + at_MC), gl.load(sin + at_MC)


@gluon.jit
def _phase(tile):
    """Of the rows' barriers: a program's tiles take turns."""
    return tile // gl.num_programs(0) & 1


@gluon.jit
def _put(desc, row, column, blocks, full, free, turn):
    """Fetch a block of weights, as soon as its place is free; the next turn."""
    STAGES: gl.constexpr = blocks.type.shape[0]
    stage = turn % STAGES
    mbarrier.wait(free.index(stage), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    _tma_load(desc, [row, column], full.index(stage), blocks.index(stage))
    return turn + 1


@gluon.jit
def _multiply(rows, first, blocks, full, free, turn, sum_MN, COUNT: gl.constexpr):
    """sum_MN + rows[first + k] times the next block, for k up to COUNT; the next turn."""
    STAGES: gl.constexpr = blocks.type.shape[0]
    for k in gl.static_range(COUNT):
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
        sum_MN = warpgroup_mma(
            rows.index(first + k), blocks.index(turn % STAGES).permute((1, 0)), sum_MN, is_async=True
        )
        if k > 0:
            sum_MN = warpgroup_mma_wait(1, deps=[sum_MN])
            mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
        turn += 1
    sum_MN = warpgroup_mma_wait(0, deps=[sum_MN])
    mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
    return sum_MN, turn


@gluon.jit
def _broadcast(vector, start, LAYOUT: gl.constexpr):
    """128 values of a vector as every row, f32 [M, N]."""
    value_N = gl.load(vector + start + gl.arange(0, _WIDE, gl.SliceLayout(0, LAYOUT)))
    return value_N[None, :].broadcast_to(_ROWS, _WIDE)


@gluon.jit
def _send(x_MN, place, desc, row, column):
    """Rows to device memory, by way of a place in shared memory that no product reads."""
    tma.store_wait(0)
    _barrier()
    place.store(x_MN.to(desc.dtype))
    fence_async_shared()
    _barrier()
    _tma_store(desc, [row, column], place)


@gluon.jit
def _store_normed(one, two, lacking, epsilon, places, first, LAYOUT: gl.constexpr):
    """The layer norm of two halves of the channels, to where the products read it.

    What lacks is read twice: with the sums kept as well, registers would not do.
    """
    first_MN = one + _broadcast(lacking, 0, LAYOUT)
    total_M, square_M = gl.sum(first_MN, 1), gl.sum(first_MN * first_MN, 1)
    second_MN = two + _broadcast(lacking, _WIDE, LAYOUT)
    mean_M = (total_M + gl.sum(second_MN, 1)) / (2 * _WIDE)
    square_M = (square_M + gl.sum(second_MN * second_MN, 1)) / (2 * _WIDE)
    scale_M = gl.rsqrt(square_M - mean_M * mean_M + epsilon)
    tma.store_wait(0)
    _barrier()
    _store_scaled(one, _broadcast(lacking, 0, LAYOUT), mean_M, scale_M, places.index(first))
    _store_scaled(two, _broadcast(lacking, _WIDE, LAYOUT), mean_M, scale_M, places.index(first + 1))
    fence_async_shared()
    _barrier()


@gluon.jit
def _store_scaled(x_MN, lacking_MN, mean_M, scale_M, place):
    place.store(((x_MN + lacking_MN - mean_M[:, None]) * scale_M[:, None]).to(place.dtype))


@gluon.jit
def _norm_in_place(rows, first, lacking, epsilon, D: gl.constexpr):
    """The layer norm of 64 rows in shared memory, in place."""
    K: gl.constexpr = rows.type.shape[2]
    dtype: gl.constexpr = rows.dtype
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    channel_K = gl.arange(0, K, gl.SliceLayout(0, LAYOUT))
    total_MK = gl.zeros([_ROWS, K], gl.float32, LAYOUT)
    square_MK = gl.zeros([_ROWS, K], gl.float32, LAYOUT)
    for k in gl.static_range(D // K):
        x_MK = rows.index(first + k).load(LAYOUT).to(gl.float32) + gl.load(lacking + k * K + channel_K)[None, :]
        total_MK += x_MK
        square_MK = gl.fma(x_MK, x_MK, square_MK)
    mean_M = gl.sum(total_MK, 1) / D
    scale_M = gl.rsqrt(gl.sum(square_MK, 1) / D - mean_M * mean_M + epsilon)
    for k in gl.static_range(D // K):
        x_MK = rows.index(first + k).load(LAYOUT).to(gl.float32) + gl.load(lacking + k * K + channel_K)[None, :]
        rows.index(first + k).store(((x_MK - mean_M[:, None]) * scale_M[:, None]).to(dtype))
    fence_async_shared()
    _barrier()


@gluon.jit
def _fetch_rows(desc, w: gl.constexpr, row, rows, full, COUNT: gl.constexpr):
    """A warpgroup's 64 rows in COUNT blocks; the caller has told the barrier how many bytes come."""
    for k in gl.static_range(COUNT):
        _tma_load(desc, [row + w * _ROWS, k * desc.block_type.shape[1]], full.index(w), rows.index(w * COUNT + k))


@gluon.jit
def _product_producer(event_desc, weight_desc, buffers, barriers, tokens, D: gl.constexpr, COLUMNS: gl.constexpr):
    rows, blocks, _ = buffers
    row_full, row_free, full, free = barriers
    K: gl.constexpr = blocks.type.shape[2]
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, 2 * _ROWS), gl.num_programs(0)):
        for w in gl.static_range(2):
            mbarrier.wait(row_free.index(w), _phase(tile) ^ 1)
            mbarrier.expect(row_full.index(w), D // K * event_desc.block_type.nbytes)
            _fetch_rows(event_desc, w, tile * 2 * _ROWS, rows, row_full, D // K)
        for start in range(0, COLUMNS, _WIDE):
            for k in range(0, D, K):
                turn = _put(weight_desc, start, k, blocks, full, free, turn)


@gluon.jit
def _product_consumer(
    out_desc, lacking, bias, position, cos, sin, buffers, barriers, tokens, epsilon,
    w: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, HALF: gl.constexpr, IS_TURNED: gl.constexpr,
):  # fmt: skip
    rows, blocks, places = buffers
    row_full, row_free, full, free = barriers
    COUNT: gl.constexpr = D // blocks.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDE, 16])
    PAIRS: gl.constexpr = _pairs(gl.zeros([_ROWS, _WIDE], gl.float32, LAYOUT))[0].type.layout
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, 2 * _ROWS), gl.num_programs(0)):
        row = tile * 2 * _ROWS + w * _ROWS
        mbarrier.wait(row_full.index(w), _phase(tile))
        _norm_in_place(rows, w * COUNT, lacking, epsilon, D)
        if IS_TURNED:
            row_M = row + gl.arange(0, _ROWS, gl.SliceLayout(1, PAIRS))
            cos_MC, sin_MC = _angles(position, cos, sin, row_M, tokens, HALF, PAIRS)
            for start in range(0, COLUMNS // 3 * 2, _WIDE):
                read_MN = _broadcast(bias, start, LAYOUT)
                read_MN, turn = _multiply(rows, w * COUNT, blocks, full, free, turn, read_MN, COUNT)
                _send(_turn(read_MN, cos_MC, sin_MC), places.index(w), out_desc, row, start)
        for start in range(COLUMNS // 3 * 2 if IS_TURNED else 0, COLUMNS, _WIDE):
            read_MN = _broadcast(bias, start, LAYOUT)
            read_MN, turn = _multiply(rows, w * COUNT, blocks, full, free, turn, read_MN, COUNT)
            _send(read_MN if IS_TURNED else _gelu(read_MN), places.index(w), out_desc, row, start)
        mbarrier.arrive(row_free.index(w), count=1)
    tma.store_wait(0)


@gluon.jit
def _make_barriers(STAGES: gl.constexpr):
    """Of each warpgroup's rows and of the weights' blocks: full and free."""
    row_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    row_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(row_full.index(w), count=1)
        mbarrier.init(row_free.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return row_full, row_free, full, free


@gluon.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["count"])
def _normed_product_kernel(
    event_desc, weight_desc, out_desc, lacking, bias, position, cos, sin, count, tokens, epsilon,
    D: gl.constexpr, COLUMNS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, IS_TURNED: gl.constexpr,
):  # fmt: skip
    if count is not None:
        tokens = gl.minimum(tokens, gl.load(count))
    dtype: gl.constexpr = event_desc.dtype
    K: gl.constexpr = weight_desc.block_type.shape[1]
    buffers = (
        gl.allocate_shared_memory(dtype, [2 * D // K, _ROWS, K], event_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, _WIDE, K], weight_desc.layout),
        gl.allocate_shared_memory(dtype, [2, _ROWS, _WIDE], out_desc.layout),
    )
    barriers = _make_barriers(STAGES)
    gl.warp_specialize(
        [
            (_product_producer, (event_desc, weight_desc, buffers, barriers, tokens, D, COLUMNS)),
            (
                _product_consumer,
                (
                    out_desc, lacking, bias, position, cos, sin, buffers, barriers, tokens, epsilon, 0, D, COLUMNS,
                    HALF, IS_TURNED,
                ),
            ),
            (
                _product_consumer,
                (
                    out_desc, lacking, bias, position, cos, sin, buffers, barriers, tokens, epsilon, 1, D, COLUMNS,
                    HALF, IS_TURNED,
                ),
            ),
        ],
        [4, 4],
        [_REGISTERS, _REGISTERS],
    )  # fmt: skip


@gluon.jit
def _between_producer(
    attended_desc, out_weight, in_weight, up_weight, qkv_weight, buffers, barriers, tokens,
    HIDDEN: gl.constexpr, HAS_HEAD: gl.constexpr,
):  # fmt: skip
    rows, blocks, _ = buffers
    row_full, row_free, full, free = barriers
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, 2 * _ROWS), gl.num_programs(0)):
        turn = _put(out_weight, 0, 0, blocks, full, free, turn)
        turn = _put(out_weight, 0, _WIDE, blocks, full, free, turn)
        for w in gl.static_range(2):
            mbarrier.wait(row_free.index(w), _phase(tile) ^ 1)
            mbarrier.expect(row_full.index(w), 2 * attended_desc.block_type.nbytes)
            _fetch_rows(attended_desc, w, tile * 2 * _ROWS, rows, row_full, 2)
        turn = _put(out_weight, _WIDE, 0, blocks, full, free, turn)
        turn = _put(out_weight, _WIDE, _WIDE, blocks, full, free, turn)
        for start in range(0, HIDDEN, _WIDE):
            turn = _put(in_weight, start, 0, blocks, full, free, turn)
            turn = _put(in_weight, start, _WIDE, blocks, full, free, turn)
            turn = _put(up_weight, 0, start, blocks, full, free, turn)
            turn = _put(up_weight, _WIDE, start, blocks, full, free, turn)
        if HAS_HEAD:
            for start in range(0, 6 * _WIDE, _WIDE):
                turn = _put(qkv_weight, start, 0, blocks, full, free, turn)
                turn = _put(qkv_weight, start, _WIDE, blocks, full, free, turn)


@gluon.jit
def _between_consumer(
    event, event_desc, qkv_desc, tail_lacking, in_bias, head_lacking, qkv_bias, position, cos, sin, buffers, barriers,
    tokens, tail_epsilon, head_epsilon,
    w: gl.constexpr, HIDDEN: gl.constexpr, HALF: gl.constexpr, HAS_HEAD: gl.constexpr,
):  # fmt: skip
    rows, blocks, places = buffers
    row_full, row_free, full, free = barriers
    dtype: gl.constexpr = rows.dtype
    STAGES: gl.constexpr = blocks.type.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDE, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    PAIRS: gl.constexpr = _pairs(gl.zeros([_ROWS, _WIDE], gl.float32, LAYOUT))[0].type.layout
    turn = 0
    for tile in range(gl.program_id(0), gl.cdiv(tokens, 2 * _ROWS), gl.num_programs(0)):
        row = tile * 2 * _ROWS + w * _ROWS
        # The residual stream, and what attention gave through the output projection.
        row_M = row + gl.arange(0, _ROWS, gl.SliceLayout(1, LAYOUT))
        channel_N = gl.arange(0, _WIDE, gl.SliceLayout(0, LAYOUT))
        at_MN = event + row_M.to(gl.int64)[:, None] * (2 * _WIDE) + channel_N[None, :]
        one = gl.load(at_MN, (row_M < tokens)[:, None], 0.0)
        two = gl.load(at_MN + _WIDE, (row_M < tokens)[:, None], 0.0)
        one = one.to(gl.float32)
        two = two.to(gl.float32)
        mbarrier.wait(row_full.index(w), _phase(tile))
        one, turn = _multiply(rows, 2 * w, blocks, full, free, turn, one, 2)
        two, turn = _multiply(rows, 2 * w, blocks, full, free, turn, two, 2)
        _store_normed(one, two, tail_lacking, tail_epsilon, rows, 2 * w, LAYOUT)
        for start in range(0, HIDDEN, _WIDE):
            fed_MN = _broadcast(in_bias, start, LAYOUT)
            fed_MN, turn = _multiply(rows, 2 * w, blocks, full, free, turn, fed_MN, 2)
            operand = gl.convert_layout(_gelu(fed_MN).to(dtype), LEFT)
            mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
            one = warpgroup_mma(operand, blocks.index(turn % STAGES).permute((1, 0)), one, is_async=True)
            turn += 1
            mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
            two = warpgroup_mma(operand, blocks.index(turn % STAGES).permute((1, 0)), two, is_async=True)
            one = warpgroup_mma_wait(1, deps=[one])
            mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
            two = warpgroup_mma_wait(0, deps=[two])
            mbarrier.arrive(free.index(turn % STAGES), count=1)
            turn += 1
        _barrier()
        rows.index(2 * w).store(one.to(dtype))
        rows.index(2 * w + 1).store(two.to(dtype))
        fence_async_shared()
        _barrier()
        _tma_store(event_desc, [row, 0], rows.index(2 * w))
        _tma_store(event_desc, [row, _WIDE], rows.index(2 * w + 1))
        if HAS_HEAD:
            _store_normed(one, two, head_lacking, head_epsilon, rows, 2 * w, LAYOUT)
            pair_row_M = row + gl.arange(0, _ROWS, gl.SliceLayout(1, PAIRS))
            cos_MC, sin_MC = _angles(position, cos, sin, pair_row_M, tokens, HALF, PAIRS)
            for start in range(0, 4 * _WIDE, _WIDE):  # queries and keys
                read_MN = _broadcast(qkv_bias, start, LAYOUT)
                read_MN, turn = _multiply(rows, 2 * w, blocks, full, free, turn, read_MN, 2)
                _send(_turn(read_MN, cos_MC, sin_MC), places.index(w), qkv_desc, row, start)
            for start in range(4 * _WIDE, 6 * _WIDE, _WIDE):
                read_MN = _broadcast(qkv_bias, start, LAYOUT)
                read_MN, turn = _multiply(rows, 2 * w, blocks, full, free, turn, read_MN, 2)
                _send(read_MN, places.index(w), qkv_desc, row, start)
        else:
            tma.store_wait(0)
            _barrier()
        mbarrier.arrive(row_free.index(w), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["count"])
def _between_kernel(
    event, event_desc, attended_desc, qkv_desc, out_weight, in_weight, up_weight, qkv_weight, tail_lacking, in_bias,
    head_lacking, qkv_bias, position, cos, sin, count, tokens, tail_epsilon, head_epsilon,
    HIDDEN: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, HAS_HEAD: gl.constexpr,
):  # fmt: skip
    """Of 256 channels. A tile's events are read before they are written: in place."""
    if count is not None:
        tokens = gl.minimum(tokens, gl.load(count))
    dtype: gl.constexpr = event_desc.dtype
    buffers = (
        gl.allocate_shared_memory(dtype, [4, _ROWS, _WIDE], attended_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, _WIDE, _WIDE], out_weight.layout),
        gl.allocate_shared_memory(dtype, [2, _ROWS, _WIDE], qkv_desc.layout),
    )
    barriers = _make_barriers(STAGES)
    gl.warp_specialize(
        [
            (
                _between_producer,
                (
                    attended_desc, out_weight, in_weight, up_weight, qkv_weight, buffers, barriers, tokens, HIDDEN,
                    HAS_HEAD,
                ),
            ),
            (
                _between_consumer,
                (
                    event, event_desc, qkv_desc, tail_lacking, in_bias, head_lacking, qkv_bias, position, cos, sin,
                    buffers, barriers, tokens, tail_epsilon, head_epsilon, 0, HIDDEN, HALF, HAS_HEAD,
                ),
            ),
            (
                _between_consumer,
                (
                    event, event_desc, qkv_desc, tail_lacking, in_bias, head_lacking, qkv_bias, position, cos, sin,
                    buffers, barriers, tokens, tail_epsilon, head_epsilon, 1, HIDDEN, HALF, HAS_HEAD,
                ),
            ),
        ],
        [4, 4],
        [_REGISTERS, _REGISTERS],
    )  # fmt: skip
