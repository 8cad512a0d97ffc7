"""The study of stored states: ratios by hand, the join of quality and bytes, and a plot."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.results import FOLDER
from benchmarks.state_size import CODECS, SHAPES, byte_entries, compare, draw, ratio_entry, table
from model.config import TowerConfig

BYTES = json.loads((FOLDER / "studies" / "state-bytes.json").read_text())


def study(int8: list[float]) -> dict[str, Any]:
    """A study whose int8 recalls are given by shape; float32's is 0.5, float16's 0.45."""
    shapes = []
    for (width, tokens), value in zip(SHAPES, int8, strict=True):
        recall = {"float32": 0.5, "float16": 0.45, "int8": value}
        spread = {codec: {"value": r, "low": r - 0.1, "high": r + 0.1} for codec, r in recall.items()}
        ratio = {codec: {name: x / 0.5 for name, x in found.items()} for codec, found in spread.items()}
        arm = {"recall": spread, "over_float32": ratio}
        shapes.append({"width": width, "tokens": tokens, "users": 7, "arms": {"context": arm, "no_context": arm}})
    made = {"hardware": "h", "versions": {}, "date": "2026-01-31"}
    return {"dataset": "ml-1m", "k": 20, "shapes": shapes, "made": made}


def test_recall_and_its_ratio_by_hand() -> None:
    user_B = np.array([1, 1, 2, 3])
    hits = {"float32": np.array([1.0, 1, 0, 0]), "float16": np.array([1.0, 1, 0, 0]), "int8": np.array([1.0, 0, 0, 0])}
    found = compare(hits, user_B)
    assert [found["recall"][codec]["value"] for codec in CODECS] == [0.5, 0.5, 0.25]
    assert [found["over_float32"][codec]["value"] for codec in CODECS] == [1, 1, 0.5]
    # paired: whoever is drawn, float16 finds what float32 finds
    assert set(found["over_float32"]["float32"].values()) <= {0.0, 1.0}
    assert found["over_float32"]["float16"] == found["over_float32"]["float32"]
    assert found["over_float32"]["int8"]["high"] == 0.5


def test_the_worst_ratio_is_recorded() -> None:
    entry = ratio_entry([study([0.5, 0.49, 0.5, 0.48, 0.5, 0.51]), study([0.5] * 6)])
    assert (entry["measure"], entry["value"]) == ("state.int8_over_fp32.recall@20", 0.96)
    assert entry["note"].startswith("ml-1m, 1 x 512: 0.4800 over 0.5000, 95 % interval of the ratio 0.7600 to 1.1600")


def test_quality_and_bytes_are_joined(tmp_path: Any) -> None:
    one = study([0.5, 0.49, 0.48, 0.47, 0.46, 0.45])
    lines = list(table([one], BYTES))
    assert len(lines) == 2 + len(SHAPES) * len(CODECS)
    assert lines[2].startswith("| 1 x 64 | float32 | ")
    assert lines[2].endswith(" | 0.5000 (0.4000 to 0.6000) |")
    draw([one], BYTES, tmp_path / "state-size.svg")
    assert "4 x 128" in (tmp_path / "state-size.svg").read_text()


def test_bytes_measured_in_redis_are_recorded() -> None:
    recorded = {entry["measure"]: entry for entry in json.loads((FOLDER / "quality.json").read_text())}
    for entry in byte_entries(BYTES):
        assert {name: recorded[entry["measure"]].get(name) for name in entry} == entry
    sizes = {(r["setting"], r["width"], r["tokens"], r["codec"]): r for r in BYTES["rows"]}
    assert len(sizes) == 2 * len(SHAPES) * len(CODECS)
    # A field of protobuf: 263 = 4 x 64 + 7, 131 = 2 x 64 + 3, 70 = 64 + 4 for the scale + 2
    default = [sizes[BYTES["settings"][0], TowerConfig().d_model, 1, codec]["state_bytes"] for codec in CODECS]
    assert default == pytest.approx([263, 131, 70])
