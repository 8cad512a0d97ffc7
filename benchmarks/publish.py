"""States into Redis: rows a second and core of the publisher, beside Feast's own Redis write; memory a user.

    python -m benchmarks.publish

It first publishes some rows and reads them back, decoded, and through stock Feast. Then it times whole publishes of an
Arrow table, in turns with Feast's `online_write_batch` in batches of 1,000 (already converted to protobuf: the rival is
given the part of its work that is not writing). Every round is a new day, so every row is compared, wins and is
overwritten. "per core" divides rows by the processor time of client and server together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import redis

from benchmarks.results import record, versions
from deploy.redis_server import RunningRedis, start_redis
from feature_repo import layout
from pipelines.transforms.publish import PublishCounts, connect, publish_table

VERSION = "0123456789abcdef"
VIEW = layout.view_name(VERSION)
DAY_S = 86_400
FIRST_DAY_S = 1_507_950_000
TARGET = 30_000


@dataclass(frozen=True)
class Timing:
    """Seconds of one publish of `rows` rows."""

    rows: int
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float

    @property
    def per_core(self) -> float:
        """Rows a second of processor time, client and server together."""
        return self.rows / (self.client_cpu_s + self.server_cpu_s)


def rival() -> None:
    """Stock Feast in a process of its own, told what to do line by line; its answers are lines of JSON."""
    from datetime import UTC, datetime

    from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import FloatList, Value
    from feast.types import Array, Float32, Int64, String

    asked = json.loads(sys.stdin.readline())
    config = RepoConfig(
        project=layout.PROJECT,
        provider="local",
        registry="unused.db",
        entity_key_serialization_version=3,
        online_store={"type": "redis", "connection_string": asked["redis"]},
    )
    types = {"state": Array(Float32), "state_version": String, "history_until": Int64, "encoded_at": Int64}
    view = FeatureView(
        name=VIEW,
        entities=[Entity(name=layout.ENTITY, join_keys=[layout.ENTITY], value_type=ValueType.INT64)],
        schema=[Field(name=name, dtype=dtype) for name, dtype in types.items()],
        source=FileSource(path="unused"),
    )
    store = RedisOnlineStore()
    keys = [
        EntityKey(join_keys=[layout.ENTITY], entity_values=[Value(int64_val=user)]) for user in range(asked["users"])
    ]
    rows = store.online_read(config, view, keys[:5])
    print(json.dumps([[at.timestamp(), list(row["state"].float_list_val.val)] for at, row in rows]), flush=True)
    states = np.random.default_rng(1).normal(size=(asked["users"], asked["width"])).astype(np.float32)
    for line in sys.stdin:
        as_of_s = int(line)
        shared = {
            "state_version": Value(string_val=VERSION),
            "history_until": Value(int64_val=as_of_s * 1_000_000 - 1),
            "encoded_at": Value(int64_val=as_of_s * 1_000_000),
        }
        written_at = datetime.fromtimestamp(as_of_s, UTC)
        data = [
            (key, {"state": Value(float_list_val=FloatList(val=state)), **shared}, written_at, None)
            for key, state in zip(keys, states, strict=True)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(data), 1000):
            store.online_write_batch(config, view, data[start : start + 1000], None)
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


def make_table(users: int, width: int, as_of_s: int) -> pa.Table:
    """States of one run for users 0 to U-1."""
    rng = np.random.default_rng(width)
    offsets = pa.array(np.arange(users + 1, dtype=np.int32) * width)
    values = pa.array(rng.normal(size=users * width).astype(np.float32))
    as_of_us = np.full(users, as_of_s * 1_000_000)
    return pa.table(
        {
            "user_id": pa.array(np.arange(users)),
            "state": pa.ListArray.from_arrays(offsets, values),
            "state_version": pa.array([VERSION] * users),
            "history_until": pa.array(as_of_us - rng.integers(1, DAY_S * 1_000_000, users)),
            "encoded_at": pa.array(as_of_us),
            "event_timestamp": pa.array(as_of_us, pa.timestamp("us", "UTC")),
        }
    )


def timed(server: RunningRedis, client: redis.Redis, table: pa.Table) -> Timing:
    """Times one publish, all of whose rows must win."""
    server_cpu_s = _server_cpu_s(server)
    wall, client_cpu = time.perf_counter(), time.process_time()
    counts = publish_table(client, table, VERSION, 1)
    wall_s, client_cpu_s = time.perf_counter() - wall, time.process_time() - client_cpu
    assert counts == PublishCounts(written=table.num_rows), counts
    return Timing(table.num_rows, wall_s, client_cpu_s, _server_cpu_s(server) - server_cpu_s)


def check(client: Any, table: pa.Table, as_of_s: int) -> None:
    """The rows of the first users read back as they were given, and an older run loses."""
    for user in range(5):
        row = layout.decode_row(client.hmget(layout.redis_key(user), layout.row_fields(VIEW)))
        assert row is not None
        assert row.state.tolist() == table["state"][user].as_py()
        assert (row.state_version, row.event_timestamp_s) == (VERSION, as_of_s)
        assert row.history_until_us == table["history_until"][user].as_py()
    older = make_table(100, 1, as_of_s - DAY_S)
    assert publish_table(client, older, VERSION, 9) == PublishCounts(stale=100)


def measure(width: int, users: int, rival_users: int, repeats: int) -> list[dict[str, Any]]:
    """Checks, times and reports one width."""
    with tempfile.TemporaryDirectory() as folder, start_redis(folder) as server, connect(server.url) as client:
        as_of_s = FIRST_DAY_S
        empty_bytes = client.info("memory")["used_memory"]
        table = make_table(users, width, as_of_s)
        first = timed(server, client, table)
        check(client, table, as_of_s)
        bytes_a_user = (client.info("memory")["used_memory"] - empty_bytes) / users

        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.publish", "--as-rival"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as feast:
            stdin, stdout = feast.stdin, feast.stdout
            assert stdin is not None
            assert stdout is not None

            def ask(question: Any) -> Any:
                print(json.dumps(question), file=stdin, flush=True)
                return json.loads(stdout.readline())

            # Stock Feast reads what we wrote.
            seen = ask({"redis": f"127.0.0.1:{server.port}", "users": rival_users, "width": width})
            for user, (stamp, state) in enumerate(seen):
                assert stamp == as_of_s
                assert state == table["state"][user].as_py()
            ours, theirs = [], []
            for _ in range(repeats):
                as_of_s += DAY_S
                ours.append(timed(server, client, make_table(users, width, as_of_s)))
                as_of_s += DAY_S
                server_cpu_s = _server_cpu_s(server)
                wall_s, client_cpu_s = ask(as_of_s)
                theirs.append(Timing(rival_users, wall_s, client_cpu_s, _server_cpu_s(server) - server_cpu_s))
            stdin.close()
    return _report(width, bytes_a_user, first, ours, theirs)


def _server_cpu_s(server: RunningRedis) -> float:
    assert server.process is not None
    return float(sum(psutil.Process(server.process.pid).cpu_times()[:2]))


def _report(
    width: int, bytes_a_user: float, first: Timing, ours: list[Timing], theirs: list[Timing]
) -> list[dict[str, Any]]:
    print(f"\n{width} floats, {bytes_a_user:.0f} bytes a user in Redis")
    print(f"{'rows a second':>34}  wall clock  client core  server core  both cores  (spread)")
    for name, timings in (("publish, empty Redis", [first]), ("publish", ours), ("feast online_write_batch", theirs)):
        wall = statistics.median(timing.rows / timing.wall_s for timing in timings)
        client = statistics.median(timing.rows / timing.client_cpu_s for timing in timings)
        server = statistics.median(timing.rows / timing.server_cpu_s for timing in timings)
        cores = [timing.per_core for timing in timings]
        print(
            f"{name:>34}  {wall:10,.0f}  {client:11,.0f}  {server:11,.0f}  {statistics.median(cores):10,.0f}"
            f"  ({min(cores):,.0f} - {max(cores):,.0f})"
        )
    value = statistics.median(timing.per_core for timing in ours)
    rival_value = statistics.median(timing.per_core for timing in theirs)
    about = {"versions": versions("redis", "feast", "numpy", "pyarrow")}
    return [
        {
            "measure": f"publish.rows_per_s_per_core.{width}",
            "value": round(value),
            "unit": f"rows/s per core, {width} floats, client and server together, each row compared and overwritten",
            "target": TARGET,
            "rival": "feast 0.67 RedisOnlineStore.online_write_batch, 1,000 rows, protobuf ready",
            "rival_value": round(rival_value),
            **about,
        },
        {
            "measure": f"publish.redis_bytes_per_user.{width}",
            "value": round(bytes_a_user),
            "unit": f"bytes of Redis memory a user, {width} floats, one view",
            **about,
        },
    ]


def main() -> None:
    """Runs the benchmark and writes benchmarks/results/main_job.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rival-users", type=int, default=20_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--as-rival", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_rival:
        rival()
        return
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    entries = [
        entry for width in given.widths for entry in measure(width, given.users, given.rival_users, given.repeats)
    ]
    by_measure = {entry["measure"]: entry for entry in entries}
    if 256 in given.widths:
        headline = dict(by_measure["publish.rows_per_s_per_core.256"], measure="publish.rows_per_s_per_core")
        entries.append(headline)
    if not given.no_record:
        print(f"\nrecorded in {record('main_job', entries)}")


if __name__ == "__main__":
    main()
