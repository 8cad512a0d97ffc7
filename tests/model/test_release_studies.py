"""Staleness, context audit and refresh budget of a small trained release, by the commands people run."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.results import OPTIONAL, REQUIRED
from benchmarks.staleness import draw, entries
from model.dataset import DatasetDescription, find_description
from model.errors import ConfigError
from model.event_log import read_items, read_log, read_users
from model.generator import GeneratorSettings, generate
from model.refresh import GainTable
from model.release import Registry
from model.training import __main__ as training
from model.training import evaluate
from model.training.audit import another, audit_study
from model.training.refresh import Refresh, measure_gains, play, refresh_study
from model.training.requests import Questions, last_event_until, ratio
from model.training.staleness import cut_at_age, staleness_study
from tests.releases import make_items, make_release

HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release-studies")
    settings = GeneratorSettings(users=150, items=80, days=6, events=5000, categories=4, topics_per_category=2)
    generate(settings, folder / "data")
    log = ["--events", f"{folder}/data/events", "--items", f"{folder}/data/items.parquet"]
    log += ["--users", f"{folder}/data/users.parquet", "--registry", f"{folder}/registry"]
    small = ["--device", "cpu", "--set", "d_model=16", "num_layers=1", "embedding_dim=16", "head_hidden=32"]
    assert training.main([*log, "--epochs", "2", "--out", f"{folder}/run", *small, "context_dim=16"]) == 0
    return folder, log


@pytest.fixture(scope="module")
def inputs(trained):
    """The release, and what every study of it takes."""
    folder, _ = trained
    registry = Registry(folder / "registry")
    description = find_description(f"{folder}/data/events")
    return registry.load(registry.releases()[-1]), {
        "table": read_log(f"{folder}/data/events", description)[0],
        "items": read_items(f"{folder}/data/items.parquet", description),
        "users": read_users(f"{folder}/data/users.parquet", description),
        "description": description,
        "resamples": 50,
    }


@pytest.fixture(scope="module")
def quality(inputs):
    """Recall@20 of requests with a state, with and without context, as tower-evaluate quality has it."""
    release, log = inputs
    arms = evaluate.evaluate_quality(release, ks=(20,), **log)["arms"]
    return {arm: arms[arm]["user_with_history"]["recall@20"]["value"] for arm in ("context", "no_context")}


def test_staleness_by_the_command(trained, capsys):
    folder, log = trained
    registry = Registry(folder / "registry")
    outputs = ["--out", f"{folder}/staleness.json", "--plot", f"{folder}/staleness.svg", "--resamples", "50"]
    assert evaluate.main(["staleness", *log, *outputs]) == 0
    out = capsys.readouterr().out
    assert "won back by context" in out
    assert "users without any history" in out
    study = json.loads((folder / "staleness.json").read_text())
    assert registry.read_study(f"staleness-{registry.releases()[-1]}") == study
    assert "<svg" in (folder / "staleness.svg").read_text()
    points = {point["name"]: point for point in study["points"]}
    assert list(points) == ["0 h", "1 h", "6 h", "24 h", "48 h", "72 h", "daily", "never"]
    assert (points["0 h"]["cold_share"], points["0 h"]["events_since"], points["never"]["cold_share"]) == (0, 0, 1)
    cold = [points[name]["cold_share"] for name in ("0 h", "1 h", "6 h", "24 h", "48 h", "72 h")]
    assert cold == sorted(cold)
    segments = study["segments"]
    thirds = [segments[f"{level} activity"] for level in ("low", "middle", "high")]
    assert sum(third["requests"] for third in thirds) == segments["all"]["requests"] == study["requests"]
    assert all(a["events"][1] < b["events"][0] for a, b in itertools.pairwise(thirds))


def test_staleness_adds_up(inputs):
    """Segments are parts of all; at the refresh, age 0 is the daily cut; a huge age is never; won back by hand."""
    release, log = inputs
    exact = staleness_study(release, ages_h=(0, 1000), **log)
    names = [point["name"] for point in exact["points"]]
    assert names == ["0 h", "1000 h", "daily", "never"]
    segments = exact["segments"]
    recall = segments["all"]["recall"]
    for arm in ("context", "no_context"):
        assert recall[arm][1] == recall[arm][3]
        parts = [segments[f"{level} activity"] for level in ("low", "middle", "high")]
        total = sum(part["recall"][arm][2]["value"] * part["requests"] for part in parts)
        assert total / segments["all"]["requests"] == pytest.approx(recall[arm][2]["value"], abs=1e-5)
    at_refresh = staleness_study(release, ages_h=(0,), at_refresh=True, **log)
    assert [point["name"] for point in at_refresh["points"]] == ["0 h", "never"]
    assert at_refresh["segments"]["all"]["recall"]["context"][0] == recall["context"][2]
    fresh, never = ([recall[arm][p]["value"] for arm in ("context", "no_context")] for p in (0, 3))
    wanted = 1 - (fresh[0] - never[0]) / (fresh[1] - never[1])
    assert segments["all"]["won_back"][3]["value"] == pytest.approx(wanted, abs=1e-4)
    assert segments["all"]["won_back"][0] is None  # nothing is lost at age 0
    assert segments["all"]["over_fresh"][0] == {"value": 1, "low": 1, "high": 1}
    with pytest.raises(ConfigError, match="rise from 0 h"):
        staleness_study(release, ages_h=(1, 2), **log)


@pytest.mark.parametrize("age_h", [0, 1, 25])
@pytest.mark.parametrize("at_refresh", [False, True])
def test_cuts_are_those_of_a_plain_loop(inputs, age_h, at_refresh):
    release, log = inputs
    questions = Questions.read(release, **log)
    events = questions.events
    target_B = questions.test.target_B[:200]
    found = cut_at_age(questions, target_B, age_h * HOUR_US, at_refresh=at_refresh)
    for target, cut in zip(target_B.tolist(), found.tolist(), strict=True):
        until = int(events.time_us_T[target]) - age_h * HOUR_US
        if at_refresh:
            until -= until % DAY_US  # the generated log is refreshed at midnight
        first = int(events.offsets[events.user_T[target]])
        assert cut == max([first - 1, *(e for e in range(first, target) if events.time_us_T[e] <= until)])


def test_last_event_until_by_hand():
    time_us = np.array([1, 3, 3, 7, 0, 9])
    first, end = np.array([0, 0, 0, 0, 4, 4, 2]), np.array([4, 4, 4, 2, 6, 6, 2])
    until = np.array([3, 0, 99, 99, 8, 9, 99])
    assert last_event_until(time_us, first, end, until).tolist() == [2, -1, 3, 1, 4, 5, 1]


def test_a_ratio_needs_a_bottom_surely_above_nothing():
    assert ratio(1.0, 2.0, np.ones(4), np.full(4, 2.0)) == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert ratio(1.0, 2.0, np.ones(4), np.array([-1.0, -1.0, 2.0, 2.0])) is None
    assert ratio(1.0, 0.0, np.ones(4), np.ones(4)) is None


def test_the_audit_by_the_command(trained, capsys, quality):
    folder, log = trained
    registry = Registry(folder / "registry")
    outputs = ["--out", f"{folder}/audit.json", "--plot", f"{folder}/audit.svg", "--resamples", "50"]
    assert evaluate.main(["context-audit", *log, *outputs]) == 0
    out = capsys.readouterr().out
    assert "leakage" in out
    study = json.loads((folder / "audit.json").read_text())
    assert registry.read_study(f"audit-{registry.releases()[-1]}") == study
    recall = {kind: study[kind]["full"]["recall"] for kind in ("replayed", "pseudo")}
    assert recall["replayed"]["true"]["value"] == pytest.approx(quality["context"], abs=1e-6)
    assert recall["replayed"]["absent"]["value"] == pytest.approx(quality["no_context"], abs=1e-6)
    assert recall["pseudo"]["none"] == recall["replayed"]["true"]
    for kind, (own, other, none) in {
        "replayed": ("true", "shuffled", "absent"), "pseudo": ("own", "another's", "none"),
    }.items():  # fmt: skip
        for found in study[kind].values():
            values = {arm: point["value"] for arm, point in found["recall"].items()}
            assert found["gain"]["value"] == pytest.approx(values[own] - values[none], abs=2e-6)
            assert found["above_another"]["value"] == pytest.approx(values[own] - values[other], abs=2e-6)


def test_the_audit_sees_subjects_leak(inputs):
    """A head that finds items by their subjects: made by putting the mean of the subjects' items into its output."""
    release, log = inputs
    forward = type(release.head).forward

    def leaky(self, state_BD, context, item_IE):
        plain_BE = forward(self, state_BD, context, item_IE)
        subject_BE = (item_IE[context.subject_item_BM] * context.subject_weight_BM[..., None]).sum(1)
        return plain_BE + 100 * subject_BE

    release.head.forward = leaky.__get__(release.head)
    try:
        study = audit_study(release, **log)
    finally:
        del release.head.forward
    assert study["pseudo"]["empty"]["above_another"]["low"] > 0
    assert study["replayed"]["full"]["recall"]["true"] == study["pseudo"]["full"]["recall"]["none"]


def test_another_is_never_the_same_request():
    for size in (2, 5, 100):
        other = another(size, seed=3)
        assert sorted(other.tolist()) == list(range(size))
        assert (other != np.arange(size)).all()
    assert another(1, seed=0).tolist() == [0]


def test_the_refresh_budget_by_the_command(trained, capsys, quality):
    folder, log = trained
    registry = Registry(folder / "registry")
    outputs = ["--out", f"{folder}/refresh.json", "--plot", f"{folder}/refresh.svg", "--resamples", "50"]
    assert evaluate.main(["refresh-budget", *log, "--budgets", "0.1", "0.5", *outputs]) == 0
    assert "of the gain" in capsys.readouterr().out
    study = json.loads((folder / "refresh.json").read_text())
    assert registry.read_study(f"refresh-{registry.releases()[-1]}") == study
    GainTable.from_dict(study["table"])
    arms = {(arm["policy"], arm["budget"]): arm for arm in study["arms"]}
    assert len(arms) == 2 + 4 * 2
    everyone = arms["all", 1.0]["recall"]  # every state is that of the last daily refresh: what quality asks
    assert everyone["context"]["value"] == pytest.approx(quality["context"], abs=1e-6)
    assert everyone["no_context"]["value"] == pytest.approx(quality["no_context"], abs=1e-6)
    assert arms["nobody", 0.0]["renewed_a_day"] == 0
    assert 0 < arms["random", 0.1]["renewed_a_day"] < arms["random", 0.5]["renewed_a_day"]
    assert arms["random", 0.5]["over_random"]["context"] == {"value": 0, "low": 0, "high": 0}


@pytest.fixture
def four_users(tmp_path):
    """Days 0 to 3, refreshed at midnight. User 1: an event a day. 2: one on day 0, three on day 1. 3: one on day 1
    (new then), one on day 2. 4: day 0 only. All ask on day 3, the test."""
    made = make_release(tmp_path)
    release = Registry(tmp_path).load(made.release_id)
    description = DatasetDescription.from_dict(
        release.manifest.description.to_dict()
        | {"user_columns": [], "evaluation": {"split": "time", "test_from": "2020-01-04T00:00:00Z"}}
    )
    start = 1_577_836_800  # 2020-01-01T00:00:00Z
    days = {1: [0, 1, 2, 3], 2: [0, 1, 1, 1, 3], 3: [1, 2, 3], 4: [0, 3]}
    rows = [(u, start + 86_400 * day + 3600 * u + n) for u in days for n, day in enumerate(days[u])]
    log = pa.table(
        {
            "user_id": [u for u, _ in rows],
            "item_id": [10 + n for n in range(len(rows))],
            "event_type": ["click"] * len(rows),
            "timestamp": [t for _, t in rows],
            "surface": ["feed"] * len(rows),
            "device": ["tv"] * len(rows),
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    table, _ = read_log(str(tmp_path / "log.parquet"), description)
    return Questions.read(release, table, make_items(), None, description=description, resamples=20)


def refreshes(questions, days):
    """What play is given, with the rates of the last argument: the same for all."""
    first = int(questions.events.time_us_T.min() // DAY_US)
    events = questions.events
    made = []
    for day in days:
        latest = [
            max([lo - 1, *(e for e in range(lo, hi) if events.time_us_T[e] <= (first + day) * DAY_US)])
            for lo, hi in itertools.pairwise(events.offsets)
        ]
        made.append(Refresh(first + day, np.array(latest), np.ones(len(latest))))
    return first, made


def test_a_budget_played_by_hand(four_users):
    """Events: user 1 is 0-3, 2 is 4-8, 3 is 9-11, 4 is 12-13. At the refresh of day 2 users 1 (1 new) and 2 (3 new)
    compete, at that of day 3 users 1 and 3 and who was left."""
    questions = four_users
    first, made = refreshes(questions, (1, 2, 3))
    assert [refresh.latest_U.tolist() for refresh in made] == [[0, 4, 8, 12], [1, 7, 9, 12], [2, 7, 10, 12]]
    target = np.array([3, 8, 11, 13])
    day = np.full(4, first + 3)

    def cuts(policy, share):
        cut, renewed = play(questions, made, policy, share, GainTable.assumed(), target, day)
        return cut.tolist(), renewed

    assert cuts("all", 1.0) == ([2, 7, 10, 12], [2, 2])
    assert cuts("nobody", 0.0) == ([0, 4, 9, 12], [0, 0])  # user 3 was new on day 2 and is encoded all the same
    # half of two is one: user 2 on day 2; then user 1 (2 new) before user 3 (1 new)
    assert cuts("most_new_events", 0.5) == ([2, 7, 9, 12], [1, 1])
    # user 1's first unseen event is older than user 2's on day 2; on day 3 user 2, who has no event that day, is the
    # longest stale of three, and half of the two with one is one
    assert cuts("longest_stale", 0.5) == ([1, 7, 9, 12], [1, 1])
    # equal rates: the new share decides, 3 of 4 for user 2; then user 1: bucket (2, 1) before user 3: (1, 1)
    assert cuts("expected_gain", 0.5) == ([2, 7, 9, 12], [1, 1])


def test_gains_come_from_the_day_before_the_test(four_users):
    """Users 1 and 3 ask on day 2. Since the refresh before, user 1 has one event more, and user 3 their first: of one
    request nothing but its own gain can be the mean, so every cell has it."""
    first, _ = refreshes(four_users, ())
    gains = set()
    for k in range(1, 51):
        questions = replace(four_users, k=k)
        table = measure_gains(questions, first + 2)
        renewed, old = (float(questions.hits(np.array([2]), np.array([cut]))["context"][0]) for cut in (1, 0))
        gains.add(renewed - old)
        np.testing.assert_allclose(table.gain_NK, max(0.0, renewed - old))
        assert table.source == f"refresh-{questions.release.manifest.release_id}"
    assert len(gains) == 2  # at some K one of the two states finds the item and the other does not


def test_the_benchmark_records_their_figures(inputs, tmp_path):
    release, log = inputs
    made = {"made": {"hardware": "test", "versions": {}, "date": "2026-01-31", "trained": "2 epochs"}}
    studies = {
        "staleness-toy": staleness_study(release, **log) | made,
        "audit-toy": audit_study(release, **log) | made,
        "refresh-toy": refresh_study(release, **log) | made,
    }
    found = {entry["measure"]: entry for entry in entries(studies)}
    for entry in found.values():
        assert set(entry) <= {*REQUIRED, *OPTIONAL}
        assert isinstance(entry["value"], float)
    arms = {(arm["policy"], arm["budget"]): arm["recall"]["context"]["value"] for arm in studies["refresh-toy"]["arms"]}
    quarter = found["refresh.toy.expected_gain_25.recall@20"]
    assert quarter["value"] == pytest.approx(arms["expected_gain", 0.25], abs=1e-4)
    assert (quarter["rival"], quarter["rival_value"]) == ("random", pytest.approx(arms["random", 0.25], abs=1e-4))
    assert f"all {arms['all', 1.0]:.4f}" in quarter["note"]
    context = studies["staleness-toy"]["segments"]["all"]["recall"]["context"]
    ratio_found = found["staleness.toy.daily_over_fresh.recall@20"]["value"]
    assert ratio_found == pytest.approx(context[6]["value"] / context[0]["value"], abs=1e-4)
    pseudo = studies["audit-toy"]["pseudo"]["full"]
    assert found["audit.toy.leakage"]["value"] == pytest.approx(pseudo["above_another"]["value"], abs=1e-4)
    draw(studies, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit-toy.svg", "refresh-toy.svg", "staleness-toy.svg"]


def test_a_refresh_budget_needs_days(inputs):
    release, log = inputs
    for wrong in ({"budgets": (1.5,)}, {"warm_up_days": 0}):
        with pytest.raises(ConfigError, match=r"above 0 and below 1|at least 1"):
            refresh_study(release, **log, **wrong)
    plain = log["description"].to_dict() | {"evaluation": {"split": "leave_one_out"}}
    with pytest.raises(ConfigError, match="must split by time"):
        refresh_study(release, **(log | {"description": DatasetDescription.from_dict(plain)}))
