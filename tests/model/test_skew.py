"""What a skew study means: sensitivity by hand, slices, the warning both ways, where studies are kept."""

import subprocess
import sys

import numpy as np
import pytest

from model.errors import CheckpointError
from model.release import Registry
from model.skew import keep_study, losses, pairs_of, sensitivity, show, skew_warning, slices, study_name


def make_recall():
    """Two releases; own Recall .4 and .6, so .5 is what a mix of them loses from."""
    recall_EHI = np.zeros((2, 2, 2))
    recall_EHI[0, 0, 0], recall_EHI[1, 1, 1] = 0.4, 0.6
    recall_EHI[1, 0, 0], recall_EHI[0, 1, 1] = 0.3, 0.5  # another encoder: .4, a loss of .2
    recall_EHI[0, 1, 0], recall_EHI[1, 0, 1] = 0.45, 0.45  # another head: .45, a loss of .1
    recall_EHI[0, 0, 1], recall_EHI[1, 1, 0] = 0.0, 0.3  # another index: .15, a loss of .7
    return recall_EHI


def make_study(value=0.1, *, half=0.02, ids=("a", "b"), family="run", k=20, epochs=(1, 2)):
    return {
        "dataset": "test",
        "family": family,
        "k": k,
        "interval": "95 %, bootstrap over users",
        "requests": 4,
        "users": 3,
        "catalogue": 7,
        "seen_items": "kept",
        "releases": [
            {"release_id": name, "run": "r", "seed": 0, "epoch": epoch}
            for name, epoch in zip(ids, epochs, strict=True)
        ],
        "recall": make_recall().tolist(),
        "sensitivity": {
            "value": value,
            "low": value - half,
            "high": value + half,
            "by_part": {"encoder": 0.0, "head": 0.0, "index": 3 * value},
        },
    }  # fmt: skip


def test_sensitivity_by_hand():
    recall_EHI = make_recall()
    np.testing.assert_allclose(losses(recall_EHI, [(0, 1)]), [[0.2, 0.1, 0.7]])
    assert sensitivity(recall_EHI, [(0, 1)]) == pytest.approx(1 / 3)
    doubled = np.stack([recall_EHI, 2 * recall_EHI])  # a loss is relative
    np.testing.assert_allclose(sensitivity(doubled, [(0, 1)]), [1 / 3, 1 / 3])


def test_releases_that_agree_lose_nothing_and_none_that_find_nothing_has_a_loss():
    assert sensitivity(np.full((3, 3, 3), 0.2), pairs_of("run", 3)) == 0
    assert np.isnan(losses(np.zeros((2, 2, 2)), [(0, 1)])).all()


def test_a_run_has_neighbours_and_seeds_have_all_pairs():
    assert pairs_of("run", 4) == [(0, 1), (1, 2), (2, 3)]
    assert pairs_of("seeds", 3) == [(0, 1), (0, 2), (1, 2)]


def test_slices_have_one_part_of_another_release():
    found = slices(make_study())
    assert found["encoder"].tolist() == [[0.4, 0.5], [0.3, 0.6]]  # [e, h] = R[e, h, h]
    assert found["head"].tolist() == [[0.4, 0.45], [0.45, 0.6]]  # [e, h] = R[e, h, e]
    assert found["index"].tolist() == [[0.4, 0.0], [0.3, 0.6]]  # [e, i] = R[e, e, i]
    assert "epoch 2" in show(make_study())


def test_a_more_sensitive_family_is_warned_of():
    said = skew_warning(make_study(0.10), make_study(0.05))
    assert said is not None
    assert "10.0% of Recall@20" in said
    assert "5.0%" in said
    assert "another release's index" in said
    assert "apart" not in said
    assert "4 epochs apart, not 1" in str(skew_warning(make_study(0.10, epochs=(4, 8)), make_study(0.05)))


def test_nothing_is_said_of_a_family_not_surely_more_sensitive():
    assert skew_warning(make_study(0.05), make_study(0.10)) is None
    assert skew_warning(make_study(0.08), make_study(0.05)) is None  # .06 to .10 touches .03 to .07
    assert skew_warning(make_study(), make_study()) is None
    assert skew_warning(None, make_study()) is None
    assert skew_warning(make_study(), None) is None


def test_studies_that_cannot_be_compared_are_said_to_be_so():
    assert "k is 20 here, 10" in str(skew_warning(make_study(), make_study(k=10)))


def test_a_run_is_kept_under_each_of_its_releases_and_seeds_under_one_name(tmp_path):
    registry = Registry(tmp_path)
    assert registry.read_study(study_name("a")) is None
    study = make_study()
    assert keep_study(registry, study) == ["skew-a", "skew-b"]
    assert registry.read_study(study_name("b")) == study
    assert keep_study(registry, make_study(family="seeds")) == ["skew-seeds-b"]
    assert registry.read_study(study_name("b")) == study
    with pytest.raises(CheckpointError, match="a study's name"):
        registry.write_study("../SERVING", study)
    (tmp_path / "studies" / "skew-a.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        registry.read_study("skew-a")


def test_the_warning_imports_light():
    """tower-release calls it: no torch, no training."""
    heavy = ("torch", "pyarrow", "model.release", "model.training")
    code = f"import sys, model.skew; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
