"""tower-evaluate: what releases are worth on the test part of a log, beside popularity and mixed with each other.

Every test event is asked as a request just before it and ranked among the whole catalogue. A time split cuts the
state at the last daily refresh before the event and gives the events since then as session; leave-one-out asks each
user's last positive event from the state after all before it.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.context_head import ContextHead
from model.dataset import DatasetDescription
from model.encoder import Encoder
from model.errors import CheckpointError, ConfigError, DataError, TowerError
from model.event_log import read_items, read_log, read_users
from model.features import ContextFeatures
from model.item_tower import ItemTower
from model.live_items import HIDDEN, LiveCounts, LiveItems, LiveRequests, catalogue_logits, time_chunks
from model.metrics import Estimate, bootstrap_means, event_metrics, rank_catalogue, ranks_of
from model.release import Registry, Release
from model.retrieval.scalars import CatalogueScalars, counting_config
from model.retrieval.scorer import ScorerConfig
from model.state_codec import StateCodec, as_stored
from model.training.data import (
    EventArrays,
    Ints,
    absent_contexts,
    available_from,
    history_batches,
    last_positives,
    training_part,
)

log = logging.getLogger(__name__)

REPORT_FORMAT = 1
SLICES = ("all", "item_seen", "item_unseen", "user_with_history", "user_without_history")
_HOUR_US = 3_600_000_000


def embed_requests(
    encoder: Encoder,
    head: ContextHead,
    item_IE: torch.Tensor,
    events: EventArrays,
    target_B: Ints,
    cut_B: Ints,
    *,
    with_context: bool = True,
    batch: int = 8192,
) -> torch.Tensor:
    """User embeddings of requests just before given events: f32 [B, E], L2-normalised, on the head's device.

    encoder, head: in evaluation mode, on one device. item_IE: f32 [I, E], the item tower's rows.
    target_B: i64 [B], events asked for. cut_B: i64 [B], last event each state has seen; below the user's first event
    for a cold start. with_context: False gives the same states and no context at all.
    """
    state_QD, row_B = encode_requests(encoder, events, target_B, cut_B, batch=batch)
    return answer_requests(
        head, item_IE, events, target_B, cut_B, state_QD, row_B, with_context=with_context, batch=batch
    )  # fmt: skip


@torch.inference_mode()
def encode_requests(
    encoder: Encoder, events: EventArrays, target_B: Ints, cut_B: Ints, *, batch: int = 8192
) -> tuple[torch.Tensor, Ints]:
    """The states that requests need, each once: f32 [Q, D] on the encoder's device, and the row of each request.

    They are as serving reads them: rounded by the codec of the encoder's config.

    target_B, cut_B: as in embed_requests. The row is -1 for a cold start.
    """
    device = encoder.norm.weight.device
    cold_B = cut_B < events.offsets[events.user_T[target_B]]
    distinct_Q, state_of_B = np.unique(cut_B[~cold_B], return_inverse=True)
    state_QD = torch.empty(len(distinct_Q), encoder.config.state_width, device=device)
    for index, histories in history_batches(distinct_Q, events, encoder.config.history_limit, 4 * batch):
        state_QD[torch.from_numpy(index).to(device)] = encoder.states(histories.to(device))
    if (codec := StateCodec.of(encoder.config)) is not None:
        state_QD = torch.from_numpy(as_stored(codec, state_QD.cpu().numpy())).to(device)
    row_B = np.full(len(target_B), -1)
    row_B[~cold_B] = state_of_B
    return state_QD, row_B


def answer_requests(
    head: ContextHead,
    item_IE: torch.Tensor,
    events: EventArrays,
    target_B: Ints,
    cut_B: Ints,
    state_QD: torch.Tensor,
    row_B: Ints,
    *,
    with_context: bool = True,
    batch: int = 8192,
) -> torch.Tensor:
    """User embeddings from given states: f32 [B, E], L2-normalised.

    state_QD: f32 [Q, D]. row_B: i64 [B], the state of each request, -1 for the cold state.
    The rest is as in embed_requests.
    """

    def contexts(part: slice) -> ContextFeatures:
        return events.contexts(target_B[part], cut_B[part], head.config)

    return answer_contexts(head, item_IE, state_QD, row_B, contexts if with_context else None, batch=batch)


@torch.inference_mode()
def answer_contexts(
    head: ContextHead,
    item_IE: torch.Tensor,
    state_QD: torch.Tensor,
    row_B: Ints,
    contexts: Callable[[slice], ContextFeatures] | None,
    *,
    batch: int = 8192,
) -> torch.Tensor:
    """User embeddings from given states and contexts: f32 [B, E], L2-normalised.

    contexts: of a slice of the requests; the age is left out where the state is the cold one. None: no context at all.
    The rest is as in answer_requests.
    """
    config, device = head.config, head.cold_state_D.device
    user_BE = torch.empty(len(row_B), config.embedding_dim + config.live_width, device=device)
    for start in range(0, len(row_B), batch):
        part = slice(start, start + batch)
        row = torch.from_numpy(row_B[part])
        if contexts is None:
            context = absent_contexts(len(row), len(head.column_embeddings), config)
        else:
            context = contexts(part)
            context = replace(context, age_B=context.age_B * (row >= 0))
        row = row.to(device)
        state_BD = head.cold_state_D.expand(len(row), -1).clone()
        state_BD[row >= 0] = state_QD[row[row >= 0]]
        user_BE[part] = head(state_BD, context.to(device), item_IE)
    return user_BE


@dataclass(frozen=True, slots=True)
class TestSet:
    """The requests a test asks."""

    target_B: Ints
    """Events asked for, in log order."""
    cut_B: Ints
    """Last event each state has seen; below the user's first event where there is none."""
    total: int
    """Test events there were before sampling."""
    seen_item_B: NDArray[np.bool_]
    """Whether the item occurred in the training part."""
    history_B: NDArray[np.bool_]
    """Whether the user has a state."""
    trained_T: NDArray[np.bool_]
    """[T], whether training could see the event."""


def make_test_set(
    table: pa.Table, events: EventArrays, description: DatasetDescription, *, limit: int | None, seed: int
) -> TestSet:
    """The test events of a log, by the description's split, at most `limit` of them, drawn with the seed.

    table: the whole log; events: the same as arrays. Raises DataError where the split leaves no test event.
    """
    split = training_part(table, description)
    if split.test_from_us is None:
        last_U = last_positives(events.offsets, events.positive_T)
        target = last_U[last_U >= 0]
        cut = target - 1
        trained_T = (last_U[events.user_T] < 0) | (np.arange(len(events.user_T)) < last_U[events.user_T])
    else:
        first, last = int(events.time_us_T.min()), int(events.time_us_T.max())
        test_from_us, test_until_us = description.evaluation.window_us(first, last)
        inside = (events.time_us_T >= test_from_us) & (events.time_us_T < test_until_us)
        target = np.flatnonzero(events.positive_T & inside)
        cut = events.refresh_cut_T[target]
        trained_T = events.time_us_T < test_from_us
    if not len(target):
        raise DataError("the description's evaluation leaves no positive test event in this log")
    total = len(target)
    if limit is not None and total > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
        target, cut = target[chosen], cut[chosen]
    seen_items = np.unique(events.item_T[trained_T])
    return TestSet(
        target_B=target,
        cut_B=cut,
        total=total,
        seen_item_B=np.isin(events.item_T[target], seen_items),
        history_B=cut >= events.offsets[events.user_T[target]],
        trained_T=trained_T,
    )


@dataclass(frozen=True, slots=True)
class Candidates:
    """Which items of a release's catalogue each request is ranked among."""

    num_items: int
    item_B: Ints
    """Row of the item asked for."""
    time_us_B: Ints
    born_us_N: Ints | None
    """Time before which an item is no candidate; None where nothing is known of it."""
    seen_rows: Ints | None
    """Items of each user's events before the target, packed; None where they stay candidates."""
    seen_offsets: Ints | None

    @classmethod
    def of(
        cls, release: Release, events: EventArrays, items: pa.Table, target_B: Ints, *, exclude_seen: bool
    ) -> "Candidates":
        """events: the log as the release's featuriser reads it. items: as read_items returns them."""
        seen_rows, seen_offsets = seen_items(events, target_B) if exclude_seen else (None, None)
        born_us_N = _born(release, items)
        times = events.time_us_T[target_B]
        return cls(events.num_items, events.item_T[target_B], times, born_us_N, seen_rows, seen_offsets)

    def mask(self, b: int) -> NDArray[np.bool_] | None:
        """Candidates of the b-th request [N]; None for every item."""
        if self.born_us_N is None and self.seen_rows is None:
            return None
        mask_N = np.ones(self.num_items, bool) if self.born_us_N is None else self.born_us_N <= self.time_us_B[b]
        if self.seen_rows is not None and self.seen_offsets is not None:
            rows = self.seen_rows[self.seen_offsets[b] : self.seen_offsets[b + 1]]
            mask_N[rows[(rows < self.num_items) & (rows != self.item_B[b])]] = False
        return mask_N

    def excluded(self, index_B: Ints, device: torch.device, *, with_target: bool = False) -> torch.Tensor:
        """Items that some requests must not be offered because their users had them: bool [B, N].

        The item asked for stays a candidate, unless with_target.
        """
        mask_BN = torch.zeros(len(index_B), self.num_items, dtype=torch.bool, device=device)
        if self.seen_rows is not None and self.seen_offsets is not None:
            start_B = self.seen_offsets[index_B]
            length_B = self.seen_offsets[index_B + 1] - start_B
            row = np.repeat(np.arange(len(index_B)), length_B)
            first_B = np.cumsum(length_B) - length_B
            column = self.seen_rows[np.arange(len(row)) + np.repeat(start_B - first_B, length_B)]
            keep = (column < self.num_items) & (with_target | (column != self.item_B[index_B][row]))
            mask_BN[torch.from_numpy(row[keep]).to(device), torch.from_numpy(column[keep]).to(device)] = True
        return mask_BN

    def ranks(self, user_BE: torch.Tensor, item_IE: torch.Tensor) -> Ints:
        """Ranks of the items asked for, by dot product. item_IE: f32 [I, E], the item tower's rows."""
        return rank_catalogue(
            user_BE,
            item_IE[: self.num_items],
            torch.from_numpy(self.item_B),
            available_from_us_N=None if self.born_us_N is None else torch.from_numpy(self.born_us_N),
            time_us_B=torch.from_numpy(self.time_us_B),
            seen_rows=None if self.seen_rows is None else torch.from_numpy(self.seen_rows),
            seen_offsets=None if self.seen_offsets is None else torch.from_numpy(self.seen_offsets),
        )


@dataclass(frozen=True, slots=True)
class LiveCatalogue:
    """The static half of what live requests are ranked among."""

    live: LiveItems
    item_NE: torch.Tensor
    is_known_N: torch.Tensor
    temperature: float

    @classmethod
    @torch.inference_mode()
    def of(cls, items: ItemTower, item_IE: torch.Tensor, row_N: torch.Tensor | None = None) -> "LiveCatalogue":
        """item_IE: the tower's table. row_N: how each catalogue item is read; None means by its own row."""
        if items.live is None:
            raise ConfigError("the tower has no live features: its config has no live_windows_h")
        if row_N is None:
            row_N = torch.arange(items.embedder.shape.num_items, device=item_IE.device)
        return cls(items.live, F.embedding(row_N, item_IE), items.is_known(row_N), items.temperature)


@torch.inference_mode()
def rank_live(
    catalogue: LiveCatalogue,
    counts: LiveCounts,
    arms: Mapping[str, tuple[torch.Tensor, LiveRequests]],
    candidates: Candidates,
    *,
    chunk: int | None = None,
) -> dict[str, Ints]:
    """Ranks by the whole score with live features, requests of neighbouring buckets at a time, all arms at once.

    counts: on the catalogue's device. arms: user vectors f32 [B, E + L] and what the live part asks, by name; the same
    requests in every arm. chunk: requests at a time; by default as many as fit 2**26 values at once (2**30 on a GPU).
    """
    item_NE, is_known_N = catalogue.item_NE, catalogue.is_known_N
    num_items, width = item_NE.shape
    device = item_NE.device
    most_values = (2**30 if item_NE.is_cuda else 2**26) // num_items
    most_buckets = max(1, most_values // HIDDEN)
    if chunk is None:
        chunk = max(1, most_values // (len(arms) * catalogue.live.width))
    time_us_B, item_B = (torch.from_numpy(x).to(device) for x in (candidates.time_us_B, candidates.item_B))
    born_N = None if candidates.born_us_N is None else torch.from_numpy(candidates.born_us_N).to(device)
    on_device = [(user.to(device), requests.to(device)) for user, requests in arms.values()]
    rank_AB = torch.empty(len(arms), len(item_B), dtype=torch.int64, device=device)
    for part in time_chunks(counts.bucket(time_us_B).cpu().numpy(), chunk, most_buckets):
        rows = torch.from_numpy(part).to(device)
        excluded_BN = candidates.excluded(part, device)
        if born_N is not None:
            excluded_BN |= born_N > time_us_B[rows][:, None]
        user_bV = torch.cat([user_BV[rows] for user_BV, _ in on_device]) / catalogue.temperature
        asked = LiveRequests.joined([requests.rows(rows) for _, requests in on_device])
        score_bN = user_bV[:, :width] @ item_NE.T
        score_bN += catalogue_logits(catalogue.live, counts, asked, user_bV[:, width:], is_known_N)
        rank_b = ranks_of(score_bN, item_B[rows].repeat(len(arms)), excluded_BN.repeat(len(arms), 1))
        rank_AB[:, rows] = rank_b.view(len(arms), -1)
    return dict(zip(arms, rank_AB.cpu().numpy(), strict=True))


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""User vectors [B, E] and item features, [N, F] or [B, N, F], to one task's scores, [B, 1, N]: a scorer, its logits."""


@torch.inference_mode()
def scored(
    score: Score, user_BE: torch.Tensor, item_NE: torch.Tensor, candidates: Candidates,
    scalars: CatalogueScalars | None, *, chunk: int | None = None,
) -> Iterator[tuple[Ints, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Scores of the whole catalogue, requests of neighbouring buckets at a time.

    Requests spread over a thousand buckets take no more calls than as many of one.

    user_BE, item_NE: f32 on one device. scalars: on that device; None where the scorer reads none. chunk: requests at a
    time; by default as many as have 2**20 values of features (2**30 on a GPU).
    Yields (requests i64 [b], scores f32 [b, N], excluded bool [b, N]: what is no candidate of each).
    """
    device = item_NE.device
    time_us_B = torch.from_numpy(candidates.time_us_B)
    bucket_B = np.zeros(len(user_BE), np.int64) if scalars is None else scalars.counts.bucket(time_us_B).numpy()
    born_N = None if candidates.born_us_N is None else torch.from_numpy(candidates.born_us_N).to(device)
    if chunk is None:
        chunk = max(1, (2**30 if item_NE.is_cuda else 2**20) // max(item_NE.numel(), 1))
    for part in time_chunks(bucket_B, chunk, chunk):
        feature = item_NE
        if scalars is not None:
            bucket_G, group_b = np.unique(bucket_B[part], return_inverse=True)
            scalar_GNS = scalars.of(bucket_G.tolist())
            if len(bucket_G) == 1:
                feature = torch.cat([item_NE, scalar_GNS[0]], 1)
            else:
                scalar_bNS = scalar_GNS[torch.from_numpy(group_b).to(device)]
                feature = torch.cat([item_NE.expand(len(part), -1, -1), scalar_bNS], 2)
        excluded_bN = candidates.excluded(part, device)
        if born_N is not None:
            excluded_bN |= born_N > time_us_B[part].to(device)[:, None]
        yield part, score(user_BE[torch.from_numpy(part).to(device)], feature)[:, 0], excluded_bN


def catalogue_scalars(events: EventArrays, config: ScorerConfig, release: Release) -> CatalogueScalars | None:
    """The scalars that a scorer reads of a log, on the release's device; None where it reads none."""
    if not config.scalars:
        return None
    counts = events.live_counts(counting_config(config, release.config)).to(release.device)
    return CatalogueScalars(counts, events.num_items)


def rank_scored(
    score: Score, user_BE: torch.Tensor, item_NE: torch.Tensor, candidates: Candidates,
    scalars: CatalogueScalars | None,
) -> Ints:  # fmt: skip
    """Ranks of the items asked for, by a scorer. Inputs as in `scored`."""
    ranks = np.empty(len(user_BE), np.int64)
    for part, score_bN, excluded_bN in scored(score, user_BE, item_NE, candidates, scalars):
        item_b = torch.from_numpy(candidates.item_B[part]).to(item_NE.device)
        ranks[part] = ranks_of(score_bN, item_b, excluded_bN).cpu().numpy()
    return ranks


def popularity_ranks(count_N: Ints, item_B: Ints, candidate: Callable[[int], NDArray[np.bool_] | None]) -> Ints:
    """Ranks when all requests get the items by falling count; ties go to the lower row, as in ranks_of.

    count_N: i64 [N]. item_B: i64 [B]; an item that is no candidate gets rank N + 1.
    candidate: mask [N] of the b-th request, or None for every item.
    """
    ranks = np.empty(len(item_B), np.int64)
    for b, item in enumerate(item_B.tolist()):
        ranks[b] = _count_rank(count_N, item, candidate(b))
    return ranks


def recent_popularity_ranks(
    events: EventArrays,
    item_B: Ints,
    time_us_B: Ints,
    hours: float,
    candidate: Callable[[int], NDArray[np.bool_] | None],
) -> Ints:
    """The same by counts of positive events in the `hours` before each request: t - hours <= time < t.

    The window moves with the request and sees test events that came before it, as a live counter would.
    """
    positive = np.flatnonzero(events.positive_T & (events.item_T < events.num_items))
    positive = positive[np.argsort(events.time_us_T[positive], kind="stable")]
    time_us, item = events.time_us_T[positive], events.item_T[positive]
    entered = np.searchsorted(time_us, time_us_B, side="left")
    left = np.searchsorted(time_us, time_us_B - int(hours * _HOUR_US), side="left")
    count_N = np.zeros(events.num_items, np.int32)
    ranks = np.empty(len(item_B), np.int64)
    low = high = 0
    for b in np.argsort(time_us_B, kind="stable").tolist():
        np.add.at(count_N, item[high : entered[b]], 1)
        np.subtract.at(count_N, item[low : left[b]], 1)
        low, high = int(left[b]), int(entered[b])
        ranks[b] = _count_rank(count_N, int(item_B[b]), candidate(b))
    return ranks


def _count_rank(count_N: NDArray[Any], item: int, candidate_N: NDArray[np.bool_] | None) -> int:
    size = len(count_N)
    if not 0 <= item < size or (candidate_N is not None and not candidate_N[item]):
        return size + 1
    ahead_N = count_N > count_N[item]
    ahead_N[:item] |= count_N[:item] == count_N[item]
    if candidate_N is not None:
        ahead_N &= candidate_N
    return int(np.count_nonzero(ahead_N)) + 1


def evaluate_quality(
    release: Release,
    table: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    *,
    description: DatasetDescription | None = None,
    ks: Sequence[int] = (10, 20, 50),
    recent_hours: float | None = None,
    seen: str = "auto",
    max_test_events: int | None = None,
    seed: int = 0,
    resamples: int = 500,
) -> dict[str, Any]:
    """Full-catalogue quality of a release with and without context, and of popularity, as a plain report.

    A release with a scorer is ranked by the dot product in these arms, and by its scorer, with context, in one more.

    table, items, users: as read_log, read_items and read_users return them. description: None means the release's.
    seen: `exclude` takes the user's earlier items off the candidates, `keep` leaves them, `auto` excludes them where
    fewer than 1 % of the log's events repeat an earlier one of the same user and item.
    recent_hours: window of recent popularity; None means 3 h with a time split, else 7 days.
    max_test_events: a larger test is sampled with the seed. Raises DataError or ConfigError.
    """
    description = description or release.manifest.description
    events = EventArrays.build(table, users, release.featuriser, description)
    test = make_test_set(table, events, description, limit=max_test_events, seed=seed)
    by_time = description.evaluation.split == "time"
    if recent_hours is None:
        recent_hours = 3.0 if by_time else 7 * 24.0
    repeats = repeat_share(events)
    exclude_seen = excludes_seen(seen, repeats)
    candidates = Candidates.of(release, events, items, test.target_B, exclude_seen=exclude_seen)
    item_B, time_us_B = candidates.item_B, candidates.time_us_B
    item_IE = release.items.table()
    ranks: dict[str, Ints] = {}
    users_by_arm = {
        arm: embed_requests(
            release.encoder, release.head, item_IE, events, test.target_B, test.cut_B, with_context=with_context
        )
        for arm, with_context in (("context", True), ("no_context", False))
    }
    if release.config.live_windows_h:
        counts = events.live_counts(release.config)
        requests = events.live_requests(test.target_B, counts, release.config)
        arms = {
            "context": (users_by_arm["context"], requests),
            "no_context": (users_by_arm["no_context"], requests.without_recent()),
        }
        catalogue = LiveCatalogue.of(release.items, item_IE)
        ranks |= rank_live(catalogue, counts.to(release.device), arms, candidates)
    else:
        ranks |= {arm: candidates.ranks(user_BE, item_IE) for arm, user_BE in users_by_arm.items()}
    if (scorer := release.manifest.scorer) is not None:
        ranks["scorer"] = rank_scored(
            release.scorer, users_by_arm["context"], item_IE[: events.num_items], candidates,
            catalogue_scalars(events, scorer, release),
        )  # fmt: skip
    counted = events.item_T[test.trained_T & events.positive_T]
    count_N = np.bincount(counted[counted < events.num_items], minlength=events.num_items)
    ranks["popularity"] = popularity_ranks(count_N, item_B, candidates.mask)
    ranks["recent_popularity"] = recent_popularity_ranks(events, item_B, time_us_B, recent_hours, candidates.mask)
    masks = {
        "all": np.ones(len(item_B), bool),
        "item_seen": test.seen_item_B,
        "item_unseen": ~test.seen_item_B,
        "user_with_history": test.history_B,
        "user_without_history": ~test.history_B,
    }
    user_B = events.user_T[test.target_B]
    return {
        "format": REPORT_FORMAT,
        "dataset": description.name,
        "release_id": release.manifest.release_id,
        "state_version": release.manifest.state_version,
        "embedding_version": release.manifest.embedding_version,
        "split": description.evaluation.to_dict(),
        "k": list(ks),
        "test_events": len(item_B),
        "test_events_total": test.total,
        "sampled": len(item_B) < test.total,
        "seed": seed,
        "catalogue": events.num_items,
        "outside_catalogue": int((item_B >= events.num_items).sum()),
        "recent_hours": recent_hours,
        "seen_items": "excluded" if exclude_seen else "kept",
        "repeat_share": round(repeats, 4),
        "unavailable_items": "kept" if candidates.born_us_N is None else "excluded",
        "interval": "95 %, bootstrap over users",
        "slices": {
            name: {"events": int(mask.sum()), "users": len(np.unique(user_B[mask]))} for name, mask in masks.items()
        },
        "arms": {
            arm: {
                name: {
                    metric: asdict(estimate)
                    for metric, estimate in _estimates(rank_B[mask], user_B[mask], ks, resamples, seed).items()
                }
                for name, mask in masks.items()
                if mask.any()
            }
            for arm, rank_B in ranks.items()
        },
    }


def _estimates(rank_B: Ints, user_B: Ints, ks: Sequence[int], resamples: int, seed: int) -> dict[str, Estimate]:
    return bootstrap_means(event_metrics(rank_B, ks), user_B, resamples=resamples, seed=seed)


def excludes_seen(seen: str, repeats: float) -> bool:
    """Whether the user's earlier items are no candidates. seen: see evaluate_quality. Raises ConfigError."""
    if seen not in ("auto", "exclude", "keep"):
        raise ConfigError(f"seen must be auto, exclude or keep, got {seen!r}")
    return seen == "exclude" or (seen == "auto" and repeats < 0.01)


def refuse_live(releases: Sequence[Release]) -> None:
    """Raises ConfigError for a release that scores live item features: only `quality` ranks by them so far."""
    for release in releases:
        if release.config.live_windows_h:
            raise ConfigError(
                f"release {release.manifest.release_id} scores live item features; studies take releases without them"
            )


def repeat_share(events: EventArrays) -> float:
    """Share of events whose user had the same item before."""
    count = len(events.item_T)
    pairs = np.unique(events.user_T * (int(events.item_T.max(initial=0)) + 1) + events.item_T)
    return 1.0 - len(pairs) / max(count, 1)


def seen_items(events: EventArrays, target_B: Ints) -> tuple[Ints, Ints]:
    """Items of each user's events before the target, packed: rows and offsets [B + 1]."""
    start_B = events.offsets[events.user_T[target_B]]
    length_B = target_B - start_B
    offsets = np.concatenate([[0], np.cumsum(length_B)])
    index = np.arange(int(offsets[-1])) + np.repeat(start_B - offsets[:-1], length_B)
    return events.item_T[index], offsets


def _born(release: Release, items: pa.Table) -> Ints | None:
    """available_from of the release's catalogue, in its row order; items the table lacks are always available."""
    born = available_from(items)
    if born is None:
        return None
    row_N = pc.index_in(release.featuriser.item_ids, value_set=items["item_id"].combine_chunks())
    row_N = row_N.fill_null(-1).to_numpy().astype(np.int64)
    return np.where(row_N < 0, np.iinfo(np.int64).min, born[row_N])


def show(report: Mapping[str, Any]) -> str:
    """The report as a table for a terminal."""
    metrics = [*(f"recall@{k}" for k in report["k"]), *(f"ndcg@{k}" for k in report["k"]), "mrr"]
    names = {
        "context": "tower, with context",
        **({"scorer": "scorer, with context"} if "scorer" in report["arms"] else {}),
        "no_context": "tower, no context",
        "popularity": "popularity, all time",
        "recent_popularity": f"popularity, last {report['recent_hours']:g} h",
    }
    lines = [
        f"{report['dataset']}, release {report['release_id']}, split {report['split']['split']}",
        f"{report['test_events']:,} test events"
        + (f" of {report['test_events_total']:,}, sampled with seed {report['seed']}" if report["sampled"] else "")
        + f"; ranked among {report['catalogue']:,} items; seen items {report['seen_items']}"
        + f", items not yet available {report['unavailable_items']}",
    ]
    if report["outside_catalogue"]:
        lines.append(f"{report['outside_catalogue']:,} test events ask for items outside the catalogue and are misses")
    for name in SLICES:
        size = report["slices"][name]
        lines.append("")
        lines.append(f"{name.replace('_', ' ')}: {size['events']:,} events of {size['users']:,} users")
        if not size["events"]:
            continue
        lines.append(f"  {'':26}" + "".join(f"{metric:>11}" for metric in metrics))
        for arm, title in names.items():
            found = report["arms"][arm][name]
            lines.append(f"  {title:26}" + "".join(f"{found[metric]['value']:11.4f}" for metric in metrics))
        main = f"recall@{report['k'][-1] if 20 not in report['k'] else 20}"
        spans = [
            f"{title} {found[main]['low']:.4f} to {found[main]['high']:.4f}"
            for arm, title in names.items()
            if not math.isnan((found := report["arms"][arm][name])[main]["low"])
        ]
        lines.append(f"  {main}, {report['interval']}: " + "; ".join(spans))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """tower-evaluate. Returns 0, or 1 with a message when something is wrong with the input."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report, text = _COMMANDS[args.command](args)
    except TowerError as error:
        print(f"tower-evaluate: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tower-evaluate", description="Measure releases on the test part of a log.")
    commands = parser.add_subparsers(dest="command", required=True)

    quality = commands.add_parser("quality", help="full-catalogue Recall, NDCG and MRR beside popularity")
    _add_test_arguments(quality)
    quality.add_argument("--release", help="release id, or 'serving' (default: the newest release)")
    quality.add_argument("--k", type=int, nargs="+", default=[10, 20, 50])
    quality.add_argument("--recent-hours", type=float, help="window of recent popularity (3; 168 for leave-one-out)")

    skew = commands.add_parser("skew", help="Recall@K where encoder, head and item index are of different releases")
    _add_test_arguments(skew)
    skew.add_argument(
        "--family", choices=("run", "seeds"), default="run", help="checkpoints of one run, or the last of every run"
    )  # fmt: skip
    skew.add_argument("--release", help="any release of the run (default: the newest release)")
    skew.add_argument("--k", type=int, default=20)
    skew.add_argument("--plot", type=Path, help="draw heat maps, .svg or .png; needs matplotlib")

    bridge = commands.add_parser("bridge", help="fit and measure a map from one release's states to another's")
    _add_test_arguments(bridge)
    bridge.add_argument("--from", dest="from_release", required=True, help="release id of the old states")
    bridge.add_argument("--to", dest="to_release", required=True, help="release id of the new states")
    bridge.add_argument("--k", type=int, default=20)
    bridge.add_argument("--held-out", type=float, default=0.5, help="share of the test's users that measure the bridge")
    bridge.add_argument("--max-fit-users", type=int, default=50_000)
    bridge.add_argument("--plot", type=Path, help="draw Recall by the share backfilled, .svg or .png; needs matplotlib")

    staleness = commands.add_parser("staleness", help="Recall@K against the age of the state, by activity of the user")
    _add_release_study(staleness, "draw Recall by age, a panel a segment")
    staleness.add_argument("--ages", type=float, nargs="+", metavar="HOURS", help="rising from 0 (0 1 6 24 48 72)")
    staleness.add_argument(
        "--at-refresh", action="store_true", help="cut each state at the last daily refresh at or before its age"
    )

    audit = commands.add_parser("context-audit", help="true, shuffled and absent context, with and without history")
    _add_release_study(audit, "draw Recall of every context and history")

    refresh = commands.add_parser("refresh-budget", help="whom to renew when the encoder may not renew all, by policy")
    _add_release_study(refresh, "draw Recall by budget, a line a policy")
    refresh.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="of the users with a state and events new that day (0.05 0.1 0.25 0.5; none and all are added)",
    )
    refresh.add_argument("--warm-up-days", type=int, help="refreshes under the policy before the test (4)")
    return parser


def _add_release_study(parser: argparse.ArgumentParser, plot: str) -> None:
    _add_test_arguments(parser)
    parser.add_argument("--release", help="release id, or 'serving' (default: the newest release)")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--plot", type=Path, help=f"{plot}, .svg or .png; needs matplotlib")


def _add_test_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--registry", required=True)
    parser.add_argument("--events", required=True, help="Parquet file or folder")
    parser.add_argument("--items", required=True)
    parser.add_argument("--users")
    parser.add_argument("--dataset", help="dataset description; default: the release's own")
    parser.add_argument("--seen", choices=("auto", "exclude", "keep"), default="auto", help="the user's earlier items")
    parser.add_argument("--max-test-events", type=int, help="sample a larger test down to so many events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the report as JSON")


def _test_inputs(args: argparse.Namespace, release: Release) -> dict[str, Any]:
    """What every measure of a log takes, as the command line gives it."""
    from model.dataset import load_description

    description = release.manifest.description if args.dataset is None else load_description(args.dataset)
    if description.user_columns and args.users is None:
        raise DataError(f"the description declares user columns {list(description.user_columns)}; give --users")
    table, _ = read_log(args.events, description)
    return {
        "table": table,
        "items": read_items(args.items, description),
        "users": None if args.users is None else read_users(args.users, description),
        "description": description,
        "seen": args.seen,
        "max_test_events": args.max_test_events,
        "seed": args.seed,
        "resamples": args.resamples,
    }


def _release_named(args: argparse.Namespace) -> Release:
    """The release that --release names, all parts loaded."""
    registry = Registry(args.registry)
    release_id = args.release
    if release_id is None:
        if not (there := registry.releases()):
            raise DataError(f"no release in {args.registry}")
        release_id = there[-1]
    elif release_id == "serving":
        release_id = registry.pointer().serving
        if release_id is None:
            raise DataError(f"nothing serves in {args.registry}")
    return registry.load(release_id, device=args.device)


def _quality(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    release = _release_named(args)
    report = evaluate_quality(
        release, ks=sorted(set(args.k)), recent_hours=args.recent_hours, **_test_inputs(args, release)
    )
    return report, show(report)


def _skew(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from model.skew import keep_study
    from model.skew import show as show_skew
    from model.training.plots import draw_skew, plotting
    from model.training.skew import family, skew_study

    if args.plot is not None:
        plotting()  # refused before the work, not after it
    registry = Registry(args.registry)
    releases = [registry.load(name, device=args.device) for name in family(registry, args.family, args.release)]
    study = skew_study(releases, k=args.k, **_test_inputs(args, releases[-1]))
    kept = keep_study(registry, study)
    if args.plot is not None:
        draw_skew(study, args.plot)
    return study, f"{show_skew(study)}\nstudies {', '.join(kept)}"


def _bridge(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from model.bridge import bridge_folder
    from model.training.bridge import bridge_study, keep_bridge
    from model.training.bridge import show as show_bridge
    from model.training.plots import draw_bridge, plotting

    if args.plot is not None:
        plotting()
    registry = Registry(args.registry)
    old, new = (registry.load(name, device=args.device) for name in (args.from_release, args.to_release))
    folder = bridge_folder(old.manifest.state_version, new.manifest.state_version)
    if registry.get(f"{folder}/manifest.json") is not None:
        raise CheckpointError(f"{folder} is already in {args.registry}; a bridge never changes")
    bridge, study = bridge_study(
        old, new, k=args.k, held_out=args.held_out, max_fit_users=args.max_fit_users, **_test_inputs(args, new)
    )
    keep_bridge(registry, bridge, study, old)
    if args.plot is not None:
        draw_bridge(study, args.plot)
    return study, f"{show_bridge(study)}\n{folder}"


def _staleness(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from model.training import plots, staleness

    flags = {"ages_h": args.ages or staleness.AGES_H, "at_refresh": args.at_refresh}
    return _release_study(args, staleness, staleness.staleness_study, plots.draw_staleness, flags)


def _audit(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from model.training import audit, plots

    return _release_study(args, audit, audit.audit_study, plots.draw_audit, {})


def _refresh(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from model.training import plots, refresh

    flags = {
        "budgets": args.budgets or refresh.BUDGETS,
        "warm_up_days": refresh.WARM_UP_DAYS if args.warm_up_days is None else args.warm_up_days,
    }
    return _release_study(args, refresh, refresh.refresh_study, plots.draw_refresh, flags)


def _release_study(
    args: argparse.Namespace,
    module: Any,
    make: Callable[..., dict[str, Any]],
    draw: Callable[[Mapping[str, Any], Path], None],
    flags: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """A study of one release: made, kept in the registry, drawn where that is asked for."""
    from model.training.plots import plotting

    if args.plot is not None:
        plotting()
    release = _release_named(args)
    study = make(release, k=args.k, **flags, **_test_inputs(args, release))
    name = module.study_name(release.manifest.release_id)
    Registry(args.registry).write_study(name, study)
    if args.plot is not None:
        draw(study, args.plot)
    return study, f"{module.show(study)}\nstudy {name}"


_COMMANDS = {
    "quality": _quality,
    "skew": _skew,
    "bridge": _bridge,
    "staleness": _staleness,
    "context-audit": _audit,
    "refresh-budget": _refresh,
}


if __name__ == "__main__":
    sys.exit(main())
