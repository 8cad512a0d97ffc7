"""Early crossing against the dot product: the trained interaction scorer on frozen towers, the whole catalogue ranked.

    python -m benchmarks.scorer --device cuda [--data FOLDER] [--only ml-1m|globo-news] [--seeds 0 1 2] [--no-record]

A tower a seed, as benchmarks.quality trains them (with context, without live item features); then, on its frozen
embeddings, three scorers, all begun at the dot product and chosen on held-out events:

    late       the dot product, and counts of the item weighed linearly: no crossing of user and item
    crossing   the MLP over [user, item, user * item], no counts
    scorer     the MLP over [user, item, user * item, counts]: what `tower-train --scorer` makes, from its release

ml-1m: leave-one-out, films the user has rated taken off; counts of the last month, year and whole past, a day old at
most. globo-news: clicks of 2017-10-15, states cut at that midnight, articles not yet published taken off; counts of
the last hour, 3 hours, day and the past, as of the last 10 minutes (an index is brought up to date by upserts).
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import quality
from benchmarks.ml1m import log_look
from benchmarks.results import hardware, record
from model.config import TowerConfig
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.metrics import resampled_means
from model.release import Registry, library_versions
from model.retrieval.scorer import ScorerConfig
from model.training.data import EventArrays, Ints
from model.training.evaluate import (
    Candidates,
    catalogue_scalars,
    embed_requests,
    excludes_seen,
    make_test_set,
    rank_scored,
    repeat_share,
)
from model.training.loop import tower_of_release, train
from model.training.scorer import ScorerData, ScorerSettings, fit, fit_interaction, scorer_for, start
from model.training.settings import TrainSettings

ROOT: Final = Path(__file__).resolve().parents[1]
SHORT: Final = {"ml-1m": "ml1m", "globo-news": "globo"}
ARMS: Final = ("dot", "late", "crossing", "scorer")
KS: Final = (20, 100)


class LateScorer(nn.Module):
    """The dot product plus a linear function of the item's scalars: what counts give without any crossing."""

    def __init__(self, embedding_dim: int, scalars: int, scale: float) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.scale = nn.Parameter(torch.tensor(scale))
        self.weight_S = nn.Parameter(torch.zeros(scalars))

    def logits(self, user_BE: torch.Tensor, feature_NF: torch.Tensor) -> torch.Tensor:
        """Shapes as InteractionScorer.logits: f32 [B, 1, N]."""
        item, scalar = feature_NF[..., : self.embedding_dim], feature_NF[..., self.embedding_dim :]
        product_BN = user_BE @ item.T if item.ndim == 2 else (item @ user_BE[:, :, None])[..., 0]
        return (self.scale * product_BN + scalar @ self.weight_S)[:, None]


def chosen(
    name: str, args: argparse.Namespace, seed: int
) -> tuple[TowerConfig, TrainSettings, ScorerConfig, ScorerSettings]:
    """Tower and scorer of a data set, and how both are trained."""
    config, settings = {"ml-1m": quality.movies, "globo-news": quality.news}[name](args.device)
    # held out: enough to choose by; few beside the rest
    settings = replace(settings, seed=seed, max_minutes=args.minutes, validation_share=0.3)
    scorer_config, scorer_settings = scorer_for(load_description(name), device=args.device)
    scorer_settings = replace(
        scorer_settings, seed=seed, steps=args.steps, max_minutes=args.scorer_seconds / 60, max_targets=args.targets,
        half_life_days=settings.half_life_days,
    )  # fmt: skip
    return config, settings, scorer_config, scorer_settings


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One seed: train, rank the test by every arm. Ranks are i64 [B], requests the same for every seed."""
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    config, settings, scorer_config, scorer_settings = chosen(name, args, seed)
    description, folder, device = load_description(name), args.data / name, torch.device(args.device)
    table, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description).sort_by("item_id").combine_chunks()
    users = read_users(str(folder / "users.parquet"), description) if description.user_columns else None
    said: dict[str, Any] = {"dataset": name, "seed": seed}

    def tell(what: str) -> None:
        print(f"{name} seed {seed}, {time.monotonic() - started:.0f} s: {what}", flush=True)

    with tempfile.TemporaryDirectory() as root:
        registry = Registry(root)
        made = train(
            table, items, users, description, registry, settings=settings, config=config, device=args.device
        )  # fmt: skip
        said["tower"] = {name: made.summary[name] for name in ("history", "best_epoch", "train_seconds")}
        tell(f"tower, {len(made.summary['history'])} epochs, best {made.summary['best_epoch']}")
        tower, kept = tower_of_release(registry, made.manifest.release_id, items, description)
        release = registry.load(made.manifest.release_id, device=device)
        data = ScorerData(release, table, kept, users, description, scorer_settings, settings)
        tell(f"{len(data.target):,} targets embedded, {len(data.held_out):,} held out")
        torch.manual_seed(seed)
        scale = 1.0 / release.config.temperature
        late = LateScorer(release.config.embedding_dim, scorer_config.scalars, scale).to(device)
        history = {"late": fit(data, late, late.logits, scorer_config, replace(scorer_settings, learning_rate=0.02))}
        without = replace(scorer_config, windows_h=())
        crossing, scorer = (start(part, release).to(device) for part in (without, scorer_config))
        history["crossing"] = fit_interaction(data, crossing, without, scorer_settings)
        history["scorer"] = fit_interaction(data, scorer, scorer_config, scorer_settings)
        said["scorers"] = history
        for arm, rows in history.items():
            best = max(rows, key=lambda row: row["validation_ndcg@100"])
            tell(
                f"{arm}: held-out Recall@100 {rows[0]['validation_recall@100']:.4f} to "
                f"{best['validation_recall@100']:.4f} at step {best['step']:.0f} of {rows[-1]['step']:.0f}"
            )
        catalogue = kept.drop_columns([n for n in kept.column_names if n == "available_from_us"])
        manifest = registry.write(
            tower, catalogue, trained_until_us=made.manifest.trained_until_us, base=made.manifest.release_id,
            scorer=(scorer_config, scorer.to("cpu")),
        )  # fmt: skip
        released = registry.load(manifest.release_id, device=device)
        events = EventArrays.build(table, users, released.featuriser, description)
        test = make_test_set(table, events, description, limit=args.max_test_events, seed=0)
        excluded = excludes_seen("auto", repeat_share(events))
        candidates = Candidates.of(released, events, kept, test.target_B, exclude_seen=excluded)
        item_IE = released.items.table()
        user_BE = embed_requests(released.encoder, released.head, item_IE, events, test.target_B, test.cut_B)
        scalars = catalogue_scalars(events, scorer_config, released)
        item_NE = item_IE[: events.num_items]
        said["ranks"] = {
            "dot": candidates.ranks(user_BE, item_IE),
            "late": rank_scored(late.logits, user_BE, item_NE, candidates, scalars),
            "crossing": rank_scored(crossing, user_BE, item_NE, candidates, None),
            "scorer": rank_scored(released.scorer, user_BE, item_NE, candidates, scalars),
        }
    tell("ranked: " + ", ".join(f"{arm} {np.mean(rank <= 100):.4f}" for arm, rank in said["ranks"].items()))
    said |= {
        "user_B": events.user_T[test.target_B], "seen_item_B": test.seen_item_B, "total": test.total,
        "catalogue": events.num_items, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    return said


def summary(found: Sequence[Mapping[str, Any]], resamples: int = 500) -> dict[str, Any]:
    """Recall of every arm: mean and spread over seeds; less the dot product, with an interval over users, paired."""
    user_B: Ints = found[0]["user_B"]
    known_B: NDArray[np.bool_] = found[0]["seen_item_B"]
    slices = {"all": np.ones(len(user_B), bool), "item_seen": known_B, "item_unseen": ~known_B}
    made: dict[str, Any] = {}
    for name, mask in slices.items():
        if not mask.any():
            continue
        made[name] = {"events": int(mask.sum()), "users": len(np.unique(user_B[mask]))}
        for k in KS:
            hit_SBA = np.stack([[one["ranks"][arm][mask] <= k for arm in ARMS] for one in found]).transpose(0, 2, 1)
            mean_BA = hit_SBA.mean(0)
            means_RA = resampled_means(mean_BA, user_B[mask], resamples=resamples)
            by_seed_SA = hit_SBA.mean(1)

            def less(a: int, rival: int, by_seed_SA: Any = by_seed_SA, means_RA: Any = means_RA) -> dict[str, Any]:
                low, high = np.quantile(means_RA[:, a] - means_RA[:, rival], [0.025, 0.975])
                difference_S = by_seed_SA[:, a] - by_seed_SA[:, rival]
                value = float(difference_S.mean())
                return {"value": value, "seeds": difference_S.tolist(), "low": float(low), "high": float(high)}

            made[name][f"recall@{k}"] = {
                arm: {
                    "value": float(by_seed_SA[:, a].mean()),
                    "seeds": by_seed_SA[:, a].tolist(),
                    "spread": statistics.stdev(by_seed_SA[:, a].tolist()) if len(found) > 1 else 0.0,
                    "less_dot": less(a, ARMS.index("dot")),
                    "less_late": less(a, ARMS.index("late")),
                }
                for a, arm in enumerate(ARMS)
            }
    return made


def show(name: str, made: Mapping[str, Any]) -> str:
    """The summary as a table for a terminal."""
    lines = []
    for part, cells in made.items():
        lines.append(f"{name}, {part}: {cells['events']:,} requests of {cells['users']:,} users")
        for arm in ARMS:
            shown = [f"  {arm:10}"]
            for k in KS:
                cell = cells[f"recall@{k}"][arm]
                shown.append(
                    f"R@{k} {cell['value']:.4f} ± {cell['spread']:.4f}, less dot {_difference(cell['less_dot'])}, "
                    f"less late {_difference(cell['less_late'])}"
                )
            lines.append("   ".join(shown))
    return "\n".join(lines)


def _difference(less: Mapping[str, Any]) -> str:
    return f"{less['value']:+.4f} ({less['low']:+.4f} to {less['high']:+.4f})"


def entries(name: str, found: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as records."""
    cells = made["all"]["recall@100"]
    ours = cells["scorer"]
    seconds = statistics.mean(one["tower"]["train_seconds"] for one in found)
    steps = min(one["scorers"]["scorer"][-1]["step"] for one in found)
    others = ", ".join(f"{arm} {cells[arm]['value']:.4f}" for arm in ("late", "crossing"))
    at_20 = made["all"]["recall@20"]
    return [
        {
            "measure": f"index.scorer.{SHORT[name]}.recall@100",
            "value": round(ours["value"], 4),
            "unit": f"Recall@100 of the trained scorer, whole catalogue, mean of {len(found)} seeds",
            "rival": "dot product of the same towers",
            "rival_value": round(cells["dot"]["value"], 4),
            "hardware": hardware(),
            "versions": library_versions(),
            "note": (
                f"less the dot product {_difference(ours['less_dot'])}, 95 % interval over users, paired; by seed "
                f"{', '.join(f'{x:+.4f}' for x in ours['less_dot']['seeds'])}; less counts without crossing "
                f"{_difference(ours['less_late'])}; standard deviation over seeds {ours['spread']:.4f}, of the dot "
                f"product {cells['dot']['spread']:.4f}; "
                f"{others}; Recall@20 {at_20['scorer']['value']:.4f}, dot product {at_20['dot']['value']:.4f}; "
                f"{made['all']['events']:,} of {found[0]['total']:,} requests, {found[0]['catalogue']:,} items; towers "
                f"trained {seconds:.0f} s each, {len(found)} side by side, their scorers {steps:,.0f} steps or more"
            ),
        }
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, rank, record."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scorer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(SHORT))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=3, help="seeds at once")
    parser.add_argument("--threads", type=int, default=4, help="of each")
    parser.add_argument("--minutes", type=float, default=1.3, help="of each tower's training")
    parser.add_argument("--scorer-seconds", type=float, default=20.0, help="of each scorer's steps")
    parser.add_argument("--steps", type=int, default=8000, help="of each scorer's training, at most")
    parser.add_argument("--targets", type=int, default=200_000, help="events that scorers learn from")
    parser.add_argument("--max-test-events", type=int, default=30_000, help="sample a larger test down to so many")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    parser.add_argument("--log", type=Path, default=ROOT / "docs/experiments.md", help="where looks at ml-1m are told")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    for name in [args.only] if args.only else list(SHORT):
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(run, [name] * len(args.seeds), args.seeds, [args] * len(args.seeds)))
        made = summary(found)
        print(show(name, made), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            kept = [{key: one[key] for key in ("seed", "tower", "scorers", "seconds")} for one in found]
            report = {"dataset": name, "slices": made, "runs": kept, "hardware": hardware()}
            (args.out / f"scorer-{name}.json").write_text(json.dumps(report, indent=1))
        if not args.no_record:
            if name == "ml-1m":
                cell = made["all"]["recall@100"]
                told = ", ".join(f"{arm} {cell[arm]['value']:.4f}" for arm in ARMS)
                log_look(args.log, f"benchmarks.scorer, seeds {args.seeds}: Recall@100 {told}")
            record("index", entries(name, found, made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
