"""Canaries: a few reserved users with frozen histories, whose state and embedding are known beforehand.

Their histories are golden inputs of the release, moved by whole weeks so that they end before the run's as-of time:
every feature is a time span, an hour or a weekday, so the state and the embedding stay the golden ones. The batch job
encodes them anew and publishes them after a run's last row; whoever reads them checks encoder, codec, publishing,
store, guard and head at once, and learns how far publishing has come.

Legend: D state width, E embedding width.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model.records import Context, Id
from model.release import GOLDEN_TOLERANCE, Release

CODEC_TOLERANCE: Final = {"float32": 0.0, "float16": 2e-3, "int8": 2e-2}
"""How much more an embedding may differ where a codec rounds the state: a number that another processor moves by 1e-6
over the middle between two steps is stored a whole step away. One such step moved embeddings of random towers by up to
5e-4 and 4e-3."""

_GOLDEN_USERS: Final = (1, 5, 8, 11)
"""Histories of 2, 13, 89 and 377 events (as far as the release keeps so many), each with a context."""
_FIRST_INT_ID: Final = -(2**62)
_WEEK_US: Final = 7 * 86_400_000_000


@dataclass(frozen=True, slots=True)
class Canary:
    """One reserved user and what must come of it."""

    user_id: Id
    state_D: NDArray[np.float32]
    """Before a codec rounds it."""
    history_until_us: int
    """Before it is moved."""
    context: Context
    """Before it is moved."""
    embedding_E: NDArray[np.float32]
    state_tolerance: float
    """Largest |difference| allowed of a stored state: by the release's compute dtype, and the codec's rounding."""
    embedding_tolerance: float
    """Largest |difference| allowed of an embedding."""

    def state_difference(self, state_D: NDArray[np.float32]) -> float:
        """Largest |difference| of a stored state; infinite for another width or a NaN."""
        return _difference(state_D, self.state_D)

    def embedding_difference(self, embedding_E: NDArray[np.float32]) -> float:
        """Largest |difference| of an embedding; infinite for another width or a NaN."""
        return _difference(embedding_E, self.embedding_E)

    def context_at(self, history_until_us: int) -> Context:
        """The context that goes with a stored row: moved as far as the row's history was."""
        return moved(self.context, history_until_us - self.history_until_us)


def canary_ids(id_type: str) -> list[Id]:
    """The reserved user ids. id_type: int64 or string."""
    numbers = range(len(_GOLDEN_USERS))
    if id_type == "int64":
        return [_FIRST_INT_ID + n for n in numbers]
    return [f"__hybrid_tower_canary_{n}" for n in numbers]


def canaries(release: Release) -> list[Canary]:
    """The canaries of a release, with golden outputs. Needs no part of it loaded."""
    golden = release.golden_users()
    config, codec = release.config, release.codec
    tolerance = GOLDEN_TOLERANCE[config.compute_dtype]
    rounding_U = [0.0] * len(golden.state_UD) if codec is None else codec.rounding(golden.state_UD).tolist()
    embedding_tolerance = tolerance + CODEC_TOLERANCE[config.storage_codec]
    found = []
    for user_id, u in zip(canary_ids(release.manifest.description.user_id_type), _GOLDEN_USERS, strict=True):
        until_us = golden.history_until_us[u]
        assert until_us is not None, "a canary has a state"
        found.append(
            Canary(
                user_id, golden.state_UD[u], until_us, golden.contexts[u], golden.embedding_UE[u],
                tolerance + rounding_U[u], embedding_tolerance,
            )
        )  # fmt: skip
    return found


def encode_canaries(release: Release, as_of_us: int) -> tuple[list[Id], NDArray[np.float32], list[int]]:
    """The canaries' rows as of a time, encoded now: ids, states f32 [U, D] before any codec, times of last events."""
    golden = release.golden_users()
    rows = [range(int(golden.offsets[u]), int(golden.offsets[u + 1])) for u in _GOLDEN_USERS]
    table = golden.table.take([row for some in rows for row in some])
    offsets = np.concatenate([[0], np.cumsum([len(some) for some in rows])]).astype(np.int64)
    state_UD = release.encode(table, offsets)
    known = canaries(release)
    until_us = [c.history_until_us + weeks_back_us(c.history_until_us, as_of_us) for c in known]
    return [c.user_id for c in known], state_UD, until_us


def weeks_back_us(until_us: int, as_of_us: int) -> int:
    """The move by whole weeks after which a history that ends at until_us ends at or before, and near, as_of_us."""
    return (as_of_us - until_us) // _WEEK_US * _WEEK_US


def moved(context: Context, by_us: int) -> Context:
    """A context with all its times moved."""
    return replace(
        context,
        timestamp_us=None if context.timestamp_us is None else context.timestamp_us + by_us,
        session_events=tuple(replace(e, timestamp_us=e.timestamp_us + by_us) for e in context.session_events),
    )


def _difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max(initial=0.0))
