"""Releases: written whole, read back equal, refused when altered; the pointer's rules."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import model.features
from model.errors import CheckpointError, ConfigError, GoldenMismatch, PointerConflict, ShapeError
from model.records import Context, Event, SubjectItem
from model.release import Pointer, Registry, context_from_json, context_to_json
from model.state_codec import as_stored
from tests.releases import SMALL, make_description, make_release, make_tower


def histories() -> tuple[pa.Table, np.ndarray]:
    table = pa.table(
        {
            "item_id": [10, 11, 12, 59, 400],
            "event_type": ["click", "view", "click", "click", "view"],
            "timestamp_us": [1_000_000, 5_000_000, 9_000_000, 1_000_000, 2_000_000],
            "surface": ["feed", None, "search", "feed", "nowhere"],
        }
    )
    return table, np.array([0, 3, 5])


CONTEXTS = [
    Context(
        features={"device": "tv", "country": "de"},
        timestamp_us=20_000_000,
        session_events=(Event(13, "click", 15_000_000),),
        subject_items=(SubjectItem(14, 0.5),),
    ),
    Context(),
]


@pytest.mark.parametrize("ids", ["int64", "string"])
def test_a_release_reads_back_as_it_was_written(tmp_path: Path, ids: str) -> None:
    description = make_description(ids=ids)
    manifest = make_release(tmp_path, description=description)
    registry = Registry(tmp_path)
    assert registry.releases() == [manifest.release_id]
    assert registry.manifest(manifest.release_id) == manifest
    report = registry.load(manifest.release_id).verify()
    assert report.passed
    assert set(report.differences) == {"states", "embeddings", "items"}


def test_the_split_tower_equals_the_undivided_one(tmp_path: Path) -> None:
    tower, items = make_tower()
    release_id = Registry(tmp_path).write(tower, items, trained_until_us=0).release_id
    release = Registry(tmp_path).load(release_id)
    table, offsets = histories()
    states = release.encode(table, offsets)
    split = release.embed(states, CONTEXTS, [9_000_000, 2_000_000])
    assert np.abs(split - tower.embed(table, offsets, CONTEXTS)).max() < 1e-6
    assert np.allclose(np.linalg.norm(split, axis=1), 1, atol=1e-6)


def test_versions_follow_content(tmp_path: Path) -> None:
    first = make_release(tmp_path / "a")
    same = make_release(tmp_path / "b")
    assert (first.state_version, first.embedding_version) == (same.state_version, same.embedding_version)
    other_weights = make_release(tmp_path / "a", seed=1)
    assert first.state_version != other_weights.state_version
    assert first.embedding_version != other_weights.embedding_version
    dtype = make_release(tmp_path / "a", config=replace(SMALL, compute_dtype="bfloat16"))
    assert dtype.state_version != first.state_version


@pytest.mark.parametrize("changes", [{"storage_codec": "float16"}, {"storage_codec": "int8"}, {"state_tokens": 2}])
def test_a_state_version_covers_how_states_are_stored(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, other = make_release(tmp_path), make_release(tmp_path, config=replace(SMALL, **changes))
    assert other.state_version != first.state_version
    assert other.embedding_version != first.embedding_version


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_golden_embeddings_are_made_of_stored_states(tmp_path: Path, codec: str) -> None:
    """The undivided tower, the release and its golden outputs all see the rounded state."""
    tower, items = make_tower(config=replace(SMALL, storage_codec=codec, state_tokens=2))
    release = Registry(tmp_path).load(Registry(tmp_path).write(tower, items, trained_until_us=0).release_id)
    table, offsets = histories()
    states = release.encode(table, offsets)
    until_us = [9_000_000, 2_000_000]
    rounded = release.embed(as_stored(release.codec, states), CONTEXTS, until_us)
    assert np.abs(rounded - tower.embed(table, offsets, CONTEXTS)).max() < 1e-6
    assert np.abs(rounded - release.embed(states, CONTEXTS, until_us)).max() > 1e-6
    golden = release.golden_users()
    warm = [u for u, until in enumerate(golden.history_until_us) if until is not None]
    found = release.embed(
        as_stored(release.codec, golden.state_UD[warm]), [golden.contexts[u] for u in warm],
        [golden.history_until_us[u] for u in warm],
    )  # fmt: skip
    assert np.abs(found - golden.embedding_UE[warm]).max() < 1e-6
    assert release.verify().passed


def test_a_release_of_before_codecs_and_tokens_has_one_token(tmp_path: Path) -> None:
    manifest = make_release(tmp_path)
    path = tmp_path / "releases" / manifest.release_id / "manifest.json"
    values = json.loads(path.read_text())
    del values["config"]["state_tokens"]
    path.write_text(json.dumps(values))
    assert Registry(tmp_path).load(manifest.release_id).config == manifest.config


def test_a_head_only_retrain_keeps_the_state_version(tmp_path: Path) -> None:
    tower, items = make_tower()
    registry = Registry(tmp_path)
    first = registry.write(tower, items, trained_until_us=0)
    with torch.no_grad():
        tower.head.out.weight.mul_(1.5)
    second = registry.write(tower, items, trained_until_us=0, base=first.release_id)
    assert second.state_version == first.state_version
    assert second.embedding_version != first.embedding_version
    with torch.no_grad():
        tower.encoder.norm.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="not those of the base"):
        registry.write(tower, items, trained_until_us=0, base=first.release_id)


@pytest.mark.parametrize("name", ["encoder.safetensors", "golden.parquet", "vocabularies.json", "catalogue.parquet"])
def test_an_altered_file_is_refused(tmp_path: Path, name: str) -> None:
    release_id = make_release(tmp_path).release_id
    path = tmp_path / "releases" / release_id / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} of release {release_id} was altered or torn"):
        Registry(tmp_path).load(release_id)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        Registry(tmp_path).load(release_id)


def test_a_featuriser_that_shifts_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of preprocessing that keeps every shape: seconds taken for milliseconds."""
    release_id = make_release(tmp_path).release_id
    monkeypatch.setattr(model.features, "_SECOND_US", 1_000)
    with pytest.raises(GoldenMismatch, match="golden outputs differ"):
        Registry(tmp_path).load(release_id)
    Registry(tmp_path).load(release_id, replay=False)


def test_parts_load_apart(tmp_path: Path) -> None:
    release_id = make_release(tmp_path).release_id
    release = Registry(tmp_path).load(release_id, parts=("encoder",))
    assert set(release.verify().differences) == {"states"}
    with pytest.raises(CheckpointError, match="head part of the release was not loaded"):
        _ = release.head
    online = Registry(tmp_path).load(release_id, parts=("head", "items"))
    assert set(online.verify().differences) == {"embeddings", "items"}


def test_states_of_another_width_are_refused(tmp_path: Path) -> None:
    release = Registry(tmp_path).load(make_release(tmp_path).release_id)
    with pytest.raises(ShapeError, match=r"\[B, 16\], got \[1, 15\]"):
        release.embed(np.zeros((1, 15), np.float32), [Context()], [None])


def test_an_unknown_release_names_those_there_are(tmp_path: Path) -> None:
    release_id = make_release(tmp_path).release_id
    with pytest.raises(CheckpointError, match=f"no release 'nope' .* there are: {release_id}"):
        Registry(tmp_path).manifest("nope")
    with pytest.raises(CheckpointError, match="a release id holds"):
        Registry(tmp_path).manifest("../secrets")


def test_a_half_written_release_is_not_listed(tmp_path: Path) -> None:
    folder = tmp_path / "releases" / ".staging-x"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (tmp_path / "releases" / "y").mkdir()
    assert Registry(tmp_path).releases() == []


def test_the_pointer_moves_by_epochs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    a, b = make_release(tmp_path, seed=1).release_id, make_release(tmp_path, seed=2).release_id
    assert registry.pointer() == Pointer()
    with pytest.raises(PointerConflict, match="nothing to roll back to"):
        registry.rollback()
    assert registry.commit(a) == Pointer(1, a)
    assert registry.commit(a) == Pointer(1, a)
    assert registry.commit(b, expected_epoch=1) == Pointer(2, b, None, a)
    with pytest.raises(PointerConflict, match="at epoch 2, not 1"):
        registry.commit(a, expected_epoch=1)
    assert registry.rollback() == Pointer(3, a, None, b)
    assert registry.pointer().resident() == [a, b]
    with pytest.raises(CheckpointError, match="no release"):
        registry.commit("missing")
    (tmp_path / "SERVING").write_text('{"epoch"')
    with pytest.raises(CheckpointError, match="is not a pointer"):
        registry.pointer()


def test_two_writers_lose_no_update(tmp_path: Path) -> None:
    registries = [Registry(tmp_path) for _ in range(4)]
    tokens: list[int] = []
    threads = [
        threading.Thread(target=lambda r=r: tokens.extend(r.next_token() for _ in range(25)))  # type: ignore[misc]
        for r in registries
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tokens) == list(range(1, 101))


def test_a_registry_without_a_lock_refuses_to_move_the_pointer() -> None:
    with pytest.raises(ConfigError, match="have a lock"):
        Registry("memory://registry").next_token()


def test_a_context_survives_json() -> None:
    for context in CONTEXTS:
        assert context_from_json(context_to_json(context)) == context


def test_a_writer_killed_midway_leaves_no_release(tmp_path: Path) -> None:
    """The process dies where the last file would be written; readers see nothing, a second try succeeds."""
    code = (
        "import os, sys\n"
        "import model.release as r\n"
        "from tests.releases import make_release\n"
        "r._sync = lambda path: os._exit(9)\n"
        "make_release(sys.argv[1])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert Registry(tmp_path).releases() == []
    manifest = make_release(tmp_path)
    assert Registry(tmp_path).releases() == [manifest.release_id]
    stored = json.loads((tmp_path / "releases" / manifest.release_id / "manifest.json").read_text())
    assert stored["state_version"] == manifest.state_version


def test_releases_made_within_a_second_keep_their_order(tmp_path: Path) -> None:
    made = [make_release(tmp_path, seed=seed).release_id for seed in range(4)]
    assert Registry(tmp_path).releases() == made
