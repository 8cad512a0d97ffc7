"""The dot product's kernel against the formula in float64."""

import pytest
import torch

from model.errors import ShapeError

pytest.importorskip("triton", reason="Triton is not installed")
from model.kernels.dot_score_triton import dot_scores, dot_scores_reference
from tests.model.kernels.test_interaction_score import DEVICE, FP8, INT8, draw_items


@pytest.mark.parametrize(
    ("count", "requests", "width", "dtype"),
    [
        (130, 1, 64, torch.bfloat16), (5, 17, 20, torch.bfloat16), (300, 3, 256, INT8), (129, 2, 100, FP8),
        (1, 1, 8, INT8),
    ],
)  # fmt: skip
def test_scores_are_those_of_the_formula(count: int, requests: int, width: int, dtype: torch.dtype) -> None:
    """Users keep 16 bits of mantissa: a score is within 2**-16 of the sum of its terms' sizes."""
    items = draw_items(count, width, 3, dtype)
    user_BE = torch.randn(requests, width, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    score_BTN = torch.full((requests, 1, count), torch.nan, device=DEVICE)
    dot_scores(user_BE, items, score_BTN, torch.tensor([count], dtype=torch.int32, device=DEVICE))
    wanted_BTN = dot_scores_reference(user_BE, items)
    size_BTN = dot_scores_reference(user_BE.abs(), _sizes(items))
    assert ((score_BTN.double() - wanted_BTN).abs() <= size_BTN * 2**-16).all()


def _sizes(items):  # type: ignore[no-untyped-def]
    return type(items)(items.embedding_NE.float().abs(), items.scalar_NS, items.scale_N)


def test_items_past_the_count_are_left_alone() -> None:
    items = draw_items(200, 64, 0, torch.bfloat16)
    user_BE = torch.randn(1, 64).to(DEVICE)
    whole, part = (torch.full((1, 1, 200), torch.nan, device=DEVICE) for _ in range(2))
    dot_scores(user_BE, items, whole, torch.tensor([200], dtype=torch.int32, device=DEVICE))
    dot_scores(user_BE, items, part, torch.tensor([131], dtype=torch.int32, device=DEVICE))
    assert torch.equal(part[..., :131], whole[..., :131])
    assert part[..., 131:].isnan().all()


def test_other_rows_are_refused() -> None:
    items = draw_items(4, 64, 0, torch.bfloat16)
    out, count = torch.zeros(1, 1, 4, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ShapeError, match="as wide as they, 64, got"):
        dot_scores(torch.zeros(1, 32, device=DEVICE), items, out, count)
    with pytest.raises(ShapeError, match=r"got torch\.float32"):
        dot_scores(torch.zeros(1, 64, device=DEVICE), _sizes(items), out, count)
