"""The linear layers of a Transformer block with what surrounds them, for inference in half precision.

Between two products an activation of a narrow model (256 channels) costs more in memory traffic than the products in
arithmetic, so activation, residual and rotation belong into the product's kernel.

Legend: T tokens, K channels in, N channels out, h heads, d channels of a head, L positions.
"""

import torch
import torch.nn.functional as F

from model.errors import ShapeError


def linear(
    input_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    *,
    is_gelu: bool = False,
    residual_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """input weight^T + bias, then GELU where asked for, then the residual added. [T, N] in the input's dtype.

    input_TK: bf16 or f16; on the CPU any float.  weight_NK alike.  bias_N: f32.  residual_TN: in the input's dtype.
    Sums, activation and residual in f32, one rounding at the end. GELU (Hendrycks and Gimpel 2016) is within 3e-5 of
    the exact one on CUDA. No gradient flows. Raises ShapeError.
    """
    check(input_TK, weight_NK, bias_N)
    if residual_TN is not None and residual_TN.shape != (len(input_TK), len(weight_NK)):
        wanted = [len(input_TK), len(weight_NK)]
        raise ShapeError(f"the residual must be {wanted}, got {list(residual_TN.shape)}")
    if input_TK.is_cuda:
        from model.kernels.fused_linear_triton import linear_kernel

        return linear_kernel(input_TK, weight_NK, bias_N, is_gelu=is_gelu, residual=residual_TN)
    return linear_reference(input_TK, weight_NK, bias_N, is_gelu=is_gelu, residual_TN=residual_TN)


def linear_reference(
    input_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    *,
    is_gelu: bool = False,
    residual_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """As linear, on any device."""
    wide = torch.promote_types(input_TK.dtype, torch.float32)
    out_TN = F.linear(input_TK.to(wide), weight_NK.to(wide), bias_N.to(wide))
    out_TN = F.gelu(out_TN) if is_gelu else out_TN
    out_TN = out_TN if residual_TN is None else out_TN + residual_TN.to(wide)
    return out_TN.to(input_TK.dtype)


def project_rotated(
    input_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    position_T: torch.Tensor,
    cos_Ld: torch.Tensor,
    sin_Ld: torch.Tensor,
) -> torch.Tensor:
    """Queries, keys and values side by side, [T, 3, h, d]; queries and keys rotated to their positions.

    weight_NK: N = 3 h d, heads in order, as `halves` leaves it: of every head the first half of its channels, then,
    from row N / 2 on, the second halves.  bias_N: f32, alike.  position_T: i64.  cos_Ld, sin_Ld: f32 [L, d / 2].
    Otherwise as linear.  Source: rotary embedding (Su et al. 2021, equation 34).
    """
    check(input_TK, weight_NK, bias_N)
    half = cos_Ld.shape[1]
    if len(weight_NK) % (6 * half) or cos_Ld.shape != sin_Ld.shape:
        raise ShapeError(
            f"the weight's rows must be a multiple of 3 x {2 * half} and cos and sin alike, got {len(weight_NK)}, "
            f"{list(cos_Ld.shape)}, {list(sin_Ld.shape)}"
        )
    if input_TK.is_cuda:
        from model.kernels.fused_linear_triton import project_rotated_kernel

        return project_rotated_kernel(input_TK, weight_NK, bias_N, position_T, cos_Ld, sin_Ld)
    return project_rotated_reference(input_TK, weight_NK, bias_N, position_T, cos_Ld, sin_Ld)


def project_rotated_reference(
    input_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    position_T: torch.Tensor,
    cos_Ld: torch.Tensor,
    sin_Ld: torch.Tensor,
) -> torch.Tensor:
    """As project_rotated, on any device."""
    wide = torch.promote_types(input_TK.dtype, torch.float32)
    both = F.linear(input_TK.to(wide), weight_NK.to(wide), bias_N.to(wide))
    first, second = (x.reshape(len(x), 3, -1, cos_Ld.shape[1]) for x in both.chunk(2, -1))
    cos, sin = (x[position_T][:, None, None].to(wide) for x in (cos_Ld, sin_Ld))
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    plain = torch.cat([first, second], -1)
    return torch.cat([rotated[:, :2], plain[:, 2:]], 1).to(input_TK.dtype)


def halves(x_N: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a projection to heads, the first halves of all heads before the second halves. [N, ...]."""
    return x_N.reshape(-1, 2, head_dim // 2, *x_N.shape[1:]).transpose(0, 1).flatten(0, 2).contiguous()


def check(input_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> None:
    """Raises ShapeError for shapes and dtypes that do not fit together."""
    if input_TK.ndim != 2 or weight_NK.ndim != 2 or input_TK.shape[1] != weight_NK.shape[1]:
        raise ShapeError(
            f"input and weight must be [tokens, K] and [N, K], got {list(input_TK.shape)} and {list(weight_NK.shape)}"
        )
    if bias_N.shape != (len(weight_NK),) or weight_NK.dtype != input_TK.dtype:
        raise ShapeError(
            f"the bias must be [{len(weight_NK)}] and the weight {input_TK.dtype} as the input is, "
            f"got {list(bias_N.shape)} and {weight_NK.dtype}"
        )
    if input_TK.is_cuda and (input_TK.dtype not in (torch.bfloat16, torch.float16) or input_TK.shape[1] % 32):
        raise ShapeError(
            f"on CUDA the input must be bfloat16 or float16 with a multiple of 32 channels, got {input_TK.dtype} "
            f"{list(input_TK.shape)}"
        )
