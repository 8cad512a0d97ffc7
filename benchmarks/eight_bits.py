"""int8 and float8 rows of the item index against bfloat16 rows, on a trained tower: share of the best 1,000 both find.

    python -m benchmarks.eight_bits --device cuda [--data FOLDER] [--kept FILE] [--only dot mlp] [--quick] [--no-record]

A tower is trained on globo-news as benchmarks.quality trains it and an interaction scorer on it, both cut off by the
clock. Items: all of the catalogue, with their counts of clicks as of the midnight before the test day; and 1,000,000,
each an item of the catalogue drawn evenly, with its counts, plus normal noise, the same in all directions, half as long
as the way to its nearest neighbour, brought back to the tower's length. Users: 256 requests of the test day.

Rows are coded to the nearest, and by `model.retrieval.rounding` for the users of 512 requests of the 24 hours before
the test day. The overlap of float32 rows is what bfloat16's own rounding leaves, the MLP then computed in float32, too.
Each figure is kept when it is there.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from benchmarks import quality
from benchmarks.results import record, versions
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.release import Registry
from model.retrieval.index import LiveIndex
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request
from model.retrieval.scalars import item_rows
from model.retrieval.scorer import DotScorer
from model.training.data import DAY_US, EventArrays
from model.training.evaluate import catalogue_scalars, embed_requests, make_test_set
from model.training.loop import train
from model.training.scorer import scorer_for, train_scorer

ROOT: Final = Path(__file__).resolve().parents[1]
NAME: Final = "globo-news"
USERS, SAMPLE, MANY, K = 256, 512, 1_000_000, 1000
NOISE: Final = 0.5
"""Length of the noise, in distances to the nearest neighbour."""
TARGET: Final = 0.995
KINDS: Final = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Trained:
    """What a release answers with."""

    rows: ItemRows
    scorer: nn.Module
    user_BE: torch.Tensor
    """Of the test day."""
    sample_UE: torch.Tensor
    """Of the day before."""
    told: str


def kept_or_trained(args: argparse.Namespace) -> Trained:
    """What the file of an earlier run holds, where one is named and there; else what training gives, kept in it."""
    if args.kept is None or not args.kept.exists():
        made = trained(args)
        if args.kept is not None:
            torch.save(made, args.kept)
        return made
    kept: Trained = torch.load(args.kept, map_location="cpu", weights_only=False)
    return replace(
        kept, scorer=kept.scorer.to(args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32),
        user_BE=kept.user_BE.to(args.device), sample_UE=kept.sample_UE.to(args.device),
    )  # fmt: skip


def trained(args: argparse.Namespace) -> Trained:
    """A tower and a scorer, and what they give."""
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:.0f} s: {what}", flush=True)

    description, folder, device = load_description(NAME), args.data / NAME, args.device
    config, settings = quality.news(device)
    settings = replace(settings, max_minutes=args.tower_seconds / 60)
    scorer_config, scorer_settings = scorer_for(description, device=device)
    scorer_settings = replace(
        scorer_settings, steps=args.steps, max_minutes=args.scorer_seconds / 60, max_targets=args.targets,
        half_life_days=settings.half_life_days, validations=5, max_validation=args.validation,
    )  # fmt: skip
    table, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description)
    users = read_users(str(folder / "users.parquet"), description) if description.user_columns else None
    with tempfile.TemporaryDirectory() as root:
        registry = Registry(root)
        made = train(table, items, users, description, registry, settings=settings, config=config, device=device)
        best = max(row.get("validation_recall@20", 0.0) for row in made.summary["history"])
        tell(f"tower, {len(made.summary['history'])} epochs, held-out Recall@20 {best:.4f}")
        scored = train_scorer(
            table, items, users, registry, made.manifest.release_id, config=scorer_config, settings=scorer_settings,
            tower_settings=settings, device=device,
        )  # fmt: skip
        last = scored.summary["history"][-1]
        tell(f"scorer, {last['step']:.0f} steps, best at {scored.summary['best_step']:.0f}")
        release = registry.load(scored.manifest.release_id, device=device)
        events = EventArrays.build(table, users, release.featuriser, description)
        test = make_test_set(table, events, description, limit=USERS, seed=0)
        midnight_us = int(events.time_us_T[test.target_B].min()) // DAY_US * DAY_US
        is_before_T = (events.time_us_T < midnight_us) & (events.time_us_T >= midnight_us - DAY_US)
        before = np.flatnonzero(events.positive_T & is_before_T)
        before = np.sort(np.random.default_rng(0).choice(before, min(SAMPLE, len(before)), replace=False))
        item_IE = release.items.table()
        user_BE, sample_UE = (
            embed_requests(release.encoder, release.head, item_IE, events, target, events.refresh_cut_T[target])
            for target in (test.target_B, before)
        )
        scalars = catalogue_scalars(events, scorer_config, release)
        assert scalars is not None, "the scorer reads counts"
        bucket = int(scalars.counts.bucket(torch.tensor([midnight_us], device=scalars.counts.item_P.device)))
        rows = item_rows(release, scalars.of([bucket])[0])
        scorer = release.scorer.bfloat16() if device.startswith("cuda") else release.scorer
    tell(f"{len(rows):,} items, {len(user_BE)} users of the test day, {len(sample_UE)} of the day before")
    told = (
        f"tower of {made.summary['train_seconds']:.0f} s, held-out Recall@20 {best:.4f}, scorer of {last['step']:.0f} "
        f"steps, best at {scored.summary['best_step']:.0f}"
    )
    return Trained(rows, scorer, user_BE.clone(), sample_UE.clone(), told)


def around(rows: ItemRows, count: int, device: str, seed: int = 0) -> ItemRows:
    """So many rows around those given, as the module says."""
    width = rows.layout.embedding_dim
    item_NE = rows.feature_RF[:, :width].to(device)
    length_N = item_NE.norm(dim=1)
    away_N = torch.empty_like(length_N)
    for start in range(0, len(item_NE), 4096):
        part_NE = item_NE[start : start + 4096]
        square_MN = part_NE.square().sum(1)[:, None] - 2 * part_NE @ item_NE.T + length_N.square()
        square_MN[torch.arange(len(part_NE)), start + torch.arange(len(part_NE))] = torch.inf
        away_N[start : start + 4096] = square_MN.amin(1).clamp_min(0).sqrt()
    random = torch.Generator().manual_seed(seed)
    of_R = torch.randint(len(rows), (count,), generator=random)
    noise_RE = torch.randn(count, width, generator=random) * (NOISE * away_N.cpu()[of_R] / width**0.5)[:, None]
    made_RE = torch.nn.functional.normalize(rows.feature_RF[of_R, :width] + noise_RE, dim=1)
    return ItemRows.build(
        rows.embedding_version, rows.layout, list(range(count)), made_RE * length_N.cpu()[of_R, None],
        scalar_RS=rows.feature_RF[of_R, width:],
    )  # fmt: skip


def best_rows(
    rows: ItemRows, scorer: nn.Module, user_BE: torch.Tensor, k: int, device: str, dtype: torch.dtype,
    sample_UE: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """row_BK that the product's index answers with."""
    index = LiveIndex(rows, scorer, device=device, dtype=dtype, users=sample_UE)
    return index.search(user_BE, [Request()] * len(user_BE), Plan(k=k), rows.embedding_version).row_BK


def shared(row_BK: Any, wanted_BK: Any) -> float:
    """Mean share of the wanted rows."""
    return float(np.mean([len(np.intersect1d(*pair)) / len(pair[1]) for pair in zip(row_BK, wanted_BK, strict=True)]))


def overlaps(
    rows: ItemRows, scorer: nn.Module, user_BE: torch.Tensor, sample_UE: torch.Tensor, k: int, device: str
) -> Iterator[tuple[str, float]]:
    """The name of each kind of rows, and what it shares of the best k that bfloat16 rows give."""
    wanted_BK = best_rows(rows, scorer, user_BE, k, device, torch.bfloat16)
    exact = copy.deepcopy(scorer).float()
    yield "float32", shared(best_rows(rows, exact, user_BE, k, device, torch.float32), wanted_BK)
    for name, dtype in KINDS.items():
        yield f"{name}, to the nearest", shared(best_rows(rows, scorer, user_BE, k, device, dtype), wanted_BK)
        yield name, shared(best_rows(rows, scorer, user_BE, k, device, dtype, sample_UE), wanted_BK)


Found = Mapping[tuple[str, str, str], float]
"""Share by size, scorer and kind of rows."""


def entries(found: Found, told: str, users: int) -> list[dict[str, Any]]:
    """The figures as records: those there are; the one of int8, dot product, 1,000,000 items with all in its note."""
    made = [
        {
            "measure": f"index.{kind}.{scorer}.{size}.recall@1000", "value": round(share, 5), "target": TARGET,
            "unit": "share of the best 1,000 by bfloat16 rows", "rival": f"{kind} rows to the nearest",
            "rival_value": round(found[size, scorer, f"{kind}, to the nearest"], 5), "note": f"{users} users; {told}",
        }
        for (size, scorer, kind), share in found.items() if kind in KINDS
    ]  # fmt: skip
    whole = found.get(("1M", "dot", "int8"))
    if whole is not None:
        every = "; ".join(f"{size}, {scorer}, {kind} {share:.5f}" for (size, scorer, kind), share in found.items())
        made.append({
            "measure": "index.int8.recall@1000", "value": round(whole, 5), "target": TARGET,
            "unit": "share of the best 1,000 by bfloat16 rows, 1M items around trained ones, dot product",
            "rival": "bfloat16 rows", "rival_value": 1, "note": f"{users} users; {every}; {told}",
        })  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.eight_bits", description=__doc__.partition("\n")[0])
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=("dot", "mlp"), default=("dot", "mlp"))
    parser.add_argument("--tower-seconds", type=float, default=60.0)
    parser.add_argument("--scorer-seconds", type=float, default=15.0, help="of its steps")
    parser.add_argument("--steps", type=int, default=8000, help="of the scorer, at most")
    parser.add_argument("--targets", type=int, default=100_000, help="events that the scorer learns from")
    parser.add_argument("--validation", type=int, default=1000, help="held-out events that choose its weights")
    parser.add_argument(
        "--kept",
        type=Path,
        help="file of what training gives: rows, users and scorer; made if it is not there, else read (a pickle)",
    )
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON, written after each")
    parser.add_argument("--quick", action="store_true", help="2,000 items around, few users; records nothing")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    made = kept_or_trained(args)
    users, many, k = (8, 2000, 100) if args.quick else (USERS, MANY, K)
    scorers = {"dot": DotScorer(), "mlp": made.scorer}
    found: dict[tuple[str, str, str], float] = {}
    began = time.monotonic()
    for size, rows in (("46k", made.rows), ("1M", around(made.rows, many, args.device))):
        for name in args.only:
            part = rows if name == "mlp" else without_scalars(rows)
            for kind, share in overlaps(part, scorers[name], made.user_BE[:users], made.sample_UE, k, args.device):
                found[size, name, kind] = share
                print(f"{time.monotonic() - began:.0f} s: {size} items, {name}, {kind}: {share:.5f}", flush=True)
                if args.out is not None:
                    args.out.mkdir(parents=True, exist_ok=True)
                    told = {"told": made.told, "shares": {", ".join(key): value for key, value in found.items()}}
                    (args.out / "eight_bits.json").write_text(json.dumps(told, indent=1))
            if args.device.startswith("cuda") and not args.quick and not args.no_record:
                source = "" if args.kept is None else " --kept FILE"
                kept = {"command": f"python -m benchmarks.eight_bits --device {args.device}{source}"}
                kept_versions = {"versions": versions("torch", "numpy")}
                record("index", [{**one, **kept, **kept_versions} for one in entries(found, made.told, users)])
    return 0


def without_scalars(rows: ItemRows) -> ItemRows:
    """The embeddings alone."""
    layout = Layout(embedding_dim=rows.layout.embedding_dim)
    return ItemRows.build(
        rows.embedding_version, layout, rows.item_ids, rows.feature_RF[:, : layout.embedding_dim].contiguous()
    )


if __name__ == "__main__":
    raise SystemExit(main())
