"""process_batch over the memory store: round trips, order, deadlines, errors of single rows."""

from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo import layout
from model.errors import StateMismatch, StoreUnavailable
from model.item_index import ItemIndex
from model.records import Context, Id
from model.retrieval.rules import Plan
from online.engine import Answered, Request, process_batch, retrieve
from online.errors import DeadlineExceeded, RequestError
from online.guard import Answer
from online.items import ServedItems
from online.residents import ResidentSet
from online.stores.memory import MemoryStore
from tests.online.conftest import World
from tests.online.helpers import NOW_US, context_of, residents_of, row_bytes, stored_state


@pytest.fixture
def pair(built_world: World) -> ResidentSet:
    loaded = built_world.oracle.releases
    return residents_of(2, serving=loaded[built_world.b.release_id], previous=loaded[built_world.a.release_id])


@pytest.fixture
def store(pair: ResidentSet) -> MemoryStore:
    """Users 0-9 have both states, 10-19 only the previous one."""
    store = MemoryStore()
    serving, previous = pair.residents
    for user in range(20):
        store.put(layout.redis_key(user), row_bytes(stored_state(user, previous.state_version)))
        if user < 10:
            store.put(layout.redis_key(user), row_bytes(stored_state(user, serving.state_version)))
    return store


def request(user: Id, **changes: Any) -> Request:
    context = context_of(user) if isinstance(user, int) else Context()
    values: dict[str, Any] = {"context": context, "deadline": monotonic() + 60}
    return Request(user, **(values | changes))


def run(requests: list[Request], pair: ResidentSet, store: MemoryStore) -> list[Any]:
    return process_batch(requests, pair, store, now_us=NOW_US, store_timeout_s=0.1)


def test_a_batch_is_one_round_trip_and_keeps_its_order(
    built_world: World, pair: ResidentSet, store: MemoryStore
) -> None:
    users = [3, 15, 99, 0, 12, 3]
    results = run([request(user, accept_previous=True) for user in users], pair, store)
    assert store.round_trips == 1
    serving, previous = (r.release_id for r in pair.residents)
    oracle = built_world.oracle
    for user, result in zip(users, results, strict=True):
        assert isinstance(result, Answered)
        assert result.epoch == 2
        if user < 10:
            wanted, name, answer = oracle.warm(serving, user), serving, Answer.EXACT
        elif user < 20:
            wanted, name, answer = oracle.warm(previous, user), previous, Answer.PREVIOUS_RELEASE
        else:
            wanted, name, answer = oracle.cold(serving, user), serving, Answer.COLD_START
        assert (result.resident.release_id, result.answer) == (name, answer)
        np.testing.assert_allclose(result.embedding_E, wanted, atol=1e-5)


def test_the_age_counts_from_the_encode(pair: ResidentSet, store: MemoryStore) -> None:
    exact, cold = run([request(3), request(99)], pair, store)
    assert exact.state_age_us == NOW_US - stored_state(3, pair.serving.state_version).encoded_at_us
    assert cold.state_age_us == 0


def test_expired_requests_are_dropped_and_do_not_cost_the_others(pair: ResidentSet, store: MemoryStore) -> None:
    late, live = run([request(3, deadline=monotonic() - 1), request(4)], pair, store)
    assert isinstance(late, DeadlineExceeded)
    assert live.answer is Answer.EXACT
    store.round_trips = 0
    assert isinstance(run([request(3, deadline=monotonic() - 1)], pair, store)[0], DeadlineExceeded)
    assert store.round_trips == 0


def test_the_store_gets_at_most_half_of_the_time_left(pair: ResidentSet, store: MemoryStore) -> None:
    waits: list[float] = []
    fetch = store.fetch
    store.fetch = lambda keys, fields, timeout_s: (waits.append(timeout_s), fetch(keys, fields, timeout_s))[1]  # type: ignore[method-assign,func-returns-value]
    process_batch([request(3, deadline=10.1)], pair, store, now_us=NOW_US, store_timeout_s=1.0, clock=lambda: 10.0)
    process_batch([request(3, deadline=19.0)], pair, store, now_us=NOW_US, store_timeout_s=1.0, clock=lambda: 10.0)
    assert waits == [pytest.approx(0.05), 1.0]


def test_a_row_that_fails_fails_alone(pair: ResidentSet, store: MemoryStore) -> None:
    bad_query = replace(context_of(1), query_vector=np.ones(3, np.float32))
    results = run(
        [request(3), request(99, strict=True), request(2**63), request("\ud800"), request(4, context=bad_query)],
        pair,
        store,
    )
    assert [type(result) for result in results] == [Answered, StateMismatch, RequestError, RequestError, RequestError]


def test_a_store_that_is_down(built_world: World, pair: ResidentSet, store: MemoryStore) -> None:
    store.is_down = True
    cold, strict = run([request(3), request(3, strict=True)], pair, store)
    assert (cold.answer, cold.reason) == (Answer.COLD_START, "store_unavailable")
    np.testing.assert_allclose(cold.embedding_E, built_world.oracle.cold(pair.serving.release_id, 3), atol=1e-5)
    assert isinstance(strict, StoreUnavailable)


def test_no_requests_no_answers(pair: ResidentSet, store: MemoryStore) -> None:
    assert run([], pair, store) == []


def test_no_search_after_the_deadline(pair: ResidentSet, store: MemoryStore) -> None:
    class Unsearchable(ServedItems):
        def search(self, *_: Any) -> Any:
            raise AssertionError("searched for nobody")

    index = Unsearchable.of_snapshot(ItemIndex(pair.serving.embedding_version, pa.array([1]), torch.zeros(1, 16)))
    searchable = replace(pair, residents=(replace(pair.serving, index=index),))
    times = iter([10.0, 11.5])
    with pytest.raises(DeadlineExceeded, match=r"500\.0 ms before the search"):
        retrieve(
            request(3, deadline=11.0),
            Plan(k=5),
            searchable,
            store,
            now_us=NOW_US,
            store_timeout_s=0.1,
            clock=lambda: next(times),
        )
