"""Chunks, deterministic files, and folders that appear whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.errors import DataError
from pipelines.io import Folder, from_chunks, parquet_bytes, read_parquet, to_chunks

TABLE = pa.table({"a": np.random.default_rng(0).integers(0, 2**60, 5000), "b": [str(i) for i in range(5000)]})


def test_chunks_stay_below_the_limit_and_come_back_in_order() -> None:
    chunks = list(to_chunks(TABLE, 5000))
    assert len(chunks) > 5
    assert max(map(len, chunks)) <= 5000
    assert from_chunks(chunks, TABLE.schema).equals(TABLE)


def test_a_row_larger_than_the_limit_is_a_chunk_of_its_own() -> None:
    table = pa.table({"a": [np.random.default_rng(0).bytes(3000), b"x", b"y"]})
    assert from_chunks(to_chunks(table, 1000), table.schema).equals(table)


def test_no_rows_are_no_chunks() -> None:
    assert list(to_chunks(TABLE.slice(0, 0))) == []
    assert from_chunks([], TABLE.schema).num_rows == 0


def test_chunks_of_another_schema_are_refused() -> None:
    with pytest.raises(DataError, match="wanted"):
        from_chunks(to_chunks(TABLE), pa.schema([("a", pa.int64())]))


def test_equal_tables_give_equal_parquet_bytes() -> None:
    pieces = pa.concat_tables([TABLE.slice(0, 100), TABLE.slice(100)]).replace_schema_metadata({"host": "here"})
    assert parquet_bytes(pieces) == parquet_bytes(TABLE)


@pytest.mark.parametrize("protocol", ["", "memory://"])
def test_a_folder_moves_into_place_once(tmp_path: Path, protocol: str) -> None:
    root = Folder(f"{protocol}{tmp_path}")
    staging, target = root / "staging" / "x", root / "runs" / "x"
    staging.write("states/0.parquet", parquet_bytes(TABLE))
    staging.write("last", b"done")
    assert target.names() == []
    staging.move_to(target, last="last")
    assert target.names() == ["last", "states"]
    assert read_parquet(target, "states/0.parquet", ["b"]).equals(TABLE.select(["b"]))
    assert (root / "staging").names() == []
    staging.write("last", b"again")
    with pytest.raises(DataError, match="exists already"):
        staging.move_to(target, last="last")
    assert target.read("last") == b"done"
    staging.remove()
    staging.remove()


def test_missing_and_torn_files_say_so(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(DataError, match="no file a"):
        folder.read("a")
    folder.write("a", parquet_bytes(TABLE)[:-20])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read_parquet(folder, "a")
