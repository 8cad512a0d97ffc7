"""File formats and folders: the only module of the jobs that knows how anything is written.

Folders are URIs: a local path, or whatever fsspec opens (s3://, gs://, memory://). Bytes depend on content alone:
no time, host or path gets into a file, so equal runs write equal files.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import DataError

CHUNK_LIMIT_BYTES = 4_000_000
"""Most bytes of one Arrow IPC chunk: Flink, for one, refuses very large records."""
ROW_GROUP_ROWS = 65_536
_TEMPORARY = ".part-"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a file system or object store, named by its URI. Need not exist: writing makes it."""

    uri: str

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises DataError when there is none."""
        fs, path = self._open(name)
        try:
            return bytes(fs.cat_file(path))
        except FileNotFoundError:
            raise DataError(f"no file {name} in {self.uri}") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all: readers see the old file or the new one, also after a power cut."""
        fs, path = self._open(name)
        if not _renames(fs):
            fs.pipe_file(path, data)  # object stores show an object only when it is complete
            return
        fs.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{os.path.dirname(path)}/{_TEMPORARY}{secrets.token_hex(8)}"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        fs, path = self._open(name)
        return bool(fs.exists(path))

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; none when the folder does not exist."""
        fs, path = self._open()
        fs.invalidate_cache(path)
        try:
            found = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if not name.startswith(_TEMPORARY))

    def remove(self) -> None:
        """Remove the folder and all in it, if it exists."""
        fs, path = self._open()
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def move_to(self, target: "Folder", last: str) -> None:
        """Make this folder appear as `target`: by one rename, or, on stores without, file by file with `last` last.

        Readers of stores without a rename take the folder for present only once it holds `last`.
        Raises DataError when the target exists.
        """
        fs, path = self._open()
        _, target_path = target._open()
        if target.exists(last):
            raise DataError(f"{target.uri} exists already")
        if _renames(fs):
            os.makedirs(os.path.dirname(target_path), exist_ok=True)
            os.rename(path, target_path)
            _sync_folder(os.path.dirname(target_path))
            return
        files = sorted(fs.find(path), key=lambda file: (file.endswith("/" + last), file))
        for file in files:
            fs.copy(file, target_path + file[len(path) :])
        fs.rm(path, recursive=True)

    def sha256(self, name: str) -> str:
        """SHA-256 of the file's bytes, in hex."""
        fs, path = self._open(name)
        digest = hashlib.sha256()
        with fs.open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _open(self, name: str = "") -> tuple[Any, str]:
        fs, path = fsspec.core.url_to_fs(self.uri)
        return fs, f"{path.rstrip('/')}/{name}" if name else path


def _renames(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_chunks(table: pa.Table, limit_bytes: int = CHUNK_LIMIT_BYTES) -> Iterator[bytes]:
    """The table as zstd Arrow IPC streams of at most `limit_bytes` each (one row may exceed it); none when empty."""
    if not table.num_rows:
        return
    data = _encode(table)
    if len(data) <= limit_bytes or table.num_rows == 1:
        yield data
        return
    pieces = -(-len(data) // limit_bytes)
    rows = max(1, min(-(-table.num_rows // pieces), table.num_rows // 2))
    for start in range(0, table.num_rows, rows):
        yield from to_chunks(table.slice(start, rows), limit_bytes)


def from_chunks(chunks: Iterable[bytes | memoryview], schema: pa.Schema) -> pa.Table:
    """The inverse of to_chunks, over any number of tables. Raises DataError on chunks of another schema."""
    tables = []
    for chunk in chunks:
        with pa.ipc.open_stream(chunk) as reader:
            tables.append(reader.read_all())
        if not tables[-1].schema.equals(schema):
            raise DataError(f"a chunk holds columns {tables[-1].schema}, wanted {schema}")
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        version="2.6",
    )
    return sink.getvalue()


def read_parquet(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of the folder. Raises DataError when it is missing or not Parquet."""
    try:
        return pq.read_table(pa.BufferReader(folder.read(name)), columns=None if columns is None else list(columns))
    except pa.ArrowInvalid as error:
        raise DataError(f"{folder.uri}/{name} is not a whole Parquet file: {error}") from None


def json_bytes(value: object) -> bytes:
    """Indented JSON with sorted keys; equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
