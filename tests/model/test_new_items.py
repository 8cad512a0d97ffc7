"""New items are embedded as the item tower would embed them, had it had them from the beginning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.errors import DataError
from model.new_items import embed_items
from model.release import Registry, Release
from tests.releases import SMALL, make_items, make_release


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """All unknown items share one hash row, so an item's id does not matter where it is unknown."""
    manifest = make_release(tmp_path, seed=3, config=replace(SMALL, hash_rows=1))
    return Registry(tmp_path).load(manifest.release_id)


@pytest.fixture
def catalogue(release: Release, tmp_path: Path) -> pa.Table:
    return Registry(tmp_path).catalogue(release.manifest.release_id)


def test_items_of_the_catalogue_come_out_as_its_rows(release: Release, catalogue: pa.Table) -> None:
    assert release.item_table is not None
    order = np.random.default_rng(0).permutation(50)
    found = embed_items(release, catalogue, catalogue.take(order))
    np.testing.assert_allclose(found, release.item_table[order].numpy(), atol=1e-6)
    before = release.items.table()
    torch.testing.assert_close(before, release.item_table), "the release is as it was"


def test_a_new_item_is_the_catalogues_item_without_its_id(release: Release, catalogue: pa.Table) -> None:
    """Index i + I is item i known by its hash row alone."""
    renamed = catalogue.set_column(0, "item_id", pa.array(range(1000, 1050)))
    unknown = release.items(torch.arange(50) + release.items.embedder.num_rows).numpy()
    np.testing.assert_allclose(embed_items(release, catalogue, renamed), unknown, atol=1e-6)


def test_values_that_the_catalogue_lacks_are_left_out(release: Release, catalogue: pa.Table) -> None:
    def item(genres: list[str], brand: str | None) -> pa.Table:
        kinds = {"genres": pa.list_(pa.string()), "brand": pa.string(), "price": pa.float64()}
        values = {"genres": [genres], "brand": [brand], "price": [0.5]}
        return pa.table({"item_id": [7], **{name: pa.array(v, kinds[name]) for name, v in values.items()}})

    pairs = [item(["news"], None), item(["opera", "news"], "nobody"), item(["sport"], None)]
    plain, odd, other = (embed_items(release, catalogue, each)[0] for each in pairs)
    np.testing.assert_allclose(odd, plain, atol=1e-6)
    assert np.abs(other - plain).max() > 1e-3


def test_a_missing_column_is_named(release: Release, catalogue: pa.Table) -> None:
    with pytest.raises(DataError, match="missing: price"):
        embed_items(release, catalogue, make_items(3).drop_columns(["price"]))
