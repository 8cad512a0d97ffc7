"""Interaction MLP on the GPU: weights of each request are folded, then one kernel goes over the items.

Folding (`retrieval.scorer.InteractionScorer`): [i, s] [W_i + diag(u) W_p; W_s] + u W_u, in f32, rounded to bf16 once.
The rows of the folded weights lie in the order in which a thread of the scoring kernel holds an item's columns
(`column_of`), so the matrix product takes items from registers as 16-byte loads bring them, and nothing is shuffled.

Two scoring kernels. Here, in Triton, for any GPU and the interpreter: an item tile and a request a program. In
interaction_score_hopper, for compute capability 9: a request's weights stay in shared memory, items stream by.

Legend: as in interaction_score; K rows of the folded weights: E, then 16 for the scalars.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.dot_score_triton import dot_scores
from model.kernels.interaction_score import MAX_SCALARS, MOST_HIDDEN, InteractionWeights, ItemFeatures, check_shapes

_IS_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
_SCALARS: tl.constexpr = tl.constexpr(MAX_SCALARS)
_MOST: tl.constexpr = tl.constexpr(MOST_HIDDEN)
_SCALAR_VECTOR: tl.constexpr = tl.constexpr(4)
FOLDED_ROWS = 64
"""Rows of the folded weights that a program writes; a divisor of all widths."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Folded weights of a batch; the memory is the caller's, so that a CUDA graph may write it again and again."""

    weight_BKH: torch.Tensor
    """bf16 [B, E + 16, H]."""
    bias_BH: torch.Tensor
    """f32."""
    dot_B1N: torch.Tensor | None
    """f32: dot products, where the weights want them (`dot_score_triton`)."""

    @classmethod
    def empty(cls, requests: int, weights: InteractionWeights, embedding_dim: int, items: int) -> "Folded":
        """Room for a batch."""
        hidden, device = len(weights.bias_H), weights.bias_H.device
        return cls(
            torch.empty(requests, embedding_dim + MAX_SCALARS, hidden, dtype=torch.bfloat16, device=device),
            torch.empty(requests, hidden, device=device),
            None if weights.dot_T is None else torch.empty(requests, 1, items, device=device),
        )

    def dot(self, weights: InteractionWeights) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Factors, dot products and their stride, for the scoring kernels; any memory where there is none."""
        if self.dot_B1N is None or weights.dot_T is None:
            return weights.out_bias_T, weights.out_bias_T, 0
        return weights.dot_T, self.dot_B1N, self.dot_B1N.stride(0)


def vector_of(embedding_NE: torch.Tensor) -> int:
    """Columns of one 16-byte load."""
    return 16 // embedding_NE.element_size()


def interaction_scores_kernel(
    user_BE: torch.Tensor, items: ItemFeatures, weights: InteractionWeights, *, score_BTN: torch.Tensor | None = None,
    folded: Folded | None = None, count: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """score_BTN, f32 in (0, 1), as the reference gives, of users rounded to bf16; in the dot product to 16 bits.

    score_BTN, folded: memory to write to; by default new. count: i32 [1] on the device: only so many items are scored.
    Raises ShapeError.
    """
    check_shapes(user_BE, items, weights)
    requests, rows, tasks = len(user_BE), len(items.embedding_NE), len(weights.out_bias_T)
    folded = folded or Folded.empty(requests, weights, user_BE.shape[1], rows)
    if score_BTN is None:
        score_BTN = torch.empty(requests, tasks, rows, device=user_BE.device)
    if count is None:
        count = torch.full((1,), rows, dtype=torch.int32, device=user_BE.device)
    with torch.cuda.device_of(user_BE):
        fold(user_BE, weights, folded, vector_of(items.embedding_NE))
        if folded.dot_B1N is not None:
            dot_scores(user_BE, items, folded.dot_B1N, count)
        score(folded, items, weights, score_BTN, count)
    return score_BTN


def fold(
    user_BE: torch.Tensor, weights: InteractionWeights, folded: Folded, vector: int, *, is_chained: bool = False
) -> None:
    """Write the folded weights of each request. user_BE: f32, contiguous.

    is_chained: as in slate_triton; it reads nothing of the kernel before it, and ends after it.
    """
    requests, width = user_BE.shape
    hidden = len(weights.bias_H)
    block = min(16, hidden)
    chain = {"launch_pdl": True} if is_chained else {}
    _fold_kernel[(hidden // block, width // FOLDED_ROWS + 1, requests)](
        user_BE, weights.first_IH, weights.bias_H, folded.weight_BKH, folded.bias_BH,
        scalars=len(weights.first_IH) - 3 * width, E=width, H=hidden, BLOCK=block, ROWS=FOLDED_ROWS, VECTOR=vector,
        CHAINED=is_chained, num_warps=4, **chain,
    )  # fmt: skip


def score(
    folded: Folded, items: ItemFeatures, weights: InteractionWeights, score_BTN: torch.Tensor, count: torch.Tensor,
    rows: int = 64,
) -> None:  # fmt: skip
    """Write the scores of the first `count` items. rows: of a tile."""
    capacity, width = items.embedding_NE.shape
    is_hopper = items.embedding_NE.is_cuda and torch.cuda.get_device_capability(items.embedding_NE.device)[0] == 9
    # With more, Triton 3.6 converts a step's codes into registers that the step before's products still read. Rows of
    # bfloat16 go from shared memory to the products: nothing is written over.
    stages = 1 if is_hopper and items.embedding_NE.dtype != torch.bfloat16 else 2
    hidden, second = weights.second_HG.shape
    _score_kernel[(triton.cdiv(capacity, rows), len(folded.bias_BH))](
        items.embedding_NE, items.embedding_NE.stride(0), items.scalar_NS, items.scalar_NS.stride(0),
        items.scale_N if items.scale_N is not None else items.scalar_NS, folded.weight_BKH, folded.bias_BH,
        weights.second_HG, weights.second_bias_G, weights.out_TG, weights.out_bias_T, score_BTN, score_BTN.stride(0),
        score_BTN.stride(1), count, *folded.dot(weights), scalars=items.scalar_NS.shape[1], E=width, H=hidden, G=second,
        T=len(weights.out_bias_T), VECTOR=vector_of(items.embedding_NE), IS_SCALED=items.scale_N is not None,
        HAS_DOT=weights.dot_T is not None, ROWS=rows, num_warps=8, num_stages=stages,
    )  # fmt: skip


@triton.jit
def column_of(place, VECTOR: tl.constexpr):
    """The item column whose weights stand in this row of the folded weights.

    A matrix unit's left operand has, of every 16 columns, 2 l, 2 l + 1, 2 l + 8 and 2 l + 9 in lane l of four. A load
    brings lane l columns l VECTOR to (l + 1) VECTOR - 1 of 4 VECTOR. Taking the one for the other permutes columns.
    """
    pair = place % 2
    lane = place // 2 % 4
    step = place // 8 % (VECTOR // 2)
    return place // (4 * VECTOR) * (4 * VECTOR) + lane * VECTOR + step * 2 + pair


@triton.jit
def _fold_kernel(
    user_BE, first_IH, bias_H, weight_BKH, bias_BH, scalars,
    E: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One request, BLOCK hidden units: ROWS rows of their weights, or their biases and the rows of scalars."""
    if CHAINED:
        gdc_launch_dependents()
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    request = tl.program_id(2)
    out = weight_BKH + request * (E + _SCALARS) * H
    if tl.program_id(1) * ROWS < E:
        place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = column_of(place, VECTOR)
        user = tl.load(user_BE + request * E + column).to(tl.bfloat16).to(tl.float32)[:, None]
        at = first_IH + (E + column[:, None]) * H + unit[None, :]
        of_item = tl.load(at).to(tl.float32)
        of_product = tl.load(at + E * H).to(tl.float32)
        tl.store(out + place[:, None] * H + unit[None, :], (of_item + user * of_product).to(tl.bfloat16))
    else:
        all_columns = tl.arange(0, E)
        whole_user = tl.load(user_BE + request * E + all_columns).to(tl.bfloat16).to(tl.float32)[:, None]
        of_user = tl.load(first_IH + all_columns[:, None] * H + unit[None, :]).to(tl.float32)
        tl.store(bias_BH + request * H + unit, tl.sum(whole_user * of_user, 0) + tl.load(bias_H + unit))
        last_place = tl.arange(0, _SCALARS)
        last_column = column_of(last_place, _SCALAR_VECTOR)[:, None]
        of_scalar = tl.load(first_IH + (3 * E + last_column) * H + unit[None, :], last_column < scalars, 0.0)
        tl.store(out + (E + last_place[:, None]) * H + unit[None, :], of_scalar)
    if CHAINED:
        gdc_wait()


@triton.jit
def _dot(a, b, c):
    if _IS_INTERPRETED:  # whose dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c)


@triton.jit
def _score_kernel(
    embedding_NE, embedding_stride, scalar_NS, scalar_stride, scale_N, weight_BKH, bias_BH, second_HG, second_bias_G,
    out_TG, out_bias_T, score_BTN, score_stride_b, score_stride_t, count_at, dot_T, dot_BN, dot_stride, scalars,
    E: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, IS_SCALED: tl.constexpr,
    HAS_DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of items for one request."""
    count = tl.load(count_at)
    request = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < count:
        at = tl.minimum(row, count - 1).to(tl.int64)
        unit = tl.arange(0, H)
        weight = weight_BKH + request * (E + _SCALARS) * H
        last_place = tl.arange(0, _SCALARS)
        column = column_of(last_place, _SCALAR_VECTOR)[None, :]
        scalar = tl.load(scalar_NS + at[:, None] * scalar_stride + column, column < scalars, 0.0)
        weight_of_scalar = tl.load(weight + (E + last_place[:, None]) * H + unit[None, :])
        hidden = tl.zeros([ROWS, H], tl.float32)
        STEP: tl.constexpr = min(E, 64)
        for start in tl.range(0, E, STEP):
            place = start + tl.arange(0, STEP)
            item = tl.load(embedding_NE + at[:, None] * embedding_stride + column_of(place, VECTOR)[None, :])
            item = item.to(tl.float32).to(tl.bfloat16)  # the interpreter takes an int8 no other way
            hidden = _dot(item, tl.load(weight + place[:, None] * H + unit[None, :]), hidden)
        if IS_SCALED:
            hidden = hidden * tl.load(scale_N + at)[:, None]
        hidden = _dot(scalar, weight_of_scalar, hidden)
        hidden = tl.maximum(hidden + tl.load(bias_BH + request * H + unit)[None, :], 0.0)
        hidden = tl.minimum(hidden, _MOST).to(second_HG.dtype.element_ty)
        second = tl.arange(0, G)
        weight_of_second = tl.load(second_HG + unit[:, None] * G + second[None, :])
        last = _dot(hidden, weight_of_second, tl.zeros([ROWS, G], tl.float32))
        last = tl.maximum(last + tl.load(second_bias_G + second)[None, :], 0.0)
        for task in tl.static_range(T):
            logit = tl.sum(last * tl.load(out_TG + task * G + second)[None, :], 1) + tl.load(out_bias_T + task)
            if HAS_DOT:
                logit += tl.load(dot_T + task) * tl.load(dot_BN + request * dot_stride + at)
            out = score_BTN + request * score_stride_b + task * score_stride_t
            tl.store(out + row, 1.0 / (1.0 + tl.exp(-logit)), row < count)
