"""Whom to renew when the encoder may not renew all: policies of a refresh budget, played over the last days of a log.

Legend: A arms (policy and budget), B requests, D days, U users, T packed events.

At each daily refresh every user without a state is encoded, and of the users with a state and unseen events a policy
picks as many as the budget allows: a share of those with events new that day, so that it is also the share of the cost.
The others keep their older state and compete again. Then the day's requests are answered, with the events
since the user's state as session, up to session_limit. All users are current at the first day's refresh, some days
before the test; Recall@K is counted on the test's requests only, so that states had time to grow old.

The gain table of `expected_gain` (model.refresh) comes from the requests of the day before the test, answered with the
state of that day's refresh and with those of one to three refreshes before. That day is in the training part.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from model.errors import ConfigError
from model.refresh import HALF_LIFE_DAYS, PRIOR_REQUESTS, GainTable, RefreshBudget, best, daily_rates, study_name
from model.training.data import Ints
from model.training.requests import Floats, Questions, figure, last_event_until, ratio, summary

POLICIES = ("random", "most_new_events", "longest_stale", "expected_gain")
BUDGETS = (0.05, 0.10, 0.25, 0.50)
WARM_UP_DAYS = 4
_DAY_US = 86_400_000_000
_OLDER_DAYS = (1, 2, 3)
FORMULA = (
    f"requests a day, ln 2 / {HALF_LIFE_DAYS:g} * sum of 2 ** -(age of event / {HALF_LIFE_DAYS:g} days), times the "
    f"gain a request by new events and events known, shrunk to the mean by {PRIOR_REQUESTS:g} requests, not below 0"
)


@dataclass(frozen=True, slots=True)
class Refresh:
    """The users at one refresh."""

    day: int
    """Days since the epoch, from refresh time to refresh time."""
    latest_U: Ints
    """Last event each user had by then; below the user's first event where there is none."""
    rate_U: Floats
    """Requests a day expected."""


def refresh_study(
    release: Any,
    table: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    *,
    budgets: Sequence[float] = BUDGETS,
    warm_up_days: int = WARM_UP_DAYS,
    **asked: Any,
) -> dict[str, Any]:
    """Recall@K of each policy and budget on the test requests of users with a state, with and without context.

    budgets: shares of the users with a state and events new that day, each in (0, 1). warm_up_days: refreshes under
    the policy before the first day of the test. asked: as Questions.read takes it. Raises DataError or ConfigError,
    the latter where the description does not split by time.
    """
    if any(not 0 < share < 1 for share in budgets):
        raise ConfigError(f"budgets are shares above 0 and below 1 (all and nobody are added), got {list(budgets)}")
    if warm_up_days < 1:
        raise ConfigError(f"warm_up_days must be at least 1, got {warm_up_days}")
    questions = Questions.read(release, table, items, users, **asked)
    if questions.description.evaluation.split != "time":
        raise ConfigError("a refresh budget is measured over days: the description's evaluation must split by time")
    test = questions.test
    target_B = test.target_B[test.history_B]
    study = questions.header("refresh-budget", target_B)
    day_B = days_of(questions, questions.events.time_us_T[target_B])
    first_day = int(day_B.min())
    gains = measure_gains(questions, first_day - 1)
    refreshes = _refreshes(questions, range(first_day - warm_up_days, int(day_B.max()) + 1))
    arms: dict[tuple[str, float], tuple[Ints, list[int]]] = {}
    for policy, share in [("nobody", 0.0), *((p, b) for p in POLICIES for b in budgets), ("all", 1.0)]:
        arms[policy, share] = play(questions, refreshes, policy, share, gains, target_B, day_B)
    hits = _hits(questions, target_B, np.stack([cut_B for cut_B, _ in arms.values()]))
    floor, ceiling = arms["nobody", 0.0][0], arms["all", 1.0][0]
    new_users = [int(_new_users(questions, a, b).sum()) for a, b in itertools.pairwise(refreshes)]
    return study | {
        "days": {"warm_up": warm_up_days, "test": int(day_B.max()) - first_day + 1},
        "affected_share": round(float((floor != ceiling).mean()), 6),
        "new_users_a_day": round(float(np.mean(new_users)), 1),
        "arms": _figures(questions, target_B, list(arms), [counts for _, counts in arms.values()], hits),
        "formula": FORMULA,
        "table": gains.to_dict(),
    }


def days_of(questions: Questions, time_us: Ints) -> Ints:
    """Number of the last refresh at or before each time."""
    days: Ints = (time_us - questions.description.refresh_offset_us) // _DAY_US
    return days


def _refresh_us(questions: Questions, day: int) -> int:
    return day * _DAY_US + questions.description.refresh_offset_us


def _latest(questions: Questions, day: int) -> Ints:
    """Last event of each user at or before a refresh, one below the first where there is none."""
    events = questions.events
    until_us_U = np.full(len(events.user_ids), _refresh_us(questions, day))
    return last_event_until(events.time_us_T, events.offsets[:-1], events.offsets[1:], until_us_U)


def _refreshes(questions: Questions, days: range) -> list[Refresh]:
    """What a policy knows at each refresh: as the batch job, of the latest history_limit events."""
    events, made = questions.events, []
    for day in days:
        latest_U = _latest(questions, day)
        start_U = np.maximum(events.offsets[:-1], latest_U + 1 - questions.release.config.history_limit)
        length_U = latest_U + 1 - start_U
        offsets = np.concatenate([[0], np.cumsum(length_U)])
        index = np.arange(int(offsets[-1])) + np.repeat(start_U - offsets[:-1], length_U)
        rate_U = daily_rates(events.time_us_T[index], offsets, _refresh_us(questions, day))
        made.append(Refresh(day, latest_U, rate_U))
    return made


def _new_users(questions: Questions, before: Refresh, now: Refresh) -> Any:
    first_U = questions.events.offsets[:-1]
    return (before.latest_U < first_U) & (now.latest_U >= first_U)


def play(
    questions: Questions,
    refreshes: Sequence[Refresh],
    policy: str,
    share: float,
    gains: GainTable,
    target_B: Ints,
    day_B: Ints,
) -> tuple[Ints, list[int]]:
    """Days under one policy: the cut of each request's state, and how many users each refresh after the first renewed.

    target_B: i64 [B], events asked for; day_B: the refresh that serves each. Users renewed had a state before.
    """
    events = questions.events
    first_U, limit = events.offsets[:-1], questions.release.config.history_limit
    user_B = questions.users_of(target_B)
    rng = np.random.default_rng([questions.seed, 6])
    cut_U = refreshes[0].latest_U.copy()
    cut_B = np.empty(len(target_B), np.int64)
    before_U = cut_U
    renewed = []
    for refresh in refreshes:
        latest_U = refresh.latest_U
        changed = int(np.count_nonzero((latest_U > before_U) & (before_U >= first_U)))
        cut_U = np.where(cut_U < first_U, latest_U, cut_U)
        user = np.flatnonzero(latest_U > cut_U)
        length = np.minimum(latest_U[user] + 1 - first_U[user], limit)
        new = np.minimum(latest_U[user] - cut_U[user], length)
        if policy == "expected_gain":
            score = refresh.rate_U[user] * gains.gains(new, np.maximum(length - new, 1))
        elif policy == "most_new_events":
            score = new.astype(np.float64)
        elif policy == "longest_stale":
            score = -events.time_us_T[cut_U[user] + 1].astype(np.float64)
        else:
            score = rng.random(len(user))
        chosen = user[best(score, new, RefreshBudget(share=share).of(changed))]
        cut_U[chosen] = latest_U[chosen]
        before_U = latest_U
        asked = day_B == refresh.day
        cut_B[asked] = np.minimum(cut_U[user_B[asked]], target_B[asked] - 1)
        renewed.append(len(chosen))
    return cut_B, renewed[1:]


def measure_gains(questions: Questions, day: int) -> GainTable:
    """The gain table of a day's requests: the state of its refresh against those of one to three refreshes before."""
    events = questions.events
    from_us, until_us = (_refresh_us(questions, d) for d in (day, day + 1))
    inside_T = (events.time_us_T >= from_us) & (events.time_us_T < until_us)
    target_B = np.flatnonzero(events.positive_T & inside_T)
    limit = len(questions.test.target_B)
    if len(target_B) > limit:
        target_B = np.sort(np.random.default_rng([questions.seed, 7]).choice(target_B, limit, replace=False))
    user_B = questions.users_of(target_B)
    first_B = events.offsets[user_B]
    fresh_B = np.minimum(_latest(questions, day)[user_B], target_B - 1)
    fresh = questions.hits(target_B, fresh_B)["context"] if len(target_B) else np.empty(0)
    news, knowns, gained = [], [], []
    for days in _OLDER_DAYS:
        old_B = _latest(questions, day - days)[user_B]
        asked = (old_B >= first_B) & (old_B < fresh_B)
        if not asked.any():
            continue
        new = fresh_B[asked] - old_B[asked]
        length = np.minimum(fresh_B[asked] + 1 - first_B[asked], questions.release.config.history_limit)
        news.append(np.minimum(new, length))
        knowns.append(np.maximum(length - new, 1))
        gained.append(fresh[asked] - questions.hits(target_B[asked], old_B[asked])["context"])
    none = np.empty(0, np.int64)
    return GainTable.estimate(
        np.concatenate([none, *news]), np.concatenate([none, *knowns]), np.concatenate([np.empty(0), *gained]),
        study_name(questions.release.manifest.release_id),
    )  # fmt: skip


def _hits(questions: Questions, target_B: Ints, cut_AB: Ints) -> dict[str, Floats]:
    """Hits of every arm [B, A], with and without context; a request with equal states under two arms is asked once."""
    span = len(questions.events.item_T) + 1
    key_AB = np.arange(len(target_B)) * span + cut_AB + 1
    keys, place = np.unique(key_AB.reshape(-1), return_inverse=True)
    found = questions.hits(target_B[keys // span], keys % span - 1)
    return {arm: hit[place].reshape(cut_AB.shape).T for arm, hit in found.items()}


def _figures(
    questions: Questions,
    target_B: Ints,
    arms: Sequence[tuple[str, float]],
    renewed: Sequence[Sequence[int]],
    hits: Mapping[str, Floats],
) -> list[dict[str, Any]]:
    """Each arm's Recall, users renewed a day, the share of what renewing all gains over renewing nobody, and the gain
    over as many users drawn at random."""
    means = {arm: questions.resampled(hit_BA, target_B) for arm, hit_BA in hits.items()}
    found = []
    for a, (policy, share) in enumerate(arms):
        captured, over_random = {}, {}
        by_chance = arms.index(("random", share)) if policy in POLICIES else None
        for arm, hit_BA in hits.items():
            mean_A, mean_RA = hit_BA.mean(0), means[arm]
            if by_chance is not None:
                over_random[arm] = summary(mean_A[a] - mean_A[by_chance], mean_RA[:, a] - mean_RA[:, by_chance])
            captured[arm] = ratio(
                mean_A[a] - mean_A[0], mean_A[-1] - mean_A[0],
                mean_RA[:, a] - mean_RA[:, 0], mean_RA[:, -1] - mean_RA[:, 0],
            )  # fmt: skip
        found.append(
            {
                "policy": policy,
                "budget": share,
                "renewed_a_day": round(float(np.mean(renewed[a])), 1),
                "recall": {arm: summary(hits[arm][:, a].mean(), means[arm][:, a]) for arm in hits},
                "captured": captured,
                "over_random": over_random or None,
            }
        )
    return found


def show(study: Mapping[str, Any]) -> str:
    """The study as a table for a terminal."""
    days = study["days"]
    lines = [
        f"{study['dataset']}, release {study['release']['release_id']}: Recall@{study['k']} by whom a refresh budget "
        f"renews; {study['requests']:,} requests of {study['users']:,} users with a state in {days['test']} test "
        f"day(s) after {days['warm_up']} days under the policy; {study['affected_share']:.1%} of the requests have "
        f"another state when all are renewed than when nobody is; intervals: {study['interval']}",
        f"budget: share of the users with a state and events new that day; {study['new_users_a_day']:,.0f} users a day "
        "without a state are encoded besides",
        "",
        f"  {'policy':18}{'budget':>7}{'renewed a day':>15}{'with context':>29}{'without':>29}{'of the gain':>22}",
    ]
    for arm in study["arms"]:
        recall = "".join(f"{figure(arm['recall'][name]):>29}" for name in ("context", "no_context"))
        captured = figure(arm["captured"]["context"], percent=True)
        name = arm["policy"].replace("_", " ")
        lines.append(f"  {name:18}{arm['budget']:7.0%}{arm['renewed_a_day']:15,.0f}{recall}{captured:>22}")
    table = study["table"]
    lines += ["", "gain a request of renewing, by new events (rows) and events known (columns)"]
    lines.append(f"  {'from':>6}" + "".join(f"{known:10}" for known in table["known_from"]))
    lines += [
        f"  {new:6}" + "".join(f"{value:10.4f}" for value in row)
        for new, row in zip(table["new_from"], table["gain"], strict=True)
    ]
    return "\n".join([*lines, f"expected gain: {study['formula']}"])
