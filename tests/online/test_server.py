"""A real server on port 0 with a real Redis and real releases."""

import socket
import threading
import time
import urllib.request
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.redis_server import start_redis
from feature_repo import layout
from model.config import TowerConfig
from model.errors import ConfigError
from model.hybrid_tower import HybridTower
from model.records import Context, UserState
from model.release import Registry
from online.client import Embedding, EmbedQuery, RowError, UserTowerClient
from online.generated import tower_pb2 as pb
from online.server import Server
from online.servicer import RECOMMENDER, SERVICE
from online.settings import Settings
from tests.online.conftest import World
from tests.online.helpers import (
    HOUR_US,
    NOW_US,
    Rows,
    context_of,
    fresh_users,
    row_bytes,
    serving,
    stored_state,
    wait_until,
)
from tests.releases import make_description, make_release, make_tower

Health = health_pb2.HealthCheckResponse


def health_of(client: UserTowerClient, service: str = "") -> Any:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def status_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code


def test_exact_cold_and_strict(world: World, rows: Rows, redis_server: str) -> None:
    user = fresh_users()
    manifest = Registry(world.registry).manifest(world.a.release_id)
    Registry(world.registry).commit(world.a.release_id)
    rows.put_states(range(user, user + 20), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        for known in range(user, user + 20):
            reply = client.embed(known, context_of(known), policy="strict")
            assert (reply.answer, reply.reason, reply.epoch) == ("EXACT", "", 1)
            assert reply.embedding_version == manifest.embedding_version
            assert 0 < reply.state_age_us < 48 * HOUR_US
            assert np.linalg.norm(reply.vector) == pytest.approx(1.0, abs=1e-5)
            assert world.oracle.is_honest(reply, known)
        stranger = user + 50
        reply = client.embed(stranger, context_of(stranger))
        assert (reply.answer, reply.reason, reply.state_age_us) == ("COLD_START", "unknown_user", 0)
        assert world.oracle.is_honest(reply, stranger)
        assert status_of(lambda: client.embed(stranger, policy="strict")) is grpc.StatusCode.FAILED_PRECONDITION


def test_the_split_path_equals_the_undivided_model(tmp_path: Path, rows: Rows, redis_server: str) -> None:
    """History to state, to Redis, to the service: the embedding that the whole model computes."""
    import pyarrow as pa

    tower, items = make_tower(seed=3)
    registry = Registry(tmp_path)
    manifest = registry.write(tower, items, trained_until_us=1_600_000_000_000_000)
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    user, random = fresh_users(), np.random.default_rng(0)
    lengths = [1, 3, 12, 20]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    base_us = (NOW_US - 10 * HOUR_US) // 1_000_000 * 1_000_000
    table = pa.table(
        {
            "item_id": random.integers(5, 70, total),
            "event_type": random.choice(["click", "view"], total),
            "timestamp_us": np.concatenate([base_us + np.arange(n) * 60_000_000 for n in lengths]),
            "surface": random.choice(["feed", "search"], total),
        }
    )
    contexts = [context_of(user + n) for n in range(len(lengths))]
    states = release.encode(table, offsets)
    for n, state_D in enumerate(states):
        until_us = table["timestamp_us"][int(offsets[n + 1]) - 1].as_py()
        rows.put(user + n, row_bytes(UserState(state_D, manifest.state_version, until_us, base_us + 5 * HOUR_US)))
    wanted = tower.embed(table, offsets, contexts)
    assert isinstance(tower, HybridTower)
    with serving(tmp_path, redis_server) as (_, client):
        for n, context in enumerate(contexts):
            reply = client.embed(user + n, context, policy="strict")
            np.testing.assert_allclose(reply.vector, wanted[n], atol=1e-5)


def test_string_ids_and_query_vectors(tmp_path: Path, rows: Rows, redis_server: str) -> None:
    config = TowerConfig(d_model=16, num_layers=1, embedding_dim=8, context_dim=8, head_hidden=8, query_dim=3)
    manifest = make_release(tmp_path, seed=6, config=config, description=make_description(ids="string"))
    registry = Registry(tmp_path)
    registry.commit(manifest.release_id)
    state = stored_state(1, manifest.state_version)
    rows.put("anna", row_bytes(state))
    context = Context(timestamp_us=NOW_US, query_vector=np.array([1, 2, 3], np.float32))
    wanted = registry.load(manifest.release_id).embed(state.state_D[None], [context], [state.history_until_us])[0]
    with serving(tmp_path, redis_server) as (_, client):
        np.testing.assert_allclose(client.embed("anna", context, policy="strict").vector, wanted, atol=1e-5)
        assert status_of(lambda: client.embed(7)) is grpc.StatusCode.INVALID_ARGUMENT
        short = Context(query_vector=np.ones(2, np.float32))
        assert status_of(lambda: client.embed("anna", short)) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_batch_answers_row_by_row(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 10), world.b.state_version)
    rows.put_states(range(user + 10, user + 20), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        users = list(range(user, user + 30))
        queries = [EmbedQuery(u, context_of(u), accept_previous_release=True) for u in users]
        queries[5] = EmbedQuery("anna")
        queries[25] = EmbedQuery(users[25], policy="strict")
        replies = client.embed_batch(queries)
        assert len(replies) == 30
        for u, reply in zip(users, replies, strict=True):
            n = u - user
            if n in (5, 25):
                assert isinstance(reply, RowError)
                wanted = grpc.StatusCode.INVALID_ARGUMENT if n == 5 else grpc.StatusCode.FAILED_PRECONDITION
                assert reply.status is wanted
                continue
            assert isinstance(reply, Embedding)
            assert reply.answer == ("EXACT" if n < 10 else "PREVIOUS_RELEASE" if n < 20 else "COLD_START")
            assert world.oracle.is_honest(reply, u)
        assert client.embed_batch([]) == []
        too_many = [EmbedQuery(1)] * 1025
        assert status_of(lambda: client.embed_batch(too_many)) is grpc.StatusCode.INVALID_ARGUMENT


def test_expected_embedding_version(world: World, rows: Rows, redis_server: str) -> None:
    """The two heads of one encoder: each answers to its own version from the same row."""
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.h.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server) as (_, client):
        for manifest, answer in ((world.h, "EXACT"), (world.a, "PREVIOUS_RELEASE")):
            reply = client.embed(user, context_of(user), expected_embedding_version=manifest.embedding_version)
            assert (reply.release_id, reply.answer) == (manifest.release_id, answer)
            assert world.oracle.is_honest(reply, user)
        for policy in ("strict", "cold_start"):
            unknown = lambda policy=policy: client.embed(  # noqa: E731
                user, policy=policy, expected_embedding_version=world.b.embedding_version
            )
            assert status_of(unknown) is grpc.StatusCode.FAILED_PRECONDITION


def test_the_servers_policy_is_the_default(world: World, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    with serving(world.registry, redis_server, policy="strict") as (_, client):
        assert status_of(lambda: client.embed(fresh_users())) is grpc.StatusCode.FAILED_PRECONDITION
        assert client.embed(fresh_users(), policy="cold_start").answer == "COLD_START"


def test_a_state_may_be_too_old(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server, max_state_age_s=60.0) as (_, client):
        assert client.embed(user).reason == "too_old"


# Start and health


def test_not_serving_until_a_release_is_committed(world: World, redis_server: str) -> None:
    with serving(world.registry, redis_server) as (server, client):
        assert health_of(client) == health_of(client, SERVICE) == Health.NOT_SERVING
        assert status_of(lambda: client.embed(1)) is grpc.StatusCode.UNAVAILABLE
        assert not server.ready.is_set()
        Registry(world.registry).commit(world.a.release_id)
        assert server.ready.wait(10)
        assert health_of(client) == health_of(client, SERVICE) == Health.SERVING
        assert client.embed(fresh_users()).epoch == 1


def test_reflection_knows_the_service(world: World, redis_server: str) -> None:
    with serving(world.registry, redis_server) as (_, client):
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=5)
        assert {SERVICE, RECOMMENDER} <= {service.name for service in answer.list_services_response.service}


def test_metrics(world: World, rows: Rows, redis_server: str) -> None:
    Registry(world.registry).commit(world.a.release_id)
    user = fresh_users()
    rows.put_states(range(user, user + 1), world.a.state_version)
    with serving(world.registry, redis_server) as (server, client):
        client.embed(user)
        client.embed(user + 1)
        status_of(lambda: client.embed("x"))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as response:
            text = response.read().decode()
    release = world.a.release_id
    for line in (
        f'tower_embeddings_total{{answer="EXACT",reason="",release="{release}"}} 1.0',
        f'tower_embeddings_total{{answer="COLD_START",reason="unknown_user",release="{release}"}} 1.0',
        'tower_errors_total{method="Embed",status="INVALID_ARGUMENT"} 1.0',
        'tower_latency_seconds_count{method="Embed"} 3.0',
        "tower_state_age_seconds_count 1.0",
        "tower_epoch 1.0",
        f'release="{release}",role="serving"',
    ):
        assert line in text


def test_a_port_in_use_is_told(world: World, redis_server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(registry=str(world.registry), redis_url=redis_server, port=port, metrics_port=0)
        with pytest.raises(ConfigError, match=str(port)):
            Server(settings)


@pytest.mark.parametrize(
    "wrong",
    [{"workers": 0}, {"threads": 0}, {"port": -1}, {"deadline_ms": 0}, {"max_queue": -1}, {"policy": "maybe"},
     {"max_state_age_s": 0}, {"lease_s": 0}, {"lease_s": float("inf")}, {"canary_s": -1}, {"tls_cert": "a.pem"}],
)  # fmt: skip
def test_nonsense_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(registry="r", redis_url="redis://x", **wrong)


# Overload and deadlines


class SlowHead:
    """A head that waits to be let go."""

    def __init__(self, release: Any) -> None:
        self.release = release
        self.cold_state = release.cold_state
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)

    def embed(self, *args: Any) -> Any:
        self.entered.release()
        assert self.go.wait(30)
        return self.release.embed(*args)


def slow_server(
    world: World, url: str, *, make: Any = SlowHead, **settings: Any
) -> tuple[Server, SlowHead, UserTowerClient]:
    heads: list[SlowHead] = []

    def make_head(release: Any) -> SlowHead:
        heads.append(make(release))
        return heads[-1]

    Registry(world.registry).commit(world.a.release_id)
    defaults: dict[str, Any] = {"port": 0, "metrics_port": 0, "notice_s": 0.0, "store_timeout_ms": 1000.0}
    defaults["canary_s"] = 0.0  # these tests count who enters the head
    server = Server(Settings(registry=str(world.registry), redis_url=url, **(defaults | settings)), make_head=make_head)
    server.start()
    return server, heads[0], UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=30)


def test_the_queue_has_a_bound(world: World, redis_server: str) -> None:
    """2 taken in, 3 wait, the others are refused at once; health still answers."""
    server, head, client = slow_server(world, redis_server, threads=2, max_queue=3)
    user = fresh_users()
    try:
        with futures.ThreadPoolExecutor(8) as pool:
            admitted = [pool.submit(client.embed, user + n) for n in range(2)]
            assert head.entered.acquire(timeout=10)
            admitted += [pool.submit(client.embed, user + n) for n in range(2, 5)]
            wait_until(lambda: server.pool.is_full)
            started = time.monotonic()
            for n in range(5):
                assert status_of(lambda n=n: client.embed(user + n)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert status_of(lambda: client.retrieve(user)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert health_of(client) == Health.SERVING
            assert time.monotonic() - started < 5
            head.go.set()
            assert [f.result(30).answer for f in admitted] == ["COLD_START"] * 5
        assert client.embed(user).answer == "COLD_START"
    finally:
        head.go.set()
        client.close()
        server.stop()


def test_a_request_whose_deadline_passes_in_the_queue_is_dropped(world: World, redis_server: str) -> None:
    server, head, client = slow_server(world, redis_server, threads=1)
    hasty = UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=0.2)
    user = fresh_users()
    try:
        with futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.embed, user)
            assert head.entered.acquire(timeout=10)
            assert status_of(lambda: hasty.embed(user + 1)) is grpc.StatusCode.DEADLINE_EXCEEDED
            head.go.set()
            assert first.result(30).answer == "COLD_START"
        assert client.embed(user).answer == "COLD_START"
        assert head.entered.acquire(timeout=1)
        assert not head.entered.acquire(blocking=False), "the head ran for a request that nobody waited for"
    finally:
        head.go.set()
        hasty.close()
        client.close()
        server.stop()


def test_drain_finishes_what_is_in_progress_and_takes_no_more(world: World, redis_server: str) -> None:
    server, head, client = slow_server(world, redis_server, notice_s=0.3, drain_s=20.0)
    user = fresh_users()
    try:
        with futures.ThreadPoolExecutor(2) as pool:
            health_of(client)
            first = pool.submit(client.embed, user)
            assert head.entered.acquire(timeout=10)
            drained = pool.submit(server.drain)
            wait_until(lambda: health_of(client) == Health.NOT_SERVING, 0.3)
            time.sleep(0.6)
            assert not drained.done()
            assert status_of(lambda: client.embed(user + 1)) is grpc.StatusCode.UNAVAILABLE
            head.go.set()
            assert first.result(10).answer == "COLD_START"
            drained.result(10)
    finally:
        head.go.set()
        client.close()


def test_drain_has_a_bound(world: World, redis_server: str) -> None:
    server, head, client = slow_server(world, redis_server, drain_s=0.2)
    try:
        with futures.ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(client.embed, fresh_users())
            assert head.entered.acquire(timeout=10)
            started = time.monotonic()
            server.drain()
            assert time.monotonic() - started < 5
            with pytest.raises(grpc.RpcError):
                stuck.result(10)
    finally:
        head.go.set()
        client.close()


def test_one_request_that_breaks_the_head_does_not_cost_its_batch(world: World, redis_server: str) -> None:
    class Picky(SlowHead):
        def embed(self, states: Any, contexts: Any, until_us: Any) -> Any:
            found = super().embed(states, contexts, until_us)
            if any(context.timestamp_us == 13 for context in contexts):
                raise RuntimeError("thirteen")
            return found

    server, head, client = slow_server(world, redis_server, make=Picky, deadline_ms=30_000.0)
    user = fresh_users()
    try:
        with futures.ThreadPoolExecutor(4) as pool:
            first = pool.submit(client.embed, user)
            assert head.entered.acquire(timeout=10)
            good = [pool.submit(client.embed, user + n) for n in range(2)]
            bad = pool.submit(client.embed, user, Context(timestamp_us=13))
            wait_until(lambda: len(server.tower.combiner.waiting) == 3)
            head.go.set()
            assert [f.result(30).answer for f in (first, *good)] == ["COLD_START"] * 3
            assert status_of(lambda: bad.result(30)) is grpc.StatusCode.INTERNAL
    finally:
        head.go.set()
        client.close()
        server.stop()


def test_an_error_of_ours_is_internal_and_tells_nothing(world: World, redis_server: str, caplog: Any) -> None:
    class Broken:
        def __init__(self, release: Any) -> None:
            self.cold_state = release.cold_state

        def embed(self, *args: Any) -> Any:
            raise RuntimeError("secret detail")

    Registry(world.registry).commit(world.a.release_id)
    server = Server(
        Settings(registry=str(world.registry), redis_url=redis_server, port=0, metrics_port=0), make_head=Broken
    )
    server.start()
    try:
        with UserTowerClient(f"127.0.0.1:{server.port}") as client, pytest.raises(grpc.RpcError) as caught:
            client.embed(fresh_users())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()
        assert "secret detail" in caplog.text
    finally:
        server.stop()


# Redis away


@pytest.mark.parametrize("outage", ["stopped", "stalled"])
def test_redis_goes_away_and_comes_back(world: World, tmp_path: Path, outage: str) -> None:
    """Cold answers (UNAVAILABLE for strict) in time while it is away, full answers again afterwards."""
    Registry(world.registry).commit(world.a.release_id)
    user = fresh_users()
    users = range(user, user + 20)
    with start_redis(tmp_path / "redis", persist=True) as redis:
        rows = Rows(redis.url)
        rows.put_states(users, world.a.state_version)
        with serving(world.registry, redis.url, store_timeout_ms=200.0) as (_, client):
            assert all(client.embed(u, policy="strict").answer == "EXACT" for u in users)
            redis.stop() if outage == "stopped" else redis.pause()
            for u in users:
                started = time.monotonic()
                reply = client.embed(u, context_of(u))
                assert (reply.answer, reply.reason) == ("COLD_START", "store_unavailable")
                assert world.oracle.is_honest(reply, u)
                assert status_of(lambda u=u: client.embed(u, policy="strict")) is grpc.StatusCode.UNAVAILABLE
                assert time.monotonic() - started < 5
            redis.start() if outage == "stopped" else redis.resume()
            wait_until(lambda: client.embed(user).answer == "EXACT")
            assert all(client.embed(u, policy="strict").answer == "EXACT" for u in users)
        rows.close()


def test_tls(world: World, redis_server: str, tmp_path: Path) -> None:
    import subprocess

    pytest.importorskip("ssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    Registry(world.registry).commit(world.a.release_id)
    with serving(world.registry, redis_server, tls_cert=str(cert), tls_key=str(key)) as (server, _):
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with UserTowerClient(f"localhost:{server.port}", credentials=credentials, timeout_s=10) as client:
            assert client.embed(fresh_users()).answer == "COLD_START"


def test_the_reply_names_every_field(world: World, redis_server: str) -> None:
    """The raw message, as another language's client sees it."""
    Registry(world.registry).commit(world.a.release_id)
    with serving(world.registry, redis_server) as (_, client):
        call = client.channel.unary_unary(
            f"/{SERVICE}/Embed", pb.EmbedRequest.SerializeToString, pb.EmbedReply.FromString
        )
        reply = call(pb.EmbedRequest(user_id=pb.Id(int_id=fresh_users())), timeout=10)
    assert len(reply.embedding) == 16
    assert reply.release_id == world.a.release_id
    assert (reply.state_version, reply.embedding_version) == (world.a.state_version, world.a.embedding_version)
    assert (reply.epoch, reply.answer, reply.reason) == (1, pb.ANSWER_COLD_START, "unknown_user")
    assert layout.view_name(reply.state_version) == f"user_state__{world.a.state_version}"
