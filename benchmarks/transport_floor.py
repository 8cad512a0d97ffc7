"""What grpcio alone costs: a handler that does nothing, by kind of server, one caller. No Embed can be faster.

python -m benchmarks.transport_floor [--requests 1000] [--repeats 5]
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from concurrent import futures
from typing import Any

import grpc
import uvloop

from benchmarks.results import record, versions

METHOD = "/floor.Floor/Echo"
REQUEST, REPLY = b"q" * 150, b"r" * 1_100  # about what Embed sends and gets
SERVERS = ("sync, 8 threads", "sync, 1 thread", "aio", "aio on uvloop")


def serve(kind: str) -> None:
    """Serve on a free port, which is printed, until ended."""

    def handler(behaviour: Any) -> Any:
        rpc = grpc.unary_unary_rpc_method_handler(behaviour)
        return grpc.method_handlers_generic_handler("floor.Floor", {"Echo": rpc})

    if kind.startswith("sync"):
        server = grpc.server(futures.ThreadPoolExecutor(8 if "8" in kind else 1))
        server.add_generic_rpc_handlers((handler(lambda request, context: REPLY),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        server.start()
        server.wait_for_termination()
        return

    async def echo(request: bytes, context: Any) -> bytes:
        return REPLY

    async def main() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler(echo),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        await server.start()
        await server.wait_for_termination()

    if kind == "aio":
        asyncio.run(main())
    else:
        uvloop.run(main())


def p50_ms(port: int, requests: int) -> float:
    """Median latency of one caller."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD)
        latencies_s = []
        for number in range(requests + 50):
            started = time.perf_counter()
            assert call(REQUEST, timeout=10) == REPLY
            if number >= 50:
                latencies_s.append(time.perf_counter() - started)
    return 1e3 * statistics.median(latencies_s)


def main() -> None:
    """Time the servers in turns, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    command = [sys.executable, "-m", "benchmarks.transport_floor", "--serve"]
    processes = {kind: subprocess.Popen([*command, kind], stdout=subprocess.PIPE, text=True) for kind in SERVERS}
    try:
        ports = {kind: int(process.stdout.readline()) for kind, process in processes.items() if process.stdout}
        figures: dict[str, list[float]] = {kind: [] for kind in SERVERS}
        for _ in range(given.repeats):
            for kind in SERVERS:
                figures[kind].append(p50_ms(ports[kind], given.requests))
    finally:
        for process in processes.values():
            process.terminate()
            process.wait(10)
    medians = {kind: statistics.median(values) for kind, values in figures.items()}
    for kind in SERVERS:
        print(f"{kind:16} p50 {medians[kind]:.3f} ms (min {min(figures[kind]):.3f}, max {max(figures[kind]):.3f})")
    record(
        "main_job",
        [
            {
                "measure": "embed.transport_floor_p50_ms",
                "value": round(medians[SERVERS[0]], 3),
                "unit": "ms, one caller, a handler that does nothing",
                "versions": versions("grpcio", "uvloop"),
                "note": "; ".join(f"{kind}: {medians[kind]:.3f}" for kind in SERVERS),
            }
        ],
    )


if __name__ == "__main__":
    main()
