"""Skew and bridges measured on two public logs: checkpoints of one run and independent seeds.

    python -m benchmarks.skew [--data FOLDER] [--device cuda] [--only ml-1m] [--studies FOLDER] [--no-record]
    python -m benchmarks.skew --studies FOLDER --from-studies      figures and plots of studies made elsewhere

Each log is trained with the settings of benchmarks.quality but a fixed number of epochs and no early stopping: seed 0
with releases at four epochs, seeds 1 and 2 with one at the end. Then: tower-evaluate's skew study of the run and of the
three seeds, and its bridge study from an early and from the last but one checkpoint to the last, and from seed 0 to
seed 1. The studies are the same functions that tower-evaluate runs.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from benchmarks.results import hardware, record, today
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.release import Registry, Release, library_versions
from model.skew import keep_study
from model.skew import show as show_skew
from model.training.bridge import bridge_study, keep_bridge
from model.training.bridge import show as show_bridge
from model.training.loop import train
from model.training.plots import draw_bridge, draw_skew, plotting
from model.training.skew import skew_study

ROOT = Path(__file__).resolve().parents[1]
SHORT = {"ml-1m": "ml1m", "globo-news": "globo"}
EPOCHS = {"ml-1m": (6, 12, 18, 24), "globo-news": (2, 4, 6, 8)}
SEEDS = (0, 1, 2)
STUDIES = ("skew-run", "skew-seeds", "bridge-early", "bridge-late", "bridge-seeds")


@dataclass(frozen=True, slots=True)
class Inputs:
    """One log, read."""

    name: str
    values: dict[str, Any]
    """table, items, users and description, as the studies take them."""


def read_inputs(name: str, data: Path) -> Inputs:
    """The log's files in data/name."""
    description = load_description(name)
    folder = data / name
    table, _ = read_log(str(folder / "events.parquet"), description)
    return Inputs(
        name,
        {
            "table": table,
            "items": read_items(str(folder / "items.parquet"), description),
            "users": read_users(str(folder / "users.parquet"), description) if description.user_columns else None,
            "description": description,
        },
    )


def make_releases(
    inputs: Inputs, registry: Registry, device: str, epochs: Sequence[int], max_events: int | None
) -> tuple[list[Release], list[Release]]:
    """The checkpoints of seed 0's run and the last release of every seed."""
    config, settings = {"ml-1m": quality.movies, "globo-news": quality.news}[inputs.name](device)
    for seed in SEEDS:
        made = train(
            inputs.values["table"], inputs.values["items"], inputs.values["users"], inputs.values["description"],
            registry,
            settings=replace(
                settings, seed=seed, epochs=epochs[-1], patience=epochs[-1], max_minutes=None, max_events=max_events
            ),
            config=config, device=device, release_at=epochs if seed == SEEDS[0] else epochs[-1:],
        )  # fmt: skip
        print(f"{inputs.name}, seed {seed}: {json.dumps(made.summary['history'][-1])}", flush=True)
    by_place: dict[tuple[int, int], str] = {}
    for name in registry.releases():
        lineage = registry.manifest(name).lineage
        assert lineage is not None
        by_place[lineage.seed, lineage.epoch] = name
    checkpoints = [registry.load(by_place[SEEDS[0], epoch], device=device) for epoch in epochs]
    others = [registry.load(by_place[seed, epochs[-1]], device=device) for seed in SEEDS[1:]]
    return checkpoints, [checkpoints[-1], *others]


def measure(
    inputs: Inputs, device: str, epochs: Sequence[int], max_test_events: int | None, max_events: int | None = None
) -> dict[str, dict[str, Any]]:
    """All studies of one log by name, each with the hardware, versions, date and training that made it."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        run, seeds = make_releases(inputs, registry, device, epochs, max_events)
        log: dict[str, Any] = {**inputs.values, "max_test_events": max_test_events}
        for name, releases in (("skew-run", run), ("skew-seeds", seeds)):
            found[name] = skew_study(releases, **log)
            keep_study(registry, found[name])
            print(show_skew(found[name]), flush=True)
        pairs = {
            "bridge-early": (run[0], run[-1]), "bridge-late": (run[-2], run[-1]), "bridge-seeds": (seeds[0], seeds[1]),
        }  # fmt: skip
        for name, (old, new) in pairs.items():
            bridge, found[name] = bridge_study(old, new, **log)
            keep_bridge(registry, bridge, found[name], old)
            print(show_bridge(found[name]), flush=True)
    made = {
        "hardware": hardware(),
        "versions": library_versions(),
        "date": today(),
        "trained": f"{len(SEEDS)} runs of {epochs[-1]} epochs",
    }
    return {name: study | {"made": made} for name, study in found.items()}


def entries(short: str, studies: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The studies' figures as records."""
    made = [_skew_entry(short, name.removeprefix("skew-"), studies[name]) for name in STUDIES if "skew" in name]
    return made + [_bridge_entry(short, name.removeprefix("bridge-"), studies[name]) for name in STUDIES[2:]]


def _made(study: Mapping[str, Any]) -> dict[str, Any]:
    return {name: study["made"][name] for name in ("hardware", "versions", "date")} | {
        "command": "python -m benchmarks.skew --device cuda"
    }


def _skew_entry(short: str, family: str, study: Mapping[str, Any]) -> dict[str, Any]:
    found, k = study["sensitivity"], study["k"]
    parts = ", ".join(f"{part} {loss:.3f}" for part, loss in found["by_part"].items())
    last = study["recall"][-1][-1][-1]
    return {
        "measure": f"skew.{short}.{family}.sensitivity",
        "value": round(found["value"], 4),
        "unit": f"mean relative loss of Recall@{k} over mixes of two releases",
        "note": (
            f"95 % interval {found['low']:.4f} to {found['high']:.4f} over users; by part {parts}; Recall@{k} of the "
            f"last release unmixed {last:.4f}; {study['requests']:,} requests of {study['users']:,} users with a "
            f"state; {study['made']['trained']}"
        ),
        **_made(study),
    }


def _bridge_entry(short: str, pair: str, study: Mapping[str, Any]) -> dict[str, Any]:
    recall, k, counts = study["recall"], study["k"], study["counts"]
    rival = max(("previous_release", "cold_start"), key=lambda arm: float(recall[arm][0]["value"]))
    gain = study["gain"][rival]
    return {
        "measure": f"bridge.{short}.{pair}.recall@{k}",
        "value": round(recall["bridge"][0]["value"], 4),
        "unit": f"Recall@{k} of users with an old state only, through the bridge",
        "rival": rival,
        "rival_value": round(recall[rival][0]["value"], 4),
        "note": (
            f"gain {gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f}, 95 % over users); previous release "
            f"{recall['previous_release'][0]['value']:.4f}, cold start {recall['cold_start'][0]['value']:.4f}, new "
            f"state {recall['bridge'][-1]['value']:.4f}; {study['kind']}, fitted on {counts['fit_users']:,} users, "
            f"{counts['test_requests']:,} requests of {counts['test_users']:,} others; "
            f"{'enabled' if study['is_enabled'] else 'off'}; {study['made']['trained']}"
        ),
        **_made(study),
    }


def draw(short: str, studies: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Every study's plot as <folder>/<study>-<log>.svg."""
    for name, study in studies.items():
        kind = draw_skew if name.startswith("skew") else draw_bridge
        kind(study, folder / f"{name}-{short}.svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, study, draw, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.skew", description=__doc__.partition("\n")[0])
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(SHORT))
    parser.add_argument("--epochs", type=int, nargs="+", help="of the releases of seed 0; the last of every seed")
    parser.add_argument("--max-events", type=int, help="train on so many of the latest events")
    parser.add_argument("--max-test-events", type=int, default=30_000, help="sample a larger test to so many events")
    parser.add_argument("--studies", type=Path, help="folder of the studies as JSON, <study>-<log>.json")
    parser.add_argument("--from-studies", action="store_true", help="take the studies from --studies, train nothing")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs/plots")
    parser.add_argument("--no-record", action="store_true", help="print and keep the studies; neither record nor draw")
    args = parser.parse_args(argv)
    if args.from_studies and args.studies is None:
        parser.error("--from-studies needs --studies")
    if not args.no_record:
        plotting()
    for name in [args.only] if args.only else list(SHORT):
        short = SHORT[name]
        if args.from_studies:
            studies = {study: json.loads((args.studies / f"{study}-{short}.json").read_text()) for study in STUDIES}
        else:
            epochs = args.epochs or EPOCHS[name]
            studies = measure(read_inputs(name, args.data), args.device, epochs, args.max_test_events, args.max_events)
            if args.studies is not None:
                args.studies.mkdir(parents=True, exist_ok=True)
                for study, values in studies.items():
                    (args.studies / f"{study}-{short}.json").write_text(json.dumps(values, indent=1))
        if not args.no_record:
            draw(short, studies, args.plots)
            record("versions", entries(short, studies))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
