"""What the demo says of its results: values in, sentences and facts for the report and the terminal out."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from deploy.report import Answers, Data, Freshness, Headline, Latency, Step, milliseconds, percent, seconds, span
from deploy.settings import Inputs, Settings, show_command, shown_path
from model.dataset import load_description, shipped_descriptions
from model.errors import ConfigError
from model.event_log import list_files, read_items, reject_counts, show_time
from model.release import Manifest
from pipelines.runs import RunManifest

_DAY_US = 86_400_000_000


def describe_data(settings: Settings, inputs: Inputs, events: pa.Table, rejects: pa.Table) -> Data:
    """What went in."""
    description = inputs.description
    users = pc.count_distinct(events["user_id"]).as_py()
    taken = pc.count_distinct(events["item_id"]).as_py()
    if events.num_rows == 0:
        raise ConfigError(f"no usable event in {inputs.events}: {reject_counts(rejects) or 'it is empty'}")
    ends = pc.min_max(events["timestamp_us"]).as_py()
    days = (ends["max"] - ends["min"]) / _DAY_US
    catalogue = read_items(str(inputs.items), description).num_rows
    kinds = pc.value_counts(events["event_type"]).to_pylist()
    types = ", ".join(
        f"{kind['values']} ({description.event_types[kind['values']]}): {kind['counts']:,}"
        for kind in sorted(kinds, key=lambda kind: -int(kind["counts"]))
    )
    if settings.events is None:
        source = "generated"
    elif settings.dataset is not None:
        source = f"given: {settings.dataset}"
    elif (beside := beside_file(inputs.events)) is not None:
        source = f"found: {beside}"
    elif description.name in shipped_descriptions() and description == load_description(description.name):
        source = f"shipped: {description.name}, after the folder's name"
    else:
        source = "none found, so inferred from the log: see below, correct it and give it as DATASET=..."
    made = "Made-up" if settings.events is None else "Your"
    return Data(
        summary=f"{made} data: {events.num_rows:,} events of {users:,} users on {taken:,} items in {days:.1f} days.",
        facts=[
            ("Events", f"{shown_path(inputs.events)}, {len(list_files(str(inputs.events))):,} files"),
            ("Description", source),
            ("From", show_time(ends["min"])),
            ("To", show_time(ends["max"])),
            ("Event types", types),
            ("Catalogue", f"{catalogue:,} items in {shown_path(inputs.items)}"),
            ("Read by the encoder", ", ".join(["item", "event type", "time gaps", *description.event_columns])),
            (
                "Read by the head",
                ", ".join(["state", "session", "subject items", "hour", "weekday", *description.head_columns]),
            ),
            ("Test", ", ".join(f"{name} {value}" for name, value in description.evaluation.to_dict().items())),
        ],
        description=yaml.safe_dump(description.to_dict(), sort_keys=False),
        events=events.num_rows,
        set_aside=reject_counts(rejects),
    )


def beside_file(events: Path) -> Path | None:
    """The dataset.yaml that goes with an event log."""
    folders = [events, events.parent] if events.is_dir() else [events.parent]
    return next((folder / "dataset.yaml" for folder in folders if (folder / "dataset.yaml").is_file()), None)


def encode_meaning(run: RunManifest) -> str:
    """What a daily run did."""
    counts = run.counts
    if run.previous_run is None:
        what = f"First run: encoded all {counts['encoded']:,} users seen so far"
    else:
        what = f"Encoded the {counts['encoded']:,} users with new events, skipped {counts['skipped']:,} idle ones"
    later = counts.get("dead.future_timestamp", 0)
    waiting = f" The {later:,} events after that are left for later runs." if later else ""
    return f"{what}; states as of {show_time(run.as_of_us)} are in Parquet and in Redis.{waiting}"


def set_aside(data: Data, runs: Sequence[RunManifest]) -> Data:
    """The data with what the runs set aside beyond what the reader does: users that cannot be encoded."""
    reasons = dict(data.set_aside)
    for run in runs:
        for reason in ("poison", "non_finite_state"):
            count = run.counts.get(f"dead.{reason}", 0)
            if count:
                reasons[reason] = max(count, reasons.get(reason, 0))
    return replace(data, set_aside=reasons)


def _recall(quality: Mapping[str, Any], arm: str, part: str = "all", k: int = 20) -> float:
    k = k if k in quality["k"] else quality["k"][-1]
    return float(quality["arms"][arm][part][f"recall@{k}"]["value"])


def quality_meaning(quality: Mapping[str, Any]) -> str:
    """The result in a sentence."""
    best = max(("recent_popularity", "popularity"), key=lambda arm: _recall(quality, arm))
    name = f"what was popular in the last {span(quality)}" if best == "recent_popularity" else "what is popular overall"
    return (
        f"The item taken next is in the top 20 for {percent(_recall(quality, 'context'))} of "
        f"{quality['test_events']:,} test events; state only {percent(_recall(quality, 'no_context'))}, {name} "
        f"{percent(_recall(quality, best))}."
    )


def headlines(quality: Mapping[str, Any], answers: Answers, latency: Latency, freshness: Freshness) -> list[Headline]:
    """The numbers at the top."""
    best = max(_recall(quality, "recent_popularity"), _recall(quality, "popularity"))
    return [
        Headline(
            value=f"{_recall(quality, 'context'):.3f}",
            meaning=f"Recall@20 with context; popularity at best {best:.3f}, "
            f"the state alone {_recall(quality, 'no_context'):.3f}",
        ),
        Headline(value=milliseconds(latency.single_ms, 0.5), meaning="median time of one request, from the client"),
        Headline(value=milliseconds(latency.single_ms, 0.99), meaning="99% of single requests are faster than this"),
        Headline(value=percent(answers.exact_share), meaning="of users answered from a current state"),
        Headline(
            value=percent(freshness.encoded / max(1, freshness.users)),
            meaning="of users had new events on the second day; only they were encoded",
        ),
    ]


def examples_note(rates: tuple[int, float, float] | None, by_time: bool) -> str:
    """What the examples are."""
    if rates is None:
        told = "Three users drawn at random. The log ends where the states do, so the context says which item the user "
        return told + "looks at (the last one), the time, and what is known of the user."
    count, without, with_context = rates
    return (
        "Three users drawn at random among those with something earlier in the session. Over "
        f"{count:,} requests answered by the service from stored states, the item taken next was in the top 20 for "
        f"{percent(without)} with the state only and for {percent(with_context)} with the context."
    )


def version_facts(manifest: Manifest, epoch: int, runs: Sequence[RunManifest]) -> list[tuple[str, str]]:
    """The names of everything that was made."""
    return [
        ("release_id", manifest.release_id),
        ("state_version", manifest.state_version),
        ("embedding_version", manifest.embedding_version),
        ("epoch", str(epoch)),
        *((f"run {i}", f"{run.run_id} (as of {show_time(run.as_of_us)})") for i, run in enumerate(runs, 1)),
        ("trained until", show_time(manifest.trained_until_us)),
        ("state", f"{manifest.config.state_width} x {manifest.compute_dtype}, stored as {manifest.storage_codec}"),
    ]


def capped_texts(
    settings: Settings, summary: Mapping[str, Any], quality: Mapping[str, Any], answers: Answers
) -> list[str]:
    """What was left out for time, and how to lift it."""
    capped = [f"Training: {text}." for text in summary["capped"]]
    history, wanted = len(summary["history"]), summary["settings"]["epochs"]
    spent = summary["train_seconds"] / 60
    if history < wanted and spent > 0.8 * settings.training_minutes:
        capped.append(
            f"Training stopped at its limit of {settings.training_minutes:g} minutes, in epoch {history} of at most "
            f"{wanted}. Lift it with DEMO_FLAGS='--minutes 30', or use tower-train without --max-minutes."
        )
    if quality["sampled"]:
        capped.append(
            f"Evaluation: {quality['test_events']:,} of {quality['test_events_total']:,} test events, drawn at random. "
            "All of them: tower-evaluate quality without --max-test-events."
        )
    if answers.asked < answers.users:
        capped.append(f"Coverage: asked for {answers.asked:,} of {answers.users:,} users, drawn at random.")
    if settings.quick:
        capped.append("Everything is small because of --quick; leave it out for the demo proper.")
    return capped


def next_steps(settings: Settings, inputs: Inputs, manifest: Manifest, programs: Path) -> list[tuple[str, str]]:
    """Commands to try next."""

    def show(*command: str) -> str:
        return show_command(command, programs)

    where = ["--registry", str(settings.work / "registry")]
    states = ["--states", str(settings.work / "states")]
    folder = str((settings.work / "redis").absolute())
    files = ["--events", str(inputs.events), "--items", str(inputs.items)]
    files += [] if inputs.users is None else ["--users", str(inputs.users)]
    steps = [
        (
            "The private Redis has stopped; its data are still there. Start it again in another terminal:",
            show(
                "python",
                "-c",
                "from deploy.redis_server import start_redis; "
                f"redis = start_redis({folder!r}, 6399, persist=True); input('Enter stops it'); redis.stop()",
            ),
        ),
        ("Serve:", show("tower-serve", *where, "--redis-url", "redis://127.0.0.1:6399/0")),
        (
            "The daily job, once more with the rest of the log (only users with new events are encoded):",
            show("tower-encode", "--events", str(inputs.events), *where, *states)
            + " --redis-url redis://127.0.0.1:6399/0",
        ),
        (
            "A new head on the same states, so that nothing needs encoding:",
            show("tower-train", *files, "--dataset", inputs.dataset, *where, "--head-only-from", manifest.release_id),
        ),
        ("What serves, and what may serve next:", show("tower-release", "status", *where, *states)),
        ("Other quality figures:", show("tower-evaluate", "quality", *where, *files, "--k", "5", "10", "100")),
    ]
    if settings.events is None:
        steps.append(("Your own data:", "make demo EVENTS=log.parquet ITEMS=items.parquet [USERS=users.parquet]"))
    return steps


def print_summary(steps: Sequence[Step], total_s: float, capped: Sequence[str], path: Path) -> None:
    """The closing table."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    margin = max(len(step.title) for step in steps)
    print(f"\n{bold('What was done')}")
    for step in steps:
        lines = textwrap.wrap(step.meaning, width - margin - 16, break_on_hyphens=False) or [""]
        print(f"  {step.title:<{margin}}  {seconds(step.seconds):>12}  {lines[0]}")
        for line in lines[1:]:
            print(f"  {'':<{margin}}  {'':>12}  {line}")
    for text in capped:
        print(
            textwrap.fill(
                f"Capped: {text}", width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
        )
    print(f"\nDone in {seconds(total_s)}. Open {bold(shown_path(path))}", flush=True)


def bold(text: str) -> str:
    """Where the output is a terminal."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
