"""Scores of every item for every request.

Both scorers take the index's features as they lie in memory: feature_NF, the embedding's E columns, then the scalars.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn

from model.errors import ConfigError, ShapeError

MAX_HIDDEN_BYTES = {"cpu": 2**26, "cuda": 2**32}
"""First-layer values computed at a time: what stays in a cache, or leaves room on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """Shape of a trained InteractionScorer and the scalars it reads; saved in its release."""

    hidden: tuple[int, int] = (256, 128)
    """Units of the two hidden layers."""
    with_dot: bool = True
    """Whether the dot product is added to the MLP's logit."""
    windows_h: tuple[float, ...] = ()
    """Spans before the present, in hours, over which an item's events are counted; none means no scalars."""
    bucket_s: int = 600
    """Scalars are as of the last whole multiple of so many seconds: how often an index has to be brought up to date."""

    def __post_init__(self) -> None:
        for name in ("hidden", "windows_h"):
            if not isinstance(value := getattr(self, name), list | tuple):
                raise ConfigError(f"{name} must be a list of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON has lists
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            raise ConfigError(f"hidden must be two numbers of at least 1 unit, got {self.hidden}")
        if self.bucket_s < 1:
            raise ConfigError(f"bucket_s must be at least 1 second, got {self.bucket_s}")
        rising = sorted(set(self.windows_h))
        if list(self.windows_h) != rising or any(hours * 3600 < self.bucket_s for hours in rising):
            raise ConfigError(
                f"windows_h must rise and be at least bucket_s ({self.bucket_s} s) each, got {self.windows_h}"
            )

    @property
    def scalars(self) -> int:
        """S. See `scalars.item_scalars`."""
        return 2 * (len(self.windows_h) + 1) + 2 if self.windows_h else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises ConfigError on a name this version does not know."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"ScorerConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)


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

    The first layer is folded (`logits`): with W_u, W_i, W_p and W_s its rows of the four parts,

        u W_u + i W_i + (u * i) W_p + s W_s = [i, s] [W_i + diag(u) W_p; W_s] + u W_u

    so a layer over 3 E + S inputs a pair becomes one over E + S, with weights made once a request. It is the same
    function (`unfolded` is the formula as written).

    With a dot product, dot_T u.i is added to the logits: one more column, u, beside the folded weights, that passes
    both layers by. A scorer whose `out` is zero then orders as the dot product does.
    """

    def __init__(
        self, embedding_dim: int, scalars: int, hidden: tuple[int, int] = (256, 128), tasks: int = 1, *,
        dot_scale: float | None = None,
    ) -> None:  # fmt: skip
        """dot_scale: what dot_T begins as; None means no dot product."""
        super().__init__()
        self.embedding_dim, self.scalars = embedding_dim, scalars
        self.embedding_version: str | None = None
        """Of the release it was loaded with; an index of another version refuses it. None: of no release."""
        first, second = hidden
        inputs = 3 * embedding_dim + scalars
        self.weight_IH = nn.Parameter(torch.randn(inputs, first) / math.sqrt(inputs))
        self.bias_H = nn.Parameter(torch.zeros(first))
        self.second = nn.Linear(first, second)
        self.out = nn.Linear(second, tasks)
        self.dot_T = None if dot_scale is None else nn.Parameter(torch.full((tasks,), dot_scale))

    @classmethod
    def of(cls, config: ScorerConfig, embedding_dim: int, dot_scale: float = 1.0) -> Self:
        """A fresh scorer of a config's shape, one task. dot_scale: read where the config has a dot product."""
        return cls(
            embedding_dim, config.scalars, config.hidden, dot_scale=dot_scale if config.with_dot else None
        )  # fmt: skip

    def forward(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """Probabilities: f32 [B, T, N] in (0, 1), or f64 for f64. Inputs as in `logits`."""
        return torch.sigmoid(self.logits(user_BE, feature_NF))

    def logits(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """What the probabilities are made of: f32 [B, T, N], or f64 for f64.

        user_BE: float [B, E]. feature_NF: float [N, E + S], or [B, N, E + S] where each user has items of their own.
        Computes in the parameters' dtype, the last layer and the dot product at least in float32 (rounded logits tie).
        Raises ShapeError.
        """
        self._check(user_BE, feature_NF)
        user_BE, feature_NF = user_BE.to(self.weight_IH.dtype), feature_NF.to(self.weight_IH.dtype)
        weight_BFH, bias_BH = self.folded(user_BE)
        hidden_bytes = len(user_BE) * len(self.bias_H) * feature_NF.element_size()
        chunk = max(1, MAX_HIDDEN_BYTES[feature_NF.device.type] // hidden_bytes)
        parts = []
        for part in torch.split(feature_NF, chunk, dim=-2):
            logit_BTN = self._rest(part @ weight_BFH + bias_BH[:, None])
            parts.append(self._with_dot(logit_BTN, user_BE, part))
        return torch.cat(parts, dim=2) if len(parts) != 1 else parts[0]

    def folded(self, user_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layer of each request: weight_BFH over [item, scalars], and bias_BH."""
        width = self.embedding_dim
        user_EH, item_EH = self.weight_IH[:width], self.weight_IH[width : 2 * width]
        product_EH, scalar_SH = self.weight_IH[2 * width : 3 * width], self.weight_IH[3 * width :]
        item_BEH = item_EH + user_BE[:, :, None] * product_EH
        weight_BFH = torch.cat([item_BEH, scalar_SH.expand(len(user_BE), -1, -1)], dim=1)
        return weight_BFH, user_BE @ user_EH + self.bias_H

    def unfolded(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """The probabilities by the formula as written: every pair's 3 E + S inputs side by side.

        user_BE: float [B, E]. feature_NF: float [N, E + S].
        """
        self._check(user_BE, feature_NF)
        user_BE, feature_NF = user_BE.to(self.weight_IH.dtype), feature_NF.to(self.weight_IH.dtype)
        item_NE, scalar_NS = feature_NF[:, : self.embedding_dim], feature_NF[:, self.embedding_dim :]
        shape = (len(user_BE), len(feature_NF), -1)
        user_BNE = user_BE[:, None].expand(shape)
        inputs = torch.cat([user_BNE, item_NE.expand(shape), user_BNE * item_NE, scalar_NS.expand(shape)], dim=2)
        return torch.sigmoid(self._with_dot(self._rest(inputs @ self.weight_IH + self.bias_H), user_BE, feature_NF))

    def _rest(self, first_BNH: torch.Tensor) -> torch.Tensor:
        second_BNG = _at_least_float(torch.relu(self.second(torch.relu(first_BNH))))
        weight_TG, bias_T = (_at_least_float(part) for part in (self.out.weight, self.out.bias))
        return F.linear(second_BNG, weight_TG, bias_T).transpose(1, 2)

    def _with_dot(self, logit_BTN: torch.Tensor, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        if self.dot_T is None:
            return logit_BTN
        user_BE, item_NE = _at_least_float(user_BE), _at_least_float(feature_NF[..., : self.embedding_dim])
        if item_NE.ndim == 2:
            product_BN = user_BE @ item_NE.T
        else:
            product_BN = (item_NE @ user_BE[:, :, None])[..., 0]
        return logit_BTN + _at_least_float(self.dot_T)[:, None] * product_BN[:, None]

    def _check(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> None:
        wanted = self.embedding_dim, self.embedding_dim + self.scalars
        if (user_BE.shape[1], feature_NF.shape[-1]) != wanted:
            raise ShapeError(
                f"users and features must be {wanted[0]} and {wanted[1]} wide, got {user_BE.shape[1]} and "
                f"{feature_NF.shape[-1]}"
            )
        if feature_NF.ndim == 3 and len(feature_NF) != len(user_BE):
            raise ShapeError(f"items of {len(user_BE)} users must come in as many rows, got {len(feature_NF)}")


def _at_least_float(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()
