"""The folded MLP is the MLP as written."""

import numpy as np
import pytest
import torch

from model.errors import ShapeError
from model.retrieval import reference, scorer
from model.retrieval.scorer import DotScorer, InteractionScorer
from tests.model.retrieval.builders import make_rows


@pytest.mark.parametrize("tasks", [1, 3])
def test_folded_equals_unfolded_equals_reference(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = make_rows(rng, 50)
    module = InteractionScorer(4, 2, (8, 5), tasks).double()
    with torch.no_grad():
        module.bias_H.normal_()
    user_BE, feature_NF = torch.randn(3, 4, dtype=torch.float64), rows.feature_RF.double()
    with torch.no_grad():
        folded, unfolded = module(user_BE, feature_NF), module.unfolded(user_BE, feature_NF)
        monkeypatch.setitem(scorer.MAX_HIDDEN_BYTES, "cpu", 3 * 8 * 8 * 7)  # 7 items at a time
        in_parts = module(user_BE, feature_NF)
    assert folded.shape == (3, tasks, 50)
    torch.testing.assert_close(folded, unfolded, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_parts, unfolded, rtol=0, atol=1e-12)
    wanted = np.stack([reference.interaction_scores(rows, user.numpy(), module) for user in user_BE])
    np.testing.assert_allclose(folded.numpy(), wanted, rtol=0, atol=1e-12)


def test_folding_loses_nothing_in_float32() -> None:
    torch.manual_seed(0)
    module = InteractionScorer(64, 16)
    user_BE, feature_NF = torch.randn(2, 64), torch.randn(500, 80)
    with torch.no_grad():
        folded, unfolded = module(user_BE, feature_NF), module.unfolded(user_BE, feature_NF)
        exact = module.double()(user_BE.double(), feature_NF.double())
    off, plain = (folded - exact).abs().max(), (unfolded - exact).abs().max()
    assert off <= 2 * plain + 1e-7, (off, plain)


def test_the_dot_product_leaves_scalars_out() -> None:
    """[1, 2] . [3, 4] = 11; the scalar 100 counts for nothing."""
    score = DotScorer()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 100.0]]))
    assert score.tolist() == [[[11.0]]]


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="must be 4 and 6 wide, got 4 and 7"):
        InteractionScorer(4, 2)(torch.zeros(1, 4), torch.zeros(3, 7))
    with pytest.raises(ShapeError, match="at most 3 wide, got 4"):
        DotScorer()(torch.zeros(1, 4), torch.zeros(2, 3))
