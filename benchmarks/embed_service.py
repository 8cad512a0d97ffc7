"""Embed: requests per CPU-second, latency and start-up of tower-serve, against the stack that one usually writes.

    python -m benchmarks.embed_service [--requests 3000] [--repeats 5] [--ready 5] [--no-record]

Both servers read the same rows of the same Redis and answer the same requests with the same release: a 256-wide state,
256 channels of context, 512 hidden units, a 256-wide embedding. First every answer of both is compared with the
release's own computation; then they are timed in turns, each as one process, by one load generator in another.

The rival: grpc.aio on uvloop, redis.asyncio with hiredis, one HMGET, the same row decoder, the head as the eager module
that was trained, under inference_mode, one thread. It has no guard, no metrics, no fallback; ours has them switched on.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import record, versions
from feature_repo import layout
from model.config import TowerConfig
from model.records import Context, Event, SubjectItem
from model.release import Registry

CONFIG = TowerConfig(
    d_model=256, num_layers=2, num_heads=4, embedding_dim=256, head_hidden=512, context_dim=128, hash_rows=1024
)
USERS = 2000
CONCURRENCY = (1, 32)
SPREAD = "min {:.4g}, max {:.4g}"


def state_of(user: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """f32 [256]."""
    return np.random.default_rng(user).standard_normal(CONFIG.d_model).astype(np.float32)


def context_of(user: int, now_us: int) -> Context:
    """What a request of a news or shop page knows: device, time, two events of the session, the item looked at."""
    session = tuple(Event(10 + (user + k) % 50, "click", now_us - (90 - 30 * k) * 1_000_000) for k in range(2))
    return Context({"device": "phone", "country": "br"}, now_us, session, (SubjectItem(10 + user % 50),))


def write_states(redis_url: str, state_version: str, encoded_s: int, until_us: int) -> None:
    """Rows of all users in Redis."""
    import redis

    view = layout.view_name(state_version)
    client: Any = redis.Redis.from_url(redis_url)
    pipe = client.pipeline(transaction=False)
    for user in range(USERS):
        row = layout.StateRow(state_of(user), state_version, until_us, encoded_s * 1_000_000, encoded_s)
        pipe.hset(layout.redis_key(user), mapping=layout.encode_row(row, view))
    pipe.execute()
    client.close()


# The rival


def serve_usual(registry: str, redis_url: str) -> None:
    """The usual stack, in this process, until it is ended."""
    import grpc.aio
    import redis.asyncio
    import torch
    import uvloop

    from online.generated import tower_pb2 as pb
    from online.generated import tower_pb2_grpc

    torch.set_num_threads(1)
    pointer = Registry(registry).pointer()
    assert pointer.serving is not None
    release = Registry(registry).load(pointer.serving)
    fields = layout.row_fields(layout.view_name(release.manifest.state_version))
    client: Any = redis.asyncio.Redis.from_url(redis_url)

    class Servicer(tower_pb2_grpc.UserTowerServicer):
        async def Embed(self, request: Any, context: Any) -> Any:
            values = await client.hmget(layout.redis_key(request.user_id.int_id), fields)
            row = layout.decode_row(values)
            until_us = None if row is None else row.history_until_us
            message = request.context
            known = Context(
                dict(message.features),
                message.timestamp_us,
                tuple(Event(e.item_id.int_id, e.event_type, e.timestamp_us) for e in message.session_events),
                tuple(SubjectItem(s.item_id.int_id, s.confidence) for s in message.subject_items),
            )
            state = release.cold_state if row is None else row.state.copy()
            embedding = release.embed(state[None], [known], [until_us])[0]
            return pb.EmbedReply(embedding=embedding.tolist(), release_id=release.manifest.release_id)

    async def main() -> None:
        server = grpc.aio.server()
        tower_pb2_grpc.add_UserTowerServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"ready port={port}", flush=True)
        await server.wait_for_termination()

    uvloop.run(main())


# The load generator


def generate_load(port: int, pid: int, concurrency: int, requests: int) -> dict[str, float]:
    """Closed loop: each of `concurrency` callers asks, waits, asks again.

    Returns requests per CPU-second of process `pid`, requests per second, p50 and p99 in milliseconds.
    """
    import psutil

    from online.client import EmbedQuery, write_query

    now_us = time.time_ns() // 1000
    messages = [
        write_query(EmbedQuery(user, context_of(user, now_us))).SerializeToString() for user in range(USERS)
    ]  # fmt: skip
    process = psutil.Process(pid)

    def cpu_s() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    run = _load_alone if concurrency == 1 else _load_together
    latencies_s: list[float] = []
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        latencies_s.clear() if not marks else None
        marks.append((cpu_s(), time.perf_counter()))

    run(port, messages, concurrency, requests, latencies_s, mark)
    (cpu_0, wall_0), (cpu_1, wall_1) = marks
    return {
        "rps_per_cpu_s": len(latencies_s) / (cpu_1 - cpu_0),
        "rps": len(latencies_s) / (wall_1 - wall_0),
        "p50_ms": float(np.quantile(latencies_s, 0.5)) * 1e3,
        "p99_ms": float(np.quantile(latencies_s, 0.99)) * 1e3,
    }


METHOD = "/hybridtower.v1.UserTower/Embed"


def _load_alone(port: int, messages: list[bytes], _: int, requests: int, latencies_s: list[float], mark: Any) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD)
        for n in range(-200, requests):
            if n == 0:
                mark()
            started = time.perf_counter()
            call(messages[n % USERS], timeout=10)
            latencies_s.append(time.perf_counter() - started)
        mark()


def _load_together(
    port: int, messages: list[bytes], concurrency: int, requests: int, latencies_s: list[float], mark: Any
) -> None:
    import grpc.aio
    import uvloop

    async def main() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(METHOD)

            async def caller(first: int, count: int) -> None:
                for n in range(count):
                    started = time.perf_counter()
                    await call(messages[(first + n) % USERS], timeout=10)
                    latencies_s.append(time.perf_counter() - started)

            for count in (20, requests // concurrency):
                await asyncio.gather(*(caller(c * USERS // concurrency, count) for c in range(concurrency)))
                mark()

    uvloop.run(main())


# Putting it together


def check(port: int, release: Any, now_us: int, until_us: int) -> float:
    """Largest difference between a server's answers and the release's own; raises where one is wrong."""
    from online.client import UserTowerClient

    worst = 0.0
    with UserTowerClient(f"127.0.0.1:{port}", timeout_s=10) as client:
        for user in range(0, USERS + 20, 20):
            context = context_of(user, now_us)
            known = user < USERS
            state = state_of(user) if known else release.cold_state
            wanted = release.embed(state[None], [context], [until_us if known else None])[0]
            worst = max(worst, float(np.abs(client.embed(user, context).vector - wanted).max()))
    if not worst <= 1e-5:
        raise SystemExit(f"a server's answers differ from the release's by {worst:.2g}; nothing was timed")
    return worst


@contextlib.contextmanager
def server_process(*command: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server that has said that it is ready."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    server = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"{' '.join(command)} did not start: {line!r}")
        said = dict(word.split("=", 1) for word in line.split()[1:])
        yield int(said["port"]), server.pid
    finally:
        server.terminate()
        server.wait(30)


def ours(registry: Path, redis_url: str) -> tuple[str, ...]:
    """tower-serve's command."""
    flags = ("--port", "0", "--metrics-port", "0", "--notice-s", "0", "--log-level", "warning")
    return ("online", "--registry", str(registry), "--redis-url", redis_url, *flags)


def usual(registry: Path, redis_url: str) -> tuple[str, ...]:
    """The rival's command."""
    return ("benchmarks.embed_service", "--usual-server", str(registry), redis_url)


def measure_ready(registry: Path, redis_url: str, times: int) -> list[float]:
    """Seconds from the start of the process to its ready line, files warm."""
    found = []
    for n in range(times + 1):
        started = time.perf_counter()
        with server_process(*ours(registry, redis_url)):
            if n:  # the first one warms the file cache
                found.append(time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000, help="per repeat, server and concurrency")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ready", type=int, default=5, help="how many starts to time")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--usual-server", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.usual_server:
        serve_usual(*options.usual_server)
        return
    if options.load:
        print(json.dumps(generate_load(*options.load)))
        return

    from deploy.redis_server import start_redis
    from tests.releases import make_release

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = folder / "registry"
        manifest = make_release(registry, seed=1, config=CONFIG)
        Registry(registry).commit(manifest.release_id)
        release = Registry(registry).load(manifest.release_id)
        with start_redis(folder / "redis") as server:
            now_us = time.time_ns() // 1000
            encoded_s = now_us // 1_000_000 - 3600
            until_us = (encoded_s - 600) * 1_000_000
            write_states(server.url, manifest.state_version, encoded_s, until_us)

            found: dict[tuple[str, int], list[dict[str, float]]] = {}
            with (
                server_process(*ours(registry, server.url)) as our,
                server_process(*usual(registry, server.url)) as theirs,
            ):
                for who, (port, _) in (("ours", our), ("usual", theirs)):
                    worst = check(port, release, now_us, until_us)
                    print(f"{who}: answers differ from the release's by at most {worst:.1g}")
                for repeat in range(options.repeats):
                    for concurrency in CONCURRENCY:
                        for who, (port, pid) in (("ours", our), ("usual", theirs)):
                            arguments = [port, pid, concurrency, options.requests]
                            command = [sys.executable, "-m", "benchmarks.embed_service", "--load", *map(str, arguments)]
                            with futures.ThreadPoolExecutor(1) as pool:
                                out = pool.submit(subprocess.check_output, command, text=True).result(600)
                            figures = json.loads(out)
                            found.setdefault((who, concurrency), []).append(figures)
                            told = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
                            print(f"repeat {repeat} {who:5} concurrency {concurrency:2}: {told}", flush=True)
            ready_s = measure_ready(registry, server.url, options.ready)

    def values(who: str, concurrency: int, figure: str) -> list[float]:
        return [figures[figure] for figures in found[who, concurrency]]

    def median(who: str, concurrency: int, figure: str) -> float:
        return round(statistics.median(values(who, concurrency, figure)), 3)

    def spread(numbers: list[float]) -> str:
        return SPREAD.format(min(numbers), max(numbers))

    rival = "grpc.aio + uvloop + redis.asyncio + the eager module, without guard and metrics"
    details = {
        (who, concurrency): ", ".join(
            f"{figure} {median(who, concurrency, figure):.4g}"
            for figure in ("rps_per_cpu_s", "rps", "p50_ms", "p99_ms")
        )
        for who, concurrency in found
    }
    shapes = "state 256, head 512 -> 512 -> 256, 2 session events, 1 subject item, 2 context columns"
    shapes += f"; load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    libraries = versions("grpcio", "hiredis", "redis", "numpy", "torch", "uvloop", "protobuf")
    entries = [
        {
            "measure": "embed.rps_per_cpu_s",
            "value": median("ours", 32, "rps_per_cpu_s"),
            "unit": "Embed requests per CPU-second of the server process, 32 callers",
            "target": round(1.5 * median("usual", 32, "rps_per_cpu_s"), 1),
            "rival": rival,
            "rival_value": median("usual", 32, "rps_per_cpu_s"),
            "versions": libraries,
            "note": f"medians of {options.repeats}; {shapes}; target is 1.5 x the rival; "
            f"ours {spread(values('ours', 32, 'rps_per_cpu_s'))}; "
            f"rival {spread(values('usual', 32, 'rps_per_cpu_s'))}; "
            f"32 callers: ours {details['ours', 32]}, rival {details['usual', 32]}",
        },
        {
            "measure": "embed.p50_ms",
            "value": median("ours", 1, "p50_ms"),
            "unit": "ms, one caller on the same machine, its own gRPC client included",
            "target": 1.0,
            "rival": rival,
            "rival_value": median("usual", 1, "p50_ms"),
            "versions": libraries,
            "note": f"medians of {options.repeats}; {shapes}; ours {spread(values('ours', 1, 'p50_ms'))}; "
            f"one caller: ours {details['ours', 1]}, rival {details['usual', 1]}",
        },
        {
            "measure": "serve.ready_s",
            "value": round(statistics.median(ready_s), 2),
            "unit": "s from the start of tower-serve to its ready line, files warm",
            "target": 4.0,
            "versions": libraries,
            "note": f"median of {options.ready}; {spread(ready_s)}; golden inputs replayed, serving head compared; "
            f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores",
        },
    ]
    for entry in entries:
        print(json.dumps(entry, indent=1))
    if not options.no_record:
        record("main_job", entries)


if __name__ == "__main__":
    main()
