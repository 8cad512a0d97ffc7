"""CUDA streams for one job at a time: a search, an update or a capture has one to itself, then gives it back idle.

PyTorch hands out the 32 streams of a pool in turn, so that two owners of "their own" stream may hold the same one. If
one of them captures a CUDA graph, what the other launches becomes part of that graph, or fails. Here no stream is lent
twice at a time, whatever the pool repeats. They are of a priority of their own (`PRIORITY`): its pool is apart from the
one that `torch.cuda.Stream()` and `torch.cuda.graph` without a stream take theirs from.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.errors import IndexBusy

POOLED = 32
"""Streams of a device and priority that PyTorch has."""
PRIORITY = -1
WAIT_S = 5.0
"""Longest a job waits for a stream."""


class StreamPool:
    """Streams of one device, made as they are needed; each is with one borrower or idle. For any number of threads."""

    def __init__(self, make: Callable[[], Any], most: int = POOLED) -> None:
        """make: a stream, with `cuda_stream` and `synchronize()`; of one handle again and again if it has no other.

        most: calls of make, one after the other, that are sure to have given every stream there is.
        """
        self._make, self._most = make, most
        self._changed = threading.Condition()
        self._idle: list[Any] = []
        self._handles: set[int] = set()
        """Of all streams, lent ones included."""

    @contextmanager
    def lent(self, wait_s: float = WAIT_S) -> Iterator[Any]:
        """A stream that nobody else uses while the block lasts; at its end everything on it is done.

        A stream whose work failed is not lent again. Raises IndexBusy where all are lent for wait_s seconds.
        """
        stream = self._take(wait_s)
        try:
            yield stream
        finally:
            stream.synchronize()
            with self._changed:
                self._idle.append(stream)
                self._changed.notify()

    def _take(self, wait_s: float) -> Any:
        with self._changed:
            if not self._idle:
                self._add()
            if not self._changed.wait_for(lambda: self._idle, wait_s):
                raise IndexBusy(f"all {len(self._handles)} streams of the device were in use for {wait_s:g} s")
            return self._idle.pop()

    def _add(self) -> None:
        """One more stream, if there is one."""
        if len(self._handles) >= self._most:
            return
        for _ in range(self._most):
            stream = self._make()
            if stream.cuda_stream not in self._handles:
                self._handles.add(stream.cuda_stream)
                self._idle.append(stream)
                return


_POOLS: dict[int, StreamPool] = {}
_MAKING = threading.Lock()


@contextmanager
def lent(device: torch.device) -> Iterator[Any]:
    """A stream of a table's device to oneself (`StreamPool.lent`), not yet the current one; None on the CPU."""
    if device.type != "cuda":
        yield None
        return
    assert device.index is not None, "tensors have a device with a number"
    with _MAKING:
        pool = _POOLS.get(device.index)
        if pool is None:
            pool = _POOLS[device.index] = StreamPool(
                lambda: torch.cuda.Stream(device, priority=PRIORITY)  # type: ignore[no-untyped-call]
            )
    with pool.lent() as stream:
        yield stream
