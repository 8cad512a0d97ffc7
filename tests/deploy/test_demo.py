import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from deploy.demo import child_environment, main, prepare
from deploy.queries import Cut, Request, hit_rates, pick_examples, requests_from, state_ages_hours, unknown_user
from deploy.settings import Settings, check_settings, cut_times, parse_settings
from model.dataset import Evaluation
from model.errors import ConfigError
from model.records import Context, Event
from online.client import Embedding
from tests.builders import START_US, make_description, make_event, make_event_table, make_users, write_dataset

ROOT = Path(__file__).parents[2]
DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
SECOND_US = 1_000_000


def stand_ins(folder: Path, **scripts: str) -> Path:
    """A folder of programs that do what is given, in Python."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!{sys.executable}\n{script}\n")
        path.chmod(0o755)
    return folder


def on_files(folder: Path, out: Path) -> list[str]:
    data = write_dataset(folder / "data", users=4, length=6)
    files = [f"--{name}={data / name}.parquet" for name in ("events", "items", "users")]
    return [*files, "--out", str(out)]


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that have to do with the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if (
            str(folder) in line
            and process.info["pid"] != os.getpid()
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            found.append(line)
    return found


def test_a_failing_step_is_named_with_the_end_of_its_log_and_nothing_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    programs = stand_ins(tmp_path / "bin", tower_train="print('epoch 1'); raise SystemExit('out of luck')")
    out = tmp_path / "out"
    assert main(on_files(tmp_path, out), programs=programs) == 1
    told = capfd.readouterr()
    assert "step 'Train' failed: train: ended with status 1" in told.err
    assert "  | epoch 1\n  | out of luck" in told.err.replace("\r", "")
    assert f"$ {programs}/tower-train --events {tmp_path}/data/events.parquet" in told.out
    assert (out / "demo" / "redis" / "redis.log").exists()  # Redis had been started
    assert left_running(tmp_path) == []
    assert sorted(path.name for path in out.iterdir()) == ["demo", "logs"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    note = tmp_path / "training"
    script = (
        "import subprocess, sys, time; from pathlib import Path\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {str(tmp_path)!r}])\n"
        f"Path({str(note)!r}).touch(); time.sleep(600)"
    )
    programs = stand_ins(tmp_path / "bin", tower_train=script)
    arguments = on_files(tmp_path, tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; from deploy.demo import main; "
        f"sys.exit(main({arguments!r}, Path({str(programs)!r})))"
    )
    demo = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not note.exists() and demo.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert note.exists()
        assert len(left_running(tmp_path)) >= 3  # training, its child, Redis
        demo.send_signal(number)
        _, told = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 128 + number
    assert f"stopped by {number.name}".encode() in told
    assert left_running(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--events", "here"], "EVENTS needs ITEMS"),
        (["--items", "here"], "ITEMS goes with EVENTS"),
        (["--users", "here"], "USERS goes with EVENTS"),
        (["--dataset", "ml-1m"], "DATASET goes with EVENTS"),
        (["--events", "gone", "--items", "here"], "EVENTS: there is nothing at gone"),
        (["--events", "here", "--items", "gone"], "ITEMS: there is nothing at gone"),
        (["--events", "here", "--items", "here", "--users", "gone"], "USERS: there is nothing at gone"),
        (["--events", "here", "--items", "here", "--dataset", "ml-2m"], "no dataset description 'ml-2m'.*ml-1m"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--out", "here"], "here is no folder"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    with pytest.raises(SystemExit) as caught:
        parse_settings(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("demo: ")
    assert told.count("\n") == 1
    assert re.search(message, told)


def test_missing_users_are_asked_for_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [a for a in on_files(tmp_path, tmp_path / "out") if not a.startswith("--users")]
    assert main(arguments, programs=stand_ins(tmp_path / "bin")) == 1
    assert (
        "step 'Data' failed: the description test declares the user columns gender; give USERS="
        in capsys.readouterr().err
    )


def test_a_damaged_items_file_is_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = on_files(tmp_path, tmp_path / "out")
    (tmp_path / "data" / "items.parquet").write_text("no Parquet")
    assert main(arguments, programs=stand_ins(tmp_path / "bin")) == 1
    told = capsys.readouterr().err
    assert "step 'Data' failed" in told
    assert "items.parquet" in told


def make_settings(out: Path) -> Settings:
    return Settings(
        events=None,
        items=None,
        users=None,
        dataset=None,
        out=out,
        quick=True,
        minutes=None,
        record=False,
        keep_serving=False,
    )


def test_only_what_a_demo_made_is_removed(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    check_settings(settings)
    prepare(settings)
    (settings.work / "old").touch()
    prepare(settings)
    assert not (settings.work / "old").exists()
    other = make_settings(tmp_path / "mine")
    other.work.mkdir(parents=True)
    (other.work / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="was not made by the demo; give another --out"):
        prepare(other)
    assert (other.work / "thesis.txt").exists()


def test_commands_find_programs_and_a_path_even_in_a_bare_environment() -> None:
    bare = child_environment({}, Path("/venv/bin"))
    assert bare["PATH"] == f"/venv/bin{os.pathsep}{os.defpath}"
    assert child_environment({"PATH": "/x", "OMP_WAIT_POLICY": "ACTIVE"}, Path("/v"))["OMP_WAIT_POLICY"] == "ACTIVE"


def test_states_are_cut_where_the_test_begins_and_a_day_before() -> None:
    description = make_description(
        evaluation={"split": "time", "test_from": "2023-11-20T00:00:00Z", "test_until": "2023-11-21T00:00:00Z"}
    )
    assert isinstance(description.evaluation, Evaluation)
    times = cut_times(description, START_US, START_US + 10 * DAY_US)
    assert times.as_of_us == description.evaluation.test_from_us
    assert times.previous_us == times.as_of_us - DAY_US
    assert times.until_us == times.as_of_us + DAY_US


def test_states_of_a_leave_one_out_log_are_cut_at_its_end() -> None:
    description = make_description(evaluation={"split": "leave_one_out"})
    last_us = START_US + 2 * DAY_US + 1
    times = cut_times(description, START_US, last_us)
    assert times.as_of_us == START_US + 2 * DAY_US + SECOND_US
    assert times.previous_us == times.as_of_us - DAY_US


def test_a_short_log_has_its_first_run_half_way() -> None:
    times = cut_times(make_description(evaluation={"split": "leave_one_out"}), START_US, START_US + 60 * SECOND_US)
    assert times.previous_us == START_US + 30 * SECOND_US


def make_cut(split: str = "time") -> Cut:
    """User 1: two events before the states, then view 3, click 4, view 5, click 6 an hour apart; user 2: one before."""
    hours = [(1, "click", -2), (2, "click", 0), (3, "view", 1), (4, "click", 2), (5, "view", 3), (6, "click", 4)]
    events = [
        make_event(item, kind, START_US + hour * HOUR_US, surface="home", device=None if item == 4 else "tv")
        for item, kind, hour in hours
    ]
    evaluation = {"split": split} if split != "time" else {"split": "time"}
    description = make_description(evaluation=evaluation)
    table = make_event_table({1: events, 2: events[:1]}, description)
    return Cut(table, make_users(2), description, START_US, START_US + 4 * HOUR_US + 1)


def test_requests_come_before_positive_events_after_the_states_with_what_was_known() -> None:
    first, second = sorted(requests_from(make_cut(), 10, session_limit=2), key=lambda request: str(request.next_item))
    assert first == Request(
        1, Context({"gender": "F"}, START_US + 2 * HOUR_US, (Event(3, "view", START_US + HOUR_US),)), 4
    )
    assert second.next_item == 6
    assert second.context.features == {"device": "tv", "gender": "F"}
    assert [event.item_id for event in second.context.session_events] == [4, 5]  # the latest two


def test_requests_at_the_end_of_a_log_have_no_session() -> None:
    requests = requests_from(make_cut("leave_one_out"), 10, session_limit=2)
    assert sorted((str(r.user_id), r.context.features["gender"], r.next_item) for r in requests) == [
        ("1", "F", None), ("2", "M", None)
    ]  # fmt: skip
    assert {request.context.timestamp_us for request in requests} == {START_US}


def make_reply(answer: str = "EXACT", age_us: int = 0) -> Embedding:
    return Embedding(np.zeros(2, np.float32), answer, "", "r", 1, "s", "e", age_us)


def test_ages_of_states_count_from_the_log_s_time() -> None:
    now_us = START_US + 1000 * DAY_US
    request = Request(1, Context(timestamp_us=START_US + 2 * HOUR_US), None)
    replies = [
        make_reply(age_us=now_us - START_US + 7_000),
        make_reply(age_us=now_us - START_US + DAY_US - 900_000),
        make_reply("COLD_START"),
        None,
    ]
    ages = state_ages_hours([request] * 4, replies, (START_US - DAY_US, START_US), now_us)
    assert ages.tolist() == [2.0, 26.0]


def test_examples_are_of_different_users_with_a_session_where_there_are_such() -> None:
    session = (make_event(1), make_event(2))
    users = [(1, ()), (2, session), (2, session), (3, session), (4, session)]
    requests = [Request(user, Context(session_events=events), 9) for user, events in users]
    replies = [make_reply(), make_reply(), make_reply(), make_reply("COLD_START"), make_reply()]
    assert pick_examples(requests, replies) == [1, 4, 0]


def test_an_unknown_user_is_unknown() -> None:
    assert unknown_user(pa.array([3, 9]), make_description()) == 10
    assert unknown_user(pa.array([3, 2**63 - 1]), make_description()) == 2
    assert unknown_user(pa.array(["no-such-user"]), make_description(user_id_type="string")) == "no-such-user-"


class TwoItems:
    """A catalogue where the embedding is the score."""

    def scores(self, vectors_BE: np.ndarray, time_us_B: list[int]) -> np.ndarray:
        return vectors_BE

    def rank(self, score_N: np.ndarray, item: int) -> int:
        return int((score_N > score_N[item]).sum()) + 1


def test_hit_rates_by_hand() -> None:
    def reply(*scores: float, answer: str = "EXACT") -> Embedding:
        return Embedding(np.array(scores, np.float32), answer, "", "r", 1, "s", "e", 0)

    requests = [
        Request(1, Context(), 0),
        Request(2, Context(), 1),
        Request(3, Context(), 0),
        Request(4, Context(), None),
    ]
    without = [reply(0, 1), reply(0, 1), reply(1, 0), reply(1, 0)]
    with_context = [reply(1, 0), reply(0, 1), reply(1, 0, answer="COLD_START"), reply(1, 0)]
    assert hit_rates(TwoItems(), requests, without, with_context, k=1) == (2, 0.5, 1.0)  # type: ignore[arg-type]
    assert hit_rates(TwoItems(), requests[3:], without[3:], with_context[3:], k=1) is None  # type: ignore[arg-type]
