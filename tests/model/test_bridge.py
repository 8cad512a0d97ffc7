"""Bridges: the ridge solution by hand, what a residual adds, and artefacts refused when altered."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from model import bridge as module
from model.bridge import Bridge, bridge_folder, fit_affine, fit_residual, load_bridge, unexplained, write_bridge
from model.errors import CheckpointError, DataError, GoldenMismatch, ShapeError
from model.release import Registry
from tests.releases import make_tower


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_the_ridge_solution_by_hand():
    # centred: x -1, 1 and y -2, 2; var(x) = 1, cov = 2. Ridge 0: w = 2, b = 3 - 1 * 2. Ridge 1: w = 2 / (1 + 1), b = 2.
    old, new = column(0, 2), column(1, 5)
    for ridge, weight, bias in ((0.0, 2.0, 1.0), (1.0, 1.0, 2.0)):
        found = fit_affine(old, new, ridge)
        assert found.matrix_XY.tolist() == [[weight]]
        assert found.bias_Y.tolist() == [bias]
        assert found.kind == "affine"
    assert fit_affine(old, new, 0.0).apply(column(10)).tolist() == [[21.0]]


def test_the_ridge_is_a_share_of_the_mean_variance():
    # var = (1, 4), mean 2.5, no covariance: w = cov / (var + 2.5 ridge) = 1 / 3.5 and 4 / 6.5
    old = np.array([[1, 2], [1, -2], [-1, 2], [-1, -2]], np.float32)
    found = fit_affine(old, old, 1.0)
    np.testing.assert_allclose(found.matrix_XY, [[1 / 3.5, 0], [0, 4 / 6.5]], atol=1e-7)


def test_a_map_to_another_width_is_found_again():
    rng = np.random.default_rng(0)
    old, matrix, bias = rng.normal(size=(50, 4)), rng.normal(size=(4, 3)), rng.normal(size=3)
    found = fit_affine(old.astype(np.float32), (old @ matrix + bias).astype(np.float32), 1e-8)
    np.testing.assert_allclose(found.matrix_XY, matrix, atol=1e-5)
    np.testing.assert_allclose(found.bias_Y, bias, atol=1e-5)


def test_a_residual_learns_what_no_affine_map_can():
    rng = np.random.default_rng(0)
    old = rng.uniform(-1, 1, (400, 1)).astype(np.float32)
    affine = fit_affine(old[:300], np.abs(old[:300]), 1e-4)
    assert unexplained(affine, old[300:], np.abs(old[300:])) > 0.9
    pairs = old[:300], np.abs(old[:300]), old[300:], np.abs(old[300:])
    residual = fit_residual(affine, *pairs, hidden=256, steps=400)
    assert residual.kind == "residual"
    assert unexplained(residual, old[300:], np.abs(old[300:])) < 0.05
    unmoved = fit_residual(affine, *pairs, steps=0)  # starts as the affine map
    np.testing.assert_array_equal(unmoved.apply(old), affine.apply(old))


def test_unexplained_is_0_for_the_truth_and_1_for_the_mean():
    old, new = column(0, 2), column(1, 5)
    assert unexplained(Bridge(column(2), np.array([1], np.float32)), old, new) == 0
    assert unexplained(Bridge(column(0), np.array([3], np.float32)), old, new) == 1


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"\[U, 1\], got \[2, 3\]"):
        Bridge(column(1), np.zeros(1, np.float32)).apply(np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match="the same users"):
        fit_affine(column(1, 2), column(1), 1.0)
    with pytest.raises(DataError, match="2 users with both states"):
        fit_affine(column(1), column(1), 1.0)


@pytest.fixture(scope="module")
def two_releases(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("bridges") / "registry")
    manifests = []
    for seed in (0, 1):
        tower, items = make_tower(seed=seed)
        manifests.append(registry.write(tower, items, trained_until_us=0))
    return registry, manifests


@pytest.fixture
def stored(two_releases, tmp_path):
    """A registry with two releases and a residual bridge between them, and the bridge's folder."""
    source, (old, new) = two_releases
    shutil.copytree(source.root, tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    rng = np.random.default_rng(0)
    width = old.config.d_model
    shapes = ((width, width), (width,), (width, 4), (4,), (4, width))
    bridge = Bridge(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    golden_GX = registry.load(old.release_id).golden_users().state_UD
    write_bridge(
        registry, bridge, golden_GX, from_release=old.release_id, to_release=new.release_id, is_enabled=False,
        study={"k": 20}, counts={"fit_users": 9},
    )  # fmt: skip
    folder = tmp_path / "registry" / bridge_folder(old.state_version, new.state_version)
    return registry, old, new, bridge, folder


def test_a_bridge_comes_back_as_it_was_stored(stored):
    registry, old, new, bridge, folder = stored
    assert sorted(path.name for path in folder.iterdir()) == [
        "bridge.safetensors",
        "golden.safetensors",
        "manifest.json",
    ]
    found = load_bridge(registry, old.state_version, new.state_version)
    states = np.random.default_rng(1).normal(size=(3, old.config.d_model)).astype(np.float32)
    np.testing.assert_array_equal(found.bridge.apply(states), bridge.apply(states))
    manifest = found.manifest
    assert (manifest.kind, manifest.is_enabled, manifest.counts) == ("residual", False, {"fit_users": 9})
    assert (manifest.from_release, manifest.to_release) == (old.release_id, new.release_id)
    assert manifest.to_embedding_version == new.embedding_version
    assert load_bridge(registry, new.state_version, old.state_version) is None


def test_a_bridge_never_changes(stored):
    registry, old, new, bridge, _ = stored
    with pytest.raises(CheckpointError, match="already in"):
        write_bridge(
            registry, bridge, np.zeros((1, old.config.d_model), np.float32), from_release=old.release_id,
            to_release=new.release_id, is_enabled=True, study={}, counts={},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["bridge.safetensors", "golden.safetensors"])
def test_altered_and_missing_files_are_refused(stored, name):
    registry, old, new, _, folder = stored
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} of .* was altered"):
        load_bridge(registry, old.state_version, new.state_version)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_bridge(registry, old.state_version, new.state_version)


def test_a_manifest_switched_on_by_hand_is_refused(stored):
    registry, old, new, _, folder = stored
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"is_enabled": false', '"is_enabled": true'))
    with pytest.raises(CheckpointError, match="fingerprint does not match"):
        load_bridge(registry, old.state_version, new.state_version)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a bridge's"):
        load_bridge(registry, old.state_version, new.state_version)


def test_golden_rows_that_come_out_otherwise_are_refused(stored):
    """As where this machine computes something else: files and fingerprints are whole."""
    registry, old, new, _, folder = stored
    golden = safetensors.numpy.load((folder / "golden.safetensors").read_bytes())
    golden["new_GY"][0, 0] += 0.01
    content = safetensors.numpy.save(golden)
    (folder / "golden.safetensors").write_bytes(content)
    values = json.loads((folder / "manifest.json").read_text())
    del values["fingerprint"]
    values["files"]["golden.safetensors"] = module._digest(content)
    (folder / "manifest.json").write_text(json.dumps(values | {"fingerprint": module._fingerprint(values)}))
    with pytest.raises(GoldenMismatch, match=r"differ by 0\.01"):
        load_bridge(registry, old.state_version, new.state_version)


def test_a_bridge_in_anothers_place_is_refused(stored):
    registry, old, new, _, folder = stored
    shutil.copytree(folder, folder.parent / f"{new.state_version}-{old.state_version}")
    with pytest.raises(CheckpointError, match="says it leads from"):
        load_bridge(registry, new.state_version, old.state_version)
    with pytest.raises(CheckpointError, match="16 hex digits"):
        load_bridge(registry, "../releases", old.state_version)
