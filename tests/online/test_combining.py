"""Batches of what waits: nobody waits alone, nobody gets another's result, an error reaches everybody it concerns."""

import threading
from collections.abc import Sequence
from concurrent import futures

import pytest

from online.combining import Combiner
from tests.online.helpers import wait_until


def test_what_waits_is_the_next_batch() -> None:
    batches: list[list[int]] = []
    entered, go = threading.Event(), threading.Event()

    def work(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        entered.set()
        assert go.wait(10)
        return [10 * n for n in batch]

    combiner = Combiner(work)
    with futures.ThreadPoolExecutor(6) as pool:
        first = pool.submit(combiner.run, 0)
        assert entered.wait(10)
        others = [pool.submit(combiner.run, n) for n in range(1, 6)]
        wait_until(lambda: len(combiner.waiting) == 5)
        go.set()
        assert first.result(10) == 0
        assert [other.result(10) for other in others] == [10, 20, 30, 40, 50]
    assert batches[0] == [0]
    assert sorted(batches[1]) == [1, 2, 3, 4, 5]
    assert combiner.run(7) == 70


def test_everybody_gets_their_own_under_load() -> None:
    sizes: list[int] = []

    def work(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        return [n * n for n in batch]

    combiner = Combiner(work)

    def ask(offset: int) -> bool:
        return all(combiner.run(n) == n * n for n in range(offset, offset + 2000))

    with futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(0, 16_000, 2000)))
    assert sum(sizes) == 16_000


def test_an_error_is_everybodys_and_the_next_batch_goes_on() -> None:
    entered, go = threading.Event(), threading.Event()

    def work(batch: Sequence[int]) -> list[int]:
        entered.set()
        assert go.wait(10)
        if 13 in batch:
            raise RuntimeError("thirteen")
        return list(batch)

    combiner = Combiner(work)
    with futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(combiner.run, 1)
        assert entered.wait(10)
        others = [pool.submit(combiner.run, n) for n in (2, 13)]
        wait_until(lambda: len(combiner.waiting) == 2)
        go.set()
        assert first.result(10) == 1
        for other in others:
            with pytest.raises(RuntimeError, match="thirteen"):
                other.result(10)
    assert combiner.run(5) == 5
