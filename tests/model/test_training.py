"""Data preparation against values worked out by hand and against the featuriser; the loop on tiny towers."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.config import TowerConfig
from model.dataset import load_description
from model.errors import CheckpointError, ConfigError, DataError
from model.event_log import read_items, read_log, read_users
from model.features import build_vocabularies
from model.hybrid_tower import HybridTower
from model.records import Context, Event
from model.release import Manifest, Registry
from model.training import __main__ as command
from model.training.data import (
    EventArrays,
    SubjectSampler,
    TrainingData,
    cap,
    last_positives,
    training_part,
    validation_targets,
)
from model.training.evaluate import evaluate_quality
from model.training.loop import Trainer, train
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for
from tests.builders import make_description, make_event, make_event_table, write_dataset

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
SMALL = TowerConfig(
    d_model=8, num_layers=1, num_heads=2, history_limit=6, embedding_dim=8, head_hidden=16, hash_rows=8, context_dim=8,
    session_limit=3, subject_limit=2,
)  # fmt: skip
QUICK = TrainSettings(
    epochs=3, tokens_per_step=24, checkpoint_steps=3, warmup_steps=2, in_batch_negatives=8, uniform_negatives=8,
    full_softmax_items=0, validation_share=0.4,
)  # fmt: skip
LIVE = replace(SMALL, live_windows_h=(1.0, 24.0), live_dim=4, live_bucket_s=60, live_recent=2)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", users=12, length=9)


def read(folder, **changes):
    description = load_description(str(folder / "dataset.yaml"))
    if changes:
        description = make_description(**changes)
    events, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description).sort_by("item_id")
    return events, items, read_users(str(folder / "users.parquet"), description), description


def arrays_of(events, items, users, description, config=SMALL):
    vocabularies = build_vocabularies(description, events, users)
    tower = HybridTower.build(config, description, vocabularies, items)
    return EventArrays.build(events, users, tower.featuriser, description), tower


def small_log(times_h, description=None, types=None):
    """One user per list of hours since a midnight."""
    description = description or make_description(user_columns=[], item_columns={})
    histories = {
        user: [
            make_event(1 + i, types[user - 1][i] if types else "click", DAY_US * 19_000 + int(h * HOUR_US))
            for i, h in enumerate(hours)
        ]
        for user, hours in enumerate(times_h, 1)
    }
    items = pa.table({"item_id": pa.array(range(1, 20), pa.int64())})
    return make_event_table(histories, description), items, description


def test_refresh_cuts_by_hand():
    # refresh at 03:00; a refresh sees what happened at 03:00 sharp
    description = make_description(user_columns=[], item_columns={}, refresh_time="03:00")
    table, items, _ = small_log([[2, 3, 3.5, 26, 27, 27, 28], [1, 2.9, 10]], description)
    arrays, _ = arrays_of(table, items, None, description)
    # user 1: events 0 to 6; user 2: events 7 to 9
    #  2:00 nothing before; 3:00 sees 2:00 only since it is the event itself that is asked; 3:30 sees both;
    # 26:00 is before the next refresh; 27:00 is the next refresh and sees all before; so does its twin; 28:00 sees both
    assert arrays.refresh_cut_T.tolist() == [-1, 0, 1, 1, 3, 4, 5, 6, 6, 8]
    assert arrays.tie_end_T.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]


def test_split_by_time_keeps_what_comes_before_the_test():
    description = make_description(
        user_columns=[], item_columns={}, evaluation={"split": "time", "test_from": "2022-01-09T05:00:00Z"}
    )
    table, _, _ = small_log([[1, 4, 5, 6], [2], [9]], description)  # day 19000 is 2022-01-08
    table = table.set_column(3, "timestamp_us", pa.array(table["timestamp_us"].to_numpy() + DAY_US))
    split = training_part(table, description)
    assert split.train["user_id"].to_pylist() == [1, 1, 2]
    assert split.test_from_us == DAY_US * 19_001 + 5 * HOUR_US


def test_leave_one_out_takes_the_last_positive_and_all_after_it():
    description = make_description(user_columns=[], item_columns={}, evaluation={"split": "leave_one_out"})
    types = [["click", "view", "click", "view"], ["view", "click", "view"], ["click", "click"]]
    table, _, _ = small_log([[1, 2, 3, 4], [1, 2, 3], [1, 2]], description, types)
    # user 2 has one positive only: nothing can be asked, all may be learned
    train_part = training_part(table, description).train
    assert train_part["user_id"].to_pylist() == [1, 1, 2, 2, 2, 3]
    assert last_positives(np.array([0, 4, 7, 9]), np.array([1, 0, 1, 0, 0, 1, 0, 1, 1], bool)).tolist() == [2, -1, 8]


def test_nothing_to_learn_from_is_an_error():
    description = make_description(
        user_columns=[], item_columns={}, evaluation={"split": "time", "test_from": "2000-01-01T00:00:00Z"}
    )
    table, _, _ = small_log([[1, 2]], description)
    with pytest.raises(DataError, match="nothing to learn from"):
        training_part(table, description)


def test_caps_say_what_they_left_out():
    table, _, _ = small_log([[1, 2], [3, 4], [5, 6], [7, 8]])
    kept, said = cap(table, TrainSettings(max_users=3, max_events=4))
    assert kept.num_rows == 4
    assert said == ["3 of 4 users, drawn with seed 0", "the latest 4 of 6 events"]
    assert cap(table, TrainSettings())[1] == []


def test_contexts_equal_the_featurisers(dataset):
    """The packed log gives a request the very tensors that the service's featuriser gives it."""
    events, items, users, description = read(dataset)
    arrays, tower = arrays_of(events, items, users, description)
    rng = np.random.default_rng(0)
    target = np.sort(rng.choice(events.num_rows, 40, replace=False))
    start = arrays.offsets[arrays.user_T[target]]
    cut = np.maximum(target - 1 - rng.integers(0, 6, len(target)), -1)
    cut = np.where(cut < start, -1, cut)
    found = arrays.contexts(target, cut, SMALL)
    rows, gender = events.to_pylist(), dict(zip(*(users[c].to_pylist() for c in ("user_id", "gender")), strict=True))
    contexts = []
    for j, s, first in zip(target.tolist(), cut.tolist(), start.tolist(), strict=True):
        since = rows[max(s + 1, first) : j]
        features = {"device": rows[j]["device"], "gender": gender[rows[j]["user_id"]]}
        contexts.append(
            Context(
                features={name: value for name, value in features.items() if value is not None},
                timestamp_us=rows[j]["timestamp_us"],
                session_events=tuple(Event(r["item_id"], r["event_type"], r["timestamp_us"]) for r in since),
            )
        )
    until = [None if s < 0 else rows[s]["timestamp_us"] for s in cut.tolist()]
    wanted = tower.featuriser.contexts(contexts, until)
    used = torch.arange(SMALL.session_limit) < wanted.session_length_B[:, None]
    for name in ("category_BC", "hour_B", "weekday_B", "age_B", "session_length_B", "subject_weight_BM", "query_BQ"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("session_item_BK", "session_type_BK", "session_gap_BK"):
        assert torch.equal(getattr(found, name) * used, getattr(wanted, name) * used), name
    assert wanted.session_length_B.max() == SMALL.session_limit


def training_data(dataset, settings, config=SMALL):
    events, items, users, description = read(dataset)
    arrays, tower = arrays_of(events, items, users, description, config)
    held_out = validation_targets(arrays, settings, by_time=False)
    return TrainingData(arrays, held_out, tower.items.embedder, config, settings, None), held_out


def test_targets_of_some_users_leave_the_log_whole(dataset):
    whole, _ = training_data(dataset, QUICK, LIVE)
    some, _ = training_data(dataset, replace(QUICK, max_target_users=3), LIVE)
    users = np.unique(some.log.user_T[some.is_target_T])
    assert 1 <= len(users) <= 3
    assert (some.is_target_T == whole.is_target_T & np.isin(whole.log.user_T, users)).all()
    assert some.num_targets == some.is_target_T.sum() < whole.num_targets
    assert torch.equal(some.live.items.place_P, whole.live.items.place_P)


def test_a_step_gathers_the_state_before_each_target(dataset):
    settings = replace(QUICK, stale_share=0.0, lag_share=0.5, tokens_per_step=1000)
    data, held_out = training_data(dataset, settings)
    log = data.log
    asked = set()
    for epoch in range(3):
        plan = data.plan(epoch)
        for number, windows in enumerate(plan):
            batch = data.step(windows, epoch, number)
            event_T = np.concatenate([np.arange(s, e) for s, e in zip(*windows, strict=True)])
            assert torch.equal(batch.events.item_T, torch.from_numpy(log.item_T[event_T]))
            known = batch.hidden_B >= 0
            state_event = event_T[batch.hidden_B[known].numpy()]
            window_of = np.repeat(np.arange(len(windows[0])), windows[1] - windows[0])
            assert (window_of[batch.hidden_B[known].numpy()] == batch.user_B[known].numpy()).all()
            target_time = batch.time_us_B[known].numpy()
            assert (log.time_us_T[state_event] <= target_time).all()
            # the state and the session are all there is before the target, up to the session's limit
            target = np.array([
                event_T[(window_of == u) & (log.time_us_T[event_T] == t)][0]
                for u, t in zip(batch.user_B.tolist(), batch.time_us_B.tolist(), strict=True)
            ])  # fmt: skip
            assert (log.item_T[target] == batch.item_B.numpy()).all()
            gap = target[known.numpy()] - 1 - state_event
            assert (np.minimum(gap, SMALL.session_limit) == batch.context.session_length_B[known].numpy()).all()
            asked |= set(target.tolist())
    assert not asked & set(held_out.tolist())
    # history_limit cuts users of 9 events into windows; with three epochs nearly every target was asked
    assert len(asked) > 0.9 * data.num_targets


def test_stale_states_end_at_the_refresh(dataset):
    data, _ = training_data(dataset, replace(QUICK, stale_share=1.0))
    batch = data.step(data.plan(0)[0], 0, 0)
    # the whole log lies within one day: no refresh has seen anything, so every state is cold and the session is all
    assert (batch.hidden_B == -1).all()
    assert (batch.context.age_B == 0).all()


def test_windows_cover_each_event_once_and_keep_to_the_limit(dataset):
    data, _ = training_data(dataset, replace(QUICK, validation_share=0.0))
    start, end = data._windows(np.random.default_rng(0))
    assert (end - start).max() <= SMALL.history_limit
    covered = np.concatenate([np.arange(s, e) for s, e in zip(start, end, strict=True)])
    assert len(np.unique(covered)) == len(covered)
    assert set(np.flatnonzero(data.is_target_T)) <= set(covered.tolist())


def test_subjects_share_a_category_and_are_never_the_positive(dataset):
    events, items, users, description = read(dataset)
    _, tower = arrays_of(events, items, users, description)
    sampler = SubjectSampler(tower.items.embedder)
    item = np.tile(np.arange(20), 30)
    rows, weights = sampler.draw(item, 0.5, 2, np.random.default_rng(0))
    given = weights > 0
    assert 0.3 < given[:, 0].mean() < 0.55
    values = [{*row["categories"], row["brand"]} - {None} for row in items.to_pylist()]
    for b, m in zip(*np.nonzero(given), strict=True):
        assert rows[b, m] != item[b]
        assert values[rows[b, m]] & values[item[b]]
    assert (weights <= 1).all()


def run(dataset, folder, settings=QUICK, **options):
    events, items, users, description = read(dataset)
    registry = Registry(folder / "registry")
    config = None if options.get("head_only_from") else SMALL
    return train(
        events, items, users, description, registry, settings=settings, config=config, folder=folder, **options
    ), registry  # fmt: skip


def weights(registry, manifest):
    release = registry.load(manifest.release_id, replay=False)
    parts = {"encoder": release.encoder, "head": release.head, "items": release.items}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_to_the_same_weights(dataset, tmp_path):
    undisturbed, registry = run(dataset, tmp_path / "a")
    assert undisturbed.manifest.metrics["validation_ndcg@20"] >= 0

    def kill(step):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(dataset, tmp_path / "b", on_step=kill)
    assert not Registry(tmp_path / "b/registry").releases()
    steps = []
    resumed, other = run(dataset, tmp_path / "b", resume=True, on_step=steps.append)
    assert steps[0] == 4  # the checkpoint was made after step 3
    one, two = weights(registry, undisturbed.manifest), weights(other, resumed.manifest)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert undisturbed.manifest.embedding_version == resumed.manifest.embedding_version


def test_releases_at_epochs_are_marked_and_leave_the_run_as_it_is(dataset, tmp_path):
    plain, _ = run(dataset, tmp_path / "a")
    made, registry = run(dataset, tmp_path / "b", release_at=(1, 3))
    assert made.manifest.embedding_version == plain.manifest.embedding_version
    manifests = [registry.manifest(name) for name in registry.releases()]
    best = made.summary["best_epoch"]
    assert {manifest.lineage.epoch for manifest in manifests} == {1, 3, best}
    assert len(manifests) == len({1, 3, best})  # the best epoch's is written once
    assert made.manifest.lineage.epoch == best
    for manifest in manifests:
        assert (manifest.lineage.run, manifest.lineage.seed) == (made.summary["run"], 0)
        history = {row["epoch"]: row for row in made.summary["history"]}
        assert manifest.metrics["loss"] == history[manifest.lineage.epoch]["loss"]
        assert registry.load(manifest.release_id).verify().passed


def test_a_resumed_run_makes_no_release_twice(dataset, tmp_path, monkeypatch):
    """Killed between the release of epoch 1 and the checkpoint after it, the run comes by that epoch's end again."""
    save, often = Trainer.save, replace(QUICK, checkpoint_steps=1)

    def kill(trainer):
        if (trainer.progress.epoch, trainer.progress.step) == (1, 0):
            raise Killed
        save(trainer)

    monkeypatch.setattr(Trainer, "save", kill)
    with pytest.raises(Killed):
        run(dataset, tmp_path, often, release_at=(1,))
    monkeypatch.undo()
    first = Registry(tmp_path / "registry").releases()
    assert len(first) == 1
    made, registry = run(dataset, tmp_path, often, release_at=(1,), resume=True)
    lineages = [registry.manifest(name).lineage for name in registry.releases()]
    assert [lineage.epoch for lineage in lineages].count(1) == 1
    assert {lineage.run for lineage in lineages} == {made.summary["run"]}
    assert registry.releases()[0] == first[0]


def test_releases_at_epochs_the_run_has_not_are_refused(dataset, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"epochs 1 to 3, not at \[0, 4\]"):
        run(dataset, tmp_path, release_at=(0, 2, 4))
    with pytest.raises(SystemExit):
        command.main(["--events", "e", "--items", "i", "--registry", "r", "--release-at", "1,x"])
    assert "numbers with commas between, got '1,x'" in capsys.readouterr().err


def test_a_manifest_from_before_runs_were_named_still_reads(dataset, tmp_path):
    made, _ = run(dataset, tmp_path, replace(QUICK, epochs=1))
    values = made.manifest.to_dict()
    assert Manifest.from_dict(values) == made.manifest
    del values["lineage"]
    assert Manifest.from_dict(values).lineage is None


def test_another_seed_gives_other_weights(dataset, tmp_path):
    one, _ = run(dataset, tmp_path / "a", replace(QUICK, epochs=1))
    two, _ = run(dataset, tmp_path / "b", replace(QUICK, epochs=1, seed=1))
    assert one.manifest.embedding_version != two.manifest.embedding_version


def test_a_checkpoint_of_another_run_is_refused(dataset, tmp_path):
    run(dataset, tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(CheckpointError, match="other settings"):
        run(dataset, tmp_path, replace(QUICK, epochs=1, learning_rate=0.1), resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(dataset, tmp_path, replace(QUICK, epochs=1), resume=True)


def test_head_only_keeps_the_state_version(dataset, tmp_path):
    base, registry = run(dataset, tmp_path, replace(QUICK, epochs=1))
    before = weights(registry, base.manifest)
    again, _ = run(dataset, tmp_path, replace(QUICK, epochs=2), head_only_from=base.manifest.release_id)
    assert again.manifest.state_version == base.manifest.state_version
    assert again.manifest.embedding_version != base.manifest.embedding_version
    after = weights(registry, again.manifest)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head", "items"}


@pytest.mark.parametrize("changes", [{}, {"state_tokens": 3, "storage_codec": "int8"}])
def test_training_learns_a_pattern(tmp_path, changes):
    """Items come in a fixed cycle: after item i comes i + 1. Ranking the next item first is learnable."""
    description = make_description(
        user_columns=[], item_columns={}, event_columns=[], context_columns=[], evaluation={"split": "leave_one_out"}
    )
    histories = {u: [make_event(1 + (u + i) % 10, timestamp_us=i * HOUR_US) for i in range(20)] for u in range(40)}
    table = make_event_table(histories, description)
    items = pa.table({"item_id": pa.array(range(1, 11), pa.int64())})
    settings = replace(
        QUICK, epochs=12, tokens_per_step=200, full_softmax_items=100, mask_same_user=False, stale_share=0.1,
        learning_rate=1e-2, patience=12,
    )  # fmt: skip
    config = replace(SMALL, dropout=0.0, history_limit=20, item_dropout=0.0, **changes)
    result = train(table, items, None, description, Registry(tmp_path), settings=settings, config=config)
    assert result.manifest.metrics["validation_mrr"] > 0.9
    latents = Registry(tmp_path).load(result.manifest.release_id).encoder.latents
    assert (latents is None) == (not changes)
    if latents is not None:  # LayerNorms start at weight 1 and are moved by gradients alone
        assert (latents.norm.weight - 1).abs().max() > 1e-3


def test_the_clock_stops_a_run_and_a_release_is_written_still(dataset, tmp_path):
    result, registry = run(dataset, tmp_path, replace(QUICK, epochs=100, max_minutes=1e-6))
    assert len(result.summary["history"]) == 1
    assert registry.releases() == [result.manifest.release_id]


def test_command_trains_with_caps_and_says_so(dataset, tmp_path, capsys):
    code = command.main(
        [
            "--events", str(dataset / "events.parquet"), "--items", str(dataset / "items.parquet"),
            "--users", str(dataset / "users.parquet"), "--dataset", str(dataset / "dataset.yaml"),
            "--registry", str(tmp_path / "registry"), "--out", str(tmp_path / "out"), "--device", "cpu",
            "--epochs", "1", "--max-users", "8", "--set", "d_model=8", "embedding_dim=8", "num_heads=2",
        ]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "capped: 8 of 12 users" in out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert Registry(tmp_path / "registry").releases() == [summary["release_id"]]
    assert summary["config"]["d_model"] == 8
    assert (tmp_path / "out/checkpoint.pt").exists()


def test_command_explains_what_is_wrong(dataset, tmp_path, capsys):
    common = [
        "--events", str(dataset / "events.parquet"), "--items", str(dataset / "items.parquet"),
        "--dataset", str(dataset / "dataset.yaml"), "--registry", str(tmp_path),
    ]  # fmt: skip
    assert command.main(common) == 1
    assert "give --users" in capsys.readouterr().err
    users = ["--users", str(dataset / "users.parquet")]
    assert command.main([*common, *users, "--set", "nonsense=1"]) == 1
    assert "no field nonsense" in capsys.readouterr().err


def test_defaults_fit_the_size():
    description = make_description(evaluation={"split": "leave_one_out"})
    small, large = (LogCounts(events=n, users=9, items=n // 100) for n in (10_000, 3_000_000))
    assert config_for(description, small).d_model < config_for(description, large).d_model
    assert not settings_for(description, small).mask_same_user
    assert (
        settings_for(description, large, device="cuda").tokens_per_step
        > settings_for(description, large).tokens_per_step
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"epochs": 0}, "epochs"), ({"stale_share": 2.0}, "stale_share"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_settings_are_checked(wrong, said):
    with pytest.raises(ConfigError, match=said):
        TrainSettings(**wrong)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_step_is_the_same_step(dataset, monkeypatch):
    """Loss and gradients without dropout; what is released stays uncompiled.

    The step is traced, differentiated and guarded as ever; only the machine code, which takes a compiler and a minute,
    is left to the benchmark.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    data, held_out = training_data(dataset, QUICK)
    events, items, users, description = read(dataset)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        _, tower = arrays_of(events, items, users, description)
        trainer = Trainer(tower, data, held_out, replace(QUICK, compile=compiled))
        tower.eval()
        losses = [trainer.loss(data.step(windows, 0, n)) for n, windows in enumerate(data.plan(0)[:3])]
        sum(losses).backward()
        found.append((torch.stack(losses).detach(), {n: p.grad for n, p in tower.named_parameters()}))
        assert all("_orig_mod" not in name for name in tower.state_dict())
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-3, atol=1e-6), name


LIVE_QUICK = replace(QUICK, new_item_share=0.5, new_item_days=2, live_negatives=6)


def test_latest_items_begin_at_the_refresh_and_the_live_bucket_before_the_request():
    description = make_description(user_columns=[], item_columns={}, refresh_time="03:00")
    table, items, _ = small_log([[2, 4, 5, 6], [7]], description)
    arrays, _ = arrays_of(table, items, None, description, LIVE)
    found = arrays.live_requests(np.arange(5), arrays.live_counts(LIVE), LIVE)
    # items are 1, 2, 3, 4 at rows 0 to 3; 2:00 was seen by the refresh of 3:00
    assert found.recent_BK.tolist() == [[-1, -1, -1], [-1, -1, -1], [1, -1, -1], [2, 1, -1], [-1, -1, -1]]
    assert found.log_gap_BK[3].tolist() == pytest.approx(np.log1p([3600, 7200, 0]).tolist())
    assert found.bucket_B.tolist() == [0, 120, 180, 240, 300]


def test_items_first_seen_since_the_horizon_are_read_as_unknown(dataset):
    settings = replace(LIVE_QUICK, new_item_share=1.0, new_item_days=1, tokens_per_step=1000, stale_share=1.0)
    data, _ = training_data(dataset, settings, LIVE)
    log, rows = data.log, data.log.num_items + LIVE.hash_rows
    unknown = asked = 0
    for number, (start, end) in enumerate(data.plan(0)):
        batch = data.step((start, end), 0, number)
        raw = np.concatenate([log.item_T[a:b] for a, b in zip(start, end, strict=True)])
        horizon = np.full(len(start), np.iinfo(np.int64).max)
        horizon[batch.user_B.numpy()] = batch.horizon_us_B.numpy()
        is_asked = np.isin(np.arange(len(start)), batch.user_B.numpy())
        window = np.repeat(np.arange(len(start)), end - start)
        shifted = batch.events.item_T.numpy() != raw
        wanted = data.first_us_I[raw] >= horizon[window]
        assert (shifted == wanted)[is_asked[window]].all()
        assert (batch.events.item_T.numpy()[shifted] == raw[shifted] + rows).all()
        # refreshes are at midnight, and no target comes from before its window's
        assert (batch.horizon_us_B % DAY_US == 0).all()
        assert (batch.time_us_B >= batch.horizon_us_B).all()
        length = batch.context.session_length_B[:, None] > torch.arange(LIVE.session_limit)
        session = batch.context.session_item_BK
        first = torch.from_numpy(data.first_us_I)[session % rows]
        assert torch.equal((session >= rows)[length], (first >= batch.horizon_us_B[:, None])[length])
        unknown, asked = unknown + int(shifted.sum()), asked + len(batch.item_B)
    assert unknown > 0
    assert asked > 0


def test_live_features_train_by_softmax_only(dataset):
    with pytest.raises(ConfigError, match="loss softmax, got 'gbce'"):
        training_data(dataset, replace(LIVE_QUICK, loss="gbce"), LIVE)


def test_unknown_items_need_live_features(dataset):
    with pytest.raises(ConfigError, match="new_item_share needs live features"):
        training_data(dataset, LIVE_QUICK)


def test_a_killed_live_run_resumes_to_the_same_weights_and_its_release_loads(dataset, tmp_path):
    events, items, users, description = read(dataset)

    def live_run(folder, **options):
        registry = Registry(folder / "registry")
        inputs = events, items, users, description, registry
        return train(*inputs, settings=LIVE_QUICK, config=LIVE, folder=folder, **options), registry

    def kill(step):
        if step == 5:
            raise Killed

    undisturbed, registry = live_run(tmp_path / "a")
    with pytest.raises(Killed):
        live_run(tmp_path / "b", on_step=kill)
    resumed, other = live_run(tmp_path / "b", resume=True)
    one, two = weights(registry, undisturbed.manifest), weights(other, resumed.manifest)
    assert all(torch.equal(one[name], two[name]) for name in one)
    release = registry.load(undisturbed.manifest.release_id)
    assert release.verify().passed
    assert release.config == LIVE
    embedding = release.embed(release.cold_state[None], [Context()], [None])
    assert embedding.shape == (1, LIVE.embedding_dim + LIVE.live_dim)
    # what it begins as is asked too, and is the release where nothing after it was better
    history = undisturbed.summary["history"]
    assert [row["epoch"] for row in history] == list(range(len(history)))
    best = max(history, key=lambda row: row["validation_ndcg@20"])
    assert undisturbed.summary["best_epoch"] == best["epoch"] == undisturbed.manifest.lineage.epoch


def test_live_features_learn_what_is_popular_now(tmp_path):
    """Each day everybody clicks what is new that day: no id tells it, a count does."""
    days, users_a_day = 6, 30
    rng = np.random.default_rng(0)
    histories = {}
    for day in range(days):
        for user in range(users_a_day):
            hours = np.sort(rng.uniform(0, 20, 2))
            hot = 1 + 10 * day + rng.permutation(2)  # two of the day's ten items
            other = 1 + 10 * day + rng.integers(2, 10)
            chosen = [hot[0], hot[1]] if user % 5 else [hot[0], other]
            histories[1 + day * users_a_day + user] = [
                make_event(int(item), "click", DAY_US * (19_000 + day) + int(hour * HOUR_US))
                for item, hour in zip(chosen, hours, strict=True)
            ]
    test_from = "2022-01-13T00:00:00Z"  # the last day
    description = make_description(
        user_columns=[], item_columns={}, event_columns=[], context_columns=[],
        evaluation={"split": "time", "test_from": test_from},
    )  # fmt: skip
    table = make_event_table(histories, description)
    items = pa.table({"item_id": pa.array(range(1, 10 * days + 1), pa.int64())})
    registry = Registry(tmp_path)
    settings = replace(
        LIVE_QUICK, epochs=40, tokens_per_step=64, learning_rate=0.01, validation_share=0.0, new_item_share=1.0
    )
    made = train(table, items, None, description, registry, settings=settings, config=LIVE)
    report = evaluate_quality(
        registry.load(made.manifest.release_id), table, items, None, ks=(2,), seen="exclude", resamples=20
    )
    # two of ten items get nine clicks in ten; the user's first click is no candidate for the second
    assert report["arms"]["context"]["item_unseen"]["recall@2"]["value"] > 0.7
    assert report["slices"]["item_unseen"]["events"] == 60
