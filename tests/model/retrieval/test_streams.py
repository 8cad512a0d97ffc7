"""Streams that a pool repeats are lent to one borrower at a time, come back idle, and run out with an error."""

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model.errors import IndexBusy
from model.retrieval.streams import Current, StreamPool, lent


@dataclass
class Stream:
    """A stream as the pool of PyTorch gives it: other objects, the same handle."""

    cuda_stream: int
    waits: list[int] = field(default_factory=list)
    fails: bool = False

    def synchronize(self) -> None:
        self.waits.append(self.cuda_stream)
        if self.fails:
            raise RuntimeError("an error on the device")


def pool_of(handles: int) -> tuple[StreamPool, list[Stream]]:
    """A pool over streams whose handles come round again and again, and all objects made."""
    numbers, made = itertools.cycle(range(handles)), []

    def make() -> Stream:
        made.append(Stream(next(numbers)))
        return made[-1]

    return StreamPool(make, handles), made


def test_a_stream_is_used_again_after_its_work_is_done() -> None:
    pool, made = pool_of(3)
    for number in range(5):
        with pool.lent() as stream:
            assert stream.cuda_stream == 0
            assert len(stream.waits) == number
    assert len(made) == 1, "no more than are needed at a time"


def test_streams_lent_at_one_time_have_different_handles() -> None:
    """Another owner of the pool takes some in between, so handles come in any order, repeated."""
    handles = iter([4, 4, 4, 7, 4, 7, 7, 4, 1])
    pool = StreamPool(lambda: Stream(next(handles)), most=8)
    with pool.lent() as first, pool.lent() as second, pool.lent() as third:
        assert [stream.cuda_stream for stream in (first, second, third)] == [4, 7, 1]


def test_where_all_are_lent_one_waits_and_then_gives_up() -> None:
    pool, _ = pool_of(2)
    with pool.lent(), pool.lent(), pytest.raises(IndexBusy, match="all 2 streams"), pool.lent(wait_s=0.01):
        pass
    with pool.lent(wait_s=0.01), pool.lent(wait_s=0.01):
        pass


def test_fewer_streams_than_expected_are_made_do_with() -> None:
    pool = StreamPool(lambda: Stream(5), most=32)
    with pool.lent() as stream:
        assert stream.cuda_stream == 5
        with pytest.raises(IndexBusy, match="all 1 streams"), pool.lent(wait_s=0.01):
            pass


def test_a_stream_is_given_back_by_a_job_that_fails_but_not_by_one_whose_device_work_fails() -> None:
    pool, _ = pool_of(1)
    with pytest.raises(OSError, match="broken off"), pool.lent():
        raise OSError("broken off")
    with pytest.raises(RuntimeError, match="on the device"), pool.lent(wait_s=0.01) as stream:
        stream.fails = True
    with pytest.raises(IndexBusy), pool.lent(wait_s=0.01):
        pass


def test_twelve_threads_over_four_streams_never_share_one() -> None:
    pool, _ = pool_of(4)
    used: dict[int, threading.Lock] = {handle: threading.Lock() for handle in range(4)}
    shared, jobs, failures = [], [], []

    def work() -> None:
        try:
            for _ in range(300):
                with pool.lent() as stream:
                    if not used[stream.cuda_stream].acquire(blocking=False):
                        shared.append(stream.cuda_stream)
                        continue
                    jobs.append(stream.cuda_stream)
                    used[stream.cuda_stream].release()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not shared
    assert len(jobs) == 12 * 300


def test_the_cpu_has_none() -> None:
    with lent(torch.device("cpu")) as stream:
        assert stream is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_of_a_gpu_are_not_those_that_others_get() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    others: set[Any] = {torch.cuda.Stream(device).cuda_stream for _ in range(64)}
    with lent(device) as first, lent(device) as second:
        assert first.cuda_stream != second.cuda_stream
        assert not {first.cuda_stream, second.cuda_stream} & others


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_is_current_while_the_block_lasts() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    outer: Any = torch.cuda.Stream(device)
    with torch.cuda.stream(outer), lent(device) as stream:
        with Current(stream):
            assert torch.cuda.current_stream(device) == stream
        assert torch.cuda.current_stream(device) == outer
        with pytest.raises(OSError, match="broken off"), Current(stream):
            raise OSError("broken off")
        assert torch.cuda.current_stream(device) == outer
        assert torch.cuda.current_device() == device.index
