"""Whether a release may serve: each check by name, with the figure that decided.

The serving release is the yardstick: who it has a state for must have one, as new, under the release that is to take
its place, or a flip would turn users into cold starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import layout
from model.canary import Canary, canaries
from model.errors import CheckpointError, DataError, StoreUnavailable
from model.item_index import check_golden, read_snapshot
from model.leases import live_leases
from model.release import Pointer, Registry, Release
from model.skew import skew_warning, study_name
from pipelines.io import read_parquet
from pipelines.runs import RunManifest, RunStore, file_name, iso

MIN_COVERAGE: Final = 0.99
"""Least share of the serving release's users that must have a state under a release before it may serve."""
SAMPLE_USERS: Final = 10_000
"""Users whose rows are looked up in Redis."""
_LOOKUP_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    passed: bool | None
    """None: there was nothing to check it on."""
    detail: str
    may_be_forced: bool = True
    """False where the release would answer wrongly, not just fewer users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What is asked of a release before it may serve."""

    states_uri: str
    redis_url: str | None
    """None: rows in Redis are not looked at; stock Feast writes them, say."""
    min_coverage: float = MIN_COVERAGE
    max_lag_us: int = 0
    """How much older its newest run may be than the serving release's."""
    min_servers: int = 0
    """Least number of live servers that must have loaded it."""
    sample_users: int = SAMPLE_USERS


def examine(registry: Registry, pointer: Pointer, release: Release, demands: Demands, now_us: int) -> list[Finding]:
    """Every check of a loaded release whose golden inputs have passed. now_us: the clock, for leases."""
    mine = RunStore(demands.states_uri, release.manifest.state_version)
    theirs = None
    if pointer.serving is not None:
        theirs = RunStore(demands.states_uri, registry.manifest(pointer.serving).state_version)
    findings = [_prepared(pointer, release), *_states(mine, theirs, demands)]
    if demands.redis_url is not None and findings[-1].passed is not False:
        findings += _rows(mine, theirs or mine, release, demands, demands.redis_url)
    findings += [_items(registry, release), _servers(registry, release, demands, now_us)]
    return [*findings, *_skew(registry, pointer, release)]


def newest_run(store: RunStore) -> RunManifest | None:
    """The newest committed run of a state version; None before the first."""
    committed = store.run_ids()
    return store.manifest(committed[-1]) if committed else None


def users_of(store: RunStore, run: RunManifest) -> pa.Array:
    """Ids of all users that have a state as of a run: [U], in no order."""
    shards = [
        read_parquet(store.run(run.run_id), file_name("tails", shard), ["user_id"])["user_id"].combine_chunks()
        for shard in range(run.shards)
    ]
    return pa.concat_arrays(shards)


def covered(mine: RunStore, theirs: RunStore) -> tuple[int, int]:
    """(users of the newest run of `theirs` that the newest run of `mine` has too, users of `theirs`)."""
    my_run, their_run = newest_run(mine), newest_run(theirs)
    if their_run is None:
        return 0, 0
    wanted = users_of(theirs, their_run)
    if my_run is None:
        return 0, len(wanted)
    return int(pc.sum(pc.is_in(wanted, value_set=users_of(mine, my_run))).as_py() or 0), len(wanted)


def _prepared(pointer: Pointer, release: Release) -> Finding:
    name = release.manifest.release_id
    if name in (pointer.prepared, pointer.previous):
        return Finding("prepared", True, "the pointer names it, so servers and the daily job keep it ready")
    return Finding("prepared", False, f"the pointer does not name it; run tower-release prepare {name} first")


def _states(mine: RunStore, theirs: RunStore | None, demands: Demands) -> list[Finding]:
    """Its newest run against the serving release's: as-of time and users."""
    run = newest_run(mine)
    if run is None:
        return [
            Finding("states", False, f"{mine.states_uri} has no committed run of state version {mine.state_version}")
        ]
    serving = newest_run(theirs) if theirs is not None else None
    if theirs is None or serving is None:
        return [Finding("states", True, f"run {run.run_id}, {run.counts['users']:,} users; nothing serves yet")]
    lag_us = max(serving.as_of_us - run.as_of_us, serving.encoded_through_us - run.encoded_through_us)
    late = lag_us > demands.max_lag_us
    age = f"{span(lag_us)} older than" if lag_us > 0 else "as new as"
    allowed = f" (allowed: {span(demands.max_lag_us)})" if late else ""
    detail = f"its newest run, {run.run_id}, is {age} {serving.run_id} of the serving one{allowed}"
    if deferred := run.counts.get("deferred"):
        detail += f"; {deferred:,} users are deferred, current through {iso(run.encoded_through_us)} only"
    findings = [Finding("as-of", not late, detail)]
    have, of = covered(mine, theirs)
    findings.append(_coverage("coverage", have, of, "users of the serving release have a state", demands))
    return findings


def _coverage(check: str, have: int, of: int, what: str, demands: Demands) -> Finding:
    share = have / of if of else 1.0
    enough = share >= demands.min_coverage
    wanted = "" if enough else f"; wanted at least {demands.min_coverage:.4g} of them, {of - have:,} are missing"
    return Finding(check, enough, f"{have:,} of {of:,} ({share:.2%}) {what}{wanted}")


def _rows(mine: RunStore, theirs: RunStore, release: Release, demands: Demands, redis_url: str) -> list[Finding]:
    """What stands in Redis: a sample of the users' rows, and the canaries."""
    from pipelines.transforms.publish import connect

    run, serving = newest_run(mine), newest_run(theirs)
    assert run is not None
    wanted = users_of(theirs, serving or run)
    chosen = np.random.default_rng(0).permutation(len(wanted))[: demands.sample_users]
    users = wanted.take(pa.array(chosen)).to_pylist()
    try:
        with connect(redis_url) as client:
            rows = _read_rows(client, users, release)
            have = sum(row is not None and row.state_version == mine.state_version for row in rows)
            return [
                _coverage("redis", have, len(users), "users looked up have a row in Redis", demands),
                _canaries(client, release, run),
            ]
    except StoreUnavailable as error:
        return [Finding("redis", False, str(error))]


def _read_rows(client: Any, users: list[Any], release: Release) -> list[layout.StateRow | None]:
    """Rows of a release's state version; None where there is none or it cannot be decoded. Raises StoreUnavailable."""
    from redis.exceptions import RedisError

    fields, codec = layout.row_fields(layout.view_name(release.manifest.state_version)), release.codec
    rows: list[layout.StateRow | None] = []
    try:
        for start in range(0, len(users), _LOOKUP_ROWS):
            with client.pipeline(transaction=False) as pipe:
                for user in users[start : start + _LOOKUP_ROWS]:
                    pipe.hmget(layout.redis_key(user), fields)
                for values in pipe.execute():
                    try:
                        rows.append(layout.decode_row(values, codec))
                    except layout.LayoutError:
                        rows.append(None)
    except RedisError as error:
        raise StoreUnavailable(f"Redis could not be read: {type(error).__name__}: {error}") from error
    return rows


def _canaries(client: Any, release: Release, run: RunManifest) -> Finding:
    """The reserved users' rows give the golden states, and through the head the golden embeddings."""
    known = canaries(release)
    rows = _read_rows(client, [canary.user_id for canary in known], release)
    worst = 0.0
    for canary, row in zip(known, rows, strict=True):
        if row is None:
            return Finding("canary", False, f"no whole row of canary {canary.user_id} in Redis; publish a run")
        if row.encoded_at_us < run.as_of_us:
            return Finding(
                "canary", False, f"its rows are of {iso(row.encoded_at_us)}: run {run.run_id} is not sent to the end"
            )
        for difference, tolerance in _canary_differences(release, canary, row):
            if not difference <= tolerance:
                detail = f"canary {canary.user_id} is off by {difference:.2g} (tolerance {tolerance:.3g})"
                return Finding("canary", False, detail, may_be_forced=False)
            worst = max(worst, difference)
    return Finding("canary", True, f"{len(known)} reserved users as expected, off by at most {worst:.1g}")


def _canary_differences(release: Release, canary: Canary, row: layout.StateRow) -> Iterator[tuple[float, float]]:
    """(largest |difference|, what is allowed) of the stored state, then of the embedding made of it."""
    difference = canary.state_difference(row.state)
    if row.state_version != release.manifest.state_version:
        difference = float("inf")
    yield difference, canary.state_tolerance
    context = canary.context_at(row.history_until_us)
    embedding_E = release.embed(row.state[None].copy(), [context], [row.history_until_us])[0]
    yield canary.embedding_difference(embedding_E), canary.embedding_tolerance


def _items(registry: Registry, release: Release) -> Finding:
    version = release.manifest.embedding_version
    try:
        index = read_snapshot(registry, version)
        check_golden(index, release)
    except (CheckpointError, DataError) as error:
        return Finding("items", False, str(error))
    return Finding("items", True, f"snapshot of {len(index.item_ids):,} items, embedding version {version}")


def _servers(registry: Registry, release: Release, demands: Demands, now_us: int) -> Finding:
    """Every live server has the release and its items loaded, and no canary of it has failed there."""
    name = release.manifest.release_id
    leases = live_leases(registry, now_us)
    ready, behind = 0, []
    for lease in leases:
        held = next((leased for leased in lease.releases if leased.release_id == name), None)
        if held is None:
            behind.append(f"{lease.server_id} (epoch {lease.epoch}) has not loaded it")
        elif not held.has_items:
            behind.append(f"{lease.server_id} has not loaded its items")
        elif held.canary == "failed":
            behind.append(f"{lease.server_id} reports a failed canary")
        else:
            ready += 1
    if behind or ready < demands.min_servers:
        wanted = f", wanted at least {demands.min_servers}" if ready < demands.min_servers else ""
        return Finding(
            "servers", False, "; ".join([f"{ready} of {len(leases)} live servers are ready{wanted}", *behind])
        )
    return Finding("servers", True if leases else None, f"{ready} of {len(leases)} live servers have it loaded")


def _skew(registry: Registry, pointer: Pointer, release: Release) -> list[Finding]:
    """A warning, never a refusal, where parts of this release's family mix worse than those of the serving one's."""
    if pointer.serving is None:
        return []
    studies = [registry.read_study(study_name(name)) for name in (release.manifest.release_id, pointer.serving)]
    warning = skew_warning(studies[0], studies[1])
    return [] if warning is None else [Finding("skew", None, f"warning: {warning}")]


def span(span_us: int) -> str:
    """A span of time for people: its two largest units, like 2 d 3 h."""
    seconds = max(span_us, 0) // 1_000_000
    parts = [(seconds // 86_400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or first == len(parts) - 1)
