"""Leases: written, read, run out, removed."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.leases import CLOCK_SKEW_US, Lease, Leased, drop_lease, live_leases, read_leases, write_lease
from model.release import Registry

LEASED = Leased(
    release_id="r1", role="serving", state_version="5" * 16, embedding_version="e" * 16, has_items=True, canary="passed"
)
LEASE = Lease(
    server_id="host-1-ab", address="127.0.0.1:50051", epoch=3, releases=(LEASED,), written_at_us=100, expires_at_us=400
)


def test_a_lease_reads_back_as_it_was_written(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert read_leases(registry) == []
    other = replace(LEASE, server_id="host-2-cd", releases=(LEASED, replace(LEASED, release_id="r2", role="previous")))
    write_lease(registry, other)
    write_lease(registry, LEASE)
    assert read_leases(registry) == [LEASE, other], "by server id"


def test_a_renewal_replaces_the_lease_and_leaves_nothing_else(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for expires_at_us in (400, 500):
        write_lease(registry, replace(LEASE, expires_at_us=expires_at_us))
    assert [lease.expires_at_us for lease in read_leases(registry)] == [500]
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["host-1-ab.json"]


def test_a_dropped_lease_is_gone_and_may_be_dropped_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    write_lease(registry, LEASE)
    for _ in range(2):
        drop_lease(registry, LEASE.server_id)
        assert read_leases(registry) == []


@pytest.mark.parametrize(
    ("now_us", "tolerance_us", "live"),
    [(399, 0, True), (400, 0, False), (400, 1, True), (400 + CLOCK_SKEW_US, CLOCK_SKEW_US, False)],
)
def test_a_lease_runs_out(tmp_path: Path, now_us: int, tolerance_us: int, live: bool) -> None:
    registry = Registry(tmp_path)
    write_lease(registry, LEASE)
    assert live_leases(registry, now_us, tolerance_us=tolerance_us) == ([LEASE] if live else [])


def test_a_lease_that_goes_while_they_are_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    write_lease(registry, LEASE)
    names = registry.names("leases")
    drop_lease(registry, LEASE.server_id)
    monkeypatch.setattr(registry, "names", lambda folder: names)
    assert read_leases(registry) == []
