"""Linear layers in 8 bits: what rounding costs, and the kernels against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from model.errors import ConfigError, ShapeError
from model.kernels.quantised_product import (
    FP8,
    Linear,
    Rows,
    add_norm_rows,
    gelu_product,
    gelu_product_reference,
    norm_rows,
    norm_rows_reference,
    paired,
    product,
    product_reference,
    rotated_product,
    rotated_product_reference,
    round_rows,
)

pytest.importorskip("triton", reason="Triton is not installed")
from model.crossing import dequantise
from model.encoder import Packing, rotate
from model.kernels.keys_and_values_triton import rotate_in_place, widen
from model.kernels.quantised_product_triton import (
    Tiles,
    add_norm_rows_kernel,
    gelu_product_kernel,
    norm_rows_kernel,
    product_kernel,
    rotated_product_kernel,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(32, 64, 32, 4, 2)
HEAD_DIM = 32
ROUNDING = 4e-3 if torch.cuda.is_available() else 8e-3  # in bfloat16: the interpreter cuts off where a GPU rounds


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def make_norm(width: int) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(width).to(DEVICE)
    norm.weight.data, norm.bias.data = draw(width, seed=8).float(), draw(width, seed=9).float()
    return norm.requires_grad_(False)


def make_layer(outputs: int, channels: int, seed: int = 1) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    weight_NK, bias_N = (
        draw(outputs, channels, seed=seed).float() * channels**-0.5,
        draw(outputs, seed=seed + 1).float(),
    )
    return Linear.of(weight_NK, bias_N), weight_NK, bias_N


def make_rows(tokens: int, channels: int) -> tuple[Rows, torch.Tensor]:
    """As a norm gives them, with the lengths of rows."""
    return norm_rows_reference(draw(tokens, channels), make_norm(channels))


def angles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle_Td = draw(tokens, 1, HEAD_DIM // 2, seed=5, dtype=torch.float32) * 3
    return angle_Td.cos(), angle_Td.sin()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_rows_come_back_within_a_sixteenth() -> None:
    """e4m3 has 3 bits behind the point: half a step is 2**-4; below 2**-6 of 448 the steps are 2**-9."""
    x_NK = torch.tensor([[448.0, 1.0, -1.0625, 0.0], [0.0, 0.0, 0.0, 0.0], [7.0, -3.5, 0.01, 1e-9]])
    rows = round_rows(x_NK)
    assert rows.value_NK.dtype == FP8
    assert rows.scale_N.tolist() == [1.0, 1.0, 7.0 / 448]
    assert rows.wide()[:2].tolist() == [[448.0, 1.0, -1.0, 0.0], [0.0] * 4]  # the tie goes to even
    assert rows.wide()[2, :2].tolist() == [7.0, -3.5]
    assert abs(float(rows.wide()[2, 2]) - 0.01) <= 0.01 / 16
    assert float(rows.wide()[2, 3]) == 0
    random_NK = draw(50, 64, dtype=torch.float32)
    error_NK = (round_rows(random_NK).wide() - random_NK).abs()
    assert bool((error_NK <= random_NK.abs() / 16 + round_rows(random_NK).scale_N[:, None] * 2**-10).all())


def test_a_bound_is_never_exceeded() -> None:
    """Also where input and weights point the same way, which is as large as a product of such lengths becomes."""
    norm = make_norm(64)
    normed, length_T = norm_rows_reference(draw(40, 64), norm)
    along = Linear.of(normed.wide()[:16].contiguous(), torch.full((16,), -0.5, device=DEVICE))
    out_TN = F.linear(normed.wide(), along.weight.wide(), along.bias_N)
    bound_T = along.bound(length_T)
    assert bool((out_TN.abs() <= bound_T[:, None]).all())
    assert float((out_TN.abs().amax(1) / bound_T).max()) > 0.5  # and the bound says something
    assert bool(gelu_product(normed, length_T, along).wide().isfinite().all())


@pytest.mark.parametrize(("outputs", "channels"), [(24, 64), (32, 40)])
def test_channels_that_the_matrix_units_cannot_load_are_refused(outputs: int, channels: int) -> None:
    with pytest.raises(ConfigError, match="multiples of 16 channels, got"):
        make_layer(outputs, channels)


def test_what_does_not_fit_is_refused() -> None:
    layer, x = make_layer(32, 64)[0], make_rows(3, 48)[0]
    with pytest.raises(ShapeError, match="takes 64 channels, got 48"):
        product(x, layer, draw(3, 32))
    with pytest.raises(ShapeError, match=r"must be \[3, 32\], got \[3, 64\]"):
        product(make_rows(3, 64)[0], layer, draw(3, 64))


def test_products_are_near_those_of_what_was_rounded() -> None:
    """Two factors, each off by 2.6 % of its own size at most on average, independently: under 4 % together."""
    hidden_TD, norm = draw(37, 96, dtype=torch.float32), make_norm(96)
    normed_TD = F.layer_norm(hidden_TD, (96,), norm.weight, norm.bias)
    (x, length_T), (layer, weight_NK, bias_N) = norm_rows(hidden_TD, norm), make_layer(192, 96)
    exact_TN = F.linear(normed_TD, weight_NK, bias_N)
    nothing_TN = torch.zeros(37, 192, device=DEVICE)
    assert 1e-3 < off(product(x, layer, nothing_TN), exact_TN) < 0.04
    assert 1e-3 < off(gelu_product(x, length_T, layer).wide(), F.gelu(exact_TN)) < 0.06
    cos, sin = angles(37)
    found_TN = rotated_product(x, Linear.of(paired(weight_NK, 6), paired(bias_N, 6)), cos, sin, 128, torch.float32)
    query, key, value = exact_TN.reshape(37, 3, 2, HEAD_DIM).unbind(1)
    packing = Packing(*(torch.empty(0),) * 3, 0, cos, sin, torch.empty(0))  # type: ignore[arg-type]
    wanted_TN = torch.stack([rotate(query, packing), rotate(key, packing), value], 1).flatten(1)
    assert 1e-3 < off(found_TN, wanted_TN) < 0.04


@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("channels", [96, 160])
def test_kernels_are_the_references(tokens: int, channels: int) -> None:
    """Within what another order of sums changes: one step of a result in 8 bits, 2**-8 of one in bfloat16."""
    hidden_TD, norm = draw(tokens, channels), make_norm(channels)
    wanted, wanted_length_T = norm_rows_reference(hidden_TD, norm)
    found, length_T = norm_rows_kernel(hidden_TD, norm.weight, norm.bias, norm.eps)
    assert_rows_close(found, wanted)
    torch.testing.assert_close(length_T, wanted_length_T)
    x, layer = wanted, make_layer(192, channels)[0]
    residual_TN = draw(tokens, 192, seed=4)
    assert off(product_kernel(x, layer, residual_TN, SMALL), product_reference(x, layer, residual_TN)) < ROUNDING
    assert_rows_close(gelu_product_kernel(x, length_T, layer, SMALL), gelu_product_reference(x, length_T, layer))
    cos, sin = angles(tokens)
    arguments = x, layer, cos, sin, 128, torch.bfloat16
    assert off(rotated_product_kernel(*arguments, SMALL), rotated_product_reference(*arguments)) < ROUNDING


def assert_rows_close(found: Rows, wanted: Rows) -> None:
    torch.testing.assert_close(found.scale_N, wanted.scale_N, rtol=1e-5, atol=0)
    assert bool(found.value_NK.float().isfinite().all())
    error_NK = (found.wide() - wanted.wide()).abs()
    assert bool((error_NK <= wanted.wide().abs() / 8 + wanted.scale_N[:, None] * 2**-8).all())
    assert off(found.wide(), wanted.wide()) < 8e-3  # most numbers are the same


@pytest.mark.parametrize(("tokens", "width"), [(37, 96), (3, 2304)])
def test_a_sum_and_its_norm(tokens: int, width: int) -> None:
    """Some rows to a warp, or a row to two of them."""
    hidden_TD, added_TD, bias_D = draw(tokens, width), draw(tokens, width, seed=1), draw(width, seed=2)
    norm = make_norm(width)
    exact_TD = hidden_TD.float() + added_TD.float() + bias_D.float()
    kernel = add_norm_rows_kernel(hidden_TD, added_TD, bias_D, norm.weight, norm.bias, norm.eps)
    for total_TD, (normed, length_T) in (kernel, add_norm_rows(hidden_TD.float(), added_TD, bias_D, norm)):
        assert off(total_TD, exact_TD) < ROUNDING
        wanted, wanted_length_T = norm_rows_reference(exact_TD, norm)
        assert_rows_close(normed, wanted)
        torch.testing.assert_close(length_T, wanted_length_T, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("row_by_row")
def test_a_token_has_the_same_bits_alone() -> None:
    (x, length_T), layer = make_rows(45, 96), make_layer(192, 96)[0]
    residual_TN, (cos, sin) = draw(45, 192, seed=4), angles(45)

    def found(part: slice) -> list[torch.Tensor]:
        rows = Rows(x.value_NK[part].contiguous(), x.scale_N[part].contiguous())
        fed = gelu_product_kernel(rows, length_T[part], layer, SMALL)
        turned = rotated_product_kernel(rows, layer, cos[part], sin[part], 128, torch.bfloat16, SMALL)
        return [fed.value_NK.float(), fed.scale_N, turned, product_kernel(rows, layer, residual_TN[part], SMALL)]

    for one, all_of_them in zip(found(slice(38, 39)), found(slice(None)), strict=True):
        assert torch.equal(one, all_of_them[38:39])


def test_no_tokens() -> None:
    (x, length_T), layer = make_rows(0, 96), make_layer(192, 96)[0]
    assert product_kernel(x, layer, draw(0, 192), SMALL).shape == (0, 192)
    assert gelu_product_kernel(x, length_T, layer, SMALL).value_NK.shape == (0, 192)


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_kept_bytes_become_wide(dtype: torch.dtype) -> None:
    request_E = torch.tensor([0] * 5 + [2] * 30, device=DEVICE)
    key_scale_Rh, value_scale_Rh = draw(3, 2, seed=1).float(), draw(3, 2, seed=2).float()
    key, value = ((draw(35, 2, HEAD_DIM, seed=seed).float() * 40).to(dtype) for seed in (3, 4))
    for found, x, scale in zip(
        widen(key, value, key_scale_Rh, value_scale_Rh, request_E, torch.bfloat16), (key, value),
        (key_scale_Rh, value_scale_Rh), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, dequantise(x, scale, request_E, torch.bfloat16), rtol=2**-7, atol=0)


def test_the_first_heads_are_turned_where_they_are() -> None:
    cos, sin = angles(45)
    packing = Packing(*(torch.empty(0),) * 3, 0, cos, sin, torch.empty(0))  # type: ignore[arg-type]
    x_Thd = draw(45, 3, HEAD_DIM)
    wanted = torch.cat([rotate(x_Thd[:, :2], packing), x_Thd[:, 2:]], 1)
    rotate_in_place(x_Thd.view(45, -1), 2, cos, sin)
    torch.testing.assert_close(x_Thd, wanted, rtol=2**-6.9, atol=2**-8)


@pytest.mark.skipif(DEVICE == "cpu", reason="the library's 8-bit products with scales of rows are a Hopper GPU's")
def test_the_library_gives_the_same_products() -> None:
    x, layer = make_rows(256, 768)[0], make_layer(2304, 768)[0]
    theirs_TN = torch._scaled_mm(
        x.value_NK, layer.weight.value_NK.T, x.scale_N[:, None], layer.weight.scale_N[None],
        out_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip
    found_TN = product_kernel(x, layer, torch.zeros_like(theirs_TN))
    assert off(found_TN, theirs_TN.float() + layer.bias_N) < ROUNDING
