"""Canaries: moved by whole weeks they stay what they were."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from model.canary import canaries, canary_ids, encode_canaries, moved, weeks_back_us
from model.records import Context, Event
from model.release import Registry, Release
from model.state_codec import as_stored
from tests.releases import SMALL, make_description, make_release, make_tower

WEEK_US = 604_800_000_000


ROUNDED = [("int64", "float16"), ("int64", "int8")]


@pytest.fixture(scope="module", params=[("int64", "float32"), ("string", "float32"), *ROUNDED])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    registry: Path = tmp_path_factory.mktemp("canary")
    ids, codec = request.param
    config = replace(SMALL, storage_codec=codec, state_tokens=1 if codec == "float32" else 2)
    manifest = make_release(registry, description=make_description(ids=ids), config=config)
    return Registry(registry).load(manifest.release_id)


def microseconds(year: int, month: int, day: int, hour: int) -> int:
    return int(datetime(year, month, day, hour, tzinfo=UTC).timestamp()) * 1_000_000


@pytest.mark.parametrize("as_of", [(1999, 2, 28, 3), (2020, 9, 13, 12), (2026, 3, 29, 1), (2041, 12, 31, 23)])
def test_states_and_embeddings_stay_golden(release: Release, as_of: tuple[int, int, int, int]) -> None:
    """The golden histories are of September 2020: as-of times decades before and after, on any weekday and hour."""
    as_of_us = microseconds(*as_of)
    known = canaries(release)
    ids, state_UD, until_us = encode_canaries(release, as_of_us)
    assert ids == [canary.user_id for canary in known]
    for canary, state_D, until in zip(known, state_UD, until_us, strict=True):
        assert 0 <= as_of_us - until < WEEK_US
        assert (until - canary.history_until_us) % WEEK_US == 0
        stored = as_stored(release.codec, state_D[None])
        assert canary.state_difference(stored[0]) <= canary.state_tolerance
        embedding_E = release.embed(stored, [canary.context_at(until)], [until])[0]
        assert canary.embedding_difference(embedding_E) <= canary.embedding_tolerance


def test_a_move_by_anything_but_weeks_shows(release: Release) -> None:
    """Hour and weekday are of the context, so a canary notices a clock that is wrong by hours."""
    differences = []
    for canary in canaries(release):
        until = canary.history_until_us + 5 * 3_600_000_000
        stored = as_stored(release.codec, canary.state_D[None])
        embedding_E = release.embed(stored, [canary.context_at(until)], [until])[0]
        differences.append(canary.embedding_difference(embedding_E) / canary.embedding_tolerance)
    assert min(differences) > (10 if release.codec is None else 1)


def test_canaries_differ_from_each_other(release: Release) -> None:
    known = canaries(release)
    for one in range(4):
        for other in range(one):
            far = 100 if release.codec is None else 50
            assert known[one].state_difference(known[other].state_D) > far * known[one].state_tolerance


@pytest.mark.parametrize("release", ROUNDED, indirect=True)
def test_a_step_of_rounding_either_way_passes(release: Release) -> None:
    """Another processor moves a number by 1e-6: over the middle between two steps, it is stored a whole step away."""
    assert release.codec is not None
    random = np.random.default_rng(0)
    for canary in canaries(release):
        rounding = release.codec.rounding(canary.state_D[None])[0]
        for _ in range(20):
            moved_D = as_stored(release.codec, canary.state_D[None])[0]
            number = int(random.integers(len(moved_D)))
            moved_D[number] += 2 * rounding * (1 if random.random() < 0.5 else -1)
            embedding_E = release.embed(moved_D[None], [canary.context], [canary.history_until_us])[0]
            assert canary.embedding_difference(embedding_E) <= canary.embedding_tolerance / 2


def test_a_state_that_cannot_be_compared_is_infinitely_far(release: Release) -> None:
    canary = canaries(release)[0]
    assert canary.state_difference(canary.state_D) == 0
    assert canary.state_difference(canary.state_D + np.float32(0.5)) == pytest.approx(0.5, abs=1e-6)
    assert canary.state_difference(canary.state_D[:-1]) == np.inf
    broken = canary.state_D.copy()
    broken[3] = np.nan
    assert canary.state_difference(broken) == np.inf
    assert canary.embedding_difference(canary.embedding_E * np.float32(np.inf)) == np.inf


def test_the_reserved_ids() -> None:
    assert canary_ids("int64") == [
        -4611686018427387904, -4611686018427387903, -4611686018427387902, -4611686018427387901,
    ]  # fmt: skip
    assert canary_ids("string") == [f"__hybrid_tower_canary_{n}" for n in range(4)]


@pytest.mark.parametrize(
    ("until_us", "as_of_us", "weeks"),
    [(0, 0, 0), (0, WEEK_US - 1, 0), (0, WEEK_US, 1), (10, 9, -1), (10, 10 - WEEK_US, -1), (10, 9 - WEEK_US, -2)],
)
def test_whole_weeks(until_us: int, as_of_us: int, weeks: int) -> None:
    assert weeks_back_us(until_us, as_of_us) == weeks * WEEK_US


def test_all_times_of_a_context_move() -> None:
    context = Context({"device": "tv"}, 20, (Event(1, "click", 5), Event(2, "click", 9)))
    assert moved(context, 100) == Context({"device": "tv"}, 120, (Event(1, "click", 105), Event(2, "click", 109)))
    assert moved(Context(), 100) == Context()


def test_releases_of_one_state_version_share_their_canaries(tmp_path: Path) -> None:
    """A head-only retrain whose head reads more keeps the rows: histories do not depend on what a head reads."""
    registry = Registry(tmp_path)
    base = make_release(tmp_path, seed=1)
    tower, items = make_tower(seed=1, config=replace(SMALL, query_dim=3))
    head = registry.write(tower, items, trained_until_us=1_600_000_000_000_000, base=base.release_id)
    assert head.state_version == base.state_version
    assert head.embedding_version != base.embedding_version
    ours, theirs = (canaries(registry.load(m.release_id)) for m in (base, head))
    for one, other in zip(ours, theirs, strict=True):
        assert one.history_until_us == other.history_until_us
        assert one.state_difference(other.state_D) == 0
