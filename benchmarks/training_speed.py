"""Training speed: one encoding for all targets of a history, packed histories and compilation, each beside its rival.

    python -m benchmarks.training_speed --device cuda [--quick] [--profile] [--no-record]

Histories are generated: log-normal lengths of 17 to 200 events, about 16 targets of each in a step. Timed is the
training step on prepared batches in page-locked memory: copy, forward, backward, clipping, optimiser.

- Deduplication. The rival encodes every target's own history by itself, packed; targets, contexts, candidates and
  masks are the same. Loss and gradients are compared first. Each side goes over the same histories at several batch
  sizes and counts with its best. Then both train on the same steps from the same weights. Their losses cannot be equal
  bit by bit, because dropout draws differ; how far runs drift apart by dropout alone is measured by further runs.
- Packing. The rival pads each batch to its longest history and uses dense attention, at its own best batch size and
  with histories sorted by length, as the product's plan does; unsorted ones are noted.
- Compilation. The same steps with TrainSettings.compile.

--profile prints where a step's time goes instead. Only a whole run on CUDA is recorded: the CPU has no kernel for
packed attention and lays histories out padded there, which the rival, with its many lengths, pays most for.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from benchmarks.results import FOLDER, hardware, record, today
from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.encoder import Packing
from model.event_log import event_schema
from model.features import EventFeatures, build_vocabularies
from model.hybrid_tower import HybridTower
from model.release import library_versions
from model.training.data import EventArrays, Ints, StepBatch, TrainingData
from model.training.loop import Trainer
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for

TARGETS_PER_HISTORY = 16
SHORTEST, LONGEST = 17, 200
NO_EVENTS = np.empty(0, np.int64)
Steps = list[tuple[Ints, Ints]]


def undeduplicated(batch: StepBatch) -> StepBatch:
    """The same step with every target's own history, from its window's start to its cut, encoded by itself.

    The reference that deduplication is held to: by causality the last hidden state of such a history is the hidden
    state at that place of the window, and rotary positions see differences only. Both start where the window starts:
    a history longer than `history_limit` is cut into windows at other places each epoch, so an early target of a late
    window sees fewer events than serving would show it, here as there.
    """
    known_B = batch.hidden_B >= 0
    start_B = batch.events.offsets[batch.user_B[known_B]]
    events = batch.events.window(start_B, batch.hidden_B[known_B] + 1)
    hidden_B = torch.full_like(batch.hidden_B, -1)
    hidden_B[known_B] = events.offsets[1:] - 1
    return replace(batch, events=events, hidden_B=hidden_B)


def padded(batch: StepBatch) -> StepBatch:
    """The same step with every history filled up, at its end, to the longest: real events never attend to the fill."""
    events = batch.events
    length_U = events.offsets.diff()
    longest = int(length_U.max())
    place_UL = torch.minimum(torch.arange(longest), length_U[:, None] - 1)  # the last event is the filling
    index_T = (events.offsets[:-1, None] + place_UL).flatten()
    filled = EventFeatures(
        events.item_T[index_T], events.type_T[index_T], events.gap_T[index_T], events.column_TC[index_T],
        events.time_us_T[index_T], torch.arange(len(length_U) + 1) * longest,
    )  # fmt: skip
    place_B = batch.hidden_B - events.offsets[batch.user_B]
    hidden_B = torch.where(batch.hidden_B >= 0, batch.user_B * longest + place_B, -1)
    return replace(batch, events=filled, hidden_B=hidden_B)


def dense_causal_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """Attention of a batch in which all histories are equally long."""
    query, key, value = (
        x.unflatten(0, (-1, packing.longest)).transpose(1, 2) for x in (query_Thd, key_Thd, value_Thd)
    )  # fmt: skip
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(0, 1)


def make_table(users: int, items: int, seed: int, description: DatasetDescription) -> pa.Table:
    """Canonical events of generated histories: half of the events follow from the one before, the others are popular.

    One event in eight has the time of the one before it.
    """
    rng = np.random.default_rng(seed)
    length_U = np.clip(rng.lognormal(np.log(90), 0.7, users), SHORTEST, LONGEST).astype(np.int64)
    total = int(length_U.sum())
    rank_T = np.minimum(rng.zipf(1.2, total) - 1, 10**9) * 7919 % items
    follows_T = rng.random(total) < 0.5
    follows_T[0] = False
    item_T = rank_T.copy()
    for place in np.flatnonzero(follows_T).tolist():
        item_T[place] = (item_T[place - 1] * 31 + 17) % items
    since_s_T = np.cumsum(np.where(rng.random(total) < 0.125, 0, rng.integers(60, 40_000, total)))
    since_s_T -= np.repeat(since_s_T[np.cumsum(length_U) - length_U], length_U)
    none = np.zeros(total, np.int64)
    columns: dict[str, Any] = {
        "user_id": np.repeat(np.arange(users), length_U), "item_id": item_T, "event_type": ["click"] * total,
        "timestamp_us": 1_700_000_000_000_000 + since_s_T * 1_000_000,
        "order": none, "source_file": none.astype(np.int32), "source_row": np.arange(total), "row_hash": none,
    }  # fmt: skip
    return pa.table(columns, schema=event_schema(description))


@dataclass(frozen=True, slots=True)
class Case:
    """Data and shapes of one run of the benchmark."""

    device: torch.device
    config: TowerConfig
    settings: TrainSettings
    arrays: EventArrays
    description: DatasetDescription
    items: pa.Table
    table: pa.Table

    @classmethod
    def make(cls, device: str, users: int, items: int) -> "Case":
        """Generated histories and the settings the product would choose for them, 16 targets a history."""
        description = DatasetDescription.from_dict(
            {
                "name": "generated", "user_id_type": "int64", "item_id_type": "int64",
                "event_types": {"click": "positive"}, "evaluation": {"split": "leave_one_out"},
            }
        )  # fmt: skip
        table = make_table(users, items, 0, description)
        catalogue = pa.table({"item_id": pa.array(range(items), pa.int64())})
        counts = LogCounts(events=table.num_rows, users=users, items=items)
        config = config_for(description, counts)
        settings = replace(
            settings_for(description, counts, device=device),
            targets_per_history=TARGETS_PER_HISTORY, mask_same_user=True, warmup_steps=20,
        )  # fmt: skip
        tower = HybridTower.build(config, description, build_vocabularies(description, table, None), catalogue)
        arrays = EventArrays.build(table, None, tower.featuriser, description)
        return cls(torch.device(device), config, settings, arrays, description, catalogue, table)

    def tower(self) -> HybridTower:
        """A fresh tower, always with the same weights."""
        torch.manual_seed(0)
        vocabularies = build_vocabularies(self.description, self.table, None)
        return HybridTower.build(self.config, self.description, vocabularies, self.items)

    def data(self, tokens: int, **changes: Any) -> TrainingData:
        """The steps of at most `tokens` events."""
        settings = replace(self.settings, tokens_per_step=tokens, **changes)
        return TrainingData(self.arrays, NO_EVENTS, self.tower().items.embedder, self.config, settings, None)

    def trainer(self, data: TrainingData, *, seed: int = 0, compiled: bool = False) -> Trainer:
        """A trainer of a fresh tower. seed: of dropout; the steps follow from the data's own."""
        settings = replace(data.settings, seed=seed, compile=compiled)
        return Trainer(self.tower(), data, NO_EVENTS, settings, device=str(self.device))

    def batches(self, data: TrainingData, steps: Steps, change: Callable[[StepBatch], StepBatch]) -> list[StepBatch]:
        """Prepared batches, changed, in page-locked memory where the device copies from there."""
        made = [data.step(windows, 0, number) for number, windows in enumerate(steps)]
        changed = [change(batch) for batch in made if batch is not None]
        return [batch.pinned() for batch in changed] if self.device.type == "cuda" else changed


def same(batch: StepBatch) -> StepBatch:
    """The step as it is."""
    return batch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision that Trainer.run chooses."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(trainer: Trainer, batch: StepBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and every gradient of one step without dropout."""
    trainer.tower.eval()
    trainer.tower.zero_grad(set_to_none=True)
    loss = trainer.loss(batch.to(trainer.device))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in trainer.tower.named_parameters() if p.grad is not None}
    return loss.detach(), found


def in_double(batch: StepBatch) -> StepBatch:
    """The step with its context's numbers in float64, for a tower in float64."""
    context = batch.context
    return replace(
        batch,
        context=replace(
            context, subject_weight_BM=context.subject_weight_BM.double(), query_BQ=context.query_BQ.double()
        ),
    )  # fmt: skip


def largest_difference(
    one: tuple[torch.Tensor, dict[str, torch.Tensor]], two: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> float:
    """Largest difference of loss and gradients, each relative to the largest value of its tensor."""
    if one[1].keys() != two[1].keys():
        raise ValueError(f"gradients of other parameters: {sorted(one[1].keys() ^ two[1].keys())}")
    pairs = [(one[0], two[0]), *((one[1][name], two[1][name]) for name in one[1])]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)) for a, b in pairs)


def check(case: Case) -> None:
    """Deduplicated, undeduplicated and padded steps must be the same training step. Raises AssertionError."""
    data = case.data(2048, full_softmax_items=0, in_batch_negatives=256, uniform_negatives=256)
    batch = next(batch for windows in data.plan(0) if (batch := data.step(windows, 0, 0)) is not None)
    double = Trainer(case.tower().double(), data, NO_EVENTS, data.settings)
    found = gradients(double, in_double(batch))
    apart = largest_difference(gradients(double, in_double(undeduplicated(batch))), found)
    with dense():
        fill = largest_difference(gradients(double, in_double(padded(batch))), found)
    print(f"float64 on the CPU, relative: without deduplication {apart:.1e}, padded {fill:.1e}", flush=True)
    assert max(apart, fill) <= 1e-9, (apart, fill)
    trainer = case.trainer(data)
    loss = gradients(trainer, batch)[0]
    other = gradients(trainer, undeduplicated(batch))[0]
    with dense():
        third = gradients(trainer, padded(batch))[0]
    print(f"{case.device}, losses: {loss:.6f}, without deduplication {other:.6f}, padded {third:.6f}", flush=True)
    assert max(abs(loss - other), abs(loss - third)) <= 5e-3 * abs(loss), (loss, other, third)


def dense() -> Any:
    """Padded batches need the dense attention."""
    return patch("model.encoder.packed_causal_attention", dense_causal_attention)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to do training steps at one batch size."""

    name: str
    trainer: Trainer
    batches: list[StepBatch]
    histories: int
    """In all batches together; so are the others."""
    targets: int
    events: int
    encoded: int
    """Events the encoder runs over, repeated histories and filling included."""
    is_dense: bool = False

    def pass_s(self) -> float:
        """Seconds for one pass over the batches."""
        device = self.trainer.device
        wait(device)
        started = time.perf_counter()
        for number, batch in enumerate(self.batches):
            self.trainer._step(batch, number, 10_000)
        wait(device)
        return time.perf_counter() - started


def make_arm(
    case: Case, name: str, windows: tuple[Ints, Ints], tokens: int, change: Callable[[StepBatch], StepBatch] = same,
    *, compiled: bool = False,
) -> Arm:  # fmt: skip
    """An arm that trains on the windows in their order, about `tokens` different events a step."""
    data = case.data(tokens)
    steps = cut(windows, tokens)
    batches = case.batches(data, steps, change)
    return Arm(
        name, case.trainer(data, compiled=compiled), batches,
        histories=sum(len(start) for start, _ in steps), targets=sum(len(batch.item_B) for batch in batches),
        events=sum(int((end - start).sum()) for start, end in steps),
        encoded=sum(len(batch.events.item_T) for batch in batches), is_dense=change is padded,
    )  # fmt: skip


def pool(data: TrainingData, events: int, *, is_sorted: bool) -> tuple[Ints, Ints]:
    """Windows of about so many events in all, the same ones sorted by length or in random order."""
    start_W, end_W = (np.concatenate(part) for part in zip(*data.plan(0), strict=True))
    order = np.random.default_rng(0).permutation(len(start_W))
    order = order[: np.searchsorted(np.cumsum((end_W - start_W)[order]), events) + 1]
    if is_sorted:
        order = order[np.argsort((end_W - start_W)[order], kind="stable")]
    return start_W[order], end_W[order]


def cut(windows: tuple[Ints, Ints], tokens: int) -> Steps:
    """Windows in their order, as steps of about `tokens` events each."""
    start_W, end_W = windows
    before_W = np.cumsum(end_W - start_W) - (end_W - start_W)
    edges = [0, *(np.flatnonzero(np.diff(before_W // tokens)) + 1).tolist(), len(start_W)]
    return [(start_W[a:b], end_W[a:b]) for a, b in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Timing:
    """An arm's figures, medians over the passes."""

    arm: Arm
    seconds: list[float]

    @property
    def histories_per_s(self) -> float:
        """Different histories trained on, a second."""
        return self.arm.histories / statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        median = statistics.median(self.seconds)
        count = len(self.arm.batches)
        return {
            "arm": self.arm.name, "tokens_per_step": round(self.arm.events / count),
            "encoded_per_step": round(self.arm.encoded / count), "targets_per_step": round(self.arm.targets / count),
            "step_ms": round(1e3 * median / count, 3), "sequences_per_s": round(self.histories_per_s, 1),
            "targets_per_s": round(self.arm.targets / median, 1), "tokens_per_s": round(self.arm.events / median, 1),
            "spread": round((max(self.seconds) - min(self.seconds)) / median, 3),
        }  # fmt: skip


def measure(arms: Sequence[Arm], repeats: int) -> list[Timing]:
    """All arms, one pass each in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm in arms:
            if arm.is_dense:
                with dense():
                    took = arm.pass_s()
            else:
                took = arm.pass_s()
            if repeat:
                seconds[arm.name].append(took)
    timings = [Timing(arm, seconds[arm.name]) for arm in arms]
    for timing in timings:
        print(json.dumps(timing.to_dict()), flush=True)
    return timings


def gradient_of(case: Case, arm: Arm) -> torch.Tensor:
    """Gradient of an arm's loss on its first batch without dropout, all parameters in a row."""
    tower = arm.trainer.tower.eval()
    arm.trainer.loss(arm.batches[0].to(case.device)).backward()  # type: ignore[no-untyped-call]
    flat = torch.cat([p.grad.flatten().float() for p in tower.parameters() if p.grad is not None])
    tower.zero_grad(set_to_none=True)
    tower.train()
    return flat


def best(timings: Sequence[Timing], name: str) -> Timing:
    """The fastest of the arms whose name starts so."""
    return max((t for t in timings if t.arm.name.startswith(name)), key=lambda t: t.histories_per_s)


def curves(case: Case, tokens: int, count: int) -> dict[str, list[float]]:
    """Losses of `count` steps: deduplicated, without, and deduplicated with three other series of dropout draws."""
    data = case.data(tokens)
    found: dict[str, list[float]] = {}
    kinds: list[tuple[str, Callable[[StepBatch], StepBatch], int]] = [
        ("deduplicated", same, 0), ("undeduplicated", undeduplicated, 0),
        *((f"other_dropout_{seed}", same, seed) for seed in (1, 2, 3)),
    ]  # fmt: skip
    for name, change, seed in kinds:
        started = time.perf_counter()
        trainer = case.trainer(data, seed=seed)
        losses: list[torch.Tensor] = []
        epoch = 0
        while len(losses) < count:
            steps = data.plan(epoch)[: count - len(losses)]
            for number, windows in enumerate(steps):
                batch = data.step(windows, epoch, number)
                if batch is not None:
                    losses.append(trainer._step(change(batch), number, len(steps)))
                trainer.progress.step, trainer.progress.total_steps = number + 1, trainer.progress.total_steps + 1
            epoch += 1
            trainer.progress.epoch, trainer.progress.step = epoch, 0
        found[name] = torch.stack(losses).tolist()
        print(f"{count} steps {name} in {time.perf_counter() - started:.1f} s: loss {found[name][-1]:.4f}", flush=True)
    return found


def gap(one: Sequence[float], two: Sequence[float], block: int) -> float:
    """Largest difference of the means of blocks of steps, over the whole curve."""
    size = len(one) // block * block
    means = [np.reshape(curve[:size], (-1, block)).mean(1) for curve in (one, two)]
    return float(np.abs(means[0] - means[1]).max())


def pipeline_rate(case: Case) -> float:
    """Histories a second of one epoch as the product runs it, preparation included, after one not counted."""
    data = case.data(case.settings.tokens_per_step)
    trainer = case.trainer(data)
    rates = []
    for epoch in range(3):
        trainer.progress.epoch = epoch
        wait(case.device)
        started = time.perf_counter()
        steps = data.plan(epoch)
        for number, batch in enumerate(trainer._batches(steps)):
            if batch is not None:
                trainer._step(batch, number, len(steps))
        wait(case.device)
        rates.append(sum(len(start) for start, _ in steps) / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def profile(case: Case, tokens: int) -> None:
    """Print where the time of a step goes: each stage waited for, the whole unwaited, and the costliest operators."""
    data = case.data(tokens)
    trainer, device = case.trainer(data), case.device
    plan = data.plan(0)
    started = time.perf_counter()
    made = [data.step(windows, 0, number) for number, windows in enumerate(plan[:12])]
    prepared_s = (time.perf_counter() - started) / len(made)
    batches = [batch for batch in made if batch is not None]
    if device.type == "cuda":
        started = time.perf_counter()
        batches = [batch.pinned() for batch in batches]
        print(f"page-locking {1e3 * (time.perf_counter() - started) / len(batches):.2f} ms a step")
    print(f"preparing {1e3 * prepared_s:.2f} ms a step on one core, {len(batches[0].item_B):,} targets")
    for number, batch in enumerate(batches[:4]):
        trainer._step(batch, number, 10_000)
    stages: dict[str, list[float]] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        wait(device)
        started = time.perf_counter()
        yield
        wait(device)
        stages.setdefault(name, []).append(time.perf_counter() - started)

    for batch in batches:
        trainer.tower.train()
        trainer._optimiser.zero_grad(set_to_none=True)
        with stage("copy to the device"):
            moved = batch.to(device)
        with stage("forward and loss"):
            loss = trainer.loss(moved)
        with stage("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with stage("clip"):
            torch.nn.utils.clip_grad_norm_(trainer.tower.parameters(), 1.0)
        with stage("optimiser"):
            trainer._optimiser.step()
    for name, seconds in stages.items():
        print(f"{name}: {1e3 * statistics.median(seconds):.2f} ms, waited for")
    print(f"CUDA_LAUNCH_BLOCKING={os.environ.get('CUDA_LAUNCH_BLOCKING', '')!r}")
    wait(device)
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        trainer._step(batch, number, 10_000)
    queued_s = time.perf_counter() - started
    wait(device)
    whole_s = time.perf_counter() - started
    print(
        f"a step: {1e3 * whole_s / len(batches):.2f} ms; the host is done with its part after "
        f"{1e3 * queued_s / len(batches):.2f} ms (near the whole: bound by the host, or made to wait)"
    )
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer._step(batches[0], 0, 10_000)
        torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        print(f"waits for the device in a step: {len(waits)}")
        for where in sorted({f"{w.filename}:{w.lineno}" for w in caught}):
            print(f"  {where}")
    with torch.profiler.profile() as found:
        for number, batch in enumerate(batches):
            trainer._step(batch, number, 10_000)
        wait(device)
    averages = found.key_averages()
    launches = sum(e.count for e in averages if e.key.startswith("cudaLaunchKernel")) / len(batches)
    print(f"kernels launched in a step: {launches:.0f}")
    for key in ("self_device_time_total", "self_cpu_time_total") if device.type == "cuda" else ("self_cpu_time_total",):
        print(averages.table(sort_by=key, row_limit=20, max_name_column_width=60))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of everything one run of the benchmark does."""

    users: int
    items: int
    sizes: tuple[int, ...]
    """Different events a step, deduplicated; the rival, which encodes several times as many, also gets halves and
    quarters. The largest must keep a GPU busy: below, both sides take as long as their kernels take to launch."""
    pool: int
    """Different events in one timed pass."""
    repeats: int
    curve_steps: int
    curve_tokens: int


QUICK = Extent(400, 500, (4096,), 2**13, repeats=1, curve_steps=24, curve_tokens=1024)
ON_CPU = Extent(2000, 2000, (4096, 8192, 16_384), 2**15, repeats=3, curve_steps=96, curve_tokens=1024)
ON_CUDA = Extent(8000, 4000, (32_768, 65_536, 131_072), 2**19, repeats=3, curve_steps=300, curve_tokens=8192)


@dataclass(slots=True)
class Findings:
    """What is recorded: entries for the theme's file; timings and curves for the study's."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def write_study(self) -> None:
        """Put timings and curves into studies/training-speed.json."""
        study = {
            "timings": [timing.to_dict() for timing in self.timings],
            "curves": {name: [round(loss, 4) for loss in curve] for name, curve in self.curves.items()},
            "made": {"hardware": hardware(), "versions": library_versions(), "date": today()},
        }
        (FOLDER / "studies").mkdir(exist_ok=True)
        (FOLDER / "studies/training-speed.json").write_text(json.dumps(study) + "\n")


def compare(case: Case, extent: Extent) -> Findings:
    """All comparisons, the one that may fail for want of a compiler last."""
    found = Findings()
    ordered, mixed = (
        pool(case.data(extent.sizes[0]), extent.pool, is_sorted=is_sorted) for is_sorted in (True, False)
    )  # fmt: skip
    size = compare_deduplication(case, extent, mixed, found)
    compare_packing(case, extent, ordered, mixed, size, found)
    compare_curves(case, extent, found)
    rate = pipeline_rate(case)
    print(f"the product's loop, preparation included: {rate:,.0f} sequences/s", flush=True)
    found.entries.append(
        {
            "measure": "train.sequences_per_s", "value": round(rate, 1), "unit": "sequences/s",
            "note": f"the product's loop, preparation included, {case.settings.tokens_per_step:,} events a step, eager",
        }
    )  # fmt: skip
    compare_compilation(case, extent, ordered, size, found)
    return found


def compare_deduplication(case: Case, extent: Extent, windows: tuple[Ints, Ints], found: Findings) -> int:
    """With and without; returns the best number of events a step."""
    arms = {size: make_arm(case, f"deduplicated {size}", windows, size) for size in extent.sizes}
    sizes = sorted({size // share for size in extent.sizes for share in (1, 2, 4)})
    rivals = {size: make_arm(case, f"undeduplicated {size}", windows, size, undeduplicated) for size in sizes}
    timings = measure([*arms.values(), *rivals.values()], extent.repeats)
    found.timings += timings
    ours, rival = best(timings, "deduplicated"), best(timings, "undeduplicated")
    speedup = ours.histories_per_s / rival.histories_per_s
    print(f"deduplication: {speedup:.2f} x, {ours.arm.name} over {rival.arm.name}", flush=True)
    rate, rival_rate = ours.to_dict(), rival.to_dict()
    shared = max(arms.keys() & rivals.keys(), default=None)
    alike = ""
    if shared is not None:
        one, two = (best(timings, f"{name} {shared}").histories_per_s for name in ("deduplicated", "undeduplicated"))
        alike = f"; on the same steps of {shared:,} different events {one / two:.2f} x"
    found.entries.append(
        {
            "measure": "train.dedup_speedup", "value": round(speedup, 3), "unit": "x sequences/s", "target": 2,
            "note": (
                f"{rate['sequences_per_s']:,.0f} sequences/s ({rate['targets_per_s']:,.0f} targets/s, "
                f"{rate['tokens_per_s']:,.0f} tokens/s; {rate['encoded_per_step']:,} events encoded a step) against "
                f"{rival_rate['sequences_per_s']:,.0f} with every target's history by itself, packed "
                f"({rival_rate['encoded_per_step']:,}), each at its best batch size{alike}; "
                f"{TARGETS_PER_HISTORY} targets a history, d_model {case.config.d_model}, "
                f"{case.config.num_layers} layers, {case.arrays.num_items:,} items"
            ),
        }
    )  # fmt: skip
    return next(size for size, arm in arms.items() if arm is ours.arm)


def compare_packing(
    case: Case, extent: Extent, ordered: tuple[Ints, Ints], mixed: tuple[Ints, Ints], size: int, found: Findings
) -> None:  # fmt: skip
    """Packed and padded, both at two sizes and with histories sorted by length; padded unsorted besides."""
    kinds: list[tuple[str, tuple[Ints, Ints], Callable[[StepBatch], StepBatch]]] = [
        ("packed", ordered, same), ("padded", ordered, padded), ("unsorted padded", mixed, padded),
    ]  # fmt: skip
    arms = [
        make_arm(case, f"{name} {tokens}", windows, tokens, change)
        for name, windows, change in kinds
        for tokens in (size // 2, size)
    ]
    timings = measure(arms, extent.repeats)
    found.timings += timings
    packed, filled, loose = (best(timings, name) for name, _, _ in kinds)
    over_padded, over_unsorted = (packed.histories_per_s / t.histories_per_s for t in (filled, loose))
    waste, loose_waste = (t.arm.encoded / t.arm.events - 1 for t in (filled, loose))
    print(f"packing: {over_padded:.2f} x over sorted, {over_unsorted:.2f} x over unsorted padding", flush=True)
    found.entries.append(
        {
            "measure": "train.packed_over_padded", "value": round(over_padded, 3), "unit": "x sequences/s",
            "rival": "padded, histories sorted by length", "rival_value": 1,
            "note": f"{waste:.0%} filling; unsorted, {loose_waste:.0%} filling: {over_unsorted:.2f} x",
        }
    )  # fmt: skip


def compare_curves(case: Case, extent: Extent, found: Findings) -> None:
    """How far losses drift apart by deduplication, and by other dropout draws."""
    found.curves = curves(case, extent.curve_tokens, extent.curve_steps)
    block = extent.curve_steps // 12
    apart = gap(found.curves["deduplicated"], found.curves["undeduplicated"], block)
    alike = [curve for name, curve in found.curves.items() if name != "undeduplicated"]
    noise = max(gap(one, two, block) for one, two in combinations(alike, 2))
    print(f"curves: {apart:.4f} apart by deduplication, up to {noise:.4f} by other dropout draws", flush=True)
    found.entries.append(
        {
            "measure": "train.dedup_loss_gap", "value": round(apart, 4), "unit": "loss, largest difference",
            "rival": "other dropout draws", "rival_value": round(noise, 4), "target": round(noise, 4),
            "note": (
                f"between means of blocks of {block} of {extent.curve_steps} steps on the same targets from the same "
                "weights; the target is the largest difference among four runs that differ by dropout draws alone"
            ),
        }
    )  # fmt: skip


def compare_compilation(
    case: Case, extent: Extent, windows: tuple[Ints, Ints], size: int, found: Findings
) -> None:  # fmt: skip
    """Compiled and eager steps; nothing where the machine cannot compile."""
    eager, compiled = (
        make_arm(case, name, windows, size, compiled=name == "compiled") for name in ("eager", "compiled")
    )
    wanted = gradient_of(case, eager)
    started = time.perf_counter()
    try:
        gradient = gradient_of(case, compiled)  # both as they begin, so of the same weights
        compiled.pass_s()
    except Exception as error:  # compilers fail in many ways
        print(f"compilation: not here: {type(error).__name__}: {error}", flush=True)
        return
    compile_s = time.perf_counter() - started
    off = float((gradient - wanted).norm() / wanted.norm())
    print(f"gradient of the compiled step off by {off:.1e} of its length", flush=True)
    assert off <= (3e-2 if case.device.type == "cuda" else 1e-4), off  # bfloat16 rounds elsewhere once steps are fused
    timings = measure([eager, compiled], extent.repeats)
    found.timings += timings
    over_eager = timings[1].histories_per_s / timings[0].histories_per_s
    print(f"compilation: {over_eager:.2f} x, {compile_s:.0f} s for the first pass", flush=True)
    found.entries.append(
        {
            "measure": "train.compile_over_eager", "value": round(over_eager, 3), "unit": "x sequences/s",
            "rival": "eager", "rival_value": 1,
            "note": f"encoder and head; {compile_s:.0f} s for the first pass, about {size:,} events a step",
        }
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Check, compare, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.training_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small and few; records nothing")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes; records nothing")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    is_cuda = args.device.startswith("cuda")
    extent = QUICK if args.quick else ON_CUDA if is_cuda else ON_CPU
    case = Case.make(args.device, extent.users, extent.items)
    with fast_products(case.device):
        if args.profile:
            profile(case, case.settings.tokens_per_step)
            return 0
        check(case)
        found = compare(case, extent)
    if is_cuda and not args.quick and not args.no_record:
        found.write_study()
        record("quality", found.entries)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
