"""Where user states are read from: Redis in production, a dictionary in unit tests of the engine."""

from collections.abc import Sequence
from typing import Protocol


class StateStore(Protocol):
    """Reads hashes. Safe to call from several threads."""

    def fetch(self, keys: Sequence[bytes], fields: Sequence[bytes], timeout_s: float) -> list[Sequence[bytes | None]]:
        """The values of `fields` in the hash of each key, None for a field that is not there.

        Raises StoreUnavailable where the store does not answer within timeout_s; never waits longer.
        """
        ...
