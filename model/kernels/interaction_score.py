"""Scores of an interaction MLP for every item and request, its first layer folded: one pass over the items.

Legend: B requests, N items, E embedding width, S scalars (at most 16), H and G hidden units, T tasks.
"""

from dataclasses import dataclass

import torch

from model.errors import ShapeError

MAX_SCALARS = 16
MOST_HIDDEN = 65504.0
"""The largest of float16: the first layer's values are kept up to here."""
LEAST_EMBEDDING, LEAST_HIDDEN = 64, 16
"""Least widths; all are powers of two. Four 16-byte loads, and what a matrix unit takes."""
MOST_FIRST, MOST_SECOND_WEIGHTS = 512, 2**16
"""Most units of the first layer, and weights of the second: what a processor's shared memory has room for."""


@dataclass(frozen=True, slots=True)
class InteractionWeights:
    """The MLP over [user, item, user * item, scalars], all on one device."""

    first_IH: torch.Tensor
    """bf16 [3 E + S, H]: rows of the user, the item, their product, the scalars."""
    bias_H: torch.Tensor
    second_HG: torch.Tensor
    """bf16 or f16 [H, G], contiguous. The first layer's values are rounded to its dtype: f16 has three bits more."""
    second_bias_G: torch.Tensor
    out_TG: torch.Tensor
    out_bias_T: torch.Tensor
    """Biases and the last layer: f32."""
    dot_T: torch.Tensor | None = None
    """f32: what the dot product is multiplied by before it is added to each logit; None: it is not added."""


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """What the MLP reads of the items."""

    embedding_NE: torch.Tensor
    """bf16, int8 or float8_e4m3fn, the last two to be multiplied by `scale_N`; rows may be apart, columns not."""
    scalar_NS: torch.Tensor
    """bf16, as they are in all cases."""
    scale_N: torch.Tensor | None = None
    """f32, of int8 and float8 rows."""


def interaction_scores_reference(
    user_BE: torch.Tensor, items: ItemFeatures, weights: InteractionWeights
) -> torch.Tensor:
    """The formula as written, every pair's 3 E + S inputs side by side. Returns f64 [B, T, N]."""
    item_NE = items.embedding_NE.double()
    if items.scale_N is not None:
        item_NE = item_NE * items.scale_N.double()[:, None]
    user_BE = user_BE.to(weights.first_IH.dtype).double()
    shape = (len(user_BE), len(item_NE), -1)
    user_BNE = user_BE[:, None].expand(shape)
    parts = [user_BNE, item_NE.expand(shape), user_BNE * item_NE, items.scalar_NS.double().expand(shape)]
    first_BNH = torch.relu(torch.cat(parts, dim=2) @ weights.first_IH.double() + weights.bias_H.double())
    second_BNG = torch.relu(first_BNH @ weights.second_HG.double() + weights.second_bias_G.double())
    logit_BTN = (second_BNG @ weights.out_TG.double().T + weights.out_bias_T.double()).transpose(1, 2)
    if weights.dot_T is not None:
        logit_BTN = logit_BTN + weights.dot_T.double()[:, None] * (user_BE @ item_NE.T)[:, None]
    return torch.sigmoid(logit_BTN)


def why_not(embedding_dim: int, scalars: int, hidden: tuple[int, int], dtype: torch.dtype) -> str | None:
    """What keeps the kernels from computing an MLP of these widths and weights, or None."""
    if dtype != torch.bfloat16:
        return f"weights must be bfloat16, got {dtype}"
    least = zip((embedding_dim, *hidden), (LEAST_EMBEDDING, LEAST_HIDDEN, LEAST_HIDDEN), strict=True)
    if any(width < bound or width & (width - 1) for width, bound in least):
        return (
            f"embeddings of {LEAST_EMBEDDING} and hidden layers of {LEAST_HIDDEN} on must be powers of two, got "
            f"{embedding_dim} and {hidden}"
        )
    if hidden[0] > MOST_FIRST or hidden[0] * hidden[1] > MOST_SECOND_WEIGHTS:
        return (
            f"hidden layers must have at most {MOST_FIRST} units in the first and {MOST_SECOND_WEIGHTS:,} weights "
            f"between the two, got {hidden}"
        )
    if scalars > MAX_SCALARS:
        return f"scalars must be at most {MAX_SCALARS}, got {scalars}"
    return None


def check_shapes(user_BE: torch.Tensor, items: ItemFeatures, weights: InteractionWeights) -> None:
    """Raises ShapeError."""
    width, scalars = items.embedding_NE.shape[1], items.scalar_NS.shape[1]
    hidden = tuple(weights.second_HG.shape)
    wanted = (3 * width + scalars, hidden[0])
    if user_BE.shape[1] != width or tuple(weights.first_IH.shape) != wanted:
        raise ShapeError(
            f"items of {width} + {scalars} numbers want users of {width} and first weights of {list(wanted)}, got "
            f"{user_BE.shape[1]} and {list(weights.first_IH.shape)}"
        )
    reason = why_not(width, scalars, (hidden[0], hidden[1]), weights.first_IH.dtype)
    if reason is not None:
        raise ShapeError(reason)
