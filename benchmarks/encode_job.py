"""The daily encode against a plain loop doing the same work, and its peak memory. Checks equality, then times.

    python -m benchmarks.encode_job                              job and loop in turn, medians; peak RSS of 1M events
    python -m benchmarks.encode_job --device cuda --no-redis     the job on a GPU: speed, GPU share, distance to the CPU

The loop is what one would write without Beam: read the log into memory, sort, keep the latest events of each user,
encode in length-sorted batches, write states and tails. Both load the release and replay its golden inputs.
"""

import argparse
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.results import record
from model import event_log
from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.encoder import Encoder
from model.features import Vocabularies
from model.hybrid_tower import HybridTower
from model.release import GOLDEN_TOLERANCE, Manifest, Registry, library_versions
from pipelines.encode_users import main as encode_main
from pipelines.io import Folder, parquet_bytes
from pipelines.options import DEFAULT_BATCH_TOKENS
from pipelines.runs import CANARIES, RunStore
from pipelines.transforms.batches import plan_batches

THEME = "main_job"
USERS_PER_SHARD = 10_000
START_S = 1_600_000_000
AS_OF_S = START_S + 30 * 86_400
ROW_GROUP_ROWS = 131_072

DESCRIPTION = DatasetDescription.from_dict(
    {
        "name": "benchmark",
        "user_id_type": "int64",
        "item_id_type": "int64",
        "event_types": {"click": "positive", "view": "neutral"},
        "event_columns": ["surface"],
        "context_columns": ["device"],
        "item_columns": {"brand": "category"},
    }
)


def write_log(folder: Path, users: int, events: int, items: int, seed: int = 0) -> None:
    """A month of events in four files: log-normal activity, Zipf-like items, rows in time order."""
    random = np.random.default_rng(seed)
    activity = random.lognormal(0, 1.2, users)
    user = random.choice(users, events, p=activity / activity.sum())
    item = np.minimum((random.pareto(1.1, events) * 20).astype(np.int64), items - 1)
    times = np.sort(random.integers(START_S, AS_OF_S, events))
    table = pa.table(
        {
            "user_id": user.astype(np.int64) * 7919,
            "item_id": item,
            "event_type": pa.array(["click", "view"]).take(pa.array(random.integers(0, 2, events))),
            "timestamp": times,
            "surface": pa.array(["feed", "search"]).take(pa.array(random.integers(0, 2, events))),
            "device": pa.array(["phone", "tv", "web"]).take(pa.array(random.integers(0, 3, events))),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(4):
        low, high = part * events // 4, (part + 1) * events // 4
        pq.write_table(table.slice(low, high - low), folder / f"part-{part}.parquet", row_group_size=ROW_GROUP_ROWS)


def write_release(registry: Path, items: int) -> Manifest:
    """An untrained tower of the default size; speed does not depend on the weights."""
    torch.manual_seed(0)
    catalogue = pa.table({"item_id": np.arange(items), "brand": [f"brand{i % 50}" for i in range(items)]})
    vocabularies = Vocabularies(
        event_types=tuple(DESCRIPTION.event_type_names),
        columns={"surface": ("feed", "search"), "device": ("phone", "tv", "web")},
    )
    tower = HybridTower.build(TowerConfig(), DESCRIPTION, vocabularies, catalogue)
    return Registry(registry).write(tower, catalogue, trained_until_us=START_S * 1_000_000)


def run_job(root: Path, states: Path, device: str, shards: int) -> None:
    """tower-encode in this process, quietly."""
    arguments = ["--events", str(root / "log"), "--registry", str(root / "registry"), "--states", str(states)]
    arguments += ["--no-redis", "--shards", str(shards), "--device", device, "--as-of", str_time(AS_OF_S)]
    with redirect_stdout(StringIO()):
        status = encode_main(arguments)
    if status:
        raise SystemExit(f"tower-encode failed with status {status}")


def str_time(second: int) -> str:
    """A time in seconds as --as-of takes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def run_loop(root: Path, out: Path, device: str, release_id: str) -> None:
    """The same work as a plain loop over the whole log in memory."""
    release = Registry(root / "registry").load(release_id, device=device, parts=("encoder",))
    events, rejects = event_log.read_log(str(root / "log"), DESCRIPTION, AS_OF_S * 1_000_000)
    user = events["user_id"].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], np.diff(user) != 0]))
    counts = np.diff(starts, append=len(user))
    from_end = np.repeat(starts + counts, counts) - np.arange(len(user))
    limit = release.config.history_limit
    columns = ["item_id", "event_type", "timestamp_us", "order", "row_hash", *DESCRIPTION.event_columns]
    tail = events.select(columns).take(pa.array(np.flatnonzero(from_end <= limit)))
    lengths = np.minimum(counts, limit)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    state_UD = np.empty((len(lengths), release.config.d_model), np.float32)
    for batch in plan_batches(lengths, DEFAULT_BATCH_TOKENS):
        ends = np.cumsum(lengths[batch])
        rows = np.arange(ends[-1]) + np.repeat(offsets[batch] - (ends - lengths[batch]), lengths[batch])
        state_UD[batch] = release.encode(tail.take(pa.array(rows)), np.concatenate([[0], ends]))
    ids = pa.array(user[starts])
    as_of = np.full(len(ids), AS_OF_S * 1_000_000)
    width = state_UD.shape[1]
    states = {
        "user_id": ids,
        "state": pa.ListArray.from_arrays(np.arange(len(ids) + 1, dtype=np.int32) * width, state_UD.reshape(-1)),
        "state_version": pa.array([release.manifest.state_version] * len(ids)),
        "history_until": tail["timestamp_us"].take(pa.array(offsets[1:] - 1)),
        "encoded_at": as_of,
        "event_timestamp": pa.array(as_of, pa.timestamp("us", "UTC")),
    }
    lists = {name: pa.ListArray.from_arrays(offsets.astype(np.int32), tail[name].combine_chunks()) for name in columns}
    folder = Folder(str(out))
    folder.write("states.parquet", parquet_bytes(pa.table(states)))
    folder.write("tails.parquet", parquet_bytes(pa.table({"user_id": ids, **lists})))
    folder.write("dead_letters.parquet", parquet_bytes(rejects))


def read_states(root: Path, states: Path, kind: str = "states") -> pa.Table:
    """All users' rows of the only run, by user; not the canaries', which the loop has none of."""
    version = Registry(root / "registry").manifest(Registry(root / "registry").releases()[-1]).state_version
    store = RunStore(str(states), version)
    folder = states / version / "runs" / store.run_ids()[-1] / kind
    paths = [path for path in sorted(folder.iterdir()) if not CANARIES.endswith(path.name)]
    return pa.concat_tables([pq.read_table(path) for path in paths]).sort_by("user_id")


def matrix(states: pa.Table) -> NDArray[np.float32]:
    """f32 [U, D] of a states table."""
    return np.asarray(states["state"].combine_chunks().flatten()).reshape(states.num_rows, -1)


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check_equal(root: Path, job: Path, loop: Path) -> float:
    """Largest difference between the states of job and loop. Raises SystemExit unless users and tails are the same."""
    mine, theirs = read_states(root, job), pq.read_table(loop / "states.parquet")
    tails = read_states(root, job, "tails")
    if not tails.combine_chunks().equals(pq.read_table(loop / "tails.parquet").combine_chunks()):
        raise SystemExit("job and loop keep different tails")
    for name in set(mine.column_names) - {"state"}:
        if not mine[name].combine_chunks().equals(theirs[name].combine_chunks()):
            raise SystemExit(f"job and loop differ in {name}")
    difference = float(np.abs(matrix(mine) - matrix(theirs)).max())
    if not difference <= 1e-5:
        raise SystemExit(f"states of job and loop differ by {difference:.2g}, wanted at most 1e-5")
    return difference


def versions() -> dict[str, str]:
    """Versions that matter here."""
    import apache_beam

    return {**library_versions(), "apache-beam": apache_beam.__version__}


def compare(root: Path, repeats: int, shards: int) -> list[dict[str, Any]]:
    """Job and loop in turn on the CPU."""
    release_id = Registry(root / "registry").releases()[-1]
    job, loop = root / "job", root / "loop"
    run_job(root, job, "cpu", shards)
    run_loop(root, loop, "cpu", release_id)
    difference = check_equal(root, job, loop)
    users = read_states(root, job).num_rows
    print(f"job and loop agree: {users:,} users, same tails, states differ by at most {difference:.1e}")
    seconds: dict[str, list[float]] = {"job": [], "loop": []}
    for repeat in range(repeats):
        shutil.rmtree(job)
        shutil.rmtree(loop)
        seconds["loop"].append(timed(lambda: run_loop(root, loop, "cpu", release_id)))
        seconds["job"].append(timed(lambda: run_job(root, job, "cpu", shards)))
        print(f"repeat {repeat}: job {seconds['job'][-1]:.1f} s, loop {seconds['loop'][-1]:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["job"], seconds["loop"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    note = (
        f"{users:,} users, FnApiRunner, {shards} shards, {torch.get_num_threads()} torch thread, "
        f"d{TowerConfig().d_model} L{TowerConfig().num_layers}; medians "
        f"of {repeats}, job {min(seconds['job']):.1f} to {max(seconds['job']):.1f} s, loop "
        f"{min(seconds['loop']):.1f} to {max(seconds['loop']):.1f} s"
    )
    return [
        {
            "measure": "encode.wall_vs_loop",
            "value": round(statistics.median(ratios), 3),
            "unit": "x",
            "target": 1.25,
            "rival": "plain vectorised loop, same run",
            "rival_value": 1.0,
            "note": note,
        },
        {
            "measure": "encode.users_per_s",
            "value": round(users / medians["job"]),
            "unit": "users/s",
            "rival": "plain vectorised loop, same run",
            "rival_value": round(users / medians["loop"]),
            "note": note,
        },
    ]


def peak_rss(root: Path, events: int) -> dict[str, Any]:
    """Peak memory of a job of its own process over one log."""
    child = [sys.executable, "-m", "benchmarks.encode_job", "--child", str(root), "--users", str(events // 20)]
    out = subprocess.run(child, check=True, capture_output=True, text=True)
    gigabytes = json.loads(out.stdout.splitlines()[-1])["peak_rss_gb"]
    return {
        "measure": "encode.peak_rss_gb",
        "value": round(gigabytes, 2),
        "unit": "GB",
        "target": 2,
        "note": f"{events:,} events, one process with FnApiRunner, interpreter and libraries included",
    }


def on_cuda(root: Path, device: str, repeats: int, shards: int) -> list[dict[str, Any]]:
    """The job on a GPU, its states against the CPU's."""
    job = root / "cuda"
    run_job(root, job, device, shards)  # also warms up
    users = read_states(root, job).num_rows
    cpu_root = root / "cpu"
    run_job(root, cpu_root, "cpu", shards)
    difference = float(np.abs(matrix(read_states(root, job)) - matrix(read_states(root, cpu_root))).max())
    tolerance = GOLDEN_TOLERANCE[TowerConfig().compute_dtype]
    print(f"{device} and CPU states differ by at most {difference:.1e} (tolerance {tolerance:g})")
    if not difference <= tolerance:
        raise SystemExit("states on the GPU are not those of the CPU")
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    plain = Encoder.states

    def watched(self: Encoder, events: Any) -> torch.Tensor:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        states = plain(self, events)
        end.record()
        spans.append((start, end))
        return states

    Encoder.states = watched  # type: ignore[method-assign]
    seconds, shares = [], []
    for _ in range(repeats):
        shutil.rmtree(job)
        spans.clear()
        seconds.append(timed(lambda: run_job(root, job, device, shards)))
        torch.cuda.synchronize()
        shares.append(sum(a.elapsed_time(b) for a, b in spans) / 1000 / seconds[-1])
    Encoder.states = plain  # type: ignore[method-assign]
    note = f"{users:,} users, {torch.cuda.get_device_name()}, medians of {repeats}"
    return [
        {
            "measure": "encode.cuda.users_per_s",
            "value": round(users / statistics.median(seconds)),
            "unit": "users/s",
            "note": note,
        },
        {
            "measure": "encode.cuda.gpu_share",
            "value": round(statistics.median(shares), 3),
            "unit": "of wall time",
            "note": f"{note}; CUDA events around the encoder's forward pass, so gaps between its kernels count as busy",
        },
        {
            "measure": "encode.cuda.max_abs_diff",
            "value": difference,
            "unit": "largest difference of a state's value to the CPU's",
            "target": tolerance,
            "note": note,
        },
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode_job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--users", type=int, default=40_000, help="users of the log (default: 40000)")
    parser.add_argument("--events", type=int, default=780_000, help="events of the log (default: 780000)")
    parser.add_argument("--items", type=int, default=20_000, help="items of the catalogue (default: 20000)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to measure the GPU instead (default: cpu)")
    parser.add_argument("--no-redis", action="store_true", help="accepted for clarity: the benchmark never publishes")
    parser.add_argument("--rss-events", type=int, default=1_000_000, help="events of the memory test; 0: no such test")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)  # as the job does
    if args.child:
        run_job(Path(args.child), Path(args.child) / "states", "cpu", max(1, args.users // USERS_PER_SHARD))
        print(json.dumps({"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
        return
    entries: list[dict[str, Any]] = []
    shards = max(1, args.users // USERS_PER_SHARD)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_release(root / "registry", args.items)
        write_log(root / "log", args.users, args.events, args.items)
        if args.device != "cpu":
            entries += on_cuda(root, args.device, args.repeats, shards)
        else:
            entries += compare(root, args.repeats, shards)
            if args.rss_events:
                shutil.rmtree(root / "log")
                write_log(root / "log", args.rss_events // 20, args.rss_events, args.items)
                entries.append(peak_rss(root, args.rss_events))
    for entry in entries:
        target = f" (target {entry['target']})" if "target" in entry else ""
        print(f"{entry['measure']:<28} {entry['value']:>12} {entry['unit']}{target}")
    if not args.no_record:
        record(THEME, [{**entry, "versions": versions()} for entry in entries])


if __name__ == "__main__":
    main()
