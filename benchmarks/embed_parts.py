"""Where an Embed spends its time inside the server: each part called alone, many times, in this process.

    python -m benchmarks.embed_parts [--calls 2000] [--rows 1 8 32]

The requests, the release and the rows in Redis are those of `benchmarks.embed_service`. The last line is the handler as
gRPC calls it, from bytes to bytes, without gRPC. Nothing is recorded: on a shared machine read the minimum, and compare
only runs made one after another.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks.embed_service import CONFIG, context_of, state_of, write_states
from deploy.redis_server import start_redis
from feature_repo import layout
from model.release import Registry
from online import guard, wire
from online.client import EmbedQuery, write_query
from online.engine import process_batch
from online.generated import tower_pb2 as pb
from online.head import ServingHead
from online.metrics import Metrics
from online.residents import Role, resident_set
from online.servicer import BoundedPool, UserTower
from online.settings import Settings
from online.stores.redis import RedisStore
from tests.releases import make_release

USERS = 256


def report(name: str, call: Callable[[int], Any], calls: int) -> None:
    """Print minimum and median of a call, which is given a user."""
    for user in range(min(200, calls)):
        call(user % USERS)
    took_us = []
    for user in range(calls):
        started = time.perf_counter_ns()
        call(user % USERS)
        took_us.append((time.perf_counter_ns() - started) / 1e3)
    print(f"{name:30} {min(took_us):8.1f} {statistics.median(took_us):8.1f}", flush=True)


class NoDeadline:
    """What the handler asks of gRPC about a call."""

    def time_remaining(self) -> None:
        """The caller set no deadline."""

    def abort(self, status: grpc.StatusCode, message: str) -> None:
        raise RuntimeError(f"{status}: {message}")


def main() -> None:
    """Time the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each part")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="sizes of batches")
    options = parser.parse_args()
    calls: int = options.calls
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, start_redis(Path(name) / "redis") as server:
        registry = Registry(Path(name) / "registry")
        manifest = make_release(registry.uri, seed=1, config=CONFIG)
        release = registry.load(manifest.release_id)
        started = time.perf_counter()
        head = ServingHead(release)
        print(f"ServingHead built and compared in {time.perf_counter() - started:.2f} s")
        residents = resident_set(1, {Role.SERVING: (manifest, head)})
        now_us = time.time_ns() // 1000
        encoded_s = now_us // 1_000_000 - 3600
        until_us = (encoded_s - 600) * 1_000_000
        write_states(server.url, manifest.state_version, encoded_s, until_us)

        store = RedisStore(server.url)
        data = [write_query(EmbedQuery(u, context_of(u, now_us))).SerializeToString() for u in range(USERS)]
        messages = [pb.EmbedRequest.FromString(datum) for datum in data]
        deadline = time.monotonic() + 3600

        def read(message: pb.EmbedRequest) -> Any:
            return wire.read_request(message, residents, deadline=deadline, strict_by_default=False)

        requests = [read(message) for message in messages]
        contexts = [request.context for request in requests]
        keys = [layout.redis_key(user) for user in range(USERS)]
        rows = store.fetch(keys, residents.fields, 1.0)
        limits = guard.Limits(now_us)
        state_UD = np.stack([state_of(user) for user in range(USERS)])

        def of(user: int, size: int) -> slice:
            start = min(user, USERS - size)
            return slice(start, start + size)

        def process(some: slice) -> Any:
            return process_batch(requests[some], residents, store, now_us=now_us, store_timeout_s=1.0)

        answered = process(slice(0, USERS))
        metrics = Metrics()

        def count(user: int) -> None:
            metrics.answered(answered[user])
            metrics.took("Embed", 1e-3)

        print(f"{'microseconds':30} {'min':>8} {'median':>8}")
        report("parse the message", lambda u: pb.EmbedRequest.FromString(data[u]), calls)
        report("wire.read_request", lambda u: read(messages[u]), calls)
        report("guard.decide", lambda u: guard.decide(rows[u], residents, limits, strict=False), calls)
        report("wire.write_reply", lambda u: wire.write_reply(answered[u]), calls)
        report("metrics", count, calls)

        def report_batch(size: int) -> None:
            until: list[int | None] = [until_us] * size
            fields, contexts_of = residents.fields, release.featuriser.context_arrays
            report(f"store.fetch, {size}", lambda u: store.fetch(keys[of(u, size)], fields, 1.0), calls)
            report(f"context_arrays, {size}", lambda u: contexts_of(contexts[of(u, size)], until), calls)
            report(
                f"head.embed, {size}", lambda u: head.embed(state_UD[of(u, size)], contexts[of(u, size)], until), calls
            )
            report(f"process_batch, {size}", lambda u: process(of(u, size)), calls)

        for size in options.rows:
            report_batch(size)

        pool = BoundedPool(1, 1, "embed")
        settings = Settings(registry=registry.uri, redis_url=server.url)
        tower = UserTower(settings, lambda: residents, store, metrics, pool, pool)
        handler = tower.service(_Call("/hybridtower.v1.UserTower/Embed"))
        assert handler is not None
        parse, embed, caller = handler.request_deserializer, handler.unary_unary, NoDeadline()
        report("the whole handler", lambda u: embed(parse(data[u]), caller), calls)
        pool.shutdown()


class _Call:
    """Names a method, as gRPC does when it asks for the handler."""

    def __init__(self, method: str) -> None:
        self.method = method


if __name__ == "__main__":
    main()
