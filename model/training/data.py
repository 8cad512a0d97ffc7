"""An event log as arrays, its split into training, validation and test, and the batches of a training step.

Legend: U users, T packed events of the whole log, B targets, S candidates, K session limit, M subject limit,
N catalogue items, I = N + H item rows, W windows of a step.

A target is a positive event j. It is asked from the state after event s < j (the cut), with the events s+1 ... j-1
as session, and the target row's own context. Cuts are made as serving makes them: at the last daily refresh before
the request, or a few events before it. No event before the cut means the cold-start state.

A step is ordered by history: each window is encoded once and all its targets read it. What that brings with it
(negatives of the same user, duplicate candidates, windows that start late) is in docs/architecture.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError
from model.event_log import offsets_of
from model.features import ContextFeatures, EventFeatures, Featuriser, gap_bucket, hour_of, weekday_of
from model.item_tower import ItemEmbedder
from model.live_items import LiveCounts, LiveRequests
from model.losses import log_inclusion
from model.training.settings import TrainSettings

Ints = NDArray[np.int64]
_SECOND_US = 1_000_000
DAY_US = 86_400 * _SECOND_US
_NEVER_US = np.iinfo(np.int64).max
_BATCHES_SORTED = 32  # histories are sorted by length within so many steps' worth, to waste little on padding


@dataclass(frozen=True, slots=True)
class EventArrays:
    """A whole log as features and arrays, users one after another, oldest event first."""

    user_ids: pa.Array
    """[U]"""
    events: EventFeatures
    offsets: Ints
    """[U + 1]"""
    user_T: Ints
    time_us_T: Ints
    item_T: Ints
    """[T], in [0, I); N and above are items outside the catalogue."""
    positive_T: NDArray[np.bool_]
    log_category_TC: NDArray[np.int32]
    """[T, context columns]"""
    user_category_UC: NDArray[np.int32]
    """[U, user columns]"""
    tie_end_T: Ints
    """Last event of the same user and time: a state holds all events of its last instant."""
    refresh_cut_T: Ints
    """Last event the daily refresh before the event has seen; below the user's first event where there is none."""
    num_items: int

    @classmethod
    def build(
        cls, table: pa.Table, users: pa.Table | None, featuriser: Featuriser, description: DatasetDescription
    ) -> "EventArrays":
        """table: canonical events as read_log returns them. users: user_id and the user columns, or None.

        A user that `users` lacks has absent user columns.
        """
        user_ids, offsets = offsets_of(table["user_id"])
        events = featuriser.events(table, offsets)
        time_us_T = events.time_us_T.numpy()
        user_T = np.repeat(np.arange(len(user_ids)), np.diff(offsets))
        context = {name: table[name] for name in description.context_columns}
        count = len(description.context_columns)  # head columns are context columns, then user columns
        user_codes: dict[str, pa.Array] = {}
        if users is not None and description.user_columns:
            row_U = pc.index_in(user_ids, value_set=users["user_id"].combine_chunks())
            user_codes = {name: users[name].combine_chunks().take(row_U) for name in description.user_columns}
        return cls(
            user_ids=user_ids,
            events=events,
            offsets=offsets,
            user_T=user_T,
            time_us_T=time_us_T,
            item_T=events.item_T.numpy(),
            positive_T=pc.is_in(table["event_type"], pa.array(description.positive_types, pa.string())).to_numpy(),
            log_category_TC=featuriser.categories(context, table.num_rows)[:, :count].astype(np.int32),
            user_category_UC=featuriser.categories(user_codes, len(user_ids))[:, count:].astype(np.int32),
            tie_end_T=_tie_ends(user_T, time_us_T),
            refresh_cut_T=_refresh_cuts(user_T, time_us_T, description.refresh_offset_us),
            num_items=featuriser.num_items,
        )

    def contexts(
        self,
        target_B: Ints,
        cut_B: Ints,
        config: TowerConfig,
        subjects: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> ContextFeatures:
        """What a request just before each target event knows, as Featuriser.contexts would say it.

        target_B: i64 [B], events asked for. cut_B: i64 [B], last event the state has seen; below the user's first
        event for a cold start. subjects: item rows and weights, each [B, M]; None means none.
        """
        limit = config.session_limit
        size = len(target_B)
        user_B = self.user_T[target_B]
        cold_B = cut_B < self.offsets[user_B]
        time_us_B = self.time_us_T[target_B]
        first_B = np.maximum(np.where(cold_B, self.offsets[user_B], cut_B + 1), target_B - limit)
        length_B = target_B - first_B
        place_K = np.arange(limit)
        row_R = np.flatnonzero(length_B)  # most requests of a fresh state have no session
        used_RK = place_K < length_B[row_R, None]
        event_RK = np.where(used_RK, first_B[row_R, None] + place_K, 0)
        gap_RK = gap_bucket(time_us_B[row_R, None] - self.time_us_T[event_RK])
        session_3BK = np.zeros((3, size, limit), np.int64)
        for place, value_RK in enumerate((self.item_T[event_RK], self.events.type_T.numpy()[event_RK], gap_RK)):
            session_3BK[place, row_R] = value_RK * used_RK
        age_B = np.where(cold_B, 0, gap_bucket(time_us_B - self.time_us_T[np.maximum(cut_B, 0)]))
        if subjects is None:
            empty = (size, config.subject_limit)
            subjects = torch.zeros(empty, dtype=torch.int64), torch.zeros(empty)
        category_BC = np.concatenate([self.log_category_TC[target_B], self.user_category_UC[user_B]], 1)
        return ContextFeatures(
            category_BC=torch.from_numpy(category_BC.astype(np.int64)),
            hour_B=torch.from_numpy(hour_of(time_us_B)),
            weekday_B=torch.from_numpy(weekday_of(time_us_B)),
            age_B=torch.from_numpy(age_B),
            session_item_BK=torch.from_numpy(session_3BK[0]),
            session_type_BK=torch.from_numpy(session_3BK[1]),
            session_gap_BK=torch.from_numpy(session_3BK[2]),
            session_length_B=torch.from_numpy(length_B),
            subject_item_BM=subjects[0],
            subject_weight_BM=subjects[1],
            query_BQ=torch.zeros(size, config.query_dim),
        )

    def live_counts(self, config: TowerConfig, *, bucket_s: int | None = None) -> LiveCounts:
        """The log's positive events, to be counted as of any time. bucket_s: instead of the config's."""
        index = np.flatnonzero(self.positive_T)
        num_rows = self.num_items + config.hash_rows
        return LiveCounts.build(
            self.user_T[index], self.item_T[index], self.time_us_T[index], num_rows, config, bucket_s=bucket_s
        )

    def live_requests(self, target_B: Ints, counts: LiveCounts, config: TowerConfig) -> LiveRequests:
        """The live part of requests just before given events: their time, and the user's latest items since the last
        refresh, which a caller knows whether the state has seen them or not."""
        limit = max(config.live_recent, config.session_limit)
        event_BK = target_B[:, None] - 1 - np.arange(limit)
        first_B = np.maximum(self.refresh_cut_T[target_B] + 1, self.offsets[self.user_T[target_B]])
        is_there_BK = event_BK >= first_B[:, None]
        event_BK = np.maximum(event_BK, 0)
        gap_BK = (self.time_us_T[target_B][:, None] - self.time_us_T[event_BK]) / _SECOND_US
        return LiveRequests(
            counts.bucket(torch.from_numpy(self.time_us_T[target_B])),
            torch.from_numpy(np.where(is_there_BK, self.item_T[event_BK], -1)),
            torch.from_numpy(np.where(is_there_BK, np.log1p(np.maximum(gap_BK, 0)), 0).astype(np.float32)),
        )

    def first_us(self, num_rows: int) -> Ints:
        """Time of each item row's first event, the largest int64 where there is none: i64 [I]."""
        first_I = np.full(num_rows, np.iinfo(np.int64).max)
        np.minimum.at(first_I, self.item_T, self.time_us_T)
        return first_I

    def as_known_at(self, time_us: int, num_rows: int) -> "EventArrays":
        """The log with every item first seen at or after a time as unknown: row + I, as ItemEmbedder takes it."""
        first_I = self.first_us(num_rows)
        item_T = self.item_T + num_rows * (first_I[self.item_T] >= time_us)
        return replace(self, item_T=item_T, events=replace(self.events, item_T=torch.from_numpy(item_T)))


def absent_contexts(size: int, columns: int, config: TowerConfig) -> ContextFeatures:
    """Requests that know nothing: every part absent."""
    longs = torch.zeros(size, dtype=torch.int64)
    sessions = torch.zeros(size, config.session_limit, dtype=torch.int64)
    return ContextFeatures(
        torch.zeros(size, columns, dtype=torch.int64), longs, longs, longs, sessions, sessions, sessions, longs,
        torch.zeros(size, config.subject_limit, dtype=torch.int64), torch.zeros(size, config.subject_limit),
        torch.zeros(size, config.query_dim),
    )  # fmt: skip


def _tie_ends(user_T: Ints, time_us_T: Ints) -> Ints:
    """Index of the last event with the user and time of each event."""
    count = len(user_T)
    last = np.flatnonzero(np.append((np.diff(user_T) != 0) | (np.diff(time_us_T) != 0), True)) if count else user_T
    return np.repeat(last, np.diff(last, prepend=-1))


def _refresh_cuts(user_T: Ints, time_us_T: Ints, refresh_offset_us: int) -> Ints:
    """Last event before each event that the last refresh at or before the event's time has seen.

    A refresh sees events up to and including its own time. Where it saw none, the value is one below the user's
    first event.
    """
    if not len(user_T):
        return user_T
    refresh_T = (time_us_T - refresh_offset_us) // DAY_US  # number of the last refresh at or before the event
    seen_by_T = -((refresh_offset_us - time_us_T) // DAY_US)  # number of the first refresh at or after the event
    low = int(refresh_T.min())
    span = int(seen_by_T.max()) - low + 2
    key_T = user_T * span + (seen_by_T - low)
    found_T = np.searchsorted(key_T, user_T * span + (refresh_T - low), side="right") - 1
    cut_T: Ints = np.minimum(found_T, np.arange(len(user_T)) - 1)
    return cut_T


@dataclass(frozen=True, slots=True)
class Split:
    """A log divided: what may be learned from, what early stopping looks at, what the test asks."""

    train: pa.Table
    """Canonical events that training may see, in log order."""
    test_from_us: int | None
    """Start of the test; None for leave-one-out."""


def training_part(table: pa.Table, description: DatasetDescription) -> Split:
    """The events training may see.

    time: events before the test window. leave_one_out: each user's events before the last positive one; users with a
    single positive keep their events, since nothing could be asked about them.
    table: canonical events as read_log returns them. Raises DataError where nothing is left.
    """
    time_us = table["timestamp_us"].to_numpy()
    if not len(time_us):
        raise DataError("the event log is empty")
    test_from_us = None
    if description.evaluation.split == "time":
        test_from_us, _ = description.evaluation.window_us(int(time_us.min()), int(time_us.max()))
        keep = time_us < test_from_us
    else:
        _, offsets = offsets_of(table["user_id"])
        last_U = last_positives(offsets, _positive(table, description))
        user_T = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        keep = (last_U[user_T] < 0) | (np.arange(len(user_T)) < last_U[user_T])
    train = table.filter(pa.array(keep)).combine_chunks()
    if not train.num_rows or not _positive(train, description).any():
        raise DataError(
            f"nothing to learn from: of {table.num_rows} events, {train.num_rows} come before the test, none positive"
        )
    return Split(train, test_from_us)


def last_positives(offsets: Ints, positive_T: NDArray[np.bool_]) -> Ints:
    """Index of each user's last positive event where the user has two or more; else -1. i64 [U]."""
    index = np.flatnonzero(positive_T)
    end_U = np.searchsorted(index, offsets[1:])
    count_U = end_U - np.searchsorted(index, offsets[:-1])
    last_U: Ints = np.where(count_U >= 2, index[np.maximum(end_U - 1, 0)] if len(index) else -1, -1)
    return last_U


def _positive(table: pa.Table, description: DatasetDescription) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.is_in(
        table["event_type"], pa.array(description.positive_types, pa.string())
    ).to_numpy()  # fmt: skip
    return found


def cap(table: pa.Table, settings: TrainSettings) -> tuple[pa.Table, list[str]]:
    """The log within max_users and max_events, and what was left out, in words."""
    said = []
    if settings.max_users is not None:
        user_ids, offsets = offsets_of(table["user_id"])
        if len(user_ids) > settings.max_users:
            rng = np.random.default_rng(settings.seed)
            kept_U = np.zeros(len(user_ids), bool)
            kept_U[rng.choice(len(user_ids), settings.max_users, replace=False)] = True
            table = table.filter(pa.array(np.repeat(kept_U, np.diff(offsets))))
            said.append(f"{settings.max_users:,} of {len(user_ids):,} users, drawn with seed {settings.seed}")
    if settings.max_events is not None and table.num_rows > settings.max_events:
        time_us = table["timestamp_us"].to_numpy()
        order = np.argsort(time_us, kind="stable")[-settings.max_events :]
        said.append(f"the latest {settings.max_events:,} of {table.num_rows:,} events")
        table = table.take(pa.array(np.sort(order)))
    return table.combine_chunks(), said


def validation_targets(log: EventArrays, settings: TrainSettings, *, by_time: bool) -> Ints:
    """Events held out of the training targets for early stopping: last positives of a seeded sample of users.

    by_time: the sampled users' positives in the last `validation_hours` of the log; else each one's last positive.
    They stay in nobody's input but their own user's later sessions, and other users' events of the same hours are
    trained on, so the figures serve to stop training, not to forecast the test. Sorted; may be empty.
    """
    positive_T = log.positive_T & (log.item_T < log.num_items)
    if by_time:
        from_us = int(log.time_us_T.max()) - int(settings.validation_hours * 3600 * _SECOND_US)
        pool = np.flatnonzero(positive_T & (log.time_us_T > from_us) & (log.time_us_T > log.time_us_T.min()))
    else:
        last_U = last_positives(log.offsets, positive_T)
        pool = last_U[last_U >= 0]
    users = np.unique(log.user_T[pool])
    count = min(settings.validation_users, int(len(users) * settings.validation_share))
    rng = np.random.default_rng([settings.seed, 1])
    chosen = rng.choice(users, count, replace=False) if count else users[:0]
    return np.sort(pool[np.isin(log.user_T[pool], chosen)])


@dataclass(frozen=True, slots=True)
class Negatives:
    """What a softmax pool is drawn from: the trained items, how often each is a target, and when it was born."""

    trained: Ints
    """Rows of catalogue items that occur in training."""
    share_I: NDArray[np.float64]
    """Share of the training targets that each row is."""
    born_us_I: Ints | None
    """Time before which an item could not be shown; None where no such column is declared."""

    def draw(self, item_B: Ints, settings: TrainSettings, rng: np.random.Generator) -> tuple[Ints, Ints | None]:
        """Candidates of a step, distinct: (rows [S], None) where nothing is corrected, else (rows, counts of draws)."""
        if settings.loss == "gbce":
            return rng.choice(self.trained, min(settings.uniform_negatives, len(self.trained)), replace=False), None
        if len(self.trained) <= settings.full_softmax_items:
            return self.trained, None
        size = min(settings.in_batch_negatives, len(item_B))
        in_batch = item_B if size == len(item_B) else rng.choice(item_B, size, replace=False)
        uniform = self.trained[rng.integers(len(self.trained), size=settings.uniform_negatives)]
        return np.unique(np.concatenate([in_batch, uniform])), np.array([size, len(uniform)])

    def live_rows(self, num_items: int, end_us: int) -> Ints:
        """Rows that uniform negatives are drawn from with live features: items there were when the log ended."""
        return np.arange(num_items) if self.born_us_I is None else np.flatnonzero(self.born_us_I <= end_us)


class SubjectSampler:
    """Pseudo-context: items that share a category with the positive, never the positive itself."""

    def __init__(self, embedder: ItemEmbedder) -> None:
        codes = [
            embedder.get_buffer(f"codes_{name.replace('.', '__')}")[: embedder.shape.num_items].cpu().numpy()
            for name in embedder.shape.category_sizes
        ]
        starts = np.cumsum([0, *embedder.shape.category_sizes.values()])
        # One numbering for the values of all columns; -1 = none. Code 0 is absent, 1 a value too rare to be kept.
        values_NL = [np.where(c >= 2, c + start, -1) for c, start in zip(codes, starts, strict=False)]
        self._value_NL = (
            np.concatenate(values_NL, 1) if values_NL else np.empty((embedder.shape.num_items, 0), np.int64)
        )
        self._value_NL = -np.sort(-self._value_NL, 1)  # an item's values first
        self._count_N = (self._value_NL >= 0).sum(1)
        item, column = np.nonzero(self._value_NL >= 0)
        value = self._value_NL[item, column]
        order = np.argsort(value, kind="stable")
        self._members = item[order]
        self._offsets = np.searchsorted(value[order], np.arange(int(starts[-1]) + 1))

    @property
    def usable(self) -> bool:
        """Whether any item has a category."""
        return len(self._members) > 0

    def draw(
        self, item_B: Ints, share: float, limit: int, rng: np.random.Generator
    ) -> tuple[Ints, NDArray[np.float32]]:
        """Rows and confidences, each [B, M]; a share of the targets gets 1 to M subjects, the others none."""
        row_R = np.flatnonzero((rng.random(len(item_B)) < share) & (item_B < len(self._value_NL)))
        item_R1 = item_B[row_R, None]
        shape = (len(row_R), limit)
        wanted_RM = np.arange(limit) < rng.integers(1, limit + 1, len(row_R))[:, None]
        value_RM = self._value_NL[item_R1, (rng.random(shape) * self._count_N[item_R1]).astype(np.int64)]
        wanted_RM &= value_RM >= 0
        value_RM = np.maximum(value_RM, 0)
        count_RM = self._offsets[value_RM + 1] - self._offsets[value_RM]
        pick_RM = self._offsets[value_RM] + (rng.random(shape) * count_RM).astype(np.int64)
        subject_RM = self._members[np.minimum(pick_RM, len(self._members) - 1)]
        wanted_RM &= subject_RM != item_R1
        subject_BM = np.zeros((len(item_B), limit), np.int64)
        subject_BM[row_R] = subject_RM * wanted_RM
        weight_BM = np.zeros((len(item_B), limit), np.float32)
        weight_BM[row_R] = (1.0 - 0.8 * rng.random(shape)) * wanted_RM
        return subject_BM, weight_BM


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step: histories, and the targets asked of them."""

    events: EventFeatures
    hidden_B: torch.Tensor
    """i64 [B], position of the target's state among the packed events; -1 for a cold start."""
    context: ContextFeatures
    item_B: torch.Tensor
    user_B: torch.Tensor
    """i64 [B], number of the target's history in this step."""
    weight_B: torch.Tensor
    candidate_S: torch.Tensor
    log_q_S: torch.Tensor | None
    time_us_B: torch.Tensor
    born_us_S: torch.Tensor | None
    """i64 [S], time before which a candidate could not be shown; None where no such column is declared."""
    live: LiveRequests | None = None
    """None where the tower has no live features; with them the step's own candidates are not read."""
    log_user_B: torch.Tensor | None = None
    """i64 [B], the target's user in the log."""
    horizon_us_B: torch.Tensor | None = None
    """i64 [B], items first seen at or after it are known by their hash row only."""

    def to(self, device: torch.device) -> "StepBatch":
        """The same step on a device; the copies are queued and waited for by what reads them."""
        if device.type == "cpu":
            return self
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "StepBatch":
        """The same step in page-locked memory, from which a copy to the device does not hold up the host."""
        return _each_tensor(self, lambda tensor: tensor.pin_memory() if tensor.numel() else tensor)


_Batch = TypeVar("_Batch", bound=StepBatch | EventFeatures | ContextFeatures | LiveRequests)


def _each_tensor(batch: _Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> _Batch:
    """The batch with all its tensors changed but the offsets, which the encoder reads on the CPU."""
    changed: dict[str, Any] = {}
    for name in (field.name for field in fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor) and name != "offsets":
            changed[name] = change(value)
        elif isinstance(value, EventFeatures | ContextFeatures | LiveRequests):
            changed[name] = _each_tensor(value, change)
    return replace(batch, **changed)


class TrainingData:
    """Windows of the log cut into steps. Everything random follows from (seed, epoch, step)."""

    def __init__(
        self,
        log: EventArrays,
        held_out: Ints,
        embedder: ItemEmbedder,
        config: TowerConfig,
        settings: TrainSettings,
        born_us_N: Ints | None,
        refresh_offset_us: int = 0,
    ) -> None:
        """held_out: validation targets. born_us_N: see Negatives. Raises DataError where no target is left."""
        self.log, self.config, self.settings = log, config, settings
        self.refresh_offset_us = refresh_offset_us
        self.is_target_T = log.positive_T & (log.item_T < log.num_items)
        self.is_target_T[held_out] = False
        if settings.max_target_users is not None:
            users = np.random.default_rng([settings.seed, 5]).permutation(len(log.user_ids))
            self.is_target_T &= np.isin(log.user_T, users[: settings.max_target_users])
        target = np.flatnonzero(self.is_target_T)
        if not len(target):
            raise DataError("no training target: no positive event of a catalogue item is left")
        in_catalogue = log.item_T[log.item_T < log.num_items]
        self.trained_N = np.bincount(in_catalogue, minlength=log.num_items) > 0
        count_I = np.bincount(log.item_T[target], minlength=log.num_items)
        self.negatives = Negatives(np.flatnonzero(self.trained_N), count_I / len(target), born_us_N)
        self.num_targets = len(target)
        self._subjects = SubjectSampler(embedder)
        self._end_us = int(log.time_us_T.max())
        self._num_rows = log.num_items + config.hash_rows
        self.live = log.live_counts(config) if config.live_windows_h else None
        self.first_us_I = log.first_us(self._num_rows)
        if settings.new_item_share and self.live is None:
            raise ConfigError("new_item_share needs live features: items without them have nothing but their id")
        if self.live is not None and settings.loss != "softmax":
            raise ConfigError(f"towers with live features train with loss softmax, got {settings.loss!r}")

    def plan(self, epoch: int) -> list[tuple[Ints, Ints]]:
        """Steps of an epoch, each as the (start, end) of its windows, events of the whole log.

        A user with more than `history_limit` events gives several windows, cut at another place each epoch.
        """
        rng = np.random.default_rng([self.settings.seed, 2, epoch])
        start_W, end_W = self._windows(rng)
        tokens = self.settings.tokens_per_step
        order = rng.permutation(len(start_W))
        length = (end_W - start_W)[order]
        block = np.cumsum(length) // (tokens * _BATCHES_SORTED)
        order = order[np.lexsort((length, block))]
        length = (end_W - start_W)[order]
        steps = []
        filled = first = 0
        for place, size in enumerate(length.tolist()):
            if filled and filled + size > tokens:
                steps.append(order[first:place])
                filled, first = 0, place
            filled += size
        steps.append(order[first:])
        return [(start_W[steps[i]], end_W[steps[i]]) for i in rng.permutation(len(steps))]

    def _windows(self, rng: np.random.Generator) -> tuple[Ints, Ints]:
        limit = self.config.history_limit
        start_U, end_U = self.log.offsets[:-1], self.log.offsets[1:]
        short_U = end_U - start_U <= limit
        starts, ends = [start_U[short_U]], [end_U[short_U]]
        for start, end in zip(start_U[~short_U], end_U[~short_U], strict=True):
            inner = np.arange(end - int(rng.integers(limit)), start, -limit)[::-1]
            edges = np.unique(np.concatenate([[start], inner, [end]]))
            starts.append(edges[:-1])
            ends.append(edges[1:])
        start_W, end_W = np.concatenate(starts), np.concatenate(ends)
        target_before = np.concatenate([[0], np.cumsum(self.is_target_T)])
        asked_W = target_before[end_W] > target_before[start_W]
        return start_W[asked_W], end_W[asked_W]

    def step(self, windows: tuple[Ints, Ints], epoch: int, number: int) -> StepBatch | None:
        """The batch of one step; None where chance left no target."""
        log, settings = self.log, self.settings
        rng = np.random.default_rng([settings.seed, 3, epoch, number])
        start_W, end_W = windows
        length_W = end_W - start_W
        first_W = np.cumsum(length_W) - length_W
        window_T = np.repeat(np.arange(len(start_W)), length_W)
        event_T = np.arange(int(length_W.sum())) + (start_W - first_W)[window_T]
        asked_T = self.is_target_T[event_T]
        if len(length_W) and int(length_W.max()) > settings.targets_per_history:
            count_W = np.bincount(window_T[asked_T], minlength=len(start_W))
            chance_W = settings.targets_per_history / np.maximum(count_W, 1)
            asked_T &= rng.random(len(asked_T)) < chance_W[window_T]
        horizon_us_W = self._horizons(window_T, event_T, asked_T, len(start_W), rng)
        if horizon_us_W is not None:
            is_all_W = horizon_us_W == _NEVER_US
            asked_T &= is_all_W[window_T] | (log.time_us_T[event_T] >= horizon_us_W[window_T])
        window_B, target_B = window_T[asked_T], event_T[asked_T]
        cut_B = self._cuts(target_B, start_W[window_B], rng)
        kept_B = cut_B >= -1
        window_B, target_B, cut_B = window_B[kept_B], target_B[kept_B], cut_B[kept_B]
        if not len(target_B):
            return None
        item_B = log.item_T[target_B]
        hidden_B = np.where(cut_B < 0, -1, cut_B - start_W[window_B] + first_W[window_B])
        context = log.contexts(target_B, cut_B, self.config, self._draw_subjects(item_B, rng))
        events = log.events.window(torch.from_numpy(start_W), torch.from_numpy(end_W))
        if horizon_us_W is not None:
            events = replace(events, item_T=self._as_known(events.item_T, torch.from_numpy(horizon_us_W)[window_T]))
            horizon_B1 = torch.from_numpy(horizon_us_W)[window_B][:, None]
            context = replace(
                context,
                session_item_BK=self._as_known(context.session_item_BK, horizon_B1),
                subject_item_BM=self._as_known(context.subject_item_BM, horizon_B1),
            )
        candidate_S, draws = self.negatives.draw(item_B, settings, rng)
        log_q_S = None
        if draws is not None:
            share_S = torch.from_numpy(self.negatives.share_I[candidate_S])
            log_q_S = log_inclusion(share_S, int(draws[0]), int(draws[1]), len(self.negatives.trained)).float()
        born_us_S = None
        if self.negatives.born_us_I is not None:
            born_us_S = torch.from_numpy(self.negatives.born_us_I[candidate_S])
        weight_B = np.ones(len(target_B), np.float32)
        if settings.half_life_days is not None:
            age_days_B = (self._end_us - log.time_us_T[target_B]) / DAY_US
            weight_B = np.exp2(-age_days_B / settings.half_life_days).astype(np.float32)
        return StepBatch(
            events=events,
            hidden_B=torch.from_numpy(hidden_B),
            context=context,
            item_B=torch.from_numpy(item_B),
            user_B=torch.from_numpy(window_B),
            weight_B=torch.from_numpy(weight_B),
            candidate_S=torch.from_numpy(candidate_S),
            log_q_S=log_q_S,
            time_us_B=torch.from_numpy(log.time_us_T[target_B]),
            born_us_S=born_us_S,
            live=None if self.live is None else log.live_requests(target_B, self.live, self.config),
            log_user_B=None if self.live is None else torch.from_numpy(log.user_T[target_B]),
            horizon_us_B=None if horizon_us_W is None else torch.from_numpy(horizon_us_W[window_B]),
        )

    def _horizons(
        self, window_T: Ints, event_T: Ints, asked_T: NDArray[np.bool_], size: int, rng: np.random.Generator
    ) -> Ints | None:
        """When the weights that read each window were made, so to say; None where all are read as they are.

        A share of the windows gets the last refresh before one of its targets, or a refresh some days earlier.
        """
        if not self.settings.new_item_share:
            return None
        place = np.flatnonzero(asked_T)
        place = place[rng.permutation(len(place))]
        horizon_us_W = np.full(size, _NEVER_US)
        offset_us = self.refresh_offset_us
        refresh_us = (self.log.time_us_T[event_T[place]] - offset_us) // DAY_US * DAY_US + offset_us
        horizon_us_W[window_T[place]] = refresh_us  # one of the window's targets, by chance
        horizon_us_W -= rng.integers(0, self.settings.new_item_days, size) * DAY_US
        is_all_W = rng.random(size) >= self.settings.new_item_share
        return np.where(is_all_W | (horizon_us_W > _NEVER_US // 2), _NEVER_US, horizon_us_W)

    def _as_known(self, item: torch.Tensor, horizon_us: torch.Tensor) -> torch.Tensor:
        """Items as weights made at a time know them: row + I where first seen since."""
        first_us = torch.from_numpy(self.first_us_I)[item]
        return item + self._num_rows * (first_us >= horizon_us)

    def _cuts(self, target_B: Ints, window_start_B: Ints, rng: np.random.Generator) -> Ints:
        """Cut of each target: -1 for a cold start, -2 where the window does not hold the state that is wanted."""
        log, settings = self.log, self.settings
        size = len(target_B)
        first_B = log.offsets[log.user_T[target_B]]
        lag_B = np.where(rng.random(size) < settings.lag_share, rng.integers(1, self.config.session_limit + 1, size), 0)
        fresh_B = target_B - 1 - lag_B
        fresh_B = np.where(fresh_B < first_B, first_B - 1, fresh_B)
        stale_B = log.refresh_cut_T[target_B]
        cut_B = np.where(rng.random(size) < settings.stale_share, stale_B, fresh_B)
        outside_B = (cut_B >= first_B) & (cut_B < window_start_B)
        cut_B = np.where(outside_B, target_B - 1, cut_B)
        tied_B = np.minimum(log.tie_end_T[np.maximum(cut_B, 0)], target_B - 1)
        cut_B = np.where(cut_B < first_B, -1, tied_B)
        return np.where((cut_B >= 0) & (cut_B < window_start_B), -2, cut_B)

    def _draw_subjects(self, item_B: Ints, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self._subjects.usable or self.settings.subject_share == 0:
            return None
        rows, weights = self._subjects.draw(item_B, self.settings.subject_share, self.config.subject_limit, rng)
        return torch.from_numpy(rows), torch.from_numpy(weights)


def history_batches(
    cut_Q: Sequence[int] | Ints, log: EventArrays, limit: int, tokens: int
) -> Iterator[tuple[Ints, EventFeatures]]:
    """Histories that end with given events, in batches of at most `tokens` padded events (one history at least).

    cut_Q: i64 [Q], last event of each history. Yields (indices into cut_Q, features of the latest `limit` events).
    """
    cut_Q = np.asarray(cut_Q, np.int64)
    start_Q = np.maximum(log.offsets[log.user_T[cut_Q]], cut_Q + 1 - limit)
    length_Q = cut_Q + 1 - start_Q
    order = np.argsort(-length_Q, kind="stable")
    first = 0
    while first < len(order):
        size = max(1, tokens // int(length_Q[order[first]]))
        index = order[first : first + size]
        first += size
        yield index, log.events.window(torch.from_numpy(start_Q[index]), torch.from_numpy(cut_Q[index] + 1))


def available_from(items: pa.Table) -> Ints | None:
    """Time before which each item is not recommended, microseconds; None where the items say nothing of it.

    items: as read_items returns them. A null means always available.
    """
    if "available_from_us" not in items.column_names:
        return None
    born: Ints = items["available_from_us"].fill_null(np.iinfo(np.int64).min).to_numpy().astype(np.int64)
    return born
