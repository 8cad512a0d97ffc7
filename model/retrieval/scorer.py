"""Scores of every item for every request.

Both scorers take the index's features as they lie in memory: feature_NF, the embedding's E columns, then the scalars.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from model.errors import ShapeError

MAX_HIDDEN_BYTES = {"cpu": 2**26, "cuda": 2**32}
"""First-layer values computed at a time: what stays in a cache, or leaves room on a GPU."""


class Scorer(Protocol):
    """What the graph asks of a scorer."""

    def __call__(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """score_BTN, float32."""
        ...


class DotScorer(nn.Module):
    """One task: the dot product of user and item embedding."""

    def forward(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """user_BE: float [B, E]. feature_NF: float [N, F], F at least E. Returns f32 [B, 1, N], or f64 for f64."""
        width = user_BE.shape[1]
        if feature_NF.shape[1] < width:
            raise ShapeError(f"users must be at most {feature_NF.shape[1]} wide, got {width}")
        score_BN = user_BE.to(feature_NF.dtype) @ feature_NF[:, :width].T
        return _at_least_float(score_BN)[:, None]


class InteractionScorer(nn.Module):
    """Task probabilities by an MLP over [user, item, user * item, scalars].

    The first layer is folded (`forward`): with W_u, W_i, W_p and W_s its rows of the four parts,

        u W_u + i W_i + (u * i) W_p + s W_s = [i, s] [W_i + diag(u) W_p; W_s] + u W_u

    so a layer over 3 E + S inputs a pair becomes one over E + S, with weights made once a request. It is the same
    function (`unfolded` is the formula as written).
    """

    def __init__(self, embedding_dim: int, scalars: int, hidden: tuple[int, int] = (256, 128), tasks: int = 1) -> None:
        super().__init__()
        self.embedding_dim, self.scalars = embedding_dim, scalars
        first, second = hidden
        inputs = 3 * embedding_dim + scalars
        self.weight_IH = nn.Parameter(torch.randn(inputs, first) / math.sqrt(inputs))
        self.bias_H = nn.Parameter(torch.zeros(first))
        self.second = nn.Linear(first, second)
        self.out = nn.Linear(second, tasks)

    def forward(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """user_BE: float [B, E]. feature_NF: float [N, E + S]. Returns f32 [B, T, N] in (0, 1), or f64 for f64.

        Computes in the parameters' dtype, the last layer at least in float32 (rounded logits tie). Raises ShapeError.
        """
        self._check(user_BE, feature_NF)
        user_BE, feature_NF = user_BE.to(self.weight_IH.dtype), feature_NF.to(self.weight_IH.dtype)
        weight_BFH, bias_BH = self.folded(user_BE)
        hidden_bytes = len(user_BE) * len(self.bias_H) * feature_NF.element_size()
        chunk = max(1, MAX_HIDDEN_BYTES[feature_NF.device.type] // hidden_bytes)
        scores = [self._rest(part @ weight_BFH + bias_BH[:, None]) for part in torch.split(feature_NF, chunk)]
        return torch.cat(scores, dim=2) if len(scores) != 1 else scores[0]

    def folded(self, user_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layer of each request: weight_BFH over [item, scalars], and bias_BH."""
        width = self.embedding_dim
        user_EH, item_EH = self.weight_IH[:width], self.weight_IH[width : 2 * width]
        product_EH, scalar_SH = self.weight_IH[2 * width : 3 * width], self.weight_IH[3 * width :]
        item_BEH = item_EH + user_BE[:, :, None] * product_EH
        weight_BFH = torch.cat([item_BEH, scalar_SH.expand(len(user_BE), -1, -1)], dim=1)
        return weight_BFH, user_BE @ user_EH + self.bias_H

    def unfolded(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """The formula as written: every pair's 3 E + S inputs side by side. Shapes as in `forward`."""
        self._check(user_BE, feature_NF)
        user_BE, feature_NF = user_BE.to(self.weight_IH.dtype), feature_NF.to(self.weight_IH.dtype)
        item_NE, scalar_NS = feature_NF[:, : self.embedding_dim], feature_NF[:, self.embedding_dim :]
        shape = (len(user_BE), len(feature_NF), -1)
        user_BNE = user_BE[:, None].expand(shape)
        inputs = torch.cat([user_BNE, item_NE.expand(shape), user_BNE * item_NE, scalar_NS.expand(shape)], dim=2)
        return self._rest(inputs @ self.weight_IH + self.bias_H)

    def _rest(self, first_BNH: torch.Tensor) -> torch.Tensor:
        second_BNG = _at_least_float(torch.relu(self.second(torch.relu(first_BNH))))
        weight_TG, bias_T = (_at_least_float(part) for part in (self.out.weight, self.out.bias))
        return torch.sigmoid(F.linear(second_BNG, weight_TG, bias_T)).transpose(1, 2)

    def _check(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> None:
        wanted = self.embedding_dim, self.embedding_dim + self.scalars
        if (user_BE.shape[1], feature_NF.shape[1]) != wanted:
            raise ShapeError(
                f"users and features must be {wanted[0]} and {wanted[1]} wide, got {user_BE.shape[1]} and "
                f"{feature_NF.shape[1]}"
            )


def _at_least_float(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()
