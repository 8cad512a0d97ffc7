"""tower-feed: send events and item updates to the servers.

tower-feed events --events new.parquet                      # what happened; counted by live item features
tower-feed events --events log/ --backfill                  # and said to be whole from its first event on
tower-feed items  --items new.parquet --registry registry   # new items, embedded by the serving release
tower-feed rows   --rows rows.parquet                       # rows with embeddings of your own
tower-feed change --changes bids.parquet --embedding-version V
tower-feed delete --items 17 18 --embedding-version V
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from model.dataset import find_description, load_description
from model.errors import ConfigError, DataError, TowerError
from model.event_log import read_items, read_log, reject_counts
from model.new_items import embed_items
from model.release import Registry
from model.retrieval.catalogue import RuleNames, rows_of_items
from model.retrieval.rows import Deltas, read_rows
from online.event_feed import send_events
from online.item_feed import Deletion, send
from online.stream import connect

_HOUR_US = 3_600_000_000


def send_log(arguments: argparse.Namespace) -> str:
    """Events of a log, oldest first, in batches."""
    description = load_description(arguments.dataset) if arguments.dataset else find_description(arguments.events)
    now_us = time.time_ns() // 1000
    table, rejects = read_log(arguments.events, description, now_us)
    table = table.take(pc.sort_indices(table["timestamp_us"]))
    kept_us = now_us - int(arguments.keep_h * _HOUR_US)
    recent = table.filter(pc.greater_equal(table["timestamp_us"], kept_us))
    since_us = None
    if arguments.backfill:
        if not recent.num_rows:
            raise DataError(f"{arguments.events} has no event of the last {arguments.keep_h:g} h")
        since_us = recent["timestamp_us"][0].as_py() if recent.num_rows == table.num_rows else kept_us
    with connect(arguments.redis_url) as client:
        for start in range(0, recent.num_rows, arguments.batch):
            batch = recent.slice(start, arguments.batch)
            send_events(client, batch, keep_h=arguments.keep_h, since_us=since_us)
            since_us = None
    told = "".join(f", {count:,} set aside ({reason})" for reason, count in sorted(reject_counts(rejects).items()))
    return (
        f"sent {recent.num_rows:,} events, {table.num_rows - recent.num_rows:,} older than {arguments.keep_h:g} h{told}"
    )


def send_items(arguments: argparse.Namespace) -> str:
    """Items by their declared columns: embedded and numbered as the release does."""
    registry = Registry(arguments.registry)
    release_id = arguments.release if arguments.release != "serving" else registry.pointer().serving
    if release_id is None:
        raise ConfigError(f"no release serves in {arguments.registry}; name one with --release")
    release = registry.load(release_id, parts=("head", "items"))
    description, catalogue = release.manifest.description, registry.catalogue(release_id)
    items = read_items(arguments.items, description)
    given = pq.read_schema(arguments.items).names
    for name in ("bid", "budget", "eligible"):
        if name in given and name not in items.column_names:
            items = items.append_column(name, pq.read_table(arguments.items, columns=[name])[name])
    scoring = release.manifest.scorer
    names = RuleNames.of(description, catalogue, 0 if scoring is None else scoring.scalars)
    version = release.manifest.embedding_version
    with connect(arguments.redis_url) as client:
        for start in range(0, items.num_rows, arguments.batch):
            batch = items.slice(start, arguments.batch).combine_chunks()
            send(client, rows_of_items(version, batch, embed_items(release, catalogue, batch), description, names))
    return f"sent {items.num_rows:,} items for embedding version {version}"


def send_rows(arguments: argparse.Namespace) -> str:
    """Rows as they are."""
    rows = read_rows(arguments.rows)
    with connect(arguments.redis_url) as client:
        number = send(client, rows)
    return f"sent {len(rows):,} rows for embedding version {rows.embedding_version} as update {number:,}"


def send_changes(arguments: argparse.Namespace) -> str:
    """New bids, budgets or eligibility."""
    table = pq.read_table(arguments.changes)
    given = [name for name in ("bid", "budget", "eligible") if name in table.column_names]
    if "item_id" not in table.column_names or not given:
        raise DataError(
            f"{arguments.changes} must have item_id and at least one of bid, budget, eligible; it has "
            f"{', '.join(table.column_names)}"
        )
    values = {f"{name}_R": torch.as_tensor(table[name].to_numpy().copy()) for name in given}
    for name in ("bid_R", "budget_R"):
        if name in values:
            values[name] = values[name].float()
    deltas = Deltas(arguments.embedding_version, table["item_id"].to_pylist(), **values)
    with connect(arguments.redis_url) as client:
        number = send(client, deltas)
    return f"sent {table.num_rows:,} changes for embedding version {arguments.embedding_version} as update {number:,}"


def send_deletion(arguments: argparse.Namespace) -> str:
    """Items to take away."""
    items = arguments.items if arguments.string_ids else [int(item) for item in arguments.items]
    with connect(arguments.redis_url) as client:
        number = send(client, Deletion(arguments.embedding_version, items))
    return f"sent {len(items):,} deletions for embedding version {arguments.embedding_version} as update {number:,}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tower-feed", description="Send events and item updates to the servers, over Redis.",
        epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--redis-url", default=os.environ.get("REDIS_URL"), help="default: REDIS_URL")
    common.add_argument("--batch", type=int, default=5000, metavar="N",
        help="events or items of one entry (default: %(default)s)")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    events = commands.add_parser("events", parents=[common], help="events of a log, for live item features")
    events.add_argument("--events", required=True, metavar="LOG", help="Parquet, a file or a folder")
    events.add_argument("--dataset", help="dataset description; by default the one that goes with the log")
    events.add_argument("--keep-h", type=float, default=168.0, metavar="H",
        help="how long entries stay; as long as `tower-serve --live-hours` (default: %(default)s)")  # fmt: skip
    events.add_argument("--backfill", action="store_true",
        help="the log holds all events from its first one on, and others send all that come after it")  # fmt: skip
    events.set_defaults(run=send_log)

    items = commands.add_parser("items", parents=[common], help="items by their columns, embedded by a release")
    items.add_argument("--items", required=True, metavar="FILE",
        help="Parquet: item_id, the declared item columns, and where wanted bid, budget, eligible")  # fmt: skip
    items.add_argument("--registry", required=True, metavar="URI")
    items.add_argument("--release", default="serving", metavar="ID", help="default: the serving one")
    items.set_defaults(run=send_items)

    rows = commands.add_parser("rows", parents=[common], help="rows of the item index with embeddings")
    rows.add_argument("--rows", required=True, metavar="FILE", help="Parquet, see docs/contracts.md")
    rows.set_defaults(run=send_rows)

    changes = commands.add_parser("change", parents=[common], help="new bids, budgets or eligibility")
    changes.add_argument("--changes", required=True, metavar="FILE",
        help="Parquet: item_id and any of bid, budget, eligible")  # fmt: skip
    changes.add_argument("--embedding-version", required=True, metavar="V")
    changes.set_defaults(run=send_changes)

    delete = commands.add_parser("delete", parents=[common], help="items to take away")
    delete.add_argument("--items", required=True, nargs="+", metavar="ID")
    delete.add_argument("--string-ids", action="store_true", help="ids are strings")
    delete.add_argument("--embedding-version", required=True, metavar="V")
    delete.set_defaults(run=send_deletion)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Send what is asked for; prints one line. Returns the process's exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not arguments.redis_url:
        parser.error("--redis-url or the environment variable REDIS_URL must say where to send to")
    if arguments.batch < 1:
        parser.error(f"--batch must be at least 1, got {arguments.batch}")
    try:
        print(arguments.run(arguments))
    except (TowerError, OSError) as error:
        print(f"tower-feed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
