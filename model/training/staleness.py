"""What the age of a state costs: Recall@K with states of the history up to some hours before each request.

Legend: B requests, P ages, R resamples.

The state of age a is the encoder on the history up to t - a; with request context, the events since then come through
the context layer, up to session_limit of them. The requests are those of users with any event before them; a user
without an event before t - a has the cold state. Beside the ages: `daily`, the state that the last refresh at or before
the request left (what serving has), and `never`, the cold state for all.

Of what an age costs without context, the context wins back

    1 - (C_0 - C_a) / (N_0 - N_a),   C_a, N_a: Recall with and without context at age a.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.errors import ConfigError
from model.training.data import Ints
from model.training.requests import Floats, Questions, figure, last_event_until, ratio, summary

AGES_H = (0.0, 1.0, 6.0, 24.0, 48.0, 72.0)
ARMS = ("context", "no_context")
SEGMENTS = ("all", "low activity", "middle activity", "high activity", "item unseen")
_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US


def staleness_study(
    release: Any,
    table: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    *,
    ages_h: Sequence[float] = AGES_H,
    at_refresh: bool = False,
    **asked: Any,
) -> dict[str, Any]:
    """Recall@K by age of the state, with and without context, in all and by activity of the user.

    ages_h: hours, rising from 0. at_refresh: a state of age a is that of the last daily refresh at or before t - a.
    asked: as Questions.read takes it. Activity: terciles, over the test's users, of their events in the training part.
    Raises DataError or ConfigError.
    """
    if not ages_h or ages_h[0] != 0 or any(a >= b for a, b in itertools.pairwise(ages_h)):
        raise ConfigError(f"ages must rise from 0 h, got {list(ages_h)}")
    questions = Questions.read(release, table, items, users, **asked)
    events, test = questions.events, questions.test
    first_B = events.offsets[questions.users_of(test.target_B)]
    has_past_B = test.target_B > first_B
    target_B = test.target_B[has_past_B]
    study = questions.header("staleness", target_B)
    cuts = _cuts(questions, target_B, ages_h, at_refresh)
    hit_PB: dict[str, list[Floats]] = {arm: [] for arm in ARMS}
    points = []
    for name, (age_h, cut_B) in cuts.items():
        found = questions.hits(target_B, cut_B)
        for arm in ARMS:
            hit_PB[arm].append(found[arm])
        cold_B = cut_B < first_B[has_past_B]
        since_B = target_B - np.maximum(cut_B + 1, first_B[has_past_B])
        points.append(
            {
                "name": name,
                "age_h": age_h,
                "cold_share": round(float(cold_B.mean()), 6),
                "events_since": round(float(since_B.mean()), 4),
                "session_full_share": round(float((since_B > release.config.session_limit).mean()), 6),
            }
        )
    segments = {}
    for name, (mask_B, bounds) in _segments(questions, target_B, test.seen_item_B[has_past_B]).items():
        if mask_B.any():
            hits = {arm: np.stack(hit_PB[arm], 1)[mask_B] for arm in ARMS}
            segments[name] = {"events": bounds, **_segment(questions, target_B[mask_B], hits)}
    return study | {
        "cut": "daily" if at_refresh else "exact",
        "session_limit": release.config.session_limit,
        "points": points,
        "segments": segments,
        "cold_start": _first_requests(questions, test.target_B[~has_past_B], test.seen_item_B[~has_past_B]),
    }


def cut_at_age(questions: Questions, target_B: Ints, age_us: int, *, at_refresh: bool = False) -> Ints:
    """Last event of each request's user at or before the request's time less age_us, before the request itself.

    at_refresh: at or before the last daily refresh by then. One below the user's first event where there is none.
    """
    events = questions.events
    until_us_B = events.time_us_T[target_B] - age_us
    if at_refresh:
        offset_us = questions.description.refresh_offset_us
        until_us_B = (until_us_B - offset_us) // _DAY_US * _DAY_US + offset_us
    return last_event_until(events.time_us_T, events.offsets[events.user_T[target_B]], target_B, until_us_B)


def _cuts(
    questions: Questions, target_B: Ints, ages_h: Sequence[float], at_refresh: bool
) -> dict[str, tuple[float | None, Ints]]:
    """Age in hours, where it has one, and cuts, by the point's name."""
    cuts: dict[str, tuple[float | None, Ints]] = {
        f"{age:g} h": (age, cut_at_age(questions, target_B, int(age * _HOUR_US), at_refresh=at_refresh))
        for age in ages_h
    }
    if not at_refresh:
        cuts["daily"] = (None, questions.events.refresh_cut_T[target_B])
    cuts["never"] = (None, questions.events.offsets[questions.users_of(target_B)] - 1)
    return cuts


def _segments(
    questions: Questions, target_B: Ints, seen_item_B: NDArray[np.bool_]
) -> dict[str, tuple[NDArray[np.bool_], list[int] | None]]:
    """Which requests are in each segment, and the least and most training events of its users."""
    user_B = questions.users_of(target_B)
    count_U = np.bincount(questions.events.user_T, questions.test.trained_T, len(questions.events.user_ids))
    count_B = count_U[user_B].astype(np.int64)
    edges = np.quantile(count_U[np.unique(user_B)], [1 / 3, 2 / 3], method="inverted_cdf")
    tercile_B = np.searchsorted(edges, count_B, side="left")
    masks = {"all": np.ones(len(target_B), bool)}
    masks |= {name: tercile_B == place for place, name in enumerate(SEGMENTS[1:4])}
    found: dict[str, tuple[NDArray[np.bool_], list[int] | None]] = {
        name: (mask, [int(count_B[mask].min()), int(count_B[mask].max())] if mask.any() else None)
        for name, mask in masks.items()
    }
    return found | {"item unseen": (~seen_item_B, None)}


def _segment(questions: Questions, target_B: Ints, hits: Mapping[str, Floats]) -> dict[str, Any]:
    """Recall of each point by arm, and what the context wins back. hits: f64 [B, P] by arm."""
    points = hits["context"].shape[1]
    value_BM = np.concatenate([hits[arm] for arm in ARMS], 1)
    means_RM = questions.resampled(value_BM, target_B)
    mean_M = value_BM.mean(0)
    context, none = mean_M[:points], mean_M[points:]
    context_RP, none_RP = means_RM[:, :points], means_RM[:, points:]
    loss, loss_RP = none[0] - none, none_RP[:, :1] - none_RP
    left, left_RP = context[0] - context, context_RP[:, :1] - context_RP
    return {
        "requests": len(target_B),
        "users": len(np.unique(questions.users_of(target_B))),
        "recall": {
            arm: [summary(mean_M[a * points + p], means_RM[:, a * points + p]) for p in range(points)]
            for a, arm in enumerate(ARMS)
        },
        "over_fresh": [
            ratio(context[p], context[0], context_RP[:, p], context_RP[:, 0]) for p in range(points)
        ],
        "won_back": [
            ratio(loss[p] - left[p], loss[p], loss_RP[:, p] - left_RP[:, p], loss_RP[:, p]) for p in range(points)
        ],
    }  # fmt: skip


def _first_requests(questions: Questions, target_B: Ints, seen_item_B: NDArray[np.bool_]) -> dict[str, Any]:
    """Requests of users without any event before them, in all and for items that training saw or did not see."""
    found: dict[str, Any] = {}
    if not len(target_B):
        return found
    hits = questions.hits(target_B, questions.events.offsets[questions.users_of(target_B)] - 1)
    masks = {"all": np.ones(len(target_B), bool), "item seen": seen_item_B, "item unseen": ~seen_item_B}
    for name, mask_B in masks.items():
        if mask_B.any():
            value_BM = np.stack([hits[arm][mask_B] for arm in ARMS], 1)
            means_RM = questions.resampled(value_BM, target_B[mask_B])
            found[name] = {
                "requests": int(mask_B.sum()),
                "recall": {arm: summary(value_BM[:, a].mean(), means_RM[:, a]) for a, arm in enumerate(ARMS)},
            }
    return found


def study_name(release_id: str) -> str:
    """Name of a release's staleness study in the registry."""
    return f"staleness-{release_id}"


def show(study: Mapping[str, Any]) -> str:
    """The study as tables for a terminal."""
    k = study["k"]
    lines = [
        f"{study['dataset']}, release {study['release']['release_id']}: Recall@{k} by the age of the state "
        f"({study['cut']} cut); {study['requests']:,} requests of {study['users']:,} users with any history, "
        f"{study['catalogue']:,} items; intervals: {study['interval']}",
    ]
    for name, found in study["segments"].items():
        bounds = "" if found["events"] is None else ", {} to {} events in the training part".format(*found["events"])
        lines += ["", f"{name}: {found['requests']:,} requests of {found['users']:,} users{bounds}"]
        lines.append(f"  {'age':8}{'with context':>29}{'without':>29}{'won back by context':>24}")
        for p, point in enumerate(study["points"]):
            recall = [figure(found["recall"][arm][p]) for arm in ARMS]
            won = figure(found["won_back"][p], percent=True)
            lines.append(f"  {point['name']:8}{recall[0]:>29}{recall[1]:>29}{won:>24}")
    more = f"more than {study['session_limit']}"
    lines += ["", f"  {'age':8}{'cold state':>12}{'events since':>14}{more:>14}"]
    lines += [
        f"  {point['name']:8}{point['cold_share']:12.1%}{point['events_since']:14.2f}"
        f"{point['session_full_share']:14.1%}"
        for point in study["points"]
    ]
    if study["cold_start"]:
        lines += ["", "users without any history: with context, without"]
        lines += [
            f"  {name:12}{found['requests']:>9,} requests"
            + "".join(f"{figure(found['recall'][arm]):>29}" for arm in ARMS)
            for name, found in study["cold_start"].items()
        ]
    return "\n".join(lines)
