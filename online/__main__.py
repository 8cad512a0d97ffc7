"""tower-serve: the gRPC service.

With --workers N, N processes of this same program listen on one port and the kernel spreads connections over them;
this process only starts them, passes signals on, and ends when one of them does.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from model.errors import TowerError
from online.settings import POLICIES, Settings

_EPILOG = """\
One line on stdout says when requests are answered:
  ready port=50051 metrics_port=9464 epoch=3 release=20260101T030000-1f2e3d4c
Until a release is committed to the registry the health service says NOT_SERVING and the line waits.

The service follows the registry's pointer: a commit or a rollback needs no restart. A release whose golden inputs give
other results on this machine is refused, and the one that serves stays. While it runs, each process holds a lease
(<registry>/leases) that names what it has loaded; a registry that cannot be written is told in log and metrics.

Retrieve (hybridtower.v1.Recommender) searches the items of the answering release's own embedding version. Until
`tower-release prepare` has written them, Embed works and Retrieve says FAILED_PRECONDITION. Item updates, and
events for releases with live item features, come over Redis (`tower-feed`); a log line says how far back events reach.

SIGTERM or SIGINT: health says NOT_SERVING at once; requests are still taken for --notice-s, so that load balancers can
look away; then requests in progress get --drain-s to end.

Try it:  tower-serve --registry ./registry --redis-url redis://127.0.0.1:6379/0 --port 50051
         grpcurl -plaintext -d '{"user_id": {"int_id": 7}}' 127.0.0.1:50051 hybridtower.v1.UserTower/Embed
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line. Defaults are those of `Settings`."""
    parser = argparse.ArgumentParser(
        prog="tower-serve",
        description="Answer gRPC requests with user embeddings: the state stored for a user, and what is true right "
        "now, through the head of the serving release.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--registry", required=True, metavar="URI", help="the release registry: a folder or an fsspec URI")
    add("--redis-url", default=os.environ.get("REDIS_URL"), metavar="URL",
        help="where the user states are (default: REDIS_URL); redis://, rediss:// or unix://")  # fmt: skip
    add("--bind", default="127.0.0.1", metavar="ADDRESS",
        help="network interface to listen on; 0.0.0.0 for all (default: %(default)s)")  # fmt: skip
    add("--port", type=int, default=50051, help="gRPC port; 0 picks a free one (default: %(default)s)")
    add("--metrics-port", type=int, default=9464, metavar="PORT",
        help="HTTP port of /metrics, for worker i the i-th after; 0: free ones (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=1, help="processes that share the port, one a core (default: %(default)s)")
    add("--threads", type=int, default=8, help="requests taken in at once by a process (default: %(default)s)")
    add("--max-queue", type=int, default=256, metavar="N",
        help="requests that may wait in a process; more get RESOURCE_EXHAUSTED (default: %(default)s)")  # fmt: skip
    add("--policy", choices=POLICIES, default="cold_start",
        help="without a usable state and where the request does not say: answer from the learned cold-start state, "
        "flagged, or fail (default: %(default)s)")  # fmt: skip
    add("--device", default="cpu",
        help="where the item index is searched: cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip
    add("--live-hours", type=float, default=168.0, metavar="H",
        help="how long events count for releases with live item features; `tower-feed events --keep-h` as long "
        "(default: %(default)s)")  # fmt: skip
    add("--live-events", type=int, default=5_000_000, metavar="N",
        help="most events kept to be counted, the latest (default: %(default)s)")  # fmt: skip
    add("--deadline-ms", type=float, default=250.0, metavar="MS",
        help="for requests that set no deadline (default: %(default)s)")  # fmt: skip
    add("--store-timeout-ms", type=float, default=50.0, metavar="MS",
        help="longest wait for Redis before the cold-start answer (default: %(default)s)")  # fmt: skip
    add("--max-state-age", type=float, metavar="SECONDS", dest="max_state_age_s",
        help="do not use states encoded longer ago. Users without new events are not encoded again, so allow for the "
        "longest idle time you want served (default: any age)")  # fmt: skip
    add("--poll-ms", type=float, default=1000.0, metavar="MS",
        help="how often to look at the serving pointer (default: %(default)s)")  # fmt: skip
    add("--lease-s", type=float, default=30.0, metavar="S",
        help="how long the registry counts on this process without hearing from it; what a live lease names is not "
        "collected (default: %(default)s)")  # fmt: skip
    add("--canary-s", type=float, default=10.0, metavar="S",
        help="how often to check the canary users of each loaded release; 0: never (default: %(default)s)")  # fmt: skip
    add("--notice-s", type=float, default=1.0, metavar="S",
        help="after SIGTERM, time for load balancers to look away (default: %(default)s)")  # fmt: skip
    add("--drain-s", type=float, default=10.0, metavar="S",
        help="after that, time for requests in progress (default: %(default)s)")  # fmt: skip
    add("--tls-cert", metavar="PEM", help="certificate chain; with --tls-key the port speaks TLS only")
    add("--tls-key", metavar="PEM")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default: %(default)s)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop. Returns the process's exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    values = vars(parser.parse_args(arguments))
    is_worker = values.pop("worker")
    logging.basicConfig(
        level=values.pop("log_level").upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )  # fmt: skip
    if not values["redis_url"]:
        parser.error("--redis-url or the environment variable REDIS_URL must say where the user states are")
    try:
        settings = Settings(**values)
        if settings.workers > 1:
            return _supervise(settings, arguments)
        return _serve(settings, is_worker)
    except TowerError as error:
        parser.exit(2, f"tower-serve: {error}\n")


def _serve(settings: Settings, is_worker: bool) -> int:
    # One core a process, workers multiply. Read when numpy and torch are first imported, so set before that.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    told_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_stop.set())
    if is_worker:
        threading.Thread(target=_wait_for_parent, args=(told_to_stop,), daemon=True).start()

    from online.server import Server  # torch takes seconds; --help and bad flags should not

    server = Server(settings, reuse_port=is_worker)

    def say_ready() -> None:
        server.ready.wait()
        residents = server.follower.current
        assert residents is not None
        print(
            f"ready port={server.port} metrics_port={server.metrics_port} epoch={residents.epoch} "
            f"release={residents.serving.release_id}",
            flush=True,
        )

    threading.Thread(target=say_ready, daemon=True).start()
    server.start()
    if not server.ready.is_set():
        logging.getLogger(__name__).warning("no release to serve yet in %s; waiting for a commit", settings.registry)
    told_to_stop.wait()
    server.drain()
    return 0


def _wait_for_parent(told_to_stop: threading.Event) -> None:
    """A worker's stdin ends when the process that started it does."""
    sys.stdin.buffer.read()
    told_to_stop.set()


def _supervise(settings: Settings, arguments: list[str]) -> int:
    """Start the workers, wait until all are ready, pass a signal on, end when one ends."""
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as placeholder:  # bound, never listening: it only holds the port
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        placeholder.bind((settings.bind, settings.port))
        port = placeholder.getsockname()[1]
        settings = replace(settings, port=port)
        workers = []
        for i in range(settings.workers):
            metrics_port = settings.metrics_port + i if settings.metrics_port else 0
            flags = ["--worker", "--workers", "1", "--port", str(port), "--metrics-port", str(metrics_port)]
            command = [sys.executable, "-m", "online", *arguments, *flags]
            workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

        ended = threading.Event()
        told_to_stop = threading.Event()
        ready: list[str] = []

        def follow(worker: "subprocess.Popen[str]") -> None:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("ready "):
                    ready.append(line)
                    if len(ready) == len(workers):
                        fields = dict(word.split("=", 1) for word in line.split()[1:])
                        print(
                            f"ready port={port} metrics_port={settings.metrics_port} epoch={fields['epoch']} "
                            f"release={fields['release']} workers={len(workers)}",
                            flush=True,
                        )
            ended.set()

        def stop(*_: object) -> None:
            told_to_stop.set()
            ended.set()

        for worker in workers:
            threading.Thread(target=follow, args=(worker,), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        ended.wait()
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        longest_s = settings.notice_s + settings.drain_s + 5
        codes = []
        for worker in workers:
            try:
                codes.append(worker.wait(longest_s))
            except subprocess.TimeoutExpired:
                worker.kill()
                codes.append(worker.wait())
        if not told_to_stop.is_set():
            print("tower-serve: a worker ended by itself; stopped the others", file=sys.stderr)
            return next((abs(code) for code in codes if code), 1)
        return 0 if not any(codes) else 1


if __name__ == "__main__":
    sys.exit(main())
