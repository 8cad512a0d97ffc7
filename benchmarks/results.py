"""The record of measured figures: `benchmarks/results/<theme>.json`, one object a measure."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.page import render

FOLDER: Final = Path(__file__).parent / "results"
PLACES: Final = ("--data", "--from", "--keep", "--out", "--plot", "--plots", "--registry", "--studies")
"""Options of benchmarks that say where files are: no figure depends on them."""
REQUIRED: Final = ("measure", "value", "unit")
OPTIONAL: Final = ("target", "rival", "rival_value", "command", "hardware", "versions", "date", "note")


def record(theme: str, entries: Iterable[Mapping[str, Any]], folder: Path = FOLDER) -> Path:
    """Puts the entries into the theme's file, each in place of an earlier one of the same measure; the file's path.

    An entry has measure, value and unit, and may have target, rival, rival_value, command, hardware, versions, date and
    note; the command line, the hardware, the Python version and today's date are filled in.  Safe beside other writers:
    a lock, then one rename.
    Raises ValueError for an entry that lacks a part or has an unknown one.
    """
    new = [_complete(entry) for entry in entries]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{theme}.json"
    with _locked(folder):
        old = json.loads(path.read_text()) if path.exists() else []
        merged = {entry["measure"]: entry for entry in [*old, *new]}
        text = json.dumps([merged[measure] for measure in sorted(merged)], indent=2, ensure_ascii=False) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{theme}.", delete=False, encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        Path(out.name).chmod(0o644)
        Path(out.name).replace(path)
        path.with_suffix(".md").write_text(render(theme, json.loads(text)))
    return path


def _complete(entry: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if entry.get(name) is None]
    unknown = sorted(set(entry) - {*REQUIRED, *OPTIONAL})
    if missing or unknown:
        raise ValueError(f"an entry needs {REQUIRED} and may have {OPTIONAL}; missing {missing}, unknown {unknown}")
    filled = {"command": command_line(), "hardware": hardware(), "versions": versions(), "date": today(), **entry}
    return {name: filled[name] for name in (*REQUIRED, *OPTIONAL) if filled.get(name) is not None}


def command_line() -> str:
    """How this process may be run again from the repository's root; where files lay on this machine is left out."""
    name, arguments = Path(sys.argv[0]), _without_places(sys.argv[1:])
    with contextlib.suppress(ValueError):
        name = name.resolve().relative_to(Path(__file__).resolve().parents[1])
        return shlex.join(["python", "-m", ".".join(name.with_suffix("").parts), *arguments])
    return shlex.join(["python", name.name, *arguments])


def _without_places(arguments: Sequence[str]) -> list[str]:
    """Arguments without the options that name files and folders, as `--out FOLDER` or `--out=FOLDER`."""
    kept: list[str] = []
    is_place = False
    for argument in arguments:
        if is_place:
            is_place = False
        elif argument in PLACES:
            is_place = True
        elif argument.partition("=")[0] not in PLACES:
            kept.append(argument)
    return kept


def hardware() -> str:
    """GPU where a benchmark of this process can use one, processor and number of cores."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    torch = sys.modules.get("torch")
    gpu = f"{torch.cuda.get_device_name()}, " if torch is not None and torch.cuda.is_available() else ""
    return f"{gpu}{model}, {len(os.sched_getaffinity(0))} cores"


def versions(*packages: str) -> dict[str, str]:
    """Version of Python and of the named packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.now(UTC).date().isoformat()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
