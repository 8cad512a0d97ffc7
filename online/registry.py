"""Follows the serving pointer: loads what it names beside what serves now, then swaps in one assignment."""

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic

from model.bridge import StoredBridge, load_bridge
from model.canary import canaries
from model.errors import CheckpointError, GoldenMismatch, TowerError
from model.item_index import ItemIndex, check_golden, has_snapshot, read_snapshot
from model.release import Pointer, Registry, Release
from model.retrieval.scalars import counting_config
from online.head import ServingHead
from online.items import LiveModel, ServedItems
from online.residents import Head, Loaded, Manifest, ResidentSet, Role, resident_set

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 10.0


def load_release(
    registry: Registry, release_id: str, make_head: Callable[[Release], Head] = ServingHead, device: str = "cpu"
) -> Loaded:
    """A release as the service needs it, without its items. Raises CheckpointError, GoldenMismatch, OSError.

    device: of the index that will be made of its items.
    """
    release = registry.load(release_id, parts=("head", "items", "scorer"), replay=True)
    description, config, scoring = release.manifest.description, release.manifest.config, release.manifest.scorer
    scorer = None if scoring is None else release.scorer
    live = None
    if config.live_windows_h:
        live = LiveModel(release.items, config, description)
    elif scoring is not None and scoring.scalars:
        live = LiveModel(release.items, counting_config(scoring, config), description, scorer)
    make_index = partial(
        ServedItems.of_snapshot,
        description=description,
        catalogue=registry.catalogue(release_id) if description.item_rules else None,
        live=live,
        scorer=scorer,
        device=device,
    )
    return Loaded(
        release.manifest,
        make_head(release),
        tuple(canaries(release)),
        lambda snapshot: check_golden(snapshot, release),
        make_index,
    )


def _load_snapshot(registry: Registry, embedding_version: str) -> ItemIndex | None:
    """The items of a version; None where there is no snapshot. Raises CheckpointError, OSError."""
    return read_snapshot(registry, embedding_version) if has_snapshot(registry, embedding_version) else None


def _load_bridges(registry: Registry, serving: Manifest, others: Sequence[Manifest]) -> list[StoredBridge]:
    """The enabled bridges from other releases' states to the serving one's, between the very heads that were studied.

    Raises CheckpointError, GoldenMismatch, OSError.
    """
    found = []
    for other in others:
        if other.state_version == serving.state_version:
            continue
        stored = load_bridge(registry, other.state_version, serving.state_version)
        if stored is None or not stored.manifest.is_enabled:
            continue
        ends = (stored.manifest.from_embedding_version, stored.manifest.to_embedding_version)
        if ends == (other.embedding_version, serving.embedding_version):
            found.append(stored)
    return found


class Follower:
    """Keeps `current` at what the registry's pointer says, from a thread of its own.

    A release is loaded, its golden inputs replayed and its serving head compared before it can be seen by a request.
    If the new serving release fails, the old set stays; if only the prepared or previous one fails, the set goes
    without it. A lower epoch than the one in use is refused.

    Each release brings the items of its embedding version where there are any. Without them it still embeds; they are
    looked for again now and then.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        poll_s: float = 1.0,
        before_change: Callable[[ResidentSet], None] = lambda residents: None,
        on_change: Callable[[ResidentSet], None] = lambda residents: None,
        on_refusal: Callable[[str, str], None] = lambda release_id, kind: None,
        load: Callable[[str], Loaded] | None = None,
        load_snapshot: Callable[[str], ItemIndex | None] | None = None,
        feed: Callable[[ServedItems], None] = lambda index: None,
        end_feed: Callable[[ServedItems], None] = lambda index: None,
    ) -> None:
        """before_change: told each new set before a request can see it; on_change: afterwards.

        on_refusal: told (release id or "", kind) of what was not taken: golden, checkpoint, item_index, bridge,
        lower_epoch or registry. load, load_snapshot: a release by its id and items by their embedding version; the
        registry's by default. feed: told each new index before a request can see it, to bring and keep it up to date;
        end_feed: told when no new request will see it.
        """
        self.current: ResidentSet | None = None
        """The set to pin; None until the first release is loaded. Replaced, never changed."""
        self.pointer = Pointer()
        """The pointer that `current` was loaded for."""
        self._registry = registry
        self._poll_s = poll_s
        self._before_change, self._on_change = before_change, on_change
        self._on_refusal = on_refusal
        self._load_new = load or partial(load_release, registry)
        self._load_snapshot = load_snapshot or partial(_load_snapshot, registry)
        self._feed, self._end_feed = feed, end_feed
        self._loaded: dict[str, Loaded] = {}
        self._indexes: dict[str, ServedItems] = {}
        self._checked: set[str] = set()
        """Releases that were held to the items of their embedding version."""
        self._without_items: set[str] = set()
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
        loaded: dict[Role, Loaded] = {}
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
                        resident_set(pointer.epoch, {**loaded, role: part})
                except (TowerError, OSError) as error:
                    self._report(release_id, role, error)
                    if role is Role.SERVING:
                        raise
                    if not isinstance(error, GoldenMismatch):
                        self._incomplete, self._retry_at = True, monotonic() + _RETRY_AFTER_S
                    continue
                loaded[role] = part
            complete = {role: replace(part, index=self._index(part)) for role, part in loaded.items()}
            residents = resident_set(pointer.epoch, complete, self._bridges(complete))
        except (TowerError, OSError) as error:
            wait_s = math.inf if isinstance(error, GoldenMismatch) else _RETRY_AFTER_S  # golden outputs stay wrong
            self._refused, self._retry_at = pointer, monotonic() + wait_s
            return
        self._loaded = {name: part for name, part in self._loaded.items() if name in seen}
        versions = {part.manifest.embedding_version for part in self._loaded.values()}
        self._checked &= set(self._loaded)
        self._without_items &= versions
        if pointer == self.pointer and self.current is not None and _is_same(residents, self.current):
            return
        self._before_change(residents)
        self.pointer = pointer
        self.current = residents
        for version in self._indexes.keys() - versions:
            self._end_feed(self._indexes.pop(version))
        self._on_change(residents)
        log.info(
            "epoch %d: %s", pointer.epoch, ", ".join(f"{r.role.value} {r.release_id}" for r in residents.residents)
        )

    def _load(self, release_id: str) -> Loaded:
        if release_id not in self._loaded:
            self._loaded[release_id] = self._load_new(release_id)
        return self._loaded[release_id]

    def _index(self, part: Loaded) -> ServedItems | None:
        """The items of a release's embedding version, shared by all releases of that version."""
        release_id, version = part.manifest.release_id, part.manifest.embedding_version
        index = self._indexes.get(version)
        try:
            if index is not None and release_id in self._checked:
                return index
            snapshot = self._load_snapshot(version)
            if snapshot is not None:
                part.check_items(snapshot)
                if index is None:
                    index = part.make_index(snapshot)
                    self._feed(index)
                self._indexes[version] = index
                self._checked.add(release_id)
                self._without_items.discard(version)
                return index
        except (TowerError, OSError) as error:
            log.error("refused the items of release %s (it embeds without them): %s", release_id, error)
            self._on_refusal(release_id, "item_index")
        else:
            if version not in self._without_items:
                log.warning("release %s has no item snapshot of embedding version %s yet", release_id, version)
            self._without_items.add(version)
        self._incomplete, self._retry_at = True, monotonic() + _RETRY_AFTER_S
        return None

    def _bridges(self, loaded: Mapping[Role, Loaded]) -> list[StoredBridge]:
        """Bridges to the serving release; one that cannot be had costs only its answers."""
        manifests = [part.manifest for part in loaded.values()]
        try:
            return _load_bridges(self._registry, manifests[0], manifests[1:])
        except (TowerError, OSError) as error:
            log.error("refused the bridges to release %s (it answers without): %s", manifests[0].release_id, error)
            self._on_refusal(manifests[0].release_id, "bridge")
            return []

    def _report(self, release_id: str, role: Role, error: Exception) -> None:
        kept = f"epoch {self.pointer.epoch} stays" if role is Role.SERVING else "the set goes without it"
        log.error("refused %s release %s (%s): %s", role.value, release_id, kept, error)
        golden = "golden" if isinstance(error, GoldenMismatch) else "checkpoint"
        self._on_refusal(release_id, golden if isinstance(error, CheckpointError) else "registry")


def _is_same(one: ResidentSet, other: ResidentSet) -> bool:
    """Whether two sets hold the same releases in the same roles, with the same items and as many bridges."""
    parts = [[(r.role, r.release_id, r.index, len(r.crossings)) for r in each.residents] for each in (one, other)]
    return parts[0] == parts[1]
