"""gRPC in and out: the only place that knows status codes.

Each request pins the resident set that is current when its turn comes, once, and is answered from it alone.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from itertools import groupby
from typing import Any, NoReturn

import grpc

from model.errors import StateMismatch, StoreUnavailable, TowerError
from online import wire
from online.combining import Combiner
from online.engine import Answered, Request, process_batch, retrieve
from online.errors import DeadlineExceeded, NotReady, Overloaded, RequestError
from online.generated import tower_pb2 as pb
from online.metrics import Metrics
from online.residents import ResidentSet
from online.settings import Settings
from online.stores import StateStore

log = logging.getLogger(__name__)

SERVICE = "hybridtower.v1.UserTower"
RECOMMENDER = "hybridtower.v1.Recommender"

_STATUS: dict[type[Exception], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    StateMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def status_of(error: Exception) -> grpc.StatusCode:
    """The status a request ends with for an error; INTERNAL for one that is nobody's fault but ours."""
    return _STATUS.get(type(error), grpc.StatusCode.INTERNAL)


class BoundedPool(futures.ThreadPoolExecutor):
    """A thread pool that knows whether it has room for one more task."""

    def __init__(self, threads: int, max_queue: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._room = threads + max_queue
        self._lock = threading.Lock()
        self._unfinished = 0

    @property
    def is_full(self) -> bool:
        """Whether all threads are busy and max_queue tasks wait."""
        return self._unfinished >= self._room

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "futures.Future[Any]":
        """See ThreadPoolExecutor. Does not refuse: the caller asks `is_full` first."""
        with self._lock:
            self._unfinished += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._finished)
        return future

    def _finished(self, _: "futures.Future[Any]") -> None:
        with self._lock:
            self._unfinished -= 1


class InPool:
    """A handler that runs in a pool of its own, so that a queue of requests does not hold it up."""

    def __init__(self, handler: Callable[..., Any], pool: futures.ThreadPoolExecutor) -> None:
        self._handler = handler
        self.experimental_thread_pool = pool  # gRPC looks for this name

    def __call__(self, *args: Any) -> Any:
        return self._handler(*args)


class UserTower(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The services UserTower and Recommender. Replies leave as bytes that `online.wire` has spliced."""

    def __init__(
        self,
        settings: Settings,
        current: Callable[[], ResidentSet | None],
        store: StateStore,
        metrics: Metrics,
        pool: BoundedPool,
        side_pool: futures.ThreadPoolExecutor,
        *,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """current: gives the set to pin, None while nothing is loaded.

        pool: the server's pool, watched for its bound. side_pool: refuses requests while that one is full.
        """
        self._pool = pool
        self.combiner: Combiner[tuple[Request, ResidentSet], Answered | Exception] = Combiner(self._process_pinned)
        self._settings = settings
        self._current = current
        self._store = store
        self._metrics = metrics
        self._now_us = now_us
        self._strict = settings.policy == "strict"
        self._max_age_us = None if settings.max_state_age_s is None else int(settings.max_state_age_s * 1e6)
        self._handlers = {
            f"/{SERVICE}/Embed": grpc.unary_unary_rpc_method_handler(self.embed, pb.EmbedRequest.FromString),
            f"/{SERVICE}/EmbedBatch": grpc.unary_unary_rpc_method_handler(
                self.embed_batch, pb.EmbedBatchRequest.FromString
            ),
            f"/{RECOMMENDER}/Retrieve": grpc.unary_unary_rpc_method_handler(
                self.retrieve, pb.RetrieveRequest.FromString
            ),
        }
        self._full = {
            name: grpc.unary_unary_rpc_method_handler(InPool(self._refuse(name.rpartition("/")[2]), side_pool))
            for name in self._handlers
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a method, None for one that is not ours. Called before a request is queued."""
        handlers = self._full if self._pool.is_full else self._handlers
        return handlers.get(handler_call_details.method)

    def embed(self, message: pb.EmbedRequest, context: grpc.ServicerContext) -> bytes:
        """UserTower/Embed."""
        started = time.perf_counter()
        try:
            residents = self._pin()
            request = self._read(message, residents, self._deadline(context))
            result = self.combiner.run((request, residents))
            if isinstance(result, Exception):
                raise result
            self._metrics.answered(result)
            return wire.write_reply(result)
        except Exception as error:
            self._abort(context, "Embed", error)
        finally:
            self._metrics.took("Embed", time.perf_counter() - started)

    def embed_batch(self, message: pb.EmbedBatchRequest, context: grpc.ServicerContext) -> bytes:
        """UserTower/EmbedBatch."""
        started = time.perf_counter()
        try:
            if len(message.requests) > wire.MAX_ROWS:
                raise RequestError(f"requests: at most {wire.MAX_ROWS}, got {len(message.requests)}")
            residents = self._pin()
            deadline = self._deadline(context)
            requests: list[Request] = []
            results: list[Answered | TowerError | None] = []
            for row in message.requests:
                try:
                    requests.append(self._read(row, residents, deadline))
                    results.append(None)
                except RequestError as error:
                    results.append(error)
            answers = iter(self._process(requests, residents))
            return wire.write_batch([self._row(next(answers) if r is None else r) for r in results])
        except Exception as error:
            self._abort(context, "EmbedBatch", error)
        finally:
            self._metrics.took("EmbedBatch", time.perf_counter() - started)

    def retrieve(self, message: pb.RetrieveRequest, context: grpc.ServicerContext) -> bytes:
        """Recommender/Retrieve."""
        started = time.perf_counter()
        try:
            residents = self._pin()
            request = self._read(message.query, residents, self._deadline(context))
            retrieved = retrieve(
                request,
                wire.read_plan(message),
                residents,
                self._store,
                wishes=wire.read_wishes(message, residents.description.item_id_type),
                now_us=self._now_us(),
                store_timeout_s=self._settings.store_timeout_ms * 1e-3,
                max_state_age_us=self._max_age_us,
            )
            self._metrics.answered(retrieved.answered)
            return wire.write_retrieved(retrieved)
        except Exception as error:
            self._abort(context, "Retrieve", error)
        finally:
            self._metrics.took("Retrieve", time.perf_counter() - started)

    def _refuse(self, method: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def refuse(message: bytes, context: grpc.ServicerContext) -> bytes:
            error = Overloaded(f"{self._settings.max_queue} requests wait already; back off and try again")
            self._abort(context, method, error)

        return refuse

    def _row(self, result: Answered | TowerError) -> bytes | tuple[int, str]:
        if isinstance(result, Answered):
            self._metrics.answered(result)
            return wire.write_reply(result)
        status = status_of(result)
        self._metrics.failed("EmbedBatch", status.name)
        return status.value[0], str(result)

    def _pin(self) -> ResidentSet:
        residents = self._current()
        if residents is None:
            raise NotReady(
                "no release is loaded yet; the registry's pointer names none, or the one it names is refused"
            )
        return residents

    def _deadline(self, context: grpc.ServicerContext) -> float:
        return wire.deadline_after(context.time_remaining(), self._settings.deadline_ms * 1e-3)

    def _read(self, message: pb.EmbedRequest, residents: ResidentSet, deadline: float) -> Request:
        return wire.read_request(message, residents, deadline=deadline, strict_by_default=self._strict)

    def _process_pinned(self, batch: Sequence[tuple[Request, ResidentSet]]) -> list[Answered | Exception]:
        """Answers requests that came one by one; those that pinned another set are answered apart."""
        results: list[Answered | Exception] = []
        for _, same in groupby(batch, key=lambda pair: id(pair[1])):
            pairs = list(same)
            try:
                results += self._process([request for request, _ in pairs], pairs[0][1])
            except Exception as error:
                if len(pairs) == 1:
                    results.append(error)
                else:  # one request must not cost its neighbours: each by itself
                    for pair in pairs:
                        results += self._process_pinned([pair])
        return results

    def _process(self, requests: list[Request], residents: ResidentSet) -> list[Answered | TowerError]:
        return process_batch(
            requests,
            residents,
            self._store,
            now_us=self._now_us(),
            store_timeout_s=self._settings.store_timeout_ms * 1e-3,
            max_state_age_us=self._max_age_us,
        )

    def _abort(self, context: grpc.ServicerContext, method: str, error: Exception) -> NoReturn:
        status = status_of(error)
        self._metrics.failed(method, status.name)
        message = str(error)
        if status is grpc.StatusCode.INTERNAL:
            log.error("%s failed", method, exc_info=error)
            message = f"{type(error).__name__} in the service; its log has the details"
        context.abort(status, message)
        raise AssertionError("abort raises")
