"""The packed encoder against the encoder, and the packing of batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.errors import ConfigError, ShapeError
from model.packed_encoder import PackedEncoder, choose_batch_tokens, lay_out, plan_batches
from tests.model.test_encoder import make_features
from tests.releases import SMALL, make_tower

CONFIG = replace(SMALL, d_model=64, num_heads=2, num_layers=3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The compiler's own, which is asked only there.
pytestmark = [pytest.mark.filterwarnings("ignore")] if DEVICE == "cuda" else []


def make_packed(batch_tokens: int = 16) -> PackedEncoder:
    return PackedEncoder(make_tower(config=CONFIG)[0].encoder.to(DEVICE), batch_tokens=batch_tokens)


def test_states_are_the_encoders_within_bfloat16() -> None:
    features = make_features([5, 1, 12, 7, 3, 9])
    with torch.no_grad():
        exact = make_tower(config=CONFIG)[0].encoder.double().eval().states(features)
        found = make_packed().states(features.to(DEVICE)).cpu()
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < 1e-2
    assert (found - exact).norm(dim=1).max() / exact.norm(dim=1).min() < 2e-2  # each user has its own


def test_more_users_than_the_last_block_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six users, four at a time."""
    features = make_features([5, 1, 12, 7, 3, 9])
    together = make_packed().states(features.to(DEVICE))
    monkeypatch.setattr("model.packed_encoder.LAST_ROWS", 4)
    in_parts = make_packed().states(features.to(DEVICE))
    assert in_parts.shape == together.shape
    assert (in_parts - together).norm(dim=1).max() < 2e-2 * together.norm(dim=1).min()


def test_a_state_does_not_depend_on_what_it_is_encoded_with() -> None:
    """Bit by bit on a GPU; the CPU's products round a row by its place."""
    features = make_features([5, 1, 12, 7, 3, 9])
    features.gap_T[features.offsets[:-1]] = 0  # no event before a history's first
    encoder = make_packed()
    together = encoder.states(features.to(DEVICE))
    for user in range(6):
        start, end = features.offsets[user : user + 1], features.offsets[user + 1 : user + 2]
        alone = encoder.states(features.window(start, end).to(DEVICE))[0]
        assert torch.equal(alone, together[user]) or DEVICE == "cpu"
        assert (alone - together[user]).abs().max() < 5e-2


def test_a_batch_holds_the_longest_history() -> None:
    encoder = make_tower(config=CONFIG)[0].encoder
    assert PackedEncoder(encoder).batch_tokens == choose_batch_tokens(64) == 67_584
    assert choose_batch_tokens(512) == 50_688
    assert PackedEncoder(encoder, batch_tokens=1).batch_tokens == 12


def test_the_longest_go_first_and_the_shortest_fill_up() -> None:
    """12, then 3 and 1; 9 and 7 fill a batch; 5 in a batch of its own."""
    found = plan_batches(np.array([5, 1, 12, 7, 3, 9]), 16)
    assert [batch.tolist() for batch in found] == [[2, 4, 1], [5, 3], [0]]


def test_users_are_laid_out_where_their_events_are() -> None:
    """Events of the users begin at 0, 5, 6 and 18; the first batch holds users 2 and 1, the second 0 and 3."""
    offsets, begins, outs = lay_out(np.array([5, 1, 12, 7]), [np.array([2, 1]), np.array([0, 3])], 3)
    assert offsets.tolist() == [[0, 12, 13, 13], [0, 5, 12, 12]]
    assert begins.tolist() == [[6, 5, 0], [0, 18, 0]]
    assert outs.tolist() == [3, 1, 0, 4]


@pytest.mark.parametrize(("tokens", "waste"), [(800, 0.02), (256, 0.06)])
def test_every_user_is_in_one_batch_and_none_is_too_full(tokens: int, waste: float) -> None:
    """Few places are empty, the fewer the shorter histories are beside a batch: an eighth and two fifths here."""
    length_U = np.random.default_rng(0).integers(1, 100, 500)
    batches = plan_batches(length_U, tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert max(int(length_U[users].sum()) for users in batches) <= tokens
    assert len(batches) <= (1 + waste) * length_U.sum() / tokens + 1


def test_what_it_cannot_encode_is_refused() -> None:
    with pytest.raises(ConfigError, match="softmax attention without bias"):
        PackedEncoder(make_tower(config=replace(CONFIG, relative_bias=True))[0].encoder)
    encoder = make_packed()
    with pytest.raises(ShapeError, match="1 to 12 events of every user"):
        encoder.states(make_features([3, 0]).to(DEVICE))
    with pytest.raises(ShapeError, match="1 to 12 events of every user"):
        encoder.states(make_features([13]).to(DEVICE))
