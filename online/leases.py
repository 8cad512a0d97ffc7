"""This process's lease in the registry: what it has loaded, so that nothing it may still read is collected.

A lease is never behind what is in use: it names a new set beside the old one before the new one is swapped in, and the
old one is left out by a regular renewal, when requests that pinned it have ended. Serving never waits for a lease: a
registry that cannot be written is logged and counted, and that is all.
"""

import logging
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from model.leases import Lease, Leased, drop_lease, write_lease
from model.release import Registry
from online.residents import ResidentSet

log = logging.getLogger(__name__)

UNKNOWN = "unknown"


def new_server_id() -> str:
    """host-pid-random: another one for every process that ever starts."""
    host = re.sub(r"[^\w-]", "-", platform.node()) or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


class LeaseHolder:
    """Holds the lease from the first loaded set to `stop`; renews it from a thread of its own."""

    def __init__(
        self,
        registry: Registry,
        *,
        server_id: str,
        address: str,
        lease_s: float,
        current: Callable[[], ResidentSet | None],
        verdict_of: Callable[[str], str] = lambda release_id: UNKNOWN,
        on_written: Callable[[Lease], None] = lambda lease: None,
        on_failure: Callable[[], None] = lambda: None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """current: the set in use. verdict_of: a release's canary verdict. on_failure: told of each write that fails.

        lease_s: how long a lease lasts; it is renewed every third of that.
        """
        self.server_id = server_id
        self._registry = registry
        self._address = address
        self._lease_s = lease_s
        self._current = current
        self._verdict_of = verdict_of
        self._on_written, self._on_failure = on_written, on_failure
        self._now_us = now_us
        self._lock = threading.Lock()
        self._named: dict[str, Leased] = {}
        self._newest: dict[str, Leased] = {}
        self._epoch = 0
        self._renew_at = monotonic() + lease_s / 3
        self._is_failing = False
        self._is_over = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renew-lease", daemon=True)

    def start(self) -> None:
        """Renew in the background."""
        self._thread.start()

    def widen(self, residents: ResidentSet) -> None:
        """Name a set, beside those named so far, before it is swapped in. The next renewal is a full interval away."""
        with self._lock:
            self._newest = _named(residents)
            self._named |= self._newest
            self._epoch = residents.epoch
            self._renew_at = monotonic() + self._lease_s / 3
            self._write()

    def renew(self) -> None:
        """Name only what is in use, and the set about to be swapped in."""
        with self._lock:
            residents = self._current()
            self._named = ({} if residents is None else _named(residents)) | self._newest
            self._renew_at = monotonic() + self._lease_s / 3
            self._write()

    def rewrite(self) -> None:
        """Tell the registry of new canary verdicts; the releases stay those that the lease names."""
        with self._lock:
            self._write()

    def stop(self) -> None:
        """Give the lease back. Nothing is written afterwards."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if not self._lock.acquire(timeout=5):
            log.warning("the registry hangs; the lease %s will run out by itself", self.server_id)
            return
        try:
            self._is_over = True
            drop_lease(self._registry, self.server_id)
        except Exception as error:  # whatever a file system raises; the lease runs out by itself
            log.warning("the lease %s cannot be removed: %s", self.server_id, error)
        finally:
            self._lock.release()

    def _run(self) -> None:
        while not self._stop.wait(max(0.0, self._renew_at - monotonic())):
            if monotonic() >= self._renew_at:
                self.renew()

    def _write(self) -> None:
        if self._is_over or not self._named:
            return
        now_us = self._now_us()
        lease = Lease(
            server_id=self.server_id,
            address=self._address,
            epoch=self._epoch,
            releases=tuple(replace(r, canary=self._verdict_of(r.release_id)) for r in self._named.values()),
            written_at_us=now_us,
            expires_at_us=now_us + int(self._lease_s * 1e6),
        )
        try:
            write_lease(self._registry, lease)
        except Exception as error:  # whatever a file system raises; serving goes on
            if not self._is_failing:
                log.error("the lease %s cannot be written to %s: %s", self.server_id, self._registry.uri, error)
            self._is_failing = True
            self._on_failure()
            return
        if self._is_failing:
            log.info("the lease %s is written again", self.server_id)
        self._is_failing = False
        self._on_written(lease)


def _named(residents: ResidentSet) -> dict[str, Leased]:
    return {
        r.release_id: Leased(
            release_id=r.release_id,
            role=r.role.value,
            state_version=r.state_version,
            embedding_version=r.embedding_version,
            has_items=r.index is not None,
            canary=UNKNOWN,
        )
        for r in residents.residents
    }
