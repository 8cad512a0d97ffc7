"""Attention of each user's last event: the kernel against the reference in float64, and its bits in any company."""

import pytest
import torch

from model.kernels.causal_attention import causal_attention_reference, last_attention_reference

pytest.importorskip("triton", reason="Triton is not installed")
from model.kernels.causal_attention_triton import last_attention_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks of 16,384 numbers of keys: edges of one and of two blocks, users without events among them and at the end.
LENGTHS = {32: [1, 512, 0, 513, 30], 64: [256, 257, 1, 0, 600, 0], 128: [128, 1, 129, 280]}


def draw(
    lengths: list[int], heads: int, channels: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [U, h, d]; keys and values, parts of one projection [T, 3, h, d], NaN behind the last user; offsets."""
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    projected = torch.randn(int(offsets[-1]) + 40, 3, heads, channels, generator=random)
    projected[offsets[-1] :] = torch.nan
    query = torch.randn(len(lengths), heads, channels, generator=random)
    _, key, value = projected.to(DEVICE, dtype).unbind(1)
    return query.to(DEVICE, dtype), key, value, offsets.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "heads"), [(32, 3), (64, 2), (128, 1)])
def test_it_is_the_formula(channels: int, heads: int, dtype: torch.dtype) -> None:
    query, key, value, offsets = draw(LENGTHS[channels], heads, channels, dtype)
    found = last_attention_kernel(query, key, value, offsets)
    exact = last_attention_reference(query.double(), key.double(), value.double(), offsets)
    plain = last_attention_reference(query, key, value, offsets)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert not found[offsets.diff() == 0].any()


def test_the_reference_is_causal_attention_s_last_row() -> None:
    """Where the query is the last event's own."""
    _, key, value, offsets = draw([5, 1, 9], 2, 32, torch.float32)
    key, value = key[:15].cpu().double(), value[:15].cpu().double()
    query = torch.randn(15, 2, 32, dtype=torch.float64)
    last = offsets[1:].cpu().long() - 1
    found = last_attention_reference(query[last], key, value, offsets.cpu())
    wanted = causal_attention_reference(query, key, value, offsets.cpu())[last]
    assert (found - wanted).abs().max() < 1e-14


def test_a_user_has_the_same_bits_alone() -> None:
    query, key, value, offsets = draw([40, 300, 3], 2, 64, torch.bfloat16)
    together = last_attention_kernel(query, key, value, offsets)
    for user, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own = torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE)
        alone = last_attention_kernel(query[user : user + 1], key[begin:end], value[begin:end], own)
        assert torch.equal(alone[0], together[user])
