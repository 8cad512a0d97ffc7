"""Runs commands one after another and servers beside them, and stops all of them whatever happens.

    with Processes(logs) as processes:
        redis = processes.adopt(start_redis(folder))
        processes.run("train", ["tower-train", ...])

Every child leads a session of its own, so a Ctrl-C in the terminal reaches only the owner, which then ends its children
in order. SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, but never between starting a child and
writing it down, and never while children are being ended.
"""

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self, TypeVar

STOP_TIMEOUT_S = 15.0
"""Between asking a child to end and killing it."""
TAIL_LINES = 25

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")

Owned = TypeVar("Owned", bound=contextlib.AbstractContextManager[Any])


class Stopped(BaseException):
    """A signal asked us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class CommandFailed(Exception):
    """A command ended with an error, or a server before it was ready."""

    def __init__(self, name: str, told: str, log: Path) -> None:
        super().__init__(f"{name}: {told}")
        self.name = name
        self.told = told
        self.log = log

    def tail(self) -> list[str]:
        """The last lines of its log."""
        return last_lines(self.log)


class Child:
    """A running command, its output on its way to the log and, where asked for, to our output."""

    def __init__(self, name: str, log: Path, process: subprocess.Popen[bytes], pump: threading.Thread) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._pump = pump

    @property
    def pid(self) -> int:
        """Process id, and the id of its process group."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Waits for its end; returns the exit status."""
        return self._process.wait()

    def end(self) -> None:
        """Ends it and all of its group. Harmless when it has ended."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pump.join(5.0)


class Processes:
    """Owner of everything that is started."""

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self._logs = logs
        self._environment = dict(os.environ if environment is None else environment)
        self._owned: list[contextlib.AbstractContextManager[Any] | Child] = []
        self._handlers: dict[int, Any] = {}
        self._holding = 0
        self._pending: int | None = None

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Runs a command to its end, its output shown and logged. Raises CommandFailed."""
        child = self._start(name, command, environment, show=True)
        status = child.wait()
        with self._held():
            self._owned.remove(child)
            child.end()
        if status != 0:
            raise CommandFailed(name, _ended(status), child.log)
        return child

    def serve(
        self,
        name: str,
        command: Sequence[str],
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> Child:
        """Starts a server and waits until `ready()`. Its output goes to its log only. Raises CommandFailed."""
        child = self._start(name, command, environment, show=False)
        deadline = time.monotonic() + timeout_s
        while not ready():
            status = child.status
            if status is not None:
                raise CommandFailed(name, f"{_ended(status)} before it was ready", child.log)
            if time.monotonic() > deadline:
                raise CommandFailed(name, f"was not ready within {timeout_s:g} s", child.log)
            time.sleep(0.1)
        return child

    def adopt(self, start: Callable[[], Owned]) -> Owned:
        """Calls `start` and owns what it gives, a context manager: it is left at the end."""
        with self._held():
            owned = start()
            self._owned.append(owned)
        return owned

    def stop_all(self) -> None:
        """Ends everything that was started, the latest first."""
        with self._held():
            while self._owned:
                owned = self._owned.pop()
                if isinstance(owned, Child):
                    owned.end()
                else:
                    owned.__exit__(None, None, None)

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop_all()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None, *, show: bool) -> Child:
        log = self._logs / f"{name}.log"
        terminal = show and sys.stdout.isatty()
        sys.stdout.flush()
        with self._held():
            source, sink = _open_terminal() if terminal else os.pipe()
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=self._environment | dict(environment or {}),
                    start_new_session=True,
                )
            except OSError as error:
                os.close(source)
                log.write_text(f"{error}\n")
                raise CommandFailed(name, f"could not be started: {error}", log) from error
            finally:
                os.close(sink)
            pump = threading.Thread(target=_pump, args=(source, log, show, terminal), name=f"log of {name}")
            pump.daemon = True
            pump.start()
            child = Child(name, log, process, pump)
            self._owned.append(child)
        return child

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Signals wait until the outermost such block is left."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            if self._holding == 0 and self._pending is not None:
                number, self._pending = self._pending, None
                if sys.exc_info()[0] is None:
                    raise Stopped(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._pending = number
        else:
            raise Stopped(number)


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; none where there is no log."""
    try:
        return log.read_text(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def _ended(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"


def _open_terminal() -> tuple[int, int]:
    """A terminal as wide as ours, so that commands draw their progress bars."""
    source, sink = pty.openpty()
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(source, termios.TIOCSWINSZ, size)
    return source, sink


def _pump(source: int, log: Path, show: bool, terminal: bool) -> None:
    """Copies a command's output. The log, and an output that is no terminal, get what a terminal would show in the end
    of each line."""
    rest = b""
    with os.fdopen(source, "rb", buffering=0) as output, log.open("wb") as file:
        while True:
            try:
                data = output.read(65536)
            except OSError:  # a terminal whose other side was closed
                data = b""
            if terminal and data:
                _show(sys.stdout, data)
            lines = (rest + data).split(b"\n")
            rest = lines.pop() if data else b""
            plain = b"".join(_last_drawn(line) + b"\n" for line in lines if line or data)
            if plain:
                file.write(plain)
                file.flush()
                if show and not terminal:
                    _show(sys.stdout, plain)
            if not data:
                return


def _last_drawn(line: bytes) -> bytes:
    """What is left of a line whose beginning was drawn over."""
    drawn = [part for part in _ESCAPES.sub(b"", line).split(b"\r") if part.strip()]
    return drawn[-1].rstrip() if drawn else b""


def _show(output: IO[str], data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the log goes on
        raw = getattr(output, "buffer", None)
        if raw is None:
            output.write(data.decode(errors="replace"))
        else:  # a character may be cut in two here, and joins again there
            output.flush()
            raw.write(data)
        output.flush()
