"""The stack's benchmark from end to end on tiny shapes, and what its loss curves are made of."""

import pytest
import torch

from benchmarks.dcat_stack import QUICK_TRAINING, check_gradients, check_small, examples, main


def test_both_passes_are_the_undivided_stack_in_float64() -> None:
    assert check_small() < 1e-11


def test_deduplicated_and_recomputed_steps_have_the_naive_ones_gradients() -> None:
    assert check_gradients() < 1e-11


def test_examples_are_told_by_the_kinds_of_their_history() -> None:
    history_RS, candidate_RC, told_T = examples(QUICK_TRAINING, 64, torch.device("cpu"), 1)[0]
    assert history_RS.shape == (4, 12)
    assert candidate_RC.shape == (4, 4)
    assert set(told_T.tolist()) <= {0.0, 1.0}
    assert int(history_RS.max()) < 64


@pytest.mark.filterwarnings("ignore:Torchinductor")
def test_all_of_it_on_tiny_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    for measure in ("over_flash_self_attention", "over_sdpa_prefill", "fp8_over_sdpa_prefill", "fp8_over_fp8_prefill"):
        assert f"dcat.stack.{measure} " in out
    assert "dcat.train_step.over_naive " in out
