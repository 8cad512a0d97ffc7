import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.processes import CommandFailed, Processes, Stopped
from deploy.redis_server import start_redis

# A server that leaves a child of its own behind unless the whole group is ended.
SERVER = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: list[int], timeout_s: float = 10.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def start_server(processes: Processes, note: Path) -> list[int]:
    """Starts SERVER; its process id and its child's."""
    command = python("-c", SERVER, str(note))
    server = processes.serve("serve", command, lambda: note.exists() and note.stat().st_size > 0)
    return [server.pid, int(note.read_text())]


def test_output_goes_to_the_log_and_to_us(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = r"print('begin'); print('10%\r50%\r\x1b[A100%'); import sys; print('caf\u00e9', file=sys.stderr, end='')"
    with Processes(tmp_path) as processes:
        processes.run("talk", python("-c", script), {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"})
    assert (tmp_path / "talk.log").read_text() == "begin\n100%\ncafé\n"
    assert capfd.readouterr().out == "begin\n100%\ncafé\n"


def test_a_failing_command_names_itself_and_shows_its_end(tmp_path: Path) -> None:
    script = "[print('line', i) for i in range(100)]; raise SystemExit(3)"
    with pytest.raises(CommandFailed, match="count: ended with status 3") as caught, Processes(tmp_path) as processes:
        processes.run("count", python("-c", script))
    assert caught.value.tail() == [f"line {i}" for i in range(75, 100)]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="could not be started"), Processes(tmp_path) as processes:
        processes.run("nothing", [str(tmp_path / "nothing")])


def test_a_server_that_ends_before_it_is_ready(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandFailed, match="ended with status 1 before it was ready"),
        Processes(tmp_path) as processes,
    ):
        processes.serve("serve", python("-c", "raise SystemExit('no port')"), lambda: False)
    assert (tmp_path / "serve.log").read_text() == "no port\n"


def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"not ready within 0\.3 s"), Processes(tmp_path) as processes:
        processes.serve("serve", python("-c", "import time; time.sleep(600)"), lambda: False, timeout_s=0.3)
    assert not [child for child in psutil.Process().children() if "sleep(600)" in " ".join(child.cmdline())]


def test_a_failure_stops_servers_with_their_children(tmp_path: Path) -> None:
    pids: list[int] = []

    def work() -> None:
        with Processes(tmp_path / "logs") as processes:
            redis = processes.adopt(lambda: start_redis(tmp_path / "redis"))
            assert redis.process is not None
            pids.extend([redis.process.pid, *start_server(processes, tmp_path / "child")])
            assert all(map(is_running, pids))
            processes.run("break", python("-c", "raise SystemExit(1)"))

    with pytest.raises(CommandFailed, match="break"):
        work()
    assert len(pids) == 3
    assert wait_until_gone(pids) == []


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.processes.STOP_TIMEOUT_S", 0.2)
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    )
    log = tmp_path / "serve.log"
    with Processes(tmp_path) as processes:
        server = processes.serve("serve", python("-c", script), lambda: log.exists() and "on" in log.read_text())
    assert server.status == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_raises_and_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    pids: list[int] = []

    def work() -> None:
        with Processes(tmp_path) as processes:
            pids.extend(start_server(processes, tmp_path / "child"))
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(Stopped, match=number.name) as caught:
        work()
    assert caught.value.number == number
    assert wait_until_gone(pids) == []
    assert signal.getsignal(number) is before


def test_a_signal_while_something_is_started_waits_until_it_is_known(tmp_path: Path) -> None:
    started = []

    def start() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(python("-c", "pass"))
        os.kill(os.getpid(), signal.SIGTERM)  # would be lost from sight, were it raised here
        started.append(process)
        return process

    with pytest.raises(Stopped), Processes(tmp_path) as processes:
        processes.adopt(start)
    assert started[0].returncode == 0  # its __exit__ was called, which waits
