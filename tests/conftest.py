"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from deploy.redis_server import start_redis

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """What one test asks of PyTorch's threads must not reach the next: sums round by how they are shared out."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis, private to this test session. Tests share it: use ids or state versions of your own."""
    with start_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.url
