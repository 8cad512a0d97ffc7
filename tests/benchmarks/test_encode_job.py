"""The benchmark of the daily job, small: job and loop are compared before they are timed."""

from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import encode_job


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode_job")
    encode_job.write_log(root / "log", users=60, events=600, items=50)
    encode_job.write_release(root / "registry", items=50)
    return root


def test_job_and_loop_agree_and_are_timed(root: Path) -> None:
    entries = {entry["measure"]: entry for entry in encode_job.compare(root, repeats=1, shards=2)}
    assert entries["encode.wall_vs_loop"]["value"] > 0
    assert entries["encode.users_per_s"]["value"] > 0


def test_a_difference_stops_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = encode_job.read_states

    def others(*arguments: object) -> pa.Table:
        return read(*arguments).slice(1)  # type: ignore[arg-type]

    monkeypatch.setattr(encode_job, "read_states", others)
    with pytest.raises(SystemExit, match="job and loop"):
        encode_job.compare(root, repeats=1, shards=2)
