"""Which release answers a row, and why. Pure: values in, verdict out.

A stored state may be read only by a head that was made for it. The head cannot tell: a vector of another version has
the same shape and gives a plausible, wrong embedding. So every row is checked against the view it was read from before
it comes near a head, by separate checks that each have a name, a test that fails without it, and a reason that the
reply carries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from feature_repo import layout
from model.errors import StateMismatch, StoreUnavailable
from model.records import UserState
from online.items import ServedItems
from online.residents import Crossing, Resident, ResidentSet, Role, View

MAX_CLOCK_SKEW_US = 300_000_000
"""How far the clock of the batch job may be ahead of ours."""

Values = Sequence[bytes | None]


class Answer(Enum):
    """How an embedding was made; the numbers of `hybridtower.v1.Answer`."""

    EXACT = 1
    PREVIOUS_RELEASE = 2
    COLD_START = 3
    BRIDGED = 4


class Reason:
    """Why the serving release's stored state was not used. Part of the wire contract (tower.proto, EmbedReply)."""

    NONE = ""
    UNKNOWN_USER = "unknown_user"
    MISSING_FIELD = "missing_field"
    TORN_ROW = "torn_row"
    VERSION_MISMATCH = "version_mismatch"
    WRONG_LENGTH = "wrong_length"
    NON_FINITE = "non_finite"
    FROM_FUTURE = "from_future"
    TOO_OLD = "too_old"
    STORE_UNAVAILABLE = "store_unavailable"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a row is checked against besides its view."""

    now_us: int
    max_state_age_us: int | None = None
    """Oldest state that is used, counted from its encode's as-of time; None for any age."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which release answers, from which state."""

    resident: Resident
    answer: Answer
    state: UserState | None
    """None: the release's cold-start state."""
    reason: str


Row = layout.StateRow
Check = Callable[[Row, View, Limits], bool]


def carries_version(row: Row, view: View, limits: Limits) -> bool:
    """The row names the version of the view it was read from: no half-finished backfill, no mislabelled write."""
    return row.state_version == view.state_version


def has_width(row: Row, view: View, limits: Limits) -> bool:
    """The state has the release's width."""
    return row.state.shape == (view.width,)


def is_finite(row: Row, view: View, limits: Limits) -> bool:
    """No NaN, no infinity: one would spread over the whole embedding."""
    return row.is_finite()


def times_agree(row: Row, view: View, limits: Limits) -> bool:
    """The last event seen is not after the as-of time, and both as-of times are one: the parts are of one write."""
    return row.history_until_us <= row.encoded_at_us and row.event_timestamp_s == row.encoded_at_us // 1_000_000


def is_past(row: Row, view: View, limits: Limits) -> bool:
    """The row was written as of a time that has come."""
    return row.encoded_at_us <= limits.now_us + MAX_CLOCK_SKEW_US


def is_fresh(row: Row, view: View, limits: Limits) -> bool:
    """The state is not older than the server allows."""
    return limits.max_state_age_us is None or limits.now_us - row.encoded_at_us <= limits.max_state_age_us


CHECKS: tuple[tuple[str, Check], ...] = (
    (Reason.VERSION_MISMATCH, carries_version),
    (Reason.WRONG_LENGTH, has_width),
    (Reason.NON_FINITE, is_finite),
    (Reason.TORN_ROW, times_agree),
    (Reason.FROM_FUTURE, is_past),
    (Reason.TOO_OLD, is_fresh),
)
"""Applied in this order to a row that could be decoded; the first that fails gives the reason."""


def is_absent(values: Values) -> bool:
    """Nothing at all is stored."""
    return all(value is None for value in values)


def is_whole(values: Values) -> bool:
    """Every part is stored."""
    return all(value is not None for value in values)


def read_row(values: Values, view: View, limits: Limits) -> UserState | str:
    """The state in one view's values, or the reason why there is none to use.

    values: what HMGET gave for `layout.row_fields` of the view.
    """
    if not is_whole(values):
        return Reason.UNKNOWN_USER if is_absent(values) else Reason.MISSING_FIELD
    try:
        row = layout.decode_row(values, view.codec)
    except layout.LayoutError:
        return Reason.TORN_ROW
    if row is None:
        return Reason.UNKNOWN_USER
    for reason, holds in CHECKS:
        if not holds(row, view, limits):
            return reason
    return UserState(row.state, row.state_version, row.history_until_us, row.encoded_at_us)


def decide(
    values: Values | None,
    residents: ResidentSet,
    limits: Limits,
    *,
    strict: bool,
    expected_embedding_version: str = "",
    accept_previous: bool = False,
) -> Verdict:
    """Which release answers one request.

    values: a user's values for `residents.fields`; None where the store did not answer.
    Asked in turn are the releases that the caller accepts: the serving one, then (accept_previous) the one before, or
    only those of expected_embedding_version. The first that finds a usable state answers, the serving one also from
    another release's state over a bridge; else the first of them answers from its cold-start state. Under the strict
    policy neither bridge nor cold start will do.
    Raises StateMismatch (no release of the expected version; strict and no usable state) and StoreUnavailable (strict
    and no answer of the store).
    """
    candidates = residents.candidates(expected_embedding_version, accept_previous)
    if not candidates:
        there = ", ".join(sorted({r.embedding_version for r in residents.residents}))
        raise StateMismatch(
            f"no loaded release has the expected embedding_version {expected_embedding_version!r}; loaded: {there}"
        )
    why = ""
    if values is None:
        why = Reason.STORE_UNAVAILABLE
    else:
        for resident in candidates:
            view = resident.view
            found = read_row(values[view.start : view.stop], view, limits)
            if isinstance(found, str):
                why = why or found
                bridged = None if strict else _over_a_bridge(values, resident, limits)
                if bridged is not None:
                    return Verdict(resident, Answer.BRIDGED, bridged, found)
            elif resident.role is Role.SERVING:
                return Verdict(resident, Answer.EXACT, found, Reason.NONE)
            else:
                return Verdict(resident, Answer.PREVIOUS_RELEASE, found, why or Reason.NOT_SERVING)
    first = candidates[0]
    if strict:
        message = f"{why}: no usable state for release {first.release_id} (state_version {first.state_version})"
        raise StoreUnavailable(message) if values is None else StateMismatch(message)
    return Verdict(first, Answer.COLD_START, None, why)


def bridge_matches(crossing: Crossing, resident: Resident) -> bool:
    """The bridge leads from the version of the view that is read to the states that this release's head reads."""
    manifest = crossing.stored.manifest
    ends = (manifest.from_state_version, manifest.to_state_version)
    return ends == (crossing.view.state_version, resident.state_version)


def _over_a_bridge(values: Values, resident: Resident, limits: Limits) -> UserState | None:
    """A state of another release, checked as any row, as this release would about have made it; None without one."""
    for crossing in resident.crossings:
        view = crossing.view
        found = read_row(values[view.start : view.stop], view, limits)
        if isinstance(found, str) or not bridge_matches(crossing, resident):
            continue
        state_D = crossing.stored.bridge.apply(found.state_D[None])[0]
        if np.isfinite(state_D).all():
            return replace(found, state_D=state_D, state_version=resident.state_version)
    return None


def index_matches(resident: Resident, index: ServedItems) -> bool:
    """The index holds items of the space that the release's user embeddings live in."""
    return index.embedding_version == resident.embedding_version


def searchable(
    residents: ResidentSet, *, expected_embedding_version: str = "", accept_previous: bool = False
) -> ResidentSet:
    """The set with only those releases that the caller accepts and that have a matching index: `decide` picks among
    them. Raises StateMismatch where there is none."""
    accepted = residents.candidates(expected_embedding_version, accept_previous)
    matching = tuple(r for r in accepted if r.index is not None and index_matches(r, r.index))
    if not matching:
        wanted = expected_embedding_version or " or ".join(r.embedding_version for r in accepted)
        there = ", ".join(f"{r.embedding_version} ({r.role.value}, {_items(r.index)})" for r in residents.residents)
        raise StateMismatch(f"no items of embedding_version {wanted!r} to search; loaded: {there}")
    return replace(residents, residents=matching)


def _items(index: ServedItems | None) -> str:
    return "no items" if index is None else f"items of {index.embedding_version}"
