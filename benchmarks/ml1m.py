"""ml-1m by two published protocols: leave-one-out, the whole catalogue ranked, what a user has rated taken off.

    python -m benchmarks.ml1m select --protocol hstu --device cuda [--only "base;wide"] [--workers 8]
    python -m benchmarks.ml1m train --protocol hstu --seeds 0 1 2 --registry FOLDER --device cuda
    python -m benchmarks.ml1m test --protocol hstu --registry FOLDER --device cuda

gsasrec: the split of SASRec, BERT4Rec and gSASRec: ratings of films rated 5 times or more (3,416 films). hstu: all
3,706 rated films; the 279 ratings whose time nobody knows are left out. Order within a second is SASRec's.

`select` never sees a test item: it takes each user's last rating off, trains on what comes before the one that is then
the last, and ranks that. `train` makes one release a seed. `test` scores the releases on the test item, and says so,
with the date, in docs/experiments.md, whatever comes out.

Two arms: `no context` knows the history only, as SASRec and gSASRec do; `request time` knows when the request comes
as well, as HSTU does (its code hands the target's timestamp to the attention bias of the last position). No arm knows
who the user is.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.results import record, today
from model.config import TowerConfig
from model.dataset import DatasetDescription, load_description
from model.event_log import read_items, read_log
from model.release import Registry, library_versions
from model.training.data import training_part
from model.training.evaluate import evaluate_quality
from model.training.loop import train
from model.training.settings import LogCounts, TrainSettings, config_for, settings_for

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOCOLS: Final = ("gsasrec", "hstu")
SIZES: Final = {"gsasrec": (999_611, 3_416), "hstu": (999_930, 3_706)}
"""Ratings and films of each protocol."""
PUBLISHED: Final = {
    "gsasrec": {
        "gSASRec": {"recall@10": 0.3003, "ndcg@10": 0.1726},
        "SASRec": {"recall@10": 0.2392, "ndcg@10": 0.1259},
    },
    "hstu": {
        "HSTU-large": {"recall@10": 0.3294, "ndcg@10": 0.1893, "recall@50": 0.5935, "recall@200": 0.7839},
        "HSTU": {"recall@10": 0.3097, "ndcg@10": 0.1720},
        "SASRec": {"recall@10": 0.2853, "ndcg@10": 0.1603},
    },
}  # fmt: skip
KS: Final = (10, 20, 50, 200)
ARMS: Final = {"no_context": "no context", "context": "request time"}
LOG_HEADING: Final = "## Every look at ml-1m's test items"


def describe(*, ratings: bool = False) -> DatasetDescription:
    """The log without user attributes. ratings: the encoder reads what earlier films were given."""
    return replace(load_description("ml-1m"), user_columns=(), event_columns=("rating",) if ratings else ())


def read(data: Path, protocol: str, description: DatasetDescription) -> tuple[pa.Table, pa.Table]:
    """Ratings and films of a protocol. Raises SystemExit where they are not as many as they should be."""
    rows = pq.read_table(data / "items.parquet", columns=["item_id", "sasrec_item_id", "n_ratings"])
    kept = pc.is_valid(rows["sasrec_item_id"]) if protocol == "gsasrec" else pc.greater(rows["n_ratings"], 0)
    ids = rows["item_id"].filter(kept).cast(pa.int64()).combine_chunks()
    with tempfile.TemporaryDirectory() as folder:
        path = data / "events.parquet"
        if "rating" in description.event_columns:  # half stars do not occur; a category is an integer
            table = pq.read_table(path)
            path = Path(folder) / "events.parquet"
            column = table.column_names.index("rating")
            pq.write_table(table.set_column(column, "rating", table["rating"].cast(pa.int8())), path)
        events, _ = read_log(str(path), description)
    items = read_items(str(data / "items.parquet"), description)
    events = events.filter(pc.is_in(events["item_id"], value_set=ids)).combine_chunks()
    items = items.filter(pc.is_in(items["item_id"], value_set=ids)).combine_chunks()
    if (events.num_rows, items.num_rows) != SIZES[protocol]:
        raise SystemExit(f"{protocol} has {SIZES[protocol]} ratings and films, found {events.num_rows, items.num_rows}")
    return events, items


def base(device: str) -> tuple[TowerConfig, TrainSettings]:
    """What the choices below vary."""
    description = describe()
    counts = LogCounts(events=1_000_000, users=6_040, items=3_706)
    config = replace(
        config_for(description, counts), d_model=128, num_layers=3, num_heads=4, embedding_dim=128, context_dim=64,
        head_hidden=256, dropout=0.3, item_dropout=0.02, state_dropout=0.02, temperature=0.06, session_limit=1,
    )  # fmt: skip
    settings = replace(
        settings_for(description, counts, device=device), epochs=60, tokens_per_step=16_384, learning_rate=1.5e-3,
        stale_share=0.0, lag_share=0.0, subject_share=0.0, patience=10, weight_decay=0.05,
    )  # fmt: skip
    return config, settings


_WIDE: Final = {"d_model": 256, "embedding_dim": 256, "head_hidden": 512}
CHOICES: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "base": ({}, {}),
    "dropout .2": ({"dropout": 0.2}, {}),
    "dropout .4": ({"dropout": 0.4}, {}),
    "2 layers": ({"num_layers": 2}, {}),
    "4 layers": ({"num_layers": 4}, {}),
    "wide": (_WIDE, {}),
    "wide, dropout .2": (_WIDE | {"dropout": 0.2}, {}),
    "wide, dropout .4": (_WIDE | {"dropout": 0.4}, {}),
    "wide, 4 layers, dropout .4": (_WIDE | {"dropout": 0.4, "num_layers": 4}, {}),
    "relative": ({"relative_bias": True}, {}),
    "relative, dropout .2": ({"relative_bias": True, "dropout": 0.2}, {}),
    "pointwise": ({"attention": "pointwise", "relative_bias": True, "num_layers": 4}, {}),
    "pointwise, 8 layers": ({"attention": "pointwise", "relative_bias": True, "num_layers": 8}, {}),
    "gbce": ({}, {"loss": "gbce", "uniform_negatives": 256}),
    "gbce, temperature .2": ({"temperature": 0.2}, {"loss": "gbce", "uniform_negatives": 256}),
    "128 negatives": ({}, {"full_softmax_items": 0, "in_batch_negatives": 0, "uniform_negatives": 128}),
    "temperature .05": ({"temperature": 0.05}, {}),
    "temperature .08": ({"temperature": 0.08}, {}),
    "rate 8e-4": ({}, {"learning_rate": 8e-4}),
    "rate 3e-3": ({}, {"learning_rate": 3e-3}),
    "rate 3e-3, dropout .2": ({"dropout": 0.2}, {"learning_rate": 3e-3}),
    "small steps": ({}, {"tokens_per_step": 8_192}),
    "no item dropout": ({"item_dropout": 0.0}, {}),
    "context dropout .2": ({"context_dropout": 0.2}, {}),
    "decay .2": ({}, {"weight_decay": 0.2}),
    "ratings": ({}, {"ratings": True}),
    "100 epochs": ({}, {"epochs": 100}),
}  # fmt: skip
CHOSEN: Final = {"gsasrec": "wide, dropout .2", "hstu": "wide, dropout .2"}
"""The best of `select` by NDCG@10 without context, on hstu's films; taken over for gsasrec's."""


def chosen(name: str, device: str) -> tuple[TowerConfig, TrainSettings, DatasetDescription]:
    """The tower, its training and its log's description by the name of a choice."""
    of_config, of_settings = CHOICES[name]
    of_settings = dict(of_settings)
    description = describe(ratings=bool(of_settings.pop("ratings", False)))
    config, settings = base(device)
    return replace(config, **of_config), replace(settings, **of_settings), description


def figures(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> metric -> value."""
    return {
        title: {name: found["value"] for name, found in report["arms"][arm]["all"].items()}
        for arm, title in ARMS.items()
    }


def validate(data: Path, protocol: str, name: str, seed: int, device: str, max_minutes: float) -> dict[str, Any]:
    """One choice, held against the rating before the test rating."""
    torch.set_num_threads(1)
    config, settings, description = chosen(name, device)
    events, items = read(data, protocol, description)
    known = training_part(events, description).train  # from here on the test rating does not exist
    settings = replace(settings, seed=seed, max_minutes=max_minutes)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            known, items, None, description, Registry(folder), settings=settings, config=config, device=device
        )  # fmt: skip
        release = Registry(folder).load(result.manifest.release_id, device=device)
        report = evaluate_quality(release, known, items, None, ks=KS, seen="exclude", resamples=100)
    history = result.summary["history"]
    best = max(history, key=lambda row: row["validation_ndcg@20"])
    return {
        "choice": name, "protocol": protocol, "seed": seed, "epochs": len(history), "best epoch": best["epoch"],
        "minutes": round((time.monotonic() - started) / 60, 2), **figures(report),
    }  # fmt: skip


def _devices(device: str, count: int) -> list[str]:
    """One name for each of `count` jobs, spread over the cards there are."""
    cards = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{n % cards}" if cards else device for n in range(count)]


def select(args: argparse.Namespace) -> None:
    """Every choice, several at once; a line each, best first at the end."""
    names = args.only.split(";") if args.only else list(CHOICES)
    if unknown := sorted(set(names) - set(CHOICES)):
        raise SystemExit(f"there is no choice {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    jobs = [(name, seed) for name in names for seed in args.seeds]
    found = []
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        devices = _devices(args.device, len(jobs))
        tasks = [
            pool.submit(validate, args.data, args.protocol, name, seed, device, args.max_minutes)
            for (name, seed), device in zip(jobs, devices, strict=True)
        ]
        for task in as_completed(tasks):
            if error := task.exception():
                print(f"one choice failed: {error!r}", flush=True)
                continue
            found.append(task.result())
            print(json.dumps(found[-1]), flush=True)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"select-{args.protocol}.json").write_text(json.dumps(found, indent=1))
    print("\n| choice | seed | best epoch | minutes | NDCG@10, R@10 no context | NDCG@10, R@10 request time |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in sorted(found, key=lambda row: -row["no context"]["ndcg@10"]):
        cells = [f"{row[title]['ndcg@10']:.4f}, {row[title]['recall@10']:.4f}" for title in ARMS.values()]
        print(
            f"| {row['choice']} | {row['seed']} | {row['best epoch']} of {row['epochs']} | {row['minutes']} "
            f"| {' | '.join(cells)} |"
        )


def _train_one(data: Path, protocol: str, name: str, seed: int, device: str, registry: Path) -> str:
    torch.set_num_threads(1)
    config, settings, description = chosen(name, device)
    events, items = read(data, protocol, description)
    result = train(
        events, items, None, description, Registry(registry / protocol / str(seed)),
        settings=replace(settings, seed=seed), config=config, device=device,
    )  # fmt: skip
    (registry / protocol / f"{seed}.json").write_text(
        json.dumps({"choice": name, "seed": seed, "release": result.manifest.release_id, **result.summary}, default=str)
    )
    return f"{protocol} seed {seed}: {len(result.summary['history'])} epochs in {result.summary['train_seconds']:.0f} s"


def train_all(args: argparse.Namespace) -> None:
    """One release a seed, side by side. The test rating is in none of it."""
    name = args.only or CHOSEN[args.protocol]
    (args.registry / args.protocol).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(_train_one, args.data, args.protocol, name, seed, device, args.registry)
            for seed, device in zip(args.seeds, _devices(args.device, len(args.seeds)), strict=True)
        ]
        for task in as_completed(tasks):
            print(task.result(), flush=True)


def test(args: argparse.Namespace) -> None:
    """The releases of a protocol on the test rating: told, logged and recorded."""
    made = sorted((args.registry / args.protocol).glob("*.json"))
    if not made:
        raise SystemExit(f"no releases of {args.protocol} in {args.registry}; run `train` first")
    runs = [json.loads(path.read_text()) for path in made]
    name = runs[0]["choice"]
    _, _, description = chosen(name, args.device)
    events, items = read(args.data, args.protocol, description)
    found = []
    for run in runs:
        registry = Registry(args.registry / args.protocol / str(run["seed"]))
        release = registry.load(run["release"], device=args.device)
        report = evaluate_quality(release, events, items, None, ks=KS, seen="exclude", resamples=100)
        found.append(figures(report))
        print(f"seed {run['seed']}: {json.dumps(found[-1])}", flush=True)
    means = {arm: {m: statistics.mean(f[arm][m] for f in found) for m in found[0][arm]} for arm in found[0]}
    spreads = {
        arm: {m: statistics.stdev([f[arm][m] for f in found]) if len(found) > 1 else 0.0 for m in found[0][arm]}
        for arm in found[0]
    }
    lines = [f"{args.protocol}, `{name}`, seeds {', '.join(str(run['seed']) for run in runs)}:"]
    for arm in ARMS.values():
        shown = ", ".join(f"{m} {means[arm][m]:.4f} ± {spreads[arm][m]:.4f}" for m in _metrics(args.protocol))
        lines.append(f"{arm} {shown};")
    told = " ".join(lines).rstrip(";")
    print(told)
    if not args.no_record:
        log_look(args.log, told)
        record("quality", entries(args.protocol, name, runs, means, spreads))


def _metrics(protocol: str) -> tuple[str, ...]:
    return ("recall@10", "ndcg@10", "recall@50", "recall@200") if protocol == "hstu" else ("recall@10", "ndcg@10")


def log_look(path: Path, told: str) -> None:
    """A dated line below the heading in the page of experiments, whatever the figures."""
    text = path.read_text()
    if LOG_HEADING not in text:
        text = text.rstrip("\n") + f"\n\n{LOG_HEADING}\n"
    head, _, tail = text.partition(LOG_HEADING + "\n")
    section, separator, rest = tail.partition("\n## ")
    path.write_text(f"{head}{LOG_HEADING}\n{section.rstrip(chr(10))}\n- {today()}: {told}\n{separator}{rest}")


def entries(
    protocol: str,
    name: str,
    runs: Sequence[Mapping[str, Any]],
    means: Mapping[str, Mapping[str, float]],
    spreads: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Records: the arm that knows what the published model knows gives the value, the other is in the note."""
    arm, other = ("request time", "no context") if protocol == "hstu" else ("no context", "request time")
    rival, published = next(iter(PUBLISHED[protocol].items()))
    seconds = statistics.mean(run["train_seconds"] for run in runs)
    titles = {
        "hstu": {"recall@10": "hr@10", "recall@50": "hr@50", "recall@200": "hr@200"},
        "gsasrec": {"recall@10": "r@10"},
    }
    return [
        {
            "measure": f"ml1m.{protocol}.{titles[protocol].get(metric, metric)}",
            "value": round(means[arm][metric], 4),
            "unit": f"{metric} ({arm}), mean of {len(runs)} seeds",
            "target": published[metric],
            "rival": f"{rival}, as published",
            "rival_value": published[metric],
            "command": f"python -m benchmarks.ml1m train --protocol {protocol} --seeds 0 1 2 --device cuda; "
            f"python -m benchmarks.ml1m test --protocol {protocol} --device cuda",
            "versions": library_versions(),
            "note": f"standard deviation {spreads[arm][metric]:.4f} over seeds; {other}: {means[other][metric]:.4f} "
            f"± {spreads[other][metric]:.4f}; choice `{name}`, {seconds:.0f} s of training each, "
            f"{len(runs)} side by side",
        }
        for metric in _metrics(protocol)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.ml1m", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("select", "train", "test"))
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/ml-1m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="choices to try, with semicolons between; for train, the one to take")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=3, help="trainings at once")
    parser.add_argument("--max-minutes", type=float, default=8.0, help="of each training of select")
    parser.add_argument("--registry", type=Path, default=Path("out/ml1m"))
    parser.add_argument("--out", type=Path, help="folder for select's figures")
    parser.add_argument("--log", type=Path, default=ROOT / "docs/experiments.md", help="where test says that it looked")
    parser.add_argument("--no-record", action="store_true", help="for tests of this program; a look is a look")
    args = parser.parse_args(argv)
    {"select": select, "train": train_all, "test": test}[args.step](args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
