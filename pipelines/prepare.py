"""tower-release prepare: everything a release needs before it may serve, beside what serves now.

Each step can be repeated and finds what an earlier try has done, so after any failure the same command carries on.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from model.errors import ConfigError
from model.item_index import write_snapshot
from model.leases import live_leases
from model.release import Pointer, Registry, Release
from pipelines.readiness import newest_run
from pipelines.runs import RunStore, iso

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What one call of tower-release prepare was asked to do."""

    states_uri: str
    events: str
    redis_url: str | None
    rows_per_s: float | None
    device: str
    shards: int | None
    as_of_us: int | None
    """None: as the serving release's newest run, before the first commit the log's last event."""
    feast: bool
    """Whether to register the view for stock Feast clients."""
    wait_s: float
    """Longest wait for the live servers to load the release."""


def prepare(registry: Registry, release: Release, settings: PrepareSettings, say: Callable[[str], None]) -> Pointer:
    """Name the release in the pointer, write its items, register its view, write its states, wait for the servers.

    The pointer comes first: from then on the daily job encodes for the release too, and its rows are not collected.
    say: told what was done, a line a step. Raises what the steps raise, PointerConflict where it serves already.
    """
    pointer = registry.prepare(release.manifest.release_id)
    say(f"pointer    epoch {pointer.epoch} names it as prepared")
    say(f"items      snapshot of {write_snapshot(registry, release):,} items")
    say(f"view       {_register_view(registry, settings)}")
    say(f"states     {_backfill(registry, release, settings, pointer)}")
    say(f"servers    {_wait_for_servers(registry, release.manifest.release_id, settings.wait_s)}")
    return pointer


def _register_view(registry: Registry, settings: PrepareSettings) -> str:
    """`feast apply` in a process of its own: importing Feast takes seconds and this layer does not know it."""
    if not settings.feast:
        return "not registered with Feast (--no-feast); the service does not need it"
    if settings.redis_url is None or importlib.util.find_spec("feast") is None:
        return "not registered: Feast is not installed here, or there is no Redis; stock Feast clients need it"
    where = ["--registry", registry.uri, "--states", settings.states_uri, "--redis-url", settings.redis_url]
    done = subprocess.run([sys.executable, "-m", "feature_repo.apply", *where], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"feast apply failed:\n{(done.stderr or done.stdout)[-2000:]}")
    return "registered with Feast"


def _backfill(registry: Registry, release: Release, settings: PrepareSettings, pointer: Pointer) -> str:
    """States of the release as of the serving release's newest run, unless there is a run as new."""
    store = RunStore(settings.states_uri, release.manifest.state_version)
    as_of_us = settings.as_of_us
    if as_of_us is None and pointer.serving is not None:
        serving = newest_run(RunStore(settings.states_uri, registry.manifest(pointer.serving).state_version))
        as_of_us = None if serving is None else serving.as_of_us
    there = newest_run(store)
    is_sent = settings.redis_url is None or (there is not None and there.run_id in store.published())
    if there is not None and is_sent and as_of_us is not None and there.as_of_us >= as_of_us:
        return f"run {there.run_id} is there already"
    from pipelines.encode_users import run_job
    from pipelines.options import parse_settings

    flags = ["--events", settings.events, "--registry", registry.uri, "--states", settings.states_uri]
    flags += ["--release", release.manifest.release_id, "--device", settings.device]
    flags += ["--no-redis"] if settings.redis_url is None else ["--redis-url", settings.redis_url]
    flags += [] if as_of_us is None else ["--as-of", iso(as_of_us)]
    flags += [] if settings.rows_per_s is None else ["--redis-rows-per-s", str(settings.rows_per_s)]
    flags += [] if settings.shards is None else ["--shards", str(settings.shards)]
    (run,) = run_job(parse_settings(flags, {}))
    return f"run {run.run_id}, {run.counts['users']:,} users"


def _wait_for_servers(registry: Registry, release_id: str, wait_s: float) -> str:
    """Until every live server names the release in its lease, with its items, or the time is up."""
    give_up_at = time.monotonic() + wait_s
    while True:
        leases = live_leases(registry, time.time_ns() // 1000)
        ready = sum(any(r.release_id == release_id and r.has_items for r in lease.releases) for lease in leases)
        if ready == len(leases) or time.monotonic() >= give_up_at:
            late = "" if ready == len(leases) else f"; stopped waiting after {wait_s:g} s"
            return f"{ready} of {len(leases)} live servers have it loaded{late}"
        time.sleep(_POLL_S)
