"""The same bytes on other engines."""

import importlib.util
from pathlib import Path

import pytest

from tests.pipelines.job import Job, row, write_rows

T = 1_600_000_000
ENGINES = {
    "two processes": ["--direct_num_workers", "2", "--direct_running_mode", "multi_processing"],
    "two threads": ["--direct_num_workers", "2", "--direct_running_mode", "multi_threading"],
    "dask": ["--runner", "apache_beam.runners.dask.dask_runner.DaskRunner"],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_bytes_do_not_depend_on_the_engine(job: Job, tmp_path: Path, engine: str) -> None:
    """Beam's and Dask's own clean-up of sockets is not ours to judge."""
    if engine == "dask" and importlib.util.find_spec("distributed") is None:
        pytest.skip("dask.distributed is not installed")
    rows = [row(u, 10 + (u + i) % 9, T + 10 * i + u) for u in range(20) for i in range(u % 6 + 1)]
    log = write_rows(tmp_path / "a.parquet", [*rows, rows[0], row(1, None, T)])
    job.run(log)
    other = job.elsewhere("other")
    other.run(log, None, *ENGINES[engine])
    assert other.hashes() == job.hashes()
