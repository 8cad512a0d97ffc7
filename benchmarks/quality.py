"""Quality on two public logs: the tower with and without context, beside popularity.

    python -m benchmarks.quality [--data FOLDER] [--device cuda] [--max-minutes 10] [--only ml-1m] [--no-record]

ml-1m: leave-one-out in the published order, full ranking, the user's earlier films off the candidates (for every
method). globo-news: all clicks of 2017-10-15 from 03:00 UTC, one day; the tower learned from the 14 days before, its
states end at that midnight and its context holds the clicks since; articles not yet published are no candidates.
Popularity of the last 3 hours counts test clicks as they come in, the tower's weights do not.

Both logs are for research only and are not part of the repository.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import hardware, record
from model.config import TowerConfig
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.release import Registry, library_versions
from model.training.data import training_part
from model.training.evaluate import evaluate_quality, show
from model.training.loop import TrainResult, train
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for

ROOT = Path(__file__).resolve().parents[1]
MINUTES = {"ml-1m": 0.45, "globo-news": 0.55}
"""Share of --max-minutes that each log's training gets."""


def movies(device: str) -> tuple[TowerConfig, TrainSettings]:
    """ml-1m: 1 M ratings of 3,706 films; a full softmax over the next item."""
    description = load_description("ml-1m")
    counts = LogCounts(events=1_000_000, users=6_040, items=3_883)
    config = replace(
        config_for(description, counts), d_model=128, num_layers=3, num_heads=4, embedding_dim=128, context_dim=64,
        head_hidden=256, dropout=0.3, item_dropout=0.02, state_dropout=0.05, temperature=0.06,
    )  # fmt: skip
    settings = replace(
        settings_for(description, counts, device=device), epochs=60, tokens_per_step=16_384, learning_rate=1.5e-3,
        stale_share=0.05, lag_share=0.1, subject_share=0.1, patience=8, weight_decay=0.05,
    )  # fmt: skip
    return config, settings


def news(device: str) -> tuple[TowerConfig, TrainSettings]:
    """globo-news: 2.7 M clicks in 14 days on 46,033 articles, most of them short-lived; recent clicks weigh more."""
    description = load_description("globo-news")
    counts = LogCounts(events=2_700_000, users=310_000, items=46_033)
    config = replace(
        config_for(description, counts), d_model=128, num_layers=2, num_heads=4, embedding_dim=128, context_dim=128,
        head_hidden=512, history_limit=100, dropout=0.1, context_dropout=0.3, temperature=0.06,
    )  # fmt: skip
    settings = replace(
        settings_for(description, counts, device=device), epochs=20, tokens_per_step=16_384, learning_rate=2e-3,
        stale_share=0.7, half_life_days=3.0, patience=4,
    )  # fmt: skip
    return config, settings


def measure(
    name: str, data: Path, config: TowerConfig, settings: TrainSettings, device: str, max_test_events: int | None
) -> tuple[dict[str, Any], TrainResult]:
    """Train on one log and evaluate the release: the quality report, and what training came to."""
    description = load_description(name)
    folder = data / name
    events, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description)
    users = read_users(str(folder / "users.parquet"), description) if description.user_columns else None
    print(f"{name}: training on {training_part(events, description).train.num_rows:,} events", flush=True)
    with tempfile.TemporaryDirectory() as registry:
        result = train(
            events, items, users, description, Registry(registry), settings=settings, config=config, device=device
        )  # fmt: skip
        for row in result.summary["history"]:
            print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)
        release = Registry(registry).load(result.manifest.release_id, device=device)
        started = time.monotonic()
        report = evaluate_quality(release, events, items, users, ks=(10, 20, 50), max_test_events=max_test_events)
    print(show(report))
    print(
        f"trained in {result.summary['total_seconds']} s, evaluated in {time.monotonic() - started:.0f} s", flush=True
    )
    return report, result


def entries(name: str, report: Mapping[str, Any], result: TrainResult, device: str) -> list[dict[str, Any]]:
    """The report's figures as records."""
    short = {"ml-1m": "ml1m", "globo-news": "globo"}[name]
    kind = hardware()
    trained = f"{len(result.summary['history'])} epochs in {result.summary['train_seconds']:.0f} s"
    sampled = f" of {report['test_events_total']:,}, sampled" if report["sampled"] else ""

    def entry(measure: str, arm: str, metric: str, part: str = "all", rival: str | None = None) -> dict[str, Any]:
        found = report["arms"][arm][part][metric]
        events, users = report["slices"][part]["events"], report["slices"][part]["users"]
        made = {
            "measure": f"{short}.{measure}",
            "value": round(found["value"], 4),
            "unit": f"{metric}, mean over test events",
            "hardware": kind,
            "versions": library_versions(),
            "note": (
                f"95 % interval {found['low']:.4f} to {found['high']:.4f} over users; {events:,} test events{sampled} "
                f"of {users:,} users, {report['catalogue']:,} items ranked; trained {trained}"
            ),
        }
        if rival is not None:
            made |= {"rival": rival, "rival_value": round(report["arms"][rival][part][metric]["value"], 4)}
        return made

    if short == "ml1m":
        return [
            entry("recall@20", "context", "recall@20", rival="popularity"),
            entry("ndcg@20", "context", "ndcg@20", rival="popularity"),
            entry("no_context.recall@20", "no_context", "recall@20"),
            entry("popularity.recall@20", "popularity", "recall@20"),
            entry("popularity.ndcg@20", "popularity", "ndcg@20"),
        ]
    made = [
        entry("context.recall@20", "context", "recall@20", rival="no_context"),
        entry("no_context.recall@20", "no_context", "recall@20"),
        entry("context.ndcg@20", "context", "ndcg@20", rival="no_context"),
        entry("popularity.recall@20", "popularity", "recall@20"),
        entry("popularity_3h.recall@20", "recent_popularity", "recall@20"),
    ]
    for part in ("item_seen", "item_unseen", "user_with_history", "user_without_history"):
        if report["slices"][part]["events"]:
            made += [
                entry(f"{part}.{title}.recall@20", arm, "recall@20", part)
                for title, arm in (
                    ("context", "context"), ("no_context", "no_context"), ("popularity_3h", "recent_popularity"),
                )
            ]  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.partition("\n")[0])
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=9.0, help="of training, both logs together")
    parser.add_argument("--max-test-events", type=int, help="sample a larger test down to so many events")
    parser.add_argument("--only", choices=tuple(MINUTES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the reports as JSON")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    for name in [args.only] if args.only else list(MINUTES):
        config, settings = {"ml-1m": movies, "globo-news": news}[name](args.device)
        minutes = args.max_minutes * (1.0 if args.only else MINUTES[name])
        settings = replace(settings, max_minutes=minutes, seed=args.seed)
        report, result = measure(name, args.data, config, settings, args.device, args.max_test_events)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"quality-{name}.json").write_text(json.dumps(report, indent=1))
            (args.out / f"training-{name}.json").write_text(json.dumps(result.summary, indent=1))
        if not args.no_record:
            record("main_job", entries(name, report, result, args.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
