"""Skew and bridge studies of a small trained family, by the commands people run."""

import json
import sys

import numpy as np
import pytest

from model.bridge import load_bridge
from model.dataset import find_description
from model.errors import ConfigError, DataError
from model.event_log import read_items, read_log, read_users
from model.generator import GeneratorSettings, generate
from model.release import Registry
from model.training import __main__ as training
from model.training import evaluate
from model.training.bridge import ARMS, SHARES, group_users, measure_shares, study_name
from model.training.plots import plotting
from model.training.skew import family, skew_study


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seed 0 at epochs 1, 2 and 3, seed 1 at epoch 2, and a head trained anew on seed 0's last encoder."""
    folder = tmp_path_factory.mktemp("studies")
    settings = GeneratorSettings(users=150, items=80, days=6, events=5000, categories=4, topics_per_category=2)
    generate(settings, folder / "data")
    log = ["--events", f"{folder}/data/events", "--items", f"{folder}/data/items.parquet"]
    log += ["--users", f"{folder}/data/users.parquet", "--registry", f"{folder}/registry"]
    small = ["--device", "cpu", "--set", "d_model=16", "num_layers=1", "embedding_dim=16", "head_hidden=32"]
    small += ["context_dim=16", "patience=9"]
    runs = [
        ["--epochs", "3", "--release-at", "1,2,3"],
        ["--epochs", "2", "--seed", "1", "--release-at", "2"],
    ]
    for number, run in enumerate(runs):
        assert training.main([*log, *run, "--out", f"{folder}/run{number}", *small]) == 0
    return folder, log


def read(folder):
    description = find_description(f"{folder}/data/events")
    table, _ = read_log(f"{folder}/data/events", description)
    items = read_items(f"{folder}/data/items.parquet", description)
    return table, items, read_users(f"{folder}/data/users.parquet", description)


def by_epoch(registry, seed=0):
    manifests = [registry.manifest(name) for name in registry.releases()]
    return {m.lineage.epoch: m for m in manifests if m.lineage.seed == seed}


def test_releases_at_epochs_load_and_say_where_they_come_from(trained):
    registry = Registry(trained[0] / "registry")
    made = by_epoch(registry)
    assert sorted(made) == [1, 2, 3]
    assert len({manifest.lineage.run for manifest in made.values()}) == 1
    assert len({manifest.state_version for manifest in made.values()}) == 3
    for manifest in made.values():
        assert registry.load(manifest.release_id).verify().passed
    assert family(registry, "run", made[2].release_id) == [made[epoch].release_id for epoch in (1, 2, 3)]
    seeds = [registry.manifest(name).lineage for name in family(registry, "seeds")]
    assert [(lineage.seed, lineage.epoch) for lineage in seeds] == [(0, 3), (1, 2)]
    with pytest.raises(ConfigError, match="one of run, seeds, got 'all'"):
        family(registry, "all")
    with pytest.raises(DataError, match="no release"):
        family(Registry(trained[0] / "nothing"), "run")


def test_the_skew_command_measures_all_triples_and_keeps_the_study(trained, capsys):
    folder, log = trained
    registry = Registry(folder / "registry")
    made = by_epoch(registry)
    options = ["--release", made[1].release_id, "--resamples", "50"]
    outputs = ["--out", f"{folder}/skew.json", "--plot", f"{folder}/skew.svg"]
    assert evaluate.main(["skew", *log, *options, *outputs]) == 0
    assert "skew sensitivity" in capsys.readouterr().out
    study = json.loads((folder / "skew.json").read_text())
    assert np.array(study["recall"]).shape == (3, 3, 3)
    assert [release["epoch"] for release in study["releases"]] == [1, 2, 3]
    for epoch in made:
        assert registry.read_study(f"skew-{made[epoch].release_id}") == study
    assert "<svg" in (folder / "skew.svg").read_text()
    # unmixed, the study is tower-evaluate quality
    table, items, users = read(folder)
    for place, epoch in enumerate((1, 3)):
        release = registry.load(made[epoch].release_id)
        report = evaluate.evaluate_quality(release, table, items, users, ks=(20,), resamples=10)
        wanted = report["arms"]["context"]["user_with_history"]["recall@20"]["value"]
        assert study["recall"][2 * place][2 * place][2 * place] == pytest.approx(wanted, abs=1e-6)


def test_the_axes_are_encoder_head_and_index(trained, tmp_path):
    """A head-only release shares the encoder: nothing may change along that axis, and something along the others."""
    folder, log = trained
    registry = Registry(folder / "registry")
    base = by_epoch(registry)[3].release_id
    options = ["--head-only-from", base, "--epochs", "1", "--out", str(tmp_path), "--device", "cpu"]
    other = Registry(tmp_path / "registry")
    other.fs.copy(f"{registry.root}/releases", f"{other.root}/releases", recursive=True)
    before = set(other.releases())
    assert training.main([*log[:-1], other.uri, *options]) == 0
    (made,) = set(other.releases()) - before  # not the last by name: two of one second are in no order
    releases = [other.load(base), other.load(made)]
    assert releases[0].manifest.state_version == releases[1].manifest.state_version
    recall_EHI = np.array(skew_study(releases, *read(folder), resamples=10)["recall"])
    np.testing.assert_array_equal(recall_EHI[0], recall_EHI[1])
    assert (recall_EHI[:, 0] != recall_EHI[:, 1]).any()
    assert (recall_EHI[:, :, 0] != recall_EHI[:, :, 1]).any()
    same = skew_study([releases[0], releases[0]], *read(folder), resamples=10)
    assert (same["sensitivity"]["value"], same["sensitivity"]["low"], same["sensitivity"]["high"]) == (0, 0, 0)
    arguments = ["bridge", *log[:-1], other.uri, "--from", base, "--to", made]
    assert evaluate.main(arguments) == 1  # one state version: no bridge is needed


def test_a_mixture_of_runs_and_checkpoints_is_no_family(trained):
    registry = Registry(trained[0] / "registry")
    made = by_epoch(registry)
    names = [made[1].release_id, made[2].release_id, by_epoch(registry, seed=1)[2].release_id]
    with pytest.raises(ConfigError, match="not a mixture"):
        skew_study([registry.load(name) for name in names], *read(trained[0]))


def test_the_bridge_command_writes_a_bridge_and_its_study_once(trained, capsys):
    folder, log = trained
    registry = Registry(folder / "registry")
    made = by_epoch(registry)
    arguments = ["bridge", *log, "--from", made[1].release_id, "--to", made[3].release_id, "--resamples", "50"]
    assert evaluate.main([*arguments, "--out", f"{folder}/bridge.json", "--plot", f"{folder}/bridge.png"]) == 0
    study = json.loads((folder / "bridge.json").read_text())
    assert (folder / "bridge.png").read_bytes().startswith(b"\x89PNG")
    versions = made[1].state_version, made[3].state_version
    assert registry.read_study(study_name(*versions)) == study
    full = {study["recall"][arm][-1]["value"] for arm in ARMS}
    assert len(full) == 1  # nobody is left to be answered otherwise
    sure = [gain["low"] > 0 for gain in study["gain"].values()]
    assert study["is_enabled"] == all(sure)
    assert study["kind"] == "affine" or study["choosing"]["gain"]["low"] > 0
    stored = load_bridge(registry, *versions)
    assert stored.manifest.is_enabled == study["is_enabled"]
    assert stored.manifest.counts == study["counts"]
    assert 0 < study["unexplained"]["affine"] < 1
    capsys.readouterr()
    assert evaluate.main(arguments) == 1
    assert "a bridge never changes" in capsys.readouterr().err


def test_groups_share_nobody_and_hold_the_shares():
    groups = group_users(np.arange(100), np.arange(150), held_out=0.5, max_fit_users=1000, seed=0)
    assert (len(groups.test), len(groups.choose), len(groups.fit)) == (50, 10, 90)
    assert np.unique(np.concatenate([groups.test, groups.choose, groups.fit])).tolist() == list(range(150))
    assert len(group_users(np.arange(100), np.arange(150), held_out=0.5, max_fit_users=7, seed=0).fit) == 7
    with pytest.raises(DataError, match="too few users"):
        group_users(np.arange(3), np.arange(3), held_out=0.5, max_fit_users=9, seed=0)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.0"):
        group_users(np.arange(9), np.arange(9), held_out=1.0, max_fit_users=9, seed=0)


def test_shares_by_hand():
    """40 users, one request each: backfilled all find, the bridge 30, the previous release 10, a cold start none."""
    users, ones = np.arange(40), np.ones(40)
    arms = {"bridge": (users < 30) * 1.0, "previous_release": (users < 10) * 1.0, "cold_start": 0 * ones}
    found = measure_shares(arms, ones, users, resamples=200, seed=0)
    values = {arm: [point["value"] for point in found["recall"][arm]] for arm in ARMS}
    assert found["shares"] == list(SHARES)
    assert values["cold_start"] == [0.0, 0.1, 0.5, 0.9, 1.0]  # just those backfilled
    assert (values["bridge"][0], values["previous_release"][0]) == (0.75, 0.25)
    assert values["bridge"][-1] == values["previous_release"][-1] == 1.0
    assert found["gain"]["previous_release"]["value"] == 0.5
    assert found["gain"]["cold_start"]["value"] == 0.75
    assert found["is_enabled"]


@pytest.mark.parametrize("rival", ["previous_release", "cold_start"])
def test_a_bridge_that_does_not_surely_beat_both_is_off(rival):
    users = np.arange(40)
    arms = {"bridge": (users < 30) * 1.0, "previous_release": 0.0 * users, "cold_start": 0.0 * users}
    arms[rival] = np.roll(arms["bridge"], 2)  # as good, on others
    assert not measure_shares(arms, np.ones(40), users, resamples=200, seed=0)["is_enabled"]


def test_plots_without_matplotlib_are_a_clear_error(trained, monkeypatch, capsys):
    folder, log = trained
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plotting()
    assert evaluate.main(["skew", *log, "--plot", f"{folder}/x.svg"]) == 1
    assert "plots need matplotlib" in capsys.readouterr().err
