"""A release asked the requests of a log's test part, with states of any age: what the studies of a release share.

Legend: B requests, M measures, T packed events, R resamples.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.dataset import DatasetDescription
from model.errors import DataError
from model.metrics import Estimate, recall_at, resampled_means
from model.release import Release
from model.training.data import EventArrays, Ints
from model.training.evaluate import (
    Candidates,
    TestSet,
    answer_requests,
    encode_requests,
    excludes_seen,
    make_test_set,
    repeat_share,
)
from model.training.skew import named

Floats = NDArray[np.float64]
INTERVAL = "95 %, bootstrap over users"


@dataclass(frozen=True, slots=True)
class Questions:
    """A release, a log as its featuriser reads it, the test's requests, and how they are ranked."""

    release: Release
    description: DatasetDescription
    events: EventArrays
    items: pa.Table
    test: TestSet
    exclude_seen: bool
    k: int
    seed: int
    resamples: int

    @classmethod
    def read(
        cls,
        release: Release,
        table: pa.Table,
        items: pa.Table,
        users: pa.Table | None,
        *,
        description: DatasetDescription | None = None,
        k: int = 20,
        seen: str = "auto",
        max_test_events: int | None = None,
        seed: int = 0,
        resamples: int = 500,
    ) -> Self:
        """As in evaluate_quality. Raises DataError or ConfigError."""
        description = description or release.manifest.description
        events = EventArrays.build(table, users, release.featuriser, description)
        test = make_test_set(table, events, description, limit=max_test_events, seed=seed)
        exclude_seen = excludes_seen(seen, repeat_share(events))
        return cls(release, description, events, items, test, exclude_seen, k, seed, resamples)

    @property
    def item_IE(self) -> torch.Tensor:
        """f32 [I, E], the item tower's rows."""
        assert self.release.item_table is not None
        return self.release.item_table

    def hits(self, target_B: Ints, cut_B: Ints) -> dict[str, Floats]:
        """Whether each request finds its item in the first k, `context` and `no_context`: f64 [B] of 0 and 1.

        target_B, cut_B: as in embed_requests.
        """
        release = self.release
        state_QD, row_B = encode_requests(release.encoder, self.events, target_B, cut_B)
        candidates = self.candidates(target_B)
        found = {}
        for arm, with_context in (("context", True), ("no_context", False)):
            user_BE = answer_requests(
                release.head, self.item_IE, self.events, target_B, cut_B, state_QD, row_B, with_context=with_context
            )
            found[arm] = recall_at(candidates.ranks(user_BE, self.item_IE), self.k)
        return found

    def candidates(self, target_B: Ints) -> Candidates:
        """What the requests are ranked among."""
        return Candidates.of(self.release, self.events, self.items, target_B, exclude_seen=self.exclude_seen)

    def users_of(self, target_B: Ints) -> Ints:
        """The user of each request: i64 [B]."""
        return self.events.user_T[target_B]

    def header(self, study: str, target_B: Ints) -> dict[str, Any]:
        """What a study says of its release and requests. Raises DataError where there is no request."""
        if not len(target_B):
            raise DataError("no user of the test has any history: there is nothing to compare")
        return {
            "format": 1,
            "study": study,
            "dataset": self.description.name,
            "split": self.description.evaluation.to_dict(),
            "release": named(self.release.manifest),
            "k": self.k,
            "requests": len(target_B),
            "users": len(np.unique(self.users_of(target_B))),
            "sampled": len(self.test.target_B) < self.test.total,
            "seed": self.seed,
            "catalogue": self.events.num_items,
            "seen_items": "excluded" if self.exclude_seen else "kept",
            "interval": INTERVAL,
        }

    def resampled(self, value_BM: Floats, target_B: Ints) -> Floats:
        """Means over the requests in each resample of users: f64 [R, M]."""
        return resampled_means(value_BM, self.users_of(target_B), resamples=self.resamples, seed=self.seed)


def last_event_until(time_us_T: Ints, first_B: Ints, end_B: Ints, until_us_B: Ints) -> Ints:
    """Last event at or before a time among events first_B up to, without, end_B; first_B - 1 where there is none.

    time_us_T: i64 [T], rising within each range. The rest: i64 [B].
    """
    low, high = first_B.copy(), np.maximum(end_B, first_B)
    while (open_B := low < high).any():
        middle = (low + high) // 2
        seen_B = time_us_T[np.minimum(middle, len(time_us_T) - 1)] <= until_us_B
        low = np.where(open_B & seen_B, middle + 1, low)
        high = np.where(open_B & ~seen_B, middle, high)
    return low - 1


def summary(value: float, values_R: Floats, digits: int = 6) -> dict[str, float]:
    """A figure with the 95 % interval of its resamples, as plain values."""
    low, high = np.quantile(values_R, [0.025, 0.975])
    estimate = Estimate(round(float(value), digits), round(float(low), digits), round(float(high), digits))
    return asdict(estimate)


def ratio(top: float, bottom: float, top_R: Floats, bottom_R: Floats, *, digits: int = 6) -> dict[str, float] | None:
    """top / bottom with its interval; None where bottom is not surely above 0."""
    if not bottom > 0 or np.quantile(bottom_R, 0.025) <= 0:
        return None
    usable_R = bottom_R > 0
    return summary(top / bottom, top_R[usable_R] / bottom_R[usable_R], digits)


def figure(found: Mapping[str, float] | None, *, percent: bool = False) -> str:
    """0.1234 (0.1200 to 0.1270), or as percentages; a dash for None."""
    if found is None:
        return "-"
    form = "{:.0%}" if percent else "{:.4f}"
    value, low, high = (form.format(found[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
