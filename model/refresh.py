"""Which users' states to renew when the encoder may not renew all: those whose requests gain most by it.

Legend: U users, T packed events, B requests, N buckets of new events, K buckets of events known.

Of users who have a state and new events since, a budget takes the best by expected gain:

    expected gain = requests a day x gain a request
    requests a day = ln 2 / h * sum over the user's events e of 2 ** -((t - t_e) / h),   h = HALF_LIFE_DAYS
    gain a request = max(0, (sum of g + m * mean g) / (requests + m)),                  m = PRIOR_REQUESTS

The first is an exponentially decayed count of events: a user with r events a day, for ever, gets r. The second comes
from a small table by new events and events known: g is Recall with the renewed state minus Recall with the old one, of
the requests in a cell, shrunk towards the mean over all cells. A user without a state is no case for a budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.errors import ConfigError

HALF_LIFE_DAYS = 2.0
PRIOR_REQUESTS = 1000.0
NEW_FROM = (1, 2, 4, 8, 16)
"""Least number of new events of each bucket."""
KNOWN_FROM = (1, 4, 16, 64)
"""Least number of events known of each bucket."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class RefreshBudget:
    """How many users' states a run may renew: a share of what it would renew without a budget, or a number.

    Without one, a run renews the users with a state and events new in this run. Deferred users compete for the same
    places, so a share of 25% costs a quarter of the encoder calls, however many are deferred.
    """

    share: float | None = None
    users: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """25% or 100000. Raises ConfigError."""
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 <= share <= 1:
                    return cls(share=share)
            elif int(text) >= 0:
                return cls(users=int(text))
        except ValueError:
            pass
        raise ConfigError(f"a refresh budget is a share like 25% (0% to 100%) or a number of users, got {text!r}")

    def of(self, changed: int, shard: int = 0, shards: int = 1) -> int:
        """How many users of a shard may be renewed; a number of users is divided evenly among the shards.

        changed: users of the shard with a state and events new in this run.
        """
        if self.share is not None:
            return int(np.ceil(round(self.share * changed, 6)))
        assert self.users is not None
        return self.users // shards + (shard < self.users % shards)

    def __str__(self) -> str:
        return f"{self.users}" if self.share is None else f"{100 * self.share:g}%"


@dataclass(frozen=True, slots=True)
class GainTable:
    """What renewing a state is worth to a request, by new events and events known."""

    gain_NK: Floats
    """f64 [N, K], 0 or more."""
    source: str
    """Where it comes from: a study's name, or what was assumed."""

    @classmethod
    def assumed(cls) -> Self:
        """Without a study: the share of the history that is new, n / (n + k), at the lower end of each bucket."""
        new_N1, known_K = np.array(NEW_FROM, float)[:, None], np.array(KNOWN_FROM, float)
        return cls(new_N1 / (new_N1 + known_K), "assumed: the new share of the history")

    @classmethod
    def estimate(cls, new_B: Ints, known_B: Ints, gain_B: Floats, source: str) -> Self:
        """From requests answered with the old and with the renewed state; see the top of this module.

        new_B, known_B: i64 [B], 1 or more. gain_B: Recall renewed minus old. No request at all gives zeros.
        """
        shape = (len(NEW_FROM), len(KNOWN_FROM))
        cell_B = np.ravel_multi_index((_bucket(new_B, NEW_FROM), _bucket(known_B, KNOWN_FROM)), shape)
        count = np.bincount(cell_B, minlength=shape[0] * shape[1])
        total = np.bincount(cell_B, gain_B, shape[0] * shape[1])
        mean = gain_B.mean() if len(gain_B) else 0.0
        gain = (total + PRIOR_REQUESTS * mean) / (count + PRIOR_REQUESTS)
        return cls(np.maximum(gain, 0).reshape(shape), source)

    def gains(self, new_U: Ints, known_U: Ints) -> Floats:
        """Gain a request of users with so many new events and events known, each 1 or more: f64 [U]."""
        gain_U: Floats = self.gain_NK[_bucket(new_U, NEW_FROM), _bucket(known_U, KNOWN_FROM)]
        return gain_U

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "new_from": list(NEW_FROM),
            "known_from": list(KNOWN_FROM),
            "gain": self.gain_NK.round(6).tolist(),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises ConfigError where the buckets are others than ours."""
        gain_NK = np.array(values["gain"], float)
        buckets = tuple(values["new_from"]), tuple(values["known_from"])
        if buckets != (NEW_FROM, KNOWN_FROM) or gain_NK.shape != (len(NEW_FROM), len(KNOWN_FROM)):
            raise ConfigError(
                f"a gain table has the buckets {NEW_FROM} and {KNOWN_FROM}, got {buckets[0]}, {buckets[1]}"
            )
        return cls(gain_NK, str(values["source"]))


def study_name(release_id: str) -> str:
    """Name of a release's refresh study in the registry; its `table` is a GainTable."""
    return f"refresh-{release_id}"


def daily_rates(time_us_T: Ints, offsets: Ints, now_us: int) -> Floats:
    """Requests a day expected of each user: f64 [U], see the top of this module.

    time_us_T: i64 [T], events of the users one after another, none later than now_us. offsets: i64 [U + 1].
    """
    weight_T = np.exp2((time_us_T - now_us) / (HALF_LIFE_DAYS * _DAY_US))
    total = np.concatenate([[0.0], np.cumsum(weight_T)])
    rate_U: Floats = np.log(2) / HALF_LIFE_DAYS * (total[offsets[1:]] - total[offsets[:-1]])
    return rate_U


def best(score_U: Floats, new_U: Ints, budget: int) -> Ints:
    """The users of the highest scores, at most `budget` of them, ascending.

    Equal scores go to the user with more new events, then to the lower number.
    """
    order = np.lexsort((np.arange(len(score_U)), -new_U, -score_U))
    chosen: Ints = np.sort(order[:budget])
    return chosen


def _bucket(count: Ints, starts: tuple[int, ...]) -> Ints:
    found: Ints = np.maximum(np.searchsorted(starts, count, side="right") - 1, 0)
    return found
