"""The report on real catalogues: its scores, and that it says what shards change."""

import pytest
import torch

from benchmarks.dial import DATA, entries, numbered, pure_svd, report


def test_values_are_numbered_in_their_order() -> None:
    assert numbered(["b", None, "a", "b"]).tolist() == [1, -1, 0, 1]


def test_pure_svd_gives_a_matrix_of_its_rank_back() -> None:
    """Two groups of users with tastes of their own: rank 2."""
    seen = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    users, items = pure_svd(seen, 2)
    assert torch.allclose(users @ items.T, seen, atol=1e-5)


@pytest.mark.skipif(not (DATA / "online-retail").exists(), reason="no data sets beside the checkout")
def test_ranges_crowd_the_slates_of_shards() -> None:
    """A cap of 4 for the page is a cap of 4 for each shard."""
    found = report("online-retail", DATA, 20, (1, 8))
    alone, local, best = found[1][0], found[8][0], found[8][-1]
    assert alone.overlap == best.overlap == 1
    assert best.largest_advertiser <= 0.04 + 1e-6
    assert local.largest_advertiser > best.largest_advertiser
    assert local.overlap < 1
    assert local.advertiser_shift > 0 == best.advertiser_shift
    assert entries("online-retail", found)[1]["rival_value"] == round(best.largest_advertiser, 4)
