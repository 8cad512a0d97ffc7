"""The item index: correctness against the reference, then time beside what a user would write, updates, torn reads.

    python -m benchmarks.index --device cuda|cpu [--quick] [--only PART ...] [--no-record]

100,000 items of 256 + 16 numbers, an MLP of two hidden layers over [user, item, user * item, scalars], filters, items
already seen, a cap of 10 an advertiser (advertisers follow a power law), the best 1,000. One batch of 1, 8 and 32
requests each (on the CPU 1); medians of repeats, on CUDA with the L2 cache emptied before each.

- as written: every pair's 784 inputs side by side, then a full sort, eager and (CUDA) compiled with CUDA graphs
- folded: the folded MLP, topk of 8,192, caps among those (not exact), compiled with CUDA graphs: the strongest rival
- plain: one matrix product and topk, no MLP and no rules: what leaving the rules to others would cost at least
- ours: eager, compiled, as CUDA graph, and by kernels (`model/retrieval/fused.py`) over bfloat16, int8 and float8 rows

End to end, one request by the clock of the host: request tensors on the host to rows and utilities on the host. Beside
it: scores copied to the host and filtered there, features copied to the device for each request, features joined from a
key-value map in the process.

Before that, how the slates' composition shifts from 8 shards with quotas and caps of their own to the global slate.

Updates: one thread searches without pause; another applies batches of updates ten times a second, a tenth of them whole
rows, the rest bids and budgets; once more as a server gets them, as Parquet bytes that the same thread reads. Quiet
windows of a fifth of a second and loaded ones take turns, so that the machine's drift meets both alike; p50 and p99 of
all requests of a load's windows over those of the quiet ones before them, with the interval that 95 % of the ratios of
pairs drawn again lie in. A rate of 0 shows what that comes to where nothing differs. Garbage that was there before is
frozen, as a server does. Threads run on whatever cores they are given.

Torn reads: threads search and read rows while another writes, deletes and grows the index; every row's fields carry one
number, the rows of a group always change together, and an answer that shows anything else is torn.

Only a whole run on CUDA is recorded.
"""

import argparse
import copy
import gc
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.results import record, versions
from model.retrieval import reference
from model.retrieval.index import Columns, LiveIndex, Retrieval, Slates
from model.retrieval.rows import Deltas, ItemRows, Layout
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.select import Found, first_pool
from model.retrieval.shards import shifts

if TYPE_CHECKING:
    from model.retrieval.fused import FusedSearch

VERSION = "benchmark"
LAYOUT = Layout(embedding_dim=256, scalars=16, attributes=1)
TARGET_MS = {1: 0.075, 8: 0.33, 32: 1.25}
ANSWERS, TORN_S = 1_000_000, 50.0
PARTS = ("compare", "updates", "torn")
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
    index = LiveIndex(rows, InteractionScorer(256, 16), device=device, fused=False)
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


def check_kernels(device: str, items: int, plan: Plan) -> None:
    """Keys, filters and rows of the kernels' search as the reference's, over its own utilities."""
    rows = make_rows(items, seed=2)
    users, requests = make_requests(3, items, seed=3)
    allowed = [[reference.is_allowed(rows, n, request) for n in range(items)] for request in requests]
    torch.manual_seed(0)
    scorers = InteractionScorer(256, 16), InteractionScorer(256, 16, dot_scale=0.05), DotScorer()
    for scorer in (scorer.bfloat16() for scorer in scorers):
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            index = LiveIndex(rows, scorer, device=device, dtype=dtype)
            search = by_kernels(index, users, requests, plan)
            row_BK = search.found.here["row"][:, : plan.k].tolist()
            utility_BN, allowed_BN = (part.cpu() for part in search.utilities(items))
            for b, request in enumerate(requests):
                assert allowed_BN[b].tolist() == allowed[b], f"filters of request {b}"
                wanted = reference.slate(rows, utility_BN[b].double().numpy(), allowed[b], plan, request.seed)
                assert [row for row in row_BK[b] if row >= 0] == wanted, f"request {b}"
            with index.pin() as pinned, torch.inference_mode():
                score_BTN = search.score_BTN[:3, :, :items].cpu()
                wanted_BTN = copy.deepcopy(scorer).float()(users, pinned.table.features(slice(items)).float().cpu())
                off = float((score_BTN - wanted_BTN).norm() / wanted_BTN.norm())
            print(
                f"{device}: {type(scorer).__name__}, {dtype}: rows as the reference's, scores off {off:.1e}", flush=True
            )
            assert off <= 1e-2, off


# Time

FOLDED_POOL = 8192
COMPILE_S = 40.0
"""After so long in compilers, only the strongest rival is still compiled; what is left out is said to be."""


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
        return self._capped(self._utilities(score_BTN).sort(dim=1, descending=True, stable=True))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Folded scores, the same filters, topk, ranks within the advertiser among those."""
        pool = min(FOLDED_POOL, len(self.columns.bid_N))
        return self._capped(self._utilities(self.scores()).topk(pool, dim=1))

    def scores(self) -> torch.Tensor:
        """score_BTN."""
        score_BTN: torch.Tensor = self.graph.scorer(self.user_BE, self.columns.feature_NF)
        return score_BTN

    def plain(self) -> torch.return_types.topk:
        """A dot product and topk."""
        return (self.user_BE @ self.columns.feature_NF[:, : self.user_BE.shape[1]].T).topk(self.plan.k, dim=1)

    def _utilities(self, score_BTN: torch.Tensor) -> torch.Tensor:
        allowed_BN = self.graph.allowed(self.columns, self.requests)
        return torch.where(allowed_BN, score_BTN[:, 0] * self.columns.bid_N, -torch.inf)

    def _capped(self, best: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The first k under the cap of values and rows, best first."""
        value_BP, row_BP = best
        advertiser = self.columns.advertiser_N[row_BP].sort(dim=1, stable=True)
        place_BP = torch.arange(row_BP.shape[1], device=row_BP.device).expand_as(row_BP)
        is_first_BP = torch.ones_like(row_BP, dtype=torch.bool)
        is_first_BP[:, 1:] = advertiser.values[:, 1:] != advertiser.values[:, :-1]
        start_BP = torch.where(is_first_BP, place_BP, 0).cummax(1).values
        rank_BP = torch.zeros_like(row_BP).scatter(1, advertiser.indices, place_BP - start_BP)
        assert self.plan.advertiser_cap is not None
        kept = value_BP.masked_fill(rank_BP >= self.plan.advertiser_cap, -torch.inf).topk(self.plan.k, dim=1)
        return kept.values, row_BP.gather(1, kept.indices)


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


def median_ms(call: Callable[[], Any], device: str, repeats: int, is_cold: bool = True) -> float:
    """Median milliseconds of a call: by CUDA events, the L2 cache emptied before each or not; or by the clock."""
    for _ in range(2):
        call()
    times = []
    if not device.startswith("cuda"):
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    other = torch.empty(2**28, dtype=torch.int8, device=device)
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if is_cold:
            other.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Compiler:
    """torch.compile and capture; failures and what is left out for want of time are said."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.failed: set[str] = set()

    def __call__(self, name: str, call: Callable[[], Any], is_needed: bool = False) -> dict[str, Callable[[], Any]]:
        """{name: the call}, or nothing. is_needed: however long it takes."""
        if name in self.failed or (self.spent_s > COMPILE_S and not is_needed):
            print(f"  {name}: left out, {'failed before' if name in self.failed else 'no time left'}", flush=True)
            return {}
        began = time.perf_counter()
        try:
            torch._dynamo.reset()
            return {name: captured(torch.compile(call, dynamic=False))}
        except Exception as error:  # compilers fail in many ways
            self.failed.add(name)
            print(f"  {name}: not here: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return {}
        finally:
            took_s = time.perf_counter() - began
            self.spent_s += took_s
            print(f"  {name}: {took_s:.1f} s of compiling", flush=True)


def sides(case: Case, device: str, compiler: Compiler) -> dict[str, Callable[[], Any]]:
    """Each way to answer the batch, ready to time; those that cannot be had here are named and left out."""
    found: dict[str, Callable[[], Any]] = {
        "as written, eager": case.as_written, "folded, eager": case.folded, "plain, eager": case.plain,
        "ours, eager": case.ours,
    }  # fmt: skip
    if not device.startswith("cuda"):
        return found
    found["plain, CUDA graph"] = captured(case.plain)
    found["ours, eager, CUDA graph"] = captured(case.ours)
    found |= compiler("folded, compiled, CUDA graph", case.folded, is_needed=True)
    found |= compiler("as written, compiled, CUDA graph", case.as_written)
    if len(case.requests) == 1:
        found |= compiler("ours, compiled, CUDA graph", case.ours)
    return found


def by_kernels(index: LiveIndex, user_BE: torch.Tensor, requests: Sequence[Request], plan: Plan) -> "FusedSearch":
    """The search of a batch by kernels, captured and run once."""
    from model.retrieval.fused import FusedSearch, shape_of

    with index.pin() as pinned:
        table = pinned.table
        asked = Requests.build(requests, LAYOUT, lambda ids: index.rows_of(ids, table.count))
        search = FusedSearch(index.retrieval, table, shape_of(plan, asked))
        search.capture()
        search.search(user_BE, asked, table.count, plan)
    return search


def rows_found(result: Any) -> torch.Tensor:
    """row_BK of what a way to answer gives."""
    return result.row_BK if isinstance(result, Found) else result[1]


def agree(name: str, row_BK: torch.Tensor, wanted_BK: torch.Tensor, least: float = 0.9) -> None:
    """Every way finds what our eager pass finds, but for roundings of bfloat16 near the end of the slate."""
    overlaps = [
        len(set(row_K) & set(best_K)) / len(best_K)
        for row_K, best_K in zip(row_BK.tolist(), wanted_BK.tolist(), strict=True)
    ]
    print(f"  {name}: at least {min(overlaps):.1%} of each slate are our eager pass's", flush=True)
    assert min(overlaps) >= least, (name, overlaps)


def compare(device: str, items: int, batches: Sequence[int], plan: Plan, repeats: int) -> list[dict[str, Any]]:
    """Time every side of every batch size, in bfloat16 on CUDA and float32 on the CPU; the entries to record."""
    is_cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if is_cuda else torch.float32
    rows = make_rows(items)
    torch.manual_seed(0)
    scorer = InteractionScorer(256, 16).to(dtype)
    index = LiveIndex(rows, scorer, device=device, dtype=dtype)
    entries: list[dict[str, Any]] = []
    users, requests = make_requests(max(batches), items)
    print(f"composition of the slates, from {SHARDS} shards with quotas and caps of their own to the global one:")
    for shift in shifts(index, users, requests, plan, SHARDS):
        print(f"  {shift.line()}", flush=True)
    coded = {}
    if is_cuda:
        names = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
        coded = {name: LiveIndex(rows, scorer, device=device, dtype=kind) for name, kind in names.items()}
    compiler = Compiler()
    for count in batches:
        users, requests = make_requests(count, items)
        with index.pin() as pinned, torch.inference_mode():
            asked = Requests.build(requests, LAYOUT, lambda ids: index.rows_of(ids, items)).to(device)
            columns, pool = pinned.table.used(), first_pool(plan, items)
            case = Case(index.retrieval, columns, users.to(device, dtype), asked, plan, pool).fitted()
            wanted_BK = case.ours().row_BK.clone()
            ways = sides(case, device, compiler)
            for name, call in ways.items():
                if not name.startswith("plain"):
                    agree(name, rows_found(call()), wanted_BK)
            searches = {}
            if is_cuda:
                searches = {"ours, kernels": by_kernels(index, users, requests, plan)}
                for name, other in coded.items():
                    searches[f"ours, kernels, {name} rows"] = by_kernels(other, users, requests, plan)
            for name, search in searches.items():
                found_BK = torch.from_numpy(search.found.here["row"][:count, : plan.k])
                assert search.found.here["is_exact"][:count].all(), f"{name}: not exact"
                agree(name, found_BK, wanted_BK, 0.9)
                graph = search.captured(search.launch_kernels)
                assert graph is not None, "on CUDA"
                ways[name] = graph.replay
            ms = {name: median_ms(call, device, repeats) for name, call in ways.items()}
            if is_cuda:
                ms |= {f"{name}, warm cache": median_ms(ways[name], device, repeats, False) for name in searches}
            print(f"B={count}:", *(f"{name} {value:.4g} ms" for name, value in ms.items()), sep="\n  ", flush=True)
            entries.append(_entry(count, ms))
            if is_cuda and count == 1:
                entries.append(end_to_end(index, case, ways, users, requests, repeats))
        del ways, case, searches
    return entries


def _entry(count: int, ms: dict[str, float]) -> dict[str, Any]:
    """Ours, the kernels' over bfloat16 rows where they run, beside the best of the rivals."""
    rivals = {name: value for name, value in ms.items() if name.startswith(("as written", "folded"))}
    rival = min(rivals, key=lambda name: rivals[name])
    own = "ours, kernels" if "ours, kernels" in ms else "ours, eager"
    return {
        "measure": f"index.B{count}.ms", "value": round(ms[own], 4), "unit": "ms", "target": TARGET_MS.get(count),
        "rival": rival, "rival_value": round(rivals[rival], 4),
        "note": f"{own}; all: {'; '.join(f'{name} {value:.4g} ms' for name, value in ms.items())}",
    }  # fmt: skip


# End to end


def percentiles_ms(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """p50 and p99 of a call by the host's clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


def end_to_end(
    index: LiveIndex, case: Case, ways: dict[str, Callable[[], Any]], users: torch.Tensor, requests: Sequence[Request],
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """One request, from the host and back; the entry to record."""
    plan, columns = case.plan, case.columns
    items = len(columns.bid_N)
    search = by_kernels(index, users, requests, plan)
    asked = Requests.build(requests, LAYOUT, lambda ids: index.rows_of(ids, items))
    answers: dict[str, Callable[[], Any]] = {
        "ours: request tensors to slates on the host": lambda: search.search(users, asked, items, plan),
        "ours: LiveIndex.search, request objects to item ids": lambda: index.search(users, requests, plan, VERSION),
    }
    feed_pairs = [
        (device_part, host_part.to(device_part.dtype).pin_memory())
        for device_part, host_part in (
            (case.user_BE, users), (case.requests.required_BW, asked.required_BW),
            (case.requests.excluded_X, asked.excluded_X),
        )
    ]  # fmt: skip

    def feed() -> None:
        for there, here in feed_pairs:
            there.copy_(here, non_blocking=True)

    value_BK = torch.empty(1, plan.k, pin_memory=True)
    row_BK = torch.empty(1, plan.k, dtype=torch.int64, pin_memory=True)

    def answer(call: Callable[[], Any]) -> None:
        values, rows = call()
        value_BK.copy_(values, non_blocking=True)
        row_BK.copy_(rows, non_blocking=True)
        torch.cuda.synchronize()

    best = min((name for name in ways if name.startswith("folded")), key=lambda name: "compiled" not in name)
    answers[f"{best}, copies both ways"] = lambda: (feed(), answer(ways[best]))
    scores = captured(case.scores)
    score_BTN = torch.empty(1, 1, items, pin_memory=True)
    on_host = HostRules.of(columns, asked, plan)

    def filtered_on_host() -> Any:
        feed()
        score_BTN.copy_(scores(), non_blocking=True)
        torch.cuda.synchronize()
        return on_host.slate(score_BTN[0, 0].numpy())

    answers["scores to the host, rules there"] = filtered_on_host
    feature_NF = columns.feature_NF.cpu().pin_memory()

    def with_features() -> Any:
        columns.feature_NF.copy_(feature_NF)  # waits: the search is on another stream
        return search.search(users, asked, items, plan)

    answers["features copied to the device, then ours"] = with_features
    feature_bytes = feature_NF.view(torch.int16).numpy()
    stored = {item: feature_bytes[item].tobytes() for item in range(items)}
    staged = torch.empty_like(feature_NF, pin_memory=True)

    def joined() -> Any:
        joined_bytes = b"".join([stored[item] for item in range(items)])
        staged.view(torch.int16).numpy().reshape(-1)[:] = np.frombuffer(joined_bytes, np.int16)
        columns.feature_NF.copy_(staged)
        return search.search(users, asked, items, plan)

    answers["features joined from a map in the process, then ours"] = joined
    wanted_BK = case.ours().row_BK
    agree("rules on the host", torch.from_numpy(filtered_on_host())[None], wanted_BK)
    agree("features joined", joined().row_BK, wanted_BK)
    found = {}
    for name, call in answers.items():
        is_slow = name.startswith(("scores", "features"))
        found[name] = percentiles_ms(call, 10 if is_slow else 10 * repeats)
        print(f"  end to end, {name}: p50 {found[name][0]:.4g} ms, p99 {found[name][1]:.4g} ms", flush=True)
    own = next(iter(answers))
    rival = min((name for name in found if not name.startswith("ours")), key=lambda name: found[name][0])
    return {
        "measure": "index.e2e.p50_ms", "value": round(found[own][0], 4), "unit": "ms", "target": 0.12, "rival": rival,
        "rival_value": round(found[rival][0], 4),
        "note": "; ".join(f"{name}: p50 {p50:.4g}, p99 {p99:.4g} ms" for name, (p50, p99) in found.items()),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostRules:
    """What a host does with scores, in NumPy: filters, the best 8,192, the cap among those."""

    columns: dict[str, Any]
    requests: Requests
    plan: Plan

    @classmethod
    def of(cls, columns: Columns, requests: Requests, plan: Plan) -> "HostRules":
        """Columns are copied to the host; requests are there."""
        names = ("mask_NW", "budget_N", "attribute_NA", "bid_N", "eligible_N", "advertiser_N")
        return cls({name: getattr(columns, name).cpu().numpy() for name in names}, requests, plan)

    def slate(self, score_N: Any) -> Any:
        """Rows of the first request, i64."""
        columns, requests = self.columns, self.requests
        required = int(requests.required_BW[0, 0])
        lower, upper = float(requests.lower_BA[0, 0]), float(requests.upper_BA[0, 0])
        attribute_N = columns["attribute_NA"][:, 0]
        allowed_N = columns["eligible_N"] & (columns["budget_N"] >= float(requests.min_budget_B[0]))
        allowed_N &= (columns["mask_NW"][:, 0] & required) != 0
        allowed_N &= (attribute_N >= lower) & (attribute_N <= upper)
        allowed_N[requests.excluded_X.numpy()] = False
        utility_N = np.where(allowed_N, score_N * columns["bid_N"], -np.inf)
        pool = np.argpartition(-utility_N, FOLDED_POOL)[:FOLDED_POOL] if len(utility_N) > FOLDED_POOL else slice(None)
        row_P = np.arange(len(utility_N))[pool]
        row_P = row_P[np.argsort(-utility_N[row_P], kind="stable")]
        by_advertiser = np.argsort(columns["advertiser_N"][row_P], kind="stable")
        value = columns["advertiser_N"][row_P][by_advertiser]
        start = np.maximum.accumulate(np.where(np.r_[True, value[1:] != value[:-1]], np.arange(len(value)), 0))
        rank_P = np.empty(len(row_P), np.int64)
        rank_P[by_advertiser] = np.arange(len(value)) - start
        assert self.plan.advertiser_cap is not None
        kept = (rank_P < self.plan.advertiser_cap) & (utility_N[row_P] > -np.inf)
        return row_P[kept][: self.plan.k]


# Updates under load

BATCHES_PER_S = 10
ROUNDS, SELDOM, WINDOW_S = 40, 3, 0.2
"""Of pairs of windows: 40 of two loads and 14 of three, 49 s."""
RESAMPLES = 400


@dataclass(frozen=True, slots=True)
class Load:
    """What is done to the index in a loaded window."""

    rate: int
    """Rows updated a second."""
    is_fed: bool = False
    """Updates come as bytes, and the thread that applies them reads them first, as `online.item_feed` does."""
    every: int = 1
    """Rounds from one pair of windows to the next."""

    @property
    def measure(self) -> str:
        """Name of the record."""
        return f"index.updates_{self.rate}{'.fed' if self.is_fed else ''}.p99_ratio"


LOADS = (
    Load(0), Load(600, every=SELDOM), Load(6_000), Load(6_000, is_fed=True, every=SELDOM), Load(60_000, every=SELDOM),
)  # fmt: skip


def updates(
    device: str, items: int, plan: Plan, *, rounds: int = ROUNDS, window_s: float = WINDOW_S
) -> list[dict[str, Any]]:
    """Latency of one request after the other while rows are updated at each rate; the entries to record.

    rounds: of a quiet window and a loaded one for each load, the loads in an order drawn anew.
    """
    rows = make_rows(items)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    index = LiveIndex(rows, InteractionScorer(256, 16).to(dtype), device=device, dtype=dtype)
    users, requests = make_requests(64, items, seed=4)
    index.prepare(plan)
    batches = {}
    for load in LOADS:
        some = make_batches(rows, load)
        if some is None:
            print("  updates as bytes: left out, redis is not installed", flush=True)
        else:
            batches[load] = itertools.cycle(some)
    found = [Loaded(load, [], []) for load in batches]
    rng = np.random.default_rng(0)
    for load, made in batches.items():
        _window(index, users, requests, plan, window_s, made if load.rate else None)
    with as_the_service_runs():
        for _ in range(10):
            _window(index, users, requests, plan, window_s, None)
        for number in range(rounds):
            turns = [one for one in found if number % one.load.every == 0]
            for place in rng.permutation(len(turns)).tolist():
                one = turns[place]
                one.quiet.append(_window(index, users, requests, plan, window_s, None))
                batch = batches[one.load] if one.load.rate else None
                one.loaded.append(_window(index, users, requests, plan, window_s, batch))
    for one in found:
        print(f"  {one.line()}", flush=True)
    noise = found[0]
    return [
        {
            "measure": one.load.measure, "value": round(one.ratio(99), 3), "unit": "x p99 of the quiet index",
            "target": 1.05 if one.load.rate <= 6_000 and not one.load.is_fed else None,
            "note": f"{one.line()}; nothing against nothing: p50 {noise.told(50)}, p99 {noise.told(99)}",
        }
        for one in found[1:]
    ]  # fmt: skip


@contextmanager
def as_the_service_runs() -> Iterator[None]:
    """What was made so far is not collected again, and PyTorch keeps to one thread: see `online.server`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Window:
    """Requests of a stretch of time, and updates beside them."""

    request_ms: list[float]
    write_ms: list[float]
    """Of each batch of updates, and how long it took to be seen: it is when it returns."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Windows beside updates, and before each a window without."""

    load: Load
    quiet: list[Window]
    loaded: list[Window]

    def ratio(self, percent: float) -> float:
        """A percentile of all requests beside updates over that of all others."""
        return self.at(percent, self.loaded) / self.at(percent, self.quiet)

    def interval(self, percent: float) -> tuple[float, float]:
        """Where 95 % of the ratios of pairs of windows drawn again lie: requests of a window are not apart."""
        rng = np.random.default_rng(0)
        sides = [[np.asarray(window.request_ms) for window in windows] for windows in (self.loaded, self.quiet)]
        ratios = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, len(self.quiet), len(self.quiet))
            ours, theirs = (np.percentile(np.concatenate([side[at] for at in drawn]), percent) for side in sides)
            ratios.append(ours / theirs)
        low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
        return low, high

    @staticmethod
    def at(percent: float, windows: list[Window]) -> float:
        """A percentile of all requests, ms."""
        return float(np.percentile(np.concatenate([window.request_ms for window in windows]), percent))

    def told(self, percent: float) -> str:
        """A ratio and its interval."""
        low, high = self.interval(percent)
        return f"{self.ratio(percent):.3f} x ({low:.3f} to {high:.3f})"

    def line(self) -> str:
        """One row of the report."""
        p50, p99 = (
            f"p{percent} {self.at(percent, self.loaded):.4g} over {self.at(percent, self.quiet):.4g} ms "
            f"{self.told(percent)}"
            for percent in (50, 99)
        )
        write_ms = np.concatenate([window.write_ms for window in self.loaded])
        written = ""
        if len(write_ms):
            written = f", {len(write_ms)} batches of {np.median(write_ms):.3g} ms, longest {write_ms.max():.3g}"
        return (
            f"{self.load.rate:,} row updates a second{' as bytes' if self.load.is_fed else ''}{written}: "
            f"{sum(len(window.request_ms) for window in self.loaded):,} requests, {p50}, {p99}"
        )


def make_batches(rows: ItemRows, load: Load) -> list[Callable[[LiveIndex], None]] | None:
    """Ten batches of updates, ready to apply; None where they cannot be had here."""
    whole = max(1, load.rate // BATCHES_PER_S // 10)
    rng = np.random.default_rng(load.rate)
    batches: list[Callable[[LiveIndex], None]] = []
    for _ in range(10):
        place = rng.permutation(len(rows))[: max(load.rate // BATCHES_PER_S, whole + 1)]
        changed = place[whole:]
        money = torch.from_numpy(rng.random((2, len(changed)), np.float32) * 5)
        deltas = Deltas(VERSION, changed.tolist(), bid_R=money[0], budget_R=money[1] * 10)
        upserted = _some(rows, place[:whole])
        if load.is_fed:
            try:
                from online import item_feed
            except ModuleNotFoundError:
                return None
            packed = [item_feed.pack(update) for update in (upserted, deltas)]

            def fed(index: LiveIndex, packed: list[tuple[str, bytes]] = packed) -> None:
                for kind, data in packed:
                    item_feed.apply(index, item_feed.unpack(kind, data))

            batches.append(fed)
            continue

        def plain(index: LiveIndex, upserted: ItemRows = upserted, deltas: Deltas = deltas) -> None:
            index.upsert(upserted)
            index.change(deltas)

        batches.append(plain)
    return batches


def _window(
    index: LiveIndex, users: torch.Tensor, requests: Sequence[Request], plan: Plan, seconds: float,
    batches: Iterator[Callable[[LiveIndex], None]] | None,
) -> Window:  # fmt: skip
    stop = threading.Event()
    failures: list[BaseException] = []
    write_ms: list[float] = []

    def write(batches: Iterator[Callable[[LiveIndex], None]]) -> None:
        began = time.perf_counter()
        try:
            while not stop.wait(max(0.0, began + (len(write_ms) + 0.5) / BATCHES_PER_S - time.perf_counter())):
                update = next(batches)
                start = time.perf_counter()
                update(index)
                write_ms.append((time.perf_counter() - start) * 1e3)
        except BaseException as error:
            failures.append(error)

    writer = None if batches is None else threading.Thread(target=write, args=(batches,))
    if writer is not None:
        writer.start()
    times: list[float] = []
    end = time.perf_counter() + seconds
    try:
        while time.perf_counter() < end:
            one = len(times) % len(requests)
            began = time.perf_counter()
            index.search(users[one : one + 1], requests[one : one + 1], plan, VERSION)
            times.append((time.perf_counter() - began) * 1e3)
    finally:
        stop.set()
        if writer is not None:
            writer.join()
    if failures:
        raise failures[0]
    return Window(times, write_ms)


def _some(rows: ItemRows, place: Any) -> ItemRows:
    """Some of the rows."""
    return ItemRows(
        rows.embedding_version, rows.layout, [rows.item_ids[at] for at in place], rows.feature_RF[place],
        rows.mask_RW[place], rows.category_R[place], rows.advertiser_R[place], rows.attribute_RA[place],
        rows.bid_R[place], rows.budget_R[place], rows.eligible_R[place],
    )  # fmt: skip


# Torn reads

GROUP = 8
READ_SHARE = 0.3
"""Rows are read, besides, after this share of searches."""
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

    def add(self, answers: int, torn: int, revision: int | None = None) -> None:
        """Count answers."""
        with self.lock:
            self.answers += answers
            self.torn += torn
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


def torn_slates(slates: Slates, scale_B: Any) -> int:
    """How many slates of a batch are torn; users are one direction, scaled by powers of two, so all must be alike."""
    alike_B = (slates.row_BK == slates.row_BK[0]).all(1)
    alike_B &= (slates.utility_BK * (scale_B[0] / scale_B)[:, None] == slates.utility_BK[0]).all(1)
    alike_B &= [item_ids == slates.item_ids[0] for item_ids in slates.item_ids]
    return len(alike_B) if slate_is_torn(slates.item_ids[0], slates.utility_BK[0]) else int((~alike_B).sum())


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
    answers: int, device: str = "cpu", make: Callable[[ItemRows], LiveIndex] | None = None, groups: int = 24,
    batch: int = 2, most_s: float = 600.0,
) -> Reads:  # fmt: skip
    """Search and read an index while it is written, until so many answers were looked at.

    make: the index of its first rows; by default the product's. batch: requests of a search. most_s: longest it takes.
    """
    index = make(group_rows(0, 1)) if make is not None else LiveIndex(group_rows(0, 1), DotScorer(), device=device)
    reads, stop = Reads(), threading.Event()
    failures: list[BaseException] = []
    plan = Plan(k=GROUP * groups, advertiser_cap=GROUP * groups)
    scale_B = 2.0 ** (np.arange(batch, dtype=np.float32) % 4)
    user_BE = np.zeros((batch, 8), np.float32)
    user_BE[:, 0] = scale_B
    requests = [Request(bid_power=1.0)] * batch
    index.prepare(plan, batch)  # a reader that compiles would keep the writer waiting for longer than it does
    end = time.monotonic() + most_s

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
        slates = index.search(user_BE, requests, plan, VERSION)
        reads.add(batch, torn_slates(slates, scale_B), slates.revision)
        if rng.random() < READ_SHARE:
            group = int(rng.integers(0, groups))
            rows = index.copy_of_rows([group * GROUP + place for place in range(GROUP)])
            reads.add(1, rows_are_torn(rows))
        if reads.answers >= answers or time.monotonic() > end:
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


def look_for_tears(device: str, *, is_quick: bool) -> list[dict[str, Any]]:
    """Torn reads, as a record. Raises AssertionError where there are any."""
    began = time.monotonic()
    is_cuda = device.startswith("cuda")
    wanted = 2000 if is_quick else ANSWERS
    reads = torn_reads(wanted, device, batch=64 if is_cuda else 2, most_s=TORN_S)
    print(
        f"torn reads: {reads.torn} of {reads.answers:,}, over {len(reads.revisions):,} revisions, in "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    assert not reads.torn, f"{reads.torn} torn answers"
    return [torn_entry(reads, wanted)]


def torn_entry(reads: Reads, wanted: int) -> dict[str, Any]:
    """The entry to record. wanted: answers that were to be looked at; where time ended before, the note says so."""
    note = f"of {reads.answers:,} answers looked at, over {len(reads.revisions):,} revisions"
    if reads.answers < wanted:
        note += f"; {wanted:,} were wanted, cut off after {TORN_S:g} s"
    return {
        "measure": "index.torn_reads", "value": reads.torn, "unit": "answers", "target": 0, "note": note,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, look for torn reads, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.index", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small and few; records nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="only some parts, after the checks")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    is_cuda = args.device.startswith("cuda")
    items = 3000 if args.quick else 100_000
    plan = Plan(k=100 if args.quick else 1000, advertiser_cap=10)
    check("cpu", 2000, Plan(k=100, advertiser_cap=5, category_cap=8, exploration_share=0.1, exploration_window=40))
    if is_cuda:
        check(args.device, 20_000, plan)
        check_kernels(args.device, 5000, plan)
    is_recorded = is_cuda and not args.quick and not args.no_record

    def keep(entries: list[dict[str, Any]]) -> None:
        """Each part is recorded when it is done."""
        if is_recorded:
            command = f"python -m benchmarks.index --device {args.device}"
            both = {"command": command, "versions": versions("torch", "numpy")}
            record("index", [{**entry, **both} for entry in entries])

    if "compare" in args.only:
        repeats = 3 if args.quick or not is_cuda else 50
        batches = (1, 8) if args.quick else (1, 8, 32) if is_cuda else (1,)  # 32 as written take 10 GB there
        keep(compare(args.device, items, batches, plan, repeats))
    if "updates" in args.only:
        keep(updates(args.device, items, plan, **({"rounds": 2, "window_s": 0.2} if args.quick else {})))
    if "torn" in args.only:
        keep(look_for_tears(args.device, is_quick=args.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
