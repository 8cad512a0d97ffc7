"""The server's lease: never behind what is in use, given back at the end, and never in the way of serving."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from model.leases import Lease, read_leases, write_lease
from model.release import Pointer, Registry, Release
from online import leases as holding
from online.leases import LeaseHolder, new_server_id
from online.residents import ResidentSet
from online.server import Server
from tests.online.conftest import World
from tests.online.helpers import NOW_US, fresh_users, residents_of, serving, wait_until
from tests.online.test_registry import set_pointer


def names(lease: Lease) -> dict[str, str]:
    return {leased.release_id: leased.role for leased in lease.releases}


class Holding:
    """A holder, and the set that it is told to be in use."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.registry = Registry(folder)
        self.current: ResidentSet | None = None
        self.verdicts: dict[str, str] = {}
        self.holder = LeaseHolder(
            self.registry,
            server_id="me",
            address="127.0.0.1:1",
            current=lambda: self.current,
            verdict_of=lambda release_id: self.verdicts.get(release_id, "unknown"),
            now_us=lambda: NOW_US,
            **({"lease_s": 30.0} | options),
        )

    def lease(self) -> Lease:
        (lease,) = read_leases(self.registry)
        return lease


def test_old_and_new_are_named_until_the_next_renewal(built_world: World, tmp_path: Path) -> None:
    a, b, h = (built_world.oracle.releases[m.release_id] for m in (built_world.a, built_world.b, built_world.h))
    names_of: dict[Release, str] = {r: r.manifest.release_id for r in (a, b, h)}
    held = Holding(tmp_path)
    held.holder.renew()
    assert read_leases(held.registry) == [], "nothing is loaded, nothing to hold"
    first, second, third = (
        residents_of(1, serving=a), residents_of(2, serving=b, previous=a), residents_of(3, serving=h, previous=b)
    )  # fmt: skip
    held.holder.widen(first)
    assert (held.lease().epoch, names(held.lease())) == (1, {names_of[a]: "serving"})
    held.current = first
    held.holder.widen(second)
    assert (held.lease().epoch, names(held.lease())) == (2, {names_of[a]: "previous", names_of[b]: "serving"})
    held.holder.renew()
    assert names(held.lease()) == {names_of[a]: "previous", names_of[b]: "serving"}, "not swapped in yet: both"
    held.current = second
    held.holder.widen(third)
    held.current = third
    three = {names_of[a]: "previous", names_of[b]: "previous", names_of[h]: "serving"}
    assert names(held.lease()) == three
    held.holder.rewrite()
    assert names(held.lease()) == three, "a verdict is no renewal"
    held.holder.renew()
    assert names(held.lease()) == {names_of[b]: "previous", names_of[h]: "serving"}


def test_what_a_lease_says(built_world: World, tmp_path: Path) -> None:
    held = Holding(tmp_path)
    held.verdicts[built_world.a.release_id] = "failed"
    held.holder.widen(residents_of(4, serving=built_world.oracle.releases[built_world.a.release_id]))
    lease = held.lease()
    assert (lease.server_id, lease.address, lease.epoch) == ("me", "127.0.0.1:1", 4)
    assert (lease.written_at_us, lease.expires_at_us) == (NOW_US, NOW_US + 30_000_000)
    (leased,) = lease.releases
    assert leased.state_version == built_world.a.state_version
    assert leased.embedding_version == built_world.a.embedding_version
    assert (leased.has_items, leased.canary) == (False, "failed")


def test_no_lease_is_written_after_the_end(built_world: World, tmp_path: Path) -> None:
    held = Holding(tmp_path)
    release = built_world.oracle.releases[built_world.a.release_id]
    held.current = residents_of(4, serving=release)
    held.holder.widen(held.current)
    held.holder.stop()
    for late in (held.holder.renew, held.holder.rewrite, lambda: held.holder.widen(residents_of(5, serving=release))):
        late()
        assert read_leases(held.registry) == []


def test_every_process_has_an_id_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "../strange host")
    assert new_server_id() != new_server_id()
    assert new_server_id().startswith("---strange-host-")


# On a server


def test_the_union_is_written_before_the_swap(world: World, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lease as it is written, with the epoch in use at that moment."""
    written: list[tuple[int, dict[str, str]]] = []
    servers: list[Server] = []

    def write(registry: Registry, lease: Lease) -> None:
        write_lease(registry, lease)
        current = servers[0].follower.current if servers else None
        written.append((0 if current is None else current.epoch, names(lease)))

    monkeypatch.setattr(holding, "write_lease", write)
    registry = Registry(world.registry)
    registry.commit(world.a.release_id)
    a, b, h = (m.release_id for m in (world.a, world.b, world.h))
    with serving(world.registry, redis_server, canary_s=0.0) as (server, client):
        servers.append(server)
        set_pointer(world.registry, Pointer(2, serving=b))
        wait_until(lambda: server.follower.pointer.epoch == 2)
        set_pointer(world.registry, Pointer(3, serving=h))
        wait_until(lambda: server.follower.pointer.epoch == 3)
        assert client.embed(fresh_users()).release_id == h
        assert written == [
            (0, {a: "serving"}),
            (1, {a: "serving", b: "serving"}),
            (2, {a: "serving", b: "serving", h: "serving"}),
        ]
        assert names(read_leases(registry)[0]) == written[-1][1], "nothing is left out before a renewal"
    assert read_leases(registry) == []


def test_a_renewal_leaves_out_what_is_not_in_use(world: World, redis_server: str) -> None:
    world.write_items(world.b)
    registry = Registry(world.registry)
    registry.commit(world.a.release_id)
    with serving(world.registry, redis_server, lease_s=0.6) as (server, _):
        (first,) = read_leases(registry)
        assert first.address == f"127.0.0.1:{server.port}"
        set_pointer(world.registry, Pointer(2, serving=world.b.release_id))
        wait_until(lambda: [names(lease) for lease in read_leases(registry)] == [{world.b.release_id: "serving"}])
        (second,) = read_leases(registry)
        assert second.releases[0].has_items
        wait_until(lambda: read_leases(registry)[0].written_at_us > second.written_at_us)
        (third,) = read_leases(registry)
        assert third.expires_at_us - third.written_at_us == 600_000
        assert first.server_id == third.server_id
    assert read_leases(registry) == []


def test_drain_gives_the_lease_back_at_its_end(world: World, redis_server: str) -> None:
    registry = Registry(world.registry)
    registry.commit(world.a.release_id)
    with serving(world.registry, redis_server, notice_s=0.5) as (server, client):
        draining = threading.Thread(target=server.drain)
        draining.start()
        assert client.embed(fresh_users()).epoch == 1
        assert len(read_leases(registry)) == 1, "it may still answer"
        draining.join(20)
        assert read_leases(registry) == []


def test_a_registry_that_cannot_be_written_is_told_and_serving_goes_on(
    world: World, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folder of leases should be: no lease can be written, whoever the process runs as."""
    registry = Registry(world.registry)
    registry.commit(world.a.release_id)
    (world.registry / "leases").write_text("in the way")
    caplog.set_level(logging.INFO, "online.leases")

    def failures(server: Any) -> float:
        return float(server.metrics.registry.get_sample_value("tower_lease_failures_total"))

    with serving(world.registry, redis_server, lease_s=0.15) as (server, client):
        wait_until(lambda: failures(server) > 3)
        assert client.embed(fresh_users()).release_id == world.a.release_id
        registry.commit(world.b.release_id)
        wait_until(lambda: client.embed(fresh_users()).release_id == world.b.release_id)
        assert server.metrics.registry.get_sample_value("tower_lease_expires_seconds") == 0
        (world.registry / "leases").unlink()
        wait_until(lambda: len(read_leases(registry)) == 1)
        wait_until(lambda: server.metrics.registry.get_sample_value("tower_lease_expires_seconds") > 1e9)
    told = [record.levelname for record in caplog.records if record.name == "online.leases"]
    assert told == ["ERROR", "INFO"], "once when it begins, once when it ends"
