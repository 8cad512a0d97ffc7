"""Skew measured: Recall@K of every triple of encoder, head and item index of a family; model.skew says what it means.

Legend: N releases, B requests, U users, R resamples; axes of a matrix: E encoder, H head, I item index.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError
from model.metrics import recall_at, resampled_means
from model.release import Manifest, Registry, Release
from model.skew import PARTS, Floats, losses, pairs_of, sensitivity
from model.training.data import EventArrays
from model.training.evaluate import (
    Candidates,
    answer_requests,
    encode_requests,
    excludes_seen,
    make_test_set,
    refuse_live,
    repeat_share,
)

STUDY_FORMAT = 1
FAMILIES = ("run", "seeds")


def family(registry: Registry, kind: str, release_id: str | None = None) -> list[str]:
    """Ids of a family in the registry.

    run: all releases of the training run of `release_id` (default: the newest release), by epoch.
    seeds: the last epoch's release of every run, by seed.
    Raises DataError where there are not two, ConfigError for another kind.
    """
    manifests = [registry.manifest(name) for name in registry.releases()]
    if kind == "run":
        if not manifests:
            raise DataError(f"no release in {registry.uri}")
        chosen = manifests[-1] if release_id is None else registry.manifest(release_id)
        if chosen.lineage is None:
            raise DataError(f"release {chosen.release_id} does not say which training run it comes from")
        run = chosen.lineage.run
        found = [m for m in manifests if m.lineage is not None and m.lineage.run == run]
        found.sort(key=lambda m: m.lineage.epoch if m.lineage else 0)
    elif kind == "seeds":
        last: dict[str, Manifest] = {}
        for m in manifests:
            if m.lineage is None:
                continue
            best = last.get(m.lineage.run)
            if best is None or best.lineage is None or best.lineage.epoch <= m.lineage.epoch:
                last[m.lineage.run] = m
        found = sorted(last.values(), key=lambda m: m.lineage.seed if m.lineage else 0)
    else:
        raise ConfigError(f"a family is one of {', '.join(FAMILIES)}, got {kind!r}")
    if len(found) < 2:
        what = "the run of that release" if kind == "run" else "runs"
        raise DataError(
            f"skew is between two releases at least, and {registry.uri} holds {len(found)} of {what}; "
            "tower-train --release-at makes several of one run, --seed independent runs"
        )
    return [m.release_id for m in found]


def read_arrays(
    releases: Sequence[Release], table: pa.Table, users: pa.Table | None, description: DatasetDescription
) -> list[EventArrays]:
    """The log as each release's featuriser reads it; releases of equal vocabularies share one."""
    arrays: dict[str, EventArrays] = {}
    for release in releases:
        vocabulary = release.manifest.fingerprints["vocabularies"]
        if vocabulary not in arrays:
            arrays[vocabulary] = EventArrays.build(table, users, release.featuriser, description)
    return [arrays[release.manifest.fingerprints["vocabularies"]] for release in releases]


def skew_study(
    releases: Sequence[Release],
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
) -> dict[str, Any]:
    """Recall@K of all N^3 triples of encoder, head and item index on the test requests of users with a state.

    releases: all parts loaded, on one device; of one run by epoch, or one of each of several runs.
    The rest is as in evaluate_quality. Raises DataError or ConfigError.
    """
    kind = _kind([release.manifest for release in releases])
    for name in ("d_model", "state_tokens", "embedding_dim"):
        widths = {getattr(release.config, name) for release in releases}
        if len(widths) > 1:
            raise ConfigError(f"parts can be mixed only where {name} is equal, got {sorted(widths)}")
    refuse_live(releases)
    description = description or releases[0].manifest.description
    arrays = read_arrays(releases, table, users, description)
    test = make_test_set(table, arrays[0], description, limit=max_test_events, seed=seed)
    target_B, cut_B = test.target_B[test.history_B], test.cut_B[test.history_B]
    if not len(target_B):
        raise DataError("no user of the test has a state: there is nothing to mix")
    exclude_seen = excludes_seen(seen, repeat_share(arrays[0]))
    tables = [_table(release) for release in releases]
    candidates = [
        Candidates.of(release, events, items, target_B, exclude_seen=exclude_seen)
        for release, events in zip(releases, arrays, strict=True)
    ]
    count = len(releases)
    hit_BM = np.empty((len(target_B), count**3))
    mix = 0
    for encoder, events in zip(releases, arrays, strict=True):
        state_QD, row_B = encode_requests(encoder.encoder, events, target_B, cut_B)
        for h, head in enumerate(releases):
            user_BE = answer_requests(head.head, tables[h], arrays[h], target_B, cut_B, state_QD, row_B)
            for i in range(count):
                hit_BM[:, mix] = recall_at(candidates[i].ranks(user_BE, tables[i]), k)
                mix += 1
    user_B = arrays[0].user_T[target_B]
    return {
        "format": STUDY_FORMAT,
        "study": "skew",
        "dataset": description.name,
        "split": description.evaluation.to_dict(),
        "family": kind,
        "releases": [named(release.manifest) for release in releases],
        "k": k,
        "requests": len(target_B),
        "users": len(np.unique(user_B)),
        "sampled": len(test.target_B) < test.total,
        "seed": seed,
        "catalogue": candidates[0].num_items,
        "seen_items": "excluded" if exclude_seen else "kept",
        "interval": "95 %, bootstrap over users",
        "recall": hit_BM.mean(0).reshape(count, count, count).round(6).tolist(),
        "sensitivity": _sensitivity(hit_BM, user_B, kind, count, resamples, seed),
    }


def _sensitivity(
    hit_BM: Floats, user_B: NDArray[np.int64], kind: str, count: int, resamples: int, seed: int
) -> dict[str, Any]:
    cube, pairs = (count, count, count), pairs_of(kind, count)
    recall_EHI = hit_BM.mean(0).reshape(cube)
    found_P3 = losses(recall_EHI, pairs)
    if np.isnan(found_P3).any():
        raise DataError("two releases of the family find nothing at all: there is no recall to lose")
    means_REHI = resampled_means(hit_BM, user_B, resamples=resamples, seed=seed).reshape(-1, *cube)
    low, high = np.quantile(sensitivity(means_REHI, pairs), [0.025, 0.975])
    return {
        "value": round(float(found_P3.mean()), 6),
        "low": round(float(low), 6),
        "high": round(float(high), 6),
        "by_part": {part: round(float(loss), 6) for part, loss in zip(PARTS, found_P3.mean(0), strict=True)},
        "pairs": [{"pair": list(p), "loss": round(float(x), 6)} for p, x in zip(pairs, found_P3.mean(1), strict=True)],
    }


def _kind(manifests: Sequence[Manifest]) -> str:
    """run or seeds, by the releases' lineage."""
    runs = [m.lineage.run if m.lineage is not None else m.release_id for m in manifests]
    if len(runs) < 2:
        raise ConfigError(f"skew is between two releases at least, got {len(runs)}")
    if len(set(runs)) == 1:
        return "run"
    if len(set(runs)) == len(runs):
        return "seeds"
    raise ConfigError("a family is the checkpoints of one run or one release of each run, not a mixture of the two")


def named(manifest: Manifest) -> dict[str, Any]:
    """What a study says of a release."""
    lineage = manifest.lineage
    return {
        "release_id": manifest.release_id,
        "state_version": manifest.state_version,
        "embedding_version": manifest.embedding_version,
        "run": None if lineage is None else lineage.run,
        "seed": None if lineage is None else lineage.seed,
        "epoch": None if lineage is None else lineage.epoch,
    }


def _table(release: Release) -> torch.Tensor:
    assert release.item_table is not None
    return release.item_table
