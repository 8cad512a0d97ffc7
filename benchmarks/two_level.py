"""Two-level retrieval on millions of items: recall against a search of all rows, latency, requests a second, memory.

    python -m benchmarks.two_level --device cuda [--millions 10 50] [--quick] [--no-record]

Items (float32, then kept as bfloat16; seeds fixed, made on the device in pieces of a million): 256 topics; 16,384
centres, each a topic plus 0.6 of noise; centre r holds a share of the items in proportion to (r + 10) ** -0.7; an item
is a centre plus 0.9 of noise, a user an item drawn evenly plus 0.5. Noise is normal in 128 dimensions, of length about
1; every vector is brought to length 1. So the best 1,000 of a user come from one centre and from others of its topic.

- brute force: one product in bfloat16 and topk, over all rows at once or in pieces; the same over int8 codes
- FAISS on the GPU, where it is installed: `faiss_rivals`; torchretrieve, which the PyPI that we reach does not have, is
  stood for by the product and topk
- all codes: the first level reads every code; survivors by exact dot product in float32
- P probes: it reads the codes of the user's nearest P of 16,384 k-means clusters

All but FAISS as CUDA graphs; each repeat has users of its own, whose copy into the graph's buffer is in the time.
Recall@K is the share of the K best by float32 dot products over all rows (of the same bfloat16 values) that the answer
holds, over 256 users. First an answer that calls itself certain is held to that search.

Then what else there is, at its price: a head of a quarter of the rows with the tail in host memory; an interaction MLP
on the survivors; filters and a cap in the graph. Only a whole run on CUDA is recorded.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import faiss_rivals
from benchmarks.index import captured, median_ms
from benchmarks.results import record, versions
from model.retrieval.index import Columns
from model.retrieval.rows import Layout
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import InteractionScorer
from model.retrieval.two_level import PIECE, ROOM, ExactRows, TwoLevelFound, TwoLevelIndex, default_wanted, quantised

VERSION = "benchmark"
E, TOPICS = 128, 256
CENTRE_NOISE, ITEM_NOISE, USER_NOISE = 0.6, 0.9, 0.5
CATEGORIES, ADVERTISERS, SEEN = 64, 5000, 512
LAYOUT = Layout(embedding_dim=E, attributes=1, words=(1, 0, 0))
MOST_BATCH = 64
LEAST_RECALL = 0.99
"""Of a FAISS setting that counts as a rival."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    items: int
    centres: int
    clusters: int
    probes: tuple[int, ...]
    users: int
    k: int
    repeats: int

    @property
    def name(self) -> str:
        return f"{self.items // 10**6}M" if self.items >= 10**6 else str(self.items)


def drawn(random: torch.Generator, base: torch.Tensor, noise: float) -> torch.Tensor:
    """base plus noise, brought to length 1."""
    more = torch.randn(base.shape, generator=random, device=base.device) * (noise / base.shape[1] ** 0.5)
    return torch.nn.functional.normalize(base + more, dim=1)


def make(size: Size, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Items [N, E] and users [U, E], bfloat16 and float32, as the module says."""
    random = torch.Generator(device).manual_seed(0)
    topic = drawn(random, torch.zeros(TOPICS, E, device=device), 1.0)
    of_topic = torch.randint(TOPICS, (size.centres,), generator=random, device=device)
    centre = drawn(random, topic[of_topic], CENTRE_NOISE)
    share = (torch.arange(size.centres, device=device) + 10.0) ** -0.7
    ends = (share.cumsum(0) / share.sum()).contiguous()
    item_NE = torch.empty(size.items, E, dtype=torch.bfloat16, device=device)
    for start in range(0, size.items, PIECE):
        piece = item_NE[start : start + PIECE]
        of = torch.searchsorted(ends, torch.rand(len(piece), generator=random, device=device)).clamp_max(
            size.centres - 1
        )
        piece.copy_(drawn(random, centre[of], ITEM_NOISE))
    of_item = torch.randint(size.items, (size.users,), generator=random, device=device)
    return item_NE, drawn(random, item_NE[of_item].float(), USER_NOISE)


def make_columns(items: int, device: str) -> Columns:
    """One category an item, advertisers by a power law, all eligible."""
    random = torch.Generator(device).manual_seed(1)

    def uniform() -> torch.Tensor:
        return torch.rand(items, generator=random, device=device)

    category_N = (uniform() * CATEGORIES).long().clamp_max(CATEGORIES - 1)
    advertiser_N = (ADVERTISERS ** uniform()).long() - 1
    return Columns(
        torch.zeros(items, 0, device=device), (1 << category_N)[:, None], category_N, advertiser_N,
        uniform()[:, None], uniform() * 4.9 + 0.1, uniform() * 50,
        torch.ones(items, dtype=torch.bool, device=device),
    )  # fmt: skip


def make_requests(count: int, items: int, device: str) -> Requests:
    """Four fifths of the categories, a budget and an attribute that nearly all have, 512 items seen."""
    random = torch.Generator().manual_seed(2)
    asked = [
        Request(
            required={"category": torch.randperm(CATEGORIES, generator=random)[: CATEGORIES * 4 // 5].tolist()},
            ranges={0: (0.05, torch.inf)}, min_budget=1.0,
            seen=torch.randint(items, (SEEN,), generator=random).tolist(),
        )
        for _ in range(count)
    ]  # fmt: skip
    return Requests.build(asked, LAYOUT, lambda rows: [int(row) for row in rows]).to(device)


# Brute force


def best_of_all(item_NE: torch.Tensor, user_UE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and rows [U, k] of the best, by float32 products of all rows."""
    scores, rows = [], []
    for start in range(0, len(item_NE), PIECE):
        best = (user_UE @ item_NE[start : start + PIECE].float().T).topk(min(k, len(item_NE) - start, PIECE), dim=1)
        scores.append(best.values)
        rows.append(best.indices + start)
    best = torch.cat(scores, 1).topk(k, dim=1)
    return best.values, torch.cat(rows, 1).gather(1, best.indices)


def by_product(item_NE: torch.Tensor, user_BE: torch.Tensor, k: int, piece: int) -> torch.Tensor:
    """Rows [B, k]: what one would write, a product in the items' dtype and topk, in pieces merged at the end."""
    user_BE = user_BE.to(item_NE.dtype)
    scores, rows = [], []
    for start in range(0, len(item_NE), piece):
        best = (user_BE @ item_NE[start : start + piece].T).topk(min(k, len(item_NE) - start), dim=1)
        scores.append(best.values)
        rows.append(best.indices + start)
    return torch.cat(rows, 1).gather(1, torch.cat(scores, 1).topk(k, dim=1).indices)


def by_codes(code_NE: torch.Tensor, scale_N: torch.Tensor, user_BE: torch.Tensor, k: int) -> torch.Tensor:
    """Rows [B, k] by int8 products and topk alone; for the library's product, users are padded to 8."""
    user_8E = torch.nn.functional.pad(user_BE, (0, 0, 0, -len(user_BE) % 8))
    code_8E = (user_8E / user_8E.abs().amax(1, keepdim=True).clamp_min(1e-9) * 127).round().to(torch.int8)
    score_NB = torch._int_mm(code_NE, code_8E.T)[:, : len(user_BE)] * scale_N[:, None]
    return score_NB.T.nan_to_num(-1e9).topk(k, dim=1).indices


def recall(row_UK: torch.Tensor, best_UK: torch.Tensor) -> float:
    """Mean share of each user's best that the rows hold."""
    shares = [
        len(set(row_K) & set(best_K)) / len(best_K)
        for row_K, best_K in zip(row_UK.tolist(), best_UK.tolist(), strict=True)
    ]
    return sum(shares) / len(shares)


# Ours


@dataclass(frozen=True, slots=True)
class Way:
    """How a batch is answered, and how well."""

    name: str
    probes: int
    wanted: int
    recall_1000: float
    recall_100: float
    certain: float
    complete: float
    survivors: float


def judged(
    index: TwoLevelIndex, user_UE: torch.Tensor, best_UK: torch.Tensor, size: Size, probes: int, wanted: int
) -> Way:
    """Recall of a setting, over all users, in single passes."""
    with torch.inference_mode():
        parts = [
            index(users, Plan(k=size.k), wanted=wanted, probes=probes) for users in torch.split(user_UE, MOST_BATCH)
        ]
    found = TwoLevelFound(*(torch.cat(part) for part in zip(*parts, strict=True)))
    tenth = max(1, size.k // 10)
    return Way(
        f"{probes} probes" if probes else "all codes", probes, wanted,
        recall(found.row_BK, best_UK), recall(found.row_BK[:, :tenth], best_UK[:, :tenth]),
        float(found.is_certain_B.float().mean()), float(found.is_complete_B.float().mean()),
        float(found.survivors_B.float().mean()),
    )  # fmt: skip


def check_kernels(device: str) -> None:
    """A catalogue of 100,000 on the device answers as on the CPU: split, with rules, over all codes and by clusters."""
    size = Size(100_000, 64, 64, (), 32, 100, 1)
    item_NE, user_UE = make(size, "cpu")
    columns = make_columns(size.items, "cpu")
    asked, plan = make_requests(32, size.items, "cpu"), Plan(k=100, advertiser_cap=3)
    is_head_N = torch.arange(size.items) % 3 == 0
    answers = []
    for place in ("cpu", device):
        there = Columns(*(getattr(columns, name).to(place) for name in Columns.__dataclass_fields__))
        index = TwoLevelIndex(
            VERSION, item_NE.to(place), is_head_N=is_head_N.to(place), layout=LAYOUT, columns=there,
            clusters=size.clusters,
        )  # fmt: skip
        users = user_UE.to(place)
        every = size.clusters  # which clusters are nearest, bfloat16 products decide on a GPU
        with torch.inference_mode():
            answers.append([
                index(users, plan, asked.to(place), wanted=4000),
                index(users, Plan(k=100), wanted=500),
                index(users, Plan(k=100), wanted=500, probes=every),
            ])  # fmt: skip
    for one, two in zip(*answers, strict=True):
        share = recall(two.row_BK, one.row_BK)
        off = float((one.utility_BK - two.utility_BK.cpu()).abs().max())
        print(f"{device} against CPU: {share:.4%} of the rows, utilities within {off:.1e}", flush=True)
        assert share >= 0.999, share
        assert off <= 2e-6, off


def check(index: TwoLevelIndex, user_UE: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor], size: Size) -> None:
    """Certain answers are the best rows, but for items whose float32 scores differ by rounding."""
    score_UK, row_UK = best
    users = min(MOST_BATCH, len(user_UE))
    found = index.search(user_UE[:users], Plan(k=size.k), embedding_version=VERSION, exact=True)
    off = float((found.utility_BK - score_UK[:users]).abs().max())
    assert bool(found.is_certain_B.all()), "not all answers are certain"
    assert off <= 2e-6, f"scores of certain answers are off by {off}"
    share = recall(found.row_BK, row_UK[:users])
    again = index.search(user_UE[:users], Plan(k=size.k), embedding_version=VERSION, exact=True)
    assert torch.equal(found.row_BK, again.row_BK), "two runs differ"
    assert torch.equal(found.utility_BK, again.utility_BK), "two runs differ"
    print(f"certain answers of {users} users: {share:.4%} of the best rows, scores within {off:.1e}", flush=True)
    assert share >= 0.999, share


def timed(
    call: Callable[[torch.Tensor], Any], user_UE: torch.Tensor, batch: int, device: str, repeats: int,
    is_captured: bool = True,
) -> float:  # fmt: skip
    """Median milliseconds of a batch, a CUDA graph where there is CUDA; every repeat has the next users."""
    batches: Iterator[torch.Tensor] = itertools.cycle(
        [users for users in user_UE.repeat(-(-batch // len(user_UE)), 1).split(batch) if len(users) == batch]
    )
    held_BE = next(batches).clone()
    with torch.inference_mode():

        def own() -> Any:
            return call(held_BE)

        replay = captured(own) if device.startswith("cuda") and is_captured else own

        def step() -> None:
            held_BE.copy_(next(batches))
            replay()

        return median_ms(step, device, repeats)


def measure(size: Size, device: str) -> list[dict[str, Any]]:
    """Everything at one size; the entries to record."""
    is_cuda = device.startswith("cuda")
    began = time.perf_counter()
    item_NE, user_UE = make(size, device)
    if is_cuda:
        torch.cuda.synchronize()
    print(f"{size.name}: {size.items:,} items made in {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    columns = make_columns(size.items, device)
    index = TwoLevelIndex(VERSION, item_NE, clusters=size.clusters, layout=LAYOUT, columns=columns)
    if is_cuda:
        torch.cuda.synchronize()
    built_s = time.perf_counter() - began
    memory = memory_of(index)
    print(f"{size.name}: built in {built_s:.1f} s; {memory}", flush=True)
    best = best_of_all(item_NE, user_UE, size.k)
    check(index, user_UE, best, size)
    plan = Plan(k=size.k)
    wanted = default_wanted(plan)
    ways = [judged(index, user_UE, best[1], size, probes, wanted) for probes in (0, *size.probes)]
    ways.append(judged(index, user_UE, best[1], size, 0, wanted // 2))
    for way in ways:
        print(
            f"{size.name}, {way.name}, {way.wanted} wanted: recall@{size.k} {way.recall_1000:.4f}, "
            f"@{size.k // 10} {way.recall_100:.4f}, {way.survivors:.0f} survivors, {way.complete:.1%} complete, "
            f"{way.certain:.1%} certain", flush=True,
        )  # fmt: skip

    def timer(call: Callable[[torch.Tensor], Any], batch: int) -> float:
        return timed(call, user_UE, batch, device, size.repeats)

    ms: dict[int, dict[str, float]] = {}
    rivals: dict[int, dict[str, float]] = {}
    for batch in (1, 32, MOST_BATCH):
        ms[batch] = {
            f"{way.name}, {way.wanted} wanted": timer(
                lambda users, way=way: index(users, plan, wanted=way.wanted, probes=way.probes), batch
            )
            for way in ways
        }  # fmt: skip
        show(size, batch, ms[batch])
    for batch in (1, 32):
        rivals[batch] = brute_force(index, item_NE, timer, batch, size, is_cuda)
        show(size, batch, rivals[batch])
    if is_cuda:
        for batch, found in by_faiss(index, item_NE, user_UE, best[1], size, device).items():
            rivals[batch] |= found
    show_parts(index, user_UE, wanted, device, size)
    extras = {batch: others(index, item_NE, timer, batch, wanted, size, device) for batch in (1, 32)}
    for batch, found in extras.items():
        show(size, batch, found)
    return entries(size, ways, ms, rivals, extras, memory)


Timer = Callable[[Callable[[torch.Tensor], Any], int], float]


def memory_of(index: TwoLevelIndex) -> str:
    """GB of the index's parts."""
    exact = index.exact
    tail = 0 if exact.tail_TF is None else exact.tail_TF.nbytes
    codes = sum(part.nbytes for part in index.buffers())
    rules = sum(getattr(index.columns, name).nbytes for name in Columns.__dataclass_fields__) if index.columns else 0
    return (
        f"first level {codes / 1e9:.2f} GB (codes, scales, sample, clusters), exact rows on the device "
        f"{exact.head_HF.nbytes / 1e9:.2f} and on the host {tail / 1e9:.2f}, rules {rules / 1e9:.2f}"
    )


def brute_force(
    index: TwoLevelIndex, item_NE: torch.Tensor, timer: Timer, batch: int,
    size: Size, is_cuda: bool,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of each way to search all rows that one would write; what a library refuses is named."""
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "bfloat16 product and topk": lambda users: by_product(item_NE, users, size.k, size.items),
        "bfloat16 product and topk in pieces of 4M": lambda users: by_product(item_NE, users, size.k, 2**22),
    }
    if is_cuda:  # the int8 product of the CPU's library wants other shapes
        calls["int8 product and topk"] = lambda users: by_codes(index.code_NW, index.scale_N, users, size.k)
    found = {}
    for name, call in calls.items():
        try:
            found[name] = timer(call, batch)
        except RuntimeError as error:
            print(f"{name}, B={batch}: not here: {str(error)[:300]}", flush=True)
    return found


def by_faiss(
    index: TwoLevelIndex, item_NE: torch.Tensor, user_UE: torch.Tensor, best_UK: torch.Tensor, size: Size, device: str
) -> dict[int, dict[str, float]]:
    """Milliseconds of FAISS's ways by batch, their recall in their names; of lists, those that reach LEAST_RECALL."""
    found: dict[int, dict[str, float]] = {1: {}, 32: {}}
    faiss = faiss_rivals.imported()
    if faiss is None:
        return found
    try:
        for rival in faiss_rivals.rivals(faiss, item_NE, index.centroid_GE, size.probes, size.k):
            share = recall(torch.cat([rival.search(users) for users in user_UE.split(MOST_BATCH)]), best_UK)
            name = f"{rival.name}, recall {share:.4f}"
            for batch, ms in found.items():
                value = timed(rival.search, user_UE, batch, device, size.repeats, is_captured=False)
                show(size, batch, {name: value})
                if share >= LEAST_RECALL:
                    ms[name] = value
    except RuntimeError as error:
        print(f"FAISS: ended: {str(error)[:300]}", flush=True)
    return found


def show_parts(index: TwoLevelIndex, user_UE: torch.Tensor, wanted: int, device: str, size: Size) -> None:
    """Where a pass over all codes spends its time."""
    capacity = min(size.items, wanted * ROOM)
    for batch in (1, 32):
        with torch.inference_mode():
            users = user_UE[:batch]
            code_BW, _ = quantised(users, index.code_NW.shape[1])
            threshold_B = index.thresholds(code_BW, wanted)
            row_BC, _ = index.steps.scan(index.code_NW, index.scale_N, index.row_N, code_BW, threshold_B, capacity)
        parts: dict[str, Callable[[torch.Tensor], Any]] = {
            "threshold": lambda users: index.thresholds(quantised(users, index.code_NW.shape[1])[0], wanted),
            "scan": lambda users, t=threshold_B: index.steps.scan(
                index.code_NW, index.scale_N, index.row_N, quantised(users, index.code_NW.shape[1])[0], t, capacity
            ),
            "exact scores": lambda users, rows=row_BC: index.steps.dots(index.exact, rows, users),
        }  # fmt: skip
        ms = {f"part: {name}": timed(call, user_UE, batch, device, size.repeats) for name, call in parts.items()}
        show(size, batch, ms)


def others(
    index: TwoLevelIndex, item_NE: torch.Tensor, timer: Timer, batch: int,
    wanted: int, size: Size, device: str,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds over all codes with a tail in host memory, with an MLP, and with rules."""
    plan = Plan(k=size.k)
    found = {}
    asked = make_requests(batch, size.items, device)
    capped = Plan(k=size.k, advertiser_cap=10)
    # Four fifths pass the filter: as many survivors as before want a lower threshold.
    found["rules and a cap"] = timer(lambda users: index(users, capped, asked, wanted=wanted * 5 // 4), batch)
    whole, index.exact = index.exact, split_exact(item_NE)
    found["tail of 3/4 on the host"] = timer(lambda users: index(users, plan, wanted=wanted), batch)
    if size.probes:
        found[f"tail of 3/4 on the host, {size.probes[-1]} probes"] = timer(
            lambda users: index(users, plan, wanted=wanted, probes=size.probes[-1]), batch
        )
    index.exact = whole
    torch.manual_seed(0)
    index.scorer = InteractionScorer(E, 0).to(device, item_NE.dtype).eval()
    found["MLP on the survivors"] = timer(lambda users: index(users, plan, wanted=wanted), batch)
    index.scorer = None
    return found


_SPLIT: dict[int, ExactRows] = {}


def split_exact(item_NE: torch.Tensor) -> ExactRows:
    """A random quarter of the rows as the head; kept, as page-locking takes seconds."""
    if len(item_NE) not in _SPLIT:
        _SPLIT.clear()  # the size before: its page-locked rows are not needed any more
        random = torch.Generator(item_NE.device).manual_seed(3)
        is_head_N = torch.rand(len(item_NE), generator=random, device=item_NE.device) < 0.25
        _SPLIT[len(item_NE)] = ExactRows.split(item_NE, is_head_N)
    return _SPLIT[len(item_NE)]


def show(size: Size, batch: int, ms: dict[str, float]) -> None:
    """One line."""
    line = ", ".join(f"{name} {value:.4g} ms" for name, value in ms.items())
    print(f"{size.name}, B={batch}: {line}", flush=True)


def entries(
    size: Size, ways: Sequence[Way], ms: dict[int, dict[str, float]], rivals: dict[int, dict[str, float]],
    extras: dict[int, dict[str, float]], memory: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The first way, all codes, beside the best brute force; the others in the notes.

    It is the one that we recommend: what it finds does not depend on how well the items fall into clusters.
    """
    first = ways[0]
    name = f"{first.name}, {first.wanted} wanted"
    found: list[dict[str, Any]] = []
    for batch in (1, 32):
        rival = min(rivals[batch], key=lambda one: rivals[batch][one])
        beside = {one: value for one, value in {**ms[batch], **extras[batch]}.items() if one != name}
        beside |= {one: value for one, value in rivals[batch].items() if one != rival}
        note = "; ".join(f"{one} {value:.4g} ms" for one, value in beside.items())
        found.append({
            "measure": f"index.{size.name}.B{batch}.ms", "value": round(ms[batch][name], 4), "unit": "ms",
            "rival": rival, "rival_value": round(rivals[batch][rival], 4), "note": f"{name}; {note}",
        })  # fmt: skip
    through = "; ".join(f"{one} {MOST_BATCH / value * 1e3:.0f}" for one, value in ms[MOST_BATCH].items())
    found.append({
        "measure": f"index.{size.name}.qps", "value": round(MOST_BATCH / ms[MOST_BATCH][name] * 1e3),
        "unit": "requests/s", "note": f"batches of {MOST_BATCH} one after another: {through}",
    })  # fmt: skip
    curve = "; ".join(
        f"{way.name}, {way.wanted} wanted: @{size.k} {way.recall_1000:.4f}, @{size.k // 10} {way.recall_100:.4f}, "
        f"{way.certain:.0%} certain" for way in ways
    )  # fmt: skip
    found.append({
        "measure": f"index.{size.name}.recall", "value": round(first.recall_1000, 4), "unit": f"recall@{size.k}",
        "rival": "float32 search of all rows", "rival_value": 1, "note": f"{curve}; memory: {memory}",
    })  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each size, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.two_level", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--quick", action="store_true", help="20,000 items; records nothing")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        sizes = [Size(20_000, 64, 32, (4, 16), 32, 100, 1)]
    else:
        sizes = [Size(millions * 10**6, 16_384, 16_384, (16, 64, 256), 256, 1000, 30) for millions in args.millions]
    if args.device.startswith("cuda"):
        check_kernels(args.device)
    for size in sizes:
        found = measure(size, args.device)
        if args.device.startswith("cuda") and not args.quick and not args.no_record:
            shared = {
                "command": f"python -m benchmarks.two_level --device {args.device}",
                "versions": versions("torch", "triton"),
            }
            record("index", [{**entry, **shared} for entry in found])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
