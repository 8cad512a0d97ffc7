"""Plain values that travel between the parts: what a user did, what is true at request time, what is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Id = int | str
"""A user or item id: int64 or string, one of the two for a whole dataset."""


@dataclass(frozen=True, slots=True)
class Event:
    """One row of a user's history."""

    item_id: Id
    event_type: str
    timestamp_us: int
    columns: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SubjectItem:
    """An item the request is about (the page being looked at), with the caller's confidence in [0, 1]."""

    item_id: Id
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Context:
    """What is true only at request time. Every part may be absent."""

    features: Mapping[str, str] = field(default_factory=dict)
    """Declared context and user columns, values as strings."""
    timestamp_us: int | None = None
    """Time of the request."""
    session_events: tuple[Event, ...] = ()
    """Recent events, oldest first; those already in the stored state are dropped by the featuriser."""
    subject_items: tuple[SubjectItem, ...] = ()
    query_vector: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class UserState:
    """One stored row: what the encoder left behind of a user's history."""

    state_D: NDArray[np.float32]
    state_version: str
    history_until_us: int
    """Time of the last event the state has seen."""
    encoded_at_us: int
    """As-of time of the run that wrote it."""
