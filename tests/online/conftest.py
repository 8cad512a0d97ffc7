"""Three releases for the tests of the service."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from model.item_index import write_snapshot
from model.release import Manifest, Registry
from model.state_codec import StateCodec
from tests.online.helpers import Oracle, Rows, make_head_only
from tests.releases import SMALL, make_release


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
def build_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """A world whose states are stored by the codec of that name; each is built once."""

    @functools.cache
    def build(codec: str) -> World:
        registry = tmp_path_factory.mktemp("online") / "registry"
        config = replace(SMALL, storage_codec=codec)
        a, b = (make_release(registry, seed=seed, config=config) for seed in (1, 2))
        h = make_head_only(registry, a, seed=1)
        return World(registry, a, b, h, Oracle(registry, a.release_id, b.release_id, h.release_id))

    return build


@pytest.fixture(scope="session")
def built_world(build_world: Callable[[str], World]) -> World:
    return build_world("float32")


@pytest.fixture
def codec(request: pytest.FixtureRequest) -> str:
    """How the states of the test's releases are stored; a test is run for several by `EVERY_CODEC`."""
    return str(getattr(request, "param", "float32"))


EVERY_CODEC = pytest.mark.parametrize("codec", ["float32", "float16", "int8"], indirect=True)


@pytest.fixture
def world(build_world: Callable[[str], World], codec: str, tmp_path: Path) -> World:
    """The releases in a registry of the test's own, where nothing is committed yet."""
    built = build_world(codec)
    registry = tmp_path / "registry"
    (registry).mkdir()
    (registry / "releases").symlink_to(built.registry / "releases")
    return World(registry, built.a, built.b, built.h, built.oracle)


@pytest.fixture
def rows(redis_server: str, codec: str) -> Iterator[Rows]:
    writer = Rows(redis_server)
    writer.codec = StateCodec.of(replace(SMALL, storage_codec=codec))
    yield writer
    writer.close()
