"""A budgeted run: who is encoded, who is deferred, and that nothing of the deferred is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo import layout
from model.errors import ConfigError
from model.refresh import KNOWN_FROM, NEW_FROM
from model.release import Manifest, Registry
from pipelines.encode_users import main
from pipelines.options import parse_settings
from pipelines.runs import iso
from pipelines.transforms.publish import connect
from tests.pipelines.job import SECOND_US, Job, row, run_id, write_rows

T = 1_600_000_000
DAY = 86_400
USERS = tuple(range(1, 13))


def first_day(folder: Path) -> Path:
    """Twelve users with one event each."""
    return write_rows(folder / "day0.parquet", [row(u, 10 + u, T + u) for u in USERS])


def second_day(folder: Path) -> Path:
    """User u has u % 4 new events, all a day later; users 20 and 21 are new."""
    rows = [row(u, 30 + i, T + DAY + 10 * u + i) for u in (*USERS, 20, 21) for i in range(u % 4 if u < 20 else 1)]
    return write_rows(folder / "day1.parquet", rows)


def deferred(job: Job) -> dict[Any, tuple[int, int]]:
    """User -> (current through, seconds; new events) of the newest run."""
    table = job.read("deferred")
    return {r["user_id"]: (r["current_through"] // SECOND_US, r["new_events"]) for r in table.to_pylist()}


def rows_of(job: Job) -> dict[Any, tuple[int, int]]:
    """User -> (history until, encoded at) of the newest row, seconds, over all runs."""
    found: dict[Any, tuple[int, int]] = {}
    for run in job.store.run_ids():
        for r in job.read("states", run).to_pylist():
            found[r["user_id"]] = (r["history_until"] // SECOND_US, r["encoded_at"] // SECOND_US)
    return found


def test_the_best_are_encoded_and_the_others_keep_row_and_events(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard: 9 users with a row have 1, 2 or 3 new events; a third of them, those with 3, are encoded."""
    first = job.run(first_day(tmp_path), T + 100, "--shards", "1", "--refresh-budget", "0")
    assert (first.counts["encoded"], first.counts["deferred"]) == (12, 0)  # a first run defers nobody
    capsys.readouterr()
    manifest = job.run(second_day(tmp_path), T + 2 * DAY, "--refresh-budget", "30%")
    assert {name: manifest.counts[name] for name in ("users", "encoded", "skipped", "deferred")} == {
        "users": 14, "encoded": 3 + 2, "skipped": 3, "deferred": 6,
    }  # fmt: skip
    assert job.read("states")["user_id"].to_pylist() == [3, 7, 11, 20, 21]
    assert deferred(job) == {u: (T + 100, u % 4) for u in (1, 2, 5, 6, 9, 10)}
    assert manifest.encoded_through_us == (T + 100) * SECOND_US
    assert manifest.files.keys() >= {"deferred/shard-00000.parquet"}
    out = capsys.readouterr().out
    assert "14: 5 encoded, 3 unchanged, 6 deferred" in out
    assert "30% of the changed users with a row; gain: assumed" in out
    assert f"all users through {iso((T + 100) * SECOND_US)}" in out
    tails = job.read("tails")
    lengths = dict(zip(tails["user_id"].to_pylist(), map(len, tails["item_id"].to_pylist()), strict=True))
    assert {u: lengths[u] for u in USERS} == {u: 1 + u % 4 for u in USERS}  # the deferred's events are in the tail
    assert rows_of(job)[1] == (T + 1, T + 100)
    assert rows_of(job)[3] == (T + DAY + 32, T + 2 * DAY)


@pytest.mark.parametrize("feed", ["whole log", "new files"])
def test_a_run_without_a_budget_catches_up(job: Job, tmp_path: Path, feed: str) -> None:
    """Deferred users are candidates without a new event of theirs; the end equals a job that never deferred."""
    plain = job.elsewhere("plain")
    folder = tmp_path / "log"
    days = [first_day(folder), second_day(folder), write_rows(folder / "day2.parquet", [row(3, 40, T + 2 * DAY + 1)])]
    for day, (moment, budget) in enumerate([(T + 100, "50%"), (T + 2 * DAY, "2"), (T + 3 * DAY, None)]):
        events = days[day]
        if feed == "whole log":
            events = write_log(tmp_path / f"until{day}", days[: day + 1])
        job.run(events, moment, *([] if budget is None else ["--refresh-budget", budget]))
        plain.run(events, moment)
    manifest = job.store.manifest(job.store.run_ids()[-1])
    assert manifest.counts["encoded"] == len(deferred_before(job) | {3})
    assert len(deferred_before(job)) == 7
    assert manifest.encoded_through_us == manifest.as_of_us
    assert "deferred" not in manifest.counts
    assert not any("deferred" in name for name in manifest.files)
    last = run_id(T + 3 * DAY)
    assert tails(job, last) == tails(plain, last)
    one, other = job.latest_states(), plain.latest_states()
    assert one.keys() == other.keys()
    for user in one:
        np.testing.assert_allclose(one[user], other[user], atol=1e-5)
    assert {u: until for u, (until, _) in rows_of(job).items()} == {
        u: until for u, (until, _) in rows_of(plain).items()
    }


def write_log(folder: Path, files: list[Path]) -> Path:
    folder.mkdir()
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def deferred_before(job: Job) -> set[Any]:
    """Whom the last run but one deferred."""
    table = job.read("deferred", job.store.run_ids()[-2])
    return set(table["user_id"].to_pylist())


def tails(job: Job, run: str) -> dict[str, str]:
    return {name: digest for name, digest in job.parquet_hashes().items() if name.startswith(f"{run}/tails")}


def test_without_the_flag_no_byte_differs_from_a_budget_that_holds_all(job: Job, tmp_path: Path) -> None:
    """100 % writes the same states, tails and dead letters, and an empty list of deferred users beside them."""
    other = job.elsewhere("other")
    for events, moment in ((first_day(tmp_path), T + 100), (second_day(tmp_path), T + 2 * DAY)):
        job.run(events, moment)
        other.run(events, moment, "--refresh-budget", "100%")
    assert not any("deferred" in name for name in job.hashes())
    there = other.parquet_hashes()
    assert {name: digest for name, digest in there.items() if "/deferred/" not in name} == job.parquet_hashes()
    assert deferred(other) == {}
    assert other.store.manifest(run_id(T + 2 * DAY)).encoded_through_us == (T + 2 * DAY) * SECOND_US


def test_deferred_events_add_up_until_the_user_is_the_best(job: Job, tmp_path: Path) -> None:
    """A budget of one user: user 1 gets an event a day and is passed over for fresh ones until nobody gains more."""
    job.run(first_day(tmp_path), T + 100, "--shards", "1")
    others = {1: 2, 2: 5, 3: 6}
    for day, other in others.items():
        rows = [row(1, 40 + day, T + day * DAY + 50), *(row(other, 50 + i, T + day * DAY + 90 + i) for i in range(3))]
        job.run(write_rows(tmp_path / f"n{day}.parquet", rows), T + day * DAY + 100, "--refresh-budget", "1")
        assert job.read("states")["user_id"].to_pylist() == [other]
        assert deferred(job) == {1: (T + 100, day)}
    idle = write_rows(tmp_path / "idle.parquet", [row(30, 10, T + 4 * DAY)])
    manifest = job.run(idle, T + 4 * DAY + 100, "--refresh-budget", "1")
    assert job.read("states")["user_id"].to_pylist() == [1, 30]  # the new user does not count
    assert manifest.encoded_through_us == manifest.as_of_us
    assert rows_of(job)[1] == (T + 3 * DAY + 50, T + 4 * DAY + 100)


def test_the_release_s_own_study_decides(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table by which a single new event gains and more do not turns the choice around."""
    gain = np.zeros((len(NEW_FROM), len(KNOWN_FROM)))
    gain[0] = 0.5
    values = {"new_from": NEW_FROM, "known_from": KNOWN_FROM, "gain": gain.tolist(), "source": "by hand"}
    registry = Registry(job.registry)
    name = f"refresh-{registry.releases()[-1]}"
    job.run(first_day(tmp_path), T + 100, "--shards", "1")
    registry.write_study(name, {"table": values})
    try:
        job.run(second_day(tmp_path), T + 2 * DAY, "--refresh-budget", "3")
    finally:
        registry.fs.rm(f"{registry.root}/studies/{name}.json")
    assert "gain: by hand" in capsys.readouterr().out
    assert job.read("states")["user_id"].to_pylist() == [1, 5, 9, 20, 21]


def test_a_rebuild_defers_nobody(job: Job, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [first_day(tmp_path / "a"), second_day(tmp_path / "a")])
    job.run(first_day(tmp_path), T + 100)
    job.run(log, T + 2 * DAY, "--refresh-budget", "0")
    assert len(deferred(job)) == 9
    rebuilt = job.run(log, T + 3 * DAY, "--full", "--refresh-budget", "0")
    assert (rebuilt.counts["encoded"], rebuilt.counts["deferred"]) == (14, 0)
    assert rebuilt.encoded_through_us == rebuilt.as_of_us


def test_string_ids(string_job: Job, tmp_path: Path) -> None:
    names = ["zoë", "", "bo"]
    first = [row(name, "i10", T) for name in names]
    string_job.run(write_rows(tmp_path / "a.parquet", first, ids=pa.string()), T + 10)
    second = [row(name, "i11", T + 20) for name in names]
    string_job.run(write_rows(tmp_path / "b.parquet", second, ids=pa.string()), T + 30, "--refresh-budget", "0%")
    assert deferred(string_job) == dict.fromkeys(names, (T + 10, 1))
    assert string_job.run(write_rows(tmp_path / "c.parquet", [], ids=pa.string()), T + 40).counts["encoded"] == 3


def test_a_deferred_row_in_redis_is_as_old_as_it_is(
    job: Job, tmp_path: Path, redis_server: str, int_release: tuple[Path, Manifest]
) -> None:
    """The reply's age is now minus encoded_at: a deferred user's must stay that of the run that encoded them."""
    _, manifest = int_release
    job.run(first_day(tmp_path), T + 100, "--shards", "1", redis=redis_server)
    job.run(second_day(tmp_path), T + 2 * DAY, "--refresh-budget", "3", redis=redis_server)
    view = layout.view_name(manifest.state_version)
    with connect(redis_server) as client:
        found = {}
        for user in (1, 4, 3):
            values = client.hmget(layout.redis_key(user), layout.row_fields(view))
            decoded = layout.decode_row(values)
            assert decoded is not None
            found[user] = (decoded.history_until_us // SECOND_US, decoded.encoded_at_us // SECOND_US)
    assert found == {1: (T + 1, T + 100), 4: (T + 4, T + 100), 3: (T + DAY + 32, T + 2 * DAY)}


def test_a_budget_that_is_none_is_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="a share like 25%"):
        parse_settings(job.arguments(tmp_path, None, "--refresh-budget", "many"), {})
    assert main(job.arguments(tmp_path, None, "--refresh-budget", "120%")) == 2
    assert "got '120%'" in capsys.readouterr().err
