"""Bridges fitted and measured: Recall@K while a new release's states are being filled in, by what answers the others.

Legend: U users, B requests, Q distinct states, X and Y widths of old and new states.

Some users have a state of the new release already (backfilled), the others only one of the old. What may answer those:
the bridge (old state, bridged, new head, new items), the previous release (old state, old head, old items), or the new
release's cold start. Three groups of users that share nobody: one fits, one chooses among fits, one is tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.bridge import Bridge, BridgeManifest, Floats, fit_affine, fit_residual, unexplained, write_bridge
from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError
from model.metrics import Estimate, bootstrap_means, recall_at
from model.release import Registry, Release
from model.training.data import EventArrays, Ints
from model.training.evaluate import (
    Candidates,
    answer_requests,
    encode_requests,
    excludes_seen,
    make_test_set,
    refuse_live,
    repeat_share,
)
from model.training.skew import named, read_arrays

STUDY_FORMAT = 1
ARMS = ("bridge", "previous_release", "cold_start")
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Shares of the users that are backfilled."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_CHOOSING = 0.2  # share of the users not tested that choose among fits

Hits = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Groups:
    """Users by what they are for; no user is in two."""

    fit: Ints
    choose: Ints
    test: Ints


def group_users(
    asked: Ints, known: Ints, *, held_out: float, max_fit_users: int, seed: int
) -> Groups:  # fmt: skip
    """A `held_out` share of the asked users for the test, a fifth of the others to choose, and all else to fit.

    asked: users with a request and a state. known: users with events that training saw.
    Raises DataError or ConfigError.
    """
    if not 0.0 < held_out < 1.0:
        raise ConfigError(f"the held-out share must be between 0 and 1, got {held_out}")
    rng = np.random.default_rng([seed, 2])
    asked = rng.permutation(np.unique(asked))
    tested = round(held_out * len(asked))
    choosing = max(2, round(_CHOOSING * (len(asked) - tested)))
    test, choose = asked[:tested], asked[tested : tested + choosing]
    fit = rng.permutation(np.setdiff1d(known, np.concatenate([test, choose])))[:max_fit_users]
    if not len(test) or len(choose) < 2 or len(fit) < 2:
        raise DataError(f"too few users for a bridge: {len(fit)} to fit, {len(choose)} to choose, {len(test)} to test")
    return Groups(np.sort(fit), np.sort(choose), np.sort(test))


def bridge_study(
    old: Release,
    new: Release,
    table: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    *,
    description: DatasetDescription | None = None,
    k: int = 20,
    seen: str = "auto",
    max_test_events: int | None = None,
    max_fit_users: int = 50_000,
    held_out: float = 0.5,
    seed: int = 0,
    resamples: int = 500,
) -> tuple[Bridge, dict[str, Any]]:
    """Fit a bridge from old states to new ones and measure it on users it has not seen.

    The ridge is the one of least error on the choosing users; the residual network is taken only where the choosing
    users' Recall@K rises with it beyond its interval. The rest is as in evaluate_quality.
    Raises DataError or ConfigError.
    """
    if old.manifest.state_version == new.manifest.state_version:
        raise ConfigError(f"both releases have state version {new.manifest.state_version}: no bridge is needed")
    refuse_live((old, new))
    description = description or new.manifest.description
    old_events, new_events = read_arrays((old, new), table, users, description)
    test = make_test_set(table, new_events, description, limit=max_test_events, seed=seed)
    target_B, cut_B = test.target_B[test.history_B], test.cut_B[test.history_B]
    last_U = _last_trained(new_events, test.trained_T)
    groups = group_users(
        new_events.user_T[target_B], np.flatnonzero(last_U >= 0),
        held_out=held_out, max_fit_users=max_fit_users, seed=seed,
    )  # fmt: skip
    in_study_B = np.isin(new_events.user_T[target_B], np.concatenate([groups.choose, groups.test]))
    target_B, cut_B = target_B[in_study_B], cut_B[in_study_B]
    user_B = new_events.user_T[target_B]

    fit = [_states(r, e, last_U[groups.fit]) for r, e in ((old, old_events), (new, new_events))]
    choosers = groups.choose[last_U[groups.choose] >= 0]
    choose = [_states(r, e, last_U[choosers]) for r, e in ((old, old_events), (new, new_events))]
    affine, ridge = _best_affine(fit, choose)
    residual = fit_residual(affine, *fit, *choose, seed=seed, device=new.device)

    exclude_seen = excludes_seen(seen, repeat_share(new_events))
    old_state_QX, row_B = encode_requests(old.encoder, old_events, target_B, cut_B)
    new_state_QY, _ = encode_requests(new.encoder, new_events, target_B, cut_B)

    def hits(release: Release, events: EventArrays, state_QD: torch.Tensor, state_row_B: Ints) -> Hits:
        assert release.item_table is not None
        candidates = Candidates.of(release, events, items, target_B, exclude_seen=exclude_seen)
        user_BE = answer_requests(release.head, release.item_table, events, target_B, cut_B, state_QD, state_row_B)
        return recall_at(candidates.ranks(user_BE, release.item_table), k)

    def bridged(bridge: Bridge) -> Hits:
        state_QY = torch.from_numpy(bridge.apply(old_state_QX.cpu().numpy())).to(new.device)
        return hits(new, new_events, state_QY, row_B)

    hit_B = {kind: bridged(bridge) for kind, bridge in (("affine", affine), ("residual", residual))}
    choosing_B = np.isin(user_B, groups.choose)
    chosen = bootstrap_means(
        {kind: hit_B[kind][choosing_B] for kind in hit_B}
        | {"gain": (hit_B["residual"] - hit_B["affine"])[choosing_B]},
        user_B[choosing_B], resamples=resamples, seed=seed,
    )  # fmt: skip
    bridge = residual if chosen["gain"].low > 0 else affine
    arm_B = {
        "bridge": hit_B[bridge.kind],
        "previous_release": hits(old, old_events, old_state_QX, row_B),
        "cold_start": hits(new, new_events, new_state_QY, np.full_like(row_B, -1)),
    }
    backfilled_B = hits(new, new_events, new_state_QY, row_B)
    tested_B = ~choosing_B
    found = measure_shares(
        {arm: arm_B[arm][tested_B] for arm in ARMS}, backfilled_B[tested_B], user_B[tested_B],
        resamples=resamples, seed=seed,
    )  # fmt: skip
    study = {
        "format": STUDY_FORMAT,
        "study": "bridge",
        "dataset": description.name,
        "split": description.evaluation.to_dict(),
        "from": named(old.manifest),
        "to": named(new.manifest),
        "k": k,
        "counts": {
            "fit_users": len(groups.fit), "choosing_users": len(groups.choose), "test_users": len(groups.test),
            "test_requests": int(tested_B.sum()),
        },
        "seed": seed,
        "catalogue": new_events.num_items,
        "seen_items": "excluded" if exclude_seen else "kept",
        "interval": "95 %, bootstrap over users",
        "kind": bridge.kind,
        "ridge": ridge,
        "unexplained": {
            "affine": round(unexplained(affine, *choose), 6), "residual": round(unexplained(residual, *choose), 6),
        },
        "choosing": {kind: _rounded(estimate) for kind, estimate in chosen.items()},
        **found,
    }  # fmt: skip
    return bridge, study


def measure_shares(
    arm_B: Mapping[str, Hits], backfilled_B: Hits, user_B: Ints, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Recall of each arm by share backfilled, the bridge's gains where nobody is, and whether both are sure.

    arm_B: f64 [B] for each of ARMS, whether a user not backfilled finds the item. backfilled_B: the same for one that
    is. Users are backfilled in one random order, so a user once backfilled stays so at larger shares.
    """
    users = np.unique(user_B)
    place_U = np.random.default_rng([seed, 3]).permutation(len(users))
    place_B = place_U[np.searchsorted(users, user_B)]
    values = {
        f"{arm} {share}": np.where(place_B < share * len(users), backfilled_B, arm_B[arm])
        for arm in ARMS
        for share in SHARES
    }
    values |= {f"gain over {arm}": arm_B["bridge"] - arm_B[arm] for arm in ARMS[1:]}
    found = bootstrap_means(values, user_B, resamples=resamples, seed=seed)
    gains = {arm: found[f"gain over {arm}"] for arm in ARMS[1:]}
    return {
        "shares": list(SHARES),
        "recall": {arm: [_rounded(found[f"{arm} {share}"]) for share in SHARES] for arm in ARMS},
        "gain": {arm: _rounded(gain) for arm, gain in gains.items()},
        "is_enabled": all(gain.low > 0 for gain in gains.values()),
    }


def _last_trained(events: EventArrays, trained_T: NDArray[np.bool_]) -> Ints:
    """Each user's last event that training saw, -1 where there is none: i64 [U]."""
    last_U = np.full(len(events.user_ids), -1)
    index = np.flatnonzero(trained_T)
    last_U[events.user_T[index]] = index  # of equal users the last index stays
    return last_U


def _states(release: Release, events: EventArrays, last_U: Ints) -> Floats:
    """States after the given events, one a user: f32 [U, D]."""
    state_QD, row_U = encode_requests(release.encoder, events, last_U, last_U)
    states: Floats = state_QD.cpu().numpy()[row_U]
    return states


def _best_affine(fit: Sequence[Floats], choose: Sequence[Floats]) -> tuple[Bridge, float]:
    found = [(fit_affine(fit[0], fit[1], ridge), ridge) for ridge in RIDGES]
    return min(found, key=lambda pair: unexplained(pair[0], choose[0], choose[1]))


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(estimate).items()}


def study_name(from_state_version: str, to_state_version: str) -> str:
    """Name of a bridge's study in the registry."""
    return f"bridge-{from_state_version}-{to_state_version}"


def keep_bridge(registry: Registry, bridge: Bridge, study: Mapping[str, Any], old: Release) -> BridgeManifest:
    """Store a bridge and its study. old: the release it leads from, whose golden users the bridge replays at load.

    Raises CheckpointError where the registry has a bridge between these state versions.
    """
    manifest = write_bridge(
        registry,
        bridge,
        old.golden_users().state_UD,
        from_release=study["from"]["release_id"],
        to_release=study["to"]["release_id"],
        is_enabled=study["is_enabled"],
        study={name: study[name] for name in ("dataset", "k", "ridge", "unexplained", "shares", "recall", "gain")},
        counts=study["counts"],
    )
    registry.write_study(study_name(manifest.from_state_version, manifest.to_state_version), study)
    return manifest


def show(study: Mapping[str, Any]) -> str:
    """The study as a table for a terminal."""
    counts, k = study["counts"], study["k"]
    lines = [
        f"{study['dataset']}, bridge from {study['from']['release_id']} to {study['to']['release_id']}",
        f"{study['kind']}, ridge {study['ridge']:g}, fitted on {counts['fit_users']:,} users",
        f"variance of the new states left unexplained: affine {study['unexplained']['affine']:.4f}, "
        f"residual {study['unexplained']['residual']:.4f}",
        f"Recall@{k} of {counts['test_requests']:,} requests of {counts['test_users']:,} other users, by the share of "
        "users backfilled and what answers the others",
        " " * 18 + "".join(f"{share:>10.0%}" for share in study["shares"]),
    ]
    for arm in ARMS:
        values = study["recall"][arm]
        lines.append(f"{arm.replace('_', ' '):18}" + "".join(f"{found['value']:10.4f}" for found in values))
    gains = "; ".join(
        f"{gain['value']:+.4f} over the {arm.replace('_', ' ')} ({gain['low']:+.4f} to {gain['high']:+.4f})"
        for arm, gain in study["gain"].items()
    )
    lines.append(f"gain of the bridge where nobody is backfilled, {study['interval']}: {gains}")
    lines.append("enabled" if study["is_enabled"] else "off: it does not surely beat both")
    return "\n".join(lines)
