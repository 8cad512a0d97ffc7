"""A small world for tests of the service: real releases, stored rows, a real Redis, and a detector of mixed answers."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch
from numpy.typing import NDArray

from feature_repo import layout
from model.canary import canary_ids, encode_canaries
from model.records import Context, Event, SubjectItem, UserState
from model.release import Manifest, Registry, Release
from model.state_codec import StateCodec, as_stored
from online.client import Embedding, Retrieval, UserTowerClient
from online.guard import Answer
from online.residents import Loaded, ResidentSet, Role, resident_set
from online.server import Server
from online.settings import Settings
from tests.releases import SMALL, make_tower

NOW_US = time.time_ns() // 1000
HOUR_US = 3_600_000_000

_next_user = itertools.count(50_000_000, 100_000)


def fresh_users() -> int:
    """First of 100,000 user ids that no other test uses."""
    return next(_next_user)


def make_head_only(registry: Path, base: Manifest, *, seed: int) -> Manifest:
    """A release of the base's encoder (built from `seed`) with another head: same state_version."""
    tower, items = make_tower(seed=seed, config=base.config)
    with torch.no_grad():
        for parameter in tower.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Registry(registry).write(tower, items, trained_until_us=1_600_000_000_000_000, base=base.release_id)


def stored_state(user: int, version: str, width: int = SMALL.d_model) -> UserState:
    """The state that a user has under a version, before a codec: the same in every test, another for every version."""
    random = np.random.default_rng([user, int(version, 16)])
    until_us = NOW_US - HOUR_US - int(random.integers(HOUR_US))
    encoded_us = (NOW_US - HOUR_US) // 1_000_000 * 1_000_000
    return UserState(random.standard_normal(width).astype(np.float32), version, min(until_us, encoded_us), encoded_us)


def row_bytes(state: UserState, view_version: str | None = None, codec: StateCodec | None = None) -> dict[bytes, bytes]:
    """The state's hash fields in the view of its own version, or of another (a fault)."""
    row = layout.StateRow(
        state.state_D,
        state.state_version,
        state.history_until_us,
        state.encoded_at_us,
        state.encoded_at_us // 1_000_000,
    )
    return layout.encode_row(row, layout.view_name(view_version or state.state_version), codec)


def context_of(user: int) -> Context:
    """A context that differs from user to user, with parts present and absent."""
    random = np.random.default_rng(user)
    session = tuple(
        Event(int(random.integers(10, 70)), "click", NOW_US - 2 * HOUR_US + k * HOUR_US // 2)
        for k in range(int(random.integers(5)))
    )
    subjects = tuple(SubjectItem(int(random.integers(10, 70)), 0.5) for _ in range(int(random.integers(3))))
    features = {"device": ("phone", "tv", "fridge")[user % 3]} if user % 4 else {}
    return Context(features, NOW_US if user % 5 else None, session, subjects)


class Oracle:
    """What each release, alone and whole, says about a user: what every reply is compared with."""

    def __init__(self, registry: Path, *release_ids: str) -> None:
        self.releases: dict[str, Release] = {name: Registry(registry).load(name) for name in release_ids}
        self._known: dict[tuple[str, int, bool], NDArray[np.float32]] = {}

    def warm(self, release_id: str, user: int, context: Context | None = None) -> NDArray[np.float32]:
        """From the user's stored state: f32 [E]."""
        release = self.releases[release_id]
        state = stored_state(user, release.manifest.state_version, release.config.state_width)
        contexts = [context or context_of(user)]
        states = as_stored(release.codec, state.state_D[None])
        embedding: NDArray[np.float32] = release.embed(states, contexts, [state.history_until_us])[0]
        return embedding

    def cold(self, release_id: str, user: int, context: Context | None = None) -> NDArray[np.float32]:
        """From the cold-start state: f32 [E]."""
        release = self.releases[release_id]
        contexts = [context or context_of(user)]
        embedding: NDArray[np.float32] = release.embed(release.cold_state[None], contexts, [None])[0]
        return embedding

    def is_honest(self, reply: Embedding, user: int) -> bool:
        """Whether the reply is what the release it names computes, in the way it names, and nothing else."""
        release = self.releases.get(reply.release_id)
        if release is None:
            return False
        versions = (release.manifest.state_version, release.manifest.embedding_version)
        if (reply.state_version, reply.embedding_version) != versions:
            return False
        is_cold = reply.answer == Answer.COLD_START.name
        key = (reply.release_id, user, is_cold)
        if key not in self._known:
            self._known[key] = (self.cold if is_cold else self.warm)(reply.release_id, user)
        return bool(np.abs(self._known[key] - reply.vector).max() < 1e-5)  # False for NaN

    def is_honest_retrieval(self, reply: Retrieval, user: int, k: int) -> bool:
        """Whether the items are the best that the release it names has, by the embedding that it makes of the user.

        By brute force over its item table. Scores are compared, and every item's own score: items whose scores differ
        by less than the tolerance may change places.
        """
        release = self.releases.get(reply.release_id)
        if release is None or release.item_table is None:
            return False
        is_cold = reply.answer == Answer.COLD_START.name
        vector = (self.cold if is_cold else self.warm)(reply.release_id, user)
        ids = release.featuriser.item_ids.to_pylist()
        score_N = release.item_table[: len(ids)].numpy() @ vector
        best_K = np.sort(score_N)[::-1][:k]
        row_of = {item_id: row for row, item_id in enumerate(ids)}
        if len(reply.item_ids) != len(best_K) or len(set(reply.item_ids)) != len(best_K):
            return False
        own_K = score_N[[row_of[item_id] for item_id in reply.item_ids]]
        if max(np.abs(own_K - reply.scores).max(), np.abs(best_K - reply.scores).max()) > 1e-5:
            return False
        version = release.manifest.embedding_version
        return (reply.embedding_version, reply.index_embedding_version) == (version, version)


class Rows:
    """Writes rows, whole or damaged, to a Redis; their states by the codec of the test's releases."""

    def __init__(self, url: str) -> None:
        self.redis: Any = redis.Redis.from_url(url)
        self.codec: StateCodec | None = None
        self.width = SMALL.d_model

    def close(self) -> None:
        self.redis.close()

    def put(self, user: int | str, fields: Mapping[bytes, bytes]) -> None:
        self.redis.hset(layout.redis_key(user), mapping=dict(fields))

    def bytes_of(self, state: UserState, view_version: str | None = None) -> dict[bytes, bytes]:
        """The state's hash fields in the view of its own version, or of another (a fault)."""
        return row_bytes(state, view_version, self.codec)

    def put_states(self, users: range, *versions: str) -> None:
        pipe = self.redis.pipeline(transaction=False)
        for user in users:
            for version in versions:
                state = stored_state(user, version, self.width)
                pipe.hset(layout.redis_key(user), mapping=self.bytes_of(state))
        pipe.execute()

    def put_canaries(self, release: Release, as_of_us: int) -> None:
        """The rows of the reserved users, as the batch job encodes and stores them."""
        version = release.manifest.state_version
        for user, state_D, until_us in zip(*encode_canaries(release, as_of_us), strict=True):
            self.put(user, row_bytes(UserState(state_D, version, until_us, as_of_us), codec=release.codec))

    def drop_canaries(self) -> None:
        self.redis.delete(*(layout.redis_key(user) for user in canary_ids("int64")))

    def drop(self, user: int | str, *fields: bytes) -> None:
        self.redis.hdel(layout.redis_key(user), *fields)


@contextmanager
def serving(
    registry: Path, url: str, *, now_us: Callable[[], int] = lambda: time.time_ns() // 1000, **settings: Any
) -> Iterator[tuple[Server, UserTowerClient]]:
    """A server in this process and a client of it; where there is a GPU, its items are there."""
    defaults: dict[str, Any] = {"port": 0, "metrics_port": 0, "poll_ms": 20.0, "notice_s": 0.0, "deadline_ms": 2000.0}
    # A machine busy with other tests may take longer than a service should.
    defaults["store_timeout_ms"] = 1000.0
    defaults["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    server = Server(Settings(registry=str(registry), redis_url=url, **(defaults | settings)), now_us=now_us)
    try:
        server.start()
        with UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=10.0) as client:
            yield server, client
    finally:
        server.stop()


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait for a condition that another thread brings about."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "the condition did not come true in time"
        time.sleep(0.005)


def residents_of(epoch: int, **roles: Release) -> ResidentSet:
    """A resident set from loaded releases: residents_of(1, serving=a, previous=b)."""
    return resident_set(epoch, {Role(name): Loaded(release.manifest, release) for name, release in roles.items()})
