"""Batches what waits, without a timer.

Requests arrive one at a time, each on a thread of its own. A batch of them costs little more than one: one round trip
to the store, one pass over the head's weights. So while a batch is in progress the others wait, and all that have come
by its end are the next batch. A request that finds nobody at work is worked on at once, on its own thread.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


class _Waiting(Generic[Work, Result]):
    __slots__ = ("batch", "error", "gate", "result", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.gate = threading.Lock()
        self.gate.acquire()
        self.batch: list[_Waiting[Work, Result]] | None = None
        """Set where this one's thread is to work on the next batch."""
        self.result: Result | None = None
        self.error: BaseException | None = None


class Combiner(Generic[Work, Result]):
    """Runs `work` on one batch at a time, on the thread of one of those who wait."""

    def __init__(self, work: Callable[[Sequence[Work]], Sequence[Result]]) -> None:
        """work: results in the order of its input. What it raises is raised to everybody in the batch."""
        self._work = work
        self._lock = threading.Lock()
        self._is_busy = False
        self.waiting: list[_Waiting[Work, Result]] = []

    def run(self, work: Work) -> Result:
        """The result of one piece of work, done together with what else waits."""
        mine: _Waiting[Work, Result] = _Waiting(work)
        with self._lock:
            is_first = not self._is_busy
            if is_first:
                self._is_busy = True
                mine.batch = [mine]
            else:
                self.waiting.append(mine)
        if not is_first:
            mine.gate.acquire()
        if mine.batch is not None:
            self._lead(mine.batch, mine)
        if mine.error is not None:
            raise mine.error
        assert mine.result is not None
        return mine.result

    def _lead(self, batch: "list[_Waiting[Work, Result]]", mine: "_Waiting[Work, Result]") -> None:
        try:
            for waiting, result in zip(batch, self._work([waiting.work for waiting in batch]), strict=True):
                waiting.result = result
        except BaseException as error:
            for waiting in batch:
                waiting.error = error
        finally:
            with self._lock:
                following, self.waiting = self.waiting, []
                self._is_busy = bool(following)
            if following:  # they begin while we write our reply
                following[0].batch = following
                following[0].gate.release()
            for waiting in batch:
                if waiting is not mine:
                    waiting.batch = None
                    waiting.gate.release()
