"""Early crossing against the dot product: the trained interaction scorer on frozen towers, the whole catalogue ranked.

    python -m benchmarks.scorer --device cuda [--data FOLDER] [--only ml-1m|globo-news] [--seeds 0 1 2] [--no-record]

A tower a seed, as benchmarks.quality trains them (with context, without live item features); then, on its frozen
embeddings, four ways to score. Those that are trained begin at a line fitted on training targets (`crossing` at the dot
product); of their steps one is chosen on held-out events:

    count      no model: the items most often chosen in the shortest window before the request (hour, month)
    late       the dot product, and counts of the item weighed linearly: no crossing of user and item
    crossing   the MLP over [user, item, user * item], no counts
    scorer     the MLP over [user, item, user * item, counts]: what `tower-train --scorer` makes, from its release

ml-1m: leave-one-out, films the user has rated taken off; counts of the last month, year and whole past, a day old at
most. globo-news: clicks of 2017-10-15, states cut at that midnight, articles not yet published taken off; counts of
the last hour, 3 hours, day and the past, as of the last 10 minutes (an index is brought up to date by upserts).

Seeds run side by side. Each scorer gets its part of the time that is left, its rankings of held-out events counted; the
test is ranked by an arm as soon as it is trained, printed and, with --out, kept. What is recorded is of the seeds that
were done in time; of a run that was cut off, `--from FOLDER` records the seeds that all arms of are kept there.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

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
from model.release import Manifest, Registry, library_versions
from model.retrieval.scorer import ScorerConfig
from model.training.data import EventArrays, Ints
from model.training.evaluate import (
    Candidates,
    catalogue_scalars,
    embed_requests,
    excludes_seen,
    make_test_set,
    rank_scored,
    recent_popularity_ranks,
    repeat_share,
)
from model.training.loop import tower_of_release, train
from model.training.scorer import Line, ScorerData, ScorerSettings, fit, fit_interaction, fitted_line, scorer_for, start
from model.training.settings import TrainSettings

ROOT: Final = Path(__file__).resolve().parents[1]
SHORT: Final = {"ml-1m": "ml1m", "globo-news": "globo"}
ARMS: Final = ("dot", "count", "late", "crossing", "scorer")
KS: Final = (20, 100)
LEAST_S: Final = 2.0
"""Of an arm's steps, however little time is left."""
RANKING_SHARE: Final = 0.3
"""Of an arm's time, for ranking held-out events."""
RELEASE_S: Final = 3.0
"""For writing the release and reading it again."""


class LateScorer(nn.Module):
    """The dot product plus a linear function of the item's scalars: what counts give without any crossing."""

    def __init__(self, embedding_dim: int, line: Line) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.scale = nn.Parameter(torch.tensor(line.dot))
        self.weight_S = nn.Parameter(line.weight_S.clone())

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


@dataclass(frozen=True, slots=True)
class Budget:
    """An arm's part of a seed's time."""

    steps_s: float
    validations: int

    @classmethod
    def of(cls, allowed_s: float, ranking_s: float, most_s: float, most_validations: int = 10) -> Self:
        """allowed_s: for all of it. ranking_s: of one ranking of the held-out events; there is one more, the first."""
        validations = int(max(1, min(most_validations, RANKING_SHARE * allowed_s / max(ranking_s, 1e-9) - 1)))
        return cls(max(LEAST_S, min(most_s, allowed_s - (validations + 1) * ranking_s)), validations)


class Seed:
    """One seed's data, towers and time; its arms are trained and ranked one after the other."""

    def __init__(self, name: str, seed: int, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.name, self.seed, self.args = name, seed, args
        self.started = time.monotonic()
        self.said: dict[str, Any] = {"dataset": name, "seed": seed, "ranks": {}, "scorers": {}}

    def tell(self, what: str) -> None:
        """One line."""
        print(f"{self.name} seed {self.seed}, {time.monotonic() - self.started:.0f} s: {what}", flush=True)

    def budget(self, arms_left: int, rank: Callable[[], Any], ranking_test_s: float) -> Budget:
        """Of the next arm. rank: ranks the held-out events once. ranking_test_s: that of the whole test, by guess."""
        rank()  # makes what later ones find made
        begun = time.monotonic()
        rank()
        ranking_s = time.monotonic() - begun
        left_s = self.args.most_seconds - (time.monotonic() - self.started) - RELEASE_S
        return Budget.of(left_s / arms_left - ranking_test_s, ranking_s, self.args.scorer_seconds)

    def keep(self, arm: str, rank_B: Any, history: Any = None) -> None:
        """An arm that is done: printed, and written where --out says."""
        self.said["ranks"][arm] = rank_B
        if history is not None:
            self.said["scorers"][arm] = history
        self.said["seconds"] = round(time.monotonic() - self.started, 1)
        self.tell(f"{arm}: test Recall@20 {np.mean(rank_B <= 20):.4f}, Recall@100 {np.mean(rank_B <= 100):.4f}")
        if self.args.out is not None:
            write_seed(self.args.out, self.said)


def write_seed(folder: Path, said: Mapping[str, Any]) -> None:
    """What a seed has come to, in place of what it had: lists for arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scorer-{said['dataset']}-seed{said['seed']}.json"
    path.with_suffix(".new").write_text(json.dumps(said, default=lambda value: value.tolist()))
    path.with_suffix(".new").replace(path)


def read_seeds(folder: Path, name: str) -> list[dict[str, Any]]:
    """The seeds of a data set that `write_seed` has kept with all arms."""
    found = []
    for path in sorted(folder.glob(f"scorer-{name}-seed*.json")):
        said = json.loads(path.read_text())
        said["ranks"] = {arm: np.array(ranks) for arm, ranks in said["ranks"].items()}
        said |= {key: np.array(said[key]) for key in ("user_B", "seen_item_B")}
        if set(ARMS) <= said["ranks"].keys():
            found.append(said)
    return found


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One seed: train, rank the test by every arm. Ranks are i64 [B], requests the same for every seed."""
    one = Seed(name, seed, args)
    said, tell = one.said, one.tell
    config, settings, scorer_config, scorer_settings = chosen(name, args, seed)
    description, folder, device = load_description(name), args.data / name, torch.device(args.device)
    table, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description).sort_by("item_id").combine_chunks()
    users = read_users(str(folder / "users.parquet"), description) if description.user_columns else None
    with tempfile.TemporaryDirectory() as root:
        registry = Registry(root)
        made = train(
            table, items, users, description, registry, settings=settings, config=config, device=args.device
        )  # fmt: skip
        said["tower"] = {name: made.summary[name] for name in ("history", "best_epoch", "train_seconds")}
        tell(f"tower, {len(made.summary['history'])} epochs, best {made.summary['best_epoch']}")
        tower, kept = tower_of_release(registry, made.manifest.release_id, items, description)
        release = registry.load(made.manifest.release_id, device=device)
        events = EventArrays.build(table, users, release.featuriser, description)
        test = make_test_set(table, events, description, limit=args.max_test_events, seed=0)
        excluded = excludes_seen("auto", repeat_share(events))
        candidates = Candidates.of(release, events, kept, test.target_B, exclude_seen=excluded)
        item_IE = release.items.table()
        user_BE = embed_requests(release.encoder, release.head, item_IE, events, test.target_B, test.cut_B)
        item_NE = item_IE[: events.num_items]
        said |= {
            "user_B": events.user_T[test.target_B], "seen_item_B": test.seen_item_B, "total": test.total,
            "catalogue": events.num_items,
        }  # fmt: skip
        one.keep("dot", candidates.ranks(user_BE, item_IE))
        item_B, time_us_B = candidates.item_B, candidates.time_us_B
        hours = min(scorer_config.windows_h)
        one.keep("count", recent_popularity_ranks(events, item_B, time_us_B, hours, candidates.mask))
        data = ScorerData(release, table, kept, users, description, scorer_settings, settings)
        tell(f"{len(data.target):,} targets embedded, {len(data.held_out):,} held out")
        scalars = catalogue_scalars(events, scorer_config, release)
        torch.manual_seed(seed)
        late = LateScorer(
            release.config.embedding_dim, fitted_line(data, scorer_config, scorer_settings)
        ).to(device)  # fmt: skip
        without = replace(scorer_config, windows_h=())
        crossing, scorer = (start(data, part, scorer_settings) for part in (without, scorer_config))
        arms: list[tuple[str, Any, ScorerConfig]] = [
            ("scorer", scorer, scorer_config), ("late", late, scorer_config), ("crossing", crossing, without)
        ]  # fmt: skip
        ranked_s = 0.0
        for place, (arm, module, read) in enumerate(arms):
            budget = one.budget(
                len(arms) - place, lambda m=module, r=read: rank_scored(m.logits, *data.validation(), data.scalars(r)),
                ranked_s,
            )  # fmt: skip
            its = replace(scorer_settings, max_minutes=budget.steps_s / 60, validations=budget.validations)
            if arm == "late":
                history = fit(data, module, module.logits, read, replace(its, learning_rate=0.02))
            else:
                history = fit_interaction(data, module, read, its)
            best = max(history, key=lambda row: row["validation_ndcg@100"])
            tell(
                f"{arm}: held-out Recall@100 {history[0]['validation_recall@100']:.4f} to "
                f"{best['validation_recall@100']:.4f} at step {best['step']:.0f} of {history[-1]['step']:.0f}, "
                f"{history[-1]['seconds']:.0f} s of steps, {history[-1]['ranking_seconds']:.0f} s of rankings"
            )
            begun = time.monotonic()
            ranking: Any = module.logits if arm == "late" else module
            if arm == "scorer":
                ranking = released_scorer(registry, tower, kept, made.manifest, scorer_config, module, device)
            rank_B = rank_scored(ranking, user_BE, item_NE, candidates, scalars if read.scalars else None)
            ranked_s = time.monotonic() - begun
            one.keep(arm, rank_B, history)
    return said


def released_scorer(
    registry: Registry, tower: Any, items: Any, of: Manifest, config: ScorerConfig, scorer: nn.Module,
    device: torch.device,
) -> nn.Module:  # fmt: skip
    """The scorer as a release gives it: written with the tower, and loaded again."""
    catalogue = items.drop_columns([name for name in items.column_names if name == "available_from_us"])
    manifest = registry.write(
        tower, catalogue, trained_until_us=of.trained_until_us, base=of.release_id, scorer=(config, scorer.to("cpu")),
    )  # fmt: skip
    loaded: nn.Module = registry.load(manifest.release_id, device=device).scorer
    return loaded


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
    others = ", ".join(f"{arm} {cells[arm]['value']:.4f}" for arm in ("count", "late", "crossing"))
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


def report(name: str, found: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Print, keep and record the seeds that are done."""
    if not found:
        print(f"{name}: no seed has all arms", flush=True)
        return
    made = summary(found)
    print(f"{len(found)} of {len(args.seeds)} seeds\n{show(name, made)}", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        kept = [{key: one[key] for key in ("seed", "tower", "scorers", "seconds")} for one in found]
        told = {"dataset": name, "slices": made, "runs": kept, "hardware": hardware()}
        (args.out / f"scorer-{name}.json").write_text(json.dumps(told, indent=1))
    if not args.no_record:
        record("index", entries(name, found, made))


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
    parser.add_argument("--most-seconds", type=float, default=240.0, help="of a seed; scorers share what is left")
    parser.add_argument("--from", dest="read", type=Path, help="train nothing; record the seeds that --out kept there")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    for name in [args.only] if args.only else list(SHORT):
        if args.read is not None:
            report(name, read_seeds(args.read, name), args)
            continue
        began = time.monotonic()
        found: list[dict[str, Any]] = []
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            failed: BaseException | None = None
            for done in as_completed([pool.submit(run, name, seed, args) for seed in args.seeds]):
                if done.exception() is not None:  # the others are kept first
                    failed = failed or done.exception()
                    continue
                one = done.result()
                if name == "ml-1m" and not args.no_record:
                    told = ", ".join(f"{arm} {np.mean(one['ranks'][arm] <= 100):.4f}" for arm in ARMS)
                    log_look(args.log, f"benchmarks.scorer, seed {one['seed']}: Recall@100 {told}")
                found = sorted([*found, one], key=lambda one: args.seeds.index(one["seed"]))
                report(name, found, args)  # a run that is cut off leaves the seeds that were done
            if failed is not None:
                raise failed
        print(f"{name}: {time.monotonic() - began:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
