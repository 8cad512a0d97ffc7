import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import record


def test_a_measure_replaces_its_earlier_self(tmp_path: Path) -> None:
    record("speed", [{"measure": "b", "value": 1, "unit": "ms"}, {"measure": "a", "value": 2, "unit": "ms"}], tmp_path)
    path = record("speed", [{"measure": "b", "value": 3, "unit": "ms", "target": 4, "date": "2026-01-31"}], tmp_path)
    entries = json.loads(path.read_text())
    assert [(entry["measure"], entry["value"]) for entry in entries] == [("a", 2), ("b", 3)]
    assert entries[1]["date"] == "2026-01-31"
    assert entries[0]["hardware"]
    assert entries[0]["versions"]["python"]
    assert "rival" not in entries[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["speed.json", "speed.md"]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(record, "speed", [{"measure": f"{number:02}", "value": number, "unit": "ms"}], tmp_path)
            for number in range(24)
        ]:
            done.result()
    entries = json.loads((tmp_path / "speed.json").read_text())
    assert [entry["value"] for entry in entries] == list(range(24))


@pytest.mark.parametrize("entry", [{"measure": "a", "value": 1}, {"measure": "a", "value": 1, "unit": "s", "goal": 2}])
def test_an_entry_must_be_whole(tmp_path: Path, entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="an entry needs"):
        record("speed", [entry], tmp_path)


def test_a_command_leaves_out_where_files_lay(monkeypatch: pytest.MonkeyPatch) -> None:
    program = str(Path(results.__file__).with_name("globo.py"))
    arguments = ["--data", "/somewhere/else", "--device", "cuda", "--out=there", "--only", "ml-1m", "--plot", "a.svg"]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    assert results.command_line() == "python -m benchmarks.globo --device cuda --only ml-1m"
