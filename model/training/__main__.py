"""tower-train: an event log in, a release in the registry out."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.dataset import find_description, load_description
from model.errors import ConfigError, DataError, TowerError
from model.event_log import read_items, read_log, read_users
from model.release import Registry
from model.retrieval.scorer import ScorerConfig
from model.training.data import training_part
from model.training.loop import train
from model.training.scorer import ScorerSettings, scorer_for, train_scorer
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for


def main(argv: Sequence[str] | None = None) -> int:
    """tower-train. Returns 0, or 1 with a message when something is wrong with the input."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _train(args)
    except TowerError as error:
        print(f"tower-train: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tower-train", description="Train a tower; ends with a release.")
    parser.add_argument("--events", required=True, help="Parquet file or folder")
    parser.add_argument("--items", required=True)
    parser.add_argument("--users")
    parser.add_argument("--dataset", help="dataset description, file or name; default: found beside the events")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--out", type=Path, help="checkpoint, summary.json, TensorBoard (default: REGISTRY/training)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--head-only-from", metavar="RELEASE", help="keep that release's encoder and state version")
    parser.add_argument(
        "--release-at", type=_epochs, default=(), metavar="EPOCH,...",
        help="make a release after each of these epochs too, besides the best one at the end",
    )  # fmt: skip
    parser.add_argument(
        "--scorer", action="store_true",
        help="second stage: train an interaction scorer on the frozen towers of the release, an MLP over user, item, "
        "their product and counts of the log in the place of the plain dot product; ends with a second release of the "
        "same states and another embedding version",
    )  # fmt: skip
    parser.add_argument(
        "--scorer-from", metavar="RELEASE",
        help="only that second stage, on a release that is there; --seed and --max-minutes are the scorer's then",
    )  # fmt: skip
    parser.add_argument(
        "--scorer-set", nargs="+", default=[], metavar="NAME=VALUE",
        help="any field of ScorerSettings or ScorerConfig, as steps=2000 hidden=[64,32] windows_h=[] (no counts)",
    )  # fmt: skip
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--max-users", type=int)
    parser.add_argument("--max-events", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="any field of TrainSettings or TowerConfig"
    )  # fmt: skip
    return parser


def _train(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    registry = Registry(args.registry)
    if args.scorer_from is not None and (args.scorer or args.head_only_from or args.resume or args.set):
        raise ConfigError("--scorer-from trains a scorer alone: without --scorer, --head-only-from, --resume and --set")
    if args.scorer_set and not (args.scorer or args.scorer_from):
        raise ConfigError("--scorer-set goes with --scorer or --scorer-from")
    base = args.head_only_from or args.scorer_from
    if base is not None and args.dataset is None:
        description = registry.manifest(base).description
    else:
        description = find_description(args.events) if args.dataset is None else load_description(args.dataset)
    users = None
    if description.user_columns:
        if args.users is None:
            raise DataError(f"the description declares user columns {list(description.user_columns)}; give --users")
        users = read_users(args.users, description)
    events, _ = read_log(args.events, description)
    items = read_items(args.items, description)
    if args.scorer_from is not None:
        own = {"max_minutes": args.max_minutes} if args.max_minutes is not None else {}
        _train_scorer(args, registry, args.scorer_from, events, items, users, device, None, own)
        return
    part = training_part(events, description).train
    counts = LogCounts(events=part.num_rows, users=pc.count_distinct(part["user_id"]).as_py(), items=items.num_rows)
    given = {name: getattr(args, name) for name in ("epochs", "seed", "max_minutes", "max_users", "max_events")}
    settings = settings_for(description, counts, device=device)
    config = config_for(description, counts)
    setting_names = {f.name for f in fields(TrainSettings)}
    chosen = {name: value for name, value in given.items() if value is not None}
    towers: dict[str, Any] = {}
    for text in args.set:
        name, _, value = text.partition("=")
        (chosen if name in setting_names else towers)[name] = _value(text, value)
    if towers and args.head_only_from is not None:
        raise ConfigError(f"a head-only run keeps the release's config; {', '.join(towers)} cannot be set")
    try:
        settings = replace(settings, **chosen)
    except TypeError as error:
        raise ConfigError(f"--set: {error}") from None
    result = train(
        events,
        items,
        users,
        description,
        registry,
        settings=settings,
        config=type(config).from_dict(config.to_dict() | towers),
        device=device,
        folder=args.out or Path(args.registry) / "training",
        resume=args.resume,
        head_only_from=args.head_only_from,
        release_at=args.release_at,
    )
    manifest = result.manifest
    for said in result.summary["capped"]:
        print(f"capped: {said}")
    print(f"release {manifest.release_id}")
    print(f"state version {manifest.state_version}, embedding version {manifest.embedding_version}")
    print(json.dumps({name: round(value, 4) for name, value in manifest.metrics.items()}))
    if args.scorer:
        _train_scorer(args, registry, manifest.release_id, events, items, users, device, settings, {})


def _train_scorer(
    args: argparse.Namespace, registry: Registry, release_id: str, events: pa.Table, items: pa.Table,
    users: pa.Table | None, device: str, tower_settings: TrainSettings | None, own: dict[str, Any],
) -> None:  # fmt: skip
    """The second stage. tower_settings: of the first, where it has just run. own: settings given by flags."""
    config, settings = scorer_for(registry.manifest(release_id).description, device=device)
    setting_names = {f.name for f in fields(ScorerSettings)}
    of_settings = own | ({} if args.seed is None else {"seed": args.seed})
    of_config: dict[str, Any] = {}
    for text in args.scorer_set:
        name, _, value = text.partition("=")
        (of_settings if name in setting_names else of_config)[name] = _value(text, value)
    result = train_scorer(
        events, items, users, registry, release_id, config=ScorerConfig.from_dict(config.to_dict() | of_config),
        settings=replace(settings, **of_settings), tower_settings=tower_settings, device=device,
    )  # fmt: skip
    manifest, history = result.manifest, result.summary["history"]
    print(f"release {manifest.release_id}: release {release_id} with a scorer, step {result.summary['best_step']}")
    print(f"state version {manifest.state_version}, embedding version {manifest.embedding_version}")
    for row in history:
        print(json.dumps({name: round(value, 4) for name, value in row.items()}))
    if not result.summary["best_step"] and len(history) > 1:
        print("no better on the held-out events than its beginning, which was kept")


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"epochs are numbers with commas between, got {text!r}") from None


def _value(text: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        if "=" not in text:
            raise ConfigError(f"--set takes NAME=VALUE, got {text!r}") from None
        return value


if __name__ == "__main__":
    sys.exit(main())
