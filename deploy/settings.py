"""What the demo was asked to do, and on what data."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.dataset import DatasetDescription, load_description
from model.errors import ConfigError, TowerError

DESCRIPTION = """\
The whole pipeline in one command: train, release, encode twice, serve, query, evaluate, report.

Without --events on generated data, else on yours. `make demo EVENTS=... ITEMS=...` says the same.
"""

_DAY_US = 86_400_000_000
_SECOND_US = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the demo was asked to do."""

    events: Path | None
    items: Path | None
    users: Path | None
    dataset: str | None
    out: Path
    quick: bool
    minutes: float | None
    """Limit of the training; None for the default of the data at hand."""
    record: bool
    keep_serving: bool

    @property
    def work(self) -> Path:
        """What a run makes; replaced by the next."""
        return self.out / "demo"

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def training_minutes(self) -> float:
        """Limit of the training."""
        if self.minutes is not None:
            return self.minutes
        if self.events is not None:
            return 0.5 if self.quick else 6.0
        return 0.25 if self.quick else 1.25

    @property
    def max_test_events(self) -> int:
        """Largest test that is evaluated whole."""
        return 2_000 if self.quick else 20_000

    @property
    def requests(self) -> int:
        """Timed single requests."""
        return 500 if self.quick else 2_000

    @property
    def coverage_users(self) -> int:
        """Most users asked for to count the answers."""
        return 5_000 if self.quick else 50_000


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings of a command line. Ends the process with status 2 and one clear line where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=Path, help="event log: a Parquet file or a folder of parts")
    parser.add_argument("--items", type=Path, help="items: a Parquet file or a folder; goes with --events")
    parser.add_argument("--users", type=Path, help="users, where the description declares user columns")
    parser.add_argument("--dataset", help="description: a YAML file or the name of a shipped one (default: found)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of everything made (default: out)")
    parser.add_argument("--quick", action="store_true", help="less data, less training: a check that all works")
    parser.add_argument("--minutes", type=float, help="limit of the training (default: 1.25, on your data 6)")
    parser.add_argument("--record", action="store_true", help="note the time in benchmarks/results/main_job.json")
    parser.add_argument("--keep-serving", action="store_true", help="at the end, serve until Ctrl-C")
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        check_settings(settings)
    except TowerError as error:
        parser.exit(2, f"demo: {error}\n")
    return settings


def check_settings(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.events is None:
        for flag, value in (("ITEMS", settings.items), ("USERS", settings.users), ("DATASET", settings.dataset)):
            if value is not None:
                raise ConfigError(f"{flag} goes with EVENTS: make demo EVENTS=log.parquet ITEMS=items.parquet")
    elif settings.items is None:
        raise ConfigError("EVENTS needs ITEMS: make demo EVENTS=log.parquet ITEMS=items.parquet [USERS=...]")
    for flag, path in (("EVENTS", settings.events), ("ITEMS", settings.items), ("USERS", settings.users)):
        if path is not None and not path.exists():
            raise ConfigError(f"{flag}: there is nothing at {path}")
    if settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out: {settings.out} is no folder")
    if settings.dataset is not None:
        load_description(settings.dataset)
    if settings.minutes is not None and settings.minutes <= 0:
        raise ConfigError(f"--minutes must be above 0, got {settings.minutes:g}")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The data the pipeline runs on."""

    events: Path
    items: Path
    users: Path | None
    dataset: str
    """Description file, or the name of a shipped one."""
    description: DatasetDescription


@dataclass(frozen=True, slots=True)
class Times:
    """When the states are cut."""

    previous_us: int
    as_of_us: int
    until_us: int


def cut_times(description: DatasetDescription, first_us: int, last_us: int) -> Times:
    """As-of times of the two daily runs, and the end of the test.

    Split by time: the second run is at the start of the test. Otherwise: at the end of the log. The first is a day
    earlier, or half way where the log is too short for that.
    """
    if description.evaluation.split == "time":
        as_of_us, until_us = description.evaluation.window_us(first_us, last_us)
    else:
        as_of_us, until_us = -(-last_us // _SECOND_US) * _SECOND_US, last_us + 1
    previous_us = as_of_us - _DAY_US
    if previous_us <= first_us:
        previous_us = (first_us + as_of_us) // 2 // _SECOND_US * _SECOND_US
    return Times(previous_us, as_of_us, until_us)


def show_command(command: Sequence[str], programs: Path) -> str:
    """A command as it can be typed here."""
    return shlex.join([shown_path(programs / command[0]), *command[1:]])


def shown_path(path: Path) -> str:
    """Relative to the current folder where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
