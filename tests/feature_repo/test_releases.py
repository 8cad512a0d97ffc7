import json
from pathlib import Path
from typing import Any

import pytest

from feature_repo.releases import StoredRelease, read_releases, serving_release
from model.errors import ConfigError


def write_release(registry: Path, release_id: str, state_version: str = "a" * 16, **changes: Any) -> None:
    """The part of a manifest that the feature repository reads."""
    folder = registry / "releases" / release_id
    folder.mkdir(parents=True)
    manifest = {
        "release_id": release_id,
        "state_version": state_version,
        "config": {"d_model": 4, "storage_codec": "float32"},
        "description": {"user_id_type": "int64"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def write_pointer(registry: Path, serving: str | None) -> None:
    pointer = {"epoch": 1, "serving": serving, "prepared": None, "previous": None}
    (registry / "SERVING").write_text(json.dumps(pointer))


def test_releases_are_read_oldest_first(tmp_path: Path) -> None:
    write_release(tmp_path, "r2", "b" * 16)
    write_release(tmp_path, "r1")
    (tmp_path / "releases" / ".staging-r3").mkdir()
    assert read_releases(str(tmp_path)) == [
        StoredRelease("r1", "a" * 16, "int64", 4, "float32"),
        StoredRelease("r2", "b" * 16, "int64", 4, "float32"),
    ]
    assert read_releases(f"file://{tmp_path}/") == read_releases(str(tmp_path))


def test_how_states_are_stored(tmp_path: Path) -> None:
    write_release(tmp_path, "r1", config={"d_model": 4, "state_tokens": 3, "storage_codec": "int8"})
    assert read_releases(str(tmp_path)) == [StoredRelease("r1", "a" * 16, "int64", 12, "int8")]


def test_the_serving_release_else_the_latest(tmp_path: Path) -> None:
    write_release(tmp_path, "r1")
    write_release(tmp_path, "r2")
    releases = read_releases(str(tmp_path))
    assert serving_release(str(tmp_path), releases).release_id == "r2"
    write_pointer(tmp_path, None)
    assert serving_release(str(tmp_path), releases).release_id == "r2"
    write_pointer(tmp_path, "r1")
    assert serving_release(str(tmp_path), releases).release_id == "r1"


@pytest.mark.parametrize("pointer", ['{"serving": "gone"}', "{", "[]", "{}"])
def test_a_pointer_to_nothing_is_refused(tmp_path: Path, pointer: str) -> None:
    write_release(tmp_path, "r1")
    (tmp_path / "SERVING").write_text(pointer)
    with pytest.raises(ConfigError, match="pointer"):
        serving_release(str(tmp_path), read_releases(str(tmp_path)))


def test_a_registry_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot list .*Nothing was applied"):
        read_releases(str(tmp_path / "nowhere"))
    (tmp_path / "releases").mkdir()
    with pytest.raises(ConfigError, match=r"holds no release.*Nothing was applied"):
        read_releases(str(tmp_path))


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"release_id": "other"}'])
def test_one_unreadable_manifest_refuses_all(tmp_path: Path, manifest: str | None) -> None:
    write_release(tmp_path, "r1")
    write_release(tmp_path, "r2")
    path = tmp_path / "releases" / "r2" / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(ConfigError, match=r"r2/manifest.json.*Nothing was applied"):
        read_releases(str(tmp_path))


def test_the_registry_that_the_models_write_is_readable(tmp_path: Path) -> None:
    from model.config import TowerConfig
    from model.dataset import DatasetDescription

    # The entries this package reads by name exist in the records that the registry writes.
    assert {"d_model", "state_tokens", "storage_codec"} <= set(TowerConfig().to_dict())
    assert "user_id_type" in DatasetDescription.__annotations__
