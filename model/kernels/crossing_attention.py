"""Attention of candidates to the history of their request and to themselves: the crossing pass of DCAT.

Histories are read once for all candidates of a request, never repeated for each. On CUDA the kernels of
`crossing_attention_triton` do it, elsewhere the reference below.

Legend: T tokens of all candidates, S history events of all requests, H query heads, K key heads, d channels of a head,
R requests, C candidates of one request, n tokens of one candidate, c tokens of all candidates of one request.
"""

import itertools
from typing import Literal, Protocol, overload

import torch

from model.errors import ShapeError

KERNEL_HEAD_DIMS = (32, 64, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TOKENS = 4


class _Attention(Protocol):
    def __call__(
        self, query_THd: torch.Tensor, key_self_TKd: torch.Tensor, value_self_TKd: torch.Tensor,
        history_key_SKd: torch.Tensor, history_value_SKd: torch.Tensor, candidate_offsets: torch.Tensor,
        history_offsets: torch.Tensor, *, tokens: int, longest_history: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def crossing_attention(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    *,
    tokens: int = ...,
    longest_history: int | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def crossing_attention(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    *,
    tokens: int = ...,
    longest_history: int | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def crossing_attention(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    *,
    tokens: int = 1,
    longest_history: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of token j of a candidate to its request's whole history and to the candidate's tokens 0..j.

    query_THd: bf16, f16 or f32 [T, H, d] (f64 too on the CPU); keys and values alike, with K heads, H a multiple of K:
    query head i reads key head i // (H / K). Scores are scaled by d ** -0.5.
    candidate_offsets: i32 [R + 1], rising from 0 to T in multiples of `tokens`.  history_offsets: i32 [R + 1], rising
    from 0 to S. Both on the device of the query; their values are not looked at on the host where that would wait for
    a device, so what they hold is the caller's to keep.
    tokens: of each candidate, 1 to 4.
    longest_history: events of the longest history, where the host knows it: short histories are then known not to need
    to be read in pieces. It changes how the work is shared out, and no bit of the result.

    Returns [T, H, d] in the query's dtype, summed in f32 at least; with return_lse also the log of each softmax's
    denominator, f32 [T, H] (f64 for f64), through which no gradient flows. A candidate's result has the same bits
    whatever other candidates or requests are in the batch; gradients have the same bits in every run (on CUDA).
    Raises ShapeError.
    Source: DCAT (PinFM, Pinterest 2025), crossing; we differ in packing both sides and in the fused self key.
    """
    check_shapes(
        query_THd, key_self_TKd, value_self_TKd, history_key_SKd, history_value_SKd, candidate_offsets, history_offsets,
        tokens,
    )  # fmt: skip
    attention: _Attention
    if query_THd.is_cuda:
        from model.kernels.crossing_attention_triton import crossing_attention_kernel

        attention = crossing_attention_kernel
    else:
        check_offsets("candidate_offsets", candidate_offsets, len(query_THd), tokens)
        check_offsets("history_offsets", history_offsets, len(history_key_SKd), 1)
        attention = crossing_attention_reference
    out_THd, lse_TH = attention(
        query_THd, key_self_TKd, value_self_TKd, history_key_SKd, history_value_SKd, candidate_offsets, history_offsets,
        tokens=tokens, longest_history=longest_history,
    )  # fmt: skip
    return (out_THd, lse_TH) if return_lse else out_THd


def crossing_attention_reference(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    *,
    tokens: int = 1,
    longest_history: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As crossing_attention, with the log of the denominators: one request at a time, on any device, in any dtype.

    longest_history is taken for the sake of the same signature; nothing here depends on it.
    """
    wide = torch.promote_types(query_THd.dtype, torch.float32)
    _, heads, channels = query_THd.shape
    group = heads // key_self_TKd.shape[1]
    later_nn = torch.ones(tokens, tokens, dtype=torch.bool, device=query_THd.device).triu(1)
    outs = [query_THd.new_empty(0, *query_THd.shape[1:], dtype=wide)]
    lses = [query_THd.new_empty(0, query_THd.shape[1], dtype=wide)]
    starts, history_starts = candidate_offsets.tolist(), history_offsets.tolist()
    for r in range(len(starts) - 1):
        mine = slice(starts[r], starts[r + 1])
        history = slice(history_starts[r], history_starts[r + 1])
        own_shape = ((starts[r + 1] - starts[r]) // tokens, tokens, heads, channels)
        # Every key head is repeated for the query heads that read it: all below have H heads.
        key_SHd, value_SHd = (
            x[history].to(wide).repeat_interleave(group, 1) for x in (history_key_SKd, history_value_SKd)
        )
        key_CnHd, value_CnHd = (
            x[mine].to(wide).repeat_interleave(group, 1).reshape(own_shape) for x in (key_self_TKd, value_self_TKd)
        )
        query_CnHd = (query_THd[mine].to(wide) * channels**-0.5).reshape(own_shape)
        to_history_CHnS = torch.einsum("cnhd,shd->chns", query_CnHd, key_SHd)
        to_self_CHnn = torch.einsum("cnhd,cmhd->chnm", query_CnHd, key_CnHd).masked_fill(later_nn, float("-inf"))
        score = torch.cat([to_history_CHnS, to_self_CHnn], -1)
        lses.append(score.detach().logsumexp(-1).transpose(1, 2).flatten(0, 1))
        share = score.softmax(-1)
        read_CnHd = torch.einsum("chns,shd->cnhd", share[..., : len(key_SHd)], value_SHd)
        read_CnHd = read_CnHd + torch.einsum("chnm,cmhd->cnhd", share[..., len(key_SHd) :], value_CnHd)
        outs.append(read_CnHd.flatten(0, 1))
    return torch.cat(outs).to(query_THd.dtype), torch.cat(lses)


def check_shapes(
    query_THd: torch.Tensor,
    key_self_TKd: torch.Tensor,
    value_self_TKd: torch.Tensor,
    history_key_SKd: torch.Tensor,
    history_value_SKd: torch.Tensor,
    candidate_offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    tokens: int,
) -> None:
    """Raises ShapeError for shapes, dtypes and devices that do not fit together; reads no values."""
    if query_THd.ndim != 3:
        raise ShapeError(f"query must be [tokens, heads, channels], got {list(query_THd.shape)}")
    if key_self_TKd.ndim != 3 or history_key_SKd.ndim != 3:
        raise ShapeError(
            f"keys must be [tokens, heads, channels], got {list(key_self_TKd.shape)} of the candidates and "
            f"{list(history_key_SKd.shape)} of the histories"
        )
    num_tokens, heads, channels = query_THd.shape
    key_heads = key_self_TKd.shape[1]
    if not key_heads or heads % key_heads:
        raise ShapeError(f"query heads must be a multiple of the key heads, got {heads} and {key_heads}")
    wanted = {
        "key_self": (key_self_TKd, (num_tokens, key_heads, channels)),
        "value_self": (value_self_TKd, (num_tokens, key_heads, channels)),
        "history_key": (history_key_SKd, (len(history_key_SKd), key_heads, channels)),
        "history_value": (history_value_SKd, (len(history_key_SKd), key_heads, channels)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != query_THd.dtype:
            raise ShapeError(f"{name} must be {query_THd.dtype} as the query is, got {tensor.dtype}")
        if tensor.device != query_THd.device:
            raise ShapeError(f"{name} must be on {query_THd.device} as the query is, got {tensor.device}")
    for name, offsets in (("candidate_offsets", candidate_offsets), ("history_offsets", history_offsets)):
        if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int32:
            raise ShapeError(f"{name} must be int32 [requests + 1], got {offsets.dtype} {list(offsets.shape)}")
        if offsets.device != query_THd.device:
            raise ShapeError(f"{name} must be on {query_THd.device} as the query is, got {offsets.device}")
    if len(candidate_offsets) != len(history_offsets):
        raise ShapeError(
            "candidate_offsets and history_offsets must be of the same requests, got "
            f"{len(candidate_offsets) - 1} and {len(history_offsets) - 1}"
        )
    if not 1 <= tokens <= MOST_TOKENS or num_tokens % tokens:
        raise ShapeError(
            f"tokens of a candidate must be 1 to {MOST_TOKENS} and divide the {num_tokens} in all, got {tokens}"
        )
    if query_THd.is_cuda:
        check_kernel(query_THd)


def check_kernel(query_THd: torch.Tensor) -> None:
    """Raises ShapeError for what the kernels do not take and the reference does."""
    if query_THd.dtype not in KERNEL_DTYPES:
        raise ShapeError(f"on CUDA the query must be bfloat16, float16 or float32, got {query_THd.dtype}")
    if query_THd.shape[-1] not in KERNEL_HEAD_DIMS:
        raise ShapeError(f"on CUDA a head must have 32, 64 or 128 channels, got {query_THd.shape[-1]}")


def check_offsets(name: str, offsets: torch.Tensor, total: int, multiple: int) -> None:
    """Raises ShapeError unless offsets (on the CPU) rise from 0 to the total, in multiples."""
    values = offsets.tolist()
    is_rising = all(low <= high and high % multiple == 0 for low, high in itertools.pairwise(values))
    if values[0] != 0 or values[-1] != total or not is_rising:
        raise ShapeError(f"{name} must rise from 0 to {total} in multiples of {multiple}, got {_shown(values)}")


def _shown(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:4])[:-1]}, ..., {str(values[-4:])[1:]}"
