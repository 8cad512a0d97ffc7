"""The trained scorer: negatives and their counts, what it learns, and its release."""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.errors import CheckpointError, ConfigError, GoldenMismatch, IndexMismatch, ShapeError
from model.release import Manifest, Registry
from model.retrieval import scalars as scalars_module
from model.retrieval.index import LiveIndex
from model.retrieval.rows import ItemRows
from model.retrieval.rules import Plan, Request
from model.retrieval.scalars import CatalogueScalars, counting_config, item_rows, item_scalars, live_index
from model.retrieval.scorer import InteractionScorer, ScorerConfig
from model.training import __main__ as command
from model.training import scorer as scorer_module
from model.training.data import EventArrays
from model.training.evaluate import (
    Candidates,
    catalogue_scalars,
    embed_requests,
    evaluate_quality,
    make_test_set,
    rank_scored,
    recent_popularity_ranks,
    scored,
    show,
)
from model.training.loop import train
from model.training.scorer import (
    ScorerData,
    ScorerSettings,
    _draw,
    as_new,
    fit_interaction,
    fitted_line,
    start,
    train_scorer,
)
from tests.builders import make_description, make_event, make_event_table, write_dataset
from tests.model.test_training import DAY_US, HOUR_US, QUICK, SMALL, arrays_of, read
from tests.releases import make_tower

HERE = ScorerConfig(hidden=(8, 4), windows_h=(1.0, 24.0), bucket_s=60)
BRIEF = ScorerSettings(
    steps=6, targets_per_step=8, tower_negatives=4, other_negatives=4, validations=2, learning_rate=0.01
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", users=12, length=9)


def trained(dataset: Path, registry: Registry) -> tuple[tuple[Any, ...], Manifest]:
    """The log and a release of a tower that saw it."""
    events, items, users, description = read(dataset)
    made = train(events, items, users, description, registry, settings=replace(QUICK, epochs=1), config=SMALL)
    return (events, items, users), made.manifest


def day_log(days: int = 6, users_a_day: int = 120) -> tuple[pa.Table, pa.Table, Any]:
    """Each day everybody clicks two of the day's ten new items: no id tells them, a count does."""
    rng = np.random.default_rng(0)
    histories = {}
    for day in range(days):
        for user in range(users_a_day):
            hours = np.sort(rng.uniform(0, 20, 2))
            hot = 1 + 10 * day + rng.permutation(2)
            chosen = hot if user % 5 else [hot[0], 1 + 10 * day + rng.integers(2, 10)]
            histories[1 + day * users_a_day + user] = [
                make_event(int(item), "click", DAY_US * (19_000 + day) + int(hour * HOUR_US))
                for item, hour in zip(chosen, hours, strict=True)
            ]
    description = make_description(
        user_columns=[], item_columns={}, event_columns=[], context_columns=[],
        evaluation={"split": "time", "test_from": "2022-01-13T00:00:00Z"},
    )  # fmt: skip
    items = pa.table({"item_id": pa.array(range(1, 10 * days + 1), pa.int64())})
    return make_event_table(histories, description), items, description


def test_a_scorer_learns_what_is_popular_now(tmp_path: Path) -> None:
    events, items, description = day_log()
    registry = Registry(tmp_path)
    settings = replace(QUICK, epochs=4, learning_rate=0.01, validation_share=0.5)
    base = train(events, items, None, description, registry, settings=settings, config=SMALL).manifest
    result = train_scorer(
        events, items, None, registry, base.release_id, config=HERE,
        settings=replace(BRIEF, steps=300, targets_per_step=32, tower_negatives=16, other_negatives=16),
    )  # fmt: skip
    history = result.summary["history"]
    assert [row["step"] for row in history] == [0, 150, 300]
    assert history[2]["loss"] < history[1]["loss"]
    assert result.summary["best_step"] > 0
    assert result.manifest.metrics["validation_ndcg@100"] > result.manifest.metrics["validation_ndcg@100_dot"]
    report = evaluate_quality(registry.load(result.manifest.release_id), events, items, None, ks=(2,), resamples=20)
    scorer, dot = (report["arms"][arm]["item_unseen"]["recall@2"]["value"] for arm in ("scorer", "context"))
    # two of the day's ten items get nine clicks in ten; the user's first click is no candidate for the second
    assert scorer > 0.6
    assert scorer > dot + 0.2
    assert "scorer, with context" in show(report)


def test_without_a_step_taken_it_is_the_fitted_line(dataset: Path, tmp_path: Path) -> None:
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    data = ScorerData(registry.load(manifest.release_id), *log, manifest.description, BRIEF)
    user_BE = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    scalar_IS = torch.randn(len(data.table_IE), HERE.scalars)
    for config in (HERE, replace(HERE, windows_h=()), replace(HERE, hidden=(1, 4))):
        scorer = start(data, config, BRIEF)
        feature_IF = torch.cat([data.table_IE, scalar_IS[:, : config.scalars]], 1)
        wanted_BI = user_BE @ data.table_IE.T / data.temperature
        if config == HERE:
            line = fitted_line(data, config, BRIEF)
            assert line.weight_S.abs().max() > 0.1
            wanted_BI = line.dot * (user_BE @ data.table_IE.T) + scalar_IS @ line.weight_S - line.middle
        with torch.no_grad():
            logit_BI = scorer.logits(user_BE, feature_IF)[:, 0]
        torch.testing.assert_close(logit_BI, wanted_BI, rtol=1e-4, atol=1e-4)


def test_a_line_finds_what_one_of_its_inputs_finds(tmp_path: Path) -> None:
    """Clicks that go to the popular of the hour: its order reaches the count's, whatever the towers say of its items.

    Every day has items of its own, that a tower has learned by heart in training and knows nothing of in the test.
    """
    events, items, description = day_log()
    registry = Registry(tmp_path)
    settings = replace(QUICK, epochs=6, learning_rate=0.02, validation_share=0.5)
    base = train(events, items, None, description, registry, settings=settings, config=SMALL).manifest
    release = registry.load(base.release_id)
    data = ScorerData(release, events, items, None, description, BRIEF, settings)
    log = EventArrays.build(events, None, release.featuriser, description)
    test = make_test_set(events, log, description, limit=None, seed=0)
    candidates = Candidates.of(release, log, items, test.target_B, exclude_seen=False)
    item_IE = release.items.table()
    user_BE = embed_requests(release.encoder, release.head, item_IE, log, test.target_B, test.cut_B)
    rank_B = rank_scored(
        start(data, HERE, BRIEF), user_BE, item_IE[: log.num_items], candidates, catalogue_scalars(log, HERE, release)
    )
    hour_B = recent_popularity_ranks(log, candidates.item_B, candidates.time_us_B, 1.0, candidates.mask)
    assert (hour_B <= 2).mean() > 0.5
    assert (rank_B <= 2).mean() > (hour_B <= 2).mean() - 0.03


def test_new_items_are_read_by_a_row_that_they_have_not_trained(dataset: Path, tmp_path: Path) -> None:
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    release = registry.load(manifest.release_id)
    before = release.items.table(with_unknown=True)
    data = ScorerData(release, *log, manifest.description, BRIEF)
    assert torch.equal(release.items.table(with_unknown=True), before)  # the release is left as it is
    num_items = data.log.num_items
    assert torch.equal(data.table_IE[: data.num_rows], before[: data.num_rows])
    hash_row_N = release.items.embedder.hash_row_I[:num_items]
    for part in (as_new(release.items), data.encoder):
        other_N = part.embedder.hash_row_I[:num_items]
        assert bool((other_N != hash_row_N).all())
        assert bool(((other_N >= num_items) & (other_N < data.num_rows)).all())
    changed_N = (data.table_IE[data.num_rows :][:num_items] - before[data.num_rows :][:num_items]).abs().amax(1)
    assert float(changed_N.min()) > 1e-3


def test_negatives_are_expected_as_often_as_they_are_drawn(dataset: Path, tmp_path: Path) -> None:
    """Frequencies over many draws against the counts that the loss is corrected by."""
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    release = registry.load(manifest.release_id)
    data = ScorerData(release, *log, manifest.description, BRIEF)
    counts = data.counts(HERE)
    size = 4000
    one = torch.full((size,), 5)
    asked = type(data.trained)(*(getattr(data.trained, name)[one] for name in data.trained.__slots__))
    torch.manual_seed(0)
    item_BM, mask_BM, log_count_BM = data.negatives(asked, counts, BRIEF)
    assert bool((mask_BM == (item_BM == asked.item_B[:, None])).all())
    found_N = torch.bincount(item_BM.flatten(), minlength=20) / size
    for item in item_BM.unique().tolist():
        if item != int(asked.item_B[0]):  # the tower never draws it; of the others its share is not corrected
            expected = float(log_count_BM[item_BM == item][0].exp())
            assert abs(float(found_N[item]) - expected) < 5 * math.sqrt(expected / size), item
    assert float(found_N.sum()) == pytest.approx(8)


def test_the_loss_is_that_of_the_whole_catalogue_on_average(dataset: Path, tmp_path: Path) -> None:
    """Over many draws the sum over negatives, corrected, is the sum over all other items."""
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    release = registry.load(manifest.release_id)
    data = ScorerData(release, *log, manifest.description, BRIEF)
    counts = data.counts(HERE)
    one = torch.full((20_000,), 3)
    asked = type(data.trained)(*(getattr(data.trained, name)[one] for name in data.trained.__slots__))
    torch.manual_seed(0)
    item_BM, mask_BM, log_count_BM = data.negatives(asked, counts, BRIEF)
    logit_N = torch.linspace(-1, 1, data.log.num_items)
    sums_B = ((logit_N[item_BM] - log_count_BM).exp() * ~mask_BM).sum(1)
    other_N = torch.isin(torch.arange(data.log.num_items), data.drawn) & (
        torch.arange(data.log.num_items) != asked.item_B[0]
    )
    assert float(sums_B.mean()) == pytest.approx(float(logit_N[other_N].exp().sum()), rel=0.02)


def test_later_targets_are_drawn_more_often() -> None:
    """A day of half-life: of equally many targets, those of the last day outweigh those of the day before 2:1."""
    time_us = np.repeat([0, DAY_US], 3000)
    settings = replace(BRIEF, max_targets=600, half_life_days=1.0)
    drawn = _draw(np.arange(6000), time_us, settings, np.random.default_rng(0))
    assert len(np.unique(drawn)) == 600
    assert (drawn >= 3000).mean() == pytest.approx(2 / 3, abs=0.06)
    assert _draw(np.arange(5), time_us, settings, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


def test_scalars_by_hand() -> None:
    """Two clicks of item 0 and one of item 1 in the hour before, none of item 2."""
    description = make_description(user_columns=[], item_columns={}, event_columns=[], context_columns=[])
    start_us = DAY_US * 19_000
    clicks = [make_event(item, "click", start_us + s * 1_000_000) for item, s in ((1, 0), (1, 60), (2, 120))]
    histories = {1: clicks, 2: [make_event(3, "click", start_us + 3 * DAY_US)]}
    table = make_event_table(histories, description)
    items = pa.table({"item_id": pa.array([1, 2, 3], pa.int64())})
    log, _ = arrays_of(table, items, None, description)
    counts = log.live_counts(counting_config(replace(HERE, windows_h=(1.0,)), SMALL))
    bucket = counts.bucket(torch.tensor(start_us + 180 * 1_000_000))
    found = item_scalars(counts, torch.arange(3), bucket)
    log2, log3, log4 = math.log(2), math.log(3), math.log(4)
    wanted = [
        [log3, log3 - log4, log3, log3 - log4, 1, math.log(4)],
        [log2, log2 - log4, log2, log2 - log4, 1, math.log(2)],
        [0, -log4, 0, -log4, 0, 0],
    ]
    torch.testing.assert_close(found, torch.tensor(wanted) / 4)


def test_a_release_with_a_scorer_reads_back(dataset: Path, tmp_path: Path) -> None:
    log, base = trained(dataset, registry := Registry(tmp_path / "registry"))
    made = train_scorer(*log, registry, base.release_id, config=HERE, settings=BRIEF).manifest
    assert made.state_version == base.state_version
    assert made.embedding_version != base.embedding_version
    assert made.scorer == HERE
    assert registry.manifest(made.release_id) == made
    release = registry.load(made.release_id)
    report = release.verify()
    assert report.passed
    assert set(report.differences) == {"states", "embeddings", "items", "scores"}
    assert release.scorer.embedding_version == made.embedding_version
    assert torch.equal(registry.load(base.release_id).items.table(), release.items.table())
    with pytest.raises(CheckpointError, match="has no scorer"):
        _ = registry.load(base.release_id).scorer
    with pytest.raises(CheckpointError, match="the scorer part of the release was not loaded"):
        _ = registry.load(made.release_id, parts=("head", "items")).scorer


def test_another_scorer_is_another_embedding_version(tmp_path: Path) -> None:
    tower, items = make_tower()
    registry = Registry(tmp_path)
    versions = []
    for seed, config in ((1, HERE), (1, HERE), (2, HERE), (1, replace(HERE, bucket_s=120))):
        torch.manual_seed(seed)
        scorer = InteractionScorer.of(config, 16)
        versions.append(registry.write(tower, items, trained_until_us=0, scorer=(config, scorer)).embedding_version)
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3
    with pytest.raises(ConfigError, match="not of the shape that its config"):
        registry.write(tower, items, trained_until_us=0, scorer=(HERE, InteractionScorer.of(HERE, 8)))
    with pytest.raises(ConfigError, match="not of the shape that its config"):
        registry.write(
            tower, items, trained_until_us=0, scorer=(replace(HERE, with_dot=False), InteractionScorer.of(HERE, 16))
        )


def test_a_scorer_that_computes_otherwise_or_was_altered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, items = make_tower()
    registry = Registry(tmp_path)
    release_id = registry.write(
        tower, items, trained_until_us=0, scorer=(HERE, InteractionScorer.of(HERE, 16))
    ).release_id
    with monkeypatch.context() as patch:
        patch.setattr(torch, "relu", torch.nn.functional.silu)
        with pytest.raises(GoldenMismatch, match="scores"):
            registry.load(release_id)
    path = tmp_path / "releases" / release_id / "scorer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"scorer.safetensors of release .* was altered or torn"):
        registry.load(release_id)


def with_scorers(tmp_path: Path, seeds: Sequence[int]) -> list[Any]:
    tower, items = make_tower()
    registry = Registry(tmp_path)
    releases = []
    for seed in seeds:
        torch.manual_seed(seed)
        scorer = HERE, InteractionScorer.of(HERE, 16)
        releases.append(
            registry.load(registry.write(tower, items, trained_until_us=0, scorer=scorer).release_id)
        )  # fmt: skip
    return releases


def test_an_index_takes_the_scorer_of_its_own_version_only(tmp_path: Path) -> None:
    one, other = with_scorers(tmp_path, (1, 2))
    scalar_NS = torch.randn(50, HERE.scalars)
    index = live_index(one, scalar_NS)
    user_BE = one.embed(one.cold_state[None], [one.golden_users().contexts[1]], [None])
    slates = index.search(user_BE, [Request()], Plan(k=5), one.manifest.embedding_version)
    with torch.no_grad():
        feature_NF = torch.cat([one.item_table[:50], scalar_NS], 1)
        score_N = one.scorer(torch.from_numpy(user_BE), feature_NF)[0, 0]
    best = score_N.topk(5)
    assert slates.row_BK[0].tolist() == best.indices.tolist()
    np.testing.assert_allclose(slates.utility_BK[0], best.values.numpy(), rtol=1e-5)
    with pytest.raises(IndexMismatch, match="a scorer is of embedding version"):
        LiveIndex(item_rows(one, scalar_NS), other.scorer)
    with pytest.raises(IndexMismatch, match="a request is of embedding version"):
        index.search(user_BE, [Request()], Plan(k=5), other.manifest.embedding_version)
    with pytest.raises(IndexMismatch, match="an upsert is of embedding version"):
        index.upsert(item_rows(other, scalar_NS))


def test_scalars_that_the_scorer_does_not_read_are_refused(tmp_path: Path) -> None:
    (release,) = with_scorers(tmp_path, (1,))
    with pytest.raises(ShapeError, match=r"scalars must have shape \[50, 8\], got \[50, 0\]"):
        item_rows(release)
    tower, items = make_tower()
    plain = Registry(tmp_path).load(Registry(tmp_path).write(tower, items, trained_until_us=0).release_id)
    rows = item_rows(plain)
    assert isinstance(rows, ItemRows)
    assert (len(rows), rows.layout.scalars) == (50, 0)
    assert live_index(plain).search(plain.cold_state[None] * 0 + 1, [Request()], Plan(k=1), rows.embedding_version)


def test_probabilities_of_the_candidates_sum_to_about_one(dataset: Path, tmp_path: Path) -> None:
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    release = registry.load(manifest.release_id)
    data = ScorerData(release, *log, manifest.description, BRIEF)
    scorer = start(data, HERE, BRIEF)
    history = fit_interaction(data, scorer, HERE, BRIEF)
    assert len(history) == 3
    user_BE, item_NE, _ = data.validation()
    counts = data.counts(HERE)
    bucket = counts.bucket(torch.from_numpy(data.log.time_us_T[data.held_out[:1]]))[0]
    feature_NF = torch.cat([item_NE, item_scalars(counts, torch.arange(len(item_NE)), bucket)], 1)
    with torch.no_grad():
        total = float(scorer(user_BE[:1], feature_NF).sum())
    assert 0.2 < total < 3


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_requests_of_many_buckets_are_scored_as_each_alone(
    dataset: Path, tmp_path: Path, chunk: int | None
) -> None:  # fmt: skip
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    release = registry.load(manifest.release_id)
    data = ScorerData(release, *log, manifest.description, BRIEF)
    scorer = InteractionScorer.of(HERE, release.config.embedding_dim)
    user_BE, item_NE, candidates = data.validation()
    counts, item_N = data.counts(HERE), torch.arange(len(item_NE))
    bucket_B = counts.bucket(torch.from_numpy(candidates.time_us_B))
    assert len(bucket_B.unique()) > 3
    found = torch.empty(len(user_BE), len(item_NE))
    for part, score_bN, _ in scored(scorer, user_BE, item_NE, candidates, data.scalars(HERE), chunk=chunk):
        found[torch.from_numpy(part)] = score_bN
    for b, bucket in enumerate(bucket_B):
        feature_NF = torch.cat([item_NE, item_scalars(counts, item_N, bucket)], 1)
        with torch.no_grad():
            torch.testing.assert_close(found[b], scorer(user_BE[b : b + 1], feature_NF)[0, 0])


def test_a_bucket_is_counted_once_for_all_rankings(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    data = ScorerData(registry.load(manifest.release_id), *log, manifest.description, BRIEF)
    counted: Counter[int] = Counter()
    plain = item_scalars

    def counting(counts: Any, item: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        counted.update(bucket.flatten().tolist())
        return plain(counts, item, bucket)

    monkeypatch.setattr(scalars_module, "item_scalars", counting)
    fit_interaction(data, start(data, HERE, BRIEF), HERE, BRIEF)  # three rankings, and one to calibrate
    held_out = data.counts(HERE).bucket(torch.from_numpy(data.log.time_us_T[data.held_out]))
    assert counted == dict.fromkeys(held_out.tolist(), 1)


def test_scalars_past_the_bound_are_counted_again_and_equal(dataset: Path, tmp_path: Path) -> None:
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    data = ScorerData(registry.load(manifest.release_id), *log, manifest.description, BRIEF)
    counts, num_items = data.counts(HERE), data.log.num_items
    last = counts.items.span - 1
    buckets = [last, last // 2, last, 0]
    kept = CatalogueScalars(counts, num_items)
    bound = CatalogueScalars(counts, num_items, most_values=num_items * HERE.scalars)
    wanted = torch.stack([item_scalars(counts, torch.arange(num_items), torch.tensor(bucket)) for bucket in buckets])
    for scalars in (kept, bound, kept, bound):
        assert torch.equal(scalars.of(buckets), wanted)
        assert torch.equal(scalars.of(buckets[:1]), wanted[:1])


def test_the_time_limit_counts_steps_alone_and_few_steps_are_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a clock where a step takes 1 s and a ranking 100 s, a limit of 10 s is ten steps and three rankings."""
    log, manifest = trained(dataset, registry := Registry(tmp_path / "registry"))
    data = ScorerData(registry.load(manifest.release_id), *log, manifest.description, BRIEF)
    now_s = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now_s

    def taking(seconds: float, function: Any) -> Any:
        def slow(*args: Any) -> Any:
            nonlocal now_s
            now_s += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(scorer_module, "time", Clock)
    monkeypatch.setattr(scorer_module, "loss_of", taking(1.0, scorer_module.loss_of))
    monkeypatch.setattr(scorer_module, "rank_scored", taking(100.0, scorer_module.rank_scored))
    settings = replace(BRIEF, steps=1000, max_minutes=10 / 60)
    with caplog.at_level(logging.WARNING):
        history = fit_interaction(data, start(data, HERE, BRIEF), HERE, settings)
    assert [(row["step"], row["seconds"], row["ranking_seconds"]) for row in history] == [
        (0, 0, 100), (5, 5, 200), (10, 10, 300)
    ]  # fmt: skip
    assert "the time limit ended the scorer's training after 10 of 1000 steps" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_interaction(data, start(data, HERE, BRIEF), HERE, replace(settings, max_minutes=None, steps=6))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("steps", 0, "steps must be at least 1"), ("learning_rate", 0.0, "learning_rate must be above 0")],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BRIEF, **{name: value})
    with pytest.raises(ConfigError, match="not both 0"):
        ScorerSettings(tower_negatives=0, other_negatives=0)


def test_a_config_survives_json_and_refuses_nonsense() -> None:
    assert ScorerConfig.from_dict(json.loads(json.dumps(HERE.to_dict()))) == HERE
    with pytest.raises(ConfigError, match="windows_h must rise"):
        ScorerConfig(windows_h=(24.0, 1.0))
    with pytest.raises(ConfigError, match="two numbers"):
        ScorerConfig(hidden=(8,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no field width"):
        ScorerConfig.from_dict({"width": 3})


def test_the_command_line_trains_both_stages(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = tmp_path / "registry"
    inputs = [
        "--events", str(dataset / "events.parquet"), "--items", str(dataset / "items.parquet"),
        "--users", str(dataset / "users.parquet"), "--registry", str(registry), "--device", "cpu",
    ]  # fmt: skip
    small = ["--scorer-set", "steps=4", "targets_per_step=8", "hidden=[8,4]", "windows_h=[1,24]", "bucket_s=60"]
    tower = ["--epochs", "1", "--set", *(f"{name}={value}" for name, value in SMALL.to_dict().items() if name in
             ("d_model", "embedding_dim", "context_dim", "head_hidden", "num_layers"))]  # fmt: skip
    assert command.main([*inputs, *tower, "--scorer", *small]) == 0
    told = capsys.readouterr().out
    first, second = Registry(registry).releases()
    assert f"release {second}: release {first} with a scorer" in told
    manifest = Registry(registry).manifest(second)
    assert manifest.scorer == ScorerConfig(hidden=(8, 4), windows_h=(1.0, 24.0), bucket_s=60)
    assert command.main([*inputs, "--scorer-from", first, *small, "windows_h=[]", "--seed", "3"]) == 0
    assert Registry(registry).load(Registry(registry).releases()[-1]).manifest.scorer.scalars == 0
    assert command.main([*inputs, "--scorer-from", first, "--scorer"]) == 1
    assert "trains a scorer alone" in capsys.readouterr().err
    assert command.main([*inputs, "--scorer-from", first, "--scorer-set", "stepz=3"]) == 1
    assert "ScorerConfig has no field stepz" in capsys.readouterr().err
    assert command.main([*inputs, "--scorer-set", "steps=3"]) == 1
    assert "goes with --scorer" in capsys.readouterr().err
