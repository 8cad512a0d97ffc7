"""tower-release: what it shows, and what it refuses."""

from pathlib import Path

import pytest

from model.config import TowerConfig
from model.errors import TowerError
from model.release import Manifest, Registry
from pipelines.encode_users import main as encode
from pipelines.release import age, check_coverage, commit, main, make_parser, status, table
from pipelines.runs import RunStore
from tests.pipelines.conftest import TINY
from tests.pipelines.job import row, write_rows
from tests.releases import make_release

T = 1_600_000_000
DAY = 86_400


class Towers:
    """Two releases of different state versions, and runs of each."""

    def __init__(self, root: Path, config: TowerConfig = TINY) -> None:
        self.registry = Registry(root / "registry")
        self.states = str(root / "states")
        self.old = make_release(root / "registry", seed=1, config=config)
        self.new = make_release(root / "registry", seed=2, config=config)
        self.log = write_rows(root / "a.parquet", [row(u, 10, T + u) for u in range(10)])
        self.small_log = write_rows(root / "b.parquet", [row(u, 10, T + u) for u in range(4)])

    def encode(self, release: Manifest, as_of: str, log: Path | None = None) -> None:
        flags = ["--registry", self.registry.uri, "--states", self.states, "--no-redis", "--shards", "1"]
        more = ["--release", release.release_id, "--as-of", as_of]
        assert encode(["--events", str(log or self.log), *flags, *more]) == 0

    def command(self, *words: str, states: bool = True) -> int:
        where = ["--registry", self.registry.uri, *(["--states", self.states] if states else [])]
        return main([*words, *where])


@pytest.fixture
def towers(tmp_path: Path) -> Towers:
    return Towers(tmp_path)


def test_a_release_without_a_run_may_not_serve(towers: Towers, capsys: pytest.CaptureFixture[str]) -> None:
    assert towers.command("commit", towers.new.release_id) == 1
    error = capsys.readouterr().err
    assert f"no committed run of its state version {towers.new.state_version}" in error
    assert towers.registry.pointer().epoch == 0
    assert towers.command("commit", towers.new.release_id, "--force") == 0
    assert towers.registry.pointer().serving == towers.new.release_id


def test_a_release_with_older_states_may_not_serve(towers: Towers, capsys: pytest.CaptureFixture[str]) -> None:
    towers.encode(towers.old, "2020-09-15T00:00:00Z")
    assert towers.command("commit", towers.old.release_id) == 0
    towers.encode(towers.new, "2020-09-13T20:00:00Z")
    assert towers.command("commit", towers.new.release_id) == 1
    error = capsys.readouterr().err
    assert "20200913T200000Z, is 1 d 4 h older than 20200915T000000Z" in error
    assert towers.old.release_id in error
    towers.encode(towers.new, "2020-09-15T00:00:00Z")
    assert towers.command("commit", towers.new.release_id) == 0
    assert towers.registry.pointer().previous == towers.old.release_id


def test_rollback_checks_the_same(towers: Towers, capsys: pytest.CaptureFixture[str]) -> None:
    assert towers.command("rollback") == 1
    for release in (towers.old, towers.new):
        towers.encode(release, "2020-09-15T00:00:00Z")
        assert towers.command("commit", release.release_id) == 0
    towers.encode(towers.new, "2020-09-16T00:00:00Z")
    assert towers.command("rollback") == 1
    assert "1 d older" in capsys.readouterr().err
    towers.encode(towers.old, "2020-09-16T00:00:00Z")
    assert towers.command("rollback") == 0
    assert towers.registry.pointer().serving == towers.old.release_id
    towers.encode(towers.old, "2020-09-17T00:00:00Z")
    assert towers.command("rollback", "--force") == 0
    assert towers.registry.pointer().epoch == 4


def test_a_run_over_a_part_of_the_log_covers_too_few(towers: Towers) -> None:
    towers.encode(towers.old, "2020-09-15T00:00:00Z")
    commit(towers.registry, towers.states, towers.old.release_id)
    towers.encode(towers.new, "2020-09-15T00:00:00Z", towers.small_log)
    with pytest.raises(TowerError, match="has 4 users, the serving release's 10"):
        check_coverage(towers.registry, towers.states, towers.registry.pointer(), towers.new.release_id)


def test_a_damaged_release_never_serves(towers: Towers, capsys: pytest.CaptureFixture[str]) -> None:
    assert towers.command("verify", towers.new.release_id, states=False) == 0
    assert "is sound: golden outputs differ by at most states" in capsys.readouterr().out
    weights = Path(towers.registry.uri) / "releases" / towers.new.release_id / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert towers.command("verify", towers.new.release_id, states=False) == 1
    assert towers.command("commit", towers.new.release_id, "--force") == 1
    assert "encoder.safetensors" in capsys.readouterr().err
    assert towers.registry.pointer().epoch == 0
    assert towers.command("verify", "nothing", states=False) == 1


def test_list_and_status_show_what_there_is(towers: Towers, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["list", "--registry", str(tmp_path / "empty")]) == 0
    assert "no release" in capsys.readouterr().out
    assert towers.command("status") == 0
    assert "no run in" in capsys.readouterr().out
    towers.encode(towers.old, "2020-09-15T00:00:00Z")
    towers.encode(towers.new, "2020-09-15T00:00:00Z", towers.small_log)
    commit(towers.registry, towers.states, towers.old.release_id)
    RunStore(towers.states, towers.old.state_version).mark_published("20200915T000000Z", {"written": 10})
    text = status(towers.registry, towers.states, (1_600_128_000 + DAY + 3600) * 1_000_000)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["pointer"][1:5] == ["epoch", "1,", "serving", f"{towers.old.release_id},"]
    assert lines[towers.old.release_id][1] == "serving"
    old, new = lines[towers.old.state_version], lines[towers.new.state_version]
    assert old[1:] == ["20200915T000000Z", "2020-09-15T00:00:00Z", "1", "d", "1", "h", "10", "10", "100.0%", "yes"]
    assert new[-4:] == ["4", "4", "40.0%", "no"]


def test_text() -> None:
    assert [age(s * 1_000_000) for s in (-5, 0, 59, 60, 3661, DAY, DAY * 2 + 3600)] == [
        "0 s", "0 s", "59 s", "1 min", "1 h 1 min", "1 d", "2 d 1 h",
    ]  # fmt: skip
    assert table(["a", "bb"], [["ccc", "d"]]) == "a    bb\nccc  d"
    assert "exit status" in make_parser().format_help()
