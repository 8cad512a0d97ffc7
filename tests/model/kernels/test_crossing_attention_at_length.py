"""Crossing attention with long histories, drawn at random: output and gradients against float64, and equal bits.

What runs is what a layer would run (`crossing_attention`), so only on a GPU: the interpreter would take hours. The same
sweep over small shapes, in `test_crossing_attention`, runs everywhere.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from model.kernels.crossing_attention import crossing_attention
from tests.model.kernels.test_crossing_attention import NAMES, Case, assert_no_worse, poisoned, repeated, run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="histories of thousands of events need a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = ((1, 1), (2, 1), (4, 2), (3, 3), (8, 2), (6, 1))


def draw_case(seed: int) -> Case:
    """1 to 5 requests of up to 4,096 events and 60 candidates, a third of either empty or tiny; 1 to 4 tokens."""
    random = np.random.default_rng(seed)
    tokens, requests = int(random.integers(1, 5)), int(random.integers(1, 6))
    histories = random.integers(0, 4097, requests)
    histories = np.where(random.random(requests) < 1 / 3, random.integers(0, 3, requests), histories)
    candidates = random.integers(1, 61, requests)
    candidates = np.where(random.random(requests) < 1 / 3, random.integers(0, 2, requests), candidates)
    candidates[0] = max(1, candidates[0])
    histories[-1] = random.choice([0, 1, 127, 128, 129, 2047, 2048, 2049, 4095, 4096])
    heads, key_heads = HEADS[random.integers(len(HEADS))]
    head_dim, dtype = int(random.choice([32, 64, 128])), DTYPES[random.integers(len(DTYPES))]
    return Case(candidates.tolist(), histories.tolist(), tokens, heads, key_heads, head_dim, dtype)


with_lse = partial(crossing_attention, return_lse=True)


@pytest.mark.parametrize("seed", range(100))
def test_output_and_gradients_match_float64(seed: int) -> None:
    """At most twice the error of plain PyTorch over repeated histories; fresh memory holds NaN."""
    case = draw_case(seed)
    inputs = [x.cuda() for x in case.draw(seed)]
    exact = run(repeated, case, [x.double() for x in inputs])
    plain = run(repeated, case, inputs)
    with poisoned():
        found = run(with_lse, case, inputs)
    assert_no_worse(found, plain, exact, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_ten_runs_give_the_same_bits(head_dim: int, dtype: torch.dtype) -> None:
    case = Case([500, 0, 333, 64], [4096, 9, 1500, 0], heads=4, key_heads=2, head_dim=head_dim, dtype=dtype)
    inputs = [x.cuda() for x in case.draw()]
    first = run(with_lse, case, inputs)
    for _ in range(9):
        for name, one, two in zip(NAMES, first, run(with_lse, case, inputs), strict=True):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_a_candidate_has_the_same_bits_alone_and_among_a_thousand(head_dim: int, dtype: torch.dtype) -> None:
    """Also its gradients, whoever else is served: nine other requests, one with a longer history."""
    company = Case([1000, *range(1, 9), 100], [3001, *[77] * 8, 4096], heads=2, head_dim=head_dim, dtype=dtype)
    inputs = [x.cuda() for x in company.draw()]
    among = run(with_lse, company, inputs)
    alone = replace(company, candidates=[1], histories=[3001])
    for candidate in (0, 63, 64, 517, 999):
        own = slice(candidate, candidate + 1)
        found = run(with_lse, alone, [*(x[own] for x in inputs[:3]), *(x[:3001] for x in inputs[3:5]), inputs[5][own]])
        for name, one, two in zip(NAMES[:5], found, among, strict=False):
            assert torch.equal(one, two[own]), f"{name} of candidate {candidate}"
