"""A release's items as Retrieve searches them: a live index with rules, and the log's counts where the release reads
them. One for each embedding_version; the feeds (`online.feeds`) keep it up to date.

Legend: E embedding width, L width of the live part, K results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import DataError
from model.item_index import ItemIndex
from model.item_tower import ItemTower
from model.live_search import Counted, LiveSearch, ScalarCounting
from model.records import Context, Id
from model.retrieval import rules
from model.retrieval.catalogue import NO_NAMES, RuleNames, catalogue_rows
from model.retrieval.index import LiveIndex
from model.retrieval.rows import FIELDS
from model.retrieval.rules import Plan
from model.retrieval.scorer import DotScorer, InteractionScorer
from online.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What one request wants of items, before it is known which release answers. The default asks for nothing."""

    required: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    """Field (category, country, language) -> values by name or bit: the item has at least one of them."""
    forbidden: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    """Field -> values: the item has none of them."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Attribute -> (least, most), both included; an unknown value is in no range."""
    min_budget: float = 0.0
    excluded: Sequence[Id] = ()
    """Seen or blocked."""
    bid_power: float = 0.0
    seed: int = 0


NO_WISHES = Wishes()


@dataclass(frozen=True, slots=True)
class LiveModel:
    """What a release that reads counts scores by, besides its embeddings: live item features or a scorer's scalars."""

    items: ItemTower
    config: TowerConfig
    """With the windows and the bucket to count by."""
    description: DatasetDescription
    scorer: InteractionScorer | None = None
    """Its scalars are what the counts are for; None: live item features."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best items of one user, best first, and what they were found in."""

    item_ids: list[Id]
    score_K: NDArray[np.float32]
    embedding_version: str
    revision: int
    """Updates the index had seen."""
    counted: Counted | None = None
    """The counts that were read; None where the release reads none."""
    counts_are_short: bool = False
    """They do not reach back over the longest window, or end too long ago."""


MAX_LAG_US = 10_000_000
"""Counts that end longer ago than a bucket and this are said to be short."""
_NO_EVENTS = np.zeros(0, np.int64)


class ServedItems:
    """A live index, the names of its rules, and the counts it is scored with."""

    def __init__(self, index: LiveIndex, names: RuleNames = NO_NAMES, live: LiveModel | None = None) -> None:
        self.index = index
        self.names = names
        self.live = live
        self.counted: Counted | None = None
        """Replaced by the event feed, never changed."""
        self._counting: LiveSearch | ScalarCounting | None = None
        if live is not None:
            if live.scorer is None:
                self._counting = LiveSearch(live.items, live.config, device=index.device)
            else:
                self._counting = ScalarCounting(live.config, index.device)
            self.count(_NO_EVENTS, _NO_EVENTS, _NO_EVENTS, len(index), since_us=0, until_us=0)

    @classmethod
    def of_snapshot(
        cls, snapshot: ItemIndex, *, description: DatasetDescription | None = None, catalogue: pa.Table | None = None,
        live: LiveModel | None = None, scorer: InteractionScorer | None = None, device: str = "cpu",
    ) -> "ServedItems":  # fmt: skip
        """An index of a snapshot's items; see `catalogue_rows`. scorer: the release's, None for the dot product.

        Raises DataError, IndexMismatch.
        """
        rows, names = catalogue_rows(snapshot, description, catalogue, 0 if scorer is None else scorer.scalars)
        return cls(LiveIndex(rows, DotScorer() if scorer is None else scorer, device=device), names, live)

    @property
    def embedding_version(self) -> str:
        """Of the index."""
        return self.index.embedding_version

    def count(
        self, user_P: NDArray[np.int64], item_P: NDArray[np.int64], time_us_P: NDArray[np.int64], num_rows: int, *,
        since_us: int, until_us: int, is_behind: bool = True,
    ) -> None:  # fmt: skip
        """Put counts in the place of those there are; see `Counting.counted`."""
        assert self._counting is not None, "counts are for releases that read them"
        self.counted = self._counting.counted(
            user_P, item_P, time_us_P, num_rows, since_us=since_us, until_us=until_us, is_behind=is_behind
        )

    def search(
        self, embedding_E: NDArray[np.float32], plan: Plan, wishes: Wishes, context: Context, now_us: int
    ) -> Found:
        """The slate of one user embedding, f32 [E] or with live features [E + L], made by a release of this version.

        now_us: the time of a request that names none. Raises RequestError for wishes that this version does not know.
        """
        request = self._request(wishes)
        version = self.embedding_version
        counted, counting = self.counted, self._counting
        time_us = now_us if context.timestamp_us is None else context.timestamp_us
        if counted is None or counting is None:
            slates = self.index.search(embedding_E[None], [request], plan, version)
        elif isinstance(counting, ScalarCounting):
            slates = self.index.search(
                embedding_E[None], [request], plan, version,
                scalars=lambda num_rows: counting.scalars(counted, time_us, num_rows),
            )  # fmt: skip
        else:
            width = counting.config.embedding_dim
            user_V = torch.from_numpy(embedding_E) / counting.temperature
            slates = self.index.search(
                user_V[None, :width], [request], plan, version,
                bonus=lambda num_rows: counting.bonus(
                    counted, user_V[width:], context.session_events, time_us, num_rows, self.index.row_of
                ),
            )  # fmt: skip
        item_ids = slates.item_ids[0]
        score_K = slates.utility_BK[0, : len(item_ids)]
        if counted is None or counting is None:
            return Found(item_ids, score_K, version, slates.revision)
        is_behind = now_us - counted.until_us > counting.config.live_bucket_s * 1_000_000 + MAX_LAG_US
        return Found(item_ids, score_K, version, slates.revision, counted, counted.is_short or is_behind)

    def _request(self, wishes: Wishes) -> rules.Request:
        ranges = {}
        for name, span in wishes.ranges.items():
            if name not in self.names.attributes:
                known = ", ".join(self.names.attributes) or "none"
                raise RequestError(f"ranges: no attribute {name!r}; the attributes are: {known}")
            ranges[self.names.attributes.index(name)] = span
        return rules.Request(
            bid_power=wishes.bid_power,
            required={name: self._bits("required", name, values) for name, values in wishes.required.items()},
            forbidden={name: self._bits("forbidden", name, values) for name, values in wishes.forbidden.items()},
            ranges=ranges,
            min_budget=wishes.min_budget,
            blocked=wishes.excluded,
            seed=wishes.seed,
        )

    def _bits(self, what: str, name: str, values: Sequence[str | int]) -> list[int]:
        if name not in FIELDS:
            raise RequestError(f"{what}: wanted the fields {', '.join(FIELDS)}, got {name!r}")
        numbers = self.names.number_of.get(name, {})
        bits = []
        for value in values:
            if isinstance(value, int):
                bits.append(value)
            elif value in numbers:
                bits.append(numbers[value])
            else:
                there = (
                    f"{len(numbers)} values, such as {', '.join(list(numbers)[:5])}" if numbers else "no named values"
                )
                raise RequestError(f"{what}.{name}: no value {value!r}; items of {self.embedding_version} have {there}")
        try:
            self.index.layout.mask({name: bits})
        except DataError as error:
            raise RequestError(f"{what}: {error}") from None
        return bits
