"""tower-serve as a process: ready line, signals, workers, bad flags."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from model.leases import read_leases
from model.release import Registry
from online.__main__ import main, make_parser
from online.client import UserTowerClient
from tests.online.conftest import World
from tests.online.helpers import Rows, fresh_users

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def process(*flags: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "online", "--metrics-port", "0", "--port", "0", "--notice-s", "0.1", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=REPOSITORY)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        assert started.stdout is not None
        started.stdout.close()


def ready(server: "subprocess.Popen[str]") -> dict[str, str]:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("ready "), line
    return dict(word.split("=", 1) for word in line.split()[1:])


def test_it_gets_ready_serves_and_ends_on_sigterm(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 3), world.a.state_version)
    with process("--registry", str(world.registry), "--redis-url", redis_server) as server:
        said = ready(server)
        assert (said["epoch"], said["release"]) == ("1", world.a.release_id)
        with UserTowerClient(f"127.0.0.1:{said['port']}", timeout_s=10) as client:
            assert client.embed(user, policy="strict").answer == "EXACT"
            assert [lease.epoch for lease in read_leases(Registry(world.registry))] == [1]
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
            assert read_leases(Registry(world.registry)) == []
            with pytest.raises(grpc.RpcError):
                client.embed(user)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SO_REUSEPORT spreads connections on Linux")
def test_workers_share_a_port_and_end_together(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 3), world.a.state_version)
    with process("--registry", str(world.registry), "--redis-url", redis_server, "--workers", "2") as server:
        said = ready(server)
        assert said["workers"] == "2"
        leases = read_leases(Registry(world.registry))
        assert len({lease.server_id for lease in leases}) == 2, "one a process"
        assert {lease.address for lease in leases} == {f"127.0.0.1:{said['port']}"}
        for n in range(8):
            with UserTowerClient(f"127.0.0.1:{said['port']}", timeout_s=10) as client:
                assert client.embed(user + n % 3, policy="strict").answer == "EXACT"
        children = _children(server.pid)
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        assert server.wait(30) != 0, "a server that lost a worker must not look healthy"
        give_up_at = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < give_up_at, "a worker outlived its parent"
            time.sleep(0.05)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_help_teaches_and_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--registry", "--redis-url", "--port", "--metrics-port", "--workers", "--policy", "--deadline-ms",
                 "--max-queue", "--max-state-age", "--lease-s", "--canary-s", "--tls-cert", "--bind", "SIGTERM",
                 "ready port="):  # fmt: skip
        assert flag in text
    assert "--worker " not in text


def test_help_needs_no_torch() -> None:
    code = "import sys, online.__main__; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_bad_flags_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    for flags, complaint in (
        (["--registry", "r"], "REDIS_URL"),
        (["--registry", "r", "--redis-url", "redis://x", "--workers", "0"], "workers"),
        (["--registry", "r", "--redis-url", "http://x"], "redis://"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        assert ended.value.code == 2
        assert complaint in capsys.readouterr().err


def test_the_environment_names_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://from-the-environment")
    assert make_parser().parse_args(["--registry", "r"]).redis_url == "redis://from-the-environment"
