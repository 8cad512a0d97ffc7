"""Collecting: exactly what nobody reaches goes, whoever kills it or writes beside it."""

import json
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.redis_server import start_redis
from feature_repo import layout
from model import item_index
from model.errors import StoreUnavailable
from model.leases import CLOCK_SKEW_US, Lease, Leased, write_lease
from model.release import Manifest, Registry
from pipelines import collect as collect_module
from pipelines import faults
from pipelines.collect import PROGRESS, Collector, Report, collect
from pipelines.faults import Fault
from pipelines.io import Folder
from pipelines.runs import RunStore
from pipelines.transforms.publish import Pace, connect, publish_table
from tests.pipelines.conftest import TINY
from tests.pipelines.test_publish import AS_OF_S, make_table
from tests.releases import make_release

NOW_US = 1_800_000_000_000_000
SECOND_US = 1_000_000
USERS = range(120)
Rows = dict[bytes, dict[bytes, bytes]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Manifest]]:
    """Four releases, each of its own versions."""
    registry = tmp_path_factory.mktemp("built")
    return registry, [make_release(registry, config=TINY, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of this module's own: its whole content is compared."""
    with start_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running.url


@dataclass(frozen=True)
class World:
    """Releases `old`, `other`, `previous`, `serving`; every user has a row of each version."""

    registry: Registry
    states: str
    client: redis.Redis
    old: Manifest
    other: Manifest
    previous: Manifest
    serving: Manifest

    def collect(self, **options: Any) -> Report:
        options = {"scan_keys": 10, "now_us": lambda: NOW_US} | options
        return collect(self.registry, self.client, self.states, **options)

    def content(self) -> Rows:
        """Every hash of the Redis."""
        client: Any = self.client
        return {key: client.hgetall(key) for key in client.scan_iter()}

    def lease(self, manifest: Manifest, expires_at_us: int) -> None:
        leased = Leased(
            release_id=manifest.release_id,
            role="serving",
            state_version=manifest.state_version,
            embedding_version=manifest.embedding_version,
            has_items=True,
            canary="passed",
        )
        write_lease(
            self.registry,
            Lease(
                server_id="host-7",
                address="host-7:50051",
                epoch=1,
                releases=(leased,),
                written_at_us=expires_at_us - 30 * SECOND_US,
                expires_at_us=expires_at_us,
            ),
        )


@pytest.fixture
def world(tmp_path: Path, built: tuple[Path, list[Manifest]], server: str) -> Iterator[World]:
    folder, manifests = built
    registry = Registry(tmp_path / "registry")
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "releases").symlink_to(folder / "releases")
    states = Folder(str(tmp_path / "states"))
    old, other, previous, serving = manifests
    registry.commit(previous.release_id)
    registry.commit(serving.release_id)
    token = registry.next_token()
    with connect(server) as client:
        client.flushall()
        for manifest in manifests:
            publish_table(client, make_table(manifest.state_version, USERS), manifest.state_version, token)
            (states / manifest.state_version).write("published/20171014T030000Z.json", b"{}")
            for name in ("items.parquet", "manifest.json"):
                registry.put(f"{item_index.FOLDER}/{manifest.embedding_version}/{name}", b"{}")
        yield World(registry, states.uri, client, old, other, previous, serving)


def without(content: Rows, *versions: str) -> Rows:
    """The content less all fields of the versions; a hash without fields is none."""
    gone = set()
    for version in versions:
        view = layout.view_name(version)
        gone |= {*layout.row_fields(view), layout.fence_field(view)}
    left = {key: {name: value for name, value in row.items() if name not in gone} for key, row in content.items()}
    return {key: row for key, row in left.items() if row}


def test_exactly_the_unreachable_rows_go(world: World) -> None:
    before = world.content()
    report = world.collect()
    old, other = world.old, world.other
    assert world.content() == without(before, old.state_version, other.state_version)
    assert report.rows == {old.state_version: 120, other.state_version: 120}
    assert report.keys_scanned == 120
    assert report.became_reachable == ()
    assert report.kept == {
        world.serving.state_version: (f"serving {world.serving.release_id}",),
        world.previous.state_version: (f"previous {world.previous.release_id}",),
    }
    assert report.kept_items == {
        world.serving.embedding_version: (f"serving {world.serving.release_id}",),
        world.previous.embedding_version: (f"previous {world.previous.release_id}",),
    }
    kept = (world.serving, world.previous)
    assert set(Folder(world.states).names()) == {manifest.state_version for manifest in kept}
    assert set(world.registry.names("items")) == {manifest.embedding_version for manifest in kept}
    assert len(report.folders) == 4
    assert len(world.registry.releases()) == 4
    assert world.registry.get(PROGRESS) is None


def test_again_there_is_nothing_to_do(world: World) -> None:
    world.collect()
    before = world.content()
    report = world.collect()
    assert set(report.rows.values()) == {0}
    assert report.folders == ()
    assert world.content() == before


def test_a_dry_run_counts_the_same_and_removes_nothing(world: World) -> None:
    before = world.content()
    foretold = world.collect(dry_run=True)
    assert world.content() == before
    assert RunStore(world.states, world.old.state_version).published()
    assert world.registry.get(PROGRESS) is None
    done = world.collect()
    assert (foretold.rows, foretold.folders, foretold.kept) == (done.rows, done.folders, done.kept)


def test_folders_may_be_kept_but_not_the_note_that_rows_were_sent(world: World) -> None:
    report = world.collect(keep_folders=True)
    assert report.rows[world.old.state_version] == 120
    assert report.folders == ()
    assert world.registry.names("items") == sorted(
        manifest.embedding_version for manifest in (world.old, world.other, world.previous, world.serving)
    )
    assert RunStore(world.states, world.old.state_version).published() == set()
    assert RunStore(world.states, world.serving.state_version).published() == {"20171014T030000Z"}


@pytest.mark.parametrize(
    ("ago_us", "kept"),
    [(-1, True), (0, True), (CLOCK_SKEW_US - 1, True), (CLOCK_SKEW_US, False)],  # clocks may be 300 s apart
)
def test_what_a_live_lease_names_stays(world: World, ago_us: int, kept: bool) -> None:
    world.lease(world.old, NOW_US - ago_us)
    before = world.content()
    report = world.collect()
    gone = [world.other.state_version] if kept else [world.old.state_version, world.other.state_version]
    assert sorted(report.rows) == sorted(gone)
    assert world.content() == without(before, *gone)
    assert (world.old.embedding_version in world.registry.names("items")) is kept
    assert report.kept.get(world.old.state_version) == (("leased by host-7",) if kept else None)


def test_a_prepared_release_stays(world: World) -> None:
    world.registry.prepare(world.old.release_id)
    report = world.collect()
    assert list(report.rows) == [world.other.state_version]
    assert report.kept[world.old.state_version] == (f"prepared {world.old.release_id}",)


def test_a_hash_that_loses_its_last_field_disappears(world: World) -> None:
    publish_table(world.client, make_table(world.old.state_version, [5000]), world.old.state_version, 1)
    assert world.client.exists(layout.redis_key(5000))
    world.collect()
    assert not world.client.exists(layout.redis_key(5000))


def test_half_a_row_and_a_row_of_stock_feast_go_too(world: World) -> None:
    client: Any = world.client
    view = layout.view_name(world.old.state_version)
    state, *_, timestamp = layout.row_fields(view)
    client.hdel(layout.redis_key(1), *(set(client.hkeys(layout.redis_key(1))) - {state}))
    client.hset(layout.redis_key(2), timestamp, layout.encode_timestamp(AS_OF_S + 5))  # the fence is of another row
    client.hset(layout.redis_key(2), layout.fence_field(view), layout.encode_fence(AS_OF_S, 10**9))
    before = world.content()
    report = world.collect()
    assert report.rows[world.old.state_version] == 120
    assert world.content() == without(before, world.old.state_version, world.other.state_version)


def test_what_is_not_a_user_of_the_project_is_not_touched(world: World) -> None:
    client: Any = world.client
    client.set("about hybrid_tower", "text")
    client.hset("notes of hybrid_tower", layout.row_fields(layout.view_name(world.old.state_version))[0], "x")
    (Folder(world.states) / "notes").write("a.txt", b"kept")
    world.collect()
    assert client.get("about hybrid_tower") == b"text"
    assert client.hlen("notes of hybrid_tower") == 1
    assert "notes" in Folder(world.states).names()


def test_rows_written_under_a_later_token_survive(world: World) -> None:
    """Between the look at the pointer and the deletion somebody prepares the version and writes some rows."""
    registry, client, version = world.registry, world.client, world.old.state_version
    collector = Collector(registry, client, world.states, scan_keys=10, now_us=lambda: NOW_US)
    collector.step()
    scan = client.scan

    def prepare_meanwhile(*args: Any, **options: Any) -> Any:
        client.scan = scan
        registry.prepare(world.old.release_id)
        publish_table(client, make_table(version, USERS[:60], as_of_s=AS_OF_S), version, registry.next_token())
        return scan(*args, **options)

    client.scan = prepare_meanwhile
    while collector.step():
        pass
    report = collector.finish()
    assert report.became_reachable == (version,)
    assert report.kept[version] == (f"prepared {world.old.release_id}",)
    assert RunStore(world.states, version).published() == set()
    timestamp = layout.timestamp_field(layout.view_name(version))
    assert all(client.hexists(layout.redis_key(user), timestamp) for user in USERS[:60])
    assert version in Folder(world.states).names()
    other = layout.timestamp_field(layout.view_name(world.other.state_version))
    assert not any(client.hexists(layout.redis_key(user), other) for user in USERS)


def test_what_a_late_job_notes_as_sent_is_forgotten(world: World) -> None:
    version = world.old.state_version
    collector = Collector(
        world.registry, world.client, world.states, scan_keys=10, keep_folders=True, now_us=lambda: NOW_US
    )
    collector.step()
    RunStore(world.states, version).mark_published("20171015T030000Z", {"written": 3})
    while collector.step():
        pass
    collector.finish()
    assert RunStore(world.states, version).published() == set()


def test_the_pointer_is_looked_at_again_before_every_step(world: World) -> None:
    collector = Collector(world.registry, world.client, world.states, scan_keys=10, now_us=lambda: NOW_US)
    assert collector.versions == sorted([world.old.state_version, world.other.state_version])
    collector.step()
    before = world.content()
    world.registry.prepare(world.old.release_id)
    while collector.step():
        pass
    collector.finish()
    assert world.content() == without(before, world.other.state_version)


def test_the_pointer_is_looked_at_again_before_folders_go(world: World) -> None:
    collector = Collector(world.registry, world.client, world.states, now_us=lambda: NOW_US)
    while collector.step():
        pass
    world.registry.prepare(world.old.release_id)
    report = collector.finish()
    assert report.became_reachable == (world.old.state_version,)
    assert world.old.state_version in Folder(world.states).names()
    assert world.old.embedding_version in world.registry.names("items")
    assert world.other.state_version not in Folder(world.states).names()


def collect_and_die(registry: str, url: str, states: str, point: str) -> None:
    """The child process."""
    with connect(url) as client:
        collect(Registry(registry), client, states, scan_keys=10, now_us=lambda: NOW_US, fault=Fault(point))


@pytest.mark.parametrize("point", [faults.BEFORE_COLLECT_NOTE.format(1), faults.AFTER_COLLECT_STEP.format(3)])
def test_a_killed_collector_is_carried_on(world: World, server: str, point: str) -> None:
    whole = without(world.content(), world.old.state_version, world.other.state_version)
    child = multiprocessing.get_context("spawn").Process(
        target=collect_and_die, args=(world.registry.uri, server, world.states, point)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert world.content() != whole
    noted = world.registry.get(PROGRESS)
    if point == faults.AFTER_COLLECT_STEP.format(3):
        assert noted is not None
        done = json.loads(noted)
        assert done["keys_scanned"] >= 30
        again = Collector(world.registry, world.client, world.states, scan_keys=10, now_us=lambda: NOW_US)
        assert (again._cursor, again._keys_scanned) == (done["cursor"], done["keys_scanned"])
    else:
        assert noted is None
    report = world.collect()
    assert world.content() == whole
    if noted is not None:
        assert report.rows == {world.old.state_version: 120, world.other.state_version: 120}
        assert report.keys_scanned == 120
    assert world.registry.get(PROGRESS) is None


def test_a_note_of_another_redis_or_another_epoch_is_no_use(world: World) -> None:
    Collector(world.registry, world.client, world.states, scan_keys=10, now_us=lambda: NOW_US).step()
    noted = world.registry.get(PROGRESS)
    assert noted is not None
    for change in ({"redis_run_id": "0" * 40}, {"epoch": 1}, {"versions": [world.old.state_version]}):
        world.registry.put(PROGRESS, json.dumps(json.loads(noted) | change).encode())
        collector = Collector(world.registry, world.client, world.states, now_us=lambda: NOW_US)
        assert (collector._cursor, collector._keys_scanned) == (0, 0)


def test_a_restarted_redis_has_forgotten_the_script(world: World) -> None:
    client: Any = world.client
    client.script_flush()
    assert world.collect().rows[world.old.state_version] == 120


def test_a_collector_keeps_its_pace(world: World) -> None:
    waited = []

    class Counting(Pace):
        def wait_for(self, rows: int) -> None:
            waited.append(rows)

    world.collect(pace=Counting(1))
    assert sum(waited) == 120


def test_without_redis_nothing_is_removed(world: World) -> None:
    with (
        connect("redis://127.0.0.1:1", retries=0) as away,
        pytest.raises(StoreUnavailable, match="did not say who it is"),
    ):
        collect(world.registry, away, world.states)
    assert len(Folder(world.states).names()) == 4


def test_redis_goes_away_in_the_middle_and_comes_back(tmp_path: Path, world: World) -> None:
    with start_redis(tmp_path / "redis", persist=True) as server, connect(server.url, retries=0) as client:
        version = world.old.state_version
        publish_table(client, make_table(version, USERS), version, 1)
        collector = Collector(world.registry, client, world.states, scan_keys=10, now_us=lambda: NOW_US)
        collector.step()
        server.stop()
        with pytest.raises(StoreUnavailable):
            collector.step()
        server.start()
        collect(world.registry, client, world.states, now_us=lambda: NOW_US)
        assert client.dbsize() == 0


def test_a_script_call_stays_small(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "ROWS_PER_CALL", 3)  # two versions: one key a call
    before = world.content()
    world.collect()
    assert world.content() == without(before, world.old.state_version, world.other.state_version)
