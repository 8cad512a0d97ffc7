"""User states from Redis: one HMGET a user, all of a batch in one write, over a plain socket.

Why not redis-py: of the 1.2 ms a usual service spends on a request, a quarter goes into the client's layers. Here a
thread owns a socket; the command's bytes are joined once, hiredis parses the reply, the kernel keeps the time-out
(SO_RCVTIMEO), so a read is one system call and can never hang.

Redis away: after a few failures in a row the circuit opens. Requests are then refused at once (and get a cold-start
answer), and once in a while one of them is let through to see whether Redis is back.
"""

import contextlib
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from model.errors import ConfigError, StoreUnavailable

_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis is and how to sign in."""

    host: str
    port: int
    path: str | None
    """A Unix socket's path, instead of host and port."""
    tls: bool
    username: str | None
    password: str | None
    database: int

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """redis://[[user]:password@]host[:port][/database], rediss:// (TLS) or unix:///path[?db=0].

    Raises ConfigError.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ConfigError(f"a Redis URL begins with redis://, rediss:// or unix://, got {url!r}")
    try:
        port = parts.port or 6379
        name = parse_qs(parts.query).get("db", [parts.path.strip("/") if parts.scheme != "unix" else ""])[0]
        database = int(name or 0)
    except ValueError as error:
        raise ConfigError(f"Redis URL {url!r}: {error}") from None
    return Address(
        host=parts.hostname or "localhost",
        port=port,
        path=parts.path if parts.scheme == "unix" else None,
        tls=parts.scheme == "rediss",
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        database=database,
    )


class CircuitBreaker:
    """Stops asking a store that does not answer, and asks again now and then. Safe to use from several threads."""

    def __init__(
        self, *, failures_to_open: int = 3, retry_after_s: float = 0.25, clock: Callable[[], float] = monotonic
    ) -> None:
        self._failures_to_open = failures_to_open
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused."""
        return self._failures >= self._failures_to_open

    def allow(self) -> bool:
        """Whether to try now. While open, one caller each `retry_after_s` is let through."""
        if not self.is_open:
            return True
        with self._lock:
            now = self._clock()
            if now < self._retry_at:
                return False
            self._retry_at = now + self._retry_after_s
            return True

    def succeeded(self) -> None:
        """The store answered: close."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self) -> None:
        """The store did not answer."""
        with self._lock:
            self._failures += 1
            self._retry_at = self._clock() + self._retry_after_s


class _Closed(Exception):
    """The peer closed the connection."""


class _Connection:
    """One socket and its parser; belongs to one thread. Unusable after any error."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        if address.path is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(timeout_s)
            try:
                self._socket.connect(address.path)
            except OSError:
                self._socket.close()
                raise
        else:
            self._socket = socket.create_connection((_resolve(address.host, timeout_s), address.port), timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if address.tls:
                context = ssl.create_default_context()
                self._socket = context.wrap_socket(self._socket, server_hostname=address.host)
            else:
                self._socket.setblocking(True)  # the kernel keeps the time
            self._is_tls = address.tls
            self._timeout_s = -1.0
            self._reader = hiredis.Reader()
            self.is_new = True
            hello = []
            if address.password is not None:
                user = () if address.username is None else (address.username.encode(),)
                hello.append(_command(b"AUTH", *user, address.password.encode()))
            if address.database:
                hello.append(_command(b"SELECT", b"%d" % address.database))
            if hello:
                for reply in self.exchange(b"".join(hello), len(hello), timeout_s):
                    if isinstance(reply, hiredis.ReplyError):
                        raise reply
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        """The thread that owned it has ended."""
        with contextlib.suppress(AttributeError):  # the socket was never made
            self._socket.close()

    def exchange(self, commands: bytes, count: int, timeout_s: float) -> list[object]:
        """Send commands, receive `count` replies. Raises OSError (a time-out too) and _Closed."""
        if timeout_s != self._timeout_s:
            self._set_timeout(timeout_s)
        give_up_at = monotonic() + timeout_s
        self._socket.sendall(commands)
        reader, replies = self._reader, []
        while True:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise _Closed("the connection was closed")
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                replies.append(reply)
            if len(replies) >= count:
                return replies
            if monotonic() > give_up_at:
                raise TimeoutError(f"{len(replies)} of {count} replies within {timeout_s * 1e3:.0f} ms")

    def _set_timeout(self, timeout_s: float) -> None:
        if self._is_tls:
            self._socket.settimeout(timeout_s)
        else:
            micros = max(1, int(timeout_s * 1e6))
            value = struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self._timeout_s = timeout_s


def _resolve(host: str, timeout_s: float) -> str:
    """An address of the host. Looking up a name has no time-out of its own, so it happens in a thread of its own."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    found: list[str] = []

    def look_up() -> None:
        with contextlib.suppress(OSError):
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            infos.sort(key=lambda info: info[0] is not socket.AF_INET)
            found.append(str(infos[0][4][0]))

    thread = threading.Thread(target=look_up, name="resolve", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise OSError(f"the name {host} was not resolved within {timeout_s * 1e3:.0f} ms")
    return found[0]


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class RedisStore:
    """Hashes of a Redis. One connection a thread, made when first needed and again after an error."""

    def __init__(
        self,
        url: str,
        *,
        breaker: CircuitBreaker | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        """on_error: told the kind of each failure: timeout, connection, refused (circuit open) or reply.

        Raises ConfigError for a bad URL. Does not connect yet: a service may start while Redis is away.
        """
        self.address = parse_url(url)
        self.breaker = breaker or CircuitBreaker()
        self._on_error = on_error or (lambda kind: None)
        self._local = threading.local()
        self._command_ends: dict[tuple[bytes, ...], tuple[bytes, bytes]] = {}

    def fetch(self, keys: Sequence[bytes], fields: Sequence[bytes], timeout_s: float) -> list[Sequence[bytes | None]]:
        """See StateStore. A hash that is not a hash (WRONGTYPE) reads as empty values, which cannot be decoded."""
        if not self.breaker.allow():
            self._on_error("refused")
            raise StoreUnavailable(f"Redis at {self.address} has not answered lately; not asked")
        head, tail = self._ends(tuple(fields))
        commands = b"".join([b"%b%d\r\n%b%b" % (head, len(key), key, tail) for key in keys])
        replies = self._exchange(commands, len(keys), timeout_s)
        self.breaker.succeeded()
        unreadable: list[bytes | None] = [b""] * len(fields)
        return [reply if isinstance(reply, list) else unreadable for reply in replies]

    def _exchange(self, commands: bytes, count: int, timeout_s: float) -> list[object]:
        give_up_at = monotonic() + timeout_s
        while True:
            connection: _Connection | None = getattr(self._local, "connection", None)
            left_s = timeout_s
            try:
                if connection is None:
                    connection = self._local.connection = _Connection(self.address, timeout_s)
                    left_s = max(1e-3, give_up_at - monotonic())
                replies = connection.exchange(commands, count, left_s)
                refusal = next((r for r in replies if isinstance(r, hiredis.ReplyError) and not _is_row_error(r)), None)
                if refusal is not None:
                    raise refusal
                connection.is_new = False
                return replies
            except (OSError, _Closed, hiredis.HiredisError) as error:
                self._local.connection = None
                was_used = connection is not None and not connection.is_new
                if connection is not None:
                    connection.close()
                is_timeout = isinstance(error, TimeoutError | BlockingIOError)
                if was_used and not is_timeout and not isinstance(error, hiredis.HiredisError):
                    continue  # an idle connection that Redis has closed since: once more on a fresh one
                self.breaker.failed()
                kind = "timeout" if is_timeout else "reply" if isinstance(error, hiredis.HiredisError) else "connection"
                self._on_error(kind)
                why = f"no answer within {timeout_s * 1e3:.0f} ms" if is_timeout else f"{error or type(error).__name__}"
                raise StoreUnavailable(f"Redis at {self.address}: {why}") from None

    def _ends(self, fields: tuple[bytes, ...]) -> tuple[bytes, bytes]:
        """What stands before a key's length and after the key in its HMGET."""
        ends = self._command_ends.get(fields)
        if ends is None:
            if len(self._command_ends) >= 64:
                self._command_ends.clear()
            tail = b"".join(b"$%d\r\n%b\r\n" % (len(field), field) for field in fields)
            ends = self._command_ends[fields] = (b"*%d\r\n$5\r\nHMGET\r\n$" % (len(fields) + 2), b"\r\n" + tail)
        return ends


def _is_row_error(error: hiredis.ReplyError) -> bool:
    """Whether the error is about one key, not about the connection or the server."""
    return str(error).startswith("WRONGTYPE")
