"""A release's head, unrolled for serving.

`Release.embed` runs the module that was trained: some sixty small operators, each with a price of its own, which is
most of what a request costs. Here the same arithmetic is laid out for a handful of rows: weights transposed and joined
once at load, the embedding tables of the context in one table, absent parts skipped, numpy where a call is cheaper
than the operator. The featuriser is the release's own.

Two implementations of one head may drift apart, so `ServingHead` compares itself with `Release.embed` when it is built
and refuses to exist if they differ.

Legend: B requests, D width of a token, W = m x D width of a state of m tokens, E embedding width, C context width,
K session limit, M subject limit, J = D + 2C joined width, H hidden width, R rows of the joined context tables,
I item rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.errors import GoldenMismatch
from model.features import GAP_BUCKETS, HOURS, WEEKDAYS, ContextArrays
from model.records import Context, Event, Id, SubjectItem
from model.release import Release

TOLERANCE = 1e-5
"""Largest |difference| to `Release.embed`; both are float32 and of length 1, and differ by about 1e-7."""

Floats = NDArray[np.float32]

_ONE = np.float32(1.0)
_SHORTEST = np.float32(1e-12)
"""Least length to divide by, as in torch's normalize."""


def _array(tensor: torch.Tensor) -> Floats:
    array: Floats = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array


def _centred(array: Floats) -> Floats:
    """Less the mean over its last axis."""
    centred: Floats = array - array.mean(-1, keepdims=True)
    return centred


class ServingHead:
    """What `Release.embed` computes, at a fraction of the cost for small batches on one core.

    Raises GoldenMismatch when built from a release whose `embed` gives other results.
    """

    def __init__(self, release: Release) -> None:
        head = release.head
        assert release.item_table is not None, "the service loads the items part"
        self._featuriser = release.featuriser
        self._config = config = release.config
        self.cold_state: Floats = release.cold_state
        self._item_IE = _array(release.item_table)

        # All that a product reads stands in one row: pooled events, last event, state, session, context.
        ends = np.cumsum([config.embedding_dim] * 2 + [config.d_model] + [config.context_dim] * 2).tolist()
        pooled, last, state, session, context = map(slice, [0, *ends], ends)
        self._width = ends[-1]
        self._pooled, self._last, self._state, self._session, self._context = pooled, last, state, session, context
        self._events, self._asking = slice(0, last.stop), slice(last.start, state.stop)
        self._parts, self._joined = slice(session.start, context.stop), slice(state.start, context.stop)

        # Both layer norms begin by taking the mean away. That is linear, so it happens here, to all that is summed up:
        # the tables, weights and biases of the context and of the session.
        # Context: hour, weekday, age and the columns share one table; a row's codes are shifted to their part of it.
        tables = [head.hour_embedding, head.weekday_embedding, head.age_embedding, *head.column_embeddings]
        sizes = [table.weight.shape[0] for table in tables]
        assert sizes[:3] == [HOURS, WEEKDAYS, GAP_BUCKETS]
        self._table_RC = _centred(np.concatenate([_array(table.weight) for table in tables]))
        self._shift = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)
        self._subject_EC = _centred(_array(head.subject.weight.T))
        self._query_QC = None if head.query is None else _centred(_array(head.query.weight.T))

        # Session: an event is scale * (item + (type + gap) / scale). Type and gap share one table, and the scale goes
        # into the weights that read events.
        layer = head.session
        scale = np.float32(layer.scale)
        types, gaps = _array(layer.type_embedding.weight), _array(layer.gap_embedding.weight)
        self._type_gap = ((types[:, None] + gaps[None]) / scale).reshape(-1, types.shape[1])
        weight = _array(layer.query.weight.T)
        self._asking_weight = np.concatenate([weight[config.d_model :] * scale, weight[: config.d_model]])
        self._asking_bias = _array(layer.query.bias)
        weight = _centred(_array(layer.out.weight.T)) * scale
        self._events_weight = np.concatenate([weight[config.embedding_dim :], weight[: config.embedding_dim]])
        self._events_bias = _centred(_array(layer.out.bias))

        # The hidden layer and the short cut read the same input: one product. The gains and biases of the two layer
        # norms before it go into its weights, and so does the root of C: x / sqrt(sum(x^2) + C e) is left to do.
        norms = head.session_norm, head.context_norm
        self._epsilon = np.float32(norms[0].eps * config.context_dim)
        joined_JN = _array(torch.cat([head.hidden.weight, head.shortcut.weight]).T).copy()
        bias_N = np.concatenate([_array(head.hidden.bias), _array(head.out.bias)])
        normed = joined_JN[config.d_model :]
        bias_N += np.concatenate([_array(norm.bias) for norm in norms]) @ normed
        gain_G1 = np.concatenate([_array(norm.weight) for norm in norms])[:, None] * np.float32(config.context_dim**0.5)
        normed *= gain_G1
        self._joined_JN, self._joined_bias_N = joined_JN, bias_N

        # The query that reads the tokens takes the same row, so its weights take the gains and biases alike.
        self._ask_JD: Floats | None = None
        if head.fusion is not None:
            ask_JD, bias_D = _array(head.fusion.ask.weight.T).copy(), _array(head.fusion.ask.bias).copy()
            bias_D += np.concatenate([_array(norm.bias) for norm in norms]) @ ask_JD[config.d_model :]
            ask_JD[config.d_model :] *= gain_G1
            token_scale = np.float32(head.fusion.scale)
            self._ask_JD, self._ask_bias_D = ask_JD * token_scale, bias_D * token_scale
            self._give_DD, self._give_bias_D = _array(head.fusion.give.weight.T), _array(head.fusion.give.bias)
        self._hidden = head.hidden.weight.shape[0]
        self._out_HE = _array(head.out.weight.T)
        self._has_live = head.live is not None
        if head.live is not None:  # a weight of the E values, and what stands behind them, not normalised
            scale_L = np.array([1.0] + config.live_width * [config.temperature], np.float32)
            self._live_HL = _array(head.live.weight.T) * scale_L
            self._live_bias_L = _array(head.live.bias) * scale_L
        self._check(release)

    def embed(self, states: Floats, contexts: Sequence[Context], history_until_us: Sequence[int | None]) -> Floats:
        """As `Release.embed`: f32 [B, W] to f32 [B, E], L2-normalised, or [B, E + L] with live item features."""
        features = self._featuriser.context_arrays(contexts, history_until_us)
        size = len(states)
        row = np.empty((size, self._width), np.float32)
        row[:, self._state] = states[:, : self._config.d_model]
        self._write_session(features, row)
        self._write_context(features, row)
        parts_B2C = row[:, self._parts].reshape(size, 2, -1)  # a view
        square_B2 = np.vecdot(parts_B2C, parts_B2C)
        square_B2 += self._epsilon
        parts_B2C /= np.sqrt(square_B2, square_B2)[..., None]
        if self._ask_JD is not None:
            self._fuse_tokens(states, self._ask_JD, row)
        product_BN = row[:, self._joined] @ self._joined_JN
        product_BN += self._joined_bias_N
        hidden_BH = F.gelu(torch.from_numpy(product_BN[:, : self._hidden])).numpy()
        embedding_BE: Floats = hidden_BH @ self._out_HE
        embedding_BE += product_BN[:, self._hidden :]
        length_B = np.sqrt(np.vecdot(embedding_BE, embedding_BE))
        embedding_BE /= np.maximum(length_B, _SHORTEST)[:, None]
        if not self._has_live:
            return embedding_BE
        live_BL = hidden_BH @ self._live_HL + self._live_bias_L
        return np.concatenate([embedding_BE * live_BL[:, :1], live_BL[:, 1:]], 1)

    def _write_context(self, features: ContextArrays, row: Floats) -> None:
        """Writes the context's vector, less its mean."""
        out_BC = row[:, self._context]
        np.add.reduce(self._table_RC.take(features.code_BF + self._shift, 0), 1, out=out_BC)
        weight_BM = features.subject_weight_BM
        if np.count_nonzero(weight_BM):
            item_BME = self._item_IE.take(features.subject_item_BM, 0)
            weight_BM /= np.maximum(np.add.reduce(weight_BM, 1, keepdims=True), _ONE)
            out_BC += (weight_BM[:, None] @ item_BME)[:, 0] @ self._subject_EC
        if self._query_QC is not None:
            out_BC += features.query_BQ @ self._query_QC

    def _write_session(self, features: ContextArrays, row: Floats) -> None:
        """Writes the session's vector, less its mean, and what it is made of; zeros where the session is empty."""
        length_B = features.session_length_B
        lengths = length_B.tolist()
        longest = max(lengths)
        if not longest:
            row[:, self._session] = 0.0
            return
        item_BK, type_BK, gap_BK = features.session_3BK[:, :, :longest]
        event_BKE = self._item_IE.take(item_BK, 0)
        event_BKE += self._type_gap.take(type_BK * GAP_BUCKETS + gap_BK, 0)
        is_ragged = min(lengths) < longest
        if is_ragged:
            row[:, self._last] = event_BKE[np.arange(len(lengths)), np.maximum(length_B - 1, 0)]
        else:
            row[:, self._last] = event_BKE[:, -1]
        query_BE = row[:, self._asking] @ self._asking_weight
        query_BE += self._asking_bias
        score_BK = (event_BKE @ query_BE[:, :, None])[:, :, 0]
        if is_ragged:
            score_BK[np.arange(longest) >= length_B[:, None]] = -1e9
        score_BK -= np.maximum.reduce(score_BK, 1, keepdims=True)
        np.exp(score_BK, score_BK)
        score_BK /= np.add.reduce(score_BK, 1, keepdims=True)
        np.matmul(score_BK[:, None], event_BKE, out=row[:, None, self._pooled])
        out_BC = row[:, self._session]
        np.matmul(row[:, self._events], self._events_weight, out=out_BC)
        out_BC += self._events_bias
        if is_ragged:
            out_BC *= (length_B > 0)[:, None]

    def _fuse_tokens(self, states: Floats, ask_JD: Floats, row: Floats) -> None:
        """Adds to the last token what the query reads from all of them."""
        token_BmD = states.reshape(len(states), -1, self._config.d_model)
        query_BD: Floats = row[:, self._joined] @ ask_JD
        query_BD += self._ask_bias_D
        weight_Bm = (token_BmD @ query_BD[:, :, None])[:, :, 0]
        weight_Bm -= np.maximum.reduce(weight_Bm, 1, keepdims=True)
        np.exp(weight_Bm, weight_Bm)
        weight_Bm /= np.add.reduce(weight_Bm, 1, keepdims=True)
        out_BD = row[:, self._state]
        out_BD += (weight_Bm[:, None] @ token_BmD)[:, 0] @ self._give_DD
        out_BD += self._give_bias_D

    def _check(self, release: Release) -> None:
        """Compare with `Release.embed` on contexts with every part present and absent."""
        random = np.random.default_rng(0)
        states = random.standard_normal((24, self._config.state_width)).astype(np.float32)
        contexts = [_random_context(random, release, row) for row in range(len(states))]
        until_us = [None if row % 3 == 0 else _TIME_US - row * 7_000_000 for row in range(len(states))]
        wanted = release.embed(states, contexts, until_us)
        batched = self.embed(states, contexts, until_us)
        single = np.concatenate(
            [self.embed(states[b : b + 1], [contexts[b]], [until_us[b]]) for b in range(len(states))]
        )
        difference = max(float(np.abs(found - wanted).max()) for found in (batched, single))
        if not difference <= TOLERANCE:
            raise GoldenMismatch(
                f"release {release.manifest.release_id}: the serving head differs from Release.embed by "
                f"{difference:.2g}, more than {TOLERANCE:g}"
            )


_TIME_US = 1_700_000_000_000_000


def _random_context(random: np.random.Generator, release: Release, row: int) -> Context:
    featuriser = release.featuriser
    ids = featuriser.item_ids
    types = featuriser.vocabularies.event_types

    def item() -> Id:
        known: Id = ids[int(random.integers(len(ids)))].as_py()
        return known if random.random() < 0.8 else ("no such item" if isinstance(known, str) else -1)

    features = {}
    for name in featuriser.head_columns:
        values = (*featuriser.vocabularies.columns[name], "no such value")
        if random.random() < 0.7:
            features[name] = values[int(random.integers(len(values)))]
    lengths = range(release.config.session_limit + 2)
    session = tuple(
        Event(item(), types[int(random.integers(len(types)))], _TIME_US - 60_000_000 + k)
        for k in range(int(random.choice(lengths)) if row % 4 else 0)
    )
    subjects = tuple(SubjectItem(item(), float(random.random())) for _ in range(row % 4))
    dim = release.config.query_dim
    query = random.standard_normal(dim).astype(np.float32) if dim and row % 5 else None
    return Context(features, _TIME_US if row % 6 else None, session, subjects, query)
