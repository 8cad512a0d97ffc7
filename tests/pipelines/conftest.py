"""Fixtures of the batch job's tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.config import TowerConfig
from model.release import Manifest
from tests.pipelines.job import Job
from tests.releases import make_description, make_release

TINY = TowerConfig(
    d_model=8, num_layers=1, num_heads=2, history_limit=4, embedding_dim=8, head_hidden=8, hash_rows=8, context_dim=8,
    session_limit=2, subject_limit=2,
)  # fmt: skip


@pytest.fixture(scope="session")
def int_release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A registry with one release that keeps 4 events a user; ids are int64."""
    registry = tmp_path_factory.mktemp("registry")
    return registry, make_release(registry, config=TINY)


@pytest.fixture(scope="session")
def string_release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The same with string ids."""
    registry = tmp_path_factory.mktemp("registry")
    return registry, make_release(registry, config=TINY, description=make_description(ids="string"))


@pytest.fixture
def job(tmp_path: Path, int_release: tuple[Path, Manifest]) -> Job:
    """An empty states folder for the int64 release."""
    registry, manifest = int_release
    return Job(tmp_path, registry, manifest.state_version)


@pytest.fixture
def string_job(tmp_path: Path, string_release: tuple[Path, Manifest]) -> Job:
    """An empty states folder for the string release."""
    registry, manifest = string_release
    return Job(tmp_path, registry, manifest.state_version)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
