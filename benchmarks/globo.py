"""Fresh news: the tower with live item features beside what a newsroom would count, seven days with frozen weights.

    python -m benchmarks.globo [--data FOLDER] [--device cuda] [--max-minutes 3.5] [--out FOLDER] [--no-record]
    python -m benchmarks.globo --plot REPORT.json

globo-news. Two towers learn from the days before local midnight (03:00 UTC) of 2017-10-10: a plain one, and one with
live item features (model.live_items). Then every click of the seven local days from there is asked as a request just
before it, ranked among all articles published by then. States are cut at 03:00 UTC of the click's day, weights stay as
they are. The rivals are counted on the same requests, exactly, up to the second:

    popular_10m, _1h, _3h    clicks in the time before the request
    coclick_last             how often others went on from the user's last click to the article, within a day
    coclick_midnight         the same from the last click before midnight
    blend_10m, blend_1h      share of those who went on, / (5 + their number), plus share of all clicks in that time
    blend_..._unseen         the same, what the user has had already last
    blend_..._today          the same again, by the last click since midnight only: older ones mislead

The log is for research only and is not part of the repository.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import quality
from benchmarks.results import hardware, record
from model.config import TowerConfig
from model.dataset import Evaluation, load_description
from model.event_log import read_items, read_log
from model.live_items import LiveCounts
from model.metrics import event_metrics, ranks_of, resampled_means
from model.release import Registry, Release, library_versions
from model.training.data import DAY_US, EventArrays, Ints
from model.training.evaluate import (
    Candidates,
    LiveCatalogue,
    embed_requests,
    excludes_seen,
    make_test_set,
    rank_live,
    repeat_share,
    seen_items,
)
from model.training.loop import TrainResult, train
from model.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
FIRST_DAY = datetime(2017, 10, 10, 3, tzinfo=UTC)
DAYS = 7
K = 20
PLAIN_SHARE = 0.35
"""Share of --max-minutes that the plain tower's training gets."""
_HOUR_US = 3_600_000_000
POPULAR_HOURS = {"10m": 1 / 6, "1h": 1.0, "3h": 3.0}
BLENDS = ("10m", "1h")
_BLEND_PRIOR = 5.0
TOWERS = ("state", "state+context", "state+live", "state+context+live", "fresh+context+live")
RIVALS = (
    *(f"popular_{name}" for name in POPULAR_HOURS), "coclick_last", "coclick_midnight",
    *(f"blend_{name}" for name in BLENDS), *(f"blend_{name}_unseen" for name in BLENDS),
    *(f"blend_{name}_today" for name in BLENDS),
)  # fmt: skip
HYBRID = "state+context+live"


def towers(device: str) -> dict[str, tuple[TowerConfig, TrainSettings]]:
    """Config and settings of the plain tower and of the one with live item features."""
    config, settings = quality.news(device)
    # one hash row: with many, few articles share one, and what it learns of them by heart is given to a later one
    live_config = replace(
        config, live_windows_h=(1 / 6, 0.5, 1.0, 3.0, 24.0), live_bucket_s=60, item_dropout=0.1, temperature=0.2,
        hash_rows=1,
    )  # fmt: skip
    # what a user has had is a negative like any other, so that its weight is learned; no early stopping while the
    # learning rate is high: NDCG on the last day falls at first, and rises as the rate comes down
    live_settings = replace(
        settings, new_item_share=1.0, new_item_days=DAYS, live_negatives=64, mask_same_user=False,
        epochs=12, patience=12,
    )  # fmt: skip
    return {"plain": (config, settings), "live": (live_config, live_settings)}


class RunningCounts:
    """Clicks of every article in the time before each request, requests in the order of time."""

    def __init__(self, item: Ints, time_us: Ints, num_items: int, hours: float, device: torch.device) -> None:
        """item, time_us: all clicks, by time."""
        self._item, self._time_us, self._num_items = item, time_us, num_items
        self._length_us, self._device = int(hours * _HOUR_US), device
        self._low = self._high = 0
        self._count_N = torch.zeros(num_items, device=device)

    def ahead(self, time_us_b: Ints) -> torch.Tensor:
        """Counts at the next requests, t - hours <= time < t: f32 [b, N]. time_us_b: rising, from call to call too."""
        entered = np.searchsorted(self._time_us, time_us_b)
        left = np.searchsorted(self._time_us, time_us_b - self._length_us)
        change_bN = torch.zeros(len(time_us_b), self._num_items, device=self._device)
        for first, ends, sign in ((self._high, entered, 1.0), (self._low, left, -1.0)):
            row = torch.from_numpy(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=first))).to(self._device)
            item = torch.from_numpy(self._item[first : ends[-1]]).to(self._device)
            change_bN.index_put_((row, item), torch.full((len(row),), sign, device=self._device), accumulate=True)
        change_bN[0] += self._count_N
        count_bN = change_bN.cumsum(0)
        self._low, self._high, self._count_N = int(left[-1]), int(entered[-1]), count_bN[-1].clone()
        return count_bN


def coclicks(exact: LiveCounts, source_b: torch.Tensor, bucket_b: torch.Tensor, num_items: int) -> torch.Tensor:
    """How often others went on from an article to each other one before the request: f32 [b, N]; -1: no article."""
    b, item = exact.followers(source_b)
    b, item = b[item < num_items], item[item < num_items]
    count = exact.pairs.since(source_b[b] * exact.num_rows + item, bucket_b[b]).float()
    count_bN = torch.zeros(len(source_b), num_items, device=source_b.device)
    count_bN[b, item] = count
    return count_bN


def rival_ranks(
    events: EventArrays, target_B: Ints, candidates: Candidates, config: TowerConfig, device: torch.device
) -> dict[str, Ints]:
    """Ranks of the clicks asked for by every rival."""
    exact = events.live_counts(config, bucket_s=1).to(device)
    clicks = np.flatnonzero(events.positive_T & (events.item_T < events.num_items))
    clicks = clicks[np.argsort(events.time_us_T[clicks], kind="stable")]
    by_time = events.item_T[clicks], events.time_us_T[clicks], events.num_items
    running = {name: RunningCounts(*by_time, hours, device) for name, hours in POPULAR_HOURS.items()}
    first_B = events.offsets[events.user_T[target_B]]
    before_B, midnight_B = target_B - 1, events.refresh_cut_T[target_B]
    last_B = np.where(before_B >= first_B, events.item_T[before_B], -1)
    night_B = np.where(midnight_B >= first_B, events.item_T[np.maximum(midnight_B, 0)], -1)
    born_N = None if candidates.born_us_N is None else torch.from_numpy(candidates.born_us_N).to(device)
    earlier = replace(candidates, **dict(zip(("seen_rows", "seen_offsets"), seen_items(events, target_B), strict=True)))
    order = np.argsort(candidates.time_us_B, kind="stable")
    chunk = max(1, (2**26 if device.type == "cuda" else 2**23) // events.num_items)
    ranks = {name: np.empty(len(target_B), np.int64) for name in RIVALS}
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        time_us = torch.from_numpy(candidates.time_us_B[part])
        bucket = exact.bucket(time_us).to(device)
        excluded = candidates.excluded(part, device)
        if born_N is not None:
            excluded |= born_N > time_us.to(device)[:, None]
        last, night = (torch.from_numpy(source_B[part]).to(device) for source_B in (last_B, night_B))
        had = earlier.excluded(part, device, with_target=True)
        popular = {name: counts.ahead(candidates.time_us_B[part]) for name, counts in running.items()}
        scores = {f"popular_{name}": count_bN for name, count_bN in popular.items()}
        scores["coclick_last"] = coclicks(exact, last, bucket, events.num_items)
        scores["coclick_midnight"] = coclicks(exact, night, bucket, events.num_items)
        follow_bN = scores["coclick_last"]
        follow_bN = follow_bN / (follow_bN.sum(1, keepdim=True) + _BLEND_PRIOR)
        is_today_b1 = torch.from_numpy(before_B[part] > midnight_B[part]).to(device)[:, None]
        for name in BLENDS:
            share_bN = popular[name] / popular[name].sum(1, keepdim=True).clamp(min=1)
            scores[f"blend_{name}"] = share_bN + follow_bN
            scores[f"blend_{name}_unseen"] = share_bN + follow_bN - 2.0 * had
            scores[f"blend_{name}_today"] = share_bN + follow_bN * is_today_b1 - 2.0 * had
        item = torch.from_numpy(candidates.item_B[part]).to(device)
        for name, score_bN in scores.items():
            ranks[name][part] = ranks_of(score_bN, item, excluded).cpu().numpy()
    return ranks


def tower_ranks(
    plain: Release, live: Release, events: EventArrays, target_B: Ints, cut_B: Ints, candidates: Candidates
) -> dict[str, Ints]:
    """Ranks by both towers: yesterday's states with and without context, and states encoded up to the request."""
    tables = {release: release.items.table() for release in (plain, live)}

    def embed(release: Release, cut: Ints, with_context: bool = True) -> torch.Tensor:
        return embed_requests(
            release.encoder, release.head, tables[release], events, target_B, cut, with_context=with_context
        )

    with torch.inference_mode():
        ranks = {
            "state": candidates.ranks(embed(plain, cut_B, False), tables[plain]),
            "state+context": candidates.ranks(embed(plain, cut_B), tables[plain]),
        }
        counts = events.live_counts(live.config)
        requests = events.live_requests(target_B, counts, live.config)
        arms = {
            "state+live": (embed(live, cut_B, False), requests.without_recent()),
            "state+context+live": (embed(live, cut_B), requests),
            "fresh+context+live": (embed(live, target_B - 1), requests),
        }
        catalogue = LiveCatalogue.of(live.items, tables[live])
        ranks |= rank_live(catalogue, counts.to(live.device), arms, candidates)
    return ranks


def slices(
    events: EventArrays, target_B: Ints, cut_B: Ints, seen_item_B: NDArray[np.bool_], day_B: Ints
) -> dict[str, NDArray[np.bool_]]:
    """Requests by what is known of them, and by local day."""
    first_B = events.offsets[events.user_T[target_B]]
    history_B = cut_B >= first_B
    made = {
        "all": np.ones(len(target_B), bool),
        "item_seen": seen_item_B,
        "item_unseen": ~seen_item_B,
        "user_with_history": history_B,
        "user_without_history": ~history_B,
        "earlier_that_day_and_before": history_B & (target_B - 1 > cut_B),
    }
    for day in range(DAYS):
        made[(FIRST_DAY + timedelta(days=day)).date().isoformat()] = day_B == day
    return {name: mask for name, mask in made.items() if mask.any()}


def summary(
    ranks: Mapping[str, Ints], masks: Mapping[str, NDArray[np.bool_]], user_B: Ints, resamples: int
) -> dict[str, Any]:
    """Recall@20 with intervals, and other metrics, by slice and arm; the ratio to the state alone likewise."""
    arms = list(ranks)
    found: dict[str, Any] = {}
    for name, mask in masks.items():
        hit_BA = np.stack([ranks[arm][mask] <= K for arm in arms], 1).astype(np.float64)
        means_RA = resampled_means(hit_BA, user_B[mask], resamples=resamples)
        by_arm: dict[str, Any] = {}
        for a, arm in enumerate(arms):
            by_arm[arm] = _interval(float(hit_BA[:, a].mean()), means_RA[:, a])
            other = event_metrics(ranks[arm][mask], (10, K))
            by_arm[arm] |= {metric: float(other[metric].mean()) for metric in ("recall@10", f"ndcg@{K}", "mrr")}
        column = {arm: means_RA[:, a] for a, arm in enumerate(arms)}
        rival = max(RIVALS, key=lambda arm, by_arm=by_arm: by_arm[arm]["value"])  # type: ignore[misc]
        state = by_arm["state"]["value"]
        found[name] = {
            "events": int(mask.sum()),
            "users": len(np.unique(user_B[mask])),
            "recall@20": by_arm,
            "hybrid_over_state": _interval(
                by_arm[HYBRID]["value"] / state if state else float("nan"),
                column[HYBRID] / np.maximum(column["state"], 1e-9),
            ),
            "best_rival": rival,
            "hybrid_less_best_rival": _interval(
                by_arm[HYBRID]["value"] - by_arm[rival]["value"], column[HYBRID] - column[rival]
            ),
        }
    return found


def _interval(value: float, resampled_R: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train both towers, ask every request of everything, and say what came of it."""
    first_us = int(FIRST_DAY.timestamp()) * 1_000_000
    until_us = first_us + DAYS * DAY_US
    description = replace(
        load_description("globo-news"), evaluation=Evaluation(test_from_us=first_us, test_until_us=until_us)
    )
    folder = args.data / "globo-news"
    table, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description)
    device = torch.device(args.device)
    results: dict[str, TrainResult] = {}
    releases: dict[str, Release] = {}
    with tempfile.TemporaryDirectory() as registry:
        for name, (config, settings) in towers(args.device).items():
            minutes = args.max_minutes * (PLAIN_SHARE if name == "plain" else 1 - PLAIN_SHARE)
            config = replace(config, **_chosen(args.config, name))
            settings = replace(settings, max_minutes=minutes, max_target_users=args.max_users, seed=args.seed)
            settings = replace(settings, **_chosen(args.settings, name))
            results[name] = train(
                table, items, None, description, Registry(registry),
                settings=settings, config=config, device=args.device,
            )  # fmt: skip
            for row in results[name].summary["history"]:
                print(name, json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)
            releases[name] = Registry(registry).load(results[name].manifest.release_id, device=device)
    started = time.monotonic()
    live = releases["live"]
    events = EventArrays.build(table, None, live.featuriser, description)
    test = make_test_set(table, events, description, limit=args.max_test_events, seed=args.seed)
    repeats = repeat_share(events)
    excluded = excludes_seen("auto", repeats)
    candidates = Candidates.of(live, events, items, test.target_B, exclude_seen=excluded)
    print(f"{len(test.target_B):,} of {test.total:,} clicks are asked", flush=True)
    ranks = tower_ranks(releases["plain"], live, events, test.target_B, test.cut_B, candidates)
    print(f"towers ranked after {time.monotonic() - started:.0f} s", flush=True)
    ranks |= rival_ranks(events, test.target_B, candidates, live.config, device)
    print(f"rivals ranked after {time.monotonic() - started:.0f} s", flush=True)
    day_B = (candidates.time_us_B - first_us) // DAY_US
    masks = slices(events, test.target_B, test.cut_B, test.seen_item_B, day_B)
    found = summary(ranks, masks, events.user_T[test.target_B], args.resamples)
    return {
        "dataset": "globo-news",
        "days": [FIRST_DAY.isoformat(), (FIRST_DAY + timedelta(days=DAYS)).isoformat()],
        "test_events": len(test.target_B),
        "test_events_total": test.total,
        "catalogue": events.num_items,
        "seen_items": "excluded" if excluded else "kept",
        "repeat_share": round(repeats, 4),
        "interval": f"95 %, bootstrap over users, {args.resamples} resamples",
        "slices": found,
        "training": {name: result.summary for name, result in results.items()},
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "hardware": hardware(),
        "versions": library_versions(),
    }


def _chosen(pairs: Sequence[str], tower: str) -> dict[str, Any]:
    """NAME=JSON pairs as values; the plain tower has no part in what is about live features."""
    values = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    return {
        name: value for name, value in values.items() if tower != "plain" or not name.startswith(("live_", "new_item_"))
    }


def show(report: Mapping[str, Any]) -> str:
    """Recall@20 by slice and arm, as text."""
    arms = [*TOWERS, *RIVALS]
    lines = []
    for name, found in report["slices"].items():
        lines.append(f"{name}: {found['events']:,} clicks of {found['users']:,} users")
        for arm in arms:
            cell = found["recall@20"][arm]
            interval = f"{cell['value']:.4f} ({cell['low']:.4f} to {cell['high']:.4f})"
            lines.append(f"  {arm:22s} {interval}, ndcg@20 {cell['ndcg@20']:.4f}")
        ratio, less = found["hybrid_over_state"], found["hybrid_less_best_rival"]
        lines.append(
            f"  hybrid / state {ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}); hybrid - "
            f"{found['best_rival']} {less['value']:+.4f} ({less['low']:+.4f} to {less['high']:+.4f})"
        )
    return "\n".join(lines)


def entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report's figures as records."""
    whole = report["slices"]["all"]
    recall, ratio, less = whole["recall@20"], whole["hybrid_over_state"], whole["hybrid_less_best_rival"]
    best = whole["best_rival"]
    asked = f"{report['test_events']:,} of {report['test_events_total']:,} clicks, 7 days, weights frozen before them"
    epochs = {name: len(run["history"]) for name, run in report["training"].items()}
    shared = {
        "hardware": report["hardware"],
        "versions": report["versions"],
    }
    made = [
        {
            "measure": "globo.hybrid_over_state.recall@20",
            "value": round(ratio["value"], 3),
            "unit": "Recall@20 of daily state + context + live items over that of the daily state alone (plain tower)",
            "target": 3,
            "rival": "daily state alone, Recall@20",
            "rival_value": round(recall["state"]["value"], 4),
            "note": (
                f"95 % interval {ratio['low']:.3f} to {ratio['high']:.3f} over users; {asked}; hybrid "
                f"{recall[HYBRID]['value']:.4f}, state + context without live items "
                f"{recall['state+context']['value']:.4f}; epochs {epochs}"
            ),
        },
        {
            "measure": "globo.hybrid.hit@20",
            "value": round(recall[HYBRID]["value"], 4),
            "unit": "Recall@20, mean over test clicks",
            "target": round(recall[best]["value"], 4),
            "rival": best,
            "rival_value": round(recall[best]["value"], 4),
            "note": (
                f"95 % interval {recall[HYBRID]['low']:.4f} to {recall[HYBRID]['high']:.4f}; less the rival "
                f"{less['value']:+.4f} ({less['low']:+.4f} to {less['high']:+.4f}); {asked}; "
                + ", ".join(f"{arm} {recall[arm]['value']:.4f}" for arm in (*TOWERS, *RIVALS))
            ),
        },
    ]
    return [entry | shared for entry in made]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Recall@20 of each local day by arm, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    days = [name for name in report["slices"] if name[:2] == "20"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    shown = [*TOWERS, "popular_10m", "popular_3h", "coclick_last", "blend_10m", "blend_10m_today"]
    for arm in shown:
        values = [report["slices"][day]["recall@20"][arm]["value"] for day in days]
        is_rival = arm in RIVALS
        axes.plot(
            [day[5:] for day in days], values,
            linestyle="--" if is_rival else "-", linewidth=2.5 if arm == HYBRID else 1.2, label=arm,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Recall@20")
    axes.set_xlabel("local day of 2017, weights frozen before the first")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, ask, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.globo", description=__doc__.partition("\n")[0])
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=3.5, help="of training, both towers together")
    parser.add_argument("--max-test-events", type=int, default=400_000, help="sample the clicks asked down to so many")
    parser.add_argument("--max-users", type=int, help="learn from the clicks of so many users only, for a small trial")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", nargs="*", default=[], metavar="NAME=JSON", help="changes to the towers")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=JSON", help="changes to the trainings")
    parser.add_argument("--out", type=Path, help="folder for the report as JSON")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="REPORT.json", help="only draw a report, beside it")
    args = parser.parse_args(argv)
    if args.plot is not None:
        draw(json.loads(args.plot.read_text()), args.plot.with_suffix(".svg"))
        return 0
    report = measure(args)
    print(show(report))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "globo.json").write_text(json.dumps(report, indent=1))
    if not args.no_record:
        record("quality", entries(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
