"""How slates of real catalogues shift in composition from shards with quotas and caps of their own to one global walk.

    python -m benchmarks.dial [--data FOLDER] [--users 500] [--no-record]

Scores are PureSVD's (Cremonesi, Koren and Turrin 2010, section 3.3; rank 64): a user is his row of the binary user-item
matrix, times its right singular vectors, which are the items. Seen items are left out, 100 are wanted, rows are dealt
to the shards in turn. The caps are ones that a shop would write for its whole page:

- ml-1m: at most 12 of a main genre (the first that is named), 6 of a release year (in the advertiser's place)
- online-retail: at most 4 of a product range (the first three characters of the stock code, in the advertiser's place);
  utility is score times the root of the median price (in the bid's place)

In shards the same caps let through up to `shards` times as much. (globo-news has neither categories nor prices.)
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.results import record, versions
from model.retrieval.index import LiveIndex
from model.retrieval.rows import NONE, ItemRows, Layout
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import DotScorer
from model.retrieval.shards import Shift, shifts

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RANK, K = 64, 100
SHARDS = (2, 8, 32)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Items of a data set, with what the caps count and what stands for a bid."""

    item_ids: NDArray[np.int64]
    category_R: NDArray[np.int64]
    advertiser_R: NDArray[np.int64]
    bid_R: NDArray[np.float32]
    plan: Plan
    bid_power: float


def numbered(values: Sequence[str | None]) -> NDArray[np.int64]:
    """A number for each different value, -1 for None."""
    places = {value: place for place, value in enumerate(sorted({value for value in values if value is not None}))}
    return np.array([NONE if value is None else places[value] for value in values], np.int64)


def read_catalogue(name: str, data: Path) -> Catalogue:
    """The items of ml-1m or online-retail, as the module says."""
    items = pq.read_table(data / name / "items.parquet")
    ids = items["item_id"].to_numpy().astype(np.int64)
    none, ones = np.full(len(ids), NONE), np.ones(len(ids), np.float32)
    if name == "ml-1m":
        genre_R = numbered([genres[0] if genres else None for genres in items["categories"].to_pylist()])
        year_R = numbered([str(year) for year in items["year"].to_pylist()])
        return Catalogue(ids, genre_R, year_R, ones, Plan(k=K, category_cap=12, advertiser_cap=6), 0.0)
    range_R = numbered([code[:3] for code in items["stock_code"].to_pylist()])
    price_R = np.nan_to_num(items["median_price"].to_numpy().astype(np.float32))  # never bought: nothing
    return Catalogue(ids, none, range_R, price_R, Plan(k=K, advertiser_cap=4), 0.5)


def pure_svd(seen_UN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Users [U, rank] and items [N, rank] of a binary matrix, f32."""
    torch.manual_seed(0)
    item_NE = torch.svd_lowrank(seen_UN, q=rank, niter=4)[2]
    return seen_UN @ item_NE, item_NE


def report(name: str, data: Path, users: int, shards: Sequence[int]) -> dict[int, list[Shift]]:
    """Shifts by the number of shards, means over users drawn at random."""
    catalogue = read_catalogue(name, data)
    events = pq.read_table(data / name / "events.parquet", columns=["user_id", "item_id", "event_type"])
    events = events.filter(pc.not_equal(events["event_type"], "return"))
    place = {item: number for number, item in enumerate(catalogue.item_ids.tolist())}
    user_ids, user_index = np.unique(events["user_id"].to_numpy(), return_inverse=True)
    item_index = np.array([place[item] for item in events["item_id"].to_pylist()], np.int64)
    seen_UN = torch.zeros(len(user_ids), len(place))
    seen_UN[torch.from_numpy(user_index), torch.from_numpy(item_index)] = 1
    user_UE, item_NE = pure_svd(seen_UN, RANK)
    rows = ItemRows.build(
        "benchmark", Layout(embedding_dim=RANK), catalogue.item_ids.tolist(), item_NE.numpy(),
        category_R=catalogue.category_R, advertiser_R=catalogue.advertiser_R, bid_R=catalogue.bid_R,
    )  # fmt: skip
    index = LiveIndex(rows, DotScorer())
    asked = np.random.default_rng(0).permutation(len(user_ids))[:users]
    requests = [
        Request(bid_power=catalogue.bid_power, seen=catalogue.item_ids[seen_N.numpy() > 0].tolist())
        for seen_N in seen_UN[asked]
    ]
    return {count: shifts(index, user_UE[asked], requests, catalogue.plan, count) for count in shards}


def entries(name: str, found: dict[int, list[Shift]]) -> list[dict[str, Any]]:
    """What the most shards change at dial 0."""
    shards = max(found)
    local = found[shards][0]
    note = "; ".join(f"{count} shards, {one.line()}" for count, dials in found.items() for one in dials)
    return [
        {
            "measure": f"index.dial.{name}.overlap", "value": round(local.overlap, 4),
            "unit": f"share of the global slate, {shards} shards", "note": note,
        },
        {
            "measure": f"index.dial.{name}.largest_advertiser", "value": round(local.largest_advertiser, 4),
            "unit": f"share of the slate, {shards} shards", "rival": "global slate",
            "rival_value": round(found[shards][-1].largest_advertiser, 4),
        },
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the reports, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.dial", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    for name in ("ml-1m", "online-retail"):
        found = report(name, args.data, args.users, SHARDS)
        for count, dials in found.items():
            for one in dials:
                print(f"{name}, {count} shards, {one.line()}", flush=True)
        if not args.no_record:
            shared = {"command": "python -m benchmarks.dial", "versions": versions("torch", "numpy")}
            record("index", [{**one, **shared} for one in entries(name, found)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
