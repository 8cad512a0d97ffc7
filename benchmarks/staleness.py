"""What the age of a state costs, whose context helps, and whom to renew, measured on public logs.

    python -m benchmarks.staleness [--data FOLDER] [--device cuda] [--max-minutes 2.2] [--only globo-news]
    python -m benchmarks.staleness --registry REGISTRY [--release ID]      of a release trained on globo-news before
    python -m benchmarks.staleness --from-studies                          figures and plots of studies made elsewhere

The tower is trained on globo-news as in benchmarks.quality; then the three studies of tower-evaluate: staleness,
context-audit, refresh-budget. globo-news has no item categories to draw subjects by, so the audit's leakage is measured
on ml-1m, trained as in benchmarks.quality too. Studies go to --studies as JSON; where matplotlib is not installed, draw
them and record their figures elsewhere with --from-studies.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from benchmarks.results import FOLDER, hardware, record, today
from benchmarks.skew import Inputs, read_inputs
from model.release import Registry, Release, library_versions
from model.training import audit, refresh, staleness
from model.training.loop import train
from model.training.plots import draw_audit, draw_refresh, draw_staleness, plotting

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks.staleness --device cuda"
MINUTES = {"globo-news": 0.75, "ml-1m": 0.25}
"""Share of --max-minutes that each log's training gets."""
Make = Callable[..., dict[str, Any]]
STUDIES: dict[str, dict[str, tuple[Any, Make]]] = {
    "globo-news": {
        "staleness-globo": (staleness, staleness.staleness_study),
        "audit-globo": (audit, audit.audit_study),
        "refresh-globo": (refresh, refresh.refresh_study),
    },
    "ml-1m": {"audit-ml1m": (audit, audit.audit_study)},
}
DRAW = {"staleness": draw_staleness, "audit": draw_audit, "refresh": draw_refresh}


def make_release(
    inputs: Inputs, registry: Registry, device: str, minutes: float, max_events: int | None
) -> tuple[Release, str]:
    """A release trained with the settings of benchmarks.quality, and what its training was, in words."""
    config, settings = {"ml-1m": quality.movies, "globo-news": quality.news}[inputs.name](device)
    result = train(
        inputs.values["table"], inputs.values["items"], inputs.values["users"], inputs.values["description"], registry,
        settings=replace(settings, max_minutes=minutes, max_events=max_events), config=config, device=device,
    )  # fmt: skip
    for row in result.summary["history"]:
        print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)
    trained = f"{len(result.summary['history'])} epochs in {result.summary['train_seconds']:.0f} s"
    return registry.load(result.manifest.release_id, device=device), trained


def measure(inputs: Inputs, release: Release, trained: str, max_test_events: int | None) -> dict[str, dict[str, Any]]:
    """A log's studies by name, each with the hardware, versions, date and training that made it."""
    made = {"hardware": hardware(), "versions": library_versions(), "date": today(), "trained": trained}
    found = {}
    for name, (module, make) in STUDIES[inputs.name].items():
        started = time.monotonic()
        study = make(release, max_test_events=max_test_events, **inputs.values)
        print(f"{module.show(study)}\n{name}: {time.monotonic() - started:.0f} s\n", flush=True)
        found[name] = study | {"made": made}
    return found


def entries(studies: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The studies' figures as records."""
    made: list[dict[str, Any]] = []
    for name, study in studies.items():
        kind, _, short = name.partition("-")
        made += {"staleness": _staleness, "audit": _audit, "refresh": _refresh}[kind](short, study)
    return made


def _entry(study: Mapping[str, Any], measure: str, value: float, unit: str, note: str, **more: Any) -> dict[str, Any]:
    sample = ", sampled" if study["sampled"] else ""
    asked = f"{study['requests']:,} requests of {study['users']:,} users{sample}, {study['catalogue']:,} items"
    return {
        "measure": measure,
        "value": round(value, 4),
        "unit": unit,
        **more,
        "note": f"{note}; {asked}; trained {study['made']['trained']}",
        "command": COMMAND,
        **{name: study["made"][name] for name in ("hardware", "versions", "date")},
    }


def _span(found: Mapping[str, float] | None) -> str:
    return "not told" if found is None else f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"


def _staleness(short: str, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    k, names = study["k"], [point["name"] for point in study["points"]]
    everyone = study["segments"]["all"]
    recall = {arm: dict(zip(names, everyone["recall"][arm], strict=True)) for arm in staleness.ARMS}
    over_fresh, won_back = (dict(zip(names, everyone[what], strict=True)) for what in ("over_fresh", "won_back"))
    daily, day = over_fresh["daily"], recall["context"]["24 h"]
    made = []
    if daily is not None:
        note = f"95 % {_span(daily)}; of the loss, the context wins back {_span(won_back['daily'])}"
        made.append(
            _entry(
                study, f"staleness.{short}.daily_over_fresh.recall@{k}", daily["value"],
                f"Recall@{k} of the daily state with context, over that of a fresh state with context", note,
                rival="the same without context",
                rival_value=round(recall["no_context"]["daily"]["value"] / recall["no_context"]["0 h"]["value"], 4),
            )
        )  # fmt: skip
    for arm in ("context", "no_context"):
        text = ", ".join(f"{name} {recall[arm][name]['value']:.4f}" for name in names)
        made.append(
            _entry(
                study, f"staleness.{short}.{arm}.24h.recall@{k}", recall[arm]["24 h"]["value"],
                f"Recall@{k} with a state 24 h old", f"95 % {_span(recall[arm]['24 h'])}; by age: {text}",
                rival="a fresh state", rival_value=round(recall[arm]["0 h"]["value"], 4),
            )
        )  # fmt: skip
    if (won := won_back["24 h"]) is not None:
        made.append(
            _entry(
                study, f"staleness.{short}.won_back_24h", won["value"],
                f"share of the loss of Recall@{k} at 24 h that the context wins back",
                f"95 % {_span(won)}; Recall@{k} with context {_span(day)}",
            )
        )  # fmt: skip
    return made


def _audit(short: str, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    k, made = study["k"], []
    found = study["replayed"]["full"]
    arms = ", ".join(f"{arm} {_span(point)}" for arm, point in found["recall"].items())
    made.append(
        _entry(
            study, f"audit.{short}.context_gain.recall@{k}", found["gain"]["value"],
            f"Recall@{k} with the replayed context less that without, full history",
            f"95 % {_span(found['gain'])}; {arms}; empty history: gain {_span(study['replayed']['empty']['gain'])}",
            rival="the same over another request's context", rival_value=round(found["above_another"]["value"], 4),
        )
    )  # fmt: skip
    if study["pseudo"] is not None:
        found = study["pseudo"]["full"]
        arms = ", ".join(f"{arm} {_span(point)}" for arm, point in found["recall"].items())
        made.append(
            _entry(
                study, f"audit.{short}.leakage", found["above_another"]["value"],
                f"Recall@{k} with subjects drawn from the answer less that with another answer's, full history",
                f"95 % {_span(found['above_another'])}; {arms}; share of the gain {_span(found['share_of_gain'])}; "
                f"empty history: leakage {_span(study['pseudo']['empty']['above_another'])}",
                rival="gain of such subjects over none", rival_value=round(found["gain"]["value"], 4),
            )
        )  # fmt: skip
    return made


def _refresh(short: str, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    k, made = study["k"], []
    arms = {(arm["policy"], arm["budget"]): arm for arm in study["arms"]}
    nobody, everyone = arms["nobody", 0.0], arms["all", 1.0]
    for share in refresh.BUDGETS:
        arm, by_chance = arms["expected_gain", share], arms["random", share]
        others = ", ".join(
            f"{policy.replace('_', ' ')} {arms[policy, share]['recall']['context']['value']:.4f}"
            for policy in ("most_new_events", "longest_stale")
        )
        ends = {name: [end["recall"][name]["value"] for end in (everyone, nobody)] for name in arm["recall"]}
        notes = [
            f"95 % {_span(arm['recall']['context'])}",
            f"over random {_span(arm['over_random']['context'])}",
            others,
            "all {:.4f}, nobody {:.4f}".format(*ends["context"]),
            f"of the gain of renewing all {_span(arm['captured']['context'])}",
            f"without context {arm['recall']['no_context']['value']:.4f}, random "
            f"{by_chance['recall']['no_context']['value']:.4f}, "
            + "all {:.4f}, nobody {:.4f}".format(*ends["no_context"])
            + f", of the gain {_span(arm['captured']['no_context'])}",
            f"{arm['renewed_a_day']:,.0f} of {everyone['renewed_a_day']:,.0f} users a day",
        ]
        made.append(
            _entry(
                study, f"refresh.{short}.expected_gain_{100 * share:.0f}.recall@{k}", arm["recall"]["context"]["value"],
                f"Recall@{k} with context, {share:.0%} of the users with a state and events new that day renewed",
                "; ".join(notes), rival="random", rival_value=round(by_chance["recall"]["context"]["value"], 4),
            )
        )  # fmt: skip
    made.append(
        _entry(
            study, f"refresh.{short}.all.recall@{k}", everyone["recall"]["context"]["value"],
            f"Recall@{k} with context, all users with a state and new events renewed",
            f"95 % {_span(everyone['recall']['context'])}; {everyone['renewed_a_day']:,.0f} users a day",
            rival="nobody", rival_value=round(nobody["recall"]["context"]["value"], 4),
        )
    )  # fmt: skip
    return made


def draw(studies: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Every study's plot as <folder>/<study>.svg."""
    for name, study in studies.items():
        DRAW[name.partition("-")[0]](study, folder / f"{name}.svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Train or load, study, draw, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.staleness", description=__doc__.partition("\n")[0])
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(STUDIES))
    parser.add_argument("--registry", help="take a release trained on globo-news from here, train nothing")
    parser.add_argument("--release", help="which one (default: the newest)")
    parser.add_argument("--max-minutes", type=float, default=2.2, help="of training, both logs together")
    parser.add_argument("--max-events", type=int, help="train on so many of the latest events")
    parser.add_argument("--max-test-events", type=int, default=30_000, help="sample a larger test to so many events")
    parser.add_argument("--studies", type=Path, default=FOLDER / "studies", help="folder of the studies as JSON")
    parser.add_argument("--from-studies", action="store_true", help="take the studies from there, measure nothing")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs/plots")
    parser.add_argument("--no-record", action="store_true", help="print and keep the studies; neither record nor draw")
    args = parser.parse_args(argv)
    if not args.no_record:
        plotting()
    logs = [args.only] if args.only else ["globo-news"] if args.registry else list(STUDIES)
    for name in logs:
        if args.from_studies:
            studies = {study: json.loads((args.studies / f"{study}.json").read_text()) for study in STUDIES[name]}
        else:
            studies = _measured(args, name)
            args.studies.mkdir(parents=True, exist_ok=True)
            for study, values in studies.items():
                (args.studies / f"{study}.json").write_text(json.dumps(values, indent=1))
        if not args.no_record:
            draw(studies, args.plots)
            record("quality", entries(studies))
    return 0


def _measured(args: argparse.Namespace, name: str) -> dict[str, dict[str, Any]]:
    inputs = read_inputs(name, args.data)
    print(f"{name}: {inputs.values['table'].num_rows:,} events read", flush=True)
    if args.registry is not None:
        registry = Registry(args.registry)
        release = registry.load(args.release or registry.releases()[-1], device=args.device)
        return measure(inputs, release, f"before, release {release.manifest.release_id}", args.max_test_events)
    with tempfile.TemporaryDirectory() as folder:
        minutes = args.max_minutes * (1.0 if args.only else MINUTES[name])
        release, trained = make_release(inputs, Registry(folder), args.device, minutes, args.max_events)
        return measure(inputs, release, trained, args.max_test_events)


if __name__ == "__main__":
    raise SystemExit(main())
