"""The folded MLP is the MLP as written."""

import numpy as np
import pytest
import torch

from model.errors import ShapeError
from model.retrieval import reference, scorer
from model.retrieval.scorer import DotScorer, InteractionScorer
from tests.model.retrieval.builders import make_rows


@pytest.mark.parametrize("dot_scale", [None, 3.0])
@pytest.mark.parametrize("tasks", [1, 3])
def test_folded_equals_unfolded_equals_reference(
    tasks: int, dot_scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = make_rows(rng, 50)
    module = InteractionScorer(4, 2, (8, 5), tasks, dot_scale=dot_scale).double()
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


def test_a_zero_mlp_leaves_the_dot_product() -> None:
    """1 / (1 + exp(-0.5 [1, 2].[1, 3])) = 1 / (1 + exp(-3.5))."""
    module = InteractionScorer(2, 1, (3, 2), dot_scale=0.5)
    with torch.no_grad():
        module.out.weight.zero_()
        module.out.bias.zero_()
        score = module(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0, 9.0]]))
    assert float(score) == pytest.approx(1 / (1 + np.exp(-3.5)))


def test_items_of_each_user_score_as_in_a_catalogue_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = InteractionScorer(4, 2, (8, 5), 2, dot_scale=1.5).double()
    user_BE = torch.randn(3, 4, dtype=torch.float64)
    feature_BNF = torch.randn(3, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        found = module.logits(user_BE, feature_BNF)
        alone = torch.cat([module.logits(user_BE[b : b + 1], feature_BNF[b]) for b in range(3)])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
        monkeypatch.setitem(scorer.MAX_HIDDEN_BYTES, "cpu", 3 * 8 * 8 * 2)  # 2 items at a time
        torch.testing.assert_close(module.logits(user_BE, feature_BNF), alone, rtol=0, atol=1e-12)
    with pytest.raises(ShapeError, match="items of 2 users must come in as many rows, got 3"):
        module.logits(user_BE[:2], feature_BNF)


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
