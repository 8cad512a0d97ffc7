"""Item snapshots and the search over them: exact order, and whatever is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.errors import CheckpointError, GoldenMismatch, ShapeError
from model.item_index import ItemIndex, check_golden, has_snapshot, read_snapshot, write_snapshot
from model.release import Registry, Release
from tests.releases import make_description, make_release

ITEM_NE = [[1, 0], [0, 1], [1, 0], [0.6, 0.8], [-1, 0]]


def small_index() -> ItemIndex:
    return ItemIndex("0" * 16, pa.array([10, 11, 12, 13, 14]), torch.tensor(ITEM_NE, dtype=torch.float32))


@pytest.mark.parametrize(
    ("user", "k", "rows", "scores"),
    [
        ([1, 0], 1, [0], [1]),  # rows 0 and 2 tie: the first
        ([1, 0], 3, [0, 2, 3], [1, 1, 0.6]),
        ([0, 1], 2, [1, 3], [1, 0.8]),
        ([0, 1], 4, [1, 3, 0, 2], [1, 0.8, 0, 0]),  # rows 0, 2 and 4 tie for two places
        ([1, 0], 5, [0, 2, 3, 1, 4], [1, 1, 0.6, 0, -1]),
        ([1, 0], 99, [0, 2, 3, 1, 4], [1, 1, 0.6, 0, -1]),
    ],
)
def test_the_best_come_first_and_ties_keep_the_order_of_rows(
    user: list[float], k: int, rows: list[int], scores: list[float]
) -> None:
    found = small_index().search(np.array([user, [0, 0]], np.float32), k)
    assert found.row_BK[0].tolist() == rows
    np.testing.assert_allclose(found.score_BK[0], scores, atol=1e-6)
    assert found.row_BK[1].tolist() == list(range(min(k, 5))), "all scores equal"


def test_many_ties_keep_the_order_of_rows() -> None:
    """Rows 0, 3, 6, ... score 1, the others 0."""
    item_NE = torch.zeros(300, 2)
    item_NE[::3, 0] = 1
    index = ItemIndex("0" * 16, pa.array(range(300)), item_NE)
    found = index.search(np.array([[1, 0]], np.float32), 103)
    assert found.row_BK[0].tolist() == [*range(0, 300, 3), 1, 2, 4]


def test_an_empty_catalogue_gives_nothing() -> None:
    index = ItemIndex("0" * 16, pa.array([], pa.int64()), torch.zeros(0, 2))
    assert index.search(np.ones((3, 2), np.float32), 4).row_BK.shape == (3, 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[B, 2\], got \[1, 3\]"):
        small_index().search(np.ones((1, 3), np.float32), 1)
    with pytest.raises(ShapeError, match="at least 1, got 0"):
        small_index().search(np.ones((1, 2), np.float32), 0)
    with pytest.raises(ShapeError, match=r"embeddings of 2 items, got \[3, 2\]"):
        ItemIndex("0" * 16, pa.array([1, 2]), torch.zeros(3, 2))


# Snapshots


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Registry(tmp_path).load(make_release(tmp_path).release_id)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def folder_of(registry: Registry, version: str) -> Path:
    return Path(registry.uri) / "items" / version


def rewrite(folder: Path, table: pa.Table) -> None:
    """Put other items under a manifest that vouches for them."""
    pq.write_table(table, folder / "items.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = hashlib.sha256((folder / "items.parquet").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("ids", ["int64", "string"])
def test_a_snapshot_is_the_release_s_catalogue(tmp_path: Path, registry: Registry, ids: str) -> None:
    release = registry.load(make_release(tmp_path, description=make_description(ids=ids)).release_id)
    version = release.manifest.embedding_version
    assert not has_snapshot(registry, version)
    assert write_snapshot(registry, release) == 50
    assert has_snapshot(registry, version)
    index = read_snapshot(registry, version)
    assert index.embedding_version == version
    assert index.item_ids.to_pylist() == [10 + n if ids == "int64" else f"i{10 + n}" for n in range(50)]
    assert release.item_table is not None
    np.testing.assert_array_equal(index.item_NE.numpy(), release.item_table[:50].numpy())
    check_golden(index, release)


def test_a_whole_snapshot_is_not_written_again(registry: Registry, release: Release) -> None:
    write_snapshot(registry, release)
    folder = folder_of(registry, release.manifest.embedding_version)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_snapshot(registry, release) == 50
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    table = pq.read_table(folder / "items.parquet")
    rewrite(folder, table.take(list(range(49, -1, -1))))
    with pytest.raises(CheckpointError, match="other items than its release"):
        write_snapshot(registry, release)


def test_a_snapshot_without_its_manifest_is_written_anew(registry: Registry, release: Release) -> None:
    """The manifest comes last: a writer killed before it leaves nothing that is read."""
    write_snapshot(registry, release)
    version = release.manifest.embedding_version
    (folder_of(registry, version) / "manifest.json").unlink()
    assert not has_snapshot(registry, version)
    with pytest.raises(CheckpointError, match=f"no item snapshot of embedding version {version}"):
        read_snapshot(registry, version)
    write_snapshot(registry, release)
    check_golden(read_snapshot(registry, version), release)


def test_an_altered_snapshot_is_refused(registry: Registry, release: Release) -> None:
    write_snapshot(registry, release)
    version = release.manifest.embedding_version
    path = folder_of(registry, version) / "items.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was altered or torn"):
        read_snapshot(registry, version)


def test_a_snapshot_of_another_version_is_refused(registry: Registry, release: Release) -> None:
    write_snapshot(registry, release)
    version = release.manifest.embedding_version
    shutil.copytree(folder_of(registry, version), folder_of(registry, "f" * 16))
    with pytest.raises(CheckpointError, match=f"version {version}; wanted .* version {'f' * 16}"):
        read_snapshot(registry, "f" * 16)


@pytest.mark.parametrize("content", ["{torn", "{}", "[]"])
def test_a_torn_manifest_is_refused(registry: Registry, release: Release, content: str) -> None:
    write_snapshot(registry, release)
    version = release.manifest.embedding_version
    (folder_of(registry, version) / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_snapshot(registry, version)


def test_a_snapshot_of_another_size_than_it_says_is_refused(registry: Registry, release: Release) -> None:
    write_snapshot(registry, release)
    version = release.manifest.embedding_version
    folder = folder_of(registry, version)
    rewrite(folder, pq.read_table(folder / "items.parquet").slice(0, 40))
    with pytest.raises(CheckpointError, match="holds 40 items and 640 numbers, its manifest says 50 items of width 16"):
        read_snapshot(registry, version)


# Golden items


def test_an_index_is_held_to_the_golden_items(release: Release, tmp_path: Path) -> None:
    assert release.item_table is not None
    version, ids = release.manifest.embedding_version, release.featuriser.item_ids
    item_NE = release.item_table[:50].clone()
    check_golden(ItemIndex(version, ids, item_NE + 5e-5), release)
    with pytest.raises(CheckpointError, match="cannot serve release"):
        check_golden(ItemIndex("f" * 16, ids, item_NE), release)
    with pytest.raises(GoldenMismatch, match="other items than its catalogue"):
        check_golden(ItemIndex(version, ids.take(pa.array(range(49, -1, -1))), item_NE), release)
    with pytest.raises(GoldenMismatch, match=r"differ by 0\.01"):
        check_golden(ItemIndex(version, ids, item_NE + 0.01), release)
    with pytest.raises(GoldenMismatch, match="differ by nan"):
        check_golden(ItemIndex(version, ids, item_NE * float("nan")), release)
    other = Registry(tmp_path).load(make_release(tmp_path, seed=1).release_id)
    assert other.item_table is not None
    with pytest.raises(GoldenMismatch, match="golden items differ"):
        check_golden(ItemIndex(version, ids, other.item_table[:50]), release)
