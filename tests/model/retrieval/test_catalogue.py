"""Rows of a catalogue: bits, groups and attributes of the columns that a description names for rules."""

import math

import pyarrow as pa
import pytest
import torch

from model.dataset import DatasetDescription
from model.errors import ConfigError, DataError
from model.item_index import ItemIndex
from model.retrieval import catalogue as catalogue_module
from model.retrieval.catalogue import catalogue_rows
from tests.releases import make_description

RULES = {
    "category": "genres", "language": "brand", "main_category": "brand", "advertiser": "brand", "attributes": ["price"],
}  # fmt: skip
TABLE = pa.table(
    {
        "item_id": [5, 6, 7],
        "genres": pa.array([["b", "a"], None, ["c", None]], pa.list_(pa.string())),
        "brand": ["y", None, "x"],
        "price": pa.array([1.5, None, 2.0]),
    }
)
SNAPSHOT = ItemIndex("v", TABLE["item_id"].combine_chunks(), torch.eye(3))


def described(rules: dict[str, object]) -> DatasetDescription:
    return DatasetDescription.from_dict(make_description().to_dict() | {"item_rules": rules})


def test_rows_by_hand() -> None:
    rows, names = catalogue_rows(SNAPSHOT, described(RULES), TABLE)
    assert names.values == {
        "category": ["a", "b", "c"], "language": ["x", "y"], "main_category": ["x", "y"], "advertiser": ["x", "y"],
    }  # fmt: skip
    assert rows.mask_RW.tolist() == [[0b011, 0, 0b10], [0, 0, 0], [0b100, 0, 0b01]]
    assert rows.category_R.tolist() == rows.advertiser_R.tolist() == [1, -1, 0]
    assert rows.attribute_RA[[0, 2], 0].tolist() == [1.5, 2.0]
    assert math.isnan(rows.attribute_RA[1, 0])
    assert (rows.bid_R.tolist(), rows.budget_R.tolist(), rows.eligible_R.tolist()) == ([1] * 3, [0] * 3, [True] * 3)
    assert torch.equal(rows.feature_RF, torch.eye(3))


def test_more_values_than_a_word_holds() -> None:
    values = [f"g{n:03}" for n in range(130)]
    table = pa.table({"item_id": range(130), "genres": [[v] for v in values]})
    snapshot = ItemIndex("v", table["item_id"].combine_chunks(), torch.zeros(130, 2))
    rows, _ = catalogue_rows(snapshot, described({"category": "genres"}), table)
    assert rows.layout.words == (3, 1, 1)
    assert rows.mask_RW[63].tolist() == [-(2**63), 0, 0, 0, 0]
    assert rows.mask_RW[64].tolist() == [0, 1, 0, 0, 0]
    assert rows.mask_RW[129].tolist() == [0, 0, 2, 0, 0]


def test_too_many_values_and_other_items(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="same items in the same order"):
        catalogue_rows(SNAPSHOT, described(RULES), TABLE.slice(1))
    monkeypatch.setattr(catalogue_module, "MAX_VALUES", 2)
    with pytest.raises(DataError, match=r"item_rules\.category may have at most 2 values, column genres has 3"):
        catalogue_rows(SNAPSHOT, described(RULES), TABLE)


def test_without_rules_nothing_is_known() -> None:
    rows, names = catalogue_rows(SNAPSHOT, make_description(), TABLE)
    assert (names.values, names.attributes, rows.layout.attributes, rows.layout.words) == ({}, (), 0, (1, 1, 1))
    assert rows.category_R.tolist() == rows.advertiser_R.tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"colour": "brand"}, "item_rules has no field colour"),
        ({"category": "price"}, "item_rules.category must be of item_columns, of kind category or categories"),
        ({"advertiser": "genres"}, "item_rules.advertiser must be .* of kind category, got 'genres'"),
        ({"attributes": "price"}, "item_rules.attributes must be a list"),
        ({"attributes": ["weight"]}, "item_rules.attributes must be .* got 'weight'"),
        ("genres", "item_rules must map"),
    ],
)
def test_rules_that_are_none(rules: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        described(rules)


def test_a_description_with_rules_survives_its_file_and_one_without_is_as_before() -> None:
    description = described(RULES)
    assert DatasetDescription.from_dict(description.to_dict()) == description
    assert "item_rules" not in make_description().to_dict()
