"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from deploy.redis_server import start_redis

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_many_threads_as_at_first() -> None:
    """What other tests and wider fixtures asked of PyTorch's threads must not reach a test: sums round by it."""
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis, private to this test session. Tests share it: use ids or state versions of your own."""
    with start_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.url
