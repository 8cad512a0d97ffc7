"""The folded MLP's kernels against the formula as written, in float64, every pair's inputs side by side."""

import pytest
import torch

from model.errors import ShapeError
from model.kernels.interaction_score import InteractionWeights, ItemFeatures, interaction_scores_reference

pytest.importorskip("triton", reason="Triton is not installed")
from model.kernels.dot_score_triton import dot_scores
from model.kernels.interaction_score_triton import interaction_scores_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP8 = torch.int8, torch.float8_e4m3fn


def draw_weights(
    width: int,
    scalars: int,
    hidden: int,
    second: int,
    tasks: int = 1,
    seed: int = 0,
    *,
    has_dot: bool = False,
    dtype: torch.dtype = torch.float16,
) -> InteractionWeights:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(DEVICE, dtype)

    return InteractionWeights(
        normal(3 * width + scalars, hidden, scale=width**-0.5, dtype=torch.bfloat16), normal(hidden, scale=0.1),
        normal(hidden, second, scale=hidden**-0.5, dtype=dtype), normal(second, scale=0.1),
        normal(tasks, second, scale=second**-0.5), normal(tasks),
        normal(tasks, scale=width**-0.5) if has_dot else None,
    )  # fmt: skip


def draw_items(count: int, width: int, scalars: int, dtype: torch.dtype, seed: int = 1) -> ItemFeatures:
    feature_NF = (
        torch.randn(count, width + scalars, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)
    )
    item_NE, scalar_NS = feature_NF[:, :width], feature_NF[:, width:]
    if dtype == torch.bfloat16:
        return ItemFeatures(item_NE, scalar_NS)
    scale_N = item_NE.float().abs().amax(1) / (127 if dtype == INT8 else 448)
    scaled_NE = item_NE.float() / scale_N[:, None]
    return ItemFeatures((scaled_NE.round() if dtype == INT8 else scaled_NE).to(dtype), scalar_NS, scale_N)


@pytest.mark.parametrize("has_dot", [False, True])
@pytest.mark.parametrize(
    ("count", "requests", "width", "scalars", "hidden", "second", "tasks", "dtype"),
    [
        (100, 2, 64, 16, 32, 16, 1, torch.bfloat16),
        (65, 3, 64, 5, 64, 32, 2, torch.bfloat16),
        (1, 1, 128, 0, 16, 16, 1, torch.bfloat16),
        (130, 2, 64, 16, 32, 16, 1, INT8),
        (70, 1, 128, 3, 32, 16, 2, FP8),
        (300, 1, 128, 10, 256, 128, 1, INT8),
        (300, 1, 128, 10, 256, 128, 1, FP8),
        (300, 1, 128, 10, 128, 64, 1, FP8),
    ],
)
def test_scores_are_those_of_the_formula(
    count: int,
    requests: int,
    width: int,
    scalars: int,
    hidden: int,
    second: int,
    tasks: int,
    dtype: torch.dtype,
    has_dot: bool,
) -> None:
    """Both layers' inputs are rounded to 8 bits of mantissa, so scores of spread 0.1 are within 0.005."""
    weights = draw_weights(width, scalars, hidden, second, tasks, has_dot=has_dot)
    items = draw_items(count, width, scalars, dtype)
    user_BE = torch.randn(requests, width, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wanted_BTN = interaction_scores_reference(user_BE, items, weights)
    score_BTN = torch.full((requests, tasks, count), torch.nan, device=DEVICE)
    interaction_scores_kernel(user_BE, items, weights, score_BTN=score_BTN)
    assert count == 1 or float(wanted_BTN.std()) > 0.02
    assert float((score_BTN - wanted_BTN).abs().max()) < 5e-3
    assert float((score_BTN - wanted_BTN).norm() / wanted_BTN.norm()) < 3e-3


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_scalars_are_not_rounded_again_beside_codes(dtype: torch.dtype) -> None:
    """Weights and scalars are exact in what the kernel multiplies: scores are off by float32 sums, not by a rounding.

    The row's embedding is read with no weight, so its scale, far from a power of two, is all that could do harm.
    """
    weights, items = draw_weights(64, 16, 16, 16), draw_items(60, 64, 16, dtype)
    weights.first_IH[: 3 * 64] = 0
    weights.first_IH[3 * 64 :] = torch.eye(16)
    weights.second_HG.copy_(torch.eye(16))
    weights.bias_H.zero_()
    user_BE = torch.ones(1, 64, device=DEVICE)
    score_BTN = torch.empty(1, 1, 60, device=DEVICE)
    interaction_scores_kernel(user_BE, items, weights, score_BTN=score_BTN)
    wanted_BTN = interaction_scores_reference(user_BE, items, weights)
    assert float((score_BTN - wanted_BTN).abs().max()) < 1e-5


def test_a_first_layer_in_float_16_errs_less_than_in_bfloat_16() -> None:
    """The first layer's values keep 11 bits instead of 8; what the folded weights are off by stays."""
    items = draw_items(100, 64, 16, torch.bfloat16)
    user_BE = torch.zeros(1, 64, device=DEVICE)  # folds to the item's own weights, exactly
    off = []
    for dtype in (torch.bfloat16, torch.float16):
        weights = draw_weights(64, 16, 64, 32, dtype=dtype)
        weights.second_HG.copy_(weights.second_HG.bfloat16())
        score_BTN = torch.empty(1, 1, 100, device=DEVICE)
        interaction_scores_kernel(user_BE, items, weights, score_BTN=score_BTN)
        off.append(float((score_BTN - interaction_scores_reference(user_BE, items, weights)).norm()))
    assert off[1] < off[0] / 4


def test_a_first_layer_past_float_16_stays_finite() -> None:
    weights, items = draw_weights(64, 4, 32, 16), draw_items(20, 64, 4, torch.bfloat16)
    weights.bias_H.fill_(1e6)
    score_BTN = torch.empty(1, 1, 20, device=DEVICE)
    interaction_scores_kernel(torch.ones(1, 64, device=DEVICE), items, weights, score_BTN=score_BTN)
    assert score_BTN.isfinite().all()


def test_only_the_items_there_are_are_scored() -> None:
    weights, items = draw_weights(64, 4, 32, 16), draw_items(100, 64, 4, torch.bfloat16)
    user_BE = torch.ones(2, 64, device=DEVICE)
    score_BTN = torch.full((2, 1, 100), torch.nan, device=DEVICE)
    count = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    interaction_scores_kernel(user_BE, items, weights, score_BTN=score_BTN, count=count)
    assert not score_BTN[:, :, :70].isnan().any()
    assert score_BTN[:, :, 70:].isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter")
@pytest.mark.parametrize("has_dot", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, INT8, FP8])
@pytest.mark.parametrize(("count", "requests", "tasks"), [(1, 1, 1), (127, 3, 2), (5000, 8, 1), (40_000, 33, 1)])
def test_the_hopper_kernel_computes_the_same(
    dtype: torch.dtype, count: int, requests: int, tasks: int, has_dot: bool
) -> None:
    from model.kernels import interaction_score_hopper as hopper
    from model.kernels.interaction_score_triton import Folded, fold, vector_of

    weights, items = draw_weights(256, 16, 256, 128, tasks, has_dot=has_dot), draw_items(count, 256, 16, dtype)
    if not hopper.fits(items, weights):
        pytest.skip("no Hopper GPU")
    user_BE = torch.randn(requests, 256, device=DEVICE)
    folded = Folded.empty(requests, weights, 256, count)
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    fold(user_BE, weights, folded, vector_of(items.embedding_NE))
    if folded.dot_B1N is not None:
        dot_scores(user_BE, items, folded.dot_B1N, number)
    score_BTN = torch.full((requests, tasks, count), torch.nan, device=DEVICE)
    hopper.score(folded, items, weights, score_BTN, number)
    few = slice(max(0, count - 300), count)
    last = ItemFeatures(
        items.embedding_NE[few], items.scalar_NS[few], items.scale_N if items.scale_N is None else items.scale_N[few]
    )
    wanted_BTN = interaction_scores_reference(user_BE, last, weights)
    assert not score_BTN.isnan().any()
    assert float((score_BTN[:, :, few] - wanted_BTN).abs().max()) < 1e-2


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    user_BE = torch.ones(1, 64, device=DEVICE)
    with pytest.raises(ShapeError, match=r"users of 64 and first weights of \[196, 32\], got 64 and \[388, 32\]"):
        interaction_scores_kernel(user_BE, draw_items(10, 64, 4, torch.bfloat16), draw_weights(128, 4, 32, 16))
    with pytest.raises(ShapeError, match=r"must be powers of two, got 64 and \(24, 16\)"):
        interaction_scores_kernel(user_BE, draw_items(10, 64, 4, torch.bfloat16), draw_weights(64, 4, 24, 16))
    for hidden, second in ((1024, 16), (512, 256)):
        with pytest.raises(
            ShapeError, match=rf"at most 512 units in the first and 65,536 .* got \({hidden}, {second}\)"
        ):
            interaction_scores_kernel(
                user_BE, draw_items(10, 64, 4, torch.bfloat16), draw_weights(64, 4, hidden, second)
            )
    with pytest.raises(ShapeError, match="scalars must be at most 16, got 17"):
        interaction_scores_kernel(user_BE, draw_items(10, 64, 17, torch.bfloat16), draw_weights(64, 17, 32, 16))
