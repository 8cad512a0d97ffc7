"""The guard: each check has a row that only that check refuses, and a test that fails when the check is gone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from feature_repo import layout
from model.errors import StateMismatch, StoreUnavailable
from model.records import UserState
from online import guard
from online.guard import Answer, Limits, Reason
from online.residents import ResidentSet, Role
from tests.online.conftest import World
from tests.online.helpers import HOUR_US, NOW_US, residents_of, row_bytes, stored_state

LIMITS = Limits(NOW_US, max_state_age_us=30 * HOUR_US)


@pytest.fixture(scope="module")
def pair(built_world: World) -> ResidentSet:
    """b serves, a served before."""
    loaded = built_world.oracle.releases
    return residents_of(2, serving=loaded[built_world.b.release_id], previous=loaded[built_world.a.release_id])


def values_of(residents: ResidentSet, *states: UserState) -> list[bytes | None]:
    stored: dict[bytes, bytes] = {}
    for state in states:
        stored |= row_bytes(state)
    return [stored.get(field) for field in residents.fields]


def test_a_matching_row_is_exact(pair: ResidentSet) -> None:
    state = stored_state(7, pair.serving.state_version)
    verdict = guard.decide(values_of(pair, state), pair, LIMITS, strict=True)
    assert (verdict.resident, verdict.answer, verdict.reason) == (pair.serving, Answer.EXACT, "")
    assert verdict.state is not None
    np.testing.assert_array_equal(verdict.state.state_D, state.state_D)
    assert verdict.state.history_until_us == state.history_until_us


Damage = Callable[[ResidentSet], list[bytes | None]]


def _change(**changes: object) -> Damage:
    def damage(residents: ResidentSet) -> list[bytes | None]:
        view = residents.serving.view
        state = replace(stored_state(7, view.state_version), **changes)  # type: ignore[arg-type]
        stored = row_bytes(state, view.state_version)
        return [stored.get(field) for field in residents.fields]

    return damage


def _edit(field: int, edit: Callable[[bytes], bytes | None]) -> Damage:
    def damage(residents: ResidentSet) -> list[bytes | None]:
        values = values_of(residents, stored_state(7, residents.serving.state_version))
        value = values[field]
        assert value is not None
        values[field] = edit(value)
        return values

    return damage


def _with_nan(width: int = 16) -> np.ndarray:
    state = np.ones(width, np.float32)
    state[3] = np.nan
    return state


DAMAGED: list[tuple[str, Damage]] = [
    (Reason.UNKNOWN_USER, lambda residents: [None] * len(residents.fields)),
    (Reason.VERSION_MISMATCH, _change(state_version="0123456789abcdef")),
    (Reason.WRONG_LENGTH, _change(state_D=np.ones(15, np.float32))),
    (Reason.WRONG_LENGTH, _change(state_D=np.ones(17, np.float32))),
    (Reason.NON_FINITE, _change(state_D=_with_nan())),
    (Reason.NON_FINITE, _change(state_D=np.full(16, np.inf, np.float32))),
    (Reason.TORN_ROW, _change(history_until_us=NOW_US)),  # after its own as-of time
    (Reason.TORN_ROW, _edit(4, lambda _: layout.encode_timestamp(1_500_000_000))),  # another run's event time
    (Reason.FROM_FUTURE, _change(encoded_at_us=NOW_US + HOUR_US)),
    (Reason.TOO_OLD, _change(encoded_at_us=NOW_US - 31 * HOUR_US, history_until_us=NOW_US - 40 * HOUR_US)),
    *((Reason.TORN_ROW, _edit(field, lambda value: value[:-1])) for field in range(5)),
    *((Reason.MISSING_FIELD, _edit(field, lambda value: None)) for field in range(5)),
    (Reason.TORN_ROW, _edit(0, lambda value: b"")),
    (Reason.TORN_ROW, _edit(0, lambda value: layout.encode_int64(7))),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGED, ids=[f"{n}-{r}" for n, (r, _) in enumerate(DAMAGED)])
def test_a_damaged_row_is_refused_by_name(pair: ResidentSet, reason: str, damage: Damage) -> None:
    values = damage(pair)
    verdict = guard.decide(values, pair, LIMITS, strict=False)
    assert (verdict.answer, verdict.reason, verdict.state) == (Answer.COLD_START, reason, None)
    assert verdict.resident is pair.serving
    with pytest.raises(StateMismatch, match=reason):
        guard.decide(values, pair, LIMITS, strict=True)


@pytest.mark.parametrize("gone", range(len(guard.CHECKS)), ids=[check.__name__ for _, check in guard.CHECKS])
def test_each_check_is_needed(pair: ResidentSet, monkeypatch: pytest.MonkeyPatch, gone: int) -> None:
    """Without any one of the checks some damaged row passes as exact."""
    monkeypatch.setattr(guard, "CHECKS", tuple(check for n, check in enumerate(guard.CHECKS) if n != gone))
    answers = [guard.decide(damage(pair), pair, LIMITS, strict=False).answer for _, damage in DAMAGED]
    assert Answer.EXACT in answers


def test_the_check_for_missing_fields_is_needed(pair: ResidentSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "is_whole", lambda values: True)
    found = [guard.decide(damage(pair), pair, LIMITS, strict=False).reason for _, damage in DAMAGED]
    assert found != [reason for reason, _ in DAMAGED]


def test_strict_decoding_is_needed(pair: ResidentSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that makes the best of damaged bytes lets a torn row through."""
    whole = layout.decode_row(values_of(pair, stored_state(7, pair.serving.state_version))[:5])
    monkeypatch.setattr(layout, "decode_row", lambda values, codec: whole)
    answers = [guard.decide(damage(pair), pair, LIMITS, strict=False).answer for _, damage in DAMAGED]
    assert Answer.EXACT in answers


# Which release may answer


def test_the_previous_release_answers_only_a_caller_that_accepts_it(pair: ResidentSet) -> None:
    previous = pair.residents[1]
    assert previous.role is Role.PREVIOUS
    values = values_of(pair, stored_state(7, previous.state_version))

    verdict = guard.decide(values, pair, LIMITS, strict=False)
    assert (verdict.resident, verdict.answer, verdict.reason) == (pair.serving, Answer.COLD_START, "unknown_user")

    verdict = guard.decide(values, pair, LIMITS, strict=True, accept_previous=True)
    assert (verdict.resident, verdict.answer) == (previous, Answer.PREVIOUS_RELEASE)
    assert verdict.reason == Reason.UNKNOWN_USER  # of the serving release

    wanted = previous.embedding_version
    verdict = guard.decide(values, pair, LIMITS, strict=True, expected_embedding_version=wanted)
    assert (verdict.resident, verdict.answer) == (previous, Answer.PREVIOUS_RELEASE)
    assert verdict.reason == Reason.NOT_SERVING


def test_accepting_the_previous_release_prefers_the_serving_one(pair: ResidentSet) -> None:
    values = values_of(pair, *(stored_state(7, r.state_version) for r in pair.residents))
    verdict = guard.decide(values, pair, LIMITS, strict=True, accept_previous=True)
    assert (verdict.resident, verdict.answer) == (pair.serving, Answer.EXACT)


def test_a_cold_start_too_comes_from_the_expected_version(pair: ResidentSet) -> None:
    previous = pair.residents[1]
    values = values_of(pair, stored_state(7, pair.serving.state_version))
    wanted = previous.embedding_version
    verdict = guard.decide(values, pair, LIMITS, strict=False, expected_embedding_version=wanted)
    assert (verdict.resident, verdict.answer) == (previous, Answer.COLD_START)


@pytest.mark.parametrize("strict", [False, True])
def test_an_embedding_version_nobody_has_is_refused(pair: ResidentSet, strict: bool) -> None:
    values = values_of(pair, stored_state(7, pair.serving.state_version))
    with pytest.raises(StateMismatch, match="f" * 16):
        guard.decide(values, pair, LIMITS, strict=strict, expected_embedding_version="f" * 16)


def test_a_prepared_release_answers_only_to_its_own_version(built_world: World) -> None:
    loaded = built_world.oracle.releases
    residents = residents_of(1, serving=loaded[built_world.a.release_id], prepared=loaded[built_world.b.release_id])
    prepared = residents.residents[1]
    values = values_of(residents, stored_state(7, prepared.state_version))
    assert guard.decide(values, residents, LIMITS, strict=False, accept_previous=True).answer is Answer.COLD_START
    verdict = guard.decide(
        values, residents, LIMITS, strict=True, expected_embedding_version=prepared.embedding_version
    )
    assert verdict.resident is prepared


def test_a_store_that_is_away_is_a_cold_start_or_unavailable(pair: ResidentSet) -> None:
    verdict = guard.decide(None, pair, LIMITS, strict=False)
    assert (verdict.answer, verdict.reason) == (Answer.COLD_START, Reason.STORE_UNAVAILABLE)
    with pytest.raises(StoreUnavailable):
        guard.decide(None, pair, LIMITS, strict=True)


def test_releases_of_one_state_version_read_one_view(built_world: World) -> None:
    """A head-only retrain: the row serves both heads."""
    loaded = built_world.oracle.releases
    residents = residents_of(3, serving=loaded[built_world.h.release_id], previous=loaded[built_world.a.release_id])
    assert built_world.h.state_version == built_world.a.state_version
    assert len(residents.fields) == layout.ROW_LENGTH
    values: Sequence[bytes | None] = values_of(residents, stored_state(7, built_world.a.state_version))
    assert guard.decide(values, residents, LIMITS, strict=True).resident.release_id == built_world.h.release_id
    verdict = guard.decide(
        values, residents, LIMITS, strict=True, expected_embedding_version=built_world.a.embedding_version
    )
    assert verdict.resident.release_id == built_world.a.release_id
