"""CUDA streams for one job at a time: a search, an update or a capture has one to itself, then gives it back idle.

PyTorch hands out the 32 streams of a pool in turn, so that two owners of "their own" stream may hold the same one. If
one of them captures a CUDA graph, what the other launches becomes part of that graph, or fails. Here no stream is lent
twice at a time, whatever the pool repeats. They are of a priority of their own (`PRIORITY`): its pool is apart from the
one that `torch.cuda.Stream()` and `torch.cuda.graph` without a stream take theirs from.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

from model.errors import IndexBusy

POOLED = 32
"""Streams of a device and priority that PyTorch has."""
PRIORITY = -1
WAIT_S = 5.0
"""Longest a job waits for a stream."""
_CAPTURING = threading.Lock()
"""A capture begins by waiting for the whole device, which no other capture survives: one at a time."""


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

    def lent(self, wait_s: float = WAIT_S) -> "Loan":
        """A stream that nobody else uses while the block lasts; at its end everything on it is done.

        A stream whose work failed is not lent again. Raises IndexBusy where all are lent for wait_s seconds.
        """
        return Loan(self, wait_s)

    def take(self, wait_s: float) -> Any:
        """A stream for `give_back`, as `lent` says."""
        with self._changed:
            if not self._idle:
                self._add()
            if not self._idle and not self._changed.wait_for(lambda: self._idle, wait_s):
                raise IndexBusy(f"all {len(self._handles)} streams of the device were in use for {wait_s:g} s")
            return self._idle.pop()

    def give_back(self, stream: Any) -> None:
        """Wait for all that is on the stream; then it is idle."""
        stream.synchronize()
        with self._changed:
            self._idle.append(stream)
            self._changed.notify()

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


class Loan:
    """A stream taken where a block begins, given back where it ends. Requests make one each, so it is no generator."""

    def __init__(self, pool: StreamPool, wait_s: float) -> None:
        self._pool, self._wait_s = pool, wait_s

    def __enter__(self) -> Any:
        self._stream = self._pool.take(self._wait_s)
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.give_back(self._stream)


class Current:
    """`torch.cuda.stream(stream)` in a fraction of its time, which is much to a search of a tenth of a millisecond."""

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        stream = self._stream
        self._device = torch._C._cuda_getDevice()
        self._before = torch._C._cuda_getCurrentStream(stream.device_index)
        torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch._C._cuda_setStream(*self._before)
        if self._device != self._stream.device_index:
            torch._C._cuda_setDevice(self._device)


def current(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """`Current`; nothing where there is no stream, on the CPU."""
    return nullcontext() if stream is None else Current(stream)


_POOLS: dict[int, StreamPool] = {}
_MAKING = threading.Lock()


def lent(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of a table's device to oneself (`StreamPool.lent`), not yet the current one; None on the CPU."""
    if device.type != "cuda":
        return nullcontext()
    assert device.index is not None, "tensors have a device with a number"
    pool = _POOLS.get(device.index)
    if pool is None:
        with _MAKING:
            pool = _POOLS.setdefault(
                device.index,
                StreamPool(lambda: torch.cuda.Stream(device, priority=PRIORITY)),  # type: ignore[no-untyped-call]
            )
    return pool.lent()


@torch.inference_mode()
def captured(device: torch.device, launch: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """The CUDA graph of a launch; None on the CPU.

    Other threads may use the device meanwhile, but not wait for all of it.
    The stream is this thread's alone from before the capture begins until after it ends.
    """
    if device.type != "cuda":
        return None
    with _CAPTURING, lent(device) as stream:
        with torch.cuda.stream(stream):
            launch()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch()
    return graph
