"""Checks the canary users of each loaded release end to end, in the background.

Their rows are read through the store and the guard as any user's; the stored state is compared with the golden one,
then the embedding that process_batch gives. That holds encoder, codec, publishing, store, guard and head to what the
release was when it was written. A verdict is told (log, metrics, lease) and never stops serving.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from feature_repo import layout
from model.canary import Canary
from model.errors import StoreUnavailable
from online import guard
from online.engine import Answered, Request, process_batch
from online.guard import Limits, Reason, Values
from online.residents import Resident, ResidentSet
from online.stores import StateStore

log = logging.getLogger(__name__)

PASSED, FAILED, UNKNOWN = "passed", "failed", "unknown"


@dataclass(frozen=True, slots=True)
class Check:
    """What one look at a release's canaries found."""

    verdict: str
    """passed, failed, or unknown: a row is missing or the store is away."""
    differences: Mapping[str, float] = field(default_factory=dict)
    """Largest |difference| to the golden outputs, by part: state, embedding."""
    failures: tuple[tuple[str, str], ...] = ()
    """(part, what was wrong); part is row, state or embedding."""
    as_of_us: int | None = None
    """Of the oldest canary row: how far publishing has come."""


class _AsRead:
    """A store that gives what was read already: a row that is written anew meanwhile must not look like a failure."""

    def __init__(self, rows: Mapping[bytes, Values]) -> None:
        self._rows = rows

    def fetch(self, keys: Sequence[bytes], fields: Sequence[bytes], timeout_s: float) -> list[Values]:
        """See StateStore."""
        return [self._rows[key] for key in keys]


def check_resident(resident: Resident, residents: ResidentSet, rows: Mapping[bytes, Values], now_us: int) -> Check:
    """Hold what is stored for a release's canaries to its golden outputs.

    rows: the values of `residents.fields` by key.
    """
    found: list[tuple[Canary, Request]] = []
    differences: dict[str, float] = {}
    failures: list[tuple[str, str]] = []
    as_of_us: list[int] = []
    missing = not resident.canaries

    def compare(part: str, canary: Canary, difference: float, tolerance: float) -> None:
        differences[part] = max(difference, differences.get(part, 0.0))
        if not difference <= tolerance:
            failures.append((part, f"user {canary.user_id} differs by {difference:.2g} ({tolerance:.3g} allowed)"))

    view = resident.view
    for canary in resident.canaries:
        values = rows[layout.redis_key(canary.user_id)][view.start : view.stop]
        state = guard.read_row(values, view, Limits(now_us))
        if state == Reason.UNKNOWN_USER:
            missing = True
        elif isinstance(state, str):
            failures.append(("row", f"user {canary.user_id}: {state}"))
        else:
            as_of_us.append(state.encoded_at_us)
            compare("state", canary, canary.state_difference(state.state_D), canary.state_tolerance)
            context = canary.context_at(state.history_until_us)
            version = resident.embedding_version
            request = Request(canary.user_id, context, monotonic() + 60, True, expected_embedding_version=version)
            found.append((canary, request))
    results = _answers([request for _, request in found], residents, rows, now_us)
    for (canary, _), result in zip(found, results, strict=True):
        if isinstance(result, Exception):
            failures.append(("embedding", f"user {canary.user_id}: {result}"))
        else:
            difference = canary.embedding_difference(result.embedding_E)
            compare("embedding", canary, difference, canary.embedding_tolerance)
    verdict = FAILED if failures else UNKNOWN if missing else PASSED
    return Check(verdict, differences, tuple(failures), min(as_of_us, default=None))


def _answers(
    requests: Sequence[Request], residents: ResidentSet, rows: Mapping[bytes, Values], now_us: int
) -> Sequence[Answered | Exception]:
    try:
        return process_batch(requests, residents, _AsRead(rows), now_us=now_us, store_timeout_s=1.0)
    except Exception as error:  # a head that cannot take a canary is a finding, not a reason to stop looking
        return [error] * len(requests)


class CanaryWatch:
    """Looks at the canaries of the current set every so often, and at once when told that the set changed."""

    def __init__(
        self,
        current: Callable[[], ResidentSet | None],
        store: StateStore,
        *,
        every_s: float,
        store_timeout_s: float,
        on_checked: Callable[[Mapping[str, Check]], None] = lambda checks: None,
        on_change: Callable[[], None] = lambda: None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """every_s: 0 for never. on_checked: told each look, by release. on_change: told that a verdict changed."""
        self._current = current
        self._store = store
        self._every_s = every_s
        self._store_timeout_s = store_timeout_s
        self._on_checked, self._on_change = on_checked, on_change
        self._now_us = now_us
        self._verdicts: Mapping[str, str] = {}
        self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-canaries", daemon=True)

    def start(self) -> None:
        """Look in the background."""
        if self._every_s:
            self._thread.start()

    def look_now(self) -> None:
        """Do not wait for the next turn."""
        self._wake.set()

    def stop(self) -> None:
        """Look no more. A look that hangs in a head is left behind."""
        self._is_over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    def verdict_of(self, release_id: str) -> str:
        """passed, failed or unknown."""
        return self._verdicts.get(release_id, UNKNOWN)

    def _run(self) -> None:
        while not self._is_over:
            self._wake.clear()
            try:
                self.check()
            except Exception:  # a thread that ends in silence would leave the last verdict standing
                log.exception("checking the canaries failed; will try again")
            self._wake.wait(self._every_s)

    def check(self) -> None:
        """Look once."""
        residents = self._current()
        if residents is None:
            return
        checks = self._checks(residents)
        before, self._verdicts = self._verdicts, {name: check.verdict for name, check in checks.items()}
        self._on_checked(checks)
        changed = [name for name, verdict in self._verdicts.items() if verdict != before.get(name, UNKNOWN)]
        for name in changed:
            _tell(name, checks[name])
        if changed:
            self._on_change()

    def _checks(self, residents: ResidentSet) -> dict[str, Check]:
        keys = list({layout.redis_key(canary.user_id): None for r in residents.residents for canary in r.canaries})
        rows: dict[bytes, Values] = {}
        if keys:
            try:
                fetched = self._store.fetch(keys, residents.fields, self._store_timeout_s)
            except StoreUnavailable:
                return {r.release_id: Check(UNKNOWN) for r in residents.residents}
            rows = dict(zip(keys, fetched, strict=True))
        now_us = self._now_us()
        return {r.release_id: check_resident(r, residents, rows, now_us) for r in residents.residents}


def _tell(release_id: str, check: Check) -> None:
    if check.verdict == FAILED:
        log.error("canary of release %s failed: %s", release_id, "; ".join(f"{p}: {w}" for p, w in check.failures))
    elif check.verdict == PASSED:
        log.info("canary of release %s passed", release_id)
    else:
        log.warning("canary of release %s is unknown: its rows are missing or the store is away", release_id)
