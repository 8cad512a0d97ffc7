import subprocess
from pathlib import Path

import pytest

from feature_repo import environment
from feature_repo.environment import connection_string, feast_environment


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:7000/0", "127.0.0.1:7000,db=0"),
        ("redis://cache", "cache:6379"),
        ("rediss://me:s%40me@cache:1/2", "cache:1,db=2,ssl=true,username=me,password=s@me"),
        ("redis://cache/0?socket_timeout=5", "cache:6379,db=0,socket_timeout=5"),
    ],
)
def test_connection_string(url: str, expected: str) -> None:
    assert connection_string(url) == expected


@pytest.mark.parametrize("url", ["", "cache:6379", "http://cache", "redis://:a%2Cb@cache", "redis://[::1]:6379"])
def test_what_feast_cannot_carry_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"Feast|wanted"):
        connection_string(url)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = feast_environment("registry", "file:///data/states/", "redis://cache")
    assert made["HT_REGISTRY"] == f"{tmp_path}/registry"
    assert made["HT_STATES"] == "/data/states"
    assert made["HT_FEAST_REGISTRY"] == "sqlite:////data/states/feast_registry.db"
    assert feast_environment("s3://b/registry/", "s3://b/states", "redis://c")["HT_REGISTRY"] == "s3://b/registry"


def test_the_printed_lines_are_for_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = tmp_path / "the states"
    environment.main(["--registry", "s3://b/r", "--states", str(states)], {"REDIS_URL": "redis://cache:1"})
    assert states.is_dir()
    script = capsys.readouterr().out + 'printf "%s|%s" "$HT_STATES" "$HT_FEAST_REDIS"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{states}|cache:1"


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        environment.main(["--registry", "r", "--states", "s"], {})
    assert "--redis-url" in capsys.readouterr().err
