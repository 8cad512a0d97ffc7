"""The item index: correctness against the reference, then time beside what a user would write, and torn reads.

    python -m benchmarks.index --device cuda|cpu [--quick] [--no-record]

100,000 items of 256 + 16 numbers, an MLP of two hidden layers over [user, item, user * item, scalars], filters, items
already seen, a cap of 10 an advertiser (advertisers follow a power law), the best 1,000. One batch of 1, 8 and 32
requests each (on the CPU 1); medians of repeats, caches as the repeat before leaves them.

- as written: every pair's 784 inputs side by side, then a full sort, eager and (CUDA) compiled with CUDA graphs
- plain: one matrix product and topk, no MLP and no rules: what leaving the rules to others would cost at least
- ours: the folded MLP and the exact walk over a pool, eager; on CUDA also compiled and captured as one CUDA graph

Before that, how the slates' composition shifts from 8 shards with quotas and caps of their own to the global slate.

Torn reads: threads search and read rows while another writes, deletes and grows the index; every row's fields carry one
number, the rows of a group always change together, and an answer that shows anything else is torn.

Only a whole run on CUDA is recorded.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks.results import record, versions
from model.retrieval import reference
from model.retrieval.index import Columns, LiveIndex, Retrieval
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.select import Found, first_pool
from model.retrieval.shards import shifts

VERSION = "benchmark"
LAYOUT = Layout(embedding_dim=256, scalars=16, attributes=1)
TARGET_MS = {1: 0.075, 8: 0.33, 32: 1.25}
CATEGORIES, ADVERTISERS, SEEN, SHARDS = 64, 5000, 512, 8


def make_rows(items: int, seed: int = 0) -> ItemRows:
    """A catalogue: one category an item, advertisers by a power law."""
    rng = np.random.default_rng(seed)
    category_R = rng.integers(0, CATEGORIES, items)
    mask_RW = np.zeros((items, LAYOUT.mask_words), np.int64)
    mask_RW[:, 0] = np.left_shift(np.uint64(1), category_R.astype(np.uint64)).view(np.int64)
    mask_RW[:, 1:] = rng.integers(1, 2**62, (items, LAYOUT.mask_words - 1))
    return ItemRows.build(
        VERSION, LAYOUT, list(range(items)), rng.standard_normal((items, 256), np.float32) / 2,
        scalar_RS=rng.standard_normal((items, 16), np.float32), mask_RW=mask_RW, category_R=category_R,
        advertiser_R=np.minimum(rng.zipf(1.3, items) - 1, ADVERTISERS - 1), attribute_RA=rng.random((items, 1)),
        bid_R=rng.random(items) * 4.9 + 0.1, budget_R=rng.random(items) * 50,
    )  # fmt: skip


def make_requests(count: int, items: int, seed: int = 1) -> tuple[torch.Tensor, list[Request]]:
    """Users, and requests that want four fifths of the categories and have seen 512 items."""
    rng = np.random.default_rng(seed)
    requests = [
        Request(
            bid_power=1.0, required={"category": rng.permutation(CATEGORIES)[: CATEGORIES * 4 // 5].tolist()},
            ranges={0: (0.1, np.inf)}, min_budget=1.0, seen=rng.integers(0, items, min(SEEN, items // 4)).tolist(),
        )
        for _ in range(count)
    ]  # fmt: skip
    return torch.from_numpy(rng.standard_normal((count, 256), np.float32) / 2), requests


# Correctness


def check(device: str, items: int, plan: Plan) -> None:
    """Rows as the reference's, given the same utilities; folded scores as the unfolded ones. Raises AssertionError."""
    rows = make_rows(items, seed=2)
    torch.manual_seed(0)
    index = LiveIndex(rows, InteractionScorer(256, 16), device=device)
    users, requests = make_requests(3, items, seed=3)
    slates = index.search(users, requests, plan, VERSION)
    with index.pin() as pinned, torch.inference_mode():
        columns, scorer = pinned.table.used(), index.retrieval.scorer
        assert isinstance(scorer, InteractionScorer)
        asked = Requests.build(requests, LAYOUT, lambda ids: []).to(device)
        utility_BN = index.retrieval.utilities(columns, users.to(device), asked).double().cpu().numpy()
        folded = scorer(users.to(device), columns.feature_NF).double()
        exact = scorer.to("cpu").double().unfolded(users.double(), rows.feature_RF.double()).to(device)
    off = float((folded - exact).abs().max())
    print(f"{device}: folded float32 against float64 as written {off:.1e}", flush=True)
    assert off <= 2e-3, off  # TF32 products, where they are on, have 10 bits
    for b, request in enumerate(requests):
        allowed = [reference.is_allowed(rows, n, request) for n in range(items)]
        wanted = reference.slate(rows, utility_BN[b], allowed, plan, request.seed)
        assert [row for row in slates.row_BK[b].tolist() if row >= 0] == wanted, f"request {b}"
    print(f"{device}: rows of {len(requests)} requests over {items:,} items as the reference's", flush=True)


# Time


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, ready on the device."""

    graph: Retrieval
    columns: Columns
    user_BE: torch.Tensor
    requests: Requests
    plan: Plan

    pool: int

    def ours(self) -> Found:
        """One pass of fixed shape."""
        found: Found = self.graph(self.columns, self.user_BE, self.requests, self.plan, self.pool, 0)
        return found

    def fitted(self) -> "Case":
        """The same with a pool large enough for every request; the product widens it in the same way."""
        case = self
        while not bool(case.ours().is_exact_B.all()):
            case = replace(case, pool=min(len(self.columns.bid_N), case.pool * 4))
        return case

    def as_written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unfolded scores, the same filters, a full sort, ranks within the advertiser."""
        assert isinstance(self.graph.scorer, InteractionScorer)
        score_BTN = self.graph.scorer.unfolded(self.user_BE, self.columns.feature_NF)
        utility_BN = score_BTN[:, 0] * self.columns.bid_N
        allowed_BN = self.graph.allowed(self.columns, self.requests)
        value_BN, row_BN = torch.where(allowed_BN, utility_BN, -torch.inf).sort(dim=1, descending=True, stable=True)
        advertiser = self.columns.advertiser_N[row_BN].sort(dim=1, stable=True)
        place_BN = torch.arange(row_BN.shape[1], device=row_BN.device).expand_as(row_BN)
        is_first_BN = torch.ones_like(row_BN, dtype=torch.bool)
        is_first_BN[:, 1:] = advertiser.values[:, 1:] != advertiser.values[:, :-1]
        start_BN = torch.where(is_first_BN, place_BN, 0).cummax(1).values
        rank_BN = torch.zeros_like(row_BN).scatter(1, advertiser.indices, place_BN - start_BN)
        assert self.plan.advertiser_cap is not None
        best = value_BN.masked_fill(rank_BN >= self.plan.advertiser_cap, -torch.inf).topk(self.plan.k, dim=1)
        return best.values, row_BN.gather(1, best.indices)

    def plain(self) -> torch.return_types.topk:
        """A dot product and topk."""
        return (self.user_BE @ self.columns.feature_NF[:, : self.user_BE.shape[1]].T).topk(self.plan.k, dim=1)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one CUDA graph; it returns the same tensors each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def median_ms(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median milliseconds of a call: by CUDA events, or by the clock."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        if device.startswith("cuda"):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def sides(case: Case, device: str) -> dict[str, Callable[[], Any]]:
    """Each way to answer the batch, ready to time; those that cannot be had here are named and left out."""
    found: dict[str, Callable[[], Any]] = {
        "eager as written, sort": case.as_written, "plain matmul, topk": case.plain, "ours, eager": case.ours,
    }  # fmt: skip
    if not device.startswith("cuda"):
        return found
    for name, call in (("as written", case.as_written), ("plain", case.plain), ("ours", case.ours)):
        try:
            torch._dynamo.reset()
            found[f"{name}, compiled, CUDA graph"] = captured(torch.compile(call, dynamic=False))
        except Exception as error:  # compilers fail in many ways
            print(f"{name}, compiled: not here: {type(error).__name__}: {str(error)[:300]}", flush=True)
        try:
            found[f"{name}, CUDA graph"] = captured(call)
        except Exception as error:  # an operator that may not be captured
            print(f"{name}, captured: not here: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return found


def agree(name: str, row_BK: torch.Tensor, wanted: Found) -> None:
    """Every way finds what our eager pass finds, but for roundings of bfloat16 near the end of the slate."""
    overlaps = [
        len(set(row_K) & set(best_K)) / len(best_K)
        for row_K, best_K in zip(row_BK.tolist(), wanted.row_BK.tolist(), strict=True)
    ]
    print(f"  {name}: at least {min(overlaps):.1%} of each slate are our eager pass's", flush=True)
    assert min(overlaps) >= 0.9, (name, overlaps)


def compare(device: str, items: int, batches: Sequence[int], plan: Plan, repeats: int) -> list[dict[str, Any]]:
    """Time every side of every batch size, in bfloat16 on CUDA and float32 on the CPU; the entries to record."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows = make_rows(items)
    torch.manual_seed(0)
    index = LiveIndex(rows, InteractionScorer(256, 16).to(dtype), device=device, dtype=dtype)
    entries: list[dict[str, Any]] = []
    users, requests = make_requests(max(batches), items)
    print(f"composition of the slates, from {SHARDS} shards with quotas and caps of their own to the global one:")
    for shift in shifts(index, users, requests, plan, SHARDS):
        print(f"  {shift.line()}", flush=True)
    for count in batches:
        users, requests = make_requests(count, items)
        with index.pin() as pinned, torch.inference_mode():
            asked = Requests.build(requests, LAYOUT, lambda ids: index.rows_of(ids, items)).to(device)
            columns, pool = pinned.table.used(), first_pool(plan, items)
            case = Case(index.retrieval, columns, users.to(device, dtype), asked, plan, pool).fitted()
            wanted = Found(*(part.clone() for part in case.ours()))
            ways = sides(case, device)
            for name, call in ways.items():
                if "plain" not in name:
                    result = call()
                    agree(name, result.row_BK if isinstance(result, Found) else result[1], wanted)
            ms = {name: median_ms(call, device, repeats) for name, call in ways.items()}
        print(f"B={count}: " + ", ".join(f"{name} {value:.4g} ms" for name, value in ms.items()), flush=True)
        entries += _entries(count, ms)
        del ways, case
    return entries


def _entries(count: int, ms: dict[str, float]) -> list[dict[str, Any]]:
    """Ours at its best beside each rival at its best."""

    def best(start: str) -> tuple[str, float]:
        return min(((name, value) for name, value in ms.items() if start in name), key=lambda pair: pair[1])

    (ours, own), (written, its), (plain, bare) = best("ours"), best("as written"), best("plain")
    note = "; ".join(f"{name} {value:.4g} ms" for name, value in ms.items())
    return [
        {
            "measure": f"index.B{count}.ms", "value": round(own, 4), "unit": "ms", "target": TARGET_MS.get(count),
            "rival": written, "rival_value": round(its, 4), "note": f"{ours}; all: {note}",
        },
        {
            "measure": f"index.B{count}.over_plain", "value": round(own / bare, 3), "unit": "x time",
            "rival": plain, "rival_value": 1,
        },
    ]  # fmt: skip


# Torn reads

GROUP = 8
_GENERATIONS = 2000
_SMALL = Layout(embedding_dim=8, scalars=2, attributes=2)


def group_rows(group: int, number: int) -> ItemRows:
    """The rows of a group, all fields of which carry one number (at most 2,000, so that its square is exact)."""
    ids = [group * GROUP + place for place in range(GROUP)]
    return ItemRows.build(
        VERSION, _SMALL, ids, np.full((GROUP, 8), number), scalar_RS=np.full((GROUP, 2), number),
        mask_RW=np.full((GROUP, _SMALL.mask_words), number), category_R=np.full(GROUP, number),
        advertiser_R=np.full(GROUP, number), attribute_RA=np.full((GROUP, 2), number), bid_R=np.full(GROUP, number),
        budget_R=np.full(GROUP, number),
    )  # fmt: skip


@dataclass(eq=False, slots=True)
class Reads:
    """What the readers found."""

    answers: int = 0
    torn: int = 0
    revisions: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, is_torn: bool, revision: int | None) -> None:
        """Count one answer."""
        with self.lock:
            self.answers += 1
            self.torn += is_torn
            if revision is not None:
                self.revisions.add(revision)


def slate_is_torn(item_ids: list[int], utility_K: Any) -> bool:
    """Utility is score * bid, so the square of a row's number; a group is there as a whole, with one number."""
    by_group: dict[int, list[float]] = {}
    for item, utility in zip(item_ids, utility_K[: len(item_ids)].tolist(), strict=True):
        by_group.setdefault(item // GROUP, []).append(utility)
    return any(
        len(values) != GROUP or len(set(values)) != 1 or round(values[0] ** 0.5) ** 2 != values[0]
        for values in by_group.values()
    )


def rows_are_torn(rows: ItemRows) -> bool:
    """All fields of all rows of a group must carry one number."""
    numbers = {
        float(value)
        for column in (
            rows.feature_RF, rows.mask_RW, rows.category_R, rows.advertiser_R, rows.attribute_RA, rows.bid_R,
            rows.budget_R,
        )
        for value in column.flatten().tolist()
    }  # fmt: skip
    return len(rows) not in (0, GROUP) or len(numbers) > 1


def torn_reads(
    answers: int, device: str = "cpu", make: Callable[[ItemRows], LiveIndex] | None = None, groups: int = 24
) -> Reads:
    """Search and read an index while it is written, until so many answers were looked at.

    make: the index of its first rows; by default the product's.
    """
    index = make(group_rows(0, 1)) if make is not None else LiveIndex(group_rows(0, 1), DotScorer(), device=device)
    reads, stop = Reads(), threading.Event()
    failures: list[BaseException] = []
    plan = Plan(k=GROUP * groups, advertiser_cap=GROUP * groups)
    user_BE = np.zeros((2, 8), np.float32)
    user_BE[:, 0] = 1

    def guarded(work: Callable[[np.random.Generator], None], seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not stop.is_set():
                work(rng)
        except BaseException as error:
            failures.append(error)
            stop.set()

    def write(rng: np.random.Generator) -> None:
        group = int(rng.integers(0, groups))  # new groups make the index grow
        if rng.random() < 0.1:
            index.delete(VERSION, [group * GROUP + place for place in range(GROUP)])
        else:
            index.upsert(group_rows(group, 1 + (index.revision * 7) % _GENERATIONS))

    def read(rng: np.random.Generator) -> None:
        slates = index.search(user_BE, [Request(bid_power=1.0)] * 2, plan, VERSION)
        differ = slates.row_BK[0].tolist() != slates.row_BK[1].tolist()
        for ids, utility_K in zip(slates.item_ids, slates.utility_BK, strict=True):
            reads.add(differ or slate_is_torn(ids, utility_K), slates.revision)
        group = int(rng.integers(0, groups))
        reads.add(rows_are_torn(index.copy_of_rows([group * GROUP + place for place in range(GROUP)])), None)
        if reads.answers >= answers:
            stop.set()

    threads = [threading.Thread(target=guarded, args=(work, seed)) for seed, work in enumerate([write, read, read])]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    return reads


def main(argv: Sequence[str] | None = None) -> int:
    """Check, look for torn reads, time, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.index", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small and few; records nothing")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    is_cuda = args.device.startswith("cuda")
    items = 3000 if args.quick else 100_000
    plan = Plan(k=100 if args.quick else 1000, advertiser_cap=10)
    check("cpu", 2000, Plan(k=100, advertiser_cap=5, category_cap=8, exploration_share=0.1, exploration_window=40))
    if is_cuda:
        check(args.device, 20_000, plan)
    reads = torn_reads(2000 if args.quick else 50_000, args.device)
    print(f"torn reads: {reads.torn} of {reads.answers:,}, over {len(reads.revisions):,} revisions", flush=True)
    assert not reads.torn, f"{reads.torn} torn answers"
    repeats = 3 if args.quick or not is_cuda else 100
    batches = (1, 8) if args.quick else (1, 8, 32) if is_cuda else (1,)  # as written, 32 requests take 10 GB there
    entries = compare(args.device, items, batches, plan, repeats)
    entries.append(
        {
            "measure": "index.torn_reads", "value": reads.torn, "unit": "answers", "target": 0,
            "note": f"of {reads.answers:,} answers over {len(reads.revisions):,} revisions",
        }
    )  # fmt: skip
    if is_cuda and not args.quick and not args.no_record:
        command = f"python -m benchmarks.index --device {args.device}"
        record("index", [{**entry, "command": command, "versions": versions("torch", "numpy")} for entry in entries])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
