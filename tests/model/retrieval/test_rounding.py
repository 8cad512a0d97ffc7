"""Rows rounded for the users that ask: scores of such users are off by less, in no more bytes."""

import pytest
import torch

from model.errors import ShapeError
from model.retrieval.index import LiveIndex
from model.retrieval.rounding import LARGEST_CODE, coded, feedback, sensitivity
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import DotScorer, InteractionScorer

E = 32


def make_users(count: int, seed: int) -> torch.Tensor:
    """Users that lie mostly in 6 directions, of length 1."""
    direction_DE = torch.randn(6, E, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    user_UE = torch.randn(count, 6, generator=random) @ direction_DE + 0.3 * torch.randn(count, E, generator=random)
    return torch.nn.functional.normalize(user_UE, dim=1)


def make_items(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, E, generator=torch.Generator().manual_seed(3)), dim=1)


def make_rows(items: torch.Tensor) -> ItemRows:
    return ItemRows.build("v", Layout(embedding_dim=E), list(range(len(items))), items)


def off(code_RE: torch.Tensor, scale_R: torch.Tensor, items: torch.Tensor, users: torch.Tensor) -> float:
    """Root mean square error of the users' scores."""
    return float((users @ (code_RE.float() * scale_R[:, None] - items).T).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_other_users_of_the_same_kind_are_off_by_less_than_half(dtype: torch.dtype) -> None:
    items, others = make_items(400), make_users(100, 8)
    made_EE = feedback(sensitivity(DotScorer(), make_users(200, 7), items))
    near, fed = coded(items, dtype), coded(items, dtype, made_EE)
    assert torch.equal(near[1], fed[1])
    assert fed[0].dtype == dtype
    assert fed[0].float().abs().max() <= LARGEST_CODE[dtype]
    assert off(*fed, items, others) < 0.5 * off(*near, items, others)


def test_a_value_makes_up_for_the_one_before_by_hand() -> None:
    """Users along (1, 1): .4 too little in the first value is .4 more for the second; 127 fixes the scale at 1.

    Nearest: 10.4 and 20.3 become 10 and 20, off by .7 along (1, 1); made up: 20.3 + .4 = 20.7, so 21, off by .3.
    """
    made_EE = feedback(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert made_EE[0, 1] == pytest.approx(-1, abs=0.02)
    row = torch.tensor([[10.4, 20.3, 127.0]])
    assert coded(row, torch.int8)[0].tolist() == [[10, 20, 127]]
    assert coded(row, torch.int8, made_EE)[0].tolist() == [[10, 21, 127]]


def test_the_gradient_of_a_dot_product_is_the_user() -> None:
    users = make_users(50, 1)
    wanted = users.double().T @ users.double() / 50
    assert torch.allclose(sensitivity(DotScorer(), users, make_items(30)), wanted, atol=1e-6)


def test_gradients_of_an_mlp_are_taken_where_items_lie() -> None:
    """Directions that no weight reads get none."""
    torch.manual_seed(0)
    scorer = InteractionScorer(E, 2, hidden=(16, 8))
    with torch.no_grad():
        scorer.weight_IH.view(-1, 16)[E : 2 * E][4:] = 0
        scorer.weight_IH[2 * E : 3 * E][4:] = 0
    features = torch.cat([make_items(40), torch.rand(40, 2)], 1)
    made_EE = sensitivity(scorer, make_users(20, 1), features)
    assert made_EE[4:].abs().max() == 0
    assert made_EE[:4, :4].diagonal().sum() == pytest.approx(1)


def test_gradients_are_of_the_items_a_user_gets() -> None:
    """Half of the items are better, by their first value; the rest are read by their second."""

    def steep(user_UE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        score_N = torch.where(feature_NF[:, 0] > 0.5, 10 * feature_NF[:, 0], feature_NF[:, 1])
        return score_N.expand(len(user_UE), 1, -1)

    features = torch.rand(3000, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sensitivity(steep, torch.ones(3, 2), features), torch.diag(torch.tensor([1.0, 0.0])).double())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_an_index_rounds_its_rows_for_its_users(dtype: torch.dtype) -> None:
    items, users = make_items(3000), make_users(20, 9)
    wanted = (users @ items.T).topk(100, dim=1).indices

    def share(sample: torch.Tensor | None) -> tuple[float, LiveIndex]:
        index = LiveIndex(make_rows(items), DotScorer(), dtype=dtype, users=sample)
        row_BK = index.search(users, [Request()] * 20, Plan(k=100), "v").row_BK
        pairs = zip(row_BK.tolist(), wanted.tolist(), strict=True)
        return sum(len(set(found) & set(best)) for found, best in pairs) / 2000, index

    near, fed = share(None)[0], share(make_users(200, 7))
    assert 1 - fed[0] < 0.7 * (1 - near)
    made = fed[1].copy_of_rows([5]).feature_RF
    fed[1].upsert(make_rows(torch.cat([items, items[:2000] * 1.5])))  # grows
    assert torch.equal(fed[1].copy_of_rows([5]).feature_RF, made)
    assert torch.allclose(fed[1].copy_of_rows([3005]).feature_RF, made * 1.5), "new rows are rounded alike"


def test_users_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[U, 32\]"):
        LiveIndex(make_rows(make_items(5)), DotScorer(), dtype=torch.int8, users=torch.zeros(3, 8))
