"""Deduplication is held to a reference that encodes every target's own history by itself, in float64, to 1e-9."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.training_speed import (
    Case,
    cut,
    dense,
    gap,
    gradients,
    in_double,
    largest_difference,
    padded,
    pool,
    undeduplicated,
)
from model.config import TowerConfig
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.features import EventFeatures, build_vocabularies
from model.hybrid_tower import HybridTower
from model.training.data import EventArrays, TrainingData, absent_contexts
from model.training.data import StepBatch as Batch
from model.training.loop import Trainer
from model.training.settings import TrainSettings
from tests.builders import make_description, make_items, make_rows, make_users, write_log

CONFIG = TowerConfig(
    d_model=8, num_layers=2, num_heads=2, history_limit=8, embedding_dim=8, head_hidden=16, hash_rows=8, context_dim=8,
    session_limit=3, subject_limit=2,
)  # fmt: skip
SETTINGS = TrainSettings(
    tokens_per_step=200, stale_share=0.4, lag_share=0.5, full_softmax_items=0, in_batch_negatives=64,
    uniform_negatives=4, half_life_days=2.0,
)  # fmt: skip


def small_batch():
    """Two histories, of items 10 11 12 and 20 21; four targets, one of them cold."""
    events = EventFeatures(
        item_T=torch.tensor([10, 11, 12, 20, 21]), type_T=torch.full((5,), 2), gap_T=torch.tensor([0, 5, 6, 0, 7]),
        column_TC=torch.zeros(5, 0, dtype=torch.int64), time_us_T=torch.arange(5), offsets=torch.tensor([0, 3, 5]),
    )  # fmt: skip
    return Batch(
        events=events, hidden_B=torch.tensor([2, 0, -1, 4]), context=absent_contexts(4, 0, CONFIG),
        item_B=torch.tensor([1, 2, 3, 4]), user_B=torch.tensor([0, 0, 1, 1]), weight_B=torch.ones(4),
        candidate_S=torch.arange(5), log_q_S=None, time_us_B=torch.zeros(4, dtype=torch.int64), born_us_S=None,
    )  # fmt: skip


def test_the_reference_repeats_a_history_for_each_of_its_targets():
    batch = undeduplicated(small_batch())
    assert batch.events.item_T.tolist() == [10, 11, 12, 10, 20, 21]
    assert batch.events.gap_T.tolist() == [0, 5, 6, 0, 0, 7]
    assert batch.events.offsets.tolist() == [0, 3, 4, 6]
    assert batch.hidden_B.tolist() == [2, 3, -1, 5]
    assert batch.user_B.tolist() == [0, 0, 1, 1]  # still one user each, or negatives would not be masked


def test_padding_repeats_the_last_event():
    batch = padded(small_batch())
    assert batch.events.item_T.tolist() == [10, 11, 12, 20, 21, 21]
    assert batch.events.offsets.tolist() == [0, 3, 6]
    assert batch.hidden_B.tolist() == [2, 0, -1, 4]


@pytest.fixture
def trainer(tmp_path):
    """A tower in float64 over 10 users of 13 events, two at a time at one instant, six hours between the pairs."""
    rows = make_rows(users=10, length=13)
    for place, row in enumerate(rows):
        row["timestamp"] = 1_700_000_000 + place % 13 // 2 * 6 * 3600
    write_log(tmp_path / "events.parquet", rows)
    pq.write_table(make_items(), tmp_path / "items.parquet")
    pq.write_table(make_users(10), tmp_path / "users.parquet")
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(make_description().to_dict()), encoding="utf-8")
    description = load_description(str(tmp_path / "dataset.yaml"))
    events, _ = read_log(str(tmp_path / "events.parquet"), description)
    items = read_items(str(tmp_path / "items.parquet"), description).sort_by("item_id")
    users = read_users(str(tmp_path / "users.parquet"), description)
    torch.manual_seed(0)
    tower = HybridTower.build(CONFIG, description, build_vocabularies(description, events, users), items)
    arrays = EventArrays.build(events, users, tower.featuriser, description)
    nothing = np.empty(0, np.int64)
    data = TrainingData(arrays, nothing, tower.items.embedder, CONFIG, SETTINGS, None)
    torch.nn.init.normal_(tower.head.cold_state_D)
    return Trainer(tower.double(), data, nothing, SETTINGS)


def test_deduplicated_loss_and_gradients_equal_the_references(trainer):
    data = trainer.data
    seen = dict.fromkeys(("cold", "shared", "lagged", "ties", "own negatives", "late windows"), 0)
    for number, windows in enumerate(data.plan(0)):
        batch = data.step(windows, 0, number)
        reference = undeduplicated(batch)
        found = gradients(trainer, in_double(batch))
        assert set(found[1]) == {name for name, _ in trainer.tower.named_parameters()}
        assert found[0].dtype == torch.float64
        assert largest_difference(found, gradients(trainer, in_double(reference))) <= 1e-9
        with dense():
            assert largest_difference(found, gradients(trainer, in_double(padded(batch)))) <= 1e-9

        known = batch.hidden_B >= 0
        assert len(reference.events.item_T) > len(batch.events.item_T)
        assert len(reference.events.offsets) - 1 == int(known.sum())
        seen["cold"] += int((~known).sum())
        seen["shared"] += int(known.sum()) - len(batch.hidden_B[known].unique())
        seen["lagged"] += int((batch.context.session_length_B[known] > 0).sum())
        seen["ties"] += int((batch.events.time_us_T[batch.hidden_B[known]] == batch.time_us_B[known]).sum())
        same_user = batch.user_B[:, None] == batch.user_B
        in_pool = (batch.item_B[:, None] == batch.candidate_S).any(1)
        seen["own negatives"] += int((same_user & (batch.item_B[:, None] != batch.item_B) & in_pool).sum())
        seen["late windows"] += int((~np.isin(windows[0], data.log.offsets)).sum())
    assert min(seen.values()) > 0, seen


def test_a_state_one_event_off_is_found_out(trainer):
    data = trainer.data
    batch = data.step(data.plan(0)[0], 0, 0)
    inner = batch.hidden_B > batch.events.offsets[batch.user_B]
    wrong = replace(batch, hidden_B=torch.where(inner, batch.hidden_B - 1, batch.hidden_B))
    right = gradients(trainer, in_double(batch))
    assert largest_difference(gradients(trainer, in_double(undeduplicated(wrong))), right) > 1e-3


def test_a_window_that_starts_late_is_a_history_cut_there(trainer):
    """An early target of a late window sees the events since the window's start; serving would show it more."""
    data, encoder = trainer.data, trainer.tower.encoder.eval()
    log = data.log
    start_W, end_W = (np.concatenate(part) for part in zip(*data.plan(0), strict=True))
    late = int(np.flatnonzero(~np.isin(start_W, log.offsets) & (end_W - start_W > 2))[0])
    first, second, end = (torch.tensor([value]) for value in (start_W[late], start_W[late] + 2, end_W[late]))
    served = torch.tensor([log.offsets[log.user_T[start_W[late]]]])
    with torch.no_grad():
        in_window_D = encoder(log.events.window(first, end))[1]
        alone_D = encoder(log.events.window(first, second))[-1]
        served_D = encoder(log.events.window(torch.maximum(served, second - CONFIG.history_limit), second))[-1]
    assert torch.allclose(in_window_D, alone_D, rtol=0, atol=1e-12)
    assert (in_window_D - served_D).abs().max() > 1e-3


def test_the_pool_holds_the_same_windows_in_either_order():
    case = Case.make("cpu", users=40, items=60)
    data = case.data(1024)
    ordered, mixed = (pool(data, 1500, is_sorted=is_sorted) for is_sorted in (True, False))
    assert sorted(ordered[0].tolist()) == sorted(mixed[0].tolist())
    length = ordered[1] - ordered[0]
    assert (np.diff(length) >= 0).all()
    assert 1500 <= length.sum() < 1500 + 200
    steps = cut(mixed, 400)
    assert np.concatenate([start for start, _ in steps]).tolist() == mixed[0].tolist()
    assert max(int((end - start).sum()) for start, end in steps) < 400 + 200


def test_generated_histories_have_16_targets_in_a_step():
    case = Case.make("cpu", users=300, items=100)
    data = case.data(2048)
    batches = [data.step(windows, 0, number) for number, windows in enumerate(data.plan(0))]
    targets = sum(len(batch.item_B) for batch in batches)
    histories = sum(len(batch.events.offsets) - 1 for batch in batches)
    assert 15 < targets / histories < 17
    assert (np.diff(case.arrays.offsets) >= 17).all()
    assert (np.diff(case.arrays.offsets) <= 200).all()


def test_the_gap_of_two_curves_is_that_of_block_means():
    # blocks of two: 1.5 and 4, against 2 and 2; the fifth step is left out
    assert gap([1.0, 2.0, 3.0, 5.0, 9.0], [2.0, 2.0, 2.0, 2.0, 0.0], 2) == 2.0
