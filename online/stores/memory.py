"""A store for unit tests of the engine: a dictionary, which can be told to fail."""

from collections.abc import Mapping, Sequence

from model.errors import StoreUnavailable


class MemoryStore:
    """Hashes in a dictionary."""

    def __init__(self) -> None:
        self.hashes: dict[bytes, dict[bytes, bytes]] = {}
        self.is_down = False
        self.round_trips = 0

    def put(self, key: bytes, values: Mapping[bytes, bytes]) -> None:
        """Set fields of a hash; the others stay."""
        self.hashes.setdefault(key, {}).update(values)

    def fetch(self, keys: Sequence[bytes], fields: Sequence[bytes], timeout_s: float) -> list[Sequence[bytes | None]]:
        """See StateStore. Raises StoreUnavailable while `is_down`."""
        self.round_trips += 1
        if self.is_down:
            raise StoreUnavailable("the memory store is down")
        return [[self.hashes.get(key, {}).get(field) for field in fields] for key in keys]
