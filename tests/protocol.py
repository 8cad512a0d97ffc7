"""The release protocol as random walks over its real parts, and the guards that can be taken away from it.

A walk is a few dozen random operations on one small deployment: operators move the pointer (some from a stale view of
it), jobs write rows (late, twice, out of order, with a clock an hour ahead, half), rows are damaged, servers follow the
pointer or lag, renew leases or let them run out, restart, answer requests; items are indexed; a collector takes a step
or is killed; Redis is away for a while. Whatever decides something is the real code: the registry's pointer on a real
folder, the Lua scripts on a real Redis, follower, lease holder, guard, engine, item snapshots, collector. Only the
weights are stand-ins: a state says in numbers whose it is, of which version, run and token; a head passes it on beside
its own number; an item id names the index it is from. So every reply tells what it was made of.

One thread: what happens in the middle of something else is let in at named places (between a fetch and its decision,
within a move of the pointer, between a collector's look and its script). Not here: real waiting, losing rows, and a row
torn so that its times still agree, which no reader can tell.

After each operation the invariants are checked (`INVARIANTS`). `GUARDS` names the checks of the real code, each with a
way to take it away; without any one of them a walk breaks an invariant.
"""

import contextlib
import fcntl
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import redis
import torch
from numpy.typing import NDArray

import online.registry
from deploy.redis_server import start_redis
from feature_repo import layout
from model.errors import ConfigError, PointerConflict, StateMismatch, StoreUnavailable, TowerError
from model.item_index import FOLDER, ItemIndex, has_snapshot, read_snapshot, write_snapshot
from model.leases import Lease
from model.records import Context
from model.release import Manifest, Pointer, Registry
from model.retrieval.rules import Plan
from online import guard
from online.engine import Answered, Request, process_batch, retrieve
from online.guard import Answer
from online.leases import LeaseHolder
from online.registry import Follower
from online.residents import Loaded, Resident, ResidentSet
from online.stores.redis import RedisStore
from pipelines import collect
from pipelines.collect import Collector
from pipelines.transforms import publish
from pipelines.transforms.publish import FUTURE_TOLERANCE_S, MAX_TOKEN, publish_table
from tests.releases import SMALL, make_description

INVARIANTS = {
    "parts": "every part of a reply is of one release, one user and one write",
    "items": "the items of a reply are of the index of its embedding_version",
    "pinned": "a reply is of the epoch that served when the request came in, and of a release of that epoch",
    "epoch": "the epochs of one server process's replies never fall",
    "accepted": "a caller gets the embedding_version it expects, and the previous release only if it accepts that",
    "used": "a sound row of the serving release is used",
    "store": "a row is the newest that was written to it by (as-of, token), and no other write touches it",
    "future": "no row is from the future by Redis's clock",
    "moves": "a successful move follows on the pointer that its operator saw, and none is lost",
    "collected": "no row or snapshot that the pointer or a live lease reaches is collected",
    "emptied": "when all is quiet, a collector leaves nothing that nobody reaches",
    "converged": "when all is quiet, every server follows the pointer and answers from new rows",
    "leased": "a server's lease, while it is live, names every release that the server may answer with",
    "crash": "nothing raises but the errors that are declared",
}
USERS = (1, 2, 3)
SECOND_US = 1_000_000
LEASE_S = 30
WIDTH = 4
CONFIG = replace(SMALL, d_model=WIDTH, num_heads=1, embedding_dim=8)
LENGTH = 40
"""Operations of a walk."""


class Violation(Exception):
    """An invariant was broken."""

    def __init__(self, invariant: str, detail: str) -> None:
        assert invariant in INVARIANTS
        super().__init__(f"{invariant}: {INVARIANTS[invariant]}; {detail}")
        self.invariant = invariant
        self.trace: list[str] = []


def check(holds: Any, invariant: str, detail: object) -> None:
    """Raises Violation unless it holds (NaN compares as false, so it does not)."""
    if not holds:
        raise Violation(invariant, str(detail))


# Stand-ins for weights: numbers that say where they come from.


@dataclass(frozen=True)
class Tagged:
    """A release as far as follower, snapshot builder and head need one."""

    number: int
    state_number: int
    manifest: Manifest
    item_table: torch.Tensor
    featuriser: Any


def _tagged(number: int, state_number: int) -> Tagged:
    manifest = Manifest(
        release_id=f"release-{number}",
        state_version=f"{0x5000 + state_number:016x}",
        embedding_version=f"{0xE000 + number:016x}",
        config=CONFIG,
        description=make_description(),
        shape=None,  # type: ignore[arg-type]
        fingerprints={},
        files={},
        created_at="",
        trained_until_us=0,
        metrics={},
        libraries={},
    )
    item_ids = pa.array([10 * number, 10 * number + 1])
    return Tagged(number, state_number, manifest, torch.ones(2, 8), SimpleNamespace(num_items=2, item_ids=item_ids))


RELEASES = {
    release.manifest.release_id: release
    for release in (_tagged(1, 1), _tagged(2, 2), _tagged(3, 2), _tagged(4, 3))  # 3: a head-only retrain of 2
}
VERSIONS = {release.manifest.state_version: release.state_number for release in RELEASES.values()}
RELEASE_IDS = list(RELEASES)
VERSION_NAMES = list(VERSIONS)


class TaggedHead:
    """An embedding is: release number, the state's four numbers, the run that history_until names (-1 for none)."""

    def __init__(self, release: Tagged, base_s: int) -> None:
        self.cold_state: NDArray[np.float32] = np.array([-release.number, 0, 0, 0], np.float32)
        self._number, self._base_s = release.number, base_s

    def embed(
        self, states: NDArray[np.float32], contexts: Sequence[Context], history_until_us: Sequence[int | None]
    ) -> NDArray[np.float32]:
        embedding = np.zeros((len(states), 8), np.float32)
        embedding[:, 0] = self._number
        embedding[:, 1 : 1 + WIDTH] = states
        embedding[:, 5] = [-1 if us is None else run_of(us, self._base_s) for us in history_until_us]
        return embedding


def run_of(history_until_us: int, base_s: int) -> int:
    """The run that wrote this history_until, half a second before its as-of time."""
    return (history_until_us + SECOND_US // 2) // SECOND_US - base_s


@dataclass(frozen=True)
class Row:
    """What stands in Redis for one user and version: its run, counted in seconds from the base, and token."""

    run: int
    token: int
    is_sound: bool = True

    @property
    def order(self) -> tuple[int, int]:
        return self.run, self.token


# The places where the world can be made to fail.


class SharedRedis(redis.Redis):
    """A client that finds no Redis while `is_down`, and may be interrupted before it sends a script."""

    is_down = False
    before_script: Callable[[], None] | None = None

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.is_down:
            raise redis.ConnectionError("down")
        return super().execute_command(*args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        if self.is_down:
            raise redis.ConnectionError("down")
        if self.before_script is not None:
            interrupt, self.before_script = self.before_script, None
            interrupt()
        return super().pipeline(transaction, shard_hint)


class SharedRegistry(Registry):
    """The real registry over a folder of its own, but for the weights; it may show an old pointer or fail to load."""

    shows: Pointer | None = None
    failures = 0
    before_put: Callable[[], None] | None = None

    def releases(self) -> list[str]:
        return RELEASE_IDS

    def manifest(self, release_id: str) -> Manifest:
        return RELEASES[release_id].manifest

    def load(self, release_id: str, **how: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError("the registry's disk is away")
        return RELEASES[release_id]

    def pointer(self) -> Pointer:
        return self.shows or super().pointer()

    def put(self, name: str, content: bytes) -> None:
        if self.before_put is not None:
            interrupt, self.before_put = self.before_put, None
            interrupt()
        super().put(name, content)


class HookedStore:
    """The real store of the service; something may happen between its answer and the decision."""

    def __init__(self, site: "Site") -> None:
        self._site = site
        self.after_fetch: Callable[[], None] = lambda: None

    def fetch(self, keys: Sequence[bytes], fields: Sequence[bytes], timeout_s: float) -> list[Sequence[bytes | None]]:
        if self._site.is_down:
            raise StoreUnavailable("down")
        values = self._site.store.fetch(keys, fields, timeout_s)
        self.after_fetch()
        return values


class Site:
    """One Redis and one folder for many worlds, one after another."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.direct: Any = redis.Redis.from_url(url)
        self.jobs = SharedRedis.from_url(url)
        self.collectors = SharedRedis.from_url(url)
        self.store = RedisStore(url)
        self.base_s = int(time.time()) - 1_000_000
        self.counts: Counter[str] = Counter()
        """What the walks have come through: operations by name, and outcomes."""
        self._worlds = 0

    @property
    def is_down(self) -> bool:
        return self.jobs.is_down

    @is_down.setter
    def is_down(self, down: bool) -> None:
        self.jobs.is_down = self.collectors.is_down = down

    def close(self) -> None:
        for client in (self.direct, self.jobs, self.collectors):
            client.close()
        del self.store  # and its connection

    @contextlib.contextmanager
    def world(self) -> Iterator["World"]:
        """A fresh deployment: empty Redis, empty registry folder."""
        self.direct.flushdb()
        self.is_down = False
        self.collectors.before_script = None
        self._worlds += 1
        folder = self.folder / str(self._worlds)
        try:
            yield World(self, str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def open_site() -> Iterator[Site]:
    """A site with a Redis of its own, its folder in memory where the machine has such."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name,
        start_redis(Path(name) / "redis", options=["--unixsocket", f"{name}/socket"]),
        mock.patch.object(online.registry, "_RETRY_AFTER_S", 0.0),  # walks do not wait
        mock.patch.object(fcntl, "flock", _flock_at_once),
    ):
        log = logging.getLogger("online.registry")
        level = log.level
        log.setLevel(logging.CRITICAL + 1)
        site = Site(Path(name), f"unix://{name}/socket")
        try:
            yield site
        finally:
            site.close()
            log.setLevel(level)


_flock = fcntl.flock


def _flock_at_once(file: Any, operation: int) -> None:
    """A lock that somebody holds raises BlockingIOError: in one thread, waiting would be for ever."""
    _flock(file, operation | fcntl.LOCK_NB)


# Actors


@dataclass
class Job:
    """A batch run: it knows its versions, as-of time and token from the start, and writes piece by piece."""

    token: int
    run: int
    pieces: list[tuple[str, tuple[int, ...]]]
    now_s: float
    written: int = 0


class Serving:
    """One server process: what it follows, the lease it holds."""

    def __init__(self, name: str, world: "World", clock_us: int) -> None:
        self.name = name
        self.clock_us = clock_us
        """How far its clock is off."""
        self.lease: Lease | None = None
        """As it was last written."""
        self.highest_epoch = 0
        self.mixes_up_items = False
        self.registry = SharedRegistry(world.registry.uri)
        self._base_s = world.site.base_s
        self.holder = LeaseHolder(
            self.registry,
            server_id=name,
            address="",
            lease_s=LEASE_S,
            current=lambda: self.follower.current,
            on_written=lambda lease: setattr(self, "lease", lease),
            now_us=lambda: world.now_us + clock_us,
        )
        self.follower = Follower(
            self.registry,
            before_change=lambda residents: self.holder.widen(residents),
            load=self._load,
            load_snapshot=self._load_snapshot,
        )

    def pin(self) -> ResidentSet | None:
        """The set that a request keeps from its entry to its reply."""
        return self.follower.current

    def _load(self, release_id: str) -> Loaded:
        release = self.registry.load(release_id)
        return Loaded(release.manifest, TaggedHead(release, self._base_s))

    def _load_snapshot(self, embedding_version: str) -> ItemIndex | None:
        """The version's items, or, mixed up, those of another version that has some."""
        versions = self.registry.names(FOLDER)
        if self.mixes_up_items:
            versions = [version for version in versions if version != embedding_version]
            embedding_version = versions[0] if versions else embedding_version
        return read_snapshot(self.registry, embedding_version) if embedding_version in versions else None


@dataclass(frozen=True)
class Op:
    """One operation and the dice for its choices, thrown beforehand: a walk without some operations stays a walk."""

    name: str
    dice: tuple[int, ...]


@dataclass
class Dice:
    """Choices from an operation's numbers."""

    numbers: list[int]

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.numbers.pop(0) % len(choices)]

    def once_in(self, times: int) -> bool:
        return self.numbers.pop(0) % times == 0


class World:
    """A deployment at work, and what the invariants say of it."""

    def __init__(self, site: Site, folder: str) -> None:
        self.site = site
        self.registry = SharedRegistry(folder)
        self.now_us = (site.base_s + 1_000_000) * SECOND_US
        """The true time of leases and collectors; it only moves when it is told to."""
        self.trace: list[str] = []
        self.moves: dict[int, Pointer] = {0: Pointer()}
        self.seen = [Pointer(), Pointer()]
        self.last_run = 0
        self.jobs: list[Job] = []
        self.rows: dict[tuple[int, str], Row] = {}
        """What must stand in Redis."""
        self.collector: Collector | None = None
        self.store = HookedStore(site)
        self.views = {version: layout.view_name(version) for version in VERSIONS}
        self.fields = [
            name for view in self.views.values() for name in (*layout.row_fields(view), layout.fence_field(view))
        ]
        self.servers: list[Serving] = []
        self.gone: list[Serving] = []

    def begin(self) -> None:
        """The first release serves, one run is written, two servers are up. Raises Violation."""
        self._moved(0, lambda: self.registry.commit(RELEASE_IDS[0], expected_epoch=0))
        write_snapshot(self.registry, RELEASES[RELEASE_IDS[0]])  # type: ignore[arg-type]
        self._start(run=1)
        self._write_all(self.jobs[0])
        self.servers = [Serving("server-0.0", self, 0), Serving("server-1.0", self, -250 * SECOND_US)]
        for server in self.servers:
            self._refresh(server)

    # Operations: each takes dice and does nothing where it has nothing to do.

    def apply(self, op: Op) -> None:
        """Raises Violation."""
        self.site.counts[op.name] += 1
        try:
            getattr(self, op.name)(Dice(list(op.dice)))
        except Violation:
            raise
        except Exception as error:
            raise Violation("crash", f"{type(error).__name__}: {error}") from error

    def note(self, text: str) -> None:
        self.trace.append(text)

    def look(self, dice: Dice) -> None:
        operator = dice.pick((0, 1))
        self.seen[operator] = self.registry.pointer()
        self.note(f"operator {operator} looks at the pointer: epoch {self.seen[operator].epoch}")

    def move(self, dice: Dice) -> None:
        operator, stays_stale = dice.pick((0, 1)), dice.once_in(3)
        if not stays_stale:
            self.seen[operator] = self.registry.pointer()
        epoch = self.seen[operator].epoch
        release_id = dice.pick(RELEASE_IDS)
        prepared = self.seen[operator].prepared
        action = dice.pick(("prepare", "prepare", "commit", "commit", "rollback", "abandon", "close_window"))
        if action == "commit" and prepared is not None and not dice.once_in(4):
            release_id = prepared
        named = action in ("prepare", "commit")
        method = getattr(self.registry, action)
        what = f"{action} {release_id}" if named else action
        self.note(f"operator {operator}, who saw epoch {epoch}: {what}")
        arguments = (release_id,) if named else ()
        if dice.once_in(6):
            self.registry.before_put = self._other_operator
        try:
            self._moved(epoch, lambda: method(*arguments, expected_epoch=epoch))
        except PointerConflict:
            self.site.counts["stale operator refused"] += 1
            self.note("  refused")
        finally:
            self.registry.before_put = None

    def _other_operator(self) -> None:
        """Another operator closes the window, or abandons, while a move is half done. The lock makes it wait."""
        other = SharedRegistry(self.registry.uri)
        seen = other.pointer()
        move = other.close_window if seen.previous is not None else other.abandon
        self.note(f"  meanwhile another operator, who saw epoch {seen.epoch}: {move.__name__}")
        try:
            self._moved(seen.epoch, lambda: move(expected_epoch=seen.epoch))
        except BlockingIOError:
            self.site.counts["operator waits"] += 1
            self.note("  has to wait")

    def start_job(self, dice: Dice) -> None:
        kind = dice.pick(("next day", "next day", "same day", "an older day", "clock an hour ahead"))
        run = {
            "next day": self.last_run + 1,
            "same day": self.last_run,
            "an older day": max(1, self.last_run - 1),
            "clock an hour ahead": int(time.time()) + 3600 - self.site.base_s,
        }[kind]
        self._start(run, ahead=kind == "clock an hour ahead")
        job = self.jobs[-1]
        self.note(f"job {len(self.jobs) - 1} starts: {kind}, run {run}, token {job.token}, {len(job.pieces)} pieces")

    def write(self, dice: Dice) -> None:
        """One piece: mostly the next one of a young job, else any of any job, again or out of turn."""
        number = (len(self.jobs) - 1) if not dice.once_in(3) else self.jobs.index(dice.pick(self.jobs))
        job = self.jobs[number]
        in_turn = not dice.once_in(4)
        piece = job.pieces[job.written % len(job.pieces)] if in_turn else dice.pick(job.pieces)
        job.written += in_turn
        self.note(f"job {number} writes version {VERSIONS[piece[0]]} of users {piece[1]}")
        self._write(job, *piece)

    def damage(self, dice: Dice) -> None:
        """A stored row is made unusable in one way; its event time and fence stay."""
        if not self.rows:
            return
        user, version = dice.pick(sorted(self.rows))
        old = self.rows[user, version]
        kind = dice.pick(("other version", "torn state", "torn time", "narrow", "not a number", "field missing"))
        view = self.views[version]
        state, version_field, until, encoded, _ = layout.row_fields(view)
        number = VERSIONS[version]
        later = old.run + 5
        other = dice.pick([name for name in VERSIONS if name != version])
        changes: dict[bytes, bytes] = {
            "other version": {
                state: layout.encode_state(state_of(VERSIONS[other], user, old.run, old.token)),
                version_field: layout.encode_string(other),
            },
            "torn state": {
                state: layout.encode_state(state_of(number, user, later, old.token)),
                until: layout.encode_int64((self.site.base_s + later) * SECOND_US - SECOND_US // 2),
            },
            "torn time": {encoded: layout.encode_int64((self.site.base_s + later) * SECOND_US)},
            "narrow": {state: layout.encode_state(np.ones(WIDTH - 1, np.float32))},
            "not a number": {state: layout.encode_state(np.full(WIDTH, np.nan, np.float32))},
            "field missing": {},
        }[kind]
        self.note(f"the row of user {user}, version {number}, is damaged: {kind}")
        if changes:
            self.site.direct.hset(layout.redis_key(user), mapping=changes)
        else:
            self.site.direct.hdel(layout.redis_key(user), dice.pick([state, version_field, until, encoded]))
        self.rows[user, version] = replace(old, is_sound=False)

    def refresh(self, dice: Dice) -> None:
        server = dice.pick(self.servers)
        if dice.once_in(6):
            server.registry.shows = self.moves[dice.pick(sorted(self.moves))]
        elif dice.once_in(8):
            server.registry.failures = dice.pick((1, 2))
        server.mixes_up_items = dice.once_in(8)
        self._refresh(server)
        shown, server.registry.shows, server.registry.failures = server.registry.shows, None, 0
        server.mixes_up_items = False
        at = server.follower.pointer.epoch
        self.note(f"{server.name} looks at the pointer{f' (is shown epoch {shown.epoch})' if shown else ''}: {at}")

    def build_index(self, dice: Dice) -> None:
        pointer = self.registry.pointer()
        release_id = dice.pick(pointer.resident())
        write_snapshot(self.registry, RELEASES[release_id])  # type: ignore[arg-type]
        self.note(f"the items of {release_id} are indexed")

    def lease(self, dice: Dice) -> None:
        server = dice.pick(self.servers)
        server.holder.renew()
        self._check_lease(server)
        self.note(f"{server.name} renews its lease")

    def restart(self, dice: Dice) -> None:
        self._restart(dice.pick(range(len(self.servers))))

    def _restart(self, place: int) -> None:
        """Killed and started again, as another server to the registry; the old lease runs out by itself."""
        old = self.servers[place]
        self.gone.append(old)
        name, _, life = old.name.rpartition(".")
        self.servers[place] = Serving(f"{name}.{int(life) + 1}", self, old.clock_us)
        self._refresh(self.servers[place])
        self.note(f"{old.name} is killed and started again")

    def request(self, dice: Dice) -> None:
        server = dice.pick(self.servers)
        accept_previous, refresh_meanwhile = dice.once_in(2), dice.once_in(3)
        expected = ""
        if dice.once_in(3):
            expected = RELEASES[dice.pick(RELEASE_IDS)].manifest.embedding_version
        self.note(
            f"{server.name} is asked{' (previous accepted)' if accept_previous else ''}"
            f"{f' for version {expected}' if expected else ''}"
            f"{', and follows the pointer meanwhile' if refresh_meanwhile else ''}"
        )
        if refresh_meanwhile:
            self.store.after_fetch = lambda: self._refresh(server)
        try:
            self._request(server, accept_previous, expected)
            self._retrieve(
                server, Request(USERS[0], Context(), time.monotonic() + 60, False, expected, accept_previous)
            )
        finally:
            self.store.after_fetch = lambda: None

    def redis_goes(self, dice: Dice) -> None:
        self.site.is_down = True
        self.note("Redis cannot be reached")

    def redis_comes(self, dice: Dice) -> None:
        self.site.is_down = False

    def wait(self, dice: Dice) -> None:
        seconds = dice.pick((20, 20, 400))
        self.now_us += seconds * SECOND_US
        self.note(f"{seconds} s pass")

    def collect(self, dice: Dice) -> None:
        """A collector starts, takes a step, ends, or is killed."""
        is_killed, is_interrupted, keep_going = dice.once_in(12), dice.once_in(2), dice.once_in(2)
        try:
            if self.collector is None:
                self.collector = Collector(
                    self.registry, self.site.collectors, None, scan_keys=1, now_us=lambda: self.now_us
                )
                self.note(
                    f"a collector starts: token {self.collector.token}, "
                    f"versions {[VERSIONS[version] for version in self.collector.versions]}"
                )
                if not keep_going:
                    return
            elif is_killed:
                self.collector = None
                self.site.counts["collector killed"] += 1
                self.note("the collector is killed")
                return
            while self._collect_step(dice if is_interrupted else None):
                is_interrupted = False
                if not keep_going:
                    return
            self._finish_collecting()
        except StoreUnavailable:
            self.collector = None
            self.note("  the collector finds no Redis and ends")

    # What the operations are made of

    def _moved(self, expected_epoch: int, move: Callable[[], Pointer]) -> None:
        """A move that succeeds makes the next epoch of the one that its operator saw, or changes nothing."""
        before = self.registry.pointer()
        after = move()
        if after != before:
            check(
                before.epoch == expected_epoch and after.epoch == expected_epoch + 1 and after.epoch not in self.moves,
                "moves",
                f"seen epoch {expected_epoch}, the pointer was {before}, is {after}",
            )
            self.moves[after.epoch] = after
        check(self.registry.pointer() == after, "moves", f"wanted {after}, there is {self.registry.pointer()}")

    def _named_versions(self) -> list[str]:
        pointer = self.registry.pointer()
        return list(dict.fromkeys(RELEASES[name].manifest.state_version for name in pointer.resident()))

    def _start(self, run: int, *, ahead: bool = False) -> None:
        pieces = [(version, users) for version in self._named_versions() for users in (USERS[:2], USERS[2:])]
        token = self.registry.next_token()
        self.jobs.append(Job(token, run, pieces, time.time() + 3600 * ahead))
        if not ahead:
            self.last_run = max(self.last_run, run)

    def _write_all(self, job: Job) -> None:
        for version in dict.fromkeys(version for version, _ in job.pieces):
            self._write(job, version, USERS)

    def _write(self, job: Job, version: str, users: tuple[int, ...]) -> None:
        table = self._table(job, version, users)
        is_future = self.site.base_s + job.run > time.time() + FUTURE_TOLERANCE_S
        try:
            publish_table(self.site.jobs, table, version, job.token, now_s=job.now_s)
        except StoreUnavailable:
            self.site.counts["write without Redis"] += 1
            self.note("  no Redis")
            return
        except ConfigError:
            check(is_future, "crash", "refused a run that is not from the future")
            self.site.counts["run from the future refused"] += 1
            self.note("  refused")
        else:
            for user in users:
                old = self.rows.get((user, version))
                self.site.counts["late write"] += old is not None and old.order > (job.run, job.token)
                if not is_future and (old is None or old.order <= (job.run, job.token)):
                    self.rows[user, version] = Row(job.run, job.token)
        self._check_rows(users)

    def _table(self, job: Job, version: str, users: tuple[int, ...]) -> pa.Table:
        as_of_us = (self.site.base_s + job.run) * SECOND_US
        states = np.concatenate([state_of(VERSIONS[version], user, job.run, job.token) for user in users])
        return pa.table(
            {
                "user_id": pa.array(users, pa.int64()),
                "state": pa.ListArray.from_arrays(
                    pa.array(range(0, WIDTH * len(users) + 1, WIDTH), pa.int32()), pa.array(states)
                ),
                "state_version": pa.array([version] * len(users)),
                "history_until": pa.array([as_of_us - SECOND_US // 2] * len(users)),
                "encoded_at": pa.array([as_of_us] * len(users)),
                "event_timestamp": pa.array([as_of_us] * len(users), pa.timestamp("us", "UTC")),
            }
        )

    def _read(self, users: Sequence[int]) -> dict[tuple[int, str], Row]:
        """What stands in Redis, read apart from the code under test."""
        with self.site.direct.pipeline(transaction=False) as pipe:
            for user in users:
                pipe.hmget(layout.redis_key(user), self.fields)
            answers = pipe.execute()
        found = {}
        width = layout.ROW_LENGTH + 1
        for user, answer in zip(users, answers, strict=True):
            for place, version in enumerate(VERSION_NAMES):
                row = self._decode(user, version, answer[width * place : width * (place + 1)])
                if row is not None:
                    found[user, version] = row
        return found

    def _decode(self, user: int, version: str, values: Sequence[bytes | None]) -> Row | None:
        if all(value is None for value in values):
            return None
        *row_values, fence = values
        as_of_s, token = layout.decode_fence(fence) or (0, 0)
        run = layout.decode_timestamp(row_values[-1] or b"") - self.site.base_s
        damaged = Row(run, token, is_sound=False)
        try:
            row = layout.decode_row(row_values)
        except layout.LayoutError:
            return damaged
        assert row is not None
        as_of_us = (self.site.base_s + run) * SECOND_US
        is_sound = (
            as_of_s == self.site.base_s + run
            and row.state.tolist() == state_of(VERSIONS[version], user, run, token).tolist()
            and row.state_version == version
            and row.encoded_at_us == as_of_us
            and row.history_until_us == as_of_us - SECOND_US // 2
        )
        return Row(run, token) if is_sound else damaged

    def _check_rows(self, users: Sequence[int]) -> None:
        found = self._read(users)
        latest = int(time.time()) + FUTURE_TOLERANCE_S - self.site.base_s
        for key, row in found.items():
            check(row.run <= latest, "future", f"user {key[0]}, version {VERSIONS[key[1]]}: {row}")
        wanted = {key: row for key, row in self.rows.items() if key[0] in users}
        check(found == wanted, "store", f"wanted {wanted}, there is {found}")

    def _refresh(self, server: Serving) -> None:
        server.follower.refresh()
        self._check_lease(server)

    def _check_lease(self, server: Serving) -> None:
        """A lease is never behind what is in use."""
        current = server.follower.current
        if current is None or (server.lease is not None and not server.lease.is_live(self.now_us + server.clock_us)):
            return
        named = set() if server.lease is None else {leased.release_id for leased in server.lease.releases}
        used = {resident.release_id for resident in current.residents}
        check(used <= named, "leased", f"{server.name} uses {sorted(used)}, its lease names {sorted(named)}")

    def _reachable(self) -> tuple[set[str], set[str]]:
        """State and embedding versions that the pointer or a lease reaches that its own server takes for live."""
        manifests = [RELEASES[name].manifest for name in self.registry.pointer().resident()]
        leased = [
            leased
            for server in (*self.servers, *self.gone)
            if server.lease is not None and server.lease.is_live(self.now_us + server.clock_us)
            for leased in server.lease.releases
        ]
        named = [*manifests, *leased]
        return {m.state_version for m in named}, {m.embedding_version for m in named}

    def _collect_step(self, dice: Dice | None) -> bool:
        """A step; somebody may prepare a version between the collector's look at the pointer and its script."""
        assert self.collector is not None
        owed = {key for key in self.rows if key[1] in self._reachable()[0]}
        self.note(f"the collector takes a step, versions {[VERSIONS[v] for v in self.collector.versions]}")
        if dice is not None and self.collector.versions:
            version = dice.pick(self.collector.versions)
            self.site.collectors.before_script = lambda: owed.update(self._prepare_meanwhile(version))
        try:
            more = self.collector.step()
        finally:
            self.site.collectors.before_script = None
        found = self._read(USERS)
        for key in set(self.rows) - set(found):
            self.site.counts["row collected"] += 1
            check(key not in owed, "collected", f"the row of user {key[0]}, version {VERSIONS[key[1]]}, is gone")
            del self.rows[key]
        check(found == self.rows, "store", f"wanted {self.rows}, there is {found}")
        return more

    def _prepare_meanwhile(self, version: str) -> set[tuple[int, str]]:
        """An operator prepares a release of the version, and its job writes all rows. Returns them."""
        release_id = next(name for name, r in RELEASES.items() if r.manifest.state_version == version)
        epoch = self.registry.pointer().epoch
        try:
            self._moved(epoch, lambda: self.registry.prepare(release_id, expected_epoch=epoch))
        except PointerConflict:
            return set()
        self._start(self.last_run)
        self._write_all(self.jobs[-1])
        self.note(f"  meanwhile: {release_id} is prepared and written whole, token {self.jobs[-1].token}")
        return {(user, version) for user in USERS}

    def _finish_collecting(self) -> None:
        assert self.collector is not None
        _, reachable = self._reachable()
        there = [version for version in reachable if has_snapshot(self.registry, version)]
        collector, self.collector = self.collector, None
        report = collector.finish()
        self.site.counts["snapshot collected"] += len(report.folders)
        self.note(f"the collector ends: rows {sum(report.rows.values())}, folders {len(report.folders)}")
        for version in there:
            check(has_snapshot(self.registry, version), "collected", f"the snapshot {FOLDER}/{version} is gone")

    def _request(self, server: Serving, accept_previous: bool = False, expected: str = "") -> list[Answered]:
        pinned, at_entry = server.pin(), server.follower.current
        if pinned is None or at_entry is None:
            return []
        requests = [Request(user, Context(), time.monotonic() + 60, False, expected, accept_previous) for user in USERS]
        now_us = (self.site.base_s + 1_000_000) * SECOND_US
        results = process_batch(requests, pinned, self.store, now_us=now_us, store_timeout_s=30)
        answers = []
        for user, result in zip(USERS, results, strict=True):
            if isinstance(result, TowerError):
                check(isinstance(result, StateMismatch) and expected, "crash", f"{type(result).__name__}: {result}")
                continue
            self._check_answer(server, result, requests[0], user, now_us, at_entry)
            row = self.rows.get((user, at_entry.serving.state_version))
            if not expected and not self.site.is_down and row is not None and row.is_sound:
                is_used = result.answer is Answer.EXACT and result.embedding_E[3] == row.run
                check(is_used, "used", f"{result.answer.name} {result.reason}; there is {row}")
            answers.append(result)
        return answers

    def _retrieve(self, server: Serving, request: Request) -> bool:
        """Whether there were items for the first user."""
        at_entry = server.follower.current
        if at_entry is None:
            return False
        now_us = (self.site.base_s + 1_000_000) * SECOND_US
        try:
            found = retrieve(request, Plan(k=2), at_entry, self.store, now_us=now_us, store_timeout_s=30)
        except StateMismatch:
            return False
        self._check_answer(server, found.answered, request, USERS[0], now_us, at_entry)
        resident = found.answered.resident
        tags = {item // 10 for item in found.found.item_ids if isinstance(item, int)}
        is_one = tags == {RELEASES[resident.release_id].number}
        told = f"{resident.release_id} with items {found.found.item_ids} of {found.found.embedding_version}"
        check(is_one and found.found.embedding_version == resident.embedding_version, "items", told)
        self.site.counts["items"] += 1
        return True

    def _check_answer(
        self, server: Serving, answered: Answered, request: Request, user: int, now_us: int, at_entry: ResidentSet
    ) -> None:
        expected, accept_previous = request.expected_embedding_version, request.accept_previous
        resident = answered.resident
        release = RELEASES[resident.release_id]
        number, version, owner, run, _, until = answered.embedding_E[:6].tolist()
        told = (
            f"user {user}: {answered.answer.name} {answered.reason} by {resident.release_id} at epoch "
            f"{answered.epoch}, made of {answered.embedding_E.tolist()}"
        )
        if answered.answer is Answer.COLD_START:
            check((number, version, until) == (release.number, -release.number, -1), "parts", told)
        else:
            encoded_run = (now_us - answered.state_age_us) // SECOND_US - self.site.base_s
            parts = (number, version, owner, run, until)
            check(parts == (release.number, release.state_number, user, encoded_run, encoded_run), "parts", told)
        check(resident.state_version == release.manifest.state_version, "parts", told)
        check(resident.embedding_version == release.manifest.embedding_version, "parts", told)
        pointer = self.moves[answered.epoch]
        named = [pointer.serving] if answered.answer is Answer.EXACT else pointer.resident()
        check(answered.epoch == at_entry.epoch and resident.release_id in named, "pinned", told)
        check(answered.epoch >= server.highest_epoch, "epoch", f"{told}, after {server.highest_epoch}")
        server.highest_epoch = answered.epoch
        check(not expected or resident.embedding_version == expected, "accepted", told)
        is_accepted = accept_previous or expected or answered.answer is not Answer.PREVIOUS_RELEASE
        check(is_accepted, "accepted", told)
        self.site.counts[f"answer {answered.answer.name}"] += 1

    def settle(self) -> None:
        """All is quiet; what must be so then."""
        try:
            self._settle()
        except Violation:
            raise
        except Exception as error:
            raise Violation("crash", f"{type(error).__name__}: {error}") from error

    def _settle(self) -> None:
        self.note("all is quiet; one more run")
        self.site.is_down = False
        self.collector = None
        self._check_rows(USERS)
        history = [change.pointer for change in self.registry.history()]
        wanted = [pointer for epoch, pointer in sorted(self.moves.items()) if epoch]
        check(history == wanted, "moves", f"wanted {wanted}, the history is {history}")
        pointer = self.registry.pointer()
        assert pointer.serving is not None
        self._start(self.last_run + 1)
        self._write_all(self.jobs[-1])
        write_snapshot(self.registry, RELEASES[pointer.serving])  # type: ignore[arg-type]
        self._restart(0)
        for server in self.servers:
            self._refresh(server)
            current = server.follower.current
            assert current is not None
            resident = [r.release_id for r in current.residents]
            there = f"{server.name} has epoch {current.epoch}: {resident}, the pointer is {pointer}"
            check(current.epoch == pointer.epoch and current.serving.release_id == pointer.serving, "converged", there)
            check(sorted(resident) == sorted(pointer.resident()), "converged", there)
            answers = self._request(server)
            check(len(answers) == len(USERS), "converged", there)
            check(all(answer.answer is Answer.EXACT for answer in answers), "converged", there)
        has_items = self._retrieve(self.servers[0], Request(USERS[0], Context(), time.monotonic() + 60))
        check(has_items, "converged", f"{self.servers[0].name} finds no items")
        self._empty()

    def _empty(self) -> None:
        """Leases have run out; one collection carries on from a killed one, the next sees everything."""
        self.note("servers are gone for long, two collections")
        self.now_us += 1000 * SECOND_US
        for _ in range(2):
            collect.collect(self.registry, self.site.collectors, None, now_us=lambda: self.now_us)
        wanted = {key: row for key, row in self.rows.items() if key[1] in self._named_versions()}
        found = self._read(USERS)
        check(found.items() >= wanted.items(), "collected", f"wanted {wanted}, there is {found}")
        check(found == wanted, "emptied", f"wanted {wanted}, there is {found}")
        manifests = [RELEASES[name].manifest for name in self.registry.pointer().resident()]
        left = set(self.registry.names(FOLDER)) - {manifest.embedding_version for manifest in manifests}
        check(not left, "emptied", f"snapshots {left} are left")


def state_of(version: int, user: int, run: int, token: int) -> NDArray[np.float32]:
    """A state that says whose it is."""
    return np.array([version, user, run, token], np.float32)


# Walks

WEIGHTS = {
    "look": 2, "move": 9, "start_job": 4, "write": 9, "damage": 3, "refresh": 7, "build_index": 2,
    "lease": 3, "restart": 1, "request": 9, "redis_goes": 1, "redis_comes": 3, "wait": 3, "collect": 9,
}  # fmt: skip


def walk(seed: int, length: int = LENGTH) -> list[Op]:
    """The operations of one example."""
    dice = random.Random(seed)
    names = dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=length)
    return [Op(name, tuple(dice.randrange(1 << 16) for _ in range(8))) for name in names]


def run(site: Site, ops: Iterable[Op]) -> Violation | None:
    """One example, from a fresh world to quiet: None where every invariant held."""
    with site.world() as world:
        try:
            world.begin()
            for op in ops:
                world.apply(op)
            world.settle()
        except Violation as violation:
            violation.trace = [*world.trace, str(violation)]
            return violation
    return None


@dataclass(frozen=True)
class Found:
    """The first example that broke an invariant."""

    seed: int
    examples: int
    """Examples run, this one included."""
    violation: Violation


def search(site: Site, seeds: Iterable[int], invariant: str | None = None) -> Found | None:
    """Run examples until one breaks an invariant; with a name, until one breaks that one."""
    for examples, seed in enumerate(seeds, start=1):
        violation = run(site, walk(seed))
        if violation is not None and invariant in (None, violation.invariant):
            return Found(seed, examples, violation)
    return None


def shrink(site: Site, seed: int) -> Violation:
    """The violation of a walk with as few of its operations as break the same invariant."""
    ops = walk(seed)
    violation = run(site, ops)
    assert violation is not None, f"walk {seed} breaks nothing"
    size = len(ops) // 2
    while size:
        at = 0
        while at < len(ops):
            fewer = ops[:at] + ops[at + size :]
            found = run(site, fewer)
            if found is not None and found.invariant == violation.invariant:
                ops, violation = fewer, found
            else:
                at += size
        size //= 2
    return violation


# Guards, and how each is taken away


@dataclass(frozen=True)
class Guard:
    """A check of the real code."""

    what: str
    breaks: str
    """An invariant that does not hold without it."""
    remove: Callable[[], contextlib.AbstractContextManager[Any]]


def _without_check(check: guard.Check) -> contextlib.AbstractContextManager[Any]:
    left = tuple((reason, other) for reason, other in guard.CHECKS if other is not check)
    assert len(left) == len(guard.CHECKS) - 1
    return mock.patch.object(guard, "CHECKS", left)


@contextlib.contextmanager
def _changed_script(module: Any, name: str, old: str, new: str) -> Iterator[None]:
    script = getattr(module, name)
    assert script.count(old) == 1, f"{name} does not hold {old!r} once"
    changed = script.replace(old, new)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, name, changed))
        if module is publish:
            stack.enter_context(mock.patch.object(module, "SCRIPT_SHA", publish.sha_of(changed)))
        yield


class _Unpinned:
    """Whatever the server holds at the moment of asking."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def __getattr__(self, name: str) -> Any:
        return getattr(self._follower.current, name)


def _pin_nothing(server: Serving) -> Any:
    return None if server.follower.current is None else _Unpinned(server.follower)


def _forgetful(follower: Follower) -> None:
    follower.pointer = Pointer(epoch=-1)
    _refresh(follower)


_refresh = Follower.refresh


def _all_candidates(residents: ResidentSet, expected: str, accept_previous: bool) -> tuple[Resident, ...]:
    return residents.residents


@contextlib.contextmanager
def _highest_token() -> Iterator[None]:
    start = Collector.__init__

    def started(collector: Collector, *args: Any, **options: Any) -> None:
        start(collector, *args, **options)
        collector.token = MAX_TOKEN

    with mock.patch.object(Collector, "__init__", started):
        yield


def _swap(target: Any, name: str, value: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: mock.patch.object(target, name, value)


GUARDS = {
    "row_version": Guard("a row names the version of its view", "parts", lambda: _without_check(guard.carries_version)),
    "row_width": Guard("a state has the release's width", "crash", lambda: _without_check(guard.has_width)),
    "row_finite": Guard("a state is finite", "parts", lambda: _without_check(guard.is_finite)),
    "row_times": Guard("a row's times agree", "parts", lambda: _without_check(guard.times_agree)),
    "view_per_version": Guard(
        "each state version has a view of its own", "store", _swap(layout, "view_name", lambda v: "one")
    ),
    "pin": Guard("a request keeps the set that it came in with", "pinned", _swap(Serving, "pin", _pin_nothing)),
    "follower_epoch": Guard("a server refuses a lower epoch", "epoch", _swap(Follower, "refresh", _forgetful)),
    "expected_version": Guard(
        "a release answers only who expects its embedding_version",
        "accepted",
        _swap(ResidentSet, "candidates", _all_candidates),
    ),
    "index_version": Guard(
        "an index meets only embeddings of its version", "items", _swap(guard, "index_matches", lambda *_: True)
    ),
    "lease_first": Guard(
        "a server's lease names a set before the set is in use",
        "leased",
        _swap(LeaseHolder, "widen", lambda holder, residents: None),
    ),
    "expected_epoch": Guard(
        "a move names the epoch that its operator saw",
        "moves",
        _swap(Registry, "_expect", lambda registry, epoch: registry.pointer()),
    ),
    "pointer_lock": Guard(
        "one move of the pointer at a time",
        "moves",
        _swap(Registry, "_lock", lambda registry: contextlib.nullcontext()),
    ),
    "write_as_of": Guard(
        "an older as-of time loses",
        "store",
        lambda: _changed_script(publish, "COMPARE_AND_SET", "if seconds > as_of or nanos > 0 then", "if false then"),
    ),
    "write_token": Guard(
        "a lower token loses",
        "store",
        lambda: _changed_script(publish, "COMPARE_AND_SET", "or tonumber(fenced_token) <= token", "or true"),
    ),
    "redis_clock": Guard(
        "an as-of time in the future by Redis's clock is refused",
        "future",
        lambda: _changed_script(publish, "COMPARE_AND_SET", "if ahead > tonumber(ARGV[13]) then", "if false then"),
    ),
    "collect_leases": Guard(
        "a collector honours leases", "collected", _swap(collect, "live_leases", lambda *_, **__: [])
    ),
    "collect_skew": Guard("a collector allows for clocks that differ", "collected", _swap(collect, "CLOCK_SKEW_US", 0)),
    "collect_token": Guard("a collector leaves rows of a later token", "collected", _highest_token),
    "collect_looks_again": Guard(
        "a collector looks at the pointer before every step",
        "collected",
        _swap(Collector, "_look_again", lambda collector: None),
    ),
    "collect_fields": Guard(
        "a collector removes fields, not users",
        "collected",
        lambda: _changed_script(
            collect, "DELETE_ROWS", "call('HDEL', key, unpack(ARGV, at, at + 5))", "call('DEL', key)"
        ),
    ),
}
