"""Three releases for the tests of the service."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.item_index import write_snapshot
from model.release import Manifest, Registry
from tests.online.helpers import Oracle, Rows, make_head_only
from tests.releases import make_release


@dataclass(frozen=True)
class World:
    """A registry with releases a and b of different encoders, and h: a's encoder with another head."""

    registry: Path
    a: Manifest
    b: Manifest
    h: Manifest
    oracle: Oracle

    def write_items(self, *manifests: Manifest) -> None:
        """The item snapshots of some releases."""
        for manifest in manifests:
            write_snapshot(Registry(self.registry), self.oracle.releases[manifest.release_id])


@pytest.fixture(scope="session")
def built_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    registry = tmp_path_factory.mktemp("online") / "registry"
    a, b = make_release(registry, seed=1), make_release(registry, seed=2)
    h = make_head_only(registry, a, seed=1)
    return World(registry, a, b, h, Oracle(registry, a.release_id, b.release_id, h.release_id))


@pytest.fixture
def world(built_world: World, tmp_path: Path) -> World:
    """The releases in a registry of the test's own, where nothing is committed yet."""
    registry = tmp_path / "registry"
    (registry).mkdir()
    (registry / "releases").symlink_to(built_world.registry / "releases")
    return World(registry, built_world.a, built_world.b, built_world.h, built_world.oracle)


@pytest.fixture
def rows(redis_server: str) -> Iterator[Rows]:
    writer = Rows(redis_server)
    yield writer
    writer.close()
