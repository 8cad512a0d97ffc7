"""What a request asks of the index: its own wishes, the plan it shares with its batch, and the batch as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import ConfigError, ShapeError
from model.retrieval.rows import ItemId, Layout

MAX_RESULTS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all requests of a batch share: numbers that fix the graph's shape."""

    k: int
    """Results a request, at most 2,000."""
    advertiser_cap: int | None = None
    """Most results of one advertiser; None: no cap."""
    category_cap: int | None = None
    """Most results of one main category; None: no cap."""
    exploration_share: float = 0.0
    """Share of the slate drawn among the next candidates, in [0, 1]; places are rounded down."""
    exploration_window: int = 0
    """How many next candidates are drawn from."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_RESULTS:
            raise ConfigError(f"k must be in [1, {MAX_RESULTS}], got {self.k}")
        for name in ("advertiser_cap", "category_cap"):
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                raise ConfigError(f"{name} must be at least 1, got {cap}")
        if not 0 <= self.exploration_share <= 1:
            raise ConfigError(f"exploration_share must be in [0, 1], got {self.exploration_share}")
        if self.explored and self.exploration_window < self.explored:
            raise ConfigError(
                f"exploration_window must hold the {self.explored} places drawn, got {self.exploration_window}"
            )

    @property
    def explored(self) -> int:
        """Places of the slate that are drawn."""
        return int(self.exploration_share * self.k + 1e-9)

    @property
    def walked(self) -> int:
        """How many items the walk has to find: the places that are not drawn, and the candidates of the draw."""
        return self.k - self.explored + (self.exploration_window if self.explored else 0)

    @property
    def caps(self) -> dict[str, int]:
        """The caps there are, by the column they count."""
        caps = {"advertiser": self.advertiser_cap, "category": self.category_cap}
        return {name: cap for name, cap in caps.items() if cap is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request's wishes. The default asks for nothing: any eligible item, by its first task's score alone."""

    task_weights: Sequence[float] = (1.0,)
    bid_power: float = 0.0
    """w in utility = sum of weight * score, times bid ** w."""
    required: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Field -> bits: the item has at least one of them. A field left out or without bits asks nothing."""
    forbidden: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Field -> bits: the item has none of them."""
    ranges: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Attribute -> (least, most), both included; an unknown value (NaN) is in no range."""
    min_budget: float = 0.0
    seen: Sequence[ItemId] = ()
    blocked: Sequence[ItemId] = ()
    seed: int = 0
    """Of the exploration draw, int64."""


@dataclass(frozen=True, slots=True)
class Requests:
    """A batch of requests as tensors, on the device of the index."""

    weight_BT: torch.Tensor
    bid_power_B: torch.Tensor
    required_BW: torch.Tensor
    forbidden_BW: torch.Tensor
    lower_BA: torch.Tensor
    upper_BA: torch.Tensor
    min_budget_B: torch.Tensor
    excluded_X: torch.Tensor
    """i64: rows already seen or blocked, request after request."""
    excluded_of_X: torch.Tensor
    """i64: the request each of them is of."""
    seed_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.seed_B)

    @classmethod
    def build(
        cls, requests: Sequence[Request], layout: Layout,
        rows_of: Callable[[Sequence[ItemId]], Sequence[int] | NDArray[np.int64]],
    ) -> Self:  # fmt: skip
        """rows_of: rows of item ids in the snapshot that will answer; ids it does not hold are left out.

        Raises ShapeError for attributes that are not there or unequal numbers of task weights, DataError for bits.
        """
        if len({len(request.task_weights) for request in requests}) != 1:
            raise ShapeError("wanted at least one request, all with as many task weights")
        count = len(requests)
        lower_BA = np.full((count, layout.attributes), -np.inf, np.float32)
        upper_BA = np.full((count, layout.attributes), np.inf, np.float32)
        for b, request in enumerate(requests):
            for attribute, (least, most) in request.ranges.items():
                if not 0 <= attribute < layout.attributes:
                    raise ShapeError(f"attributes are numbered [0, {layout.attributes}), got {attribute}")
                lower_BA[b, attribute], upper_BA[b, attribute] = least, most
        excluded = [np.asarray(rows_of([*request.seen, *request.blocked]), np.int64) for request in requests]

        def tensor(values: Any, dtype: Any) -> torch.Tensor:
            return torch.from_numpy(np.array(values, dtype))  # of small lists, several times as fast as torch.tensor

        def masks(wishes: Sequence[Mapping[str, Sequence[int]]]) -> torch.Tensor:
            words = np.array([layout.mask(wish) for wish in wishes], np.int64)
            return torch.from_numpy(words.reshape(count, layout.mask_words))

        return cls(
            tensor([request.task_weights for request in requests], np.float32),
            tensor([request.bid_power for request in requests], np.float64),
            masks([request.required for request in requests]),
            masks([request.forbidden for request in requests]),
            torch.from_numpy(lower_BA), torch.from_numpy(upper_BA),
            tensor([request.min_budget for request in requests], np.float32),
            torch.from_numpy(np.concatenate(excluded)),
            torch.from_numpy(np.repeat(np.arange(count), list(map(len, excluded)))),
            tensor([request.seed for request in requests], np.int64),
        )  # fmt: skip

    def part(self, start: int, end: int) -> Self:
        """Some of the requests."""
        is_in_X = (self.excluded_of_X >= start) & (self.excluded_of_X < end)
        excluded = self.excluded_X[is_in_X], self.excluded_of_X[is_in_X] - start
        columns = {part.name: getattr(self, part.name)[start:end] for part in fields(self)}
        return type(self)(**{**columns, "excluded_X": excluded[0], "excluded_of_X": excluded[1]})

    def to(self, device: Any) -> Self:
        """The same on another device."""
        return type(self)(*(getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)))
