"""What a trained scorer reads of an item besides its embedding, and an index made of a release.

Scalars are counts of the log as of a time, so an index holds them as values that updates bring up to date (an upsert,
every `ScorerConfig.bucket_s` seconds); training and evaluation count as of the same instants.
"""

from dataclasses import replace
from typing import Any

import torch

from model.config import TowerConfig
from model.errors import ConfigError, ShapeError
from model.live_items import LiveCounts
from model.release import Release
from model.retrieval.index import LiveIndex
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.scorer import DotScorer, ScorerConfig

_SCALE = 4.0
"""Divides logarithms of counts, to about 1."""


def counting_config(config: ScorerConfig, tower: TowerConfig) -> TowerConfig:
    """The tower's config with the scorer's windows and bucket: what LiveCounts is built with to count its scalars."""
    return replace(tower, live_windows_h=config.windows_h, live_bucket_s=config.bucket_s)


def item_scalars(counts: LiveCounts, item: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
    """Scalars of items as of buckets: f32 [..., S], values of order 1.

    counts: built with `counting_config`. item: i64 in [0, I). bucket: i64, of a shape that broadcasts to it. For each
    window and for the whole past: log(1 + count) and log((1 + count) / (1 + count of all items)); then whether the item
    has had an event, and log(1 + buckets since the first); all divided by 4.
    """
    return scaled(counts.item_features(item, bucket))


def scaled(feature: torch.Tensor) -> torch.Tensor:
    """Scalars of `LiveCounts.item_features`."""
    return feature / _SCALE


class CatalogueScalars:
    """Scalars of a whole catalogue as of buckets: each bucket is counted once and kept, up to a bound.

    Requests come in the same few buckets again and again: at every ranking of the held-out events, for every scorer.
    """

    def __init__(self, counts: LiveCounts, num_items: int, *, most_values: int = 2**28) -> None:
        """counts: built with `counting_config`, on the device of the scalars. most_values: most that are kept."""
        self.counts = counts
        self._item_N = torch.arange(num_items, device=counts.item_P.device)
        self._most_values = most_values
        self._kept: dict[int, torch.Tensor] = {}

    def of(self, bucket_G: list[int]) -> torch.Tensor:
        """Scalars of every item as of buckets: f32 [G, N, S], as `item_scalars`. Buckets that are new are counted at
        once. bucket_G: at least one."""
        new = [bucket for bucket in dict.fromkeys(bucket_G) if bucket not in self._kept]
        found = self._kept
        if new:
            bucket_G1 = torch.tensor(new, device=self._item_N.device)[:, None]
            counted = item_scalars(self.counts, self._item_N.expand(len(new), -1), bucket_G1)
            found = self._kept | dict(zip(new, counted, strict=True))
            if len(found) * counted[0].numel() <= self._most_values:
                self._kept = found
        return torch.stack([found[bucket] for bucket in bucket_G])


def item_rows(release: Release, scalar_NS: torch.Tensor | None = None) -> ItemRows:
    """A release's catalogue as rows of an index, of its embedding_version; no masks, caps or bids yet.

    scalar_NS: f32 [N, S], in the order of the catalogue, where the release has a scorer that reads them.
    Raises ShapeError for other scalars than the scorer reads, ConfigError for a release with live item features.
    """
    config, scorer = release.config, release.manifest.scorer
    if config.live_windows_h:
        raise ConfigError(f"release {release.manifest.release_id} scores live item features; an index cannot hold them")
    wanted = release.featuriser.num_items, 0 if scorer is None else scorer.scalars
    if scalar_NS is None:
        scalar_NS = torch.zeros(wanted[0], 0)
    if tuple(scalar_NS.shape) != wanted:
        raise ShapeError(f"scalars must have shape {list(wanted)}, got {list(scalar_NS.shape)}")
    assert release.item_table is not None, "the items part is loaded"
    return ItemRows.build(
        release.manifest.embedding_version,
        Layout(embedding_dim=config.embedding_dim, scalars=wanted[1]),
        release.featuriser.item_ids.to_pylist(),
        release.item_table[: wanted[0]].cpu(),
        scalar_RS=scalar_NS.cpu(),
    )


def live_index(
    release: Release, scalar_NS: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float32, device: Any = "cpu",
    users: torch.Tensor | None = None,
) -> LiveIndex:  # fmt: skip
    """An index of a release's catalogue, scored by its scorer, or by the dot product where it has none.

    dtype, users: as in LiveIndex.
    """
    scorer = DotScorer() if release.manifest.scorer is None else release.scorer
    return LiveIndex(item_rows(release, scalar_NS), scorer, dtype=dtype, device=device, users=users)
