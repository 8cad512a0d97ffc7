"""Canary users checked by a running server: rows as the batch job writes them, and whatever can be wrong with them."""

import logging
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from feature_repo import layout
from model.canary import canaries
from model.leases import read_leases
from model.records import UserState
from model.release import Manifest, Registry, Release
from online.canary import Check
from online.guard import read_row
from online.head import ServingHead
from online.server import Server
from online.settings import Settings
from tests.online.conftest import EVERY_CODEC, World
from tests.online.helpers import HOUR_US, NOW_US, Rows, row_bytes, serving, wait_until

AS_OF_US = (NOW_US - HOUR_US) // 1_000_000 * 1_000_000


@pytest.fixture
def canary_rows(world: World, rows: Rows) -> Rows:
    """Release a serves; its canaries are stored, and nobody else's."""
    Registry(world.registry).commit(world.a.release_id)
    rows.drop_canaries()
    rows.put_canaries(world.oracle.releases[world.a.release_id], AS_OF_US)
    return rows


@contextmanager
def looking(world: World, url: str, **settings: Any) -> Iterator[tuple[Server, Callable[[], Check]]]:
    """A server whose canaries are looked at when the test says so."""
    with serving(world.registry, url, canary_s=0.0, **settings) as (server, _):

        def look() -> Check:
            server.canaries.check()
            residents = server.follower.current
            assert residents is not None
            return server.canaries._checks(residents)[world.a.release_id]

        yield server, look


def sample(server: Server, name: str, manifest: Manifest, **labels: str) -> float | None:
    value: float | None = server.metrics.registry.get_sample_value(name, {"release": manifest.release_id, **labels})
    return value


def replace_row(rows: Rows, world: World, change: Callable[[UserState], UserState], number: int = 0) -> None:
    """Store something else for one canary; its row is still of one write."""
    canary = canaries(world.oracle.releases[world.a.release_id])[number]
    view = layout.view_name(world.a.state_version)
    row = layout.decode_row(rows.redis.hmget(layout.redis_key(canary.user_id), layout.row_fields(view)))
    assert row is not None
    state = UserState(row.state, row.state_version, row.history_until_us, row.encoded_at_us)
    rows.put(canary.user_id, row_bytes(change(state), world.a.state_version))


@EVERY_CODEC
def test_rows_of_the_batch_job_pass(world: World, canary_rows: Rows, redis_server: str) -> None:
    with looking(world, redis_server) as (server, look):
        check = look()
        assert (check.verdict, check.failures, check.as_of_us) == ("passed", (), AS_OF_US)
        assert set(check.differences) == {"state", "embedding"}
        rounding = {canary.state_tolerance for canary in canaries(world.oracle.releases[world.a.release_id])}
        assert check.differences["state"] < max(rounding) - 1e-4 + 1e-5
        assert check.differences["embedding"] < 1e-5
        assert sample(server, "tower_canary_passed", world.a) == 1
        assert sample(server, "tower_canary_as_of_seconds", world.a) == AS_OF_US / 1e6
        for part in ("state", "embedding"):
            assert sample(server, "tower_canary_difference", world.a, part=part) == check.differences[part]
            assert sample(server, "tower_canary_failures_total", world.a, part=part) is None
        assert "tower_embeddings_total{" not in _scrape(server), "a canary is no request"


def _scrape(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as response:
        text: str = response.read().decode()
    return text


def test_a_state_that_moved_fails(world: World, canary_rows: Rows, redis_server: str) -> None:
    replace_row(canary_rows, world, lambda state: replace(state, state_D=state.state_D + np.float32(0.01)), 2)
    with looking(world, redis_server) as (server, look):
        check = look()
        assert check.verdict == "failed"
        assert check.differences["state"] == pytest.approx(0.01, abs=1e-4)
        assert ("state", "user -4611686018427387902 differs by 0.01 (0.0001 allowed)") in check.failures
        assert sample(server, "tower_canary_passed", world.a) == 0
        assert sample(server, "tower_canary_failures_total", world.a, part="state") == 1


@pytest.mark.parametrize("by", [1e-5, 2e-4])
def test_the_tolerance_is_the_release_s(world: World, canary_rows: Rows, redis_server: str, by: float) -> None:
    replace_row(canary_rows, world, lambda state: replace(state, state_D=state.state_D + np.float32(by)))
    with looking(world, redis_server) as (_, look):
        assert look().verdict == ("passed" if by < 1e-4 else "failed")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: replace(state, state_version="0" * 16), "version_mismatch"),
        (lambda state: replace(state, state_D=state.state_D[:-1]), "wrong_length"),
        (lambda state: replace(state, state_D=state.state_D * np.float32(np.nan)), "non_finite"),
        (lambda state: replace(state, encoded_at_us=NOW_US + 24 * HOUR_US), "from_future"),
    ],
)
def test_a_row_the_guard_refuses_fails_by_name(
    world: World, canary_rows: Rows, redis_server: str, change: Any, reason: str
) -> None:
    replace_row(canary_rows, world, change)
    with looking(world, redis_server) as (_, look):
        check = look()
        assert check.verdict == "failed"
        assert check.failures == (("row", f"user -4611686018427387904: {reason}"),)


@pytest.mark.parametrize("codec", ["float16", "int8"], indirect=True)
def test_a_stored_state_two_steps_off_fails(world: World, canary_rows: Rows, redis_server: str) -> None:
    """One step is what rounding may do; two are an encoder, or a codec, that differs."""
    release = world.oracle.releases[world.a.release_id]
    canary = canaries(release)[1]
    assert release.codec is not None
    step = 2 * release.codec.rounding(canary.state_D[None])[0]
    version, until_us = world.a.state_version, canary.history_until_us
    moved_D = canary.state_D.copy()
    moved_D[np.abs(moved_D).argmin()] += 2 * step
    canary_rows.put(canary.user_id, canary_rows.bytes_of(UserState(moved_D, version, until_us, AS_OF_US)))
    with looking(world, redis_server) as (_, look):
        check = look()
        assert check.verdict == "failed"
        assert check.failures[0][0] == "state"


def test_a_head_that_moved_fails(world: World, canary_rows: Rows, redis_server: str) -> None:
    """States are right, and what the head of this process makes of them is not."""

    class Shifted(ServingHead):
        def embed(self, *args: Any) -> Any:
            return super().embed(*args)[:, ::-1]

        def _check(self, release: Release) -> None:
            pass

    settings = Settings(
        registry=str(world.registry), redis_url=redis_server, port=0, metrics_port=0, canary_s=0.0, notice_s=0.0
    )
    server = Server(settings, make_head=Shifted)
    try:
        server.start()
        server.canaries.check()
        assert server.canaries.verdict_of(world.a.release_id) == "failed"
        assert sample(server, "tower_canary_failures_total", world.a, part="embedding") == 4
        assert sample(server, "tower_canary_failures_total", world.a, part="state") is None
    finally:
        server.stop()


def test_missing_rows_are_unknown(world: World, canary_rows: Rows, redis_server: str) -> None:
    canary_rows.redis.delete(layout.redis_key(canaries(world.oracle.releases[world.a.release_id])[3].user_id))
    with looking(world, redis_server) as (server, look):
        assert look().verdict == "unknown", "one is missing, three are right"
        canary_rows.drop_canaries()
        check = look()
        assert (check.verdict, dict(check.differences), check.as_of_us) == ("unknown", {}, None)
        for name in ("tower_canary_passed", "tower_canary_as_of_seconds"):
            assert sample(server, name, world.a) is None


def test_redis_away_is_unknown(world: World) -> None:
    Registry(world.registry).commit(world.a.release_id)
    with looking(world, "redis://127.0.0.1:1") as (_, look):
        assert look() == Check("unknown")


def test_each_release_has_its_own_verdict(world: World, canary_rows: Rows, redis_server: str) -> None:
    """b serves and its canaries were never published; a before it and h, which reads a's states, pass."""
    Registry(world.registry).commit(world.b.release_id)
    Registry(world.registry).prepare(world.h.release_id)
    with looking(world, redis_server) as (server, look):
        look()
        verdicts = [server.canaries.verdict_of(m.release_id) for m in (world.a, world.b, world.h)]
        assert verdicts == ["passed", "unknown", "passed"]


def test_the_background_tells_changes_once_and_the_lease_carries_them(
    world: World, canary_rows: Rows, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(world.registry)
    caplog.set_level(logging.INFO, "online.canary")

    def verdict() -> str:
        (lease,) = read_leases(registry)
        return lease.releases[0].canary

    with serving(world.registry, redis_server, canary_s=0.02) as (server, client):
        wait_until(lambda: verdict() == "passed")
        replace_row(canary_rows, world, lambda state: replace(state, state_D=-state.state_D))
        wait_until(lambda: verdict() == "failed")
        count = lambda: sample(server, "tower_canary_failures_total", world.a, part="state") or 0.0  # noqa: E731
        before = count()
        wait_until(lambda: count() > before + 2)
        assert client.embed(1).release_id == world.a.release_id, "serving goes on"
        canary_rows.drop_canaries()
        wait_until(lambda: verdict() == "unknown")
        canary_rows.put_canaries(world.oracle.releases[world.a.release_id], AS_OF_US)
        wait_until(lambda: verdict() == "passed")
    told = [record.levelname for record in caplog.records if record.name == "online.canary"]
    assert told == ["INFO", "ERROR", "WARNING", "INFO"]


def test_the_guard_that_requests_meet_is_the_one_that_canaries_meet(
    world: World, canary_rows: Rows, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def watched(values: Any, view: Any, limits: Any) -> Any:
        asked.append(view.state_version)
        return read_row(values, view, limits)

    monkeypatch.setattr("online.guard.read_row", watched)
    with looking(world, redis_server) as (server, _):
        server.canaries.check()
    assert asked == [world.a.state_version] * 8, "four rows for the state, four for the embedding"
