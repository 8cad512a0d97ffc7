"""tower-release: what it shows, what it makes ready, and what it refuses."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from feature_repo import layout
from model.canary import canary_ids
from model.config import TowerConfig
from model.errors import PointerConflict, ReleaseNotReady
from model.item_index import has_snapshot, read_snapshot, write_snapshot
from model.leases import Lease, Leased, write_lease
from model.release import Manifest, Registry
from model.skew import study_name
from pipelines import release as cli
from pipelines.encode_users import main as encode
from pipelines.readiness import Demands, span
from pipelines.release import commit, main, make_parser, status, table
from pipelines.runs import RunStore
from tests.pipelines.conftest import TINY
from tests.pipelines.job import row, write_rows
from tests.releases import make_release

T = 1_600_000_000
DAY = 86_400
DAY_1, DAY_2, DAY_3 = "2020-09-15T00:00:00Z", "2020-09-16T00:00:00Z", "2020-09-17T00:00:00Z"


class Towers:
    """Two releases of different state versions, and runs of each."""

    def __init__(self, root: Path, config: TowerConfig = TINY) -> None:
        self.root = root
        self.registry = Registry(root / "registry")
        self.states = str(root / "states")
        self.old = make_release(root / "registry", seed=1, config=config)
        self.new = make_release(root / "registry", seed=2, config=config)
        self.log = self.write("all", range(100))
        self.redis_url: str | None = None

    def write(self, name: str, users: range) -> Path:
        return write_rows(self.root / f"{name}.parquet", [row(u, 10, T + u) for u in users])

    @property
    def redis_flags(self) -> list[str]:
        return ["--no-redis"] if self.redis_url is None else ["--redis-url", self.redis_url]

    def encode(self, release: str, as_of: str, log: Path | None = None, *flags_too: str) -> None:
        flags = ["--registry", self.registry.uri, "--states", self.states, *self.redis_flags]
        more = ["--release", release, "--as-of", as_of, *flags_too]
        assert encode(["--events", str(log or self.log), *flags, *more]) == 0

    def prepare(self, release: Manifest, log: Path | None = None, *more: str) -> int:
        where = ["--registry", self.registry.uri, "--states", self.states, *self.redis_flags, "--no-feast"]
        first = [] if RunStore(self.states, release.state_version).run_ids() else ["--shards", "2"]
        return main(["prepare", release.release_id, "--events", str(log or self.log), *where, *first, *more])

    def move(self, *words: str) -> int:
        where = ["--registry", self.registry.uri, "--states", self.states, *self.redis_flags]
        return main([*words, *where])

    def demands(self, **more: float) -> Demands:
        return Demands(states_uri=self.states, redis_url=self.redis_url, **more)  # type: ignore[arg-type]

    def serve(self, release: Manifest) -> None:
        assert self.prepare(release, None, "--as-of", DAY_1) == 0
        assert self.move("commit", release.release_id) == 0

    def lease(self, *held: Leased, server: str = "server-1", expires_in_s: float = 60) -> None:
        now_us = time.time_ns() // 1000
        expires_us = now_us + int(expires_in_s * 1e6)
        write_lease(
            self.registry,
            Lease(server_id=server, address="127.0.0.1:1", epoch=1, releases=held, written_at_us=now_us,
                  expires_at_us=expires_us),
        )  # fmt: skip


def leased(release: Manifest, *, items: bool = True, canary: str = "passed") -> Leased:
    return Leased(
        release_id=release.release_id, role="prepared", state_version=release.state_version,
        embedding_version=release.embedding_version, has_items=items, canary=canary,
    )  # fmt: skip


@pytest.fixture
def towers(tmp_path: Path) -> Towers:
    return Towers(tmp_path)


@pytest.fixture
def stored(tmp_path: Path, redis_server: str) -> Towers:
    """Towers whose rows go to a real Redis; the state versions are those of `towers`, so rows of it are cleared."""
    towers = Towers(tmp_path)
    towers.redis_url = redis_server
    with redis.Redis.from_url(redis_server) as client:
        for user in [*range(200), *canary_ids("int64")]:
            client.delete(layout.redis_key(user))
    return towers


Errors = pytest.CaptureFixture[str]


def test_prepare_makes_ready_and_commit_flips(towers: Towers, capsys: Errors) -> None:
    assert towers.prepare(towers.old, None, "--as-of", DAY_1) == 0
    out = capsys.readouterr().out
    assert f"{towers.old.release_id} is ready to commit" in out
    assert towers.registry.pointer().prepared == towers.old.release_id
    assert has_snapshot(towers.registry, towers.old.embedding_version)
    assert towers.move("commit", towers.old.release_id) == 0
    pointer = towers.registry.pointer()
    assert (pointer.epoch, pointer.serving, pointer.prepared, pointer.previous) == (
        2,
        towers.old.release_id,
        None,
        None,
    )
    assert towers.prepare(towers.new) == 0  # as of the serving release's run, without being told
    runs = [RunStore(towers.states, m.state_version).run_ids() for m in (towers.old, towers.new)]
    assert runs == [["20200915T000000Z"]] * 2
    assert towers.move("commit", towers.new.release_id) == 0
    assert towers.registry.pointer().previous == towers.old.release_id
    assert towers.move("rollback") == 0
    assert towers.registry.pointer().serving == towers.old.release_id
    history = towers.registry.history()
    assert [change.action for change in history] == ["prepare", "commit", "prepare", "commit", "rollback"]
    assert [change.pointer.epoch for change in history] == [1, 2, 3, 4, 5]
    capsys.readouterr()
    assert towers.prepare(towers.old) == 1
    assert "serves already" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_from_float32_to_a_codec_and_back(tmp_path: Path, redis_server: str, capsys: Errors, codec: str) -> None:
    """The rows of both lie beside each other in Redis; the checks read each by its own codec, canaries included."""
    towers = Towers(tmp_path)
    towers.redis_url = redis_server
    towers.new = make_release(tmp_path / "registry", seed=1, config=replace(TINY, storage_codec=codec))
    with redis.Redis.from_url(redis_server) as client:
        for user in [*range(200), *canary_ids("int64")]:
            client.delete(layout.redis_key(user))
        towers.serve(towers.old)
        assert towers.prepare(towers.new) == 0, capsys.readouterr().err
        assert towers.move("commit", towers.new.release_id) == 0, capsys.readouterr().err
        field = layout.field_name(layout.view_name(towers.new.state_version), "state")
        key = layout.redis_key(canary_ids("int64")[2])
        stored = client.hget(key, field)
        assert towers.move("rollback") == 0
        client.hset(key, field, stored[:-1] + bytes([stored[-1] ^ 0x40]))  # the last number moved by far
        assert towers.move("commit", towers.new.release_id, "--force") == 1
        assert "canary -4611686018427387902 is off by" in capsys.readouterr().err


def test_a_release_that_was_not_prepared_may_not_serve(towers: Towers, capsys: Errors) -> None:
    assert towers.move("commit", towers.new.release_id) == 1
    error = capsys.readouterr().err
    assert f"run tower-release prepare {towers.new.release_id} first" in error
    assert f"no committed run of state version {towers.new.state_version}" in error
    assert "has no item snapshot" in error
    assert towers.registry.pointer().epoch == 0
    assert towers.move("commit", towers.new.release_id, "--force") == 0
    assert towers.registry.pointer().serving == towers.new.release_id


def test_prepare_carries_on_where_it_was_stopped(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new, towers.root / "missing.parquet") == 1
    assert towers.registry.pointer().prepared == towers.new.release_id
    assert towers.prepare(towers.new) == 0
    assert towers.prepare(towers.new) == 0
    assert "run 20200915T000000Z is there already" in capsys.readouterr().out
    assert main(["abandon", "--registry", towers.registry.uri]) == 0
    assert towers.registry.pointer().prepared is None


def test_a_release_with_older_states_may_not_serve(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    towers.encode(towers.old.release_id, "2020-09-16T04:00:00Z")
    assert towers.move("commit", towers.new.release_id) == 1
    assert "20200915T000000Z, is 1 d 4 h older than 20200916T040000Z" in capsys.readouterr().err
    assert towers.move("commit", towers.new.release_id, "--max-lag-s", str(28 * 3600)) == 0


def test_a_release_with_deferred_users_is_as_old_as_they_are(towers: Towers, capsys: Errors) -> None:
    """Both have a run of day 2, but under the new release half the users are current through day 1 only."""
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    again = write_rows(towers.root / "again.parquet", [row(u, 11, T + DAY // 2 + u) for u in range(100)])
    towers.encode(towers.old.release_id, DAY_2, again)
    towers.encode(towers.new.release_id, DAY_2, again, "--refresh-budget", "50%")
    assert towers.move("commit", towers.new.release_id) == 1
    refused = capsys.readouterr().err
    assert "20200916T000000Z, is 1 d older than 20200916T000000Z" in refused
    assert "50 users are deferred, current through 2020-09-15T00:00:00Z only" in refused
    towers.encode(towers.new.release_id, DAY_3)
    assert towers.move("commit", towers.new.release_id) == 0


def test_the_daily_job_keeps_both_ways_open(towers: Towers) -> None:
    """From prepare on, a plain tower-encode encodes for all that may serve, so neither way meets old rows."""
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    towers.encode("all", DAY_2)
    assert towers.move("commit", towers.new.release_id) == 0
    for day in (DAY_3, "2020-09-18T00:00:00Z"):
        towers.encode("all", day, towers.write(day[:10], range(50, 150)))
    assert towers.move("rollback") == 0  # two days after the commit
    versions = [towers.old.state_version, towers.new.state_version]
    newest = [RunStore(towers.states, version) for version in versions]
    assert [store.run_ids()[-1] for store in newest] == ["20200918T000000Z"] * 2
    assert [store.manifest(store.run_ids()[-1]).counts["users"] for store in newest] == [150, 150]


def test_97_percent_are_not_99(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new, towers.write("part", range(97))) == 0
    assert "not ready to commit yet" in capsys.readouterr().out
    assert towers.move("commit", towers.new.release_id, "--min-coverage", "0.99") == 1
    assert "97 of 100 (97.00%) users of the serving release" in capsys.readouterr().err
    assert towers.registry.pointer().serving == towers.old.release_id
    assert towers.move("commit", towers.new.release_id, "--min-coverage", "0.97") == 0


def test_coverage_counts_whom_not_how_many(towers: Towers) -> None:
    """As many users as the serving release has, but others."""
    towers.serve(towers.old)
    assert towers.prepare(towers.new, towers.write("others", range(50, 150))) == 0
    with pytest.raises(ReleaseNotReady, match=r"50 of 100 \(50.00%\)"):
        commit(towers.registry, towers.new.release_id, towers.demands())


def test_rows_that_never_came_to_redis_are_missed(stored: Towers, capsys: Errors) -> None:
    stored.serve(stored.old)
    assert stored.prepare(stored.new) == 0
    assert stored.redis_url is not None
    view = layout.view_name(stored.new.state_version)
    with redis.Redis.from_url(stored.redis_url) as client:
        for user in range(3):
            client.hdel(layout.redis_key(user), *layout.row_fields(view))
    assert stored.move("commit", stored.new.release_id) == 1
    assert "redis: 97 of 100 (97.00%) users looked up have a row in Redis" in capsys.readouterr().err
    assert stored.move("commit", stored.new.release_id, "--min-coverage", "0.97") == 0


def test_a_canary_that_is_off_is_never_passed_over(stored: Towers, capsys: Errors) -> None:
    stored.serve(stored.old)
    assert stored.prepare(stored.new) == 0
    assert stored.redis_url is not None
    field = layout.row_fields(layout.view_name(stored.new.state_version))[0]
    with redis.Redis.from_url(stored.redis_url) as client:
        key = layout.redis_key(canary_ids("int64")[1])
        whole = client.hget(key, field)
        client.hset(key, field, layout.encode_state(np.full(TINY.d_model, 0.5, np.float32)))
        assert stored.move("commit", stored.new.release_id, "--force") == 1
        assert f"canary {canary_ids('int64')[1]} is off by" in capsys.readouterr().err
        client.hset(key, field, whole)
    assert stored.move("commit", stored.new.release_id) == 0
    assert "4 reserved users as expected" in capsys.readouterr().out


def test_a_run_not_sent_to_the_end_is_told_by_its_canaries(stored: Towers, capsys: Errors) -> None:
    stored.serve(stored.old)
    assert stored.prepare(stored.new) == 0
    url, stored.redis_url = stored.redis_url, None
    stored.encode("all", DAY_2)  # to Parquet alone
    stored.redis_url = url
    assert stored.move("commit", stored.new.release_id) == 1
    assert "its rows are of 2020-09-15T00:00:00Z: run 20200916T000000Z is not sent" in capsys.readouterr().err


def test_a_release_without_its_items_may_not_serve(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    path = Path(towers.registry.uri) / "items" / towers.new.embedding_version / "items.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    assert towers.move("commit", towers.new.release_id) == 1
    assert "items: the item snapshot of embedding version" in capsys.readouterr().err
    path.unlink()
    assert towers.move("commit", towers.new.release_id) == 1
    assert "has no item snapshot" in capsys.readouterr().err
    write_snapshot(towers.registry, towers.registry.load(towers.old.release_id))
    assert len(read_snapshot(towers.registry, towers.old.embedding_version).item_ids) == 50


def test_every_live_server_must_have_it(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    towers.lease(leased(towers.old), server="behind")
    towers.lease(leased(towers.old), server="gone", expires_in_s=-1)
    assert towers.move("commit", towers.new.release_id) == 1
    assert "servers: 0 of 1 live servers are ready; behind (epoch 1) has not loaded it" in capsys.readouterr().err
    towers.lease(leased(towers.new, items=False), server="behind")
    assert towers.move("commit", towers.new.release_id) == 1
    assert "behind has not loaded its items" in capsys.readouterr().err
    towers.lease(leased(towers.new, canary="failed"), server="behind")
    assert towers.move("commit", towers.new.release_id) == 1
    assert "behind reports a failed canary" in capsys.readouterr().err
    towers.lease(leased(towers.new), server="behind")
    assert towers.move("commit", towers.new.release_id, "--min-servers", "2") == 1
    assert "wanted at least 2" in capsys.readouterr().err
    assert towers.move("commit", towers.new.release_id, "--min-servers", "1") == 0


def test_two_operators_lose_no_update(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another operator moves the pointer between this one's checks and its flip."""
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    examine = cli.examine

    def slow_examine(*args: object) -> object:
        found = examine(*args)  # type: ignore[arg-type]
        towers.registry.abandon()
        return found

    monkeypatch.setattr(cli, "examine", slow_examine)
    with pytest.raises(PointerConflict, match="somebody moved it"):
        commit(towers.registry, towers.new.release_id, towers.demands())
    assert [change.action for change in towers.registry.history()][-1] == "abandon"
    assert towers.registry.pointer().serving == towers.old.release_id


def test_a_mover_killed_before_its_put_has_moved_nothing(towers: Towers) -> None:
    towers.serve(towers.old)
    pointer = {"epoch": 3, "serving": towers.new.release_id, "prepared": None, "previous": None}
    note = {"pointer": pointer, "action": "commit", "at_us": 1, "by": "x@y"}
    towers.registry.put("epochs/0000000003.json", json.dumps(note).encode())
    assert [change.pointer.epoch for change in towers.registry.history()] == [1, 2]
    assert towers.registry.prepare(towers.new.release_id).epoch == 3
    assert towers.registry.history()[-1].action == "prepare"


def test_a_damaged_release_never_serves(towers: Towers, capsys: Errors) -> None:
    assert main(["verify", towers.new.release_id, "--registry", towers.registry.uri]) == 0
    assert "is sound: golden outputs differ by at most states" in capsys.readouterr().out
    weights = Path(towers.registry.uri) / "releases" / towers.new.release_id / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["verify", towers.new.release_id, "--registry", towers.registry.uri]) == 1
    assert towers.prepare(towers.new) == 1
    assert towers.move("commit", towers.new.release_id, "--force") == 1
    assert "encoder.safetensors" in capsys.readouterr().err
    assert towers.registry.pointer().epoch == 0
    assert main(["verify", "nothing", "--registry", towers.registry.uri]) == 1


def test_prepare_registers_the_view_with_feast(stored: Towers, capsys: Errors) -> None:
    where = ["--registry", stored.registry.uri, "--states", stored.states, *stored.redis_flags]
    assert main(["prepare", stored.old.release_id, "--events", str(stored.log), *where, "--shards", "1"]) == 0
    assert "registered with Feast" in capsys.readouterr().out
    assert (Path(stored.states) / "feast_registry.db").exists()


def test_list_and_status_show_what_there_is(towers: Towers, capsys: Errors, tmp_path: Path) -> None:
    assert main(["list", "--registry", str(tmp_path / "empty")]) == 0
    assert "no release" in capsys.readouterr().out
    text = status(towers.registry, towers.states, 0)
    assert "no run in" in text
    assert "no live server" in text
    assert "never moved" in text
    towers.serve(towers.old)
    assert towers.prepare(towers.new, towers.write("part", range(40))) == 0
    towers.lease(leased(towers.old))
    RunStore(towers.states, towers.old.state_version).mark_published("20200915T000000Z", {"written": 100})
    text = status(towers.registry, towers.states, (1_600_128_000 + DAY + 3600) * 1_000_000)
    lines = {line.split()[0]: line.split() for line in reversed(text.splitlines()) if line}
    assert lines["pointer"][1:5] == ["epoch", "3,", "serving", f"{towers.old.release_id},"]
    assert lines[towers.old.release_id][1] == "serving"
    old, new = lines[towers.old.state_version], lines[towers.new.state_version]
    assert old[1:] == ["20200915T000000Z", "2020-09-15T00:00:00Z", "1", "d", "1", "h", "100", "100", "100.00%", "yes"]
    assert new[-4:] == ["40", "40", "40.00%", "no"]
    assert lines["server-1"][1:] == ["127.0.0.1:1", "1", "prepared", towers.old.release_id, "yes", "passed"]
    assert lines["3"][1] == "prepare"


def test_commit_warns_of_a_more_skew_sensitive_family(towers: Towers, capsys: Errors) -> None:
    towers.serve(towers.old)
    assert towers.prepare(towers.new) == 0
    capsys.readouterr()
    for release, value in ((towers.old, 0.1), (towers.new, 0.4)):
        figures = {
            "value": value,
            "low": value - 0.01,
            "high": value + 0.01,
            "by_part": {"encoder": value, "head": 0.0},
        }
        study = {"dataset": "test", "family": "run", "k": 20, "sensitivity": figures, "releases": []}
        towers.registry.write_study(study_name(release.release_id), study)
    assert towers.move("commit", towers.new.release_id) == 0
    assert "warning: mixing parts of neighbouring releases costs 40.0% of Recall@20" in capsys.readouterr().out
    assert towers.move("rollback") == 0
    assert "warning" not in capsys.readouterr().out


def test_gc_ends_the_window_and_collects_what_is_left(stored: Towers, capsys: Errors) -> None:
    stored.serve(stored.old)
    assert stored.prepare(stored.new) == 0
    assert stored.move("commit", stored.new.release_id) == 0
    assert stored.move("gc") == 0
    out = capsys.readouterr().out
    assert f"{stored.old.release_id} stays ready for a rollback for another 6 d 23 h" in out
    assert stored.registry.pointer().previous == stored.old.release_id
    assert stored.move("gc", "--window-days", "0", "--dry-run") == 0
    assert stored.registry.pointer().previous == stored.old.release_id
    stored.lease(leased(stored.old), server="slow")
    assert stored.move("gc", "--window-days", "0") == 0
    out = capsys.readouterr().out
    assert stored.registry.pointer().previous is None
    assert f"state version {stored.old.state_version} kept: leased by slow" in out
    stored.registry.remove("leases/slow.json")
    assert stored.move("gc") == 0
    assert f"104 rows of state version {stored.old.state_version} removed" in capsys.readouterr().out  # 4 canaries
    assert stored.redis_url is not None
    with redis.Redis.from_url(stored.redis_url) as client:
        for manifest, wanted in ((stored.old, False), (stored.new, True)):
            fields = layout.row_fields(layout.view_name(manifest.state_version))
            values = [client.hmget(layout.redis_key(user), fields) for user in range(100)]
            assert {any(value is not None for value in row) for row in values} == {wanted}
    assert not RunStore(stored.states, stored.old.state_version).run_ids()
    assert stored.move("rollback") == 1


def test_redis_must_be_named_or_declined(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "REDIS_URL", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["rollback", "--registry", towers.registry.uri, "--states", towers.states])


def test_text() -> None:
    assert [span(s * 1_000_000) for s in (-5, 0, 59, 60, 3661, DAY, DAY * 2 + 3600)] == [
        "0 s", "0 s", "59 s", "1 min", "1 h 1 min", "1 d", "2 d 1 h",
    ]  # fmt: skip
    assert table(["a", "bb"], [["ccc", "d"]]) == "a    bb\nccc  d"
    assert "exit status" in make_parser().format_help()
