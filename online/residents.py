"""The releases loaded in this process, as one immutable value that every request pins when it comes in.

A `ResidentSet` belongs to one epoch of the serving pointer. When the pointer moves, a new set is built beside the old
one and swapped in by one assignment, so a request sees the old set or the new one, never a mixture.

Legend: B requests, D state width, E embedding width, V views.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from feature_repo import layout
from model.bridge import StoredBridge
from model.canary import Canary
from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import CheckpointError
from model.item_index import ItemIndex
from model.records import Context
from model.state_codec import StateCodec
from online.items import ServedItems


class Manifest(Protocol):
    """What the service needs to know of a release (see `model.release.Manifest`)."""

    @property
    def release_id(self) -> str: ...
    @property
    def state_version(self) -> str: ...
    @property
    def embedding_version(self) -> str: ...
    @property
    def config(self) -> TowerConfig: ...
    @property
    def description(self) -> DatasetDescription: ...


class Head(Protocol):
    """The real-time half of a release: state and context to user embedding."""

    @property
    def cold_state(self) -> NDArray[np.float32]:
        """f32 [D]."""
        ...

    def embed(
        self, states: NDArray[np.float32], contexts: Sequence[Context], history_until_us: Sequence[int | None]
    ) -> NDArray[np.float32]:
        """f32 [B, D] to f32 [B, E]."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a resident is made of, whatever its role will be."""

    manifest: Manifest
    head: Head
    canaries: tuple[Canary, ...] = ()
    check_items: Callable[[ItemIndex], None] = lambda snapshot: None
    """Raises CheckpointError for a snapshot that this release must not be searched in."""
    make_index: Callable[[ItemIndex], ServedItems] = ServedItems.of_snapshot
    """The index of a snapshot that passed. Raises DataError."""
    index: ServedItems | None = None


class Role(Enum):
    """What the serving pointer says of a release."""

    SERVING = "serving"
    PREPARED = "prepared"
    PREVIOUS = "previous"


@dataclass(frozen=True, slots=True)
class View:
    """Where the states of one version are stored, and what they must look like."""

    state_version: str
    width: int
    """D of a state."""
    codec: StateCodec | None
    """None where states stand as lists of float32."""
    start: int
    """Where the view's values begin among the values fetched for a user."""

    @property
    def stop(self) -> int:
        """Where they end."""
        return self.start + layout.ROW_LENGTH


@dataclass(frozen=True, slots=True)
class Resident:
    """One loaded release."""

    role: Role
    release_id: str
    state_version: str
    embedding_version: str
    config: TowerConfig
    head: Head = field(compare=False)
    view: View
    index: ServedItems | None = field(compare=False, default=None)
    """The items of its embedding_version; None where they are not loaded: it embeds, but cannot retrieve."""
    canaries: tuple[Canary, ...] = field(compare=False, default=())
    crossings: "tuple[Crossing, ...]" = field(compare=False, default=())
    """Bridges from other loaded releases' states; only the serving release has any."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A bridge, and the view whose states it takes."""

    view: View
    stored: StoredBridge


@dataclass(frozen=True, slots=True)
class ResidentSet:
    """The serving pointer's epoch and the releases loaded for it, serving first. Built by `resident_set`."""

    epoch: int
    residents: tuple[Resident, ...]
    fields: tuple[bytes, ...]
    """Redis hash fields of every view, one view after another; releases that share a state_version share a view."""
    description: DatasetDescription
    context_columns: frozenset[str]
    """Context features that some resident declares; the others ignore them."""
    query_dims: frozenset[int]

    @property
    def serving(self) -> Resident:
        """The release that answers unless a caller asks otherwise."""
        return self.residents[0]

    def candidates(self, expected_embedding_version: str, accept_previous: bool) -> tuple[Resident, ...]:
        """The releases that may answer a request, in the order they are asked; empty where none may.

        expected_embedding_version: "" for any; else only releases of that version, the serving one first.
        accept_previous: whether the release that served before may stand in for the serving one.
        """
        if expected_embedding_version:
            return tuple(r for r in self.residents if r.embedding_version == expected_embedding_version)
        if accept_previous:
            return tuple(r for r in self.residents if r.role is not Role.PREPARED)
        return self.residents[:1]


def resident_set(epoch: int, loaded: Mapping[Role, Loaded], bridges: Sequence[StoredBridge] = ()) -> ResidentSet:
    """The immutable set of what is loaded.

    loaded: by role; the serving release must be among them. bridges: that lead to the serving release's states; those
    from a version that is not loaded, or of another width, are left out.
    Raises CheckpointError where two releases disagree on the kind of their ids or on the width of a shared state.
    """
    views: dict[str, View] = {}
    residents: list[Resident] = []
    serving = loaded[Role.SERVING].manifest
    for role in (Role.SERVING, Role.PREVIOUS, Role.PREPARED):
        if role not in loaded:
            continue
        part = loaded[role]
        manifest = part.manifest
        for name in ("user_id_type", "item_id_type"):
            wanted, found = getattr(serving.description, name), getattr(manifest.description, name)
            if wanted != found:
                raise CheckpointError(
                    f"releases of one service must agree on {name}: {serving.release_id} has {wanted}, "
                    f"{manifest.release_id} has {found}"
                )
        version, config = manifest.state_version, manifest.config
        width, codec = config.state_width, StateCodec.of(config)
        view = views.setdefault(version, View(version, width, codec, len(views) * layout.ROW_LENGTH))
        if view.width != width:
            raise CheckpointError(f"state_version {version} has width {view.width} and {width}; it must be one")
        if view.codec != codec:
            raise CheckpointError(f"state_version {version} is stored as {view.codec} and {codec}; it must be one")
        residents.append(
            Resident(
                role,
                manifest.release_id,
                version,
                manifest.embedding_version,
                manifest.config,
                part.head,
                view,
                part.index,
                part.canaries,
            )
        )
    first = residents[0]
    residents[0] = replace(first, crossings=tuple(_crossings(bridges, views, first)))
    fields = [name for version in views for name in layout.row_fields(layout.view_name(version))]
    manifests = [part.manifest for part in loaded.values()]
    return ResidentSet(
        epoch=epoch,
        residents=tuple(residents),
        fields=tuple(fields),
        description=serving.description,
        context_columns=frozenset(name for m in manifests for name in m.description.head_columns),
        query_dims=frozenset(m.config.query_dim for m in manifests),
    )


def _crossings(bridges: Sequence[StoredBridge], views: Mapping[str, View], serving: Resident) -> Iterator[Crossing]:
    for stored in bridges:
        view = views.get(stored.manifest.from_state_version)
        if view is not None and stored.bridge.matrix_XY.shape == (view.width, serving.view.width):
            yield Crossing(view, stored)
