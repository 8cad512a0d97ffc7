"""One shard of users: histories merged, encoded, written."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from model.canary import encode_canaries
from model.errors import CheckpointError, GoldenMismatch
from model.event_log import REJECT_SCHEMA, concat_rejects, make_rejects
from model.release import Registry, Release
from model.state_codec import StateCodec
from pipelines import faults
from pipelines.io import from_chunks, parquet_bytes
from pipelines.runs import CANARIES, RunPlan, deferred_schema, file_name
from pipelines.transforms.batches import Encode, Encoded, encode_users
from pipelines.transforms.merge_tail import Histories, empty_tail, merge_tail, to_tail, whole
from pipelines.transforms.refresh import choose

EVENTS, REJECTS, SENTINEL = b"E", b"R", b""
"""First byte of an element: a chunk of events, a chunk of rejects; the sentinel is empty and says the shard exists."""


@dataclass(frozen=True, slots=True)
class ShardTables:
    """What one shard of a run writes, and its counts."""

    states: pa.Table
    tails: pa.Table
    dead_letters: pa.Table
    deferred: pa.Table | None
    """Users with unseen events who were not encoded; None without a refresh budget."""
    counts: dict[str, int]


def encode_shard(
    events: pa.Table,
    rejects: pa.Table,
    tail: pa.Table,
    deferred: pa.Table,
    encode: Encode,
    *,
    width: int,
    plan: RunPlan,
    shard: int,
) -> ShardTables:
    """Pure: the events of one shard's users and what yesterday's run left become the shard's tables.

    events: plan.chunk_schema, any order. rejects: REJECT_SCHEMA. tail: as to_tail makes it. deferred:
    deferred_schema. width: D of a state.
    """
    histories = merge_tail(tail, events, plan.history_limit)
    chosen = choose(histories, whole(tail["user_id"]), deferred, plan, shard)
    encoded = encode_users(histories, chosen.encoded, encode, plan.batch_tokens, width, plan.codec)
    dead_letters = _dead_letters(histories, encoded, rejects, plan)
    counts = {
        "events": len(events),
        "users": len(histories.users),
        "encoded": len(encoded.users),
        "skipped": len(histories.users) - len(chosen.encoded) - len(chosen.deferred),
        **Counter(f"dead.{reason}" for reason in dead_letters["reason"].to_pylist()),
    }
    if plan.refresh is not None:
        counts["deferred"] = len(chosen.deferred)
    return ShardTables(
        _states(histories, encoded, plan),
        to_tail(histories),
        dead_letters,
        None if plan.refresh is None else chosen.deferred,
        counts,
    )


def _states(histories: Histories, encoded: Encoded, plan: RunPlan) -> pa.Table:
    last = pa.array(histories.offsets[encoded.users + 1] - 1)
    return _state_table(
        histories.users.take(pa.array(encoded.users)),
        encoded.state_AD,
        histories.events["timestamp_us"].take(last),
        plan,
    )


def _state_table(
    user_ids: pa.Array, state_AD: NDArray[np.float32], until_us: pa.Array | pa.ChunkedArray, plan: RunPlan
) -> pa.Table:
    """Rows of a states file. user_ids: [A]. state_AD: f32 [A, D]. until_us: time of each user's last event."""
    rows = len(state_AD)
    as_of = np.full(rows, plan.as_of_us)
    return pa.table(
        {
            "user_id": user_ids,
            "state": _stored(state_AD, plan.codec),
            "state_version": pa.array([plan.store.state_version] * rows, pa.string()),
            "history_until": until_us,
            "encoded_at": pa.array(as_of),
            "event_timestamp": pa.array(as_of, pa.timestamp("us", "UTC")),
        }
    )


def _stored(state_AD: NDArray[np.float32], codec: StateCodec | None) -> pa.Array:
    """The bytes that go to Redis: list<float32>, or by a codec, binary."""
    values = state_AD if codec is None else codec.encode(state_AD)
    rows, width = values.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * np.int32(width))
    if codec is None:
        return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
    return pa.BinaryArray.from_buffers(pa.binary(), rows, [None, offsets.buffers()[1], pa.py_buffer(values.tobytes())])


def _dead_letters(histories: Histories, encoded: Encoded, rejects: pa.Table, plan: RunPlan) -> pa.Table:
    copies, dead = histories.duplicates, encoded.dead
    paths = pa.array(plan.source_paths, pa.string()).take(whole(copies["source_file"])).to_pylist()
    nothing = pa.nulls(len(dead), pa.string())
    lost = {
        "source_path": nothing,
        "source_row": pa.nulls(len(dead), pa.int64()),
        "user_id": histories.users.take(pa.array([d.user for d in dead], pa.int64())).cast(pa.string()),
        "item_id": nothing,
        "reason": pa.array([d.reason for d in dead], pa.string()),
        "detail": pa.array([d.detail for d in dead], pa.string()),
    }
    duplicates = make_rejects(copies, paths, ["duplicate"] * len(copies), [""] * len(copies))
    table = concat_rejects([rejects, duplicates, pa.table(lost, schema=REJECT_SCHEMA)])
    return table.take(pc.sort_indices(table, [(name, "ascending") for name in REJECT_SCHEMA.names]))


@dataclass(slots=True, weakref_slot=True)
class _Loaded:
    """A release as Beam's shared handle wants it: something that can be weakly referenced."""

    release: Release


class EncodeShard(beam.DoFn):
    """Element: (shard, chunks of its events and rejects). Gives (0, the shard's counts and file hashes as JSON).

    Writes states, tails and dead letters into staging, each by atomic rename; a retry writes the same bytes again, and
    a shard that an earlier job of the same plan finished is not encoded again. Shard 0 writes the canaries too.
    """

    def __init__(self, plan: RunPlan, shared: Shared) -> None:
        self._plan = plan
        self._shared = shared

    def setup(self) -> None:
        """Load the release once a process, its golden inputs replayed. Raises CheckpointError, GoldenMismatch."""
        plan = self._plan
        tag = f"{plan.registry_uri} {plan.release_id} {plan.store.state_version} {plan.device}"
        self._loaded = self._shared.acquire(lambda: _load(plan), tag)

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        shard, chunks = element
        plan, release = self._plan, self._loaded.release
        report = finished_report(plan, shard)
        if report is None:
            report = self._encode(shard, chunks, release)
        plan.fault.reach(faults.AFTER_STAGE_SHARD.format(shard))
        for name, count in json.loads(report)["counts"].items():
            Metrics.counter("tower_encode", name).inc(count)
        yield 0, report

    def _encode(self, shard: int, chunks: Iterable[bytes], release: Release) -> bytes:
        """Write the shard's files, its report last."""
        plan = self._plan
        # Sums round by how threads share them, and workers have as many as their engine gives them: one for all, for
        # the thread that is here. More cores are for more workers.
        torch.set_num_threads(1)
        by_kind: dict[bytes, list[bytes | memoryview]] = {EVENTS: [], REJECTS: [], SENTINEL: []}
        for chunk in chunks:
            by_kind[chunk[:1]].append(memoryview(chunk)[1:])
        plan.fault.reach(faults.AFTER_READ)
        events = from_chunks(by_kind.pop(EVENTS), plan.chunk_schema)
        rejects = from_chunks(by_kind.pop(REJECTS), REJECT_SCHEMA)
        tail = empty_tail(plan.chunk_schema)
        deferred = deferred_schema(plan.description.user_id_arrow).empty_table()
        if plan.previous_run is not None:
            tail = plan.store.tails(plan.previous_run, shard).cast(tail.schema)
            deferred = plan.store.deferred(plan.previous_run, shard, plan.description.user_id_arrow)
        width = release.config.state_width
        tables = encode_shard(events, rejects, tail, deferred, release.encode, width=width, plan=plan, shard=shard)
        if tables.counts.get("dead.poison"):
            _check_still_sound(release)
        written = {file_name(kind, shard): getattr(tables, kind) for kind in ("states", "tails", "dead_letters")}
        through_us = plan.as_of_us
        if tables.deferred is not None:
            written[file_name("deferred", shard)] = tables.deferred
            through_us = min([through_us, *tables.deferred["current_through"].to_pylist()])
        if shard == 0:
            written[CANARIES] = _canary_rows(release, plan)
        files = {}
        for name, table in written.items():
            data = parquet_bytes(table)
            plan.staging.write(name, data)
            files[name] = hashlib.sha256(data).hexdigest()
        report = json.dumps(
            {"shard": shard, "counts": tables.counts, "files": files, "encoded_through_us": through_us}
        ).encode()
        plan.reports.write(_report_name(shard), report)
        return report


def _report_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def finished_report(plan: RunPlan, shard: int) -> bytes | None:
    """The report of a shard that an earlier job of the same plan has finished; None where its files are not whole."""
    if not plan.reports.exists(_report_name(shard)):
        return None
    report = plan.reports.read(_report_name(shard))
    for name, digest in json.loads(report)["files"].items():
        if not plan.staging.exists(name) or plan.staging.sha256(name) != digest:
            return None
    return report


def _canary_rows(release: Release, plan: RunPlan) -> pa.Table:
    """The reserved users' rows, encoded now."""
    user_ids, state_UD, until_us = encode_canaries(release, plan.as_of_us)
    ids = pa.array(user_ids, plan.description.user_id_arrow)
    return _state_table(ids, state_UD, pa.array(until_us, pa.int64()), plan)


def _load(plan: RunPlan) -> _Loaded:
    release = Registry(plan.registry_uri).load(plan.release_id, device=plan.device, parts=("encoder",))
    found = release.manifest.state_version
    if found != plan.store.state_version:
        raise CheckpointError(
            f"release {plan.release_id} has state version {found}, the job was started for {plan.store.state_version}"
        )
    return _Loaded(release)


def _check_still_sound(release: Release) -> None:
    """Users are to blame only while the golden inputs still pass; else the device or the library is."""
    report = release.verify()
    if not report.passed:
        raise GoldenMismatch(f"the encoder stopped working during the run: {report}")
