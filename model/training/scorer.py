"""The second stage of training: an interaction scorer on the frozen towers of a release.

The scorer begins as a line, of the dot product and the item's scalars, fitted on training targets; the MLP learns what
a line cannot say. What it is worth is seen beside its own beginning: held-out events are ranked among the whole
catalogue before the first step and several times after it, and the best weights are kept, the first ones included. User
embeddings are made once, by the path that evaluation and serving take.
With a time split, each day's requests are read as weights made at the refresh before it would read them, for that is
what a scorer meets after its release: items first seen since then by a hash row only, and by one that they have not
trained (`as_new`). By its own, which dropout has trained on its clicks, an item that was new is known after all, and
the dot product is trusted as it cannot be after the release.

Each target has negatives of its own from three sources: the tower's own softmax (hard ones), the log just before the
target (popular ones), and uniform ones; the loss corrects for how often each was to be expected.

Legend: B targets of a step, M negatives, N catalogue items, I item rows, E embedding width, S scalars, F = E + S.
"""

import copy
import logging
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from model.dataset import DatasetDescription
from model.encoder import Encoder
from model.errors import ConfigError, DataError
from model.item_tower import ItemTower
from model.live_items import LiveCounts
from model.losses import sampled_softmax_each
from model.metrics import event_metrics
from model.release import TOWER_PARTS, Manifest, Registry, Release
from model.retrieval.scalars import CatalogueScalars, counting_config, item_scalars
from model.retrieval.scorer import DotScorer, InteractionScorer, ScorerConfig
from model.training.data import DAY_US, EventArrays, Ints, available_from, training_part, validation_targets
from model.training.evaluate import (
    Candidates,
    Score,
    embed_requests,
    excludes_seen,
    rank_scored,
    repeat_share,
    scored,
    seen_items,
)
from model.training.loop import tower_of_release
from model.training.settings import TrainSettings

log = logging.getLogger(__name__)

SELECTED_BY = "validation_ndcg@100"
FEW_STEPS = 300
"""A training that its time limit ends before so many steps says that it learned next to nothing."""
Part = TypeVar("Part", Encoder, ItemTower)
LINE_TARGETS = 4096
"""Training targets that the line is fitted on, to the next whole step."""
LINE_DECAY = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSettings:
    """How a scorer is trained; what it is, is ScorerConfig."""

    seed: int = 0
    steps: int = 4000
    max_minutes: float | None = None
    """Wall-clock limit of the steps, ranking the held-out events not counted; the learning rate is brought down in time
    for it."""
    targets_per_step: int = 512
    max_targets: int = 200_000
    """Positive events that are learned from, drawn with the seed; each needs a user embedding."""
    half_life_days: float | None = None
    """The chance to be drawn halves with each such span before the log's end; None draws all alike."""
    tower_negatives: int = 128
    """Negatives of a target from the tower's softmax."""
    other_negatives: int = 128
    """Half of them from the log just before the target, half uniform."""
    recent_hours: float = 1.0
    """How much of the log that is."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate: float = 0.02
    """Learning rate at the end of the cosine, as a share of the peak."""
    validations: int = 10
    """How often the held-out events are ranked, besides at the beginning."""
    max_validation: int = 2000
    """Most held-out events that are ranked."""

    def __post_init__(self) -> None:
        for name in ("steps", "targets_per_step", "max_targets", "validations", "max_validation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.tower_negatives, self.other_negatives) < 0 or self.tower_negatives + self.other_negatives < 1:
            raise ConfigError("tower_negatives and other_negatives must be 0 or more, and not both 0")
        for name in ("learning_rate", "recent_hours", "max_minutes", "half_life_days"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def scorer_for(description: DatasetDescription, *, device: str = "cpu") -> tuple[ScorerConfig, ScorerSettings]:
    """A scorer and a training that fit the data set and the device.

    With a time split, counts of the last hours, ten minutes old at most; with leave-one-out, of a month and a year.
    """
    by_time = description.evaluation.split == "time"
    if device.startswith("cuda"):
        hidden, settings = (256, 128), ScorerSettings()
    else:
        hidden = (64, 32)
        settings = ScorerSettings(
            steps=500, targets_per_step=128, max_targets=20_000, tower_negatives=64, other_negatives=64,
            validations=5, max_validation=500,
        )  # fmt: skip
    if by_time:
        return ScorerConfig(hidden=hidden, windows_h=(1.0, 3.0, 24.0)), settings
    config = ScorerConfig(hidden=hidden, windows_h=(24.0 * 30, 24.0 * 365), bucket_s=86_400)
    return config, replace(settings, recent_hours=24.0 * 30)


@dataclass(frozen=True, slots=True)
class ScorerResult:
    """What a training came to."""

    manifest: Manifest
    summary: dict[str, Any]
    """Settings, counts, history of validations, seconds."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests just before given events, embedded once."""

    user_BE: torch.Tensor
    """f32, on the release's device."""
    item_B: torch.Tensor
    time_us_B: torch.Tensor
    known_us_B: torch.Tensor
    """i64: items first seen at or after it are known by their hash row only."""


class ScorerData:
    """The training part of a log as a release reads it: what is learned from, and what is held out."""

    def __init__(
        self, release: Release, events: pa.Table, items: pa.Table, users: pa.Table | None,
        description: DatasetDescription, settings: ScorerSettings, tower_settings: TrainSettings | None = None,
    ) -> None:  # fmt: skip
        """events: a whole log; its test part is left out here. items: the release's, by item_id.

        tower_settings: how the towers were trained, so that what was held out then is held out here; None means the
        default shares and the seed in the release's lineage. Raises DataError where no target is left, ConfigError for
        a release with live item features.
        """
        config = release.config
        if config.live_windows_h:
            raise ConfigError(
                f"release {release.manifest.release_id} scores live item features; a scorer is trained on towers "
                "without them and reads counts as scalars"
            )
        self.release, self.device = release, release.device
        self.log = EventArrays.build(training_part(events, description).train, users, release.featuriser, description)
        self.by_time = description.evaluation.split == "time"
        self.offset_us = description.refresh_offset_us
        self.num_rows = self.log.num_items + config.hash_rows
        self.first_us_I = torch.from_numpy(self.log.first_us(self.num_rows)).to(self.device)
        self.born_us_N = available_from(items)
        self._born_us_N = None if self.born_us_N is None else torch.from_numpy(self.born_us_N).to(self.device)
        self.temperature = config.temperature
        self._counts: dict[int, LiveCounts] = {}
        self._scalars: dict[ScorerConfig, CatalogueScalars] = {}
        self.encoder, items_as_new = as_new(release.encoder), as_new(release.items)
        with torch.inference_mode():
            table_IE = items_as_new.table(with_unknown=True)
        self.table_IE = table_IE.clone()  # a clone made out here is no inference tensor, and training may read it
        """f32 [2I, E]: every row, then each as an item that no weights were trained on."""
        if tower_settings is None:
            lineage = release.manifest.lineage
            tower_settings = TrainSettings(seed=0 if lineage is None else lineage.seed)
        held_out = validation_targets(self.log, tower_settings, by_time=self.by_time)
        is_target_T = self.log.positive_T & (self.log.item_T < self.log.num_items)
        is_target_T[held_out] = False
        target = np.flatnonzero(is_target_T)
        if not len(target):
            raise DataError("no training target: no positive event of a catalogue item is left")
        rng = np.random.default_rng([settings.seed, 6])
        self.target = _draw(target, self.log.time_us_T, settings, rng)
        self.held_out = held_out
        if len(held_out) > settings.max_validation:
            self.held_out = np.sort(rng.choice(held_out, settings.max_validation, replace=False))
        in_log = np.bincount(self.log.item_T[self.log.item_T < self.log.num_items], minlength=self.log.num_items) > 0
        self.drawn = torch.from_numpy(np.flatnonzero(in_log)).to(self.device)
        self.trained = self._ask(self.target)

    def counts(self, config: ScorerConfig) -> LiveCounts:
        """The log as the scorer's scalars count it, on the device; arranged once for each `bucket_s`."""
        made = self._counts.get(config.bucket_s)
        if made is None:
            made = self.log.live_counts(counting_config(config, self.release.config)).to(self.device)
            self._counts[config.bucket_s] = made
        return replace(made, windows=tuple(made.length_of(hours) for hours in config.windows_h))

    def scalars(self, config: ScorerConfig) -> CatalogueScalars | None:
        """The scalars of the whole catalogue that a scorer reads, kept for every ranking; None where it reads none."""
        if not config.scalars:
            return None
        if config not in self._scalars:
            self._scalars[config] = CatalogueScalars(self.counts(config), self.log.num_items)
        return self._scalars[config]

    def _ask(self, target: Ints) -> Asked:
        release, events = self.release, self.log
        encoder, head = self.encoder, release.head
        time_us = events.time_us_T[target]
        user_BE = torch.empty(len(target), release.config.embedding_dim, device=self.device)
        if self.by_time:
            known_us = self._refresh_before(time_us)
            for day_us in np.unique(known_us).tolist():
                index = np.flatnonzero(known_us == day_us)
                asked, part = events.as_known_at(day_us, self.num_rows), target[index]
                embedded = embed_requests(encoder, head, self.table_IE, asked, part, events.refresh_cut_T[part])
                user_BE[torch.from_numpy(index).to(self.device)] = embedded
        else:
            known_us = np.full(len(target), np.iinfo(np.int64).max)
            user_BE[:] = embed_requests(
                encoder, head, self.table_IE[: self.num_rows], events, target, target - 1
            )  # fmt: skip
        item_B, time_us_B, known_us_B = (
            torch.from_numpy(value).to(self.device) for value in (events.item_T[target], time_us, known_us)
        )
        return Asked(user_BE, item_B, time_us_B, known_us_B)

    def some(self, size: int, order: torch.Generator) -> Asked:
        """So many of the training targets, drawn with replacement."""
        index = torch.randint(len(self.target), (size,), generator=order).to(self.device)
        return Asked(**{field.name: getattr(self.trained, field.name)[index] for field in fields(Asked)})

    def _refresh_before(self, time_us: Any) -> Any:
        return (time_us - self.offset_us) // DAY_US * DAY_US + self.offset_us

    def validation(self) -> tuple[torch.Tensor, torch.Tensor, Candidates]:
        """The held-out requests as the trainer of towers asks them: user_BE, item_NE and what they are ranked among.

        All are asked as of one time, the refresh before the first of them.
        """
        log, held_out, release = self.log, self.held_out, self.release
        row_N = torch.arange(log.num_items, device=self.device)
        asked, cut = log, held_out - 1
        if self.by_time:
            known_us = int(self._refresh_before(int(log.time_us_T[held_out].min())))
            row_N = row_N + self.num_rows * (self.first_us_I[: log.num_items] >= known_us)
            asked, cut = log.as_known_at(known_us, self.num_rows), log.refresh_cut_T[held_out]
        user_BE = embed_requests(self.encoder, release.head, self.table_IE, asked, held_out, cut).clone()
        is_seen_off = excludes_seen("auto", repeat_share(log))
        rows, offsets = seen_items(log, held_out) if is_seen_off else (None, None)
        candidates = Candidates(
            log.num_items, log.item_T[held_out], log.time_us_T[held_out], self.born_us_N, rows, offsets
        )  # fmt: skip
        return user_BE, self.table_IE[row_N], candidates

    def rows(self, item: torch.Tensor, known_us: torch.Tensor) -> torch.Tensor:
        """Rows of table_IE for items as weights made at a time know them."""
        return item + self.num_rows * (self.first_us_I[item] >= known_us)

    def negatives(
        self, asked: Asked, counts: LiveCounts, settings: ScorerSettings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Negatives of each target: items [B, M], mask (True: no negative), log of how often each was expected."""
        num_items = self.log.num_items
        bucket_B, item_B1 = counts.bucket(asked.time_us_B), asked.item_B[:, None]
        logit_BN = asked.user_BE @ self.table_IE[:num_items].T / self.temperature
        if self._born_us_N is not None:
            logit_BN.masked_fill_(self._born_us_N > asked.time_us_B[:, None], -torch.inf)
        logit_BN.scatter_(1, item_B1, -torch.inf)
        share_BN = torch.softmax(logit_BN, 1).nan_to_num_(0.0)  # nothing else was there to be shown: all masked below
        drawn = []
        if settings.tower_negatives:
            drawn.append(torch.multinomial(share_BN + 1e-30, settings.tower_negatives, replacement=True))
        if settings.other_negatives:
            drawn.append(counts.draw_items(bucket_B, self.drawn, settings.other_negatives, settings.recent_hours))
        item_BM = torch.cat(drawn, 1)
        inside_BM = item_BM.clamp(max=num_items - 1)
        expected = settings.tower_negatives * share_BN.gather(1, inside_BM)
        if settings.other_negatives:
            expected = expected + counts.expected_draws(
                item_BM, bucket_B, self.drawn, settings.other_negatives, settings.recent_hours
            )
        mask_BM = (item_BM == item_B1) | (item_BM >= num_items)
        if self._born_us_N is not None:
            mask_BM |= self._born_us_N[inside_BM] > asked.time_us_B[:, None]
        return inside_BM, mask_BM, expected.clamp_min(1e-30).log().float()


def as_new(part: Part) -> Part:
    """A copy whose unknown items (index + I, as ItemEmbedder takes it) are read by another hash row than their own.

    Which one is as good as drawn; the features stay the item's own. Items that training never saw keep their rows.
    """
    part = copy.deepcopy(part)
    embedder = part.embedder
    count = embedder.shape.num_items
    hash_rows = embedder.num_rows - count
    own_N = embedder.hash_row_I[:count] - count
    embedder.hash_row_I[:count] = count + (own_N + max(1, hash_rows // 2)) % hash_rows
    return part


def _draw(target: Ints, time_us_T: Ints, settings: ScorerSettings, rng: np.random.Generator) -> Ints:
    """At most max_targets of the targets, later ones more often where there is a half-life. Sorted."""
    if len(target) <= settings.max_targets:
        return target
    age_days = (time_us_T[target].max() - time_us_T[target]) / DAY_US
    log_weight = 0.0 if settings.half_life_days is None else -math.log(2) * age_days / settings.half_life_days
    key = log_weight + rng.gumbel(size=len(target))  # the largest keys are a draw without replacement by weight
    return np.sort(target[np.argpartition(-key, settings.max_targets - 1)[: settings.max_targets]])


class RowScale(nn.Module):
    """Rows of the first layer divided by the size of their inputs, so that one learning rate fits all of them.

    Values of a unit vector are of order 1 / sqrt(E), products of two of order 1 / E, scalars of order 1.
    """

    scale_I1: torch.Tensor

    def __init__(self, embedding_dim: int, scalars: int) -> None:
        super().__init__()
        sizes = [embedding_dim**0.5] * 2 * embedding_dim + [float(embedding_dim)] * embedding_dim + [1.0] * scalars
        self.register_buffer("scale_I1", torch.tensor(sizes)[:, None])

    def forward(self, raw_IH: torch.Tensor) -> torch.Tensor:
        """raw_IH: what is trained. Returns the weights."""
        return raw_IH * self.scale_I1

    def right_inverse(self, weight_IH: torch.Tensor) -> torch.Tensor:
        """What gives these weights; fresh ones, of variance 1 / inputs, are taken as they are."""
        return weight_IH


def fit(
    data: ScorerData, scorer: nn.Module, logits: Score, config: ScorerConfig, settings: ScorerSettings
) -> list[dict[str, float]]:
    """Train a scorer in place and leave the best weights in it; the validations, the beginning (step 0) first.

    scorer: on the data's device. logits: its logits, of one task, as InteractionScorer.logits. config: the scalars it
    reads. Without held-out events the last weights are kept. Each row has the `seconds` of steps so far, and those of
    rankings, `ranking_seconds`. Warns where max_minutes ended it before FEW_STEPS and before its own `steps`. Raises
    ConfigError where the loss is not finite.
    """
    before = torch.get_float32_matmul_precision()
    if data.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        return _fit(data, scorer, logits, config, settings)
    finally:
        torch.set_float32_matmul_precision(before)


def _fit(
    data: ScorerData, scorer: nn.Module, logits: Score, config: ScorerConfig, settings: ScorerSettings
) -> list[dict[str, float]]:
    counts = data.counts(config)
    scalars = data.scalars(config)
    scalar_counts = counts if config.scalars else None
    held_out = data.validation() if len(data.held_out) else None
    parameters = list(scorer.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    torch.manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    started, ranking_s, step, share = time.monotonic(), 0.0, 0, 0.0
    history: list[dict[str, float]] = []
    losses: list[torch.Tensor] = []
    best, best_metric = None, -math.inf

    def trained_s() -> float:
        return time.monotonic() - started - ranking_s

    def validate() -> None:
        nonlocal best, best_metric, ranking_s
        loss = float(torch.stack(losses).mean()) if losses else math.nan  # waits for the steps
        begun = time.monotonic()
        row: dict[str, float] = {"step": step, "seconds": round(trained_s(), 1), "loss": loss}
        losses.clear()
        if step and not math.isfinite(row["loss"]):
            rate = settings.learning_rate
            raise ConfigError(f"the loss is {row['loss']} at step {step}; a lower learning_rate than {rate:g} may help")
        if held_out is not None:
            rank_B = rank_scored(logits, *held_out, scalars)
            row |= {f"validation_{name}": float(v.mean()) for name, v in event_metrics(rank_B, (20, 100)).items()}
            if row[SELECTED_BY] > best_metric:
                best_metric = row[SELECTED_BY]
                best = {name: value.detach().clone() for name, value in scorer.state_dict().items()}
        ranking_s += time.monotonic() - begun
        row["ranking_seconds"] = round(ranking_s, 1)
        history.append(row)
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in row.items()))

    scorer.eval()
    validate()
    while share < 1.0:
        rate = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        part = data.some(settings.targets_per_step, order)
        loss = loss_of(data, logits, part, counts, scalar_counts, settings)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.detach())
        step += 1
        share = step / settings.steps
        if settings.max_minutes is not None:
            share = max(share, trained_s() / (60 * settings.max_minutes))
        if share >= len(history) / settings.validations:
            validate()
    if step < min(FEW_STEPS, settings.steps):
        log.warning(
            "the time limit ended the scorer's training after %d of %d steps (%.1f s of steps, %.1f s of rankings): "
            "so few tell little of what it is worth; more max_minutes or fewer targets_per_step may help",
            step, settings.steps, trained_s(), ranking_s,
        )  # fmt: skip
    if best is not None:
        scorer.load_state_dict(best)
    return history


@torch.no_grad()
def features_of(
    data: ScorerData, asked: Asked, counts: LiveCounts, scalar_counts: LiveCounts | None, settings: ScorerSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets and drawn negatives: features [B, 1 + M, F], the target's first; mask and log counts [B, M]."""
    negative_BM, mask_BM, log_count_BM = data.negatives(asked, counts, settings)
    item_BM = torch.cat([asked.item_B[:, None], negative_BM], 1)
    feature_BMF = F.embedding(data.rows(item_BM, asked.known_us_B[:, None]), data.table_IE)
    if scalar_counts is not None:
        bucket_B1 = scalar_counts.bucket(asked.time_us_B)[:, None]
        scalar_BMS = item_scalars(scalar_counts, item_BM, bucket_B1.expand_as(item_BM))
        feature_BMF = torch.cat([feature_BMF, scalar_BMS], 2)
    return feature_BMF, mask_BM, log_count_BM


def loss_of(
    data: ScorerData, logits: Score, asked: Asked, counts: LiveCounts, scalar_counts: LiveCounts | None,
    settings: ScorerSettings,
) -> torch.Tensor:  # fmt: skip
    """Sampled softmax of one step's targets."""
    feature_BMF, mask_BM, log_count_BM = features_of(data, asked, counts, scalar_counts, settings)
    logit_BM = logits(asked.user_BE, feature_BMF)[:, 0]
    return sampled_softmax_each(logit_BM[:, 0], logit_BM[:, 1:], mask_BM, log_count_BM)


@dataclass(frozen=True, slots=True)
class Line:
    """logit = dot u.i + weight . scalars: what a scorer begins as."""

    dot: float
    weight_S: torch.Tensor
    """f32, on the CPU."""
    middle: float
    """Mean of weight . scalars over the targets that it was fitted on."""


def fitted_line(data: ScorerData, config: ScorerConfig, settings: ScorerSettings) -> Line:
    """The line of the lowest sampled softmax on LINE_TARGETS training targets, each with negatives of its own.

    The loss is convex, so the fit (L-BFGS, a little weight decay) needs no learning rate and has no beginning that
    matters: one of a few hundred small steps does not get from 1 / temperature down to what the dot product is worth
    beside counts. Held-out events are not read.
    """
    counts = data.counts(config)
    scalar_counts = counts if config.scalars else None
    torch.manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    parts = []
    for _ in range(math.ceil(LINE_TARGETS / settings.targets_per_step)):
        asked = data.some(settings.targets_per_step, order)
        feature_BMF, mask_BM, log_count_BM = features_of(data, asked, counts, scalar_counts, settings)
        width = asked.user_BE.shape[1]
        dot_BM1 = feature_BMF[..., :width] @ asked.user_BE[:, :, None]
        parts.append((torch.cat([dot_BM1, feature_BMF[..., width:]], 2), mask_BM, log_count_BM))
    value_BMV, mask_BM, log_count_BM = (torch.cat(part) for part in zip(*parts, strict=True))
    weight_V = torch.zeros(1 + config.scalars, device=data.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight_V], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logit_BM = value_BMV @ weight_V
        value = sampled_softmax_each(logit_BM[:, 0], logit_BM[:, 1:], mask_BM, log_count_BM)
        value = value + LINE_DECAY * weight_V.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    found_V = weight_V.detach()
    middle = float((value_BMV[:, 0, 1:] @ found_V[1:]).mean())
    return Line(float(found_V[0]), found_V[1:].cpu(), middle)


@torch.no_grad()
def calibrate(score: Score, bias_T: torch.Tensor, data: ScorerData, scalars: CatalogueScalars | None) -> None:
    """Shift the last bias so that the probabilities of a request's candidates sum to about 1, not to thousands.

    The softmax leaves an offset free; probabilities near 1 would tie in float32. Measured on held-out requests, else
    left as it is.
    """
    if not len(data.held_out):
        return
    sums = [
        torch.logsumexp(score_bN.masked_fill(excluded_bN, -torch.inf), 1)
        for _, score_bN, excluded_bN in scored(score, *data.validation(), scalars)
    ]
    bias_T -= torch.cat(sums).mean()


def train_scorer(
    events: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    registry: Registry,
    release_id: str,
    *,
    config: ScorerConfig | None = None,
    settings: ScorerSettings | None = None,
    tower_settings: TrainSettings | None = None,
    device: str = "cpu",
) -> ScorerResult:
    """Train a scorer on a release's towers and write both as a new release: same states, another embedding version.

    events, items, users: as read_log, read_items and read_users return them, the whole log. config, settings: None
    means what fits the data set and the device. tower_settings: see ScorerData.

    Raises DataError, ConfigError or CheckpointError.
    """
    started = time.monotonic()
    items = items.sort_by("item_id").combine_chunks()
    tower, items = tower_of_release(registry, release_id, items, registry.manifest(release_id).description)
    release = registry.load(release_id, device=device, parts=TOWER_PARTS)
    description = release.manifest.description
    defaults = scorer_for(description, device=device)
    config, settings = config or defaults[0], settings or defaults[1]
    data = ScorerData(release, events, items, users, description, settings, tower_settings)
    log.info(
        "%s: a scorer on release %s; %d of its targets, %d held out; embedding them took %.1f s",
        description.name, release_id, len(data.target), len(data.held_out), time.monotonic() - started,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    scorer = start(data, config, settings)
    history = fit_interaction(data, scorer, config, settings)
    scorer.to("cpu")
    best = max(history, key=lambda row: row.get(SELECTED_BY, row["step"]))
    metrics = {name: value for name, value in best.items() if name.startswith("validation_") or name == "loss"}
    metrics |= {f"{name}_start": value for name, value in history[0].items() if name.startswith("validation_")}
    if len(data.held_out):
        rank_B = rank_scored(DotScorer(), *data.validation(), None)
        dot = event_metrics(rank_B, (20, 100))
        metrics |= {f"validation_{name}_dot": float(value.mean()) for name, value in dot.items()}
    catalogue = items.drop_columns(["available_from_us"]) if "available_from_us" in items.column_names else items
    manifest = registry.write(
        tower, catalogue, trained_until_us=release.manifest.trained_until_us, base=release_id,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)}, scorer=(config, scorer),
    )  # fmt: skip
    summary = {
        "dataset": description.name,
        "release_id": manifest.release_id,
        "of_release": release_id,
        "embedding_version": manifest.embedding_version,
        "config": config.to_dict(),
        "settings": settings.to_dict(),
        "counts": {"targets": len(data.target), "held_out": len(data.held_out)},
        "best_step": best["step"],
        "history": history,
        "total_seconds": round(time.monotonic() - started, 1),
    }
    return ScorerResult(manifest, summary)


def start(data: ScorerData, config: ScorerConfig, settings: ScorerSettings) -> InteractionScorer:
    """A scorer on the data's device that orders as `fitted_line`; a fresh MLP where its config has no dot product.

    Without scalars, or with a layer of one unit, it orders as the dot product does.
    The part of the scalars goes through the MLP: z by one unit of each layer and -z by another, for relu(z) - relu(-z)
    is z. The other units begin as they are, the last layer's weights for them at zero.
    """
    scorer = InteractionScorer.of(config, data.table_IE.shape[1], 1.0 / data.temperature)
    if config.with_dot:
        nn.init.zeros_(scorer.out.weight)
        nn.init.zeros_(scorer.out.bias)
        if config.scalars and min(config.hidden) >= 2:
            begin_as(scorer, fitted_line(data, config, settings))
    return scorer.to(data.device)


@torch.no_grad()
def begin_as(scorer: InteractionScorer, line: Line) -> None:
    """Set a scorer, on the CPU and of two units a layer or more, to a line, up to an offset."""
    assert scorer.dot_T is not None, "a line has a dot product"
    scorer.dot_T.fill_(line.dot)
    sign_2 = torch.tensor([1.0, -1.0])
    scorer.weight_IH[:, :2] = 0.0
    scorer.weight_IH[3 * scorer.embedding_dim :, :2] = line.weight_S[:, None] * sign_2
    scorer.bias_H[:2] = -line.middle * sign_2  # small where it matters: the best items differ little in bfloat16 else
    scorer.second.weight[:2] = 0.0
    scorer.second.weight[:2, :2] = torch.eye(2)
    scorer.second.bias[:2] = 0.0
    scorer.out.weight[:, :2] = sign_2


def fit_interaction(
    data: ScorerData, scorer: InteractionScorer, config: ScorerConfig, settings: ScorerSettings
) -> list[dict[str, float]]:  # fmt: skip
    """`fit` for an InteractionScorer, its first layer trained at the scale of its inputs, then calibrated."""
    scale = RowScale(scorer.embedding_dim, scorer.scalars).to(data.device)
    parametrize.register_parametrization(scorer, "weight_IH", scale)
    try:
        history = fit(data, scorer, scorer.logits, config, settings)
    finally:
        parametrize.remove_parametrizations(scorer, "weight_IH", leave_parametrized=True)
    calibrate(scorer.logits, scorer.out.bias, data, data.scalars(config))
    return history
