"""The stored studies of releases: their figures are the recorded ones."""

import json

import pytest

from benchmarks.results import FOLDER
from benchmarks.staleness import STUDIES, entries

NAMES = [name for studies in STUDIES.values() for name in studies]


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_recorded(name):
    path = FOLDER / "studies" / f"{name}.json"
    recorded = {entry["measure"]: entry for entry in json.loads((FOLDER / "quality.json").read_text())}
    for entry in entries({name: json.loads(path.read_text())}):
        assert {key: recorded[entry["measure"]].get(key) for key in entry} == entry
