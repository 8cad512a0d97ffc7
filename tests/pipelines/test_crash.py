"""The job is killed at every step and run again: files and Redis equal those of a run that nobody disturbed."""

import multiprocessing
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis

from deploy.redis_server import start_redis
from feature_repo import layout
from model.canary import canary_ids
from pipelines import faults
from pipelines.faults import CRASH_VARIABLE, crash_points
from pipelines.runs import MANIFEST
from tests.pipelines.job import SHARDS, Job, row, run_id, write_rows

T = 1_600_000_000
YESTERDAY, TODAY = T + 100, T + 200
VISIBLE = {faults.AFTER_RENAME, faults.MID_PUBLISH, faults.AFTER_PUBLISH}

Rows = dict[bytes, dict[bytes, bytes]]


def run_and_die(arguments: Sequence[str], point: str) -> None:
    """The child process: the command as a shell would start it, with the fault in its environment."""
    import os

    from pipelines.encode_users import main

    os.environ[CRASH_VARIABLE] = point
    raise SystemExit(main(arguments))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of this module's own: its whole content is compared."""
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


def content(url: str, state_version: str) -> Rows:
    """Every user's key with all fields but the fence: it holds the token of the job that wrote, another in a re-run."""
    fence = layout.fence_field(layout.view_name(state_version))
    with redis.Redis.from_url(url) as client:
        reserved = {layout.redis_key(user_id) for user_id in canary_ids("int64")}
        found = {key: client.hgetall(key) for key in client.scan_iter() if key not in reserved}
        client.flushall()
    assert all(row.pop(fence) for row in found.values())
    return found


def test_a_killed_job_run_again_equals_an_undisturbed_one(job: Job, tmp_path: Path, redis_url: str) -> None:
    first = write_rows(tmp_path / "yesterday.parquet", [row(u, 10 + u % 7, T + u) for u in range(12)])
    log = write_rows(tmp_path / "today.parquet", [row(u, 11, T + 150 + u) for u in range(0, 16, 2)])
    undisturbed = job.elsewhere("undisturbed")
    undisturbed.run(first, YESTERDAY, redis=redis_url)
    shutil.copytree(undisturbed.states, job.states)
    undisturbed.run(log, TODAY, redis=redis_url)
    wanted, wanted_rows = undisturbed.hashes(), content(redis_url, job.state_version)
    assert len(wanted_rows) == 14

    processes = multiprocessing.get_context("forkserver")
    preload = ["pipelines.encode_users", "pipelines.transforms.publish", "torch._dynamo"]  # seconds each, once
    processes.set_forkserver_preload(preload)
    for point in crash_points(SHARDS):
        crashed = job.elsewhere(point)
        shutil.copytree(job.states, crashed.states)
        crashed.store.forget_published()  # Redis is empty again: yesterday's rows are owed, too
        arguments = crashed.arguments(log, TODAY, redis=redis_url)
        process = processes.Process(target=run_and_die, args=(arguments, point))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, point
        runs = crashed.states / job.state_version / "runs"
        there = {run_id(YESTERDAY)} | ({run_id(TODAY)} if point in VISIBLE else set())
        assert {path.name for path in runs.iterdir()} == there, point
        assert all((path / MANIFEST).exists() for path in runs.iterdir()), point
        crashed.run(log, TODAY, redis=redis_url)
        assert crashed.hashes() == wanted, point
        assert content(redis_url, job.state_version) == wanted_rows, point
        left = crashed.states / job.state_version / "staging"
        assert not left.exists() or not any(left.iterdir()), point
        assert crashed.store.published() == {run_id(YESTERDAY), run_id(TODAY)}, point


def test_every_point_is_reached_once_in_this_order() -> None:
    assert crash_points(2) == [
        "after-read", "after-stage-shard-0", "after-stage-shard-1", "before-manifest", "after-manifest",
        "after-rename", "mid-publish", "after-publish",
    ]  # fmt: skip


def test_a_run_never_sent_is_sent_by_the_next(job: Job, tmp_path: Path, redis_url: str) -> None:
    job.run(write_rows(tmp_path / "a.parquet", [row(1, 10, T), row(2, 10, T)]), YESTERDAY)
    job.run(write_rows(tmp_path / "b.parquet", [row(2, 11, T + 101)]), TODAY, redis=redis_url)
    found = content(redis_url, job.state_version)
    view = layout.view_name(job.state_version)
    rows = [layout.decode_row([row.get(field) for field in layout.row_fields(view)]) for row in found.values()]
    assert sorted(r.encoded_at_us for r in rows if r) == [YESTERDAY * 1_000_000, TODAY * 1_000_000]
    assert job.store.publish_counts(run_id(TODAY)) == {"written": 1, "stale": 0, "rejected": 0}


def test_republish_fills_an_emptied_redis(job: Job, tmp_path: Path, redis_url: str) -> None:
    log = write_rows(tmp_path / "a.parquet", [row(1, 10, T), row(2, 10, T)])
    job.run(log, YESTERDAY, redis=redis_url)
    before = content(redis_url, job.state_version)  # and empties it
    job.run(log, TODAY, redis=redis_url)
    assert content(redis_url, job.state_version) == {}
    job.run(log, TODAY, "--republish", redis=redis_url)
    assert content(redis_url, job.state_version) == before


def test_redis_away_leaves_a_committed_run(
    job: Job, tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.encode_users import main

    log = write_rows(tmp_path / "a.parquet", [row(1, 10, T)])
    assert main(job.arguments(log, TODAY, redis="redis://127.0.0.1:1/0")) == 1
    assert "committed but not fully published" in capsys.readouterr().err
    assert job.store.run_ids() == [run_id(TODAY)]
    job.run(log, TODAY, redis=redis_url)
    assert len(content(redis_url, job.state_version)) == 1


def test_a_killed_job_carries_on_from_its_finished_shards(job: Job, tmp_path: Path, redis_url: str) -> None:
    """The second job encodes only what the first had not finished: a finished shard's files are not written again."""
    log = write_rows(tmp_path / "a.parquet", [row(u, 10 + u % 7, T + u) for u in range(12)])
    child = multiprocessing.get_context("spawn").Process(
        target=run_and_die, args=(job.arguments(log, TODAY), faults.AFTER_STAGE_SHARD.format(1))
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (staged,) = (job.states / job.state_version / "staging").rglob("states/shard-00001.parquet")
    finished = staged.stat()
    job.run(log, TODAY)
    taken = (job.states / job.state_version / "runs" / run_id(TODAY) / "states" / "shard-00001.parquet").stat()
    assert (taken.st_ino, taken.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)


def test_a_torn_shard_in_staging_is_encoded_again(job: Job, tmp_path: Path) -> None:
    log = write_rows(tmp_path / "a.parquet", [row(u, 10 + u % 7, T + u) for u in range(12)])
    undisturbed = job.elsewhere("undisturbed")
    undisturbed.run(log, TODAY)
    child = multiprocessing.get_context("spawn").Process(
        target=run_and_die, args=(job.arguments(log, TODAY), faults.BEFORE_MANIFEST)
    )
    child.start()
    child.join(60)
    (staged,) = (job.states / job.state_version / "staging").rglob("states/shard-00001.parquet")
    staged.write_bytes(staged.read_bytes()[:-5])
    job.run(log, TODAY)
    assert job.hashes() == undisturbed.hashes()


def test_a_killed_publish_carries_on_from_its_finished_shards(job: Job, tmp_path: Path, redis_url: str) -> None:
    log = write_rows(tmp_path / "a.parquet", [row(u, 10 + u % 7, T + u) for u in range(12)])
    child = multiprocessing.get_context("spawn").Process(
        target=run_and_die, args=(job.arguments(log, TODAY, redis=redis_url), faults.MID_PUBLISH)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    shards, counts = job.store.publish_progress(run_id(TODAY))
    assert shards == 1
    assert counts["written"] > 0
    job.run(log, TODAY, redis=redis_url)
    assert job.store.publish_counts(run_id(TODAY)) == {"written": 12, "stale": 0, "rejected": 0}
    assert len(content(redis_url, job.state_version)) == 12
    assert job.store.publish_progress(run_id(TODAY)) == (0, {})
