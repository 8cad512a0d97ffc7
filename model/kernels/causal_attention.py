"""Causal attention of packed histories: the encoder's and the context pass's.

Legend: T packed events, h heads, d channels of a head, U users.
"""

import itertools

import torch
import torch.nn.functional as F

KERNEL_HEAD_DIMS = (32, 64, 128)


def is_kernel_taken(query_Thd: torch.Tensor) -> bool:
    """Whether our kernels read it: half precision on CUDA, no gradient asked for, a head of its widths."""
    return (
        query_Thd.is_cuda
        and query_Thd.dtype in (torch.bfloat16, torch.float16)
        and query_Thd.shape[-1] in KERNEL_HEAD_DIMS
        and not (torch.is_grad_enabled() and query_Thd.requires_grad)
    )


def causal_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, offsets: torch.Tensor, longest: int,
    plan: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention of each event to its user's events up to and including itself. Returns [T, h, d].

    query_Thd, key_Thd, value_Thd: bf16 or f16 on CUDA, any float on the CPU; scores are scaled by d ** -0.5.
    offsets: i32 [U + 1], on the device, rising from 0; events behind the last offset belong to no user, and what is
    returned for them is left as it was found.  longest: events of the longest history, or more.
    plan: what plan_causal gave for them, where several layers share it.
    On CUDA our kernels in inference, through which no gradient flows (one for Hopper GPUs, one for others), the
    library's variable-length one in training.
    """
    if not query_Thd.is_cuda:
        return causal_attention_reference(query_Thd, key_Thd, value_Thd, offsets)
    if is_kernel_taken(query_Thd):
        from model.kernels.crossing_attention_gluon import is_hopper

        out: torch.Tensor
        if is_hopper(query_Thd):
            from model.kernels.causal_attention_gluon import causal_attention_hopper

            out = causal_attention_hopper(query_Thd, key_Thd, value_Thd, offsets, longest, plan)
        else:
            from model.kernels.causal_attention_triton import causal_attention_kernel

            out = causal_attention_kernel(query_Thd, key_Thd, value_Thd, offsets)
        return out
    from torch.nn.attention.varlen import varlen_attn

    lengths = (offsets, offsets, longest, longest)
    return varlen_attn(query_Thd, key_Thd, value_Thd, *lengths, window_size=(-1, 0))  # type: ignore[return-value]


def last_attention(
    query_Uhd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Softmax attention of one query a user, its last event's, to all of the user's events. Returns [U, h, d].

    Arguments as causal_attention's, but for the queries; zeros for users without events. What is asked of one user has
    the same bits among any others. On CUDA by a kernel, through which no gradient flows, of the widths and dtypes that
    is_kernel_taken names.
    """
    if not query_Uhd.is_cuda:
        return last_attention_reference(query_Uhd, key_Thd, value_Thd, offsets)
    from model.kernels.causal_attention_triton import last_attention_kernel

    out: torch.Tensor = last_attention_kernel(query_Uhd, key_Thd, value_Thd, offsets)
    return out


def plan_causal(offsets: torch.Tensor, events: int, longest: int, head_dim: int) -> torch.Tensor | None:
    """What causal_attention works out of the offsets before it begins, and else does anew in every layer. Opaque.

    offsets, longest: as there.  events: T.  Only one call at a time may use it. None where none is needed.
    """
    if not offsets.is_cuda or head_dim not in (64, 128) or not events or len(offsets) < 2:
        return None
    if torch.cuda.get_device_capability(offsets.device)[0] != 9:
        return None
    from model.kernels.causal_attention_gluon import choose_tiles, plan_tiles

    return plan_tiles(offsets, events, longest, choose_tiles(head_dim).rows)


def causal_attention_reference(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """As causal_attention: one user at a time, on any device, in f32 at least."""
    wide = torch.promote_types(query_Thd.dtype, torch.float32)
    out_Thd = torch.zeros_like(query_Thd)
    for begin, end in itertools.pairwise(offsets.tolist()):
        query, key, value = (x[begin:end].to(wide).transpose(0, 1) for x in (query_Thd, key_Thd, value_Thd))
        read_hLd = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out_Thd[begin:end] = read_hLd.transpose(0, 1).to(query_Thd.dtype)
    return out_Thd


def last_attention_reference(
    query_Uhd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """As last_attention: one user at a time, on any device, in f32 at least."""
    wide = torch.promote_types(query_Uhd.dtype, torch.float32)
    out_Uhd = torch.zeros_like(query_Uhd)
    for user, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            key, value = (x[begin:end].to(wide).transpose(0, 1) for x in (key_Thd, value_Thd))
            read_h1d = F.scaled_dot_product_attention(query_Uhd[user].to(wide)[:, None], key, value)
            out_Uhd[user] = read_h1d[:, 0].to(query_Uhd.dtype)
    return out_Uhd
