"""Interaction MLP on Hopper GPUs, in Gluon: a request's weights stay in shared memory, items stream through registers.

Folded first layer (E + 16) x H and second layer H x G, 205 KB of the 227 for 256, 256 and 128, are loaded once a
program; a program then takes tile after tile of 128 items: loaded straight into registers as the left operand of the
first product, whose result is the left operand of the second. Nothing of an item touches shared memory, so the two warp
groups never wait for one another: while one adds biases, the other has the matrix units. Programs of all requests go
over the items in the same order, so that tiles are read from device memory once.

A search (`fused.FusedSearch`) wants keys made of the scores and keys counted (`slate_triton`): here that is a few
instructions an item, and the atomics are done while the matrix units work.

Legend: as in interaction_score_triton.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.interaction_score import MAX_SCALARS, MOST_HIDDEN, InteractionWeights, ItemFeatures
from model.kernels.interaction_score_triton import Folded, vector_of
from model.kernels.slate_triton import BINS, NO_KEY, Rules, Work

WARPS = 8
ROWS = 16 * WARPS
SHARED_BYTES = 227 * 1024
_SCALARS: gl.constexpr = gl.constexpr(MAX_SCALARS)
_BINS: gl.constexpr = gl.constexpr(BINS)
_NO_KEY: gl.constexpr = gl.constexpr(NO_KEY)
_MOST: gl.constexpr = gl.constexpr(MOST_HIDDEN)
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its names up to Triton 3.6 and after


def fits(items: ItemFeatures, weights: InteractionWeights) -> bool:
    """Whether this kernel computes such an MLP here; the others are for the kernel in Triton."""
    embedding_NE, scalar_NS = items.embedding_NE, items.scalar_NS
    if not embedding_NE.is_cuda or torch.cuda.get_device_capability(embedding_NE.device)[0] != 9:
        return False
    (hidden, second), width = weights.second_HG.shape, embedding_NE.shape[1]
    words = (width + MAX_SCALARS) * hidden + hidden * second
    aligned = all(
        part.data_ptr() % 16 == 0 and part.stride(0) * part.element_size() % step == 0
        for part, step in ((embedding_NE, 16), (scalar_NS, 8))
    )
    return (
        scalar_NS.shape[1] == MAX_SCALARS and width >= 4 * vector_of(embedding_NE)
        and 64 <= hidden <= 256 and 64 <= second <= 256 and aligned
        and 2 * words + 4 * (hidden + second * (1 + len(weights.out_bias_T))) <= SHARED_BYTES
    )  # fmt: skip


def score(
    folded: Folded, items: ItemFeatures, weights: InteractionWeights, score_BTN: torch.Tensor, count: torch.Tensor,
    keys: tuple[Rules, Work] | None = None,
) -> None:  # fmt: skip
    """Write the scores of the first `count` items, where it `fits`. keys: do what `slate_triton.apply` does, too."""
    requests = len(folded.bias_BH)
    hidden, second = weights.second_HG.shape
    processors = torch.cuda.get_device_properties(score_BTN.device).multi_processor_count
    number = folded.bias_BH
    of_keys, is_chained = (number, count, number, count, count, count, 0), False
    if keys is not None:
        rules, work = keys
        of_keys = (
            rules.weight_BT, rules.head, work.factor_BN, work.stamp_BN, work.key_BN, work.count_BC,
            work.key_BN.stride(0),
        )  # fmt: skip
        is_chained = work.is_chained
    chain = {"launch_pdl": True} if is_chained else {}
    _score_kernel[(requests * max(1, processors // requests),)](
        items.embedding_NE, items.scalar_NS, items.scale_N if items.scale_N is not None else items.scalar_NS,
        folded.weight_BKH, folded.bias_BH, weights.second_HG, weights.second_bias_G, weights.out_TG,
        weights.out_bias_T, score_BTN, count, requests, score_BTN.stride(0), score_BTN.stride(1), *folded.dot(weights),
        *of_keys, STRIDE=items.embedding_NE.stride(0), SCALAR_STRIDE=items.scalar_NS.stride(0),
        E=items.embedding_NE.shape[1], H=hidden, G=second, T=len(weights.out_bias_T),
        VECTOR=vector_of(items.embedding_NE), IS_SCALED=items.scale_N is not None, HAS_DOT=weights.dot_T is not None,
        HAS_KEYS=keys is not None, CHAINED=is_chained, WARPS=WARPS, num_warps=WARPS, **chain,
    )  # fmt: skip


@gluon.constexpr_function
def _item_layout(columns, vector, warps):
    """A thread holds `vector` columns side by side of two rows 8 apart, of every 4 * vector columns."""
    registers = [[0, 2**bit] for bit in range(vector.bit_length() - 1)] + [[8, 0]]
    registers += [[0, 2**bit] for bit in range((4 * vector).bit_length() - 1, columns.bit_length() - 1)]
    lanes = [[0, vector], [0, 2 * vector], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16 * 2**bit, 0] for bit in range(warps.bit_length() - 1)], [], [16 * warps, columns]
    )


@gluon.jit
def _load_rows(at, stride, first, count, COLUMNS: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr):
    """A tile's rows, the last one again past the end."""
    LAYOUT: gl.constexpr = _item_layout(COLUMNS, VECTOR, WARPS)
    row = gl.minimum(first + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT)), gl.maximum(count - 1, 0))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    return gl.load(at + row[:, None].to(gl.int64) * stride + column[None, :])


@gluon.jit
def _as_left_operand(rows, OPERAND: gl.constexpr, VECTOR: gl.constexpr):
    """The same registers, read as a left operand with its columns permuted (`column_of`)."""
    ROWS: gl.constexpr = rows.shape[0]
    COLUMNS: gl.constexpr = rows.shape[1]
    apart = rows.reshape([ROWS, COLUMNS // (4 * VECTOR), 4, VECTOR // 2, 2])
    return gl.convert_layout(apart.permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS]), OPERAND)


@gluon.jit
def _share(at, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """A matrix of 16-bit numbers on its way to shared memory, as the matrix units read a right operand."""
    ACROSS: gl.constexpr = min(32, WIDTH // 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row = gl.arange(0, HEIGHT, gl.SliceLayout(1, LAYOUT))[:, None]
    matrix = gl.allocate_shared_memory(at.dtype.element_ty, [HEIGHT, WIDTH], SHARED)
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    async_copy.async_copy_global_to_shared(matrix, at + row * WIDTH + column)
    return matrix


@gluon.jit(do_not_specialize=["requests"])
def _score_kernel(
    embedding_NE, scalar_NS, scale_N, weight_BKH, bias_BH, second_HG, second_bias_G, out_TG, out_bias_T, score_BTN,
    count_at, requests, score_stride_b, score_stride_t, dot_T, dot_BN, dot_stride, weight_BT, head, factor_BN, stamp_BN,
    key_BN, count_BC, key_stride,
    STRIDE: gl.constexpr, SCALAR_STRIDE: gl.constexpr, E: gl.constexpr, H: gl.constexpr, G: gl.constexpr,
    T: gl.constexpr, VECTOR: gl.constexpr, IS_SCALED: gl.constexpr, HAS_DOT: gl.constexpr, HAS_KEYS: gl.constexpr,
    CHAINED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Every so manieth tile of one request. What the kernels before it in a chain write is loaded after their end."""
    ROWS: gl.constexpr = 16 * WARPS
    FIRST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, H, 16])
    SECOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, G, 16])
    FIRST_LEFT: gl.constexpr = gl.DotOperandLayout(0, FIRST, 2)
    SECOND_LEFT: gl.constexpr = gl.DotOperandLayout(0, SECOND, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    request = gl.program_id(0) % requests
    step = gl.num_programs(0) // requests
    start = gl.program_id(0) // requests
    second = _share(second_HG, H, G, WARPS)
    count = gl.load(count_at)
    item = _load_rows(embedding_NE, STRIDE, start * ROWS, count, E, VECTOR, WARPS)
    scalar = _load_rows(scalar_NS, SCALAR_STRIDE, start * ROWS, count, _SCALARS, 4, WARPS)
    second_bias = gl.allocate_shared_memory(gl.float32, [G], FLAT, gl.load(second_bias_G + gl.arange(0, G, LINE)))
    out = gl.allocate_shared_memory(gl.float32, [T, G], FLAT)
    for task in gl.static_range(T):
        out.index(task).store(gl.load(out_TG + task * G + gl.arange(0, G, LINE)))
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()

    weight = weight_BKH + request * (E + _SCALARS) * H
    first = _share(weight, E, H, WARPS)
    first_of_scalars = _share(weight + E * H, _SCALARS, H, WARPS)
    async_copy.commit_group()
    bias = gl.allocate_shared_memory(gl.float32, [H], FLAT, gl.load(bias_BH + request * H + gl.arange(0, H, LINE)))
    run = 0
    if HAS_KEYS:
        run = gl.load(head + 2)
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()

    first_zeros = gl.zeros([ROWS, H], gl.float32, FIRST)
    second_zeros = gl.zeros([ROWS, G], gl.float32, SECOND)
    for tile in range(start, (count + ROWS - 1) // ROWS, step):
        if IS_SCALED:
            at = gl.minimum(tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, FIRST)), count - 1)
            scale = gl.load(scale_N + at)
        if HAS_DOT:
            at_dot = gl.minimum(tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SECOND)), count - 1)
            product = gl.load(dot_BN + request.to(gl.int64) * dot_stride + at_dot)
        if HAS_KEYS:
            row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SECOND))
            at_key = request.to(gl.int64) * key_stride + gl.minimum(row, count - 1)
            factor = gl.load(factor_BN + at_key)
            stamp = gl.load(stamp_BN + at_key)
        left = _as_left_operand(item, FIRST_LEFT, VECTOR).to(gl.bfloat16)
        hidden = warpgroup_mma(left, first, first_zeros, use_acc=False, is_async=True)
        if IS_SCALED:
            hidden = warpgroup_mma_wait(0, deps=[hidden]) * scale[:, None]
        left = _as_left_operand(scalar, FIRST_LEFT, 4)
        hidden = warpgroup_mma(left, first_of_scalars, hidden, is_async=True)
        hidden = warpgroup_mma_wait(0, deps=[hidden])
        item = _load_rows(embedding_NE, STRIDE, (tile + step) * ROWS, count, E, VECTOR, WARPS)
        scalar = _load_rows(scalar_NS, SCALAR_STRIDE, (tile + step) * ROWS, count, _SCALARS, 4, WARPS)
        hidden = gl.maximum(hidden + bias.load(gl.SliceLayout(0, FIRST))[None, :], 0.0)
        hidden = gl.minimum(hidden, _MOST).to(second_HG.dtype.element_ty)
        last = warpgroup_mma(gl.convert_layout(hidden, SECOND_LEFT), second, second_zeros, use_acc=False, is_async=True)
        last = warpgroup_mma_wait(0, deps=[last])
        last = gl.maximum(last + second_bias.load(gl.SliceLayout(0, SECOND))[None, :], 0.0)
        row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SECOND))
        score_at = score_BTN + request.to(gl.int64) * score_stride_b
        utility = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SECOND))
        for task in gl.static_range(T):
            logit = gl.sum(last * out.index(task).load(gl.SliceLayout(0, SECOND))[None, :], 1)
            logit = logit + gl.load(out_bias_T + task)
            if HAS_DOT:
                logit = logit + gl.load(dot_T + task) * product
            score = 1.0 / (1.0 + gl.exp(-logit))
            gl.store(score_at + task * score_stride_t + row, score, row < count)
            if HAS_KEYS:
                utility = utility + score * gl.load(weight_BT + request * T + task)
        if HAS_KEYS:
            utility = utility * factor + 0.0  # the sum makes -0.0 to 0.0
            allowed = (gl.abs(utility) < float("inf")) & (stamp != run) & (row < count)
            bits = utility.to(gl.int32, bitcast=True)
            key = gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            key = gl.where(allowed, key, _NO_KEY)
            gl.store(key_BN + request.to(gl.int64) * key_stride + row, key, row < count)
            at_bin = count_BC + request.to(gl.int64) * _BINS + (key >> 16) + _BINS // 2
            gl.atomic_add(at_bin, gl.full_like(key, 1), allowed, sem="relaxed")
