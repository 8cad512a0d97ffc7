"""Where the time of crossing attention goes: hardware counters of its kernels on each row, read by Nsight Compute.

python -m benchmarks.dcat_profile [--rows S2048 ragged]     # needs a Hopper GPU, and `ncu` on the PATH

Each row's forward pass runs once under the profiler after two runs without it; then forward and backward, where both
have a target. Prints a table: microseconds; how much of the whole time the tensor cores and the unit of exponentials
(XU) were at work, and instructions were issued; the memory's and the L2's share of their peak; and for what warps
waited longest, in cycles an instruction. Caches are flushed before each pass of the profiler, clocks left alone.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import dcat

KERNELS = "regex:^_(forward|fold|prepare|query|history)_kernel"
DURATION = "gpu__time_duration.sum"
SHARES = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "XU": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
}
"""Of the peak, over the whole time of a kernel, in %."""
STALLS = {
    name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
    for name in ("barrier", "gmma", "long_scoreboard", "math_pipe_throttle", "short_scoreboard", "wait")
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def run(rows: Sequence[dcat.Row]) -> None:
    """What is profiled: the steps of each row, their names printed in order."""
    device = torch.device("cuda")
    profiler = torch.cuda.cudart()
    for row in rows:
        problem = dcat.Problem.draw(row, device)
        steps: list[tuple[str, dcat.Step]] = [("forward", problem.ours)]
        if row.train_target is not None:
            steps.append(("both", dcat.training_step(problem, problem.ours)))
        for name, step in steps:
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            profiler.cudaProfilerStart()
            step()
            torch.cuda.synchronize()
            profiler.cudaProfilerStop()
            print(f"step {row.name}, {name}", flush=True)


def table(lines: Iterable[str], steps: Sequence[str]) -> list[str]:
    """Lines of a table, one a kernel, of what ncu wrote as CSV and the names of the steps; each has one forward pass.

    Raises ValueError where there are more or fewer of those.
    """
    read = csv.reader(line for line in lines if line.startswith('"'))
    names, units, *rows = list(read)
    at = {name: place for place, name in enumerate(names)}
    made, step = [], -1
    for row in rows:
        kernel = row[at["Kernel Name"]].removeprefix("_").removesuffix("_kernel")
        step += kernel == "forward"
        if not 0 <= step < len(steps):
            raise ValueError(f"wanted a forward pass for each of {len(steps)} steps, found another: {kernel}")
        us = float(row[at[DURATION]].replace(",", "")) * MICROSECONDS[units[at[DURATION]]]
        shares = " | ".join(f"{float(row[at[metric]]):.0f}" for metric in SHARES.values())
        waits = sorted(((float(row[at[metric]]), name) for name, metric in STALLS.items()), reverse=True)[:2]
        waited = ", ".join(f"{name} {cycles:.1f}" for cycles, name in waits)
        made.append(f"| {steps[step]} | {kernel} | {us:.1f} | {shares} | {waited} |")
    if step != len(steps) - 1:
        raise ValueError(f"wanted a forward pass for each of {len(steps)} steps, found {step + 1}")
    head = ["step", "kernel", "us", *(f"{name} %" for name in SHARES), "waits"]
    return [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(SHARES) + 1) + "---|", *made]


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.dcat_profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows; all by default")
    parser.add_argument("--run", action="store_true", help="run the steps alone, as the profiler does")
    args = parser.parse_args(argv)
    rows = [row for row in dcat.all_rows() if any(part in row.name for part in args.rows)]
    if not rows:
        parser.error(
            f"no row is named {' or '.join(args.rows)}; there are {', '.join(r.name for r in dcat.all_rows())}"
        )
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA GPU, found none")
    if args.run:
        run(rows)
        return 0
    if shutil.which("ncu") is None:
        parser.error("wanted Nsight Compute's `ncu` on the PATH, found none")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "counters.csv"
        metrics = ",".join([DURATION, *SHARES.values(), *STALLS.values()])
        command = [
            "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
            "--kernel-name", KERNELS, "--metrics", metrics, "--log-file", str(written),
            sys.executable, "-m", "benchmarks.dcat_profile", "--run", "--rows", *args.rows,
        ]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        steps = [line.removeprefix("step ") for line in done.stdout.splitlines() if line.startswith("step ")]
        print("\n".join(table(written.read_text().splitlines(), steps)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
