"""Runs of tower-encode on small logs, for the tests of this folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.encode_users import main
from pipelines.runs import CANARIES, MANIFEST, RunManifest, RunStore

SECOND_US = 1_000_000
SHARDS = 3


def row(
    user_id: int | str | None, item_id: int | str | None, second: int, event_type: str = "click", **columns: Any
) -> dict[str, Any]:
    """A row of a log for the releases of tests/releases.py."""
    return {
        "user_id": user_id,
        "item_id": item_id,
        "event_type": event_type,
        "timestamp": second,
        "surface": columns.pop("surface", "feed"),
        "device": columns.pop("device", "tv"),
        **columns,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, ids: pa.DataType | None = None) -> Path:
    """One Parquet file of rows as `row` makes them, possibly none; row groups of 5 rows."""
    id_type = ids or pa.int64()
    schema = pa.schema(
        [
            ("user_id", id_type),
            ("item_id", id_type),
            ("event_type", pa.string()),
            ("timestamp", pa.int64()),
            ("surface", pa.string()),
            ("device", pa.string()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=schema), path, row_group_size=5)
    return path


@dataclass(frozen=True, slots=True)
class Job:
    """A registry and a states folder, and how to run the job on them."""

    root: Path
    registry: Path
    state_version: str
    states_name: str = "states"

    @property
    def states(self) -> Path:
        return self.root / self.states_name

    @property
    def store(self) -> RunStore:
        return RunStore(str(self.states), self.state_version)

    def elsewhere(self, name: str) -> "Job":
        """The same releases, another states folder."""
        return Job(self.root, self.registry, self.state_version, name)

    def arguments(self, events: Path, as_of: int | None = None, *more: str, redis: str | None = None) -> list[str]:
        """Command line; as_of in seconds."""
        argv = ["--events", str(events), "--registry", str(self.registry), "--states", str(self.states)]
        argv += ["--no-redis"] if redis is None else ["--redis-url", redis]
        argv += [] if as_of is None else ["--as-of", run_id(as_of)]
        first = not self.store.run_ids() and "--shards" not in more
        return [*argv, *(["--shards", str(SHARDS)] if first else []), *more]

    def run(self, events: Path, as_of: int | None = None, *more: str, redis: str | None = None) -> RunManifest:
        """Run in this process; the manifest of the newest run."""
        assert main(self.arguments(events, as_of, *more, redis=redis)) == 0
        return self.store.manifest(self.store.run_ids()[-1])

    def read(self, kind: str, run: str | None = None) -> pa.Table:
        """All shards of states, tails or dead_letters of a run (None: the newest), by user."""
        name = run or self.store.run_ids()[-1]
        folder = self.states / self.state_version / "runs" / name / kind
        tables = [pq.read_table(file) for file in sorted(folder.iterdir()) if file.name not in CANARIES]
        table = pa.concat_tables(tables)
        return table.sort_by("user_id") if kind != "dead_letters" else table

    def latest_states(self) -> dict[Any, list[float]]:
        """Each user's newest state over all runs."""
        found: dict[Any, list[float]] = {}
        for run in self.store.run_ids():
            states = self.read("states", run)
            found |= dict(zip(states["user_id"].to_pylist(), states["state"].to_pylist(), strict=True))
        return found

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file of every run, by its path."""
        runs = self.states / self.state_version / "runs"
        files = [path for path in sorted(runs.rglob("*")) if path.is_file()] if runs.exists() else []
        return {str(path.relative_to(runs)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def parquet_hashes(self) -> dict[str, str]:
        return {name: digest for name, digest in self.hashes().items() if not name.endswith(MANIFEST)}


def run_id(second: int) -> str:
    """The run of an as-of time in seconds."""
    from pipelines.runs import run_id_of

    return run_id_of(second * SECOND_US)
