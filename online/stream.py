"""Redis streams whose entries are numbered, so that a reader sees what it missed.

    KEY          the stream: number, and what the sender said
    KEY:number   how many entries were ever appended

Redis trims streams and tells no reader. Every entry carries a number, given in the same step that appends it.
"""

from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from model.errors import StoreUnavailable

BATCH = 100
"""Most entries read at once."""
_APPEND = """
local number = redis.call('INCR', KEYS[2])
redis.call('XADD', KEYS[1], ARGV[1], '~', ARGV[2], '*', 'number', number, unpack(ARGV, 3))
return number
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream."""

    id: str
    number: int
    """-1 where it has none: it was not appended by `append`."""
    fields: dict[bytes, bytes]

    @property
    def appended_us(self) -> int:
        """When it was appended, by Redis's clock, to the millisecond."""
        return int(self.id.partition("-")[0]) * 1000


def connect(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A client whose connects and reads wait at most so long; longer than any wait asked of `read`."""
    once = Retry(NoBackoff(), 0)  # redis-py waits for seconds between attempts; whoever follows a stream comes again
    return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=once)


def append(
    client: redis.Redis, key: str, fields: dict[str, str | bytes], *, keep: int = 100_000,
    keep_since_us: int | None = None,
) -> int:  # fmt: skip
    """Append an entry; its number. keep: about how many of the latest stay; keep_since_us: instead, those since then.

    key: with a {hash tag}, so that a cluster holds both keys in one place. Raises StoreUnavailable.
    """
    limit = ("MAXLEN", str(keep)) if keep_since_us is None else ("MINID", f"{max(0, keep_since_us) // 1000}-0")
    values = [part for pair in fields.items() for part in pair]
    try:
        number: Any = client.eval(_APPEND, 2, key, f"{key}:number", *limit, *values)
    except RedisError as error:
        raise StoreUnavailable(f"an entry of {key} was not sent: {type(error).__name__}: {error}") from error
    return int(number)


def read(client: redis.Redis, key: str, after: str, wait_ms: int) -> list[Entry]:
    """Up to BATCH entries after an id, waiting at most so long for the first one. Raises StoreUnavailable."""
    try:
        answer: Any = client.xread({key: after}, count=BATCH, block=max(1, wait_ms))
    except RedisError as error:
        raise StoreUnavailable(f"{key} cannot be read: {type(error).__name__}: {error}") from error
    return [Entry(entry.decode(), _number(fields), fields) for entry, fields in (answer[0][1] if answer else [])]


def _number(fields: dict[bytes, bytes]) -> int:
    try:
        return int(fields[b"number"])
    except (KeyError, ValueError):
        return -1
