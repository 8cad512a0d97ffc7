"""Histories become states: which users share an encoder call, and who is to blame when a call fails.

Legend: U users, A active users, T events, D state width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.state_codec import StateCodec, as_stored
from pipelines.transforms.merge_tail import Histories, Index

PADDING_WASTE = 1.15
"""A batch is cut before its padded size exceeds this multiple of its events."""
SMALL_BATCH_TOKENS = 2048
"""A batch of at most so many padded events is not cut for waste: the call itself costs more than the padding."""
_DETAIL_CHARACTERS = 300

Encode = Callable[[pa.Table, Index], NDArray[np.float32]]
"""(events of some users, offsets) -> states f32 [U, D]; Release.encode is one."""


@dataclass(frozen=True, slots=True)
class Dead:
    """A user the encoder gave no usable state."""

    user: int
    reason: str
    """poison | non_finite_state."""
    detail: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of the active users."""

    users: Index
    """[A]: ranks of the users with a state, ascending."""
    state_AD: NDArray[np.float32]
    dead: list[Dead]


def plan_batches(
    lengths: Index, max_tokens: int, waste: float = PADDING_WASTE, small_tokens: int = SMALL_BATCH_TOKENS
) -> list[Index]:
    """Positions of `lengths` in batches: sorted by length, cut where padding would exceed `waste` x the events.

    lengths: i64 [A], each 1 or more. max_tokens: most users x longest history of a batch; a single longer history is
    a batch of its own. small_tokens: padded size up to which waste is no reason to cut. Every position is in one batch.
    """
    ascending = np.argsort(lengths, kind="stable")
    batches: list[Index] = []
    start, real = 0, 0
    for end, length in enumerate(lengths[ascending].tolist()):
        padded = (end - start + 1) * length
        if end > start and (padded > max(waste * (real + length), small_tokens) or padded > max_tokens):
            batches.append(ascending[start:end])
            start, real = end, 0
        real += length
    if start < len(lengths):
        batches.append(ascending[start:])
    return batches


def encode_users(
    histories: Histories,
    active: Index,
    encode: Encode,
    max_tokens: int,
    width: int,
    codec: StateCodec | None = None,
) -> Encoded:
    """States of the active users. One poison user costs its batch a few more calls, never its neighbours' states.

    active: ranks of users in `histories`. width: D. A call that fails is halved until single users are left that
    fail alone: they are dead, with the error as detail; so are users whose state is not finite once stored.
    """
    lengths = histories.offsets[active + 1] - histories.offsets[active]
    batches = plan_batches(lengths, max_tokens)
    state_AD = np.empty((len(active), width), np.float32)
    alive = np.zeros(len(active), np.bool_)
    dead: list[Dead] = []
    sorted_events = histories.events.take(
        pa.array(histories.rows_of(active[np.concatenate(batches)] if batches else active))
    ).combine_chunks()
    first_row = 0
    for batch in batches:
        offsets = np.concatenate([[0], np.cumsum(lengths[batch])])
        events = sorted_events.slice(first_row, int(offsets[-1]))
        first_row += int(offsets[-1])
        for part, states, error in _bisected(encode, events, offsets):
            users = batch[part]
            if states is None:
                dead.append(Dead(int(active[users[0]]), "poison", _describe(error)))
                continue
            finite = np.isfinite(as_stored(codec, states)).all(axis=1)
            state_AD[users], alive[users] = states, finite
            dead.extend(Dead(user, "non_finite_state", _non_finite(codec)) for user in active[users[~finite]].tolist())
    return Encoded(active[alive], state_AD[alive], sorted(dead, key=lambda d: d.user))


def _bisected(
    encode: Encode, events: pa.Table, offsets: Index
) -> list[tuple[slice, NDArray[np.float32] | None, Exception | None]]:
    """(users, states, None) of calls that went well and (one user, None, error) of those that fail alone."""
    done: list[tuple[slice, NDArray[np.float32] | None, Exception | None]] = []
    waiting = [slice(0, len(offsets) - 1)]
    while waiting:
        part = waiting.pop()
        low, high = int(offsets[part.start]), int(offsets[part.stop])
        try:
            states = encode(events.slice(low, high - low), offsets[part.start : part.stop + 1] - low)
        except Exception as error:
            if part.stop - part.start == 1:
                done.append((part, None, error))
            else:
                middle = (part.start + part.stop) // 2
                waiting += [slice(middle, part.stop), slice(part.start, middle)]
        else:
            done.append((part, states, None))
    return done


def _non_finite(codec: StateCodec | None) -> str:
    return "the state holds NaN or infinity" + ("" if codec is None else f" once stored as {codec.name}")


def _describe(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:_DETAIL_CHARACTERS]
