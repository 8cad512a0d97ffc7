"""The Redis store: no hang, no stale reply, back again after an outage."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.redis_server import start_redis
from feature_repo import layout
from model.errors import ConfigError, StoreUnavailable
from online.stores.redis import CircuitBreaker, RedisStore, parse_url
from tests.online.helpers import Rows, fresh_users


def test_values_come_back_in_order(redis_server: str, rows: Rows) -> None:
    user = fresh_users()
    keys = [layout.redis_key(user + n) for n in range(300)]
    for n in range(0, 300, 2):
        rows.put(user + n, {b"a": b"%d" % n, b"c": b"x" * 3000})
    fetched = RedisStore(redis_server).fetch(keys, [b"c", b"b", b"a"], 5.0)
    for n, values in enumerate(fetched):
        assert list(values) == ([b"x" * 3000, None, b"%d" % n] if n % 2 == 0 else [None, None, None])


def test_a_key_of_another_kind_is_unreadable_and_the_others_are_not(redis_server: str, rows: Rows) -> None:
    user = fresh_users()
    rows.redis.set(layout.redis_key(user), b"not a hash")
    rows.put(user + 1, {b"a": b"1"})
    store = RedisStore(redis_server)
    bad, good = store.fetch([layout.redis_key(user), layout.redis_key(user + 1)], [b"a"], 5.0)
    assert (list(bad), list(good)) == ([b""], [b"1"])


@contextmanager
def silent_server(answer: bytes = b"") -> Iterator[str]:
    """Accepts connections, reads, and says `answer` to whatever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer:
                    connection.recv(65_536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in connections:
            connection.close()


def test_silence_ends_at_the_time_out() -> None:
    kinds: list[str] = []
    with silent_server() as url:
        store = RedisStore(url, on_error=kinds.append, breaker=CircuitBreaker(failures_to_open=2, retry_after_s=60))
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="within 50 ms"):
                store.fetch([b"k"], [b"f"], 0.05)
            assert 0.04 < time.monotonic() - started < 10  # the bound is generous: it tells a hang, not a speed
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="not asked"):
            store.fetch([b"k"], [b"f"], 5.0)
        assert time.monotonic() - started < 4  # less than the time-out: Redis was not asked
    assert kinds == ["timeout", "timeout", "refused"]


def test_a_late_reply_is_never_taken_for_another_request(tmp_path: Path) -> None:
    """The reply to a request that timed out must not answer the next one on the connection."""
    with start_redis(tmp_path) as server:
        rows = Rows(server.url)
        rows.put(1, {b"f": b"one"})
        rows.put(2, {b"f": b"two"})
        store = RedisStore(server.url, breaker=CircuitBreaker(failures_to_open=100))
        assert store.fetch([layout.redis_key(1)], [b"f"], 1.0) == [[b"one"]]
        server.pause()
        with pytest.raises(StoreUnavailable):
            store.fetch([layout.redis_key(1)], [b"f"], 0.05)
        server.resume()
        assert store.fetch([layout.redis_key(2)], [b"f"], 5.0) == [[b"two"]]
        rows.close()


@pytest.mark.parametrize("answer", [b"-LOADING Redis is loading\r\n", b"-NOAUTH Who are you?\r\n", b"?what"])
def test_an_answer_that_is_none_is_an_outage(answer: bytes) -> None:
    with silent_server(answer) as url, pytest.raises(StoreUnavailable):
        RedisStore(url).fetch([b"k"], [b"f"], 1.0)


def test_a_restart_is_survived(tmp_path: Path) -> None:
    """An idle connection that Redis closed is replaced without an error; a dead Redis is one until it is back."""
    with start_redis(tmp_path) as server:
        store = RedisStore(server.url, breaker=CircuitBreaker(failures_to_open=1, retry_after_s=0.02))
        assert store.fetch([b"k"], [b"f"], 1.0) == [[None]]
        server.restart()
        assert store.fetch([b"k"], [b"f"], 1.0) == [[None]]
        server.stop()
        with pytest.raises(StoreUnavailable):
            store.fetch([b"k"], [b"f"], 1.0)
        server.start()
        give_up_at = time.monotonic() + 5
        while True:
            try:
                assert store.fetch([b"k"], [b"f"], 1.0) == [[None]]
                break
            except StoreUnavailable:
                assert time.monotonic() < give_up_at
                time.sleep(0.01)


def test_signing_in_and_databases(tmp_path: Path) -> None:
    with start_redis(tmp_path) as server:
        host = server.url.removeprefix("redis://").partition("/")[0]
        admin = Rows(server.url)
        admin.redis.config_set("requirepass", "s3cret/")
        admin.close()
        writer = Rows(f"redis://:s3cret%2F@{host}/3")
        writer.put(1, {b"f": b"three"})
        writer.close()
        key = layout.redis_key(1)
        assert RedisStore(f"redis://:s3cret%2F@{host}/3").fetch([key], [b"f"], 5.0) == [[b"three"]]
        assert RedisStore(f"redis://default:s3cret%2F@{host}/0").fetch([key], [b"f"], 5.0) == [[None]]
        with pytest.raises(StoreUnavailable, match="NOAUTH"):
            RedisStore(server.url).fetch([key], [b"f"], 5.0)
        with pytest.raises(StoreUnavailable, match="WRONGPASS"):
            RedisStore(f"redis://:wrong@{host}").fetch([key], [b"f"], 5.0)


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(StoreUnavailable, match="not resolved"):
        RedisStore("redis://no-such-host.invalid").fetch([b"k"], [b"f"], 1.0)


def test_urls() -> None:
    address = parse_url("rediss://me:p%40ss@example.org:1234/2")
    assert (address.host, address.port, address.tls, address.username, address.password, address.database) == (
        ("example.org", 1234, True, "me", "p@ss", 2)
    )
    assert parse_url("unix:///run/redis.sock?db=4").path == "/run/redis.sock"
    assert parse_url("unix:///run/redis.sock?db=4").database == 4
    for bad in ("http://x", "redis://host:port", "redis://host/first"):
        with pytest.raises(ConfigError):
            parse_url(bad)


def test_the_breaker() -> None:
    now = 0.0
    breaker = CircuitBreaker(failures_to_open=2, retry_after_s=1.0, clock=lambda: now)
    breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert not breaker.allow()
    now = 1.5
    assert breaker.allow()  # one probe
    assert not breaker.allow()
    breaker.succeeded()
    assert breaker.allow()
