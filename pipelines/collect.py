"""Collecting what nobody can reach any more: rows of old state versions, their Parquet, old item snapshots.

A version is reachable while the pointer names a release of it (serving, prepared, previous) or a live lease does.
Everything else may go, by HDEL, never DEL: all views of a user share one hash. No race loses a row:

1.  The collector takes a fencing token first and reads pointer and leases after. A row goes only where its own token is
    not higher. Who prepares a version later puts the pointer first and takes a token then, so those rows stay.
2.  Pointer and leases are read again before every bounded step, and a version that has become reachable is left alone
    from then on. Rows of it that went before are owed by whoever prepares it: the note that they were sent is removed
    before the first row goes, when the version turns out to be reachable, and at the end.
3.  After every step it is noted in <registry>/GC.json how far the scan has come. A collector that was killed carries on
    from there if Redis, the pointer's epoch and the versions are the same; else it starts again, which costs time only.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis
from redis.exceptions import NoScriptError, RedisError

from feature_repo import layout
from model import item_index
from model.errors import StoreUnavailable
from model.leases import CLOCK_SKEW_US, live_leases
from model.release import Pointer, Registry
from pipelines import faults
from pipelines.faults import Fault
from pipelines.io import Folder
from pipelines.runs import RunStore
from pipelines.transforms.publish import PARSE_TIMESTAMP, Pace, sha_of

PROGRESS: Final = "GC.json"
SCAN_KEYS: Final = 1000
"""Keys a step, about: Redis decides."""
ROWS_PER_CALL: Final = 50
"""Rows a script call, counting a key once for each version. Redis serves nobody else during a call."""
_VERSION: Final = re.compile(r"[0-9a-f]{16}")

# KEYS: the users.  ARGV: 1 the highest token that may go, 2 "1" to only count, then for each version its event time
# field, its fence field and its other four fields.  Returns how many rows of each version went.
DELETE_ROWS: Final = (
    PARSE_TIMESTAMP
    + """
local limit, only_count = tonumber(ARGV[1]), ARGV[2] == '1'
local call = redis.call

-- Whether the row was written under a token above ours. A fence of another as-of time belongs to a row that stock Feast
-- has overwritten since, which has none.
local function is_newer(ts, fence)
  if not ts or not fence then
    return false
  end
  local seconds, nanos = parse(ts)
  local fenced_as_of, token = string.match(fence, '^(-?%d+):(%d+)$')
  return seconds ~= nil and nanos == 0 and tonumber(fenced_as_of) == seconds and tonumber(token) > limit
end

local gone = {}
for v = 1, (#ARGV - 2) / 6 do
  local at = 6 * v - 3
  gone[v] = 0
  for _, key in ipairs(KEYS) do
    local row = call('HMGET', key, unpack(ARGV, at, at + 5))
    local exists = row[1] or row[2] or row[3] or row[4] or row[5] or row[6]
    if exists and not is_newer(row[1], row[2]) then
      if not only_count then
        call('HDEL', key, unpack(ARGV, at, at + 5))
      end
      gone[v] = gone[v] + 1
    end
  end
end
return gone
"""
)


@dataclass(frozen=True, slots=True)
class Reachable:
    """Versions that somebody can reach, each with who."""

    states: Mapping[str, tuple[str, ...]]
    """By state_version: "serving 20261125T030000-1a2b3c4d", "leased by host-7"."""
    items: Mapping[str, tuple[str, ...]]
    """By embedding_version."""
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a collection removed, or would have removed."""

    dry_run: bool
    rows: Mapping[str, int]
    """Rows removed from Redis by state_version. After a kill, without those of the step that it interrupted."""
    keys_scanned: int
    folders: tuple[str, ...]
    """Folders removed: Parquet of state versions and item snapshots."""
    kept: Mapping[str, tuple[str, ...]]
    """Why a state version was kept."""
    kept_items: Mapping[str, tuple[str, ...]]
    """Why an embedding version's item snapshot was kept."""
    became_reachable: tuple[str, ...]
    """State versions that became reachable in the middle: some of their older rows went and have to be sent again."""


def reachable(registry: Registry, now_us: int) -> Reachable:
    """Who reaches what, now. The pointer is read before the leases, as servers load what it names and lease it then.

    Raises CheckpointError where the pointer or a release that it names cannot be read.
    """
    pointer = registry.pointer()
    leases = live_leases(registry, now_us, tolerance_us=CLOCK_SKEW_US)
    states: dict[str, list[str]] = {}
    items: dict[str, list[str]] = {}

    def keep(state_version: str, embedding_version: str, why: str) -> None:
        for reasons in (states.setdefault(state_version, []), items.setdefault(embedding_version, [])):
            if why not in reasons:
                reasons.append(why)

    for role, release_id in _named(pointer).items():
        manifest = registry.manifest(release_id)
        keep(manifest.state_version, manifest.embedding_version, f"{role} {release_id}")
    for lease in leases:
        for leased in lease.releases:
            keep(leased.state_version, leased.embedding_version, f"leased by {lease.server_id}")
    return Reachable(
        {version: tuple(why) for version, why in states.items()},
        {version: tuple(why) for version, why in items.items()},
        pointer.epoch,
    )


def _named(pointer: Pointer) -> dict[str, str]:
    roles = {"serving": pointer.serving, "prepared": pointer.prepared, "previous": pointer.previous}
    return {role: release_id for role, release_id in roles.items() if release_id is not None}


class Collector:
    """One collection, step by step: `collect` runs it to its end."""

    def __init__(
        self,
        registry: Registry,
        client: redis.Redis,
        states_uri: str | None,
        *,
        dry_run: bool = False,
        keep_folders: bool = False,
        pace: Pace | None = None,
        project: str = layout.PROJECT,
        scan_keys: int = SCAN_KEYS,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        fault: Fault = Fault(),  # noqa: B008 (immutable)
    ) -> None:
        """Takes the token, looks at who reaches what and finds where an earlier collector was killed."""
        self._registry = registry
        self._client = client
        self._states_uri = states_uri
        self._dry_run = dry_run
        self._keep_folders = keep_folders
        self._pace = pace
        self._project = project
        self._scan_keys = scan_keys
        self._now_us = now_us
        self._fault = fault
        self.token = registry.next_token()  # before anything is read: the order of the protocol
        self._reach = reachable(registry, now_us())
        known = set(known_versions(registry, states_uri))
        self.versions = sorted(known - set(self._reach.states))
        """State versions to collect; becomes shorter as versions become reachable."""
        self._kept = {version: why for version, why in self._reach.states.items() if version in known}
        self._became_reachable: list[str] = []
        self._rows: Counter[str] = Counter(dict.fromkeys(self.versions, 0))
        self._keys_scanned = 0
        self._steps = 0
        self._cursor: int | None = 0 if self.versions else None
        self._redis_run_id = self._ask_run_id() if self.versions else ""
        if not dry_run:
            self._carry_on()
            for version in self.versions:
                self._forget_published(version)

    def step(self) -> bool:
        """One bounded step of the scan. Returns whether the scan goes on.

        Raises StoreUnavailable where Redis does not answer or refuses writes; a later collection carries on.
        """
        if self._cursor is None:
            return False
        self._look_again()
        if not self.versions:
            self._cursor = None
            return False
        cursor, keys = self._scan(self._cursor)
        if self._pace is not None and keys:
            self._pace.wait_for(len(keys))
            self._look_again()
        if keys and self.versions:
            self._rows.update(self._delete(keys))
        self._keys_scanned += len(keys)
        self._steps += 1
        self._fault.reach(faults.BEFORE_COLLECT_NOTE.format(self._steps))
        self._cursor = cursor or None
        if not self._dry_run:
            self._note_progress()
        self._fault.reach(faults.AFTER_COLLECT_STEP.format(self._steps))
        return self._cursor is not None

    def finish(self) -> Report:
        """Remove the folders of what is unreachable even now, and the note of the progress. The scan must be over."""
        assert self._cursor is None, "the scan is not over"
        folders = []
        if not self._keep_folders:
            for version in list(self.versions):
                self._look_again()
                if version in self.versions and self._states_uri is not None:
                    folders += self._remove(Folder(self._states_uri) / version)
            for version in self._item_versions():
                self._look_again()
                if version not in self._reach.items:
                    folders += self._remove_items(version)
        if not self._dry_run:
            for version in self.versions:  # a late job may have noted as sent what has gone since
                self._forget_published(version)
            self._registry.remove(PROGRESS)
        return Report(
            dry_run=self._dry_run,
            rows=dict(self._rows),
            keys_scanned=self._keys_scanned,
            folders=tuple(folders),
            kept=self._kept,
            kept_items={v: self._reach.items[v] for v in self._item_versions() if v in self._reach.items},
            became_reachable=tuple(self._became_reachable),
        )

    def _look_again(self) -> None:
        """Leave alone what has become reachable since."""
        self._reach = reachable(self._registry, self._now_us())
        for version in [version for version in self.versions if version in self._reach.states]:
            self.versions.remove(version)
            self._kept[version] = self._reach.states[version]
            self._became_reachable.append(version)
            if not self._dry_run:
                self._forget_published(version)

    def _forget_published(self, version: str) -> None:
        """Whoever prepares the version again must send its rows again, also those of runs that are kept."""
        if self._states_uri is not None:
            RunStore(self._states_uri, version).forget_published()

    def _scan(self, cursor: int) -> tuple[int, list[bytes]]:
        try:
            answer: Any = self._client.scan(cursor, match=_glob_of(self._project), count=self._scan_keys, _type="HASH")
        except RedisError as error:
            raise _unavailable("did not list its keys", error) from error
        next_cursor, keys = answer
        return int(next_cursor), [key for key in keys if layout.is_user_key(key, self._project)]

    def _delete(self, keys: list[bytes]) -> dict[str, int]:
        """One round trip; rows that went by version."""
        fields: list[bytes] = []
        for version in self.versions:
            view = layout.view_name(version)
            *features, timestamp = layout.row_fields(view)
            fields += [timestamp, layout.fence_field(view), *features]
        shared = [self.token, int(self._dry_run), *fields]
        try:
            try:
                replies = self._call(keys, shared)
            except NoScriptError:
                self._client.script_load(DELETE_ROWS)
                replies = self._call(keys, shared)
        except RedisError as error:
            raise _unavailable("did not let rows be collected", error) from error
        return {version: sum(reply[v] for reply in replies) for v, version in enumerate(self.versions)}

    def _call(self, keys: list[bytes], shared: list[Any]) -> list[list[int]]:
        script_sha = sha_of(DELETE_ROWS)
        keys_per_call = max(1, ROWS_PER_CALL // len(self.versions))
        with self._client.pipeline(transaction=False) as pipe:
            for start in range(0, len(keys), keys_per_call):
                some = keys[start : start + keys_per_call]
                pipe.evalsha(script_sha, len(some), *some, *shared)
            replies: list[list[int]] = pipe.execute()
        return replies

    def _ask_run_id(self) -> str:
        """Redis's name for this life of its process: cursors of another one mean nothing."""
        try:
            answer: Any = self._client.info("server")
        except RedisError as error:
            raise _unavailable("did not say who it is", error) from error
        return str(answer["run_id"])

    def _plan(self) -> dict[str, Any]:
        """What must be the same for a cursor to be of use."""
        return {
            "redis_run_id": self._redis_run_id,
            "project": self._project,
            "epoch": self._reach.epoch,
            "versions": self.versions,
        }

    def _note_progress(self) -> None:
        note = {
            **self._plan(),
            "cursor": self._cursor,
            "rows": dict(self._rows),
            "keys_scanned": self._keys_scanned,
        }
        self._registry.put(PROGRESS, json.dumps(note, indent=1).encode())

    def _carry_on(self) -> None:
        """Take over what a killed collector noted, where it still holds."""
        content = self._registry.get(PROGRESS)
        if content is None or not self.versions:
            return
        noted = json.loads(content)
        if {name: noted.get(name) for name in self._plan()} == self._plan():
            self._cursor = noted["cursor"]
            self._rows.update(noted["rows"])
            self._keys_scanned = noted["keys_scanned"]

    def _item_versions(self) -> list[str]:
        return [name for name in self._registry.names(item_index.FOLDER) if _VERSION.fullmatch(name)]

    def _remove_items(self, version: str) -> list[str]:
        if not self._dry_run:  # the manifest first: what is left of a snapshot without one is no snapshot
            self._registry.remove(f"{item_index.FOLDER}/{version}/manifest.json")
        return self._remove(Folder(self._registry.uri) / item_index.FOLDER / version)

    def _remove(self, folder: Folder) -> list[str]:
        if not folder.exists(""):
            return []
        if not self._dry_run:
            folder.remove()
        return [folder.uri]


def collect(
    registry: Registry,
    client: redis.Redis,
    states_uri: str | None,
    *,
    dry_run: bool = False,
    keep_folders: bool = False,
    pace: Pace | None = None,
    project: str = layout.PROJECT,
    scan_keys: int = SCAN_KEYS,
    now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    fault: Fault = Fault(),  # noqa: B008 (immutable)
) -> Report:
    """Remove the rows, Parquet folders and item snapshots that neither the pointer nor a live lease reaches.

    Release directories stay. states_uri: None leaves Parquet out.  dry_run: only count; nothing is written but the
    token counter.  keep_folders: only Redis.  pace: keys a second.  scan_keys: about how many keys a step looks at.
    Raises StoreUnavailable where Redis does not answer (a later collection carries on), CheckpointError where a
    release or the pointer cannot be read (nothing is removed).
    """
    collector = Collector(
        registry,
        client,
        states_uri,
        dry_run=dry_run,
        keep_folders=keep_folders,
        pace=pace,
        project=project,
        scan_keys=scan_keys,
        now_us=now_us,
        fault=fault,
    )
    while collector.step():
        pass
    return collector.finish()


def known_versions(registry: Registry, states_uri: str | None) -> Collection[str]:
    """Every state version there is a release or a folder of. Raises CheckpointError for a torn release."""
    versions = {registry.manifest(release_id).state_version for release_id in registry.releases()}
    if states_uri is not None:
        versions |= {name for name in Folder(states_uri).names() if _VERSION.fullmatch(name)}
    return versions


def _glob_of(project: str) -> str:
    return "*" + re.sub(r"([*?\[\]\\^-])", r"\\\1", project)


def _unavailable(what: str, error: RedisError) -> StoreUnavailable:
    return StoreUnavailable(f"Redis {what}: {type(error).__name__}: {str(error)[:300]}")
