"""The benchmark's floors and shapes by hand; its logic from end to end on tiny shapes, kernels interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.dcat import Problem, Row, all_rows, error_of, median_ms, merge_self, uniform

ROOT = Path(__file__).parents[2]


def test_floors_are_those_of_the_recorded_baselines() -> None:
    """Milliseconds, as measured ceilings gave them: 793 TFLOP/s and 3.02 TB/s."""
    rows = {row.name: row for row in all_rows()}
    assert rows["S512_C128_R32_H8_D64"].floor_ms() == pytest.approx(0.0167, abs=5e-5)  # by bytes
    assert rows["S16384_C1024_R8_H4_D128"].floor_ms() == pytest.approx(0.347, abs=5e-4)  # by products
    assert rows["S16384_C128_R1_H8_D64"].floor_ms() == pytest.approx(0.0113, abs=5e-5)
    assert rows["ragged"].floor_ms() == pytest.approx(0.188, abs=5e-4)
    assert rows["S2048_C512_R16_H8_D64"].floor_ms(is_training=True) == pytest.approx(0.152, abs=5e-4)


def test_a_floor_by_hand() -> None:
    """2 requests of 3 candidates, 5 events: 36 pairs of 2 heads of 4 channels; bytes are what takes longest."""
    row = uniform(5, 3, 2, 2, 4, None)
    events, own = 2 * (2 * 5) * 16, 6 * 16
    assert row.floor_ms() == pytest.approx(1e3 * (events + 4 * own) / 3.02e12)
    assert row.floor_ms(is_training=True) == pytest.approx(1e3 * (3 * events + 13 * own) / 3.02e12)


def test_merging_the_own_token_by_hand() -> None:
    """A history whose denominator is 3 read 1; the own token, of score 0, has value 5: (3 x 1 + 5) / 4."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    out, lse = merge_self(one, torch.tensor([3.0]).log(), zero, zero, 5 * one, 1.0)
    torch.testing.assert_close(out, torch.tensor([[2.0]]))
    torch.testing.assert_close(lse, torch.tensor([4.0]).log())


def test_an_error_that_is_not_finite_does_not_pass() -> None:
    problem = Problem.draw(Row((3, 0, 2), (4, 1, 6), 2, 32, None), torch.device("cpu"))
    assert error_of(problem, [torch.full_like(problem.tensors[0], float("nan"))]) == float("inf")


def test_a_step_takes_time() -> None:
    assert median_ms(lambda: torch.ones(1000).sum(), torch.device("cpu")) > 0


def test_all_of_it_on_tiny_shapes() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "benchmarks.dcat", "--device", "cpu", "--quick", "--backward"]
    run = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "train ragged" in run.stdout
    assert "cuDNN, merged" in run.stdout
    assert "Error" not in run.stdout.replace("NotImplementedError: FlexAttention does not support backward on CPU", "")
