"""The stored studies: their figures follow from their matrices, are the recorded ones, and can be drawn."""

import json

import numpy as np
import pytest

from benchmarks.results import FOLDER
from benchmarks.skew import SHORT, STUDIES, entries
from model.errors import ConfigError
from model.skew import losses, pairs_of
from model.training.plots import draw_bridge, draw_skew


def read(short):
    return {name: json.loads((FOLDER / "studies" / f"{name}-{short}.json").read_text()) for name in STUDIES}


@pytest.mark.parametrize("short", SHORT.values())
def test_the_sensitivity_follows_from_the_matrix(short):
    for family in ("run", "seeds"):
        study = read(short)[f"skew-{family}"]
        recall_EHI = np.array(study["recall"])
        found = losses(recall_EHI, pairs_of(family, len(recall_EHI)))
        assert study["sensitivity"]["value"] == pytest.approx(found.mean(), abs=2e-5)
        assert list(study["sensitivity"]["by_part"].values()) == pytest.approx(found.mean(0).tolist(), abs=2e-5)


@pytest.mark.parametrize("short", SHORT.values())
def test_a_bridge_is_on_only_where_both_gains_are_sure(short):
    for name in STUDIES[2:]:
        study = read(short)[name]
        assert study["is_enabled"] == all(gain["low"] > 0 for gain in study["gain"].values())


@pytest.mark.parametrize("short", SHORT.values())
def test_the_figures_are_recorded(short):
    recorded = {entry["measure"]: entry for entry in json.loads((FOLDER / "versions.json").read_text())}
    for entry in entries(short, read(short)):
        assert {name: recorded[entry["measure"]].get(name) for name in entry} == entry


def test_studies_are_drawn_as_svg_or_png(tmp_path):
    studies = read("ml1m")
    draw_skew(studies["skew-seeds"], tmp_path / "skew.svg")
    draw_bridge(studies["bridge-early"], tmp_path / "bridge.png")
    assert ".423" in (tmp_path / "skew.svg").read_text()  # seed 0, unmixed
    assert (tmp_path / "bridge.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png or \.svg, got x\.pdf"):
        draw_skew(studies["skew-seeds"], tmp_path / "x.pdf")
