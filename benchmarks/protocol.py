"""The release protocol as random walks over its real parts, and which of its guards is needed.

    python -m benchmarks.protocol [--examples 10000] [--processes 2]

Runs walks of tests/protocol.py with every guard in place: none may break an invariant. Then takes the guards away, one
at a time, and counts the walks until one breaks an invariant. Prints a table for docs/experiments.md.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from benchmarks.results import record, versions
from tests.protocol import GUARDS, INVARIANTS, LENGTH, Found, open_site, run, search, shrink, walk

PIECE = 100
"""Walks that a process runs before it reports."""
REMOVAL_EXAMPLES = 2000
"""Most walks that the removal of one guard is given."""


@dataclass(frozen=True)
class Piece:
    """What became of some walks."""

    walks: int
    counts: Counter[str]
    trace: Sequence[str] | None
    """The shrunk trace of the first that broke an invariant."""


def run_walks(seeds: range, reports: "multiprocessing.Queue[Piece]") -> None:
    """One process: a Redis and a folder of its own."""
    torch.set_num_threads(1)
    with open_site() as site:
        for start in range(0, len(seeds), PIECE):
            piece = seeds[start : start + PIECE]
            site.counts.clear()
            trace = None
            for seed in piece:
                if run(site, walk(seed)) is not None:
                    trace = [f"walk {seed}", *shrink(site, seed).trace]
                    break
            reports.put(Piece(len(piece), Counter(site.counts), trace))


def run_all(examples: int, processes: int) -> Counter[str]:
    """Every walk; exits with the trace of the first that broke an invariant."""
    context = multiprocessing.get_context("spawn")
    reports: multiprocessing.Queue[Piece] = context.Queue()
    workers = [
        context.Process(target=run_walks, args=(range(first, examples, processes), reports), daemon=True)
        for first in range(processes)
    ]
    for worker in workers:
        worker.start()
    counts: Counter[str] = Counter()
    done = 0
    with tqdm(total=examples, unit="walk", disable=not sys.stderr.isatty()) as bar:
        while done < examples:
            piece = reports.get(timeout=600)
            if piece.trace is not None:
                sys.exit("\n   ".join(piece.trace))
            done += piece.walks
            counts += piece.counts
            bar.update(piece.walks)
    for worker in workers:
        worker.join()
    return counts


def remove_each() -> dict[str, Found | None]:
    """For each guard, the first walk that broke an invariant without it."""
    found = {}
    with open_site() as site:
        for name, guard in GUARDS.items():
            with guard.remove():
                found[name] = search(site, range(REMOVAL_EXAMPLES))
    return found


def main() -> None:
    """Both halves, printed and recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="walks with every guard in place")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    counts = run_all(args.examples, args.processes)
    wall_s = time.perf_counter() - start
    print(f"{args.examples:,} walks of {LENGTH} operations in {wall_s:.0f} s, no invariant broken\n")
    for name, count in sorted(counts.items()):
        print(f"    {count:9,}  {name}")
    removed = remove_each()
    print("\n| guard taken away | invariant broken | walks until then |\n|---|---|---:|")
    for name, found in removed.items():
        broken = "none" if found is None else f"{found.violation.invariant}: {INVARIANTS[found.violation.invariant]}"
        print(f"| {GUARDS[name].what} | {broken} | {found.examples if found else f'over {REMOVAL_EXAMPLES}'} |")
    caught = [name for name, found in removed.items() if found is not None]
    command = f"python -m benchmarks.protocol --examples {args.examples}"
    shared = {"command": command, "versions": versions("redis", "hiredis", "pyarrow", "torch")}
    record(
        "versions",
        [
            {
                "measure": "statemachine.examples",
                "value": args.examples,
                "unit": f"walks of {LENGTH} operations, no invariant broken",
                "target": 10_000,
                "note": f"{args.processes} processes, {wall_s:.0f} s; seeds 0 to {args.examples - 1:,}",
                **shared,
            },
            {
                "measure": "statemachine.guards_removed",
                "value": len(removed),
                "unit": "guards, taken away one at a time",
                "note": ", ".join(removed),
                **shared,
            },
            {
                "measure": "statemachine.guards_found",
                "value": len(caught),
                "unit": "guards without which a walk breaks an invariant",
                "target": len(removed),
                "note": ", ".join(f"{name} after {found.examples}" for name, found in removed.items() if found),
                **shared,
            },
        ],
    )


if __name__ == "__main__":
    main()
