"""The encoder's benchmark: its floors by hand, and from end to end on tiny shapes."""

import numpy as np
import pytest

from benchmarks.encoder_speed import SIZES, lengths, main


def test_lengths_and_floors_are_those_of_the_recorded_baselines() -> None:
    length_U = lengths(1024, 2048)
    assert int(length_U.sum()) == 477_964
    assert [size.floor_ms(length_U) for size in SIZES] == pytest.approx([4.91, 34.8], rel=0.02)


def test_a_floor_by_hand() -> None:
    """4 layers; 3 tokens, 24 x 256^2 each; pairs 3 + 1, 4 x 256 each."""
    flops = 4 * (24 * 256**2 * 3 + 4 * 256 * 4)
    assert SIZES[0].floor_ms(np.array([2, 1])) == pytest.approx(1e3 * flops / 793e12)


def test_all_of_it_on_tiny_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "encoder.d64_L2.users_per_s " in out
    assert "length-bucketed, padded" in out
