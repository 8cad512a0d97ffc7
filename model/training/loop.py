"""The training loop: steps, early stopping, checkpoints that survive a kill, and the release at the end.

On the CPU the same seed on the same machine gives the same weights, whether or not the run was killed and resumed
in between: all that is random follows from (seed, epoch, step).
"""

import copy
import json
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import CheckpointError, ConfigError, DataError
from model.features import build_vocabularies
from model.hybrid_tower import HybridTower
from model.live_items import LiveCounts, live_logits
from model.losses import collision_mask, gbce, sampled_softmax, sampled_softmax_each
from model.metrics import event_metrics, rank_catalogue
from model.release import Lineage, Manifest, Registry
from model.training.data import (
    DAY_US,
    EventArrays,
    Ints,
    StepBatch,
    TrainingData,
    available_from,
    cap,
    training_part,
    validation_targets,
)
from model.training.evaluate import Candidates, LiveCatalogue, embed_requests, rank_live, seen_items
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
_PREPARING = 3  # threads


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    manifest: Manifest
    summary: dict[str, Any]
    """Counts, settings, metrics and timings, as written to summary.json."""


@dataclass(slots=True)
class Progress:
    """Where a run stands; travels in the checkpoint."""

    run: str = ""
    """Name of the run, kept when it is resumed."""
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    total_steps: int = 0
    seconds: float = 0.0
    best_metric: float = -math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One run over prepared data. `run` may be called again after a kill with the checkpoint loaded."""

    def __init__(
        self,
        tower: HybridTower,
        data: TrainingData,
        validation: Ints,
        settings: TrainSettings,
        *,
        device: str = "cpu",
        folder: Path | None = None,
        head_only: bool = False,
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[Progress], None] | None = None,
    ) -> None:
        """validation: events held out of `data`, asked after each epoch; none means no early stopping.

        folder: where checkpoint.pt and TensorBoard's events go; None keeps nothing.
        head_only: the encoder and its item embedder stay as they are, to the bit.
        on_step: called after every step with the number of steps done.
        on_epoch: called after every epoch, validated but not yet in the checkpoint.
        """
        self.tower, self.data, self.validation, self.settings = tower.to(device), data, validation, settings
        self.device = torch.device(device)
        self._counts = None if data.live is None else data.live.to(device)
        self._drawn = torch.from_numpy(data.negatives.live_rows(data.log.num_items, int(data.log.time_us_T.max())))
        self._drawn = self._drawn.to(device)
        self._first_us_I = torch.from_numpy(data.first_us_I).to(device)
        self._born_us_N = None if (born := data.negatives.born_us_I) is None else torch.from_numpy(born).to(device)
        self.folder = folder
        self.head_only = head_only
        self.progress = Progress(run=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}")
        self._on_step, self._on_epoch = on_step, on_epoch
        self._best: dict[str, torch.Tensor] | None = None
        self._optimiser = _optimiser(tower, settings, head_only=head_only, fused=self.device.type == "cuda")
        self._trained = [p for group in self._optimiser.param_groups for p in group["params"]]
        # Views of the same modules: what validates and what is released stays uncompiled.
        self._encode: Callable[..., torch.Tensor] = tower.encoder
        self._head: Callable[..., torch.Tensor] = tower.head
        if settings.compile:
            self._encode, self._head = (torch.compile(part, dynamic=True) for part in (tower.encoder, tower.head))
        self._identity = json.dumps(
            {
                "config": tower.featuriser.config.to_dict(),
                "settings": {k: v for k, v in settings.to_dict().items() if k not in ("max_minutes", "epochs")},
                "events": len(data.log.user_T),
                "targets": data.num_targets,
                "items": data.log.num_items,
                "head_only": head_only,
            },
            sort_keys=True,
        )

    def run(self) -> None:
        """Train to the end, then put the weights of the best epoch in place."""
        before = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for the softmax; the tower itself trains in bfloat16
        try:
            self._run()
        finally:
            torch.set_float32_matmul_precision(before)

    def _run(self) -> None:
        settings, progress = self.settings, self.progress
        started = time.monotonic() - progress.seconds
        board = _tensorboard(self.folder)
        if self._counts is not None and not progress.total_steps and len(self.validation):
            metrics = self.validate()  # it begins as a count: the best weights may be those it has
            self._keep_best(metrics)
            progress.history.append({"epoch": 0, "seconds": 0.0, **metrics})
        stop = self._finished()
        while not stop:
            steps = self.data.plan(progress.epoch)
            losses: list[torch.Tensor] = []
            for number, batch in enumerate(_with_progress(self._batches(steps), len(steps), progress), progress.step):
                if batch is not None:
                    losses.append(self._step(batch, number, len(steps)))
                progress.step = number + 1
                progress.total_steps += 1
                progress.seconds = time.monotonic() - started
                if progress.step < len(steps) and progress.total_steps % settings.checkpoint_steps == 0:
                    self.save()
                if self._on_step is not None:
                    self._on_step(progress.total_steps)
                if self._out_of_time():
                    break
            progress.epoch, progress.step = progress.epoch + 1, 0
            mean_loss = float(torch.stack(losses).mean()) if losses else math.nan
            if losses and not math.isfinite(mean_loss):
                raise ConfigError(
                    f"the loss is {mean_loss} in epoch {progress.epoch}; a lower learning rate than "
                    f"{settings.learning_rate:g} may help"
                )
            metrics = {"loss": mean_loss, **self.validate()}
            progress.seconds = time.monotonic() - started
            self._keep_best(metrics)
            progress.history.append({"epoch": progress.epoch, "seconds": round(progress.seconds, 1), **metrics})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info("epoch %d of %d, %.0f s: %s", progress.epoch, settings.epochs, progress.seconds, shown)
            for name, value in metrics.items():
                board(name, value, progress.total_steps)
            if self._on_epoch is not None:
                self._on_epoch(progress)
            stop = self._finished()
            self.save()
        if self._best is not None:
            self.tower.load_state_dict(self._best)
        self.tower.eval()

    def _finished(self) -> bool:
        progress, settings = self.progress, self.settings
        stale = len(self.validation) > 0 and progress.epoch - progress.best_epoch >= settings.patience
        return progress.epoch >= settings.epochs or (progress.best_epoch >= 0 and stale) or self._out_of_time()

    def _out_of_time(self) -> bool:
        limit = self.settings.max_minutes
        return limit is not None and self.progress.seconds >= 60 * limit

    def _keep_best(self, metrics: dict[str, float]) -> None:
        metric = metrics.get("validation_ndcg@20")
        if metric is not None and metric > self.progress.best_metric:
            self.progress.best_metric, self.progress.best_epoch = metric, self.progress.epoch
            self._best = {name: value.detach().clone() for name, value in self.tower.state_dict().items()}

    def _rate(self, steps_per_epoch: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to final_rate of the peak at the end of the run."""
        settings, progress = self.settings, self.progress
        done = (progress.epoch + progress.step / steps_per_epoch) / settings.epochs
        if settings.max_minutes is not None:
            done = max(done, progress.seconds / (60 * settings.max_minutes))
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        warm = min(1.0, (progress.total_steps + 1) / max(1, settings.warmup_steps))
        return settings.learning_rate * warm * (settings.final_rate + (1 - settings.final_rate) * cosine)

    def _batches(self, steps: list[tuple[Ints, Ints]]) -> Iterator[StepBatch | None]:
        """What is left of the epoch. On CUDA, threads prepare the next steps while the device works on this one, in
        page-locked memory: from there a copy waits for nothing, and the host runs ahead of the device."""
        epoch, first = self.progress.epoch, self.progress.step
        if self.device.type != "cuda":
            for number in range(first, len(steps)):
                yield self.data.step(steps[number], epoch, number)
            return

        def prepare(number: int) -> StepBatch | None:
            batch = self.data.step(steps[number], epoch, number)
            return None if batch is None else batch.pinned()

        with ThreadPoolExecutor(_PREPARING) as pool:
            ahead: deque[Future[StepBatch | None]] = deque()
            for number in range(first, len(steps)):
                ahead.append(pool.submit(prepare, number))
                if len(ahead) > 2 * _PREPARING:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _step(self, batch: StepBatch, number: int, steps_per_epoch: int) -> torch.Tensor:
        """One optimiser step; returns the loss, on the device."""
        torch.manual_seed(hash((self.settings.seed, self.progress.epoch, number)) % 2**63)
        self.tower.train()
        if self.head_only:
            self.tower.encoder.eval()
        rate = self._rate(steps_per_epoch)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        loss = self.loss(batch.to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained, self.settings.clip_norm)
        self._optimiser.step()
        return loss.detach()

    def loss(self, batch: StepBatch) -> torch.Tensor:
        """Of one step's targets. The encoder runs once over each history; a target reads it at its cut."""
        tower, config = self.tower, self.tower.featuriser.config
        with _autocast(self.device):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
                hidden_TD = self._encode(batch.events)
            cold_D = tower.head.cold_state_D
            known_B1 = (batch.hidden_B >= 0)[:, None]
            state_BD = F.embedding(batch.hidden_B.clamp_min(0), hidden_TD).to(cold_D.dtype)
            state_BD = torch.where(known_B1, state_BD, cold_D)
            item_IE = tower.items.table(with_unknown=batch.horizon_us_B is not None)
            user_BE = self._head(state_BD, batch.context, item_IE)
        if self._counts is not None:
            return self._live_loss(batch, user_BE.to(cold_D.dtype), item_IE.to(cold_D.dtype), self._counts)
        same_user = self.settings.mask_same_user
        mask_BS = collision_mask(
            batch.user_B, batch.item_B, batch.candidate_S, self.data.log.num_items, same_user=same_user
        )
        if batch.born_us_S is not None:
            mask_BS |= batch.born_us_S > batch.time_us_B[:, None]
        user_BE, item_IE = user_BE.to(cold_D.dtype), item_IE.to(cold_D.dtype)
        positive_BE, candidate_SE = F.embedding(batch.item_B, item_IE), F.embedding(batch.candidate_S, item_IE)
        if self.settings.loss == "gbce":
            return gbce(
                user_BE,
                positive_BE,
                candidate_SE,
                mask_BS,
                temperature=config.temperature,
                calibration=self.settings.gbce_calibration,
                num_items=len(self.data.negatives.trained),
                weight_B=batch.weight_B,
            )
        return sampled_softmax(
            user_BE,
            positive_BE,
            candidate_SE,
            mask_BS,
            temperature=config.temperature,
            log_q_S=batch.log_q_S,
            weight_B=batch.weight_B,
        )

    def _live_loss(
        self, batch: StepBatch, user_BV: torch.Tensor, item_IE: torch.Tensor, counts: LiveCounts
    ) -> torch.Tensor:
        """Sampled softmax with live features; each target has negatives of its own, from the log just before it.

        user_BV: f32 [B, E + L]. item_IE: f32 [I, E], or [2I, E] where some items are read as unknown.
        """
        tower, config, settings = self.tower, self.tower.featuriser.config, self.settings
        assert batch.live is not None
        assert batch.log_user_B is not None
        bucket_B, item_B1 = batch.live.bucket_B, batch.item_B[:, None]
        negative_BM, log_count_BM = counts.draw(
            bucket_B, self._drawn, settings.live_negatives, settings.live_negative_hours
        )
        num_items = self.data.log.num_items
        mask_BM = (negative_BM == item_B1) | (negative_BM >= num_items)
        if self._born_us_N is not None:
            mask_BM |= self._born_us_N[negative_BM.clamp(max=num_items - 1)] > batch.time_us_B[:, None]
        if settings.mask_same_user:
            pair_BM = batch.log_user_B[:, None] * counts.num_rows + negative_BM
            mask_BM |= counts.seen.since(pair_BM, bucket_B[:, None]) > 0
        candidate_BM = torch.cat([item_B1, negative_BM], 1)
        row_BM = candidate_BM
        if batch.horizon_us_B is not None:
            row_BM = row_BM + counts.num_rows * (self._first_us_I[row_BM] >= batch.horizon_us_B[:, None])
        user_BV = user_BV / config.temperature
        user_BE, psi_BL = user_BV[:, : config.embedding_dim], user_BV[:, config.embedding_dim :]
        logit_BM = torch.einsum("be,bme->bm", user_BE, F.embedding(row_BM, item_IE))
        live = batch.live
        forgets_B1 = torch.rand(len(bucket_B), 1, device=self.device) < config.context_dropout / 2
        live = replace(live, recent_BK=live.recent_BK.masked_fill(forgets_B1, -1))
        assert tower.items.live is not None
        logit_BM = logit_BM + live_logits(
            tower.items.live, counts, live, psi_BL, candidate_BM, tower.items.is_known(row_BM)
        )
        return sampled_softmax_each(logit_BM[:, 0], logit_BM[:, 1:], mask_BM, log_count_BM, batch.weight_B)

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Metrics of the held-out events, ranked among the trained catalogue, with context; nothing if there are none.

        The state is cut as serving cuts it: at the last refresh with a time split, else just before the event.
        """
        if not len(self.validation):
            return {}
        tower, events = self.tower.eval(), self.data.log
        by_time = tower.featuriser.description.evaluation.split == "time"
        cut = events.refresh_cut_T[self.validation] if by_time else self.validation - 1
        born = self.data.negatives.born_us_I
        if self._counts is not None:
            rank_B = self._rank_live(cut, self._counts)
            return {f"validation_{name}": float(value.mean()) for name, value in event_metrics(rank_B, (20,)).items()}
        item_IE = tower.items.table()
        user_BE = embed_requests(tower.encoder, tower.head, item_IE, events, self.validation, cut)
        item_NE = item_IE[: events.num_items]
        rank_B = rank_catalogue(
            user_BE,
            item_NE,
            torch.from_numpy(events.item_T[self.validation]),
            available_from_us_N=None if born is None else torch.from_numpy(born),
            time_us_B=torch.from_numpy(events.time_us_T[self.validation]),
        )
        values = event_metrics(rank_B, (20,))
        return {f"validation_{name}": float(value.mean()) for name, value in values.items()}

    def _rank_live(self, cut_B: Ints, counts: LiveCounts) -> Ints:
        """Ranks of the held-out events, asked as weights made at the last refresh before the first of them would."""
        tower, log = self.tower, self.data.log
        offset_us = tower.featuriser.description.refresh_offset_us
        first_us = int(log.time_us_T[self.validation].min())
        known_us = (first_us - offset_us) // DAY_US * DAY_US + offset_us
        asked = log.as_known_at(known_us, counts.num_rows)
        item_IE = tower.items.table(with_unknown=True)
        user_BV = embed_requests(tower.encoder, tower.head, item_IE, asked, self.validation, cut_B)
        row_N = torch.arange(log.num_items, device=self.device)
        row_N = row_N + counts.num_rows * (self._first_us_I[: log.num_items] >= known_us)
        born = self.data.negatives.born_us_I
        seen_rows, seen_offsets = seen_items(log, self.validation)
        candidates = Candidates(
            log.num_items, log.item_T[self.validation], log.time_us_T[self.validation], born,
            seen_rows if self.settings.mask_same_user else None, seen_offsets if self.settings.mask_same_user else None,
        )  # fmt: skip
        requests = log.live_requests(self.validation, self.data.live or counts, tower.featuriser.config)
        catalogue = LiveCatalogue.of(tower.items, item_IE, row_N)
        return rank_live(catalogue, counts, {"": (user_BV, requests)}, candidates)[""]

    def save(self) -> None:
        """Write the checkpoint; a kill leaves the old one or the new one, whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, temporary = self.folder / "checkpoint.pt", self.folder / "checkpoint.pt.new"
        progress = {name: copy.copy(getattr(self.progress, name)) for name in Progress.__slots__}
        with temporary.open("wb") as file:
            torch.save(
                {
                    "format": CHECKPOINT_FORMAT,
                    "identity": self._identity,
                    "tower": self.tower.state_dict(),
                    "best": self._best,
                    "optimiser": self._optimiser.state_dict(),
                    "progress": progress,
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def resume(self) -> bool:
        """Take up the checkpoint in the folder; False where there is none.

        Raises CheckpointError where it is torn or was made from other data or other settings (epochs and max_minutes
        may differ).
        """
        path = None if self.folder is None else self.folder / "checkpoint.pt"
        if path is None or not path.exists():
            return False
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if saved.get("format") != CHECKPOINT_FORMAT or saved.get("identity") != self._identity:
            raise CheckpointError(
                f"{path} belongs to other data, another config or other settings; train without --resume or elsewhere"
            )
        self.tower.load_state_dict(saved["tower"])
        self._optimiser.load_state_dict(saved["optimiser"])
        self._best = saved["best"]
        self.progress = Progress(**({"run": self.progress.run} | saved["progress"]))
        return True


def train(
    events: pa.Table,
    items: pa.Table,
    users: pa.Table | None,
    description: DatasetDescription,
    registry: Registry,
    *,
    settings: TrainSettings | None = None,
    config: TowerConfig | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    resume: bool = False,
    head_only_from: str | None = None,
    release_at: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a tower on the training part of a log and write it to the registry as a release.

    events: a whole log as read_log returns it; the description's test part is left out here. items, users: as
    read_items and read_users return them. settings, config: None means what fits the data set's size.
    head_only_from: id of a release whose encoder and vocabularies are kept; its state version carries over.
    release_at: epochs after which the weights as they stand become a release too, beside the best epoch's at the end.
    Raises DataError, ConfigError or CheckpointError.
    """
    started = time.monotonic()
    items = items.sort_by("item_id").combine_chunks()
    part = training_part(events, description).train
    counts = LogCounts(events=part.num_rows, users=pc.count_distinct(part["user_id"]).as_py(), items=items.num_rows)
    settings = settings or settings_for(description, counts, device=device)
    table, capped = cap(part, settings)
    for said in capped:
        log.warning("training is capped: %s", said)
    if wrong := sorted(epoch for epoch in release_at if not 1 <= epoch <= settings.epochs):
        raise ConfigError(f"releases can be made at epochs 1 to {settings.epochs}, not at {wrong}")
    torch.manual_seed(settings.seed)
    if head_only_from is None:
        vocabularies = build_vocabularies(description, table, users)
        tower = HybridTower.build(config or config_for(description, counts), description, vocabularies, items)
    else:
        tower, items = tower_of_release(registry, head_only_from, items, description)
    arrays = EventArrays.build(table, users, tower.featuriser, description)
    outside = int((arrays.item_T >= arrays.num_items).sum())
    if outside:
        log.warning("%d of %d events are of items the catalogue lacks: history, never a target", outside, len(table))
    validation = validation_targets(arrays, settings, by_time=description.evaluation.split == "time")
    data = TrainingData(
        arrays,
        validation,
        tower.items.embedder,
        tower.featuriser.config,
        settings,
        available_from(items),
        description.refresh_offset_us,
    )
    tower.items.embedder.use_hash_rows(torch.from_numpy(data.trained_N))
    log.info(
        "%s: %d events, %d users, %d items; %d targets, %d held out for early stopping; preparing took %.1f s",
        description.name, len(table), len(arrays.user_ids), arrays.num_items, data.num_targets, len(validation),
        time.monotonic() - started,
    )  # fmt: skip
    catalogue = items.drop_columns(["available_from_us"]) if "available_from_us" in items.column_names else items

    def release(epoch: int, history: list[dict[str, float]]) -> Manifest:
        """The tower as it stands, as the release of that epoch; the one there is where it was written already."""
        lineage = Lineage(run=trainer.progress.run, seed=settings.seed, epoch=epoch)
        if release_at and (written := _written(registry, lineage)):
            return written
        row = next((row for row in history if row["epoch"] == epoch), {})
        return registry.write(
            tower, catalogue, base=head_only_from, lineage=lineage, trained_until_us=int(arrays.time_us_T.max()),
            metrics={name: value for name, value in row.items() if name.startswith("validation_") or name == "loss"},
        )  # fmt: skip

    def on_epoch(progress: Progress) -> None:
        if progress.epoch in release_at:
            log.info("release %s at epoch %d", release(progress.epoch, progress.history).release_id, progress.epoch)

    trainer = Trainer(
        tower, data, validation, settings,
        device=device, folder=folder, head_only=head_only_from is not None, on_step=on_step, on_epoch=on_epoch,
    )  # fmt: skip
    if resume:
        log.info("resumed at %s", trainer.progress) if trainer.resume() else log.info("no checkpoint; starting anew")
    trainer.run()
    trainer.tower.to("cpu")
    progress = trainer.progress
    if missed := sorted(epoch for epoch in release_at if epoch > progress.epoch):
        log.warning("the run ended after epoch %d: no release at %s", progress.epoch, missed)
    manifest = release(progress.best_epoch if progress.best_epoch >= 0 else progress.epoch, progress.history)
    if head_only_from is not None:
        kept = registry.manifest(head_only_from).state_version
        if manifest.state_version != kept:
            raise CheckpointError(f"a head-only run must keep state version {kept}, got {manifest.state_version}")
    summary = {
        "dataset": description.name,
        "release_id": manifest.release_id,
        "run": progress.run,
        "state_version": manifest.state_version,
        "embedding_version": manifest.embedding_version,
        "device": device,
        "counts": {
            "events": table.num_rows, "users": len(arrays.user_ids), "items": arrays.num_items,
            "targets": data.num_targets, "held_out": len(validation), "outside_catalogue": outside,
        },
        "capped": capped,
        "settings": settings.to_dict(),
        "config": tower.featuriser.config.to_dict(),
        "best_epoch": progress.best_epoch,
        "history": progress.history,
        "train_seconds": round(progress.seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return TrainResult(manifest, summary)


def _written(registry: Registry, lineage: Lineage) -> Manifest | None:
    """The release of that very run and epoch, where there is one: a resumed run comes by an epoch's end again."""
    manifests = (registry.manifest(release_id) for release_id in registry.releases())
    return next((manifest for manifest in manifests if manifest.lineage == lineage), None)


def tower_of_release(
    registry: Registry, release_id: str, items: pa.Table, description: DatasetDescription
) -> tuple[HybridTower, pa.Table]:
    """The tower of a release with its encoder frozen, and the items that are in its catalogue."""
    release = registry.load(release_id)
    if release.manifest.description != description:
        log.warning("the description of release %s is used; the one given differs", release_id)
    ids = release.featuriser.item_ids
    kept = items.filter(pc.is_in(items["item_id"], ids)).combine_chunks()
    if not kept["item_id"].combine_chunks().equals(ids):
        missing = len(ids) - kept.num_rows
        raise DataError(f"every item of release {release_id} is needed; the items file lacks {missing}")
    tower = HybridTower(release.featuriser, release.encoder, release.head, release.items)
    tower.requires_grad_(True)
    tower.encoder.requires_grad_(False)
    return tower, kept


def _optimiser(tower: HybridTower, settings: TrainSettings, *, head_only: bool, fused: bool) -> torch.optim.AdamW:
    """AdamW; matrices decay, embeddings, norms and biases do not."""
    kept = set(tower.encoder.parameters()) if head_only else set()
    tables = {m.weight for m in tower.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in tower.parameters() if p not in kept]
    decayed = [p for p in trained if p.ndim >= 2 and p not in tables]
    plain = [p for p in trained if p.ndim < 2 or p in tables]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _with_progress(batches: Iterable[StepBatch | None], total: int, progress: Progress) -> Iterable[StepBatch | None]:
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    # disable=None: quiet where stderr is no terminal
    return tqdm(
        batches, desc=f"epoch {progress.epoch + 1}", total=total, initial=progress.step, leave=False, disable=None
    )


def _tensorboard(folder: Path | None) -> Callable[[str, float, int], None]:
    """A function that records a scalar; does nothing where TensorBoard is not installed or nothing is kept."""
    if folder is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard is not installed; scalars go to the log only")
        else:
            writer = SummaryWriter(str(folder / "tensorboard"))

            def record(name: str, value: float, step: int) -> None:
                writer.add_scalar(name, value, step)
                writer.flush()

            return record
    return lambda name, value, step: None
