"""The daily job on logs of a handful of rows: what it writes, worked out by hand; replays; days; faults of the data."""

import itertools
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from numpy.typing import NDArray

from feature_repo import layout
from model import release as release_module
from model.canary import canaries
from model.errors import ConfigError, DataError, TowerError
from model.release import Manifest, Registry
from pipelines.encode_users import describe_inputs, main, releases_to_encode, run_job
from pipelines.options import parse_settings
from pipelines.runs import MANIFEST, RunStore
from tests.pipelines.conftest import TINY
from tests.pipelines.job import SECOND_US, Job, row, run_id, write_rows
from tests.releases import make_release

T = 1_600_000_000


def items(job: Job, run: str | None = None) -> dict[Any, list[Any]]:
    tails = job.read("tails", run)
    return dict(zip(tails["user_id"].to_pylist(), tails["item_id"].to_pylist(), strict=True))


def reasons(job: Job) -> list[tuple[Any, ...]]:
    dead = job.read("dead_letters").to_pylist()
    return sorted((d["reason"], d["source_row"], d["user_id"]) for d in dead)


def refused(job: Job, *arguments: Any) -> str:
    """The message of a job that must not run."""
    with pytest.raises(TowerError) as caught:
        run_job(parse_settings(job.arguments(*arguments), {}))
    return str(caught.value)


def test_one_run_by_hand(job: Job, tmp_path: Path, int_release: tuple[Path, Manifest]) -> None:
    log = write_rows(
        tmp_path / "log" / "a.parquet",
        [
            row(1, 10, T),
            row(1, 11, T + 5, "view", surface="search"),
            row(2, 10, T + 1),
            row(1, 12, T + 3),
            row(1, 12, T + 3),  # 4: a copy of row 3
            row(3, 10, T + 9, "like"),  # 5: no declared type
            row(None, 10, T + 1),  # 6
            row(2, None, T + 1),  # 7
            row(2, 13, T + 11),  # 8: after the as-of time
            row(1, 14, T + 6),
            row(1, 15, T + 7),
        ],
    )
    manifest = job.run(log.parent, T + 10)
    assert items(job) == {1: [12, 11, 14, 15], 2: [10]}  # the release keeps 4 events
    tail = job.read("tails").to_pylist()[0]
    assert tail["timestamp_us"] == [(T + s) * SECOND_US for s in (3, 5, 6, 7)]
    assert tail["event_type"] == ["click", "view", "click", "click"]
    assert tail["surface"] == ["feed", "search", "feed", "feed"]
    assert reasons(job) == [
        ("duplicate", 4, "1"),
        ("future_timestamp", 8, "2"),
        ("null_item", 7, "2"),
        ("null_user", 6, None),
        ("undeclared_event_type", 5, "3"),
    ]
    states = job.read("states")
    assert states.schema.field("state").type == pa.list_(pa.float32())
    assert states.schema.field("event_timestamp").type == pa.timestamp("us", "UTC")
    assert states["user_id"].to_pylist() == [1, 2]
    assert states["history_until"].to_pylist() == [(T + 7) * SECOND_US, (T + 1) * SECOND_US]
    assert states["encoded_at"].to_pylist() == [(T + 10) * SECOND_US] * 2
    assert states["event_timestamp"].cast(pa.int64()).to_pylist() == [(T + 10) * SECOND_US] * 2
    assert set(states["state_version"].to_pylist()) == {job.state_version}
    assert dict(manifest.counts) == {
        "events": 7, "users": 2, "encoded": 2, "skipped": 0, "dead.duplicate": 1, "dead.future_timestamp": 1,
        "dead.null_item": 1, "dead.null_user": 1, "dead.undeclared_event_type": 1,
    }  # fmt: skip
    assert (manifest.run_id, manifest.shards, manifest.previous_run) == (run_id(T + 10), 3, None)
    assert manifest.encoded_through_us == manifest.as_of_us == (T + 10) * SECOND_US
    assert job.parquet_hashes() == {f"{manifest.run_id}/{name}": digest for name, digest in manifest.files.items()}
    registry, made = int_release
    release = Registry(registry).load(made.release_id)
    history = pa.table(
        {
            "item_id": [12, 11, 14, 15, 10],
            "event_type": ["click", "view", "click", "click", "click"],
            "timestamp_us": [(T + s) * SECOND_US for s in (3, 5, 6, 7, 1)],
            "surface": ["feed", "search", "feed", "feed", "feed"],
        }
    )
    wanted = release.encode(history, np.array([0, 4, 5]))
    np.testing.assert_allclose(np.array(states["state"].to_pylist()), wanted, atol=1e-5)
    assert not (job.states / job.state_version / "staging").exists() or not any(
        (job.states / job.state_version / "staging").iterdir()
    )


def three_days(folder: Path) -> list[Path]:
    """Three files; idle users, late events, a copy across days, ties."""
    days = [
        [row(u, 10 + (u + i) % 9, T + 10 * i + u) for u in range(1, 9) for i in range(u)],
        [row(1, 20, T + 100), row(2, 21, T + 101), row(2, 22, T + 101), row(9, 23, T + 102), row(3, 24, T + 15)],
        [row(1, 25, T + 200), row(2, 21, T + 101), row(4, 26, T + 34), row(10, 27, T + 205)],
    ]
    return [write_rows(folder / f"day{n}.parquet", rows) for n, rows in enumerate(days)]


@pytest.mark.parametrize("feed", ["whole log", "new files"])
def test_incremental_days_equal_one_rebuild(job: Job, tmp_path: Path, feed: str) -> None:
    days = three_days(tmp_path / "days")
    as_of = [T + 99, T + 199, T + 299]
    log = tmp_path / "log"
    log.mkdir()
    encoded = []
    for day, moment in zip(days, as_of, strict=True):
        if feed == "new files":
            shutil.rmtree(log)
            log.mkdir()
        shutil.copy(day, log)
        encoded.append(job.run(log, moment).counts["encoded"])
    assert encoded == [8, 4, 3]  # day 1: users 1, 2, 9 and 3 (late); day 2: 1, 4 (late) and 10, not 2 (a copy)
    rebuilt = job.elsewhere("rebuilt")
    full = rebuilt.run(tmp_path / "days", as_of[-1])
    assert full.counts["encoded"] == 10
    tails = {name: h for name, h in job.parquet_hashes().items() if name.startswith(f"{run_id(as_of[-1])}/tails")}
    assert tails == {name: h for name, h in rebuilt.parquet_hashes().items() if "tails" in name}
    assert items(job)[2] == [12, 13, 21, 22]
    assert items(job)[3] == [13, 14, 24, 15]  # the late event lies between two others
    one, other = job.latest_states(), rebuilt.latest_states()
    assert one.keys() == other.keys()
    for user in one:
        np.testing.assert_allclose(one[user], other[user], atol=1e-5)


def test_the_whole_log_again_encodes_nobody(job: Job, tmp_path: Path) -> None:
    three_days(tmp_path / "days")
    job.run(tmp_path / "days", T + 300)
    again = job.run(tmp_path / "days", T + 400)
    assert (again.counts["encoded"], again.counts["skipped"], again.previous_run) == (0, 10, run_id(T + 300))
    assert again.encoded_through_us == (T + 400) * SECOND_US
    assert job.read("states").num_rows == 0


def test_replay_is_byte_identical_and_repeating_changes_nothing(job: Job, tmp_path: Path) -> None:
    three_days(tmp_path / "days")
    job.run(tmp_path / "days")
    other = job.elsewhere("other")
    manifest = other.run(tmp_path / "days")
    assert manifest.run_id == run_id(T + 205)  # the log's last event
    assert job.hashes() == other.hashes()
    assert len(job.hashes()) == 3 * 3 + 2  # three files a shard, the canaries, the manifest
    files = {path: path.stat().st_mtime_ns for path in job.states.rglob("*") if path.is_file()}
    job.run(tmp_path / "days")
    assert files == {path: path.stat().st_mtime_ns for path in job.states.rglob("*") if path.is_file()}


def test_an_empty_day_commits(job: Job, tmp_path: Path) -> None:
    log = write_rows(tmp_path / "log" / "a.parquet", [])
    assert "no event with a timestamp" in refused(job, log)
    first = job.run(log, T)
    assert (first.counts["users"], len(first.files)) == (0, 10)
    job.run(write_rows(tmp_path / "b.parquet", [row(1, 10, T + 1)]), T + 10)
    idle = job.run(log, T + 20)
    assert dict(idle.counts) == {"events": 0, "users": 1, "encoded": 0, "skipped": 1}
    assert items(job) == {1: [10]}


def test_string_ids(string_job: Job, tmp_path: Path) -> None:
    log = write_rows(
        tmp_path / "a.parquet",
        [row("zoë", "i10", T), row("", "i11", T + 1), row("a" * 300, "i12", T + 2), row("zoë", "new", T + 3)],
        ids=pa.string(),
    )
    manifest = string_job.run(log)
    assert items(string_job) == {"": ["i11"], "a" * 300: ["i12"], "zoë": ["i10", "new"]}
    assert string_job.read("states")["user_id"].to_pylist() == ["", "a" * 300, "zoë"]
    assert manifest.counts["encoded"] == 3
    later = string_job.run(write_rows(tmp_path / "b.parquet", [row("zoë", "i11", T + 9)], ids=pa.string()))
    assert items(string_job)["zoë"] == ["i10", "new", "i11"]
    assert later.counts["skipped"] == 2


def test_a_poison_user_is_set_aside_alone(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = release_module.Release.encode

    def poisoned(self: Any, table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        if 666 in table["item_id"].to_pylist():
            raise ValueError("item 666")
        states = encode(self, table, offsets)
        states[[777 in table["item_id"].to_pylist()[a:b] for a, b in itertools.pairwise(offsets)]] = np.nan
        return states

    log = [row(u, 10, T + u) for u in range(20)]
    job.run(write_rows(tmp_path / "a.parquet", log), T + 100)
    clean = job.latest_states()
    monkeypatch.setattr(release_module.Release, "encode", poisoned)
    day = [row(5, 666, T + 101), row(6, 777, T + 101), row(7, 11, T + 102)]
    manifest = job.run(write_rows(tmp_path / "b.parquet", day), T + 200)
    assert (manifest.counts["encoded"], manifest.counts["dead.poison"]) == (1, 1)
    assert reasons(job) == [("non_finite_state", None, "6"), ("poison", None, "5")]
    assert {d["detail"] for d in job.read("dead_letters").to_pylist()} == {
        "ValueError: item 666",
        "the state holds NaN or infinity",
    }
    assert items(job)[5] == [10, 666]
    assert job.read("states")["user_id"].to_pylist() == [7]
    assert {user: state for user, state in job.latest_states().items() if user != 7} == {
        user: state for user, state in clean.items() if user != 7
    }


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_states_by_a_codec(tmp_path: Path, redis_server: str, codec: str) -> None:
    """The run's Parquet holds the bytes that stand in Redis, canaries too; the same day twice gives the same files."""
    manifest = make_release(tmp_path / "registry", config=replace(TINY, storage_codec=codec, state_tokens=2))
    job = Job(tmp_path, tmp_path / "registry", manifest.state_version)
    log = write_rows(tmp_path / "a.parquet", [row(u, 10 + u % 5, T + u) for u in range(7)])
    job.run(log, T + 10, redis=redis_server)
    states = job.read("states")
    assert states.schema.field("state").type == pa.binary()
    release = Registry(job.registry).load(manifest.release_id)
    assert release.codec is not None
    history = pa.table(
        {
            "item_id": [10 + u % 5 for u in range(7)], "event_type": ["click"] * 7,
            "timestamp_us": [(T + u) * SECOND_US for u in range(7)], "surface": ["feed"] * 7,
        }
    )  # fmt: skip
    encoded = release.encode(history, np.arange(8))
    found = np.array([release.codec.decode(blob) for blob in states["state"].to_pylist()])
    assert found.shape == (7, 16)
    assert (np.abs(found - encoded).max(1) <= release.codec.rounding(encoded) * 1.01 + 1e-5).all()
    view = layout.view_name(manifest.state_version)
    with redis.Redis.from_url(redis_server, socket_timeout=5) as client:
        for user, blob in zip(states["user_id"].to_pylist(), states["state"].to_pylist(), strict=True):
            assert client.hget(layout.redis_key(user), layout.field_name(view, "state")).endswith(blob)
        for canary in canaries(release):
            values = client.hmget(layout.redis_key(canary.user_id), layout.row_fields(view))
            stored = layout.decode_row(values, release.codec)
            assert stored is not None
            assert canary.state_difference(stored.state) <= canary.state_tolerance
    again = job.elsewhere("again")
    again.run(log, T + 10)
    assert again.parquet_hashes() == job.parquet_hashes()


def test_a_state_that_overflows_its_codec_is_a_dead_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_release(tmp_path / "registry", config=replace(TINY, storage_codec="float16"))
    job = Job(tmp_path, tmp_path / "registry", manifest.state_version)
    encode = release_module.Release.encode

    def large(self: Any, table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        states = encode(self, table, offsets)
        states[np.array([13 in items for items in np.split(table["item_id"].to_numpy(), offsets[1:-1])])] *= 1e6
        return states

    monkeypatch.setattr(release_module.Release, "encode", large)
    log = write_rows(tmp_path / "a.parquet", [row(u, 10 + u, T + u) for u in range(5)])
    counts = job.run(log).counts
    assert (counts["encoded"], counts["dead.non_finite_state"]) == (4, 1)
    (dead,) = job.read("dead_letters").to_pylist()
    assert (dead["user_id"], dead["detail"]) == ("3", "the state holds NaN or infinity once stored as float16")


def test_a_broken_encoder_fails_the_run_instead_of_blaming_the_users(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = write_rows(tmp_path / "a.parquet", [row(u, 10, T + u) for u in range(20)])
    verify = release_module.Release.verify
    healthy = iter([True])

    def broken(self: Any, table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        raise RuntimeError("device lost")

    def verify_once(self: Any) -> Any:
        return verify(self) if next(healthy, False) else release_module.GoldenReport(0.1, {"states": float("nan")})

    def load_then_break(self: Any) -> Any:
        report = verify_once(self)
        monkeypatch.setattr(release_module.Release, "encode", broken)
        return report

    monkeypatch.setattr(release_module.Release, "verify", load_then_break)
    with caplog.at_level(logging.CRITICAL):
        assert "stopped working" in refused(job, log)
    assert job.store.run_ids() == []


def test_runs_that_may_not_be(job: Job, tmp_path: Path) -> None:
    log = write_rows(tmp_path / "log" / "a.parquet", [row(1, 10, T)])
    job.run(log, T + 100)
    assert "before the last run" in refused(job, log, T + 50)
    other = write_rows(tmp_path / "other.parquet", [row(1, 11, T)])
    assert "other events" in refused(job, other, T + 100)
    message = refused(job, log, T + 200, "--shards", "5")
    assert "--shards 5" in message
    assert "3 shards" in message
    assert "--full needs a later" in refused(job, log, T + 100, "--full")
    assert "in the future" in refused(job, log, 4_000_000_000)
    assert "no release 'nope'" in refused(job, log, T + 200, "--release", "nope")
    assert job.store.run_ids() == [run_id(T + 100)]
    rebuilt = job.run(log, T + 200, "--shards", "5", "--full")
    assert (rebuilt.shards, rebuilt.previous_run, rebuilt.counts["encoded"]) == (5, None, 1)
    assert job.run(log, T + 300).shards == 5


def test_an_earlier_run_may_be_replayed(job: Job, tmp_path: Path) -> None:
    log = write_rows(tmp_path / "a.parquet", [row(1, 10, T)])
    job.run(log, T + 100)
    job.run(write_rows(tmp_path / "b.parquet", [row(1, 11, T + 150)]), T + 200)
    before = job.hashes()
    assert main(job.arguments(log, T + 100)) == 0
    assert job.hashes() == before


def test_inputs_are_known_by_name_and_content(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_rows(tmp_path / folder / "a.parquet", [row(1, 10, T)])
    one, two = describe_inputs(str(tmp_path / "one")), describe_inputs(f"{tmp_path}/two/")
    assert one == two
    assert [file["name"] for file in one["files"]] == ["a.parquet"]
    assert describe_inputs(str(tmp_path / "one" / "a.parquet")) == one
    write_rows(tmp_path / "two" / "a.parquet", [row(1, 11, T)])
    assert describe_inputs(str(tmp_path / "two"))["fingerprint"] != one["fingerprint"]


def test_a_torn_manifest_is_no_run(job: Job, tmp_path: Path) -> None:
    folder = job.states / job.state_version / "runs" / run_id(T)
    folder.mkdir(parents=True)
    assert job.store.run_ids() == []
    (folder / MANIFEST).write_text('{"format": "hybrid-tower-run/1", "run_')
    with pytest.raises(DataError, match="no run manifest"):
        job.store.manifest(run_id(T))


def test_all_is_one_run_for_each_state_version_that_may_serve(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(ConfigError, match="no release"):
        releases_to_encode(registry, "all")
    first, second = (make_release(tmp_path / "registry", seed=seed, config=TINY) for seed in (1, 2))
    assert {m.release_id for m in releases_to_encode(registry, "all")} == {registry.releases()[-1]}
    with pytest.raises(ConfigError, match="no release serves"):
        releases_to_encode(registry, "serving")
    registry.commit(first.release_id)
    registry.commit(second.release_id)
    assert [m.release_id for m in releases_to_encode(registry, "all")] == [second.release_id, first.release_id]
    assert [m.release_id for m in releases_to_encode(registry, "serving")] == [second.release_id]
    log = write_rows(tmp_path / "a.parquet", [row(1, 10, T)])
    done = run_job(
        parse_settings(
            ["--events", str(log), "--registry", registry.uri, "--states", f"{tmp_path}/states", "--no-redis"], {}
        )
    )
    assert [m.state_version for m in done] == [second.state_version, first.state_version]
    states = [RunStore(f"{tmp_path}/states", m.state_version).run_ids() for m in done]
    assert states == [[run_id(T)]] * 2


def test_states_in_an_object_store(int_release: tuple[Path, Manifest], tmp_path: Path) -> None:
    registry, made = int_release
    log = write_rows(tmp_path / "a.parquet", [row(1, 10, T)])
    uri = f"memory://{tmp_path.name}"
    flags = ["--events", str(log), "--registry", str(registry), "--states", uri, "--no-redis", "--shards", "2"]
    assert main(flags) == 0
    store = RunStore(uri, made.state_version)
    assert store.run_ids() == [run_id(T)]
    assert store.manifest(run_id(T)).counts["encoded"] == 1
    assert (store.folder / "staging").names() == []
