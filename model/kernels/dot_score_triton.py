"""Dot products of every item and request, in float32: rows of bfloat16, int8 or float8 are read once for 16 requests.

A matrix unit takes bfloat16 alone, so a user goes in as the sum of two bfloat16 vectors: 16 bits of mantissa, which
leaves the rows' own precision to decide.

Legend: B requests, N items, E embedding width.
"""

import torch
import triton
import triton.language as tl

from model.errors import ShapeError
from model.kernels.interaction_score import ItemFeatures

_IS_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
_REQUESTS: tl.constexpr = tl.constexpr(16)
ROW_DTYPES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def dot_scores_reference(user_BE: torch.Tensor, items: ItemFeatures) -> torch.Tensor:
    """The formula, f64 [B, 1, N]."""
    item_NE = items.embedding_NE.double()
    if items.scale_N is not None:
        item_NE = item_NE * items.scale_N.double()[:, None]
    return (user_BE.double() @ item_NE.T)[:, None]


def dot_scores(
    user_BE: torch.Tensor, items: ItemFeatures, score_BTN: torch.Tensor, count: torch.Tensor, rows: int = 128
) -> None:
    """Write the scores of the first `count` items. Summed in f32.

    user_BE: f32, contiguous. score_BTN: f32 [B, 1, N]. count: i32 [1] on the device. rows: of a tile.
    Raises ShapeError for rows of another dtype or width.
    """
    capacity, width = items.embedding_NE.shape
    if items.embedding_NE.dtype not in ROW_DTYPES or user_BE.shape[1] != width:
        raise ShapeError(
            f"wanted rows of bfloat16, int8 or float8 and users as wide as they, {width}, got "
            f"{items.embedding_NE.dtype} and {user_BE.shape[1]}"
        )
    _dot_kernel[(triton.cdiv(capacity, rows), triton.cdiv(len(user_BE), _REQUESTS.value))](
        user_BE, items.embedding_NE, items.embedding_NE.stride(0),
        items.scale_N if items.scale_N is not None else user_BE, score_BTN, score_BTN.stride(0), count, len(user_BE),
        E=width, STEP=min(64, max(16, triton.next_power_of_2(width))), IS_SCALED=items.scale_N is not None, ROWS=rows,
        num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit
def _dot(a, b, c):
    if _IS_INTERPRETED:  # whose dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c)


@triton.jit
def _dot_kernel(
    user_BE, embedding_NE, embedding_stride, scale_N, score_BTN, score_stride, count_at, requests,
    E: tl.constexpr, STEP: tl.constexpr, IS_SCALED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of items for up to 16 requests."""
    count = tl.load(count_at)
    first = tl.program_id(0) * ROWS
    if first < count:
        row = first + tl.arange(0, ROWS)
        at = tl.minimum(row, count - 1).to(tl.int64)
        request = tl.program_id(1) * _REQUESTS + tl.arange(0, _REQUESTS)
        is_request = request < requests
        total = tl.zeros([ROWS, _REQUESTS], tl.float32)
        for start in tl.range(0, E, STEP):
            column = start + tl.arange(0, STEP)
            is_column = column < E
            item = tl.load(embedding_NE + at[:, None] * embedding_stride + column[None, :], is_column[None, :], 0.0)
            item = item.to(tl.float32).to(tl.bfloat16)  # the interpreter takes an int8 no other way
            user = tl.load(
                user_BE + request[None, :] * E + column[:, None], is_column[:, None] & is_request[None, :], 0.0
            )
            upper = user.to(tl.bfloat16)
            total = _dot(item, upper, total)
            total = _dot(item, (user - upper.to(tl.float32)).to(tl.bfloat16), total)
        if IS_SCALED:
            total = total * tl.load(scale_N + at)[:, None]
        out = score_BTN + request[None, :].to(tl.int64) * score_stride + row[:, None]
        tl.store(out, total, (row < count)[:, None] & is_request[None, :])
