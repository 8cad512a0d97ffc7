"""process_batch: requests and the releases they are pinned to in, answers out. The middle that knows no transport.

One round trip to the store for the whole batch, the guard for each row, one run of each head involved.

Legend: B requests, D state width, E embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from feature_repo import layout
from model.errors import StoreUnavailable, TowerError
from model.records import Context, Id
from model.retrieval.rules import Plan
from online import guard
from online.errors import DeadlineExceeded, RequestError
from online.guard import Answer, Limits, Verdict
from online.items import NO_WISHES, Found, Wishes
from online.residents import Resident, ResidentSet
from online.stores import StateStore


@dataclass(frozen=True, slots=True)
class Request:
    """One request, checked (`online.wire`)."""

    user_id: Id
    context: Context
    deadline: float
    """Seconds of `time.monotonic`."""
    strict: bool = False
    expected_embedding_version: str = ""
    accept_previous: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """One user embedding and all that the reply says about it."""

    embedding_E: NDArray[np.float32]
    resident: Resident
    epoch: int
    answer: Answer
    reason: str
    state_age_us: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The best items of one user, and the embedding they were searched with."""

    answered: Answered
    found: Found


def process_batch(
    requests: Sequence[Request],
    residents: ResidentSet,
    store: StateStore,
    *,
    now_us: int,
    store_timeout_s: float,
    max_state_age_us: int | None = None,
    clock: Callable[[], float] = monotonic,
) -> list[Answered | TowerError]:
    """Answers in the order of the requests; a request that cannot be answered has its error in its place.

    residents: the set that all these requests pinned when they came in.
    store_timeout_s: longest wait for the store; half of the time left to the most patient request if that is less, so
    that a cold-start answer is still in time. A store that does not answer is not an error unless the policy is strict.
    Errors: DeadlineExceeded, RequestError, StateMismatch, StoreUnavailable.
    """
    results: list[Answered | TowerError | None] = [None] * len(requests)
    now = clock()
    waiting: list[int] = []
    keys: list[bytes] = []
    patience_s = 0.0
    for i, request in enumerate(requests):
        left_s = request.deadline - now
        if left_s <= 0:
            results[i] = DeadlineExceeded(f"the deadline passed {-left_s * 1e3:.1f} ms before the request's turn came")
            continue
        try:
            keys.append(layout.redis_key(request.user_id))
        except layout.LayoutError as error:
            results[i] = RequestError(str(error))
            continue
        waiting.append(i)
        patience_s = max(patience_s, left_s)
    if not waiting:
        return _complete(results)

    fetched: Sequence[guard.Values | None]
    try:
        fetched = store.fetch(keys, residents.fields, min(store_timeout_s, patience_s / 2))
    except StoreUnavailable:
        fetched = [None] * len(keys)

    limits = Limits(now_us, max_state_age_us)
    verdicts: dict[str, list[tuple[int, Verdict]]] = {}  # by release
    for i, values in zip(waiting, fetched, strict=True):
        request = requests[i]
        try:
            verdict = guard.decide(
                values,
                residents,
                limits,
                strict=request.strict,
                expected_embedding_version=request.expected_embedding_version,
                accept_previous=request.accept_previous,
            )
            _check_query(request.context, verdict.resident)
        except TowerError as error:
            results[i] = error
            continue
        verdicts.setdefault(verdict.resident.release_id, []).append((i, verdict))

    for rows in verdicts.values():
        embedding_BE = _embed(rows, requests)
        for (i, verdict), embedding_E in zip(rows, embedding_BE, strict=True):
            age_us = 0 if verdict.state is None else max(0, now_us - verdict.state.encoded_at_us)
            results[i] = Answered(
                embedding_E, verdict.resident, residents.epoch, verdict.answer, verdict.reason, age_us
            )
    return _complete(results)


def retrieve(
    request: Request,
    plan: Plan,
    residents: ResidentSet,
    store: StateStore,
    *,
    wishes: Wishes = NO_WISHES,
    now_us: int,
    store_timeout_s: float,
    max_state_age_us: int | None = None,
    clock: Callable[[], float] = monotonic,
) -> Retrieved:
    """The best items by an embedding made as process_batch makes it, from the answering release's own index.

    Raises the errors of process_batch, StateMismatch where no release that the caller accepts has an index, and
    RequestError for wishes that the answering one does not know.
    """
    searchable = guard.searchable(
        residents,
        expected_embedding_version=request.expected_embedding_version,
        accept_previous=request.accept_previous,
    )
    (answered,) = process_batch(
        [request],
        searchable,
        store,
        now_us=now_us,
        store_timeout_s=store_timeout_s,
        max_state_age_us=max_state_age_us,
        clock=clock,
    )
    if isinstance(answered, TowerError):
        raise answered
    late_s = clock() - request.deadline
    if late_s >= 0:
        raise DeadlineExceeded(f"the deadline passed {late_s * 1e3:.1f} ms before the search")
    index = answered.resident.index
    assert index is not None, "searchable releases have an index"
    return Retrieved(answered, index.search(answered.embedding_E, plan, wishes, request.context, now_us))


def _embed(rows: Sequence[tuple[int, Verdict]], requests: Sequence[Request]) -> NDArray[np.float32]:
    """One run of one release's head: f32 [B, E]."""
    resident = rows[0][1].resident
    state_BD = np.empty((len(rows), resident.config.state_width), np.float32)
    until_us: list[int | None] = []
    for b, (_, verdict) in enumerate(rows):
        state = verdict.state
        state_BD[b] = resident.head.cold_state if state is None else state.state_D
        until_us.append(None if state is None else state.history_until_us)
    return resident.head.embed(state_BD, [requests[i].context for i, _ in rows], until_us)


def _check_query(context: Context, resident: Resident) -> None:
    """The query vector fits the release that answers, which need not be the serving one."""
    if context.query_vector is not None and len(context.query_vector) != resident.config.query_dim:
        raise RequestError(
            f"query_vector: release {resident.release_id} wants {resident.config.query_dim} values, "
            f"got {len(context.query_vector)}"
        )


def _complete(results: Sequence[Answered | TowerError | None]) -> list[Answered | TowerError]:
    complete = [result for result in results if result is not None]
    assert len(complete) == len(results), "a request was left without an answer"
    return complete
