"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from deploy.redis_server import start_redis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis, private to this test session. Tests share it: use ids or state versions of your own."""
    with start_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.url
