"""Fused linear layers, layer norm and causal attention against plain PyTorch in float64."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from model.encoder import Packing, packed_causal_attention, rotate
from model.errors import ShapeError
from model.kernels.fused_linear import halves, linear, linear_reference, project_rotated, project_rotated_reference

pytest.importorskip("triton", reason="Triton is not installed")
from model.kernels.causal_attention import causal_attention_reference
from model.kernels.causal_attention_triton import CausalTiles, launch
from model.kernels.fused_linear_triton import LinearTiles, linear_kernel, norm_kernel, project_rotated_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = LinearTiles(32, 64, 32, num_warps=4, num_stages=2)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, slack: float = 1e-4) -> None:
    """bfloat16 has 8 bits: one rounding is off by 2^-8 of the value at most; the interpreter cuts off, 2^-7."""
    assert found.dtype == torch.bfloat16
    allowed = exact.abs() * 2 ** (-7.9 if found.is_cuda else -6.9) + slack
    error = (found.double() - exact).abs()
    worst = int((error - allowed).argmax()) if error.numel() else None
    assert worst is None or bool((error <= allowed).all()), (found.flatten()[worst], exact.flatten()[worst])


@pytest.mark.parametrize(("tokens", "depth", "columns"), [(70, 64, 192), (1, 64, 64), (128, 32, 100), (0, 64, 64)])
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("is_added", [False, True])
def test_linear_matches_float64(tokens: int, depth: int, columns: int, is_gelu: bool, is_added: bool) -> None:
    columns = columns // 8 * 8  # rows of the output lie 16 bytes apart
    x, weight, bias = draw(tokens, depth), draw(columns, depth, seed=1) * 0.1, draw(columns, seed=2).float()
    residual = draw(tokens, columns, seed=3) if is_added else None
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact) if is_gelu else exact
    exact = exact + residual.double() if residual is not None else exact
    assert_rounded_once(linear_kernel(x, weight, bias, is_gelu=is_gelu, residual=residual, tiles=TILES), exact)
    assert_rounded_once(linear_reference(x, weight, bias, is_gelu=is_gelu, residual_TN=residual), exact)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_a_rotated_projection_is_the_blocks(head_dim: int) -> None:
    tokens, heads, depth = 50, 2, 64
    x, bias = draw(tokens, depth), draw(3 * heads * head_dim, seed=2).float()
    weight = draw(3 * heads * head_dim, depth, seed=1) * 0.1
    packing = Packing.of(torch.tensor([0, 20, 21, 50]), head_dim, torch.zeros(tokens, dtype=torch.int64, device=DEVICE))
    query, key, value = (
        part.reshape(tokens, heads, head_dim)
        for part in F.linear(x.double(), weight.double(), bias.double()).chunk(3, -1)
    )
    exact = torch.stack([rotate(query, packing), rotate(key, packing), value], 1)
    table = Packing.of(torch.tensor([0, 40]), head_dim, torch.zeros(40, dtype=torch.int64, device=DEVICE))
    rest = (packing.position_T, table.cos_Td[:, 0], table.sin_Td[:, 0])
    inputs = x, halves(weight, head_dim), halves(bias, head_dim), *rest
    assert_rounded_once(project_rotated_kernel(*inputs, TILES), exact)
    assert_rounded_once(project_rotated_reference(*inputs), exact)


def test_norm_matches_float64() -> None:
    x, weight, bias = draw(37, 96), draw(96, seed=1).float(), draw(96, seed=2).float()
    exact = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-5)
    assert_rounded_once(norm_kernel(x, weight, bias, 1e-5), exact, slack=1e-3)


@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 40, 17, 64, 0], [100], [2] * 9])
@pytest.mark.parametrize("tiles", [CausalTiles(32, 16, 4, 2), CausalTiles(16, 16, 4, 1)])
def test_causal_attention_matches_the_padded_one(lengths: Sequence[int], tiles: CausalTiles) -> None:
    offsets, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    query, key, value = draw(total, 3, 2, 32).unbind(1)  # rows lie apart
    packing = Packing.of(offsets, 32, torch.zeros(total, dtype=torch.int64, device=DEVICE))
    exact = packed_causal_attention(query.double(), key.double(), value.double(), packing)
    for found in (
        launch(query, key, value, packing.offsets, tiles),
        causal_attention_reference(query, key, value, packing.offsets),
    ):
        assert (found.double() - exact).norm() / exact.norm() < 5e-3


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = draw(3, 64), draw(8, 64), torch.zeros(8, device=DEVICE)
    with pytest.raises(ShapeError, match=r"got \[3, 64\] and \[64\]"):
        linear(x, weight[0], bias)
    with pytest.raises(ShapeError, match=r"the bias must be \[8\]"):
        linear(x, weight, bias[:3])
    with pytest.raises(ShapeError, match=r"the residual must be \[3, 8\], got \[3, 4\]"):
        linear(x, weight, bias, residual_TN=draw(3, 4))
    table = torch.zeros(5, 16, device=DEVICE)
    with pytest.raises(ShapeError, match="a multiple of 3 x 32"):
        project_rotated(x, weight, bias, torch.zeros(3, dtype=torch.int64, device=DEVICE), table, table)
