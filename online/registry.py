"""Follows the serving pointer: loads what it names beside what serves now, then swaps in one assignment."""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from model.errors import CheckpointError, GoldenMismatch, TowerError
from model.release import Pointer, Registry, Release
from online.head import ServingHead
from online.residents import Head, Manifest, ResidentSet, Role, resident_set

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    manifest: Manifest
    head: Head


class Follower:
    """Keeps `current` at what the registry's pointer says, from a thread of its own.

    A release is loaded, its golden inputs replayed and its serving head compared before it can be seen by a request.
    If the new serving release fails, the old set stays; if only the prepared or previous one fails, the set goes
    without it. A lower epoch than the one in use is refused.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        poll_s: float = 1.0,
        on_change: Callable[[ResidentSet], None] = lambda residents: None,
        on_refusal: Callable[[str, str], None] = lambda release_id, kind: None,
        make_head: Callable[[Release], Head] = ServingHead,
    ) -> None:
        """on_change: told each new set. on_refusal: told (release id or "", kind) of what was not taken:
        golden, checkpoint, lower_epoch or registry."""
        self.current: ResidentSet | None = None
        """The set to pin; None until the first release is loaded. Replaced, never changed."""
        self.pointer = Pointer()
        """The pointer that `current` was loaded for."""
        self._registry = registry
        self._poll_s = poll_s
        self._on_change = on_change
        self._on_refusal = on_refusal
        self._make_head = make_head
        self._loaded: dict[str, _Loaded] = {}
        self._refused: Pointer | None = None
        self._incomplete = False
        self._retry_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-registry", daemon=True)

    def start(self) -> None:
        """Load what the pointer names now, here, then follow in the background."""
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        """Stop following; the current set stays."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.refresh()
            except Exception:  # a thread that ends in silence would freeze the service at this epoch
                log.exception("following the registry failed; will try again")
                self._on_refusal("", "registry")

    def refresh(self) -> None:
        """Look at the pointer once and follow it. Refusals are logged and counted, not raised."""
        try:
            pointer = self._registry.pointer()
        except (OSError, TowerError, ValueError) as error:
            log.warning("the serving pointer cannot be read, keeping epoch %d: %s", self.pointer.epoch, error)
            self._on_refusal("", "registry")
            return
        if pointer.serving is None:
            return
        if pointer == self.pointer and not (self._incomplete and monotonic() >= self._retry_at):
            return
        if pointer.epoch < self.pointer.epoch:
            if pointer != self._refused:
                log.error("refused epoch %d: epoch %d is in use", pointer.epoch, self.pointer.epoch)
                self._on_refusal("", "lower_epoch")
                self._refused = pointer
            return
        if pointer == self._refused and monotonic() < self._retry_at:
            return
        loaded: dict[Role, tuple[Manifest, Head]] = {}
        named = {Role.SERVING: pointer.serving, Role.PREVIOUS: pointer.previous, Role.PREPARED: pointer.prepared}
        seen: set[str] = set()
        self._incomplete = False
        try:
            for role, release_id in named.items():
                if release_id is None or release_id in seen:
                    continue
                seen.add(release_id)
                try:
                    part = self._load(release_id)
                    if role is not Role.SERVING:
                        resident_set(pointer.epoch, {**loaded, role: (part.manifest, part.head)})
                except (TowerError, OSError) as error:
                    self._report(release_id, role, error)
                    if role is Role.SERVING:
                        raise
                    if not isinstance(error, GoldenMismatch):
                        self._incomplete, self._retry_at = True, monotonic() + _RETRY_AFTER_S
                    continue
                loaded[role] = (part.manifest, part.head)
            residents = resident_set(pointer.epoch, loaded)
        except (TowerError, OSError) as error:
            wait_s = math.inf if isinstance(error, GoldenMismatch) else _RETRY_AFTER_S  # golden outputs stay wrong
            self._refused, self._retry_at = pointer, monotonic() + wait_s
            return
        self._loaded = {name: part for name, part in self._loaded.items() if name in seen}
        self.pointer = pointer
        self.current = residents
        self._on_change(residents)
        log.info(
            "epoch %d: %s", pointer.epoch, ", ".join(f"{r.role.value} {r.release_id}" for r in residents.residents)
        )

    def _load(self, release_id: str) -> _Loaded:
        if release_id not in self._loaded:
            release = self._registry.load(release_id, parts=("head", "items"), replay=True)
            self._loaded[release_id] = _Loaded(release.manifest, self._make_head(release))
        return self._loaded[release_id]

    def _report(self, release_id: str, role: Role, error: Exception) -> None:
        kept = f"epoch {self.pointer.epoch} stays" if role is Role.SERVING else "the set goes without it"
        log.error("refused %s release %s (%s): %s", role.value, release_id, kept, error)
        golden = "golden" if isinstance(error, GoldenMismatch) else "checkpoint"
        self._on_refusal(release_id, golden if isinstance(error, CheckpointError) else "registry")
