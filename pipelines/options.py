"""Flags of tower-encode. What is not known here goes to Beam."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.errors import ConfigError
from model.refresh import RefreshBudget
from pipelines.faults import CRASH_VARIABLE, Fault
from pipelines.runs import parse_as_of_us

DEFAULT_SHARDS = 16
MAX_SHARDS = 100_000
DEFAULT_BATCH_TOKENS = 16_384

_DESCRIPTION = """\
Encode the users' histories: the daily job.

Reads an event log, merges it with the histories of the last run, encodes the users whose history changed, writes
states, histories and rows set aside as one run that appears whole or not at all, and sends the states to Redis.
"""

_EPILOG = """\
runs
  A run is named after its as-of time: <states>/<state_version>/runs/20171015T030000Z/. Later events are set aside.
  --events may be the whole log or only what is new since the last run: the states come out the same, and late events
  count. Running again with the same as-of time and events only sends the run to Redis again, so after any failure
  simply run the same command once more.

examples
  tower-encode --events log/ --registry registry --states states
      the daily job: as of the log's last event, for the serving release and those that may serve next or again
  tower-encode --events log/ --registry registry --states states --release 20171016T030000-1a2b3c4d --no-redis
      prepare one release without touching Redis (tower-release commit asks for such a run)
  tower-encode --events day/ --registry registry --states states --as-of 2017-10-15T03:00:00Z \\
      --direct_num_workers 4 --direct_running_mode multi_processing
      yesterday's events, in four processes (Beam's own flags; --runner takes any Beam runner)
  tower-encode --events log/ --registry registry --states states --refresh-budget 25%
      a quarter of the users with new events, those whose requests gain most; without the flag the next run catches up
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSettings:
    """What one call of tower-encode was asked to do."""

    events: str
    registry: str
    states: str
    release: str
    as_of_us: int | None
    """None: the log's last event, rounded up to a whole second."""
    shards: int | None
    """None: as many as the last run has, else DEFAULT_SHARDS."""
    redis_url: str | None
    """None: nothing is published."""
    rows_per_s: float | None
    """Most rows a second that go to Redis; None: no limit."""
    full: bool
    refresh_budget: RefreshBudget | None
    """None: every user with new events is encoded."""
    republish: bool
    device: str
    batch_tokens: int
    beam_args: tuple[str, ...]
    fault: Fault


def make_parser() -> argparse.ArgumentParser:
    """The parser of tower-encode."""
    parser = argparse.ArgumentParser(
        prog="tower-encode",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    places = parser.add_argument_group("where")
    places.add_argument("--events", required=True, metavar="URI", help="Parquet file, or folder of Parquet files")
    places.add_argument("--registry", required=True, metavar="URI", help="folder of releases and the serving pointer")
    places.add_argument("--states", required=True, metavar="URI", help="folder the runs are written to")
    places.add_argument(
        "--redis-url",
        metavar="URL",
        help="where the states are sent, e.g. redis://localhost:6379/0 (default: the environment's REDIS_URL)",
    )
    places.add_argument("--no-redis", action="store_true", help="send nothing; a later run without it catches up")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--release",
        default="all",
        metavar="ID",
        help="a release id, 'serving', or 'all': one run for each state version among the serving, prepared and "
        "previous releases, so that neither a commit nor a rollback meets old rows; before the first commit the "
        "newest release (default: all)",
    )
    what.add_argument(
        "--as-of",
        metavar="TIME",
        help="UTC time like 2017-10-15T03:00:00Z, or 'now' (default: the log's last event, rounded up to a second)",
    )
    what.add_argument(
        "--full",
        action="store_true",
        help="ignore the last run and encode every user of the log; --events must then be the whole log",
    )
    what.add_argument(
        "--refresh-budget",
        metavar="SHARE|N",
        help="encode only a share of the users with a row whom this run's events change, like 25%%, or so many users, "
        "like 100000 (divided among the shards): the best by expected gain; the others keep row and new events, are "
        "counted as deferred, and compete again in the next run. Users without a row are always encoded and do not "
        "count, so a first run defers nobody. What renewing is worth comes from the release's study (tower-evaluate "
        "refresh-budget) where there is one (default: encode all)",
    )
    what.add_argument(
        "--republish",
        action="store_true",
        help="send all committed runs again, oldest first: for a Redis that lost its rows",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--redis-rows-per-s",
        type=float,
        metavar="N",
        dest="rows_per_s",
        help="send no more rows a second to Redis, so that requests are not held up (default: no limit)",
    )
    how.add_argument(
        "--shards",
        type=int,
        metavar="P",
        help=f"parts the users are divided into; changing it takes --full (default: as before, at first "
        f"{DEFAULT_SHARDS}; aim at 10 to 50 thousand users a shard)",
    )
    how.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N (default: cpu)")
    how.add_argument(
        "--batch-tokens",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help="most users x longest history of one encoder call; states may differ in the last digits between "
        f"values (default: {DEFAULT_BATCH_TOKENS})",
    )
    return parser


def parse_settings(argv: Sequence[str] | None, environment: Mapping[str, str]) -> EncodeSettings:
    """Settings of a command line (without the program's name; None: this process's) and environment.

    Raises ConfigError, saying what was wanted, and SystemExit as argparse does.
    """
    parser = make_parser()
    args, beam_args = parser.parse_known_args(argv)
    ours = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in beam_args:
        near = difflib.get_close_matches(argument.split("=")[0], ours, n=1, cutoff=0.8)
        if argument.startswith("--") and near:
            raise ConfigError(f"{argument.split('=')[0]} is no flag of tower-encode; did you mean {near[0]}?")
    if args.no_redis and (args.redis_url or args.republish):
        raise ConfigError("--no-redis sends nothing; drop it, or drop --redis-url and --republish")
    redis_url = None if args.no_redis else args.redis_url or environment.get("REDIS_URL")
    if not args.no_redis and not redis_url:
        raise ConfigError("no Redis to send the states to: give --redis-url, set REDIS_URL, or say --no-redis")
    if args.shards is not None and not 1 <= args.shards <= MAX_SHARDS:
        raise ConfigError(f"--shards must be in 1 to {MAX_SHARDS}, got {args.shards}")
    if args.rows_per_s is not None and not args.rows_per_s > 0:
        raise ConfigError(f"--redis-rows-per-s must be above 0, got {args.rows_per_s}")
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens must be at least 1, got {args.batch_tokens}")
    return EncodeSettings(
        events=args.events,
        registry=args.registry,
        states=args.states,
        release=args.release,
        as_of_us=None if args.as_of is None else parse_as_of_us(args.as_of),
        shards=args.shards,
        redis_url=redis_url,
        rows_per_s=args.rows_per_s,
        full=args.full,
        refresh_budget=None if args.refresh_budget is None else RefreshBudget.parse(args.refresh_budget),
        republish=args.republish,
        device=args.device,
        batch_tokens=args.batch_tokens,
        beam_args=tuple(beam_args),
        fault=Fault(environment.get(CRASH_VARIABLE)),
    )
