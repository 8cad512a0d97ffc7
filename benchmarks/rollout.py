"""A live rollout under load: A serves, B is prepared and committed, then rolled back to A; every answer is checked.

    python -m benchmarks.rollout [--quick] [--repeats 3] [--no-record] [--plot docs/plots/rollout.svg]

Real processes throughout: a Redis that keeps its data, two tower-serve (one looks at the pointer only every few seconds
and is stopped for a moment right after the flip), tower-release and tower-encode on one core under `chrt --idle`, and a
load generator that asks at a fixed rate whether or not answers come. Meanwhile the batch writer is killed twice and run
again, Redis is stopped and started, and the daily job runs for both releases before and after the flip.

Each answer must be what the release it names computes by itself, undivided: its encoder on the user's history as of
the run that wrote the row, its head on the result, within 1e-4; or on its cold-start state, where it says so. And what
it says of release, epoch, versions and kind must agree. Anything else is counted as mixed.

Legend: E embedding width.
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from benchmarks.results import record, versions
from deploy.redis_server import RunningRedis, start_redis
from feature_repo import layout
from model.config import TowerConfig
from model.dataset import load_description
from model.errors import ConfigError
from model.event_log import offsets_of, read_items, read_log, read_users
from model.features import build_vocabularies
from model.generator import GeneratorSettings, generate
from model.hybrid_tower import HybridTower
from model.records import Context, Event, Id, SubjectItem
from model.release import Manifest, Pointer, Registry, Release
from online.client import EmbedQuery, UserTowerClient, write_query
from online.generated import tower_pb2 as pb
from pipelines import encode_users, release
from pipelines.faults import AFTER_STAGE_SHARD, CRASH_VARIABLE
from pipelines.io import read_parquet
from pipelines.runs import RunStore, file_name, iso

CONFIG: Final = TowerConfig(
    d_model=64, num_layers=2, num_heads=2, history_limit=50, embedding_dim=64, hash_rows=256, head_hidden=128
)
TOLERANCE: Final = 1e-4
DAY_US: Final = 86_400_000_000
DAYS: Final = 7
FIRST_DAYS: Final = 3
"""Days of the log at the start. A has a run as of the end of the second and of the third; B's backfill is as of the
third; the daily job then runs for the fourth (before the flip) and the fifth and sixth (after it)."""
SHARDS: Final = 8
VARIANTS: Final = 4
"""Of each user's request: two plain ones, one that accepts the previous release, one that wants A's space."""
OUTAGE_TAIL_S: Final = 2.0
"""After Redis answers again, how long failures are still its own."""
AGE_SLACK_US: Final = 100_000
"""Of the clock, when an answer's age is turned back into the time of its run. Runs are days apart."""
METHODS: Final = {
    "single": "/hybridtower.v1.UserTower/Embed",
    "batch": "/hybridtower.v1.UserTower/EmbedBatch",
    "retrieve": "/hybridtower.v1.Recommender/Retrieve",
}
BEST: Final = 10
"""Items that a Retrieve request wants."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size and length of the scenario."""

    users: int = 4000
    events: int = 120_000
    asked: int = 400
    """Users the load asks for, one in twenty of them unknown; a multiple of batch_rows."""
    singles_per_s: float = 50.0
    """Embed requests a second and server."""
    batches_per_s: float = 12.0
    """EmbedBatch requests a second and server."""
    retrieves_per_s: float = 5.0
    """Retrieve requests a second and server."""
    batch_rows: int = 25
    warm_up_s: float = 4.0
    steady_s: float = 25.0
    """On A before anything happens: what latencies are held against."""
    between_s: float = 5.0
    """On B after the flip, and before and after other steps."""
    after_s: float = 15.0
    """On A after the rollback, longer if min_rows is not reached."""
    min_rows: int = 100_000
    rows_per_s: float = 1000.0
    """--redis-rows-per-s of the batch jobs."""
    dailies_after: int = 2
    """Daily encodes between commit and rollback: 1 or 2."""
    outage_s: float = 2.0
    pause_s: float = 0.7
    lag_poll_ms: float = 5000.0
    background: bool = True
    """Batch jobs on the last core alone, under `chrt --idle`: there they get what the servers leave."""
    in_process: bool = False
    """Run the commands that are not killed in this process, for tests: no new interpreter for each."""


FULL: Final = Scale()
QUICK: Final = Scale(
    users=1500, events=40_000, steady_s=12.0, warm_up_s=2.0, between_s=2.0, after_s=5.0, min_rows=0, dailies_after=1
)


# What the answers are held against


@dataclass(frozen=True)
class World:
    """Two releases over one made-up data set, whose log grows by a file a day."""

    folder: Path
    registry: Registry
    a: Release
    b: Release
    events: pa.Table
    """The whole log, canonical, user by user."""
    start_us: int

    @property
    def log(self) -> Path:
        """The events so far."""
        return self.folder / "log"

    @property
    def states(self) -> Path:
        return self.folder / "states"

    def as_of_us(self, day: int) -> int:
        """The end of a day, counted from 1."""
        return self.start_us + day * DAY_US

    def open_day(self, day: int) -> None:
        """The day's events are in the log from now on."""
        self.log.mkdir(exist_ok=True)
        name = f"events-{datetime.fromtimestamp(self.as_of_us(day - 1) / 1e6, UTC):%Y-%m-%d}.parquet"
        (self.log / name).hardlink_to(self.folder / "data" / "events" / name)

    def encoded(self, manifest: Manifest) -> dict[int, set[Id]]:
        """As-of time of each run -> users it encodes: all with a history in the first, then who was active since."""
        first = FIRST_DAYS - 1 if manifest == self.a.manifest else FIRST_DAYS
        time_us = self.events["timestamp_us"]
        found: dict[int, set[Id]] = {}
        since_us = 0
        for as_of_us in map(self.as_of_us, range(first, DAYS + 1)):
            is_new = pc.and_(pc.greater(time_us, since_us), pc.less_equal(time_us, as_of_us))
            found[as_of_us] = set(pc.unique(self.events["user_id"].filter(is_new)).to_pylist())
            since_us = as_of_us
        return found

    def histories(self, users: set[Id], as_of_us: int) -> tuple[list[Id], pa.Table, NDArray[np.int64]]:
        """These users' events up to a time, one user after another, and the offsets."""
        wanted = pc.and_(
            pc.is_in(self.events["user_id"], value_set=pa.array(sorted(users), self.events.schema.field(0).type)),
            pc.less_equal(self.events["timestamp_us"], as_of_us),
        )
        table = self.events.filter(wanted)
        user_ids, offsets = offsets_of(table["user_id"])
        return user_ids.to_pylist(), table, offsets


def build(folder: Path, scale: Scale) -> World:
    """Generate the data and write A and B, untrained with lively weights, so that no two answers are alike."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = today - timedelta(days=DAYS)
    data = folder / "data"
    settings = GeneratorSettings(
        users=scale.users, items=600, days=DAYS, events=scale.events, start=f"{start:%Y-%m-%d}", seed=5
    )
    generate(settings, data)
    description = load_description(str(data / "dataset.yaml"))
    events, _ = read_log(str(data / "events"), description)
    users = read_users(str(data / "users.parquet"), description)
    items = read_items(str(data / "items.parquet"), description).select(["item_id", *description.item_columns])
    vocabularies = build_vocabularies(description, events, users)
    registry = Registry(folder / "registry")
    releases = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tower = HybridTower.build(CONFIG, description, vocabularies, items)
        with torch.no_grad():
            tower.head.cold_state_D.normal_()
            for parameter in tower.head.parameters():
                if parameter.ndim == 2:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        manifest = registry.write(tower.eval(), items, trained_until_us=int(start.timestamp() * 1e6))
        releases.append(registry.load(manifest.release_id))
    return World(folder, registry, releases[0], releases[1], events, int(start.timestamp()) * 1_000_000)


@dataclass(frozen=True)
class Asked:
    """Who is asked for, and in what context: fixed, so that every answer can be known beforehand."""

    users: list[Id]
    contexts: list[Context]

    def query(self, place: int, variant: int, a_version: str) -> EmbedQuery:
        """The request for the user at a place. a_version: A's embedding_version."""
        kind = self.kind(place, variant)
        return EmbedQuery(
            self.users[place],
            self.contexts[place],
            accept_previous_release=kind == "accepts previous",
            expected_embedding_version=a_version if kind == "wants A" else "",
        )

    @staticmethod
    def kind(place: int, variant: int) -> str:
        return ("plain", "plain", "accepts previous", "wants A")[(place + variant) % VARIANTS]


def choose(world: World, count: int) -> Asked:
    """Users of the first days drawn at random; one in twenty comes later and one in twenty never. Contexts of all
    kinds."""
    random = np.random.default_rng(3)
    first = world.encoded(world.b.manifest)[world.as_of_us(FIRST_DAYS)]
    later = sorted(set(pc.unique(world.events["user_id"]).to_pylist()) - first)
    users: list[Id] = random.permutation(sorted(first))[:count].tolist()
    users[::20] = [10**9 + n for n in range(len(users[::20]))]
    places = range(1, count, 20)
    for place, user in zip(places, random.permutation(later)[: len(places)].tolist(), strict=False):
        users[place] = user
    featuriser = world.a.featuriser
    values = featuriser.vocabularies
    items = featuriser.item_ids
    now_us = world.as_of_us(DAYS)

    def item() -> Id:
        chosen: Id = items[int(random.integers(len(items)))].as_py()
        return chosen

    contexts = []
    for place in range(count):
        session = tuple(
            Event(item(), values.event_types[0], now_us - (k + 1) * 60_000_000)
            for k in reversed(range(int(random.integers(0, 6))))
        )
        features = {name: str(random.choice(values.columns[name])) for name in featuriser.head_columns}
        subject = (SubjectItem(item(), 0.5),) if place % 2 else ()
        contexts.append(Context(features, now_us, session, subject) if place % 5 else Context())
    return Asked(users, contexts)


class Expected:
    """What each release, alone and undivided, says about the asked users."""

    def __init__(self, world: World, asked: Asked) -> None:
        place_of = {user: place for place, user in enumerate(asked.users)}
        self.warm: dict[tuple[str, int, int], NDArray[np.float32]] = {}
        """(release, place, as-of) -> f32 [E]. A user is missing where the run does not encode them."""
        self.cold: dict[tuple[str, int], NDArray[np.float32]] = {}
        self.items: dict[str, NDArray[np.float32]] = {}
        """release -> its item tower's rows, f32 [N, E]."""
        self.item_rows: dict[str, dict[Id, int]] = {}
        self.manifests = {r.manifest.release_id: r.manifest for r in (world.a, world.b)}
        for one in (world.a, world.b):
            name = one.manifest.release_id
            for as_of_us, encoded in world.encoded(one.manifest).items():
                users, table, offsets = world.histories(encoded & set(asked.users), as_of_us)
                state_UD = one.encode(table, offsets)
                until_us = [table["timestamp_us"][int(end) - 1].as_py() for end in offsets[1:]]
                embeddings = one.embed(state_UD, [asked.contexts[place_of[user]] for user in users], until_us)
                for user, embedding_E in zip(users, embeddings, strict=True):
                    self.warm[name, place_of[user], as_of_us] = embedding_E
            assert one.item_table is not None
            item_ids = one.featuriser.item_ids
            self.items[name] = one.item_table[: len(item_ids)].numpy()
            self.item_rows[name] = {item_id: row for row, item_id in enumerate(item_ids.to_pylist())}
            cold = np.repeat(one.cold_state[None], len(asked.users), 0)
            for place, embedding_E in enumerate(one.embed(cold, asked.contexts, [None] * len(asked.users))):
                self.cold[name, place] = embedding_E
        self._as_of_us: dict[tuple[str, int], list[int]] = {}
        for name, place, as_of_us in sorted(self.warm):
            self._as_of_us.setdefault((name, place), []).append(as_of_us)

    def runs(self, release_id: str, place: int) -> list[int]:
        """As-of times of the runs that encode a user, rising."""
        return self._as_of_us.get((release_id, place), [])

    def least_difference(self) -> float:
        """The closest that two expected embeddings of one user come, of A and B or warm and cold: the detector's
        power. Must be far above the tolerance."""
        names = list(self.manifests)
        least = float("inf")
        for (name, place, as_of_us), embedding_E in self.warm.items():
            others = [self.cold[n, place] for n in names]
            others += [v for n in names if n != name and (v := self.warm.get((n, place, as_of_us))) is not None]
            least = min(least, *(float(np.abs(embedding_E - other).max()) for other in others))
        return least


# The load


@dataclass(frozen=True)
class LoadPlan:
    """What the load generator is told; plain values, for another process."""

    targets: list[str]
    messages: dict[str, list[list[bytes]]]
    """single, batch and retrieve -> [variant][number]."""
    per_s: dict[str, float]
    """Requests a second and server."""
    rows: dict[str, int]
    timeout_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One request and what came of it. Times in seconds since the epoch."""

    kind: str
    """single, batch or retrieve."""
    server: int
    first: int
    """Place of the first row's user."""
    variant: int
    due_s: float
    sent_s: float
    received_s: float
    content: bytes
    code: str
    """Status of a request that failed; "" for an answer."""
    waited: bool = True
    """Whether the generator was free before the request was due: then sent - due is its own delay, by the machine."""

    @property
    def latency_s(self) -> float:
        """From when it was due, so that a stalled server is charged for all who waited."""
        return self.received_s - self.due_s


def plan_load(asked: Asked, a_version: str, targets: list[str], scale: Scale) -> LoadPlan:
    """Every message, ready to send."""
    count, rows = len(asked.users), scale.batch_rows
    queries = [[write_query(asked.query(u, v, a_version)) for u in range(count)] for v in range(VARIANTS)]
    batches = [
        [pb.EmbedBatchRequest(requests=some[start : start + rows]) for start in range(0, count, rows)]
        for some in queries
    ]
    return LoadPlan(
        targets,
        {
            "single": [[message.SerializeToString() for message in some] for some in queries],
            "batch": [[message.SerializeToString() for message in some] for some in batches],
            "retrieve": [
                [pb.RetrieveRequest(query=message, k=BEST).SerializeToString() for message in some] for some in queries
            ],
        },
        {"single": scale.singles_per_s, "batch": scale.batches_per_s, "retrieve": scale.retrieves_per_s},
        {"single": 1, "batch": rows, "retrieve": 1},
    )


def ask(plan: LoadPlan, server: int, kind: str, stop: threading.Event, found: list[Reply]) -> None:
    """One connection that asks at a fixed rate until told to stop; who is late catches up, and says so."""
    messages = plan.messages[kind]
    count, period_s = len(messages[0]), 1 / plan.per_s[kind]
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(plan.targets[server], options=options) as channel:
        grpc.channel_ready_future(channel).result(30)
        call = channel.unary_unary(METHODS[kind])
        start_s = time.time() + period_s * (server + list(METHODS).index(kind) / 3) / len(plan.targets)
        n = 0
        while not stop.is_set():
            due_s = start_s + n * period_s
            left_s = due_s - time.time()
            time.sleep(max(0.0, left_s))
            number, variant = (n + server * count // 2) % count, n // count % VARIANTS
            content, code = b"", ""
            sent_s = time.time()
            try:
                content = call(messages[variant][number], timeout=plan.timeout_s)
            except grpc.RpcError as error:
                code = error.code().name
            first = number * plan.rows[kind]
            found.append(Reply(kind, server, first, variant, due_s, sent_s, time.time(), content, code, left_s > 0))
            n += 1


def _generate(plan: LoadPlan, orders: Any) -> None:
    """The load generator's process: asks until ordered to stop, then hands over what it found."""
    gc.collect()
    gc.disable()  # a full collection over all that was found stops every thread for a tenth of a second
    stop, found = threading.Event(), list[Reply]()
    threads = [
        threading.Thread(target=ask, args=(plan, server, kind, stop, found))
        for server in range(len(plan.targets))
        for kind in METHODS
    ]
    for thread in threads:
        thread.start()
    while orders.recv() == "count":
        orders.send(sum(plan.rows[reply.kind] for reply in list(found)))
    stop.set()
    for thread in threads:
        thread.join()
    orders.send(found)


class Load:
    """The load generator, in a process of its own."""

    def __init__(self, plan: LoadPlan) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_generate, args=(plan, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def rows(self) -> int:
        """Rows asked so far."""
        self._orders.send("count")
        rows: int = self._orders.recv()
        return rows

    def stop(self) -> list[Reply]:
        """Everything it asked, and what came of it."""
        self._orders.send("stop")
        found: list[Reply] = self._orders.recv()
        self._process.join(30)
        return found

    def kill(self) -> None:
        """Harmless when it has ended."""
        self._process.kill()
        self._process.join()


# Judging the answers


@dataclass
class Notes:
    """What the driver did and when, seconds since the epoch."""

    phases: list[tuple[float, str]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    outage: tuple[float, float] = (0.0, 0.0)
    """From Redis's stop until OUTAGE_TAIL_S after it answers again."""
    published: list[tuple[float, str, int]] = field(default_factory=list)
    """(when, release, as-of): from then on every row of the run stands in Redis."""
    pause: tuple[float, float] = (0.0, 0.0)
    """While the second server was stopped."""
    before: str = "A serves"
    after: str = "A serves again"
    """The rollout lies between these two phases."""
    restarts: int = 0

    def phase(self, name: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} {name}", flush=True)
        self.phases.append((time.time(), name))

    def event(self, name: str) -> None:
        self.events.append((time.time(), name))

    def in_outage(self, reply: Reply) -> bool:
        return reply.sent_s <= self.outage[1] and reply.received_s >= self.outage[0]

    def is_paused(self, reply: Reply) -> bool:
        """Whether it had to wait for the stopped server."""
        return reply.server == 1 and reply.due_s <= self.pause[1] and reply.received_s >= self.pause[0]

    def phase_of(self, time_s: float) -> int:
        """Number of the phase in which a moment lies."""
        return max(0, bisect_right([start for start, _ in self.phases], time_s) - 1)


@dataclass
class Tally:
    """What was counted in one phase, or in all."""

    rows: int = 0
    singles_s: list[float] = field(default_factory=list)
    wakes_s: list[float] = field(default_factory=list)
    """How late the generator woke: what the machine alone does to a process that only wants to begin."""
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Verdict:
    """All answers of a run, judged."""

    phases: list[Tally]
    mixed: list[str] = field(default_factory=list)
    """One line for each mixed answer."""
    failed_outside: Counter[str] = field(default_factory=Counter)
    failed_inside: Counter[str] = field(default_factory=Counter)
    cold_outside: Counter[str] = field(default_factory=Counter)
    """Cold starts of users who have a row, outside the outage, by reason: told as such, so not mixed."""
    stale: int = 0
    """Answers from a row that a finished run should have replaced."""
    epochs_back: int = 0
    """Requests pinned to a lower epoch than an answer of the same server that was received before they were sent."""
    epochs: list[set[int]] = field(default_factory=list)
    """Seen of each server."""
    asked: Counter[str] = field(default_factory=Counter)
    """Rows by kind of request."""
    before_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    unpaused_s: list[float] = field(default_factory=list)
    """As during_s, without the requests that waited for the stopped server."""
    per_second: dict[str, Counter[int]] = field(default_factory=dict)
    """Kind of answer -> second since the start -> rows."""

    @property
    def rows(self) -> int:
        return self.asked.total()

    @property
    def p99_ratio(self) -> float:
        """Without the requests that waited for the stopped server, as without those of the Redis outage: a process that
        is stopped answers nothing, and its wait is as long as the scenario chooses. The server that lags is counted."""
        return p99_ms(self.unpaused_s) / p99_ms(self.before_s)

    @property
    def p99_ratio_stop_counted(self) -> float:
        return p99_ms(self.during_s) / p99_ms(self.before_s)


def quantile_ms(seconds: Sequence[float], q: float) -> float:
    return float(np.quantile(seconds, q)) * 1e3 if seconds else float("nan")


def p99_ms(seconds: Sequence[float]) -> float:
    return quantile_ms(seconds, 0.99)


class Judge:
    """Holds replies against what is expected."""

    def __init__(self, expected: Expected, pointers: Mapping[int, Pointer], names: Mapping[str, str]) -> None:
        """pointers: by epoch. names: release id -> A or B."""
        self._expected, self._pointers, self._names = expected, pointers, names
        self._a = next(release_id for release_id, name in names.items() if name == "A")
        self._runs = sorted({as_of_us for _, _, as_of_us in expected.warm})

    def complaint(self, reply: Any, asked: str, place: int, sent_s: float, received_s: float) -> str:
        """Why an answer of Embed or Retrieve is mixed; "" for one that is as it should be."""
        manifest = self._expected.manifests.get(reply.release_id)
        pointer = self._pointers.get(reply.epoch)
        if manifest is None or pointer is None:
            return f"unknown release {reply.release_id!r} or epoch {reply.epoch}"
        if (reply.state_version, reply.embedding_version) != (manifest.state_version, manifest.embedding_version):
            return f"versions {reply.state_version}, {reply.embedding_version} are not those of {reply.release_id}"
        candidates = {
            "plain": [pointer.serving],
            "accepts previous": [pointer.serving, pointer.previous],
            "wants A": [self._a],
        }[asked]
        is_serving = reply.release_id == pointer.serving
        may_answer = {
            pb.ANSWER_EXACT: is_serving and reply.release_id in candidates and not reply.reason,
            pb.ANSWER_PREVIOUS_RELEASE: not is_serving and reply.release_id in candidates and bool(reply.reason),
            pb.ANSWER_COLD_START: reply.release_id == candidates[0] and bool(reply.reason),
        }.get(reply.answer, False)
        if not may_answer:
            return (
                f"answer {reply.answer} ({reply.reason!r}) by {self._names[reply.release_id]} at epoch {reply.epoch} "
                f"to a request that is {asked}"
            )
        if reply.answer == pb.ANSWER_COLD_START:
            if reply.state_age_us:
                return f"a cold start with an age of {reply.state_age_us} us"
            wanted = self._expected.cold[reply.release_id, place]
        else:
            as_of_us = self.as_of_us(reply, sent_s, received_s)
            known = self._expected.warm.get((reply.release_id, place, as_of_us or 0))
            if known is None:
                return f"an age of {reply.state_age_us} us, which is no run that encoded the user"
            wanted = known
        if isinstance(reply, pb.RetrieveReply):
            return self._complaint_of_items(reply, wanted)
        difference = np.abs(np.array(reply.embedding, np.float32) - wanted).max()
        if not difference <= TOLERANCE:  # also for NaN
            return f"the embedding is off by {difference:.3g} from what {self._names[reply.release_id]} computes"
        return ""

    def _complaint_of_items(self, reply: pb.RetrieveReply, user_E: NDArray[np.float32]) -> str:
        """Held against a plain search of everything the release's own item tower gives."""
        if reply.index_embedding_version != reply.embedding_version:
            return f"an index of version {reply.index_embedding_version} under version {reply.embedding_version}"
        score_N = self._expected.items[reply.release_id] @ user_E
        best_K = np.sort(score_N)[::-1][:BEST]
        found_K = np.array([item.score for item in reply.items], np.float32)
        if found_K.shape != best_K.shape or not np.abs(found_K - best_K).max() <= TOLERANCE:
            return f"the scores {found_K} are not the best ones, {best_K}"
        rows = [self._expected.item_rows[reply.release_id].get(item.item_id.int_id) for item in reply.items]
        if None in rows or len(set(rows)) < len(rows) or not np.abs(score_N[rows] - found_K).max() <= TOLERANCE:
            return "the items do not have the scores they are given"
        return ""

    def as_of_us(self, reply: Any, sent_s: float, received_s: float) -> int | None:
        """The as-of time of the run that wrote the row, from its age; None where no run fits."""
        lo = int(sent_s * 1e6) - reply.state_age_us - AGE_SLACK_US
        hi = int(received_s * 1e6) - reply.state_age_us + AGE_SLACK_US
        fitting = [as_of for as_of in self._runs if lo <= as_of <= hi]
        return fitting[0] if len(fitting) == 1 else None

    def judge(self, replies: Sequence[Reply], notes: Notes, servers: int) -> Verdict:
        """Every answer."""
        verdict = Verdict([Tally() for _ in notes.phases], epochs=[set() for _ in range(servers)])
        names = [name for _, name in notes.phases]
        before = names.index(notes.before)
        after = names.index(notes.after) if notes.after in names else len(names)
        pinned: list[list[tuple[float, float, int]]] = [[] for _ in range(servers)]
        start_s = notes.phases[0][0]
        for reply in replies:
            place = notes.phase_of(reply.due_s)
            tally = verdict.phases[place]
            inside = notes.in_outage(reply)
            failed = verdict.failed_inside if inside else verdict.failed_outside
            if reply.kind == "single":
                tally.singles_s.append(reply.latency_s)
                if reply.waited:
                    tally.wakes_s.append(reply.sent_s - reply.due_s)
                if place == before:
                    verdict.before_s.append(reply.latency_s)
                elif before < place < after and not inside:
                    verdict.during_s.append(reply.latency_s)
                    if not notes.is_paused(reply):
                        verdict.unpaused_s.append(reply.latency_s)
            rows, errors = _rows_of(reply)
            count = len(rows) + sum(errors.values())
            tally.rows += count
            verdict.asked[reply.kind] += count
            tally.errors += errors
            failed += errors
            for offset, row in rows:
                kind = self._kind(row)
                tally.kinds[kind] += 1
                verdict.per_second.setdefault(kind.split(":")[0], Counter())[int(reply.due_s - start_s)] += 1
                at = reply.first + offset
                asked = Asked.kind(at, reply.variant)
                complaint = self.complaint(row, asked, at, reply.sent_s, reply.received_s)
                if complaint:
                    verdict.mixed.append(f"user {at}, server {reply.server}: {complaint}")
                elif row.answer != pb.ANSWER_COLD_START:
                    verdict.stale += self._is_stale(row, at, reply, notes)
                elif not inside and self._has_row(row.release_id, at, reply.sent_s, notes):
                    verdict.cold_outside[row.reason] += 1
            epochs = {row.epoch for _, row in rows}
            if len(epochs) > 1:
                verdict.mixed.append(f"one batch, several epochs: {sorted(epochs)}")
            verdict.epochs[reply.server] |= epochs
            pinned[reply.server] += [(reply.sent_s, reply.received_s, epoch) for epoch in epochs]
        verdict.epochs_back = sum(map(_epochs_back, pinned))
        return verdict

    def _kind(self, row: Any) -> str:
        name = self._names.get(row.release_id, "?")
        how = {
            pb.ANSWER_EXACT: f"{name} exact",
            pb.ANSWER_PREVIOUS_RELEASE: f"{name} beside",
            pb.ANSWER_COLD_START: f"{name} cold: {row.reason}",
        }
        return how.get(row.answer, "unspecified")

    def _is_stale(self, row: Any, place: int, reply: Reply, notes: Notes) -> bool:
        as_of_us = self.as_of_us(row, reply.sent_s, reply.received_s)
        assert as_of_us is not None
        return as_of_us < self._newest(row.release_id, place, reply.sent_s, notes)

    def _has_row(self, release_id: str, place: int, sent_s: float, notes: Notes) -> bool:
        return self._newest(release_id, place, sent_s, notes) > 0

    def _newest(self, release_id: str, place: int, sent_s: float, notes: Notes) -> int:
        """As-of time of the newest row that stands in Redis for sure; 0 for none."""
        done = [as_of for when, name, as_of in notes.published if name == release_id and when < sent_s]
        if not done:
            return 0
        return max((as_of for as_of in self._expected.runs(release_id, place) if as_of <= max(done)), default=0)


def _rows_of(reply: Reply) -> tuple[list[tuple[int, Any]], Counter[str]]:
    """Answers with their number in the request, and errors by code."""
    if reply.code:
        return [], Counter({reply.code: 1})
    if reply.kind != "batch":
        message = pb.EmbedReply if reply.kind == "single" else pb.RetrieveReply
        return [(0, message.FromString(reply.content))], Counter()
    rows, errors = [], Counter[str]()
    for number, row in enumerate(pb.EmbedBatchReply.FromString(reply.content).rows):
        if row.HasField("reply"):
            rows.append((number, row.reply))
        else:
            errors[f"row {row.error.code}"] += 1
    return rows, errors


def _epochs_back(pinned: list[tuple[float, float, int]]) -> int:
    """Of (sent, received, epoch): how many were sent after an answer with a higher epoch had been received."""
    by_receipt = sorted((received_s, epoch) for _, received_s, epoch in pinned)
    received = [received_s for received_s, _ in by_receipt]
    highest = np.maximum.accumulate([epoch for _, epoch in by_receipt]) if by_receipt else []
    back = 0
    for sent_s, _, epoch in pinned:
        before = bisect_left(received, sent_s)
        back += before > 0 and epoch < highest[before - 1]
    return back


# The scenario


@dataclass
class Outcome:
    """One run of the scenario."""

    replies: list[Reply]
    notes: Notes
    verdict: Verdict
    facts: dict[str, Any]
    """What was found in Redis afterwards."""


class Scenario:
    """A rollout and everything that goes wrong meanwhile, step by step."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.scale = scale
        self.world = build(folder, scale)
        self.asked = choose(self.world, scale.asked)
        self.expected = Expected(self.world, self.asked)
        self.names = {self.world.a.manifest.release_id: "A", self.world.b.manifest.release_id: "B"}
        self.notes = Notes()
        self.facts: dict[str, Any] = {"least difference": self.expected.least_difference()}
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._runs = 0

    def run(self) -> Outcome:
        """Everything, on a Redis of its own."""
        a, b = self.world.a.manifest, self.world.b.manifest
        with start_redis(self.world.folder / "redis", persist=True) as self.redis:
            self._set_up()
            with self._servers() as self.targets:
                load = Load(plan_load(self.asked, a.embedding_version, self.targets, self.scale))
                try:
                    self._roll_out(load)
                    replies = load.stop()
                finally:
                    load.kill()
                self.facts["servers end on"] = [self._epoch(target)[1] for target in self.targets]
            self._check_rows(self.world.as_of_us(self._last_day))
            self._check_writers()
        pointers = {change.pointer.epoch: change.pointer for change in self.world.registry.history()}
        self.notes.phases.append((float("inf"), "end"))
        verdict = Judge(self.expected, pointers, self.names).judge(replies, self.notes, len(self.targets))
        self.facts["pointer"] = [f"{e}: {self.names.get(p.serving or '', '-')}" for e, p in sorted(pointers.items())]
        self.facts["B's state version"] = b.state_version
        return Outcome(replies, self.notes, verdict, self.facts)

    @property
    def _last_day(self) -> int:
        return FIRST_DAYS + 1 + self.scale.dailies_after

    def _set_up(self) -> None:
        """A serves, as of the third day."""
        a = self.world.a.manifest.release_id
        for day in range(1, FIRST_DAYS):
            self.world.open_day(day)
        flags = ["--events", str(self.world.log), "--redis-url", self.redis.url, "--no-feast", "--shards", str(SHARDS)]
        flags += ["--as-of", iso(self.world.as_of_us(FIRST_DAYS - 1))]
        self._in_process(release.main, ["prepare", a, *self._places, *flags])
        self._in_process(release.main, ["commit", a, *self._places, "--redis-url", self.redis.url])
        self.world.open_day(FIRST_DAYS)
        self._in_process(encode_users.main, self._encode_flags(FIRST_DAYS, paced=False))
        self.notes.published += [
            (time.time(), a, self.world.as_of_us(FIRST_DAYS - 1)),
            (time.time(), a, self.world.as_of_us(FIRST_DAYS)),
        ]

    def _roll_out(self, load: Load) -> None:
        scale, notes = self.scale, self.notes
        b = self.world.b.manifest
        store = RunStore(str(self.world.states), b.state_version)
        publishing = Path(store.folder.uri) / "publishing"
        prepare = ["prepare", b.release_id, *self._places, "--events", str(self.world.log), "--no-feast"]
        prepare += ["--redis-url", self.redis.url, "--redis-rows-per-s", str(scale.rows_per_s), "--shards", str(SHARDS)]

        notes.phase("warm-up")
        time.sleep(scale.warm_up_s)
        notes.phase(notes.before)
        time.sleep(scale.steady_s)

        notes.phase("backfill of B, killed while it encodes")
        backfill = [*self._encode_flags(FIRST_DAYS), "--release", b.release_id, "--shards", str(SHARDS)]
        halfway = AFTER_STAGE_SHARD.format(SHARDS // 2)
        crashed = self._start("pipelines.encode_users", backfill, {CRASH_VARIABLE: halfway}).wait(300)
        assert crashed == -signal.SIGKILL, f"the backfill ended with {crashed}; see {self._logs}"
        assert not store.run_ids(), "a run was committed before the writer was killed"
        notes.event("writer killed")
        notes.phase("prepare B, killed while it publishes")
        self._killed("pipelines.release", prepare, lambda: any(publishing.glob("*.json")))
        assert store.run_ids(), "nothing was committed before the writer was killed"
        assert not store.published(), "the writer was killed too late"
        notes.event("writer killed")
        notes.phase("prepare B again, to its end")
        self._command("pipelines.release", prepare)
        notes.published.append((time.time(), b.release_id, self.world.as_of_us(FIRST_DAYS)))
        notes.event("B prepared")

        notes.phase("Redis stopped and started")
        stopped_s = time.time()
        notes.event("Redis stopped")
        self.redis.stop()
        time.sleep(scale.outage_s)
        self.redis.start()
        notes.event("Redis back")
        notes.outage = (stopped_s, time.time() + OUTAGE_TAIL_S)
        notes.restarts += 1
        time.sleep(OUTAGE_TAIL_S)

        notes.phase("daily encode of A and B")
        self._daily(FIRST_DAYS + 1)
        notes.phase("commit B, a server stopped for a moment")
        where = [*self._places, "--redis-url", self.redis.url, "--min-servers", str(len(self.targets))]
        self._command("pipelines.release", ["commit", b.release_id, *where])
        notes.event("B serves")
        paused_s = time.time()
        os.kill(self._pids[1], signal.SIGSTOP)
        time.sleep(scale.pause_s)
        os.kill(self._pids[1], signal.SIGCONT)
        notes.pause = (paused_s, time.time())
        self._wait_for_epoch()
        notes.phase("B serves")
        time.sleep(scale.between_s)
        for day in range(FIRST_DAYS + 2, self._last_day + 1):
            notes.phase("daily encode of A and B")
            self._daily(day)
            time.sleep(scale.between_s)
        notes.phase("roll back to A")
        self._command("pipelines.release", ["rollback", *where])
        notes.event("A serves again")
        self._wait_for_epoch()
        notes.phase(notes.after)
        end_s = time.time() + scale.after_s
        while time.time() < end_s or load.rows() < scale.min_rows:
            time.sleep(0.5)

    def _daily(self, day: int) -> None:
        self.world.open_day(day)
        self._command("pipelines.encode_users", self._encode_flags(day))
        self.notes.published += [(time.time(), name, self.world.as_of_us(day)) for name in self.names]
        self.notes.event(f"day {day} encoded")

    @property
    def _places(self) -> list[str]:
        return ["--registry", self.world.registry.uri, "--states", str(self.world.states)]

    def _encode_flags(self, day: int, *, paced: bool = True) -> list[str]:
        flags = [*self._places, "--events", str(self.world.log), "--as-of", iso(self.world.as_of_us(day))]
        flags += ["--redis-url", self.redis.url]
        return flags + (["--redis-rows-per-s", str(self.scale.rows_per_s)] if paced else [])

    # Processes

    def _start(
        self, module: str, flags: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        self._runs += 1
        with (self._logs / f"{self._runs:02d}-{module}.log").open("wb") as output:
            last = str(max(os.sched_getaffinity(0)))
            yielding = ["taskset", "--cpu-list", last, "chrt", "--idle", "0"] if self.scale.background else []
            command = [*yielding, sys.executable, "-m", module, *flags]
            known = os.environ | dict(environment or {})
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=known)

    def _command(self, module: str, flags: list[str]) -> None:
        """A command that must do its work."""
        if self.scale.in_process:
            self._in_process({"pipelines.release": release, "pipelines.encode_users": encode_users}[module].main, flags)
            return
        process = self._start(module, flags)
        if process.wait(300):
            log = (self._logs / f"{self._runs:02d}-{module}.log").read_text()[-3000:]
            raise SystemExit(f"{module} {' '.join(flags)} ended with {process.returncode}:\n{log}")

    def _killed(self, module: str, flags: list[str], when: Callable[[], bool]) -> None:
        """A command that is killed at a moment, as by a power cut."""
        process = self._start(module, flags)
        while not when():
            if process.poll() is not None:
                log = (self._logs / f"{self._runs:02d}-{module}.log").read_text()[-3000:]
                raise SystemExit(f"{module} ended with {process.returncode} before it could be killed:\n{log}")
            time.sleep(0.005)
        process.kill()
        process.wait(30)

    def _in_process(self, main: Callable[[Sequence[str]], int], flags: list[str]) -> None:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(flags)
        if status:
            raise SystemExit(f"{main.__module__} {' '.join(flags)} ended with {status}:\n{output.getvalue()[-3000:]}")

    @contextlib.contextmanager
    def _servers(self) -> Iterator[list[str]]:
        """Two servers, host:port of each once they are ready. The second looks at the pointer rarely."""
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        flags = ["--registry", self.world.registry.uri, "--redis-url", self.redis.url, "--port", "0"]
        flags += ["--metrics-port", "0", "--notice-s", "0"]
        processes = []
        try:
            for number, poll_ms in enumerate((500.0, self.scale.lag_poll_ms)):
                with (self._logs / f"server-{number}.log").open("wb") as log:
                    command = [sys.executable, "-m", "online", *flags, "--poll-ms", str(poll_ms)]
                    processes.append(
                        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
                    )
            self._pids = [process.pid for process in processes]
            targets = []
            for process in processes:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line.startswith("ready "):
                    raise SystemExit(f"a server did not start: {line!r}; see {self._logs}")
                targets.append("127.0.0.1:" + dict(word.split("=", 1) for word in line.split()[1:])["port"])
            yield targets
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)
                process.terminate()
            for process in processes:
                process.wait(30)
                assert process.stdout is not None
                process.stdout.close()

    def _epoch(self, target: str) -> tuple[int, str]:
        """(epoch, A or B) of a server."""
        with UserTowerClient(target, timeout_s=5) as client:
            reply = client.embed(self.asked.users[1])
        return reply.epoch, self.names[reply.release_id]

    def _wait_for_epoch(self) -> None:
        """Until every server follows the pointer."""
        wanted = self.world.registry.pointer().epoch
        give_up_at = time.monotonic() + 60
        while any(self._epoch(target)[0] < wanted for target in self.targets):
            if time.monotonic() > give_up_at:
                raise SystemExit(f"a server did not reach epoch {wanted} within 60 s; see {self._logs}")
            time.sleep(0.25)

    # Afterwards

    def _check_rows(self, as_of_us: int) -> None:
        """Every user's row of both releases, against the log: is it there, and of the newest run that was due?"""
        for one in (self.world.a, self.world.b):
            wanted: dict[Id, int] = {}
            for run_us, encoded in self.world.encoded(one.manifest).items():
                if run_us <= as_of_us:
                    wanted |= dict.fromkeys(encoded, run_us)
            active = self.world.encoded(one.manifest)[as_of_us]
            rows = read_rows(self.redis, list(wanted), one.manifest.state_version)
            found = {user: row.encoded_at_us for user, row in rows.items()}
            fresh = sum(found.get(user) == run_us for user, run_us in wanted.items())
            name = self.names[one.manifest.release_id]
            self.facts[f"{name}: rows fresh"] = (fresh, len(wanted))
            self.facts[f"{name}: active users fresh"] = (sum(found.get(u) == as_of_us for u in active), len(active))
            users, table, offsets = self.world.histories(set(wanted) & set(self.asked.users), as_of_us)
            state_UD = one.encode(table, offsets)
            worst = max(
                float(np.abs(rows[user].state - state_D).max()) for user, state_D in zip(users, state_UD, strict=True)
            )
            self.facts[f"{name}: states off by at most"] = worst

    def _check_writers(self) -> None:
        """Writers that must change nothing: a zombie, one that holds other states, one whose clock is ahead."""
        from pipelines.transforms.publish import publish_table

        a = self.world.a.manifest
        store = RunStore(str(self.world.states), a.state_version)
        day = self._last_day + 1
        self.world.open_day(day)
        slow = [*self._encode_flags(day, paced=False), "--redis-rows-per-s", str(self.scale.rows_per_s / 4)]
        zombie = self._start("pipelines.encode_users", slow)
        while not any((Path(store.folder.uri) / "publishing").glob("*.json")):
            assert zombie.poll() is None, "the zombie ended before it could be stopped"
            time.sleep(0.005)
        zombie.send_signal(signal.SIGSTOP)
        self._command("pipelines.encode_users", self._encode_flags(day, paced=False))
        rows = all_rows(self.redis)
        zombie.send_signal(signal.SIGCONT)
        self.facts["zombie: exit status"] = zombie.wait(120)
        self.facts["zombie: rows changed"] = changed(rows, all_rows(self.redis))

        run = store.run_ids()[-1]
        folder = store.run(run)
        tables = [read_parquet(folder, file_name("states", s)) for s in range(store.manifest(run).shards)]
        table = pa.concat_tables(tables).combine_chunks()
        doubled = pa.ListArray.from_arrays(
            table["state"].combine_chunks().offsets, pc.multiply(table["state"].combine_chunks().values, np.float32(2))
        )
        table = table.set_column(table.column_names.index("state"), "state", doubled)
        counts = publish_table(self.redis.url, table, a.state_version, 1)
        self.facts["older token, other states: written"] = counts.written
        self.facts["older token, other states: refused"] = counts.stale
        self.facts["older token, other states: rows changed"] = changed(rows, all_rows(self.redis))

        ahead_us = (int(time.time()) + 3600) * 1_000_000
        flags = self._encode_flags(day, paced=False)
        flags[flags.index("--as-of") + 1] = iso(ahead_us)
        job = self._start("pipelines.encode_users", flags)
        self.facts["an hour ahead: exit status of tower-encode"] = job.wait(120)
        times = pa.array(np.full(len(table), ahead_us))
        ahead = table.set_column(table.column_names.index("encoded_at"), "encoded_at", times)
        ahead = ahead.set_column(
            ahead.column_names.index("event_timestamp"), "event_timestamp", times.cast(pa.timestamp("us", "UTC"))
        )
        try:
            publish_table(self.redis.url, ahead, a.state_version, 2**40, now_s=time.time() + 3600)
            self.facts["an hour ahead, its own clock too"] = "written"
        except ConfigError:
            self.facts["an hour ahead, its own clock too"] = "refused by Redis's clock"
        self.facts["an hour ahead: rows changed"] = changed(rows, all_rows(self.redis))
        self.facts["rows compared"] = len(rows)


def read_rows(redis: RunningRedis, users: list[Id], version: str) -> dict[Id, layout.StateRow]:
    """The users' rows of one state version, where they can be decoded and name that version."""
    from pipelines.transforms.publish import connect

    fields = layout.row_fields(layout.view_name(version))
    rows = {}
    with connect(redis.url) as client, client.pipeline(transaction=False) as pipe:
        for user in users:
            pipe.hmget(layout.redis_key(user), fields)
        for user, values in zip(users, pipe.execute(), strict=True):
            row = layout.decode_row(values)
            if row is not None and row.state_version == version:
                rows[user] = row
    return rows


def all_rows(redis: RunningRedis) -> dict[bytes, dict[bytes, bytes]]:
    """Everything that stands in Redis, fences included."""
    from pipelines.transforms.publish import connect

    with connect(redis.url) as client, client.pipeline(transaction=False) as pipe:
        keys: list[bytes] = sorted(client.scan_iter(count=1000))
        for key in keys:
            pipe.hgetall(key)
        return dict(zip(keys, pipe.execute(), strict=True))


def changed(before: Mapping[bytes, Any], after: Mapping[bytes, Any]) -> int:
    """How many hashes differ, come or go."""
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


# Telling


def _by_method(asked: Counter[str]) -> str:
    return f"{asked['single']:,} by Embed, {asked['batch']:,} by EmbedBatch, {asked['retrieve']:,} by Retrieve"


def timeline(outcome: Outcome) -> str:
    """The phases as a Markdown table."""
    phases = outcome.notes.phases
    end_s = max(reply.received_s for reply in outcome.replies)
    lines = [
        "| phase | s | rows | p50, ms | p99, ms | own delay p99, ms | answers by kind | errors |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for (start_s, name), (next_s, _), tally in zip(phases, phases[1:], outcome.verdict.phases, strict=False):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in tally.kinds.most_common())
        errors = ", ".join(f"{code} {count}" for code, count in tally.errors.items()) or "none"
        lines.append(
            f"| {name} | {min(next_s, end_s) - start_s:.0f} | {tally.rows:,} "
            f"| {quantile_ms(tally.singles_s, 0.5):.1f} | {p99_ms(tally.singles_s):.1f} | {p99_ms(tally.wakes_s):.1f} "
            f"| {kinds} | {errors} |"
        )
    return "\n".join(lines)


def told(outcome: Outcome) -> str:
    """The figures below the table."""
    verdict = outcome.verdict
    lines = [
        timeline(outcome),
        "",
        f"rows {verdict.rows:,}: {_by_method(verdict.asked)}",
        f"mixed {len(verdict.mixed)}, failed outside the outage {verdict.failed_outside.total()} "
        f"{dict(verdict.failed_outside)}, inside {dict(verdict.failed_inside)}",
        f"cold starts of users with a row, outside the outage: {dict(verdict.cold_outside)}; stale: {verdict.stale}",
        f"epochs seen {[sorted(seen) for seen in verdict.epochs]}, went back {verdict.epochs_back}",
        f"p99 before {p99_ms(verdict.before_s):.1f} ms ({len(verdict.before_s):,}), "
        f"during {p99_ms(verdict.unpaused_s):.1f} ms ({len(verdict.unpaused_s):,}), ratio {verdict.p99_ratio:.2f}; "
        f"with the {len(verdict.during_s) - len(verdict.unpaused_s)} that waited for the stopped server "
        f"{p99_ms(verdict.during_s):.1f} ms, ratio {verdict.p99_ratio_stop_counted:.2f}; on A again afterwards "
        f"{p99_ms(verdict.phases[-2].singles_s):.1f} ms",
        *(f"{name}: {value}" for name, value in outcome.facts.items()),
        *verdict.mixed[:10],
    ]
    return "\n".join(lines)


def plot(outcome: Outcome, path: Path) -> None:
    """Latency over time with the events, and answers by kind below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start_s = outcome.notes.phases[0][0]
    by_second: dict[int, list[float]] = {}
    for reply in outcome.replies:
        if reply.kind == "single":
            by_second.setdefault(int(reply.due_s - start_s), []).append(reply.latency_s * 1e3)
    seconds = sorted(by_second)
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(10, 6.5), height_ratios=(3, 2))
    upper.plot(seconds, [np.median(by_second[s]) for s in seconds], label="median")
    upper.plot(seconds, [np.max(by_second[s]) for s in seconds], ".", markersize=3, label="slowest of the second")
    upper.set_yscale("log")
    upper.set_ylabel("Embed, ms")
    upper.legend(loc="lower right", fontsize=8)
    for when_s, name in outcome.notes.events:
        for axes in (upper, lower):
            axes.axvline(when_s - start_s, color="0.6", linewidth=0.8)
        if name != "Redis back":  # the grey band says so, and the labels would lie on each other
            upper.text(when_s - start_s, 1.01, name, rotation=60, fontsize=7, transform=upper.get_xaxis_transform())
    outage = [t - start_s for t in outcome.notes.outage]
    for axes in (upper, lower):
        axes.axvspan(*outage, color="0.9")
    whole = range(max(seconds) + 1)
    kinds = sorted(outcome.verdict.per_second)
    lower.stackplot(whole, [[outcome.verdict.per_second[k][s] for s in whole] for k in kinds], labels=kinds)
    lower.set_ylabel("answers a second")
    lower.set_xlabel("seconds")
    lower.legend(loc="lower right", fontsize=8, ncols=3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rollout"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def entries_of(outcomes: Sequence[Outcome], loads: Sequence[float]) -> list[dict[str, Any]]:
    """What is recorded of all runs."""
    verdicts = [outcome.verdict for outcome in outcomes]
    rows = sum(verdict.rows for verdict in verdicts)
    asked = sum((verdict.asked for verdict in verdicts), Counter[str]())
    first = outcomes[0]
    phases = ", ".join(name for _, name in first.notes.phases[:-1])
    epochs = "; ".join(f"server {n}: {sorted(seen)}" for n, seen in enumerate(first.verdict.epochs))
    kinds = sum((tally.kinds for verdict in verdicts for tally in verdict.phases), Counter[str]())
    told_kinds = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
    cold = sum((verdict.cold_outside for verdict in verdicts), Counter[str]())
    ratios = [round(verdict.p99_ratio, 2) for verdict in verdicts]
    stop_counted = [round(verdict.p99_ratio_stop_counted, 2) for verdict in verdicts]
    p99s = ", ".join(
        f"{p99_ms(v.before_s):.1f} -> {p99_ms(v.unpaused_s):.1f} ({p99_ms(v.during_s):.1f} with the stop, "
        f"{p99_ms(v.phases[-2].singles_s):.1f} on A again afterwards)"
        for v in verdicts
    )
    about = {"versions": versions("grpcio", "redis", "numpy", "torch", "apache-beam")}
    runs = f"{len(outcomes)} runs"
    inside = sum((verdict.failed_inside for verdict in verdicts), Counter[str]()).total()
    return [
        {
            "measure": "rollout.requests",
            "value": rows,
            "unit": "rows asked and checked",
            "target": 100_000,
            "note": f"{runs}; {_by_method(asked)}; phases: {phases}; "
            f"epochs in the first run: {epochs}; two writers killed and one Redis restart a run",
            **about,
        },
        {
            "measure": "rollout.mixed_answers",
            "value": sum(len(verdict.mixed) for verdict in verdicts),
            "unit": f"of {rows:,} rows",
            "target": 0,
            "note": f"tolerance {TOLERANCE:g}; the closest two expected answers of one user differ by "
            f"{first.facts['least difference']:.2g}; answers: {told_kinds}; epochs that went back: "
            f"{sum(v.epochs_back for v in verdicts)}; stale rows: {sum(v.stale for v in verdicts)}",
            **about,
        },
        {
            "measure": "rollout.failed_outside_outage",
            "value": sum(verdict.failed_outside.total() for verdict in verdicts),
            "unit": f"of {rows:,} rows",
            "target": 0,
            "note": f"policy cold_start; failed inside the outage: {inside}; cold starts of users with a row outside "
            f"it: {dict(cold) or 'none'}",
            **about,
        },
        {
            "measure": "rollout.p99_ratio",
            "value": statistics.median(ratios),
            "unit": "p99 of Embed during the rollout / before it, median of the runs; callers in Redis's outage and of "
            "the stopped server left out",
            "target": 1.5,
            "note": f"each run: {ratios}; p99 in ms: {p99s}; load average at the start of each: "
            f"{', '.join(f'{load:.1f}' for load in loads)} on {os.cpu_count()} cores; 100 Embed/s, 24 batches/s "
            f"of 25 rows and 10 Retrieve/s at a fixed rate, latency from when a request was due; "
            f"jobs on one core under chrt --idle; the server that lags behind the pointer by up to "
            f"{FULL.lag_poll_ms / 1e3:.0f} s is counted in full",
            **about,
        },
        {
            "measure": "rollout.p99_ratio_stop_counted",
            "value": statistics.median(stop_counted),
            "unit": "the same, callers of the stopped server counted, median of the runs",
            "note": f"each run: {stop_counted}; a server is stopped dead for {FULL.pause_s} s right after the flip "
            f"and its callers wait that long",
            **about,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute; not recorded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--plot", type=Path, default=Path("docs/plots/rollout.svg"))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to leave logs; default: nowhere")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    outcomes, loads = [], []
    for repeat in range(1 if options.quick else options.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) if options.keep is None else options.keep / str(repeat)
            folder.mkdir(parents=True, exist_ok=True)
            loads.append(os.getloadavg()[0])
            outcome = Scenario(folder, scale).run()
        print(f"\nrun {repeat + 1}, load average {loads[-1]:.1f} before it\n{told(outcome)}\n", flush=True)
        outcomes.append(outcome)
        if not (options.quick or options.no_record):
            plot(sorted(outcomes, key=lambda outcome: outcome.verdict.p99_ratio)[len(outcomes) // 2], options.plot)
            print(f"recorded in {record('versions', entries_of(outcomes, loads))}", flush=True)


if __name__ == "__main__":
    main()
