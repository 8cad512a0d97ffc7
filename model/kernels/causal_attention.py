"""Causal attention of packed histories: the encoder's and the context pass's.

Legend: T packed events, h heads, d channels of a head, U users.
"""

import torch

KERNEL_HEAD_DIMS = (32, 64, 128)


def is_kernel_taken(query_Thd: torch.Tensor) -> bool:
    """Whether the Triton kernel reads it: half precision on CUDA, no gradient asked for, a head of its widths."""
    return (
        query_Thd.is_cuda
        and query_Thd.dtype in (torch.bfloat16, torch.float16)
        and query_Thd.shape[-1] in KERNEL_HEAD_DIMS
        and not (torch.is_grad_enabled() and query_Thd.requires_grad)
    )


def causal_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, offsets: torch.Tensor, longest: int
) -> torch.Tensor:
    """Softmax attention of each event to its user's events up to and including itself. Returns [T, h, d].

    query_Thd, key_Thd, value_Thd: bf16 or f16 on CUDA; scores are scaled by d ** -0.5.
    offsets: i32 [U + 1], on the device, rising from 0 to T.  longest: events of the longest history, or more.
    In inference our kernel, which a gradient cannot flow through; in training the library's variable-length one.
    """
    if is_kernel_taken(query_Thd):
        from model.kernels.causal_attention_triton import causal_attention_kernel

        return causal_attention_kernel(query_Thd, key_Thd, value_Thd, offsets)
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(query_Thd, key_Thd, value_Thd, offsets, offsets, longest, longest, window_size=(-1, 0))
    return out  # type: ignore[return-value]
