"""The undivided model: encoder, context head and item tower joined, for training and for parity checks."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from model.config import TowerConfig
from model.context_head import ContextHead
from model.dataset import DatasetDescription
from model.encoder import Encoder
from model.features import Featuriser, Vocabularies
from model.item_tower import ItemEmbedder, ItemShape, ItemTower, build_item_embedder
from model.records import Context
from model.state_codec import StateCodec, as_stored


def _sizes(vocabularies: Vocabularies, columns: Sequence[str]) -> list[int]:
    return [len(vocabularies.columns[name]) + 2 for name in columns]


def build_encoder(featuriser: Featuriser, embedder: ItemEmbedder) -> Encoder:
    """An encoder of the shape that the featuriser's vocabularies and config ask for."""
    types = len(featuriser.vocabularies.event_types) + 2
    return Encoder(
        featuriser.config, embedder, types, _sizes(featuriser.vocabularies, featuriser.event_columns)
    )  # fmt: skip


def build_head(featuriser: Featuriser) -> ContextHead:
    """A head of the shape that the featuriser's vocabularies and config ask for."""
    types = len(featuriser.vocabularies.event_types) + 2
    return ContextHead(featuriser.config, types, _sizes(featuriser.vocabularies, featuriser.head_columns))


class HybridTower(nn.Module):
    """Encoder, head and item tower. In training the encoder and the item tower share one item embedder."""

    def __init__(self, featuriser: Featuriser, encoder: Encoder, head: ContextHead, items: ItemTower) -> None:
        super().__init__()
        self.featuriser = featuriser
        self.encoder = encoder
        self.head = head
        self.items = items

    @classmethod
    def build(
        cls, config: TowerConfig, description: DatasetDescription, vocabularies: Vocabularies, items: pa.Table
    ) -> "HybridTower":
        """A fresh tower with shared item embedder.

        items: item_id and the declared item columns, in any order; rows are numbered by ascending item_id.
        """
        items = items.sort_by("item_id")
        featuriser = Featuriser(description, vocabularies, items["item_id"].combine_chunks(), config)
        embedder = build_item_embedder(config, description, featuriser, items)
        return cls(featuriser, build_encoder(featuriser, embedder), build_head(featuriser), ItemTower(config, embedder))

    @classmethod
    def empty(cls, featuriser: Featuriser, shape: ItemShape) -> "HybridTower":
        """A tower to load weights into: encoder and item tower each with an embedder of its own."""
        config = featuriser.config
        return cls(
            featuriser,
            build_encoder(featuriser, ItemEmbedder(config, shape)),
            build_head(featuriser),
            ItemTower(config, ItemEmbedder(config, shape)),
        )

    @torch.inference_mode()
    def embed(
        self, table: pa.Table, offsets: NDArray[np.int64], contexts: Sequence[Context]
    ) -> NDArray[np.float32]:  # fmt: skip
        """User embeddings straight from histories, undivided: what the split pipeline must equal.

        A codec rounds the states here as it does in the store.

        table, offsets: packed histories as Featuriser.events takes them, B users, each with at least one event.
        contexts: one a user. Returns f32 [B, E].
        """
        self.eval()
        device = self.head.cold_state_D.device
        events = self.featuriser.events(table, offsets).latest(self.featuriser.config.history_limit)
        states = self.encoder.states(events.to(device)).cpu().numpy()
        state_BD = torch.from_numpy(as_stored(StateCodec.of(self.featuriser.config), states)).to(device)
        until_us = events.time_us_T[events.offsets[1:] - 1].tolist()
        context = self.featuriser.contexts(contexts, until_us).to(device)
        embedding: NDArray[np.float32] = self.head(state_BD, context, self.items.table()).cpu().numpy()
        return embedding
