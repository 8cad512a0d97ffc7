"""Codecs of stored states: bytes worked out by hand, what is lost, and what must never look like a number."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from model.config import TowerConfig
from model.errors import ConfigError
from model.state_codec import StateCodec, as_stored

HALF = StateCodec("float16")
BYTE = StateCodec("int8")


def state(*numbers: float) -> np.ndarray:
    return np.array([numbers], np.float32)


def test_the_bytes_of_float16() -> None:
    # 1 = 0x3c00, -2 = 0xc000, 0.1 lies between 0x2e66 and 0x2e67, nearer to the first
    assert HALF.encode(state(1.0, -2.0, 0.1)).tobytes() == bytes.fromhex("003c00c0662e")
    assert HALF.decode(bytes.fromhex("003c00c0662e")).tolist() == [1.0, -2.0, 0.0999755859375]


def test_the_bytes_of_int8() -> None:
    # largest 2.54, so a step of 0.02: 1.0 is 50 steps, -2.54 is -127, 0.011 rounds to 1, 0.009 to 0
    stored = BYTE.encode(state(1.0, -2.54, 0.011, 0.009)).tobytes()
    assert len(stored) == 4 + 4
    assert struct.unpack("<f", stored[:4])[0] == pytest.approx(0.02, rel=1e-6)
    assert list(struct.unpack("4b", stored[4:])) == [50, -127, 1, 0]
    np.testing.assert_allclose(BYTE.decode(stored), [1.0, -2.54, 0.02, 0.0], atol=1e-6)


def test_every_token_of_int8_has_its_own_scale() -> None:
    two = StateCodec("int8", tokens=2)
    stored = two.encode(state(127.0, 63.0, 0.0127, -0.0001)).tobytes()
    assert struct.unpack("<2f", stored[:8]) == pytest.approx((1.0, 0.0001))
    assert list(struct.unpack("4b", stored[8:])) == [127, 63, 127, -1]
    np.testing.assert_allclose(two.decode(stored), [127.0, 63.0, 0.0127, -0.0001], rtol=1e-5)
    assert BYTE.decode(BYTE.encode(state(127.0, 63.0, 0.0127, -0.0001)).tobytes()).tolist() == [127.0, 63.0, 0.0, 0.0]


def test_a_state_of_zeros_stays_one() -> None:
    for codec in (HALF, BYTE, StateCodec("int8", tokens=2)):
        assert as_stored(codec, np.zeros((2, 4), np.float32)).tolist() == [[0.0] * 4] * 2
    mixed = as_stored(StateCodec("int8", tokens=2), state(0.0, 0.0, 127.0, -1.0))
    assert mixed.tolist() == [[0.0, 0.0, 127.0, -1.0]]
    assert as_stored(BYTE, state(1e-45, 0.0)).tolist() == [[0.0, 0.0]]  # too small for a scale


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", [HALF, BYTE, StateCodec("int8", tokens=2)])
def test_what_is_not_finite_never_becomes_finite(codec: StateCodec, bad: float) -> None:
    stored = as_stored(codec, np.array([[bad, 1, 2, 3], [1, 2, 3, 4]], np.float32))
    assert np.isfinite(stored).all(1).tolist() == [False, True]


def test_a_number_too_large_for_float16_is_not_finite_there() -> None:
    assert np.isinf(as_stored(HALF, state(65_520.0, 1.0))[0, 0])
    assert as_stored(HALF, state(65_504.0)).tolist() == [[65_504.0]]
    assert as_stored(BYTE, state(65_520.0))[0, 0] == pytest.approx(65_520.0)


@pytest.mark.parametrize("codec", [HALF, BYTE, StateCodec("int8", tokens=4)])
def test_rounding_bounds_what_is_lost_and_is_reached(codec: StateCodec) -> None:
    states = np.random.default_rng(0).normal(0, 3, (500, 64)).astype(np.float32)
    states[0] *= 1e-6  # below the normal numbers of float16
    lost = np.abs(as_stored(codec, states) - states).max(1)
    assert (lost <= codec.rounding(states) * 1.001).all()
    assert (lost > codec.rounding(states) * 0.3).mean() > 0.9


def test_many_states_are_stored_as_one_by_one() -> None:
    states = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    for codec in (HALF, BYTE, StateCodec("int8", tokens=3)):
        stored = codec.encode(states)
        assert [row.tobytes() for row in stored] == [codec.encode(one[None]).tobytes() for one in states]
        np.testing.assert_array_equal(codec.decode_rows(stored), [codec.decode(row.tobytes()) for row in stored])


def test_bytes_of_no_state_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes a number, got 5"):
        HALF.decode(bytes(5))
    with pytest.raises(ValueError, match="got 3 bytes"):
        BYTE.decode(bytes(3))
    with pytest.raises(ValueError, match=r"of 2 tokens .* got 11 bytes"):
        StateCodec("int8", tokens=2).decode(bytes(11))


def test_float32_needs_no_codec() -> None:
    assert StateCodec.of(TowerConfig()) is None
    numbers = state(1.5, 2.5)
    assert as_stored(None, numbers) is numbers
    assert StateCodec.of(replace(TowerConfig(), storage_codec="int8", state_tokens=3)) == StateCodec("int8", 3)
    with pytest.raises(ConfigError, match="float32, float16 or int8, got 'int4'"):
        TowerConfig(storage_codec="int4")
    with pytest.raises(ConfigError, match="state_tokens must be at least 1"):
        TowerConfig(state_tokens=0)
    assert TowerConfig(d_model=32, state_tokens=4).state_width == 128
