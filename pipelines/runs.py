"""The states folder: which runs there are, what each holds, what one job is about to do.

<states>/<state_version>/staging/<run_id>/<plan>/      being written; a job that was killed is carried on from here
<states>/<state_version>/runs/<run_id>/                appears whole; _MANIFEST.json says what is in it
<states>/<state_version>/published/<run_id>.json       the run's rows are in Redis; remove it to have them sent again
<states>/<state_version>/publishing/<run_id>.json      how far sending them has come
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pyarrow as pa

from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError
from model.event_log import event_schema
from model.refresh import GainTable, RefreshBudget
from model.release import library_versions
from model.state_codec import StateCodec
from pipelines.faults import Fault
from pipelines.io import Folder, json_bytes, read_parquet

MANIFEST = "_MANIFEST.json"
FORMAT = "hybrid-tower-run/1"
SECOND_US = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RUN_ID = "%Y%m%dT%H%M%SZ"


def run_id_of(as_of_us: int) -> str:
    """The run of an as-of time (microseconds, a whole second): YYYYMMDDTHHMMSSZ. Raises ConfigError."""
    if as_of_us % SECOND_US:
        raise ConfigError(f"an as-of time must be a whole second, got {as_of_us} us")
    return (_EPOCH + timedelta(microseconds=as_of_us)).strftime(_RUN_ID)


def parse_as_of_us(text: str) -> int:
    """Microseconds of an as-of time: ISO 8601 (UTC unless it says otherwise), a run id, or `now`.

    Raises ConfigError when it is none of them or no whole second.
    """
    if text == "now":
        return int(datetime.now(UTC).timestamp()) * SECOND_US
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"--as-of must be UTC like 2017-10-15T03:00:00Z, a run id like 20171015T030000Z, or now, got {text!r}"
        ) from error
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    if time.microsecond:
        raise ConfigError(f"--as-of must be a whole second, got {text!r}")
    return (time - _EPOCH) // timedelta(microseconds=1)


def iso(time_us: int) -> str:
    """Microseconds since the epoch as 2017-10-15T03:00:00Z."""
    return (_EPOCH + timedelta(microseconds=time_us)).isoformat().replace("+00:00", "Z")


CANARIES = "states/shard-canary.parquet"
"""The reserved users' rows of a run (model.canary). Beside the states, so that stock Feast materializes them too."""


def file_name(kind: str, shard: int) -> str:
    """Path in a run of one shard's file. kind: states, tails, dead_letters or deferred."""
    return f"{kind}/shard-{shard:05d}.parquet"


def deferred_schema(user_id_type: pa.DataType) -> pa.Schema:
    """Users whose row is older than their history: the as-of time up to which it is current, and events since."""
    return pa.schema([("user_id", user_id_type), ("current_through", pa.int64()), ("new_events", pa.int64())])


@dataclass(frozen=True, slots=True)
class RefreshPolicy:
    """How many users with new events a run encodes, and by what it chooses them."""

    budget: RefreshBudget
    table: GainTable


@dataclass(frozen=True, kw_only=True, slots=True)
class RunManifest:
    """What one committed run holds."""

    run_id: str
    state_version: str
    release_id: str
    """The release that encoded; others of the same state version give the same states."""
    as_of_us: int
    encoded_through_us: int
    """Every user is current up to here: who has no newer row had no newer event. Before as_of_us where users are
    deferred: then the time up to which the longest deferred of them is current."""
    shards: int
    previous_run: str | None
    """The run whose tails were carried on; None after a first run or a rebuild."""
    inputs: Mapping[str, Any]
    """fingerprint, and name and sha256 of each file of the log."""
    counts: Mapping[str, int]
    files: Mapping[str, str]
    """Path in the run -> SHA-256 of the file."""
    libraries: Mapping[str, str]
    format: str = FORMAT

    def to_bytes(self) -> bytes:
        """As JSON; equal manifests give equal bytes."""
        return json_bytes(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """The inverse of to_bytes. Raises DataError naming `where`."""
        try:
            values = json.loads(data)
            known = {f.name for f in fields(cls)}
            if values.get("format") != FORMAT:
                raise DataError(f"{where} has format {values.get('format')!r}, this version reads {FORMAT!r}")
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is no run manifest: {error}") from None


@dataclass(frozen=True, slots=True)
class RunStore:
    """The runs of one state version."""

    states_uri: str
    state_version: str

    @property
    def folder(self) -> Folder:
        """<states>/<state_version>."""
        return Folder(self.states_uri) / self.state_version

    def run(self, run_id: str) -> Folder:
        """Where a committed run is."""
        return self.folder / "runs" / run_id

    def staging(self, run_id: str, plan: str) -> Folder:
        """Where the jobs of one plan for a run write."""
        return self.folder / "staging" / run_id / plan

    def run_ids(self) -> list[str]:
        """The committed runs, oldest first."""
        runs = self.folder / "runs"
        return [name for name in runs.names() if (runs / name).exists(MANIFEST)]

    def manifest(self, run_id: str) -> RunManifest:
        """Raises DataError when the run was not committed or its manifest is not readable."""
        folder = self.run(run_id)
        return RunManifest.from_bytes(folder.read(MANIFEST), f"{folder.uri}/{MANIFEST}")

    def tails(self, run_id: str, shard: int) -> pa.Table:
        """One shard's tails. Raises DataError."""
        return read_parquet(self.run(run_id), file_name("tails", shard))

    def deferred(self, run_id: str, shard: int, user_id_type: pa.DataType) -> pa.Table:
        """One shard's deferred users, deferred_schema; none after a run without a refresh budget. Raises DataError."""
        name = file_name("deferred", shard)
        if not self.run(run_id).exists(name):
            return deferred_schema(user_id_type).empty_table()
        return read_parquet(self.run(run_id), name)

    def published(self) -> set[str]:
        """The runs whose rows were sent to Redis."""
        return {name.removesuffix(".json") for name in (self.folder / "published").names() if name.endswith(".json")}

    def mark_published(self, run_id: str, counts: Mapping[str, int]) -> None:
        """Note that the run's rows are in Redis."""
        (self.folder / "published").write(f"{run_id}.json", json_bytes(dict(counts)))
        (self.folder / "publishing").remove()

    def note_progress(self, run_id: str, shards: int, counts: Mapping[str, int]) -> None:
        """Note that the first `shards` shards of a run are in Redis."""
        (self.folder / "publishing").write(f"{run_id}.json", json_bytes({"shards": shards, "counts": dict(counts)}))

    def publish_progress(self, run_id: str) -> tuple[int, dict[str, int]]:
        """What note_progress noted, (0, {}) when nothing."""
        folder = self.folder / "publishing"
        if not folder.exists(f"{run_id}.json"):
            return 0, {}
        noted = json.loads(folder.read(f"{run_id}.json"))
        return int(noted["shards"]), dict(noted["counts"])

    def forget_published(self) -> None:
        """Make every run unpublished: for a Redis that lost its rows."""
        (self.folder / "published").remove()
        (self.folder / "publishing").remove()

    def publish_counts(self, run_id: str) -> dict[str, int]:
        """What mark_published noted; empty when it did not."""
        folder = self.folder / "published"
        return dict(json.loads(folder.read(f"{run_id}.json"))) if folder.exists(f"{run_id}.json") else {}

    def sweep_staging(self, run_id: str) -> None:
        """Remove what attempts at this run and at earlier ones left behind."""
        staging = self.folder / "staging"
        for name in staging.names():
            if name <= run_id:
                (staging / name).remove()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """All that one run is told; travels to every worker."""

    store: RunStore
    run_id: str
    as_of_us: int
    shards: int
    previous_run: str | None
    inputs: Mapping[str, Any]
    registry_uri: str
    release_id: str
    device: str
    batch_tokens: int
    """Most padded events of one encoder call."""
    source_paths: Sequence[str]
    """Path of each source_file number, for dead letters."""
    description: DatasetDescription
    history_limit: int
    codec: StateCodec | None
    """How states are stored; None: as lists of float32."""
    redis_url: str | None
    """None: nothing is published."""
    rows_per_s: float | None
    """Most rows a second that go to Redis; None: as fast as it takes them."""
    token: int
    """Fencing token of the job: orders its rows against those of another job with the same as-of."""
    fault: Fault
    refresh: RefreshPolicy | None = None
    """None: every user with new events is encoded."""

    @property
    def staging(self) -> Folder:
        """Where this job writes: a folder for all that fixes the bytes, so that a job run again carries on.

        Two jobs of one plan write the same bytes to the same names, each file by one rename.
        """
        return self.store.staging(self.run_id, self._fixed())

    @property
    def reports(self) -> Folder:
        """Where each finished shard leaves its report, beside the files that will be the run's."""
        return self.store.staging(self.run_id, f"{self._fixed()}.reports")

    def _fixed(self) -> str:
        """Digest of all that fixes the run's bytes."""
        fixed = {
            "release": self.release_id,
            "shards": self.shards,
            "previous_run": self.previous_run,
            "inputs": self.inputs["fingerprint"],
            "device": self.device,
            "batch_tokens": self.batch_tokens,
            "history_limit": self.history_limit,
            "refresh": None if self.refresh is None else [str(self.refresh.budget), self.refresh.table.to_dict()],
            "libraries": library_versions(),
        }
        return hashlib.sha256(json_bytes(fixed)).hexdigest()[:16]

    @property
    def chunk_schema(self) -> pa.Schema:
        """Columns of an event that travel from the reader to its shard: what the encoder reads and what sorts."""
        whole = event_schema(self.description)
        unread = set(self.description.log_columns) - set(self.description.event_columns)
        return pa.schema([field for field in whole if field.name not in unread])
