"""The live part of scores over an item index that grows: counts of now, and what one request adds to them.

With live item features the score is that of `model.live_items`, term by term, for one request and all rows of an index:

    score = user . item / temperature + psi . phi(item, t) + follows(recent, item, t) - had(recent, item)

phi changes once a bucket and is kept; follows and had touch a few rows. Rows of the index are rows of the counts, so an
item that came after the weights is counted by itself; items that the index does not hold share H hash rows behind them.
As long as the index holds the catalogue alone, these are the rows that training and evaluation count by.

Legend: P events, N catalogue items, R rows of the index when it was counted, H hash rows, F features of an item,
L width of the live part.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import TowerConfig
from model.features import hash_ids
from model.item_tower import ItemTower
from model.live_items import LiveCounts
from model.records import Event, Id
from model.retrieval.scalars import scaled

Ints = NDArray[np.int64]
_SECOND_US = 1_000_000
KEPT_BUCKETS = 4
"""Buckets whose phi is kept: callers' clocks differ a little."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts as of one moment, for the rows that an index had then. Replaced, never changed."""

    counts: LiveCounts | None
    """None: there are no events."""
    num_rows: int
    """R"""
    since_us: int
    """All events from this time on are counted, up to until_us."""
    until_us: int
    """Start of a bucket; a request of a later time is answered as of this one."""
    is_short: bool
    """The counts do not reach back over the longest window, or lag behind the log."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Of the buckets asked for last: features f32 [R + 1, F], and what is made of them; the last row has no events."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Counting(ABC):
    """Counts of a log for the rows of an index, and what a release makes of them once a bucket."""

    def __init__(self, config: TowerConfig, device: Any = "cpu") -> None:
        """config: with the windows and the bucket to count by."""
        self.config, self.device = config, torch.device(device)

    @torch.inference_mode()
    def counted(
        self, user_P: Ints, item_P: Ints, time_us_P: Ints, num_rows: int, *, since_us: int, until_us: int,
        is_behind: bool = False,
    ) -> Counted:  # fmt: skip
        """Counts of positive events, users one after another, each oldest event first.

        item_P: in [0, R + H). num_rows: R, at least N. until_us: rounded down to a bucket. is_behind: the log has
        events that were not read yet.
        """
        config = self.config
        bucket_us = config.live_bucket_s * _SECOND_US
        until_us = until_us // bucket_us * bucket_us
        counts = None
        if len(time_us_P):
            counts = LiveCounts.build(
                user_P, item_P, time_us_P, num_rows + config.hash_rows, config, until_us=until_us
            ).to(self.device)  # fmt: skip
        is_short = is_behind or until_us - since_us < longest_window_us(config)
        counted = Counted(counts, num_rows, since_us, until_us, is_short)
        self._at(counted, until_us)
        return counted

    @abstractmethod
    def _made(self, feature_RF: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        """What is kept of a bucket. row_R: i64, rows of the index, and R for an item without events."""

    def _at(self, counted: Counted, time_us: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bucket of a time, i64 scalar, with features of all rows and what is made of them; see Counted.made."""
        rows = torch.arange(counted.num_rows + 1, device=self.device)
        counts = counted.counts
        bucket = torch.zeros((), dtype=torch.int64, device=self.device)
        if counts is not None:
            bucket = counts.bucket(torch.tensor(min(time_us, counted.until_us), device=self.device))
        number = int(bucket)
        with counted.lock:
            if number not in counted.made:
                if counts is None:
                    feature_RF = torch.zeros(
                        len(rows), 2 * (len(self.config.live_windows_h) + 1) + 2, device=self.device
                    )
                else:
                    key = torch.where(rows < counted.num_rows, rows, counts.num_rows)  # the last one: of no item
                    feature_RF = counts.item_features(key, bucket)
                while len(counted.made) >= KEPT_BUCKETS:
                    del counted.made[next(iter(counted.made))]
                counted.made[number] = feature_RF, self._made(feature_RF, rows)
            return bucket, *counted.made[number]


class ScalarCounting(Counting):
    """The scalars that a release's trained scorer reads (`model.retrieval.scalars`)."""

    @torch.inference_mode()
    def scalars(self, counted: Counted, time_us: int, num_rows: int) -> torch.Tensor:
        """Scalars of each row of the index as of a time: f32 [num_rows, S], on the device."""
        _, _, scalar_RS = self._at(counted, time_us)
        fresh_XS = scalar_RS[-1:].expand(max(0, num_rows - counted.num_rows), -1)  # items that came since
        return torch.cat([scalar_RS[:-1], fresh_XS])[:num_rows]

    def _made(self, feature_RF: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        return scaled(feature_RF)


class LiveSearch(Counting):
    """A release's live part, for a service that counts."""

    def __init__(self, items: ItemTower, config: TowerConfig, *, device: Any = "cpu") -> None:
        """items: with live features, in eval mode; its live part is moved to the device."""
        super().__init__(config, device)
        assert items.live is not None, "a release with live features"
        self.temperature = items.temperature
        self._live = items.live.to(device)
        rows = torch.arange(items.embedder.shape.num_items, device=items.projection.weight.device)
        self._is_known_N = items.is_known(rows).to(device)

    @torch.inference_mode()
    def bonus(
        self, counted: Counted, psi_L: torch.Tensor, recent: Sequence[Event], time_us: int, num_rows: int,
        row_of: Callable[[Id], int | None],
    ) -> torch.Tensor:  # fmt: skip
        """psi . phi + follows - had of each row of the index for one request: f32 [1, num_rows], on the device.

        psi_L: f32 [L], logits, that is divided by the temperature. recent: the user's latest events, oldest first; of
        the last max(live_recent, session_limit) all count as had, the last live_recent are followed. num_rows: of the
        index by now. row_of: row of an item, None where the index has none.
        """
        config, psi_L = self.config, psi_L.to(self.device)
        bucket, feature_RF, phi_RL = self._at(counted, time_us)
        bonus_R = phi_RL @ psi_L
        fresh = bonus_R[-1:].expand(max(0, num_rows - counted.num_rows))  # items that came since: without events
        bonus_R = torch.cat([bonus_R[:-1], fresh])
        latest = list(recent[::-1][: max(config.live_recent, config.session_limit)])
        row_K = [row_of(event.item_id) for event in latest]
        if counted.counts is not None:
            for k, (row, event) in enumerate(zip(row_K, latest[: config.live_recent], strict=False)):
                if row is None or row >= counted.num_rows:  # it was counted with those that the index did not hold
                    row = counted.num_rows + int(hash_ids([event.item_id])[0] % np.uint64(config.hash_rows))
                gap_s = max(0, time_us - event.timestamp_us) / _SECOND_US
                item, gain = self._follows(counted.counts, row, k, gap_s, bucket, feature_RF)
                bonus_R.index_add_(0, item, gain)
        had = {row for row in row_K if row is not None and row < num_rows}
        bonus_R[list(had)] -= self._live.had
        return bonus_R[None, :num_rows]

    def _follows(
        self, counts: LiveCounts, source: int, place: int, gap_s: float, bucket: torch.Tensor, feature_RF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that ever followed a row, and what each gains by it: i64 [M], f32 [M]."""
        source_1 = torch.tensor([source], device=self.device)
        _, item_M = counts.followers(source_1)
        item_M = item_M[item_M < len(feature_RF) - 1]
        pair_M4 = counts.pair_features(source_1, item_M, bucket.expand_as(item_M))
        log_gap_M = torch.full(item_M.shape, gap_s, device=self.device).log1p()
        place_M = torch.full_like(item_M, place)
        return item_M, self._live.follows(pair_M4, feature_RF[item_M], self._is_known(item_M), log_gap_M, place_M)

    def _is_known(self, row: torch.Tensor) -> torch.Tensor:
        """Rows past the catalogue came after the weights."""
        count = len(self._is_known_N)
        return (row < count) & self._is_known_N[row.clamp(max=count - 1)]

    def _made(self, feature_RF: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        """phi."""
        phi_RL: torch.Tensor = self._live(feature_RF, self._is_known(row_R))
        return phi_RL


def longest_window_us(config: TowerConfig) -> int:
    """The longest span that a release counts over, besides the whole past."""
    return round(config.live_windows_h[-1] * 3600 * _SECOND_US)
