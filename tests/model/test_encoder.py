"""The packed encoder against one history at a time, its causality, and attention in float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.encoder import (
    Encoder,
    LatentTokens,
    Packing,
    RelativeBias,
    packed_causal_attention,
    padded_causal_attention,
    pointwise_causal_attention,
)
from model.errors import ShapeError
from model.features import EventFeatures, gap_bucket
from tests.releases import SMALL, make_tower

KINDS = {
    "softmax": SMALL,
    "softmax, relative": replace(SMALL, relative_bias=True),
    "pointwise": replace(SMALL, attention="pointwise"),
    "pointwise, relative": replace(SMALL, attention="pointwise", relative_bias=True),
    "three tokens": replace(SMALL, state_tokens=3),
}


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Each kind of attention, its biases not the zeros they begin with."""
    encoder = make_tower(config=KINDS[request.param])[0].encoder
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".bias." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return encoder


def make_features(lengths: list[int], seed: int = 0) -> EventFeatures:
    random = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=random)

    return EventFeatures(
        draw(82, total), draw(4, total), draw(33, total), draw(4, total, 1), torch.arange(total),
        torch.tensor(np.concatenate([[0], np.cumsum(lengths)])),
    )  # fmt: skip


def reference_attention(query, key, value, lengths):  # type: ignore[no-untyped-def]
    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        score = torch.einsum("qhd,khd->hqk", query[part], key[part]) / query.shape[-1] ** 0.5
        score = score.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), value[part]))
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [12, 0, 5], [2] * 9])
def test_packed_attention_matches_float64(lengths: list[int]) -> None:
    total = sum(lengths)
    query, key, value = torch.randn(3, total, 2, 8, generator=torch.Generator().manual_seed(1)).unbind()
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
    found = packed_causal_attention(query, key, value, Packing.of(offsets, 8, torch.arange(total)))
    exact = reference_attention(query.double(), key.double(), value.double(), lengths)
    assert (found - exact).abs().max() < 2e-6


def test_a_bias_is_added_to_the_scores() -> None:
    lengths, total = [5, 2], 7
    random = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, total, 2, 8, generator=random).unbind()
    packing = Packing.of(torch.tensor([0, 5, 7]), 8, torch.arange(total))
    bias = RelativeBias(SMALL)
    with torch.no_grad():
        bias.distance_Ph.normal_(generator=random)
        bias.time_Gh.normal_(generator=random)
    # all times lie within a microsecond or so: the bucket of 0 s is 1
    found = padded_causal_attention(query, key, value, packing, bias(packing))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        score_hqk = torch.einsum("qhd,khd->hqk", query[part], key[part]) / 8**0.5
        for i in range(length):
            for j in range(i + 1):
                score_hqk[:, i, j] += bias.distance_Ph[i - j] + bias.time_Gh[1]
        score_hqk = score_hqk.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
        exact = torch.einsum("hqk,khd->qhd", score_hqk.softmax(-1), value[part])
        assert (found[part] - exact).abs().max() < 1e-5
        start += length


def test_time_between_events_is_bucketed_as_gaps_are() -> None:
    seconds = [0, 1, 3, 1000]
    packing = Packing.of(torch.tensor([0, 4]), 8, torch.tensor(seconds) * 1_000_000)
    bias = RelativeBias(SMALL)
    with torch.no_grad():
        bias.time_Gh[:, 0] = torch.arange(len(bias.time_Gh))
    found_LL = bias(packing)[0, 0]
    for i in range(4):
        for j in range(4):
            wanted = gap_bucket(np.array([(seconds[i] - seconds[j]) * 1_000_000]))[0] if j <= i else -np.inf
            assert found_LL[i, j] == wanted


def test_pointwise_attention_sums_what_silu_leaves() -> None:
    query = torch.tensor([[[1.0]], [[2.0]]])
    key, value = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[[10.0]], [[100.0]]])
    packing = Packing.of(torch.tensor([0, 2]), 1, torch.zeros(2, dtype=torch.int64))
    found = pointwise_causal_attention(query, key, value, packing, None).flatten()

    def silu(x: float) -> float:
        return float(x / (1 + np.exp(-x)))

    assert found[0].item() == pytest.approx(10 * silu(3), rel=1e-6)  # one event: over 1
    assert found[1].item() == pytest.approx((10 * silu(6) + 100 * silu(-2)) / 2, rel=1e-6)


def test_a_history_has_one_state_whatever_its_company(encoder: Encoder) -> None:
    features = make_features([5, 1, 12, 7])
    together = encoder.states(features)
    bounds = features.offsets.tolist()
    for user, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = encoder.states(
            EventFeatures(
                features.item_T[start:end], features.type_T[start:end], features.gap_T[start:end],
                features.column_TC[start:end], features.time_us_T[start:end], torch.tensor([0, end - start]),
            )
        )  # fmt: skip
        assert (together[user] - alone[0]).abs().max() < 1e-5


def test_a_state_is_what_the_whole_pass_makes_of_the_last_event(encoder: Encoder) -> None:
    """States leave out what the last block makes of the events before the last one."""
    encoder, features = encoder.double(), make_features([5, 1, 12, 7])
    whole = encoder(features)[features.offsets[1:] - 1]
    assert (encoder.states(features) - whole).abs().max() < 1e-6  # states are float32
    assert whole.abs().max() > 0.1


def test_the_encoder_is_causal(encoder: Encoder) -> None:
    features = make_features([10])
    before = encoder(features).unflatten(-1, (encoder.config.state_tokens, -1))
    features.item_T[6] = (features.item_T[6] + 1) % 50
    after = encoder(features).unflatten(-1, (encoder.config.state_tokens, -1))
    assert torch.equal(before[:6], after[:6])
    assert ((before[6:] - after[6:]).abs().amax(-1) > 1e-4).all()


def test_the_state_at_a_cut_is_that_of_the_history_up_to_it(encoder: Encoder) -> None:
    """Training reads states of many cuts from one pass; serving encodes the history up to the cut alone."""
    whole = make_features([9, 4])
    whole.gap_T[0] = 0  # no event before the first
    at_every_event = encoder(whole)
    assert at_every_event.shape == (13, encoder.config.state_tokens * 16)
    for end in (1, 5, 9):
        cut = encoder.states(whole.window(torch.tensor([0]), torch.tensor([end])))
        assert (at_every_event[end - 1] - cut[0]).abs().max() < 1e-5


def test_the_first_token_is_the_hidden_state_and_the_others_differ() -> None:
    encoder = make_tower(config=replace(SMALL, state_tokens=3))[0].encoder
    features = make_features([9])
    token_TmD = encoder(features).unflatten(-1, (3, -1))
    assert torch.equal(token_TmD[:, 0], encoder.with_keys_and_values(features)[0])
    for one, other in itertools.combinations(range(3), 2):
        assert (token_TmD[-1, one] - token_TmD[-1, other]).abs().max() > 0.1


def test_a_latent_token_reads_what_its_query_asks_for() -> None:
    """By hand: one token, one head, no rotation by distance (positions taken away), values the hidden states."""
    config = replace(SMALL, d_model=4, num_heads=1, state_tokens=2)
    latents = LatentTokens(config)
    packing = Packing.of(torch.tensor([0, 2]), 4, torch.zeros(2, dtype=torch.int64))
    packing = replace(packing, cos_Td=torch.ones(2, 1, 2), sin_Td=torch.zeros(2, 1, 2))
    hidden_TD = torch.tensor([[2.0, 0, 0, -2], [0, 4.0, -4, 0]])
    with torch.no_grad():
        latents.key_value.weight.copy_(torch.cat([torch.eye(4), torch.eye(4)]))
        latents.key_value.bias.zero_()
        latents.query.copy_(torch.tensor([[[np.log(3.0), 0, 0, 0]]]))
    token_TD = latents(hidden_TD, packing)
    # scores log 3 x 2 / sqrt(4) = log 3 and 0, so weights 3/4 and 1/4: [1.5, 1, -1, -1.5], mean 0, over its deviation
    deviation = ((1.5**2 + 1 + 1 + 1.5**2) / 4) ** 0.5
    assert token_TD[1].tolist() == pytest.approx([x / deviation for x in (1.5, 1, -1, -1.5)], abs=1e-4)
    assert token_TD[0].tolist() == pytest.approx([2**0.5, 0, 0, -(2**0.5)], abs=1e-4)  # only the first event yet


@pytest.mark.parametrize("field", ["item_T", "type_T", "gap_T", "column_TC"])
def test_every_event_field_moves_the_state(field: str) -> None:
    encoder = make_tower()[0].encoder
    features = make_features([6])
    before = encoder.states(features)
    getattr(features, field)[2] = (getattr(features, field)[2] + 1) % 4
    assert (before - encoder.states(features)).abs().max() > 1e-5


def test_a_user_without_events_has_no_state() -> None:
    encoder = make_tower()[0].encoder
    for lengths in ([3, 0, 2], []):
        with pytest.raises(ShapeError, match="at least one event"):
            encoder.states(make_features(lengths))


def test_keys_and_values_come_from_every_layer(encoder: Encoder) -> None:
    hidden, layers = encoder.with_keys_and_values(make_features([4, 3]))
    assert hidden.shape == (7, 16)
    assert [(key.shape, value.shape) for key, value in layers] == [((7, 2, 8), (7, 2, 8))] * 2


def test_an_item_never_trained_on_is_known_by_its_hash_row() -> None:
    embedder = make_tower()[0].items.embedder
    trained = torch.ones(50, dtype=torch.bool)
    trained[7] = False
    before = embedder(torch.arange(50))
    embedder.use_hash_rows(trained)
    after = embedder(torch.arange(50))
    same = (before == after).all(-1)
    assert same.tolist() == trained.tolist()
    hash_row = embedder.hash_row_I[7]
    assert torch.equal(embedder.id_row_I[7], hash_row)
    with pytest.raises(ShapeError, match=r"\[50\]"):
        embedder.use_hash_rows(trained[:3])
