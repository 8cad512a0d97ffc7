"""Pages stay true: links lead somewhere, figures are recorded, recorded figures are complete."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.page import render, show

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_recorded_figures_are_complete(path: Path) -> None:
    entries = json.loads(path.read_text())
    names = [entry["measure"] for entry in entries]
    assert names == sorted(set(names))
    for entry in entries:
        assert {"measure", "value", "unit", "command", "hardware", "versions", "date"} <= set(entry), entry["measure"]
        assert not re.search(r"(^|[\s=])[./~]*/", entry["command"]), f"a path of one machine: {entry['command']}"
    assert path.with_suffix(".md").read_text() == render(path.stem, entries), "run: python -m benchmarks.page"


def test_figures_in_the_readme_are_recorded() -> None:
    """Each table row of the README that names a measure shows the recorded value."""
    recorded = {entry["measure"]: entry for path in RESULTS for entry in json.loads(path.read_text())}
    found = [
        (match[1], line)
        for line in (ROOT / "README.md").read_text().splitlines()
        if (match := re.match(r"\|.*`([a-z0-9_]+\.[a-z0-9_.@]+)`", line))
    ]
    assert found
    for measure, line in found:
        value = show(recorded[measure]["value"])
        assert value in line, f"{measure} is recorded as {value}: {line}"
