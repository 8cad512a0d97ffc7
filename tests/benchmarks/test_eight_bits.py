"""The benchmark of int8 and float8 rows, small: items around items, overlaps, records, without training a tower."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import eight_bits
from benchmarks.eight_bits import Trained, around, entries, main, shared, without_scalars
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.scorer import InteractionScorer


def make_rows(count: int) -> ItemRows:
    random = torch.Generator().manual_seed(0)
    item_NE = torch.nn.functional.normalize(torch.randn(count, 16, generator=random), dim=1)
    return ItemRows.build(
        "v",
        Layout(embedding_dim=16, scalars=2),
        list(range(count)),
        item_NE,
        scalar_RS=torch.rand(count, 2, generator=random),
    )


def test_items_around_lie_half_as_far_as_the_nearest_neighbour() -> None:
    """Two items at 90 degrees are 1.414 apart: noise of length .707, then brought to length 1 again."""
    rows = ItemRows.build("v", Layout(embedding_dim=64, scalars=1), [0, 1], torch.eye(2, 64), scalar_RS=[[7.0], [8.0]])
    made = around(rows, 2000, "cpu").feature_RF
    cosine = made[:, :64] @ torch.eye(2, 64).T
    assert torch.allclose(made[:, :64].norm(dim=1), torch.ones(2000), atol=1e-5)
    assert float(cosine.amax(1).mean()) == pytest.approx(1 / 1.5**0.5, abs=0.02)
    assert torch.equal(made[:, 64], 7.0 + cosine.argmax(1)), "scalars are those of the item it lies around"


def test_the_share_is_of_the_wanted_rows() -> None:
    assert shared(np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 2, 9], [5, 4, 6]])) == pytest.approx(2 / 3)


def test_records_are_of_what_there_is() -> None:
    found = {("46k", "mlp", "float8, to the nearest"): 0.9, ("46k", "mlp", "float8"): 0.97}
    (entry,) = entries(found, "told", 5)
    assert (entry["measure"], entry["value"]) == ("index.float8.mlp.46k.recall@1000", 0.97)
    assert entry["rival_value"] == 0.9
    found |= {("1M", "dot", "int8, to the nearest"): 0.98, ("1M", "dot", "int8"): 0.996}
    assert [entry["measure"] for entry in entries(found, "told", 5)][-1] == "index.int8.recall@1000"


def test_every_kind_is_compared_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, random = make_rows(500), torch.Generator().manual_seed(1)
    user_BE = torch.nn.functional.normalize(torch.randn(40, 16, generator=random), dim=1)

    def made(_: argparse.Namespace) -> Trained:
        torch.manual_seed(0)
        return Trained(rows, InteractionScorer(16, 2, hidden=(8, 8)), user_BE[:8], user_BE[8:], "told")

    monkeypatch.setattr(eight_bits, "trained", made)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--kept", str(tmp_path / "trained.pt")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("int8, to the nearest: 0.9") == 4
    assert "1M items, mlp, float8: " in printed
    kept = (tmp_path / "eight_bits.json").read_text()
    assert '"46k, dot, float32"' in kept
    assert '"1M, mlp, float32"' in kept
    assert without_scalars(rows).layout.scalars == 0

    monkeypatch.setattr(eight_bits, "trained", lambda _: pytest.fail("trained again"))
    assert main([*arguments, "--only", "mlp"]) == 0
    again = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert again == [line.partition(": ")[2] for line in printed.splitlines() if "mlp" in line]
