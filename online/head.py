"""A release's head, unrolled for serving.

`Release.embed` runs the module that was trained: some sixty small operators, each with a price of its own, which is
most of what a request costs. Here the same arithmetic is laid out for a handful of rows: weights transposed and joined
once at load, the embedding tables of the context in one table, absent parts skipped, numpy where a call is cheaper
than the operator. The featuriser is the release's own.

Two implementations of one head may drift apart, so `ServingHead` compares itself with `Release.embed` when it is built
and refuses to exist if they differ.

Legend: B requests, D state width, E embedding width, C context width, K session limit, M subject limit,
J = D + 2C joined width, W hidden width, R rows of the joined context tables, I item rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.errors import GoldenMismatch
from model.features import GAP_BUCKETS, HOURS, WEEKDAYS, ContextFeatures
from model.records import Context, Event, Id, SubjectItem
from model.release import Release

TOLERANCE = 1e-5
"""Largest |difference| to `Release.embed`; both are float32 and of length 1, and differ by about 1e-7."""

Floats = NDArray[np.float32]


def _array(tensor: torch.Tensor) -> Floats:
    array: Floats = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array


class ServingHead:
    """What `Release.embed` computes, at a fraction of the cost for small batches on one core.

    Raises GoldenMismatch when built from a release whose `embed` gives other results.
    """

    def __init__(self, release: Release) -> None:
        head = release.head
        assert release.item_table is not None, "the service loads the items part"
        self._featuriser = release.featuriser
        self._config = release.config
        self.cold_state: Floats = release.cold_state
        self._item_IE = _array(release.item_table)

        # Context: hour, weekday, age and the columns share one table; a row's codes are shifted to their part of it.
        tables = [head.hour_embedding, head.weekday_embedding, head.age_embedding, *head.column_embeddings]
        sizes = [table.weight.shape[0] for table in tables]
        assert sizes[:3] == [HOURS, WEEKDAYS, GAP_BUCKETS]
        self._table_RC = np.concatenate([_array(table.weight) for table in tables])
        self._shift = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)
        self._subject_EC = _array(head.subject.weight.T)
        self._query_QC = None if head.query is None else _array(head.query.weight.T)

        # Session.
        session = head.session
        self._scale = np.float32(session.scale)
        self._type_embedding = _array(session.type_embedding.weight)
        self._gap_embedding = _array(session.gap_embedding.weight)
        self._session_query = _array(session.query.weight.T), _array(session.query.bias)
        self._session_out = _array(session.out.weight.T), _array(session.out.bias)

        # Both layer norms as one of shape [2, C].
        norms = head.session_norm, head.context_norm
        self._epsilon = np.float32(norms[0].eps)
        self._gain_2C = np.stack([_array(norm.weight) for norm in norms])
        self._bias_2C = np.stack([_array(norm.bias) for norm in norms])

        # The hidden layer and the short cut read the same input: one product.
        self._hidden = head.hidden.weight.shape[0]
        self._joined_JN = _array(torch.cat([head.hidden.weight, head.shortcut.weight]).T)
        self._joined_bias_N = np.concatenate([_array(head.hidden.bias), _array(head.out.bias)])
        self._out_WE = _array(head.out.weight.T)
        self._check(release)

    def embed(self, states: Floats, contexts: Sequence[Context], history_until_us: Sequence[int | None]) -> Floats:
        """As `Release.embed`: f32 [B, D] to f32 [B, E], L2-normalised."""
        features = self._featuriser.contexts(contexts, history_until_us)
        size, width = states.shape
        context_dim = self._config.context_dim
        parts_B2C = np.empty((size, 2, context_dim), np.float32)
        parts_B2C[:, 0] = self._session(states, features)
        parts_B2C[:, 1] = self._context(features)
        parts_B2C -= parts_B2C.mean(-1, keepdims=True)
        variance = np.einsum("bpc,bpc->bp", parts_B2C, parts_B2C) / np.float32(context_dim)
        parts_B2C *= (1.0 / np.sqrt(variance + self._epsilon))[..., None]
        parts_B2C *= self._gain_2C
        parts_B2C += self._bias_2C

        joined_BJ = np.empty((size, width + 2 * context_dim), np.float32)
        joined_BJ[:, :width] = states
        joined_BJ[:, width:] = parts_B2C.reshape(size, -1)
        product_BN = joined_BJ @ self._joined_JN
        product_BN += self._joined_bias_N
        hidden_BW = F.gelu(torch.from_numpy(product_BN[:, : self._hidden])).numpy()
        embedding_BE: Floats = hidden_BW @ self._out_WE
        embedding_BE += product_BN[:, self._hidden :]
        length_B = np.sqrt(np.einsum("be,be->b", embedding_BE, embedding_BE))
        embedding_BE /= np.maximum(length_B, np.float32(1e-12))[:, None]
        return embedding_BE

    def _context(self, features: ContextFeatures) -> Floats:
        category_BC = features.category_BC.numpy()
        code = np.empty((len(category_BC), 3 + category_BC.shape[1]), np.int64)
        code[:, 0] = features.hour_B.numpy()
        code[:, 1] = features.weekday_B.numpy()
        code[:, 2] = features.age_B.numpy()
        code[:, 3:] = category_BC
        code += self._shift
        other_BC: Floats = self._table_RC[code].sum(1)
        weight_BM = features.subject_weight_BM.numpy()
        if weight_BM.any():
            subject_BE = np.einsum("bm,bme->be", weight_BM, self._item_IE[features.subject_item_BM.numpy()])
            subject_BE /= np.maximum(weight_BM.sum(-1, keepdims=True), np.float32(1.0))
            other_BC += subject_BE @ self._subject_EC
        if self._query_QC is not None:
            other_BC += features.query_BQ.numpy() @ self._query_QC
        return other_BC

    def _session(self, states: Floats, features: ContextFeatures) -> Floats | np.float32:
        length_B = features.session_length_B.numpy()
        longest = int(length_B.max(initial=0))
        if not longest:
            return np.float32(0.0)
        event_BKE = self._item_IE[features.session_item_BK.numpy()[:, :longest]]
        event_BKE *= self._scale
        event_BKE += self._type_embedding[features.session_type_BK.numpy()[:, :longest]]
        event_BKE += self._gap_embedding[features.session_gap_BK.numpy()[:, :longest]]
        last_BE = event_BKE[np.arange(len(length_B)), np.maximum(length_B - 1, 0)]
        weight, bias = self._session_query
        query_BE = np.concatenate([states, last_BE], -1) @ weight
        query_BE += bias
        score_BK = (event_BKE @ query_BE[:, :, None])[:, :, 0]
        score_BK /= self._scale
        score_BK[np.arange(longest) >= length_B[:, None]] = -1e9
        score_BK -= score_BK.max(-1, keepdims=True)
        np.exp(score_BK, out=score_BK)
        score_BK /= score_BK.sum(-1, keepdims=True)
        pooled_BE = (score_BK[:, None, :] @ event_BKE)[:, 0]
        weight, bias = self._session_out
        out_BC: Floats = np.concatenate([last_BE, pooled_BE], -1) @ weight
        out_BC += bias
        out_BC *= (length_B > 0)[:, None]
        return out_BC

    def _check(self, release: Release) -> None:
        """Compare with `Release.embed` on contexts with every part present and absent."""
        random = np.random.default_rng(0)
        states = random.standard_normal((24, self._config.d_model)).astype(np.float32)
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
