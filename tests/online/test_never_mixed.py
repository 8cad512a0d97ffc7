"""The promise: no answer is ever made of parts of different releases.

Every reply is compared with what the release it names computes by itself, undivided. Faults are put into Redis while
thousands of requests run; and for each check of the guard that keeps versions apart, taking it away must trip the same
comparison, or the comparison proves nothing.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from feature_repo import layout
from model.item_index import read_snapshot
from model.records import UserState
from model.release import Registry
from model.state_codec import StateCodec
from online import guard
from online import registry as following
from online.client import Embedding, EmbedQuery, Retrieval, UserTowerClient
from online.server import Server
from tests.online.conftest import EVERY_CODEC, World
from tests.online.helpers import (
    Rows,
    context_of,
    fresh_users,
    serving,
    stored_state,
    wait_until,
)

USERS = 40


def _fields(version: str) -> list[bytes]:
    return layout.row_fields(layout.view_name(version))


def wrong_version(rows: Rows, user: int, version: str, other: str) -> None:
    """A row in the view of one version that carries another: a mislabelled write, a half-finished backfill."""
    rows.put(user, rows.bytes_of(stored_state(user, other), version))


def wrong_vector(rows: Rows, user: int, version: str, other: str) -> None:
    """As above, with whatever else the row says."""
    strange = replace(stored_state(user, other), state_D=stored_state(user, other).state_D + 1)
    rows.put(user, rows.bytes_of(strange, version))


def too_long(rows: Rows, user: int, version: str, other: str) -> None:
    state = stored_state(user, version)
    rows.put(user, rows.bytes_of(replace(state, state_D=np.concatenate([state.state_D, state.state_D]))))


def too_short(rows: Rows, user: int, version: str, other: str) -> None:
    """Width 1: numpy would spread it over the whole state without a word."""
    state = stored_state(user, version)
    rows.put(user, rows.bytes_of(replace(state, state_D=state.state_D[:1])))


def truncated(rows: Rows, user: int, version: str, other: str) -> None:
    field = _fields(version)[0]
    rows.put(user, {field: rows.bytes_of(stored_state(user, version))[field][:-6]})


def not_finite(rows: Rows, user: int, version: str, other: str) -> None:
    state = stored_state(user, version)
    state.state_D[user % 16] = np.nan
    rows.put(user, rows.bytes_of(state))


def half_missing(rows: Rows, user: int, version: str, other: str) -> None:
    rows.drop(user, _fields(version)[user % 5])


def torn(rows: Rows, user: int, version: str, other: str) -> None:
    """The vector of one run under the times of another."""
    later = stored_state(user, version)
    later = UserState(later.state_D + 1, version, later.history_until_us, later.encoded_at_us - 86_400_000_000)
    fields = _fields(version)
    stored = rows.bytes_of(later)
    rows.put(user, {fields[0]: stored[fields[0]], fields[3]: stored[fields[3]]})


Fault = Callable[[Rows, int, str, str], None]
FAULTS: dict[str, tuple[Fault, str]] = {
    "wrong_version": (wrong_version, "version_mismatch"),
    "wrong_vector": (wrong_vector, "version_mismatch"),
    "too_long": (too_long, "wrong_length"),
    "too_short": (too_short, "wrong_length"),
    "truncated": (truncated, "torn_row"),
    "not_finite": (not_finite, "non_finite"),
    "half_missing": (half_missing, "missing_field"),
    "torn": (torn, "torn_row"),
}


class Rig:
    """A server with release b serving and a before it, users with both states, and faults in b's view of some."""

    def __init__(self, world: World, rows: Rows, client: UserTowerClient) -> None:
        self.world, self.rows, self.client = world, rows, client
        self.first = fresh_users()
        self.users = range(self.first, self.first + USERS)
        rows.put_states(self.users, world.a.state_version, world.b.state_version)
        self.reasons: dict[int, str] = {}

    def damage(self, names: list[str]) -> None:
        """Every other user gets a fault, in turn."""
        for user, name in zip(self.users[::2], itertools.cycle(names), strict=False):
            fault, reason = FAULTS[name]
            fault(self.rows, user, self.world.b.state_version, self.world.a.state_version)
            self.reasons[user] = reason

    def mixed(self, reply: Embedding, user: int, *, accepts_previous: bool) -> bool:
        """The detector: whether a reply is anything but what the release it names computes, told as it is."""
        reason = self.reasons.get(user, "")
        if not reason:
            wanted = (self.world.b.release_id, "EXACT")
        elif accepts_previous:
            wanted = (self.world.a.release_id, "PREVIOUS_RELEASE")
        else:
            wanted = (self.world.b.release_id, "COLD_START")
        told = (reply.release_id, reply.answer, reply.reason) == (*wanted, reason)
        return not (told and self.world.oracle.is_honest(reply, user))

    def count_mixed(self, rounds: int) -> tuple[int, int]:
        """(mixed answers, all answers). A row that fails counts as mixed: it should have been answered."""
        bad = total = 0
        for n in range(rounds):
            accepts = n % 2 == 1
            queries = [EmbedQuery(u, context_of(u), accept_previous_release=accepts) for u in self.users]
            for user, reply in zip(self.users, self.client.embed_batch(queries), strict=True):
                total += 1
                bad += not isinstance(reply, Embedding) or self.mixed(reply, user, accepts_previous=accepts)
        for user in self.users:
            total += 1
            bad += self.mixed(self.client.embed(user, context_of(user)), user, accepts_previous=False)
        return bad, total


@pytest.fixture
def rig(world: World, rows: Rows, redis_server: str) -> Iterator[Rig]:
    Registry(world.registry).commit(world.a.release_id)
    Registry(world.registry).commit(world.b.release_id)
    with serving(world.registry, redis_server) as (_, client):
        yield Rig(world, rows, client)


@EVERY_CODEC
def test_thousands_of_requests_over_damaged_rows(rig: Rig) -> None:
    rig.damage(list(FAULTS))
    assert len(set(rig.reasons.values())) == 5
    bad, total = rig.count_mixed(rounds=60)
    assert total > 2000
    assert bad == 0


@EVERY_CODEC
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_told_by_name(rig: Rig, name: str) -> None:
    rig.damage([name])
    assert rig.count_mixed(rounds=2)[0] == 0


GONE: dict[str, tuple[str, str]] = {
    # the check that is taken away: a fault that only it sees
    "carries_version": ("wrong_version", "CHECKS"),
    "has_width": ("too_short", "CHECKS"),
    "is_finite": ("not_finite", "CHECKS"),
    "times_agree": ("torn", "CHECKS"),
    "is_whole": ("half_missing", "is_whole"),
    "decode_row": ("truncated", "decode_row"),
}


@EVERY_CODEC
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what the guard let through
@pytest.mark.parametrize("gone", GONE)
def test_without_a_check_the_detector_trips(rig: Rig, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    fault, kind = GONE[gone]
    rig.damage([fault])
    assert rig.count_mixed(rounds=1)[0] == 0
    if kind == "CHECKS":
        left = tuple(check for check in guard.CHECKS if check[1].__name__ != gone)
        assert len(left) == len(guard.CHECKS) - 1
        monkeypatch.setattr(guard, "CHECKS", left)
    elif kind == "is_whole":
        monkeypatch.setattr(guard, "is_whole", lambda values: True)
    else:
        monkeypatch.setattr(layout, "decode_row", _decode_anything)
    assert rig.count_mixed(rounds=2)[0] > 0


def _decode_anything(values: guard.Values, codec: StateCodec | None) -> layout.StateRow:
    """A decoder that makes the best of what it gets: as many numbers as there are, zeros for the rest."""
    state, version, until, encoded, timestamp = (value or b"" for value in values)
    floats = np.zeros(16, np.float32)
    if codec is None:
        found = np.frombuffer(state[7:][: (len(state) - 7) // 4 * 4], "<f4")[:16]
        floats[: len(found)] = found
    else:
        size = codec.encode(floats[None]).shape[1]
        floats = codec.decode(state[2:].ljust(size, b"\0"))
    return layout.StateRow(
        floats,
        layout._decode_string(version, "state_version"),
        layout._decode_int64(until, "history_until"),
        layout._decode_int64(encoded, "encoded_at"),
        layout.decode_timestamp(timestamp),
    )


# Which releases are resident


@pytest.mark.parametrize(
    ("commits", "stored", "wanted"),
    [
        ("a", "a", {"": "a EXACT", "previous": "a EXACT", "a": "a EXACT", "b": None}),
        ("b", "a", {"": "b COLD_START", "previous": "b COLD_START", "b": "b COLD_START", "a": None}),
        ("b", "b", {"": "b EXACT", "a": None}),
        ("ab", "a", {"": "b COLD_START", "previous": "a PREVIOUS_RELEASE", "a": "a PREVIOUS_RELEASE"}),
        ("ab", "b", {"": "b EXACT", "previous": "b EXACT", "a": "a COLD_START", "b": "b EXACT"}),
        ("ab", "ab", {"": "b EXACT", "previous": "b EXACT", "a": "a PREVIOUS_RELEASE", "b": "b EXACT"}),
        ("ab", "", {"": "b COLD_START", "previous": "b COLD_START", "a": "a COLD_START"}),
    ],
)
def test_who_answers(
    world: World, rows: Rows, redis_server: str, commits: str, stored: str, wanted: dict[str, str | None]
) -> None:
    """commits: the releases committed, in order. stored: the states there are. wanted: asked for -> who answers how."""
    releases = {"a": world.a, "b": world.b}
    for name in commits:
        Registry(world.registry).commit(releases[name].release_id)
    user = fresh_users()
    for name in stored:
        rows.put_states(range(user, user + 1), releases[name].state_version)
    with serving(world.registry, redis_server) as (_, client):
        for asked, answer in wanted.items():
            expected = releases[asked].embedding_version if asked in releases else ""
            query = EmbedQuery(
                user,
                context_of(user),
                expected_embedding_version=expected,
                accept_previous_release=asked == "previous",
            )
            (reply,) = client.embed_batch([query])
            if answer is None:
                assert not isinstance(reply, Embedding)
                continue
            name, how = answer.split()
            assert isinstance(reply, Embedding)
            assert (reply.release_id, reply.answer) == (releases[name].release_id, how)
            assert world.oracle.is_honest(reply, user)


# The pointer flips under load


def test_a_flip_under_load_is_never_mixed_and_never_goes_back(world: World, rows: Rows, redis_server: str) -> None:
    """Four connections ask while the pointer flips between two releases."""
    registry = Registry(world.registry)
    registry.commit(world.a.release_id)
    first = fresh_users()
    users = range(first, first + USERS)
    rows.put_states(users, world.a.state_version, world.b.state_version)
    stop = threading.Event()

    def ask(server: Server, offset: int) -> list[tuple[int, Embedding]]:
        replies: list[tuple[int, Embedding]] = []
        with UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
            for user in itertools.cycle(users[offset:]):
                if stop.is_set():
                    return replies
                if len(replies) % 3:
                    replies.append((user, client.embed(user, context_of(user), policy="strict")))
                else:
                    batch = [EmbedQuery(u, context_of(u), policy="strict") for u in users[:8]]
                    answers = client.embed_batch(batch)
                    assert len({r.epoch for r in answers if isinstance(r, Embedding)}) == 1, "one batch, one epoch"
                    replies += [(u, r) for u, r in zip(users, answers, strict=False) if isinstance(r, Embedding)]
        raise AssertionError("unreachable")

    with serving(world.registry, redis_server, poll_ms=10.0) as (server, _), futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, server, offset) for offset in range(4)]
        try:
            for flip in range(6):
                epoch = registry.commit((world.b if flip % 2 == 0 else world.a).release_id).epoch
                give_up = threading.Event()
                for _ in range(1000):
                    current = server.follower.current
                    if current is not None and current.epoch == epoch:
                        break
                    give_up.wait(0.01)
                give_up.wait(0.15)
        finally:
            stop.set()
        seen: set[int] = set()
        for future in asking:
            replies = future.result(30)
            epochs = [reply.epoch for _, reply in replies]
            assert epochs == sorted(epochs), "the epoch went back on one connection"
            seen |= set(epochs)
            for _, reply in replies:
                assert reply.answer == "EXACT"
                wanted = world.a if reply.epoch % 2 else world.b
                assert reply.release_id == wanted.release_id, "the epoch's own serving release answers"
            checked = {(user, reply.release_id): (user, reply) for user, reply in replies}
            assert all(world.oracle.is_honest(reply, user) for user, reply in checked.values())
        assert len(seen) >= 5


class Retrievals:
    """Asks for items while the pointer flips between releases a and b, and holds every reply to brute force."""

    K = 7

    def __init__(self, world: World, rows: Rows, url: str) -> None:
        self.world, self.url = world, url
        first = fresh_users()
        self.users = range(first, first + USERS)
        rows.put_states(self.users[::2], world.a.state_version, world.b.state_version)

    def run(self, flips: int) -> tuple[int, int, int, set[int]]:
        """(mixed replies, honest replies, refusals, epochs seen), of 40 requests or more after each flip."""
        registry = Registry(self.world.registry)
        stop = threading.Event()
        replies: list[tuple[int, Retrieval | None]] = []
        with serving(self.world.registry, self.url, poll_ms=10.0) as (server, _), futures.ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(self._ask, server, offset, replies, stop) for offset in range(3)]
            try:
                for flip in range(flips):
                    epoch = registry.commit((self.world.b if flip % 2 == 0 else self.world.a).release_id).epoch
                    wait_until(lambda epoch=epoch: server.follower.pointer.epoch == epoch)
                    enough = len(replies) + 40
                    wait_until(lambda enough=enough: len(replies) >= enough or any(one.done() for one in asking), 30.0)
            finally:
                stop.set()
            for future in asking:
                future.result(30)
        found = [(user, reply) for user, reply in replies if reply is not None]
        oracle = self.world.oracle
        mixed = sum(not oracle.is_honest_retrieval(reply, user, self.K) for user, reply in found)
        return mixed, len(found) - mixed, len(replies) - len(found), {reply.epoch for _, reply in found}

    def _ask(
        self, server: Server, offset: int, replies: list[tuple[int, Retrieval | None]], stop: threading.Event
    ) -> None:
        versions = itertools.cycle(["", self.world.a.embedding_version, "", self.world.b.embedding_version])
        with UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
            for number, user in enumerate(itertools.cycle(self.users[offset:])):
                if stop.is_set():
                    return
                asked = next(versions)
                reply = self._retrieve(client, user, asked, accept_previous=number % 3 == 0)
                assert reply is None or asked in ("", reply.embedding_version)
                replies.append((user, reply))
        raise AssertionError("unreachable")

    def _retrieve(self, client: UserTowerClient, user: int, version: str, *, accept_previous: bool) -> Retrieval | None:
        """None where it was refused for want of a release that may answer."""
        try:
            return client.retrieve(
                user,
                context_of(user),
                k=self.K,
                expected_embedding_version=version,
                accept_previous_release=accept_previous,
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return None


@pytest.fixture
def retrievals(world: World, rows: Rows, redis_server: str) -> Retrievals:
    Registry(world.registry).commit(world.b.release_id)
    Registry(world.registry).commit(world.a.release_id)
    world.write_items(world.a, world.b)
    return Retrievals(world, rows, redis_server)


def test_retrieval_under_flips_is_never_answered_from_another_index(retrievals: Retrievals) -> None:
    mixed, honest, refused, epochs = retrievals.run(flips=6)
    assert (mixed, refused) == (0, 0)
    assert honest > 200
    assert len(epochs) >= 5


@pytest.mark.parametrize("gone", [False, True])
def test_a_stale_index_is_refused_and_without_index_matches_the_detector_trips(
    retrievals: Retrievals, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """The fault: whatever version is asked for, a's items come, and nobody looks at their golden items."""
    stale = retrievals.world.a.embedding_version
    monkeypatch.setattr(following, "_load_snapshot", lambda registry, version: read_snapshot(registry, stale))
    monkeypatch.setattr(following, "check_golden", lambda index, release: None)
    if gone:
        monkeypatch.setattr(guard, "index_matches", lambda resident, index: True)
    mixed, honest, refused, _ = retrievals.run(flips=2)
    assert honest > 10, "release a has its own items"
    assert (mixed > 10) == gone
    assert (refused > 10) == (not gone)


def test_the_oracle_tells_releases_apart(world: World, tmp_path: Path) -> None:
    """Embeddings of the two releases differ by far more than the tolerance, warm and cold."""
    for user in range(20):
        a, b = (world.oracle.warm(m.release_id, user) for m in (world.a, world.b))
        assert np.abs(a - b).max() > 1e-2
        cold = world.oracle.cold(world.a.release_id, user)
        assert np.abs(a - cold).max() > 1e-2
