"""The whole pipeline in one command: train, release, encode twice, serve, query, evaluate, report.

    python -m deploy.demo                                     on generated data
    python -m deploy.demo --events log/ --items items.parquet [--users users.parquet] [--dataset description.yaml]

Every step is a command that can be typed; each is printed before it runs. A Redis of its own is started and stopped.
"""

import argparse
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

import feature_repo
from benchmarks.results import hardware, record, versions
from deploy import queries
from deploy.processes import CommandFailed, Processes, Stopped
from deploy.redis_server import start_redis
from deploy.report import (
    Answers,
    Data,
    Example,
    Freshness,
    Headline,
    Latency,
    Report,
    Step,
    milliseconds,
    percent,
    seconds,
    span,
    write,
)
from feature_repo.environment import feast_environment
from model.dataset import DatasetDescription, find_description, load_description, shipped_descriptions
from model.errors import ConfigError, TowerError
from model.event_log import list_files, read_items, read_log, read_users, reject_counts, show_time
from model.release import Manifest, Registry
from online.client import Embedding, EmbedQuery, UserTowerClient
from pipelines.runs import RunManifest, RunStore

PROGRAMS = Path(sys.executable).parent
"""Where the console scripts are."""
MARKER = ".made-by-demo"
_DAY_US = 86_400_000_000
_SECOND_US = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the demo was asked to do."""

    events: Path | None
    items: Path | None
    users: Path | None
    dataset: str | None
    out: Path
    quick: bool
    minutes: float | None
    """Limit of the training; None for the default of the data at hand."""
    record: bool
    keep_serving: bool

    @property
    def work(self) -> Path:
        """What a run makes; replaced by the next."""
        return self.out / "demo"

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def training_minutes(self) -> float:
        """Limit of the training."""
        if self.minutes is not None:
            return self.minutes
        if self.events is not None:
            return 0.5 if self.quick else 6.0
        return 0.25 if self.quick else 1.25

    @property
    def max_test_events(self) -> int:
        """Largest test that is evaluated whole."""
        return 2_000 if self.quick else 20_000

    @property
    def requests(self) -> int:
        """Timed single requests."""
        return 500 if self.quick else 2_000

    @property
    def coverage_users(self) -> int:
        """Most users asked for to count the answers."""
        return 5_000 if self.quick else 50_000


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings of a command line. Ends the process with status 2 and one clear line where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=Path, help="event log: a Parquet file or a folder of parts")
    parser.add_argument("--items", type=Path, help="items: a Parquet file or a folder; goes with --events")
    parser.add_argument("--users", type=Path, help="users, where the description declares user columns")
    parser.add_argument("--dataset", help="description: a YAML file or the name of a shipped one (default: found)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of everything made (default: out)")
    parser.add_argument("--quick", action="store_true", help="less data, less training: a check that all works")
    parser.add_argument("--minutes", type=float, help="limit of the training (default: 1.25, on your data 6)")
    parser.add_argument("--record", action="store_true", help="note the time in benchmarks/results/main_job.json")
    parser.add_argument("--keep-serving", action="store_true", help="at the end, serve until Ctrl-C")
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        check_settings(settings)
    except TowerError as error:
        parser.exit(2, f"demo: {error}\n")
    return settings


def check_settings(settings: Settings) -> None:
    """Raises ConfigError."""
    if settings.events is None:
        for flag, value in (("ITEMS", settings.items), ("USERS", settings.users), ("DATASET", settings.dataset)):
            if value is not None:
                raise ConfigError(f"{flag} goes with EVENTS: make demo EVENTS=log.parquet ITEMS=items.parquet")
    elif settings.items is None:
        raise ConfigError("EVENTS needs ITEMS: make demo EVENTS=log.parquet ITEMS=items.parquet [USERS=...]")
    for flag, path in (("EVENTS", settings.events), ("ITEMS", settings.items), ("USERS", settings.users)):
        if path is not None and not path.exists():
            raise ConfigError(f"{flag}: there is nothing at {path}")
    if settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out: {settings.out} is no folder")
    if settings.dataset is not None:
        load_description(settings.dataset)
    if settings.minutes is not None and settings.minutes <= 0:
        raise ConfigError(f"--minutes must be above 0, got {settings.minutes:g}")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The data the pipeline runs on."""

    events: Path
    items: Path
    users: Path | None
    dataset: str
    """Description file, or the name of a shipped one."""
    description: DatasetDescription


@dataclass(frozen=True, slots=True)
class Times:
    """When the states are cut."""

    previous_us: int
    as_of_us: int
    until_us: int


def cut_times(description: DatasetDescription, first_us: int, last_us: int) -> Times:
    """As-of times of the two daily runs, and the end of the test.

    Split by time: the second run is at the start of the test. Otherwise: at the end of the log. The first is a day
    earlier, or half way where the log is too short for that.
    """
    if description.evaluation.split == "time":
        as_of_us, until_us = description.evaluation.window_us(first_us, last_us)
    else:
        as_of_us, until_us = -(-last_us // _SECOND_US) * _SECOND_US, last_us + 1
    previous_us = as_of_us - _DAY_US
    if previous_us <= first_us:
        previous_us = (first_us + as_of_us) // 2 // _SECOND_US * _SECOND_US
    return Times(previous_us, as_of_us, until_us)


class Demo:
    """One run of the demo. Each step prints what it does and notes a line for the report."""

    def __init__(self, settings: Settings, processes: Processes, programs: Path = PROGRAMS) -> None:
        self.settings = settings
        self.steps: list[Step] = []
        self.step = "start"
        """Title of the step being done."""
        self._processes = processes
        self._programs = programs
        self._commands: list[str] = []
        self._log: Path | None = None

    def run(self) -> Path:
        """All steps; the report's path."""
        started = time.monotonic()
        settings, work = self.settings, self.settings.work
        prepare(settings)
        registry, states, training = work / "registry", work / "states", work / "training"

        with self._step("Data") as said:
            inputs = self._inputs()
            events, rejects = read_log(str(inputs.events), inputs.description)
            data = describe_data(settings, inputs, events, rejects)
            said(f"{data.summary} {sum(data.set_aside.values()):,} rows set aside.")
        when = events["timestamp_us"].to_numpy()
        times = cut_times(inputs.description, int(when.min()), int(when.max()))
        users = read_users(str(inputs.users), inputs.description) if inputs.users is not None else None
        cut = queries.Cut(events, users, inputs.description, times.as_of_us, times.until_us)

        with self._step("Redis") as said:
            redis = self._processes.adopt(lambda: start_redis(work / "redis", persist=True))
            said("A private server on this machine, for the states that the service reads.")

        where = ["--registry", str(registry)]
        files = ["--events", str(inputs.events), "--items", str(inputs.items)]
        files += [] if inputs.users is None else ["--users", str(inputs.users)]
        with self._step("Train") as said:
            limit = ["--max-minutes", f"{settings.training_minutes:g}", "--out", str(training)]
            self._do("train", ["tower-train", *files, "--dataset", inputs.dataset, *where, *limit])
            manifest = Registry(registry).manifest(Registry(registry).releases()[-1])
            summary = json.loads((training / "summary.json").read_text())
            said(
                f"Release {manifest.release_id} from {summary['counts']['events']:,} events before the test: weights, "
                f"vocabularies and golden inputs. {len(summary['history'])} epochs."
            )

        with self._step("Feast") as said:
            states.mkdir(parents=True, exist_ok=True)
            environment = feast_environment(str(registry), str(states), redis.url)
            exports = (
                f'eval "$({self._show(["python"])} -m feature_repo.environment --registry {shlex.quote(str(registry))}'
            )
            self._commands.append(f'{exports} --states {shlex.quote(str(states))} --redis-url {redis.url})"')
            self._do(
                "feast-apply", ["feast", "-c", shown_path(Path(feature_repo.__file__).parent), "apply"], environment
            )
            said(
                "Registered one feature view for the release's state version, and the service alias user_state. (Feast "
                "notes that there are no states yet; the next step makes them.)"
            )

        store = RunStore(str(states), manifest.state_version)
        run: dict[str, RunManifest] = {}
        for name, title, as_of_us in (
            ("encode-day-1", "Encode, day 1", times.previous_us),
            ("encode-day-2", "Encode, day 2", times.as_of_us),
        ):
            with self._step(title) as said:
                places = ["--events", str(inputs.events), *where, "--states", str(states), "--redis-url", redis.url]
                self._do(name, ["tower-encode", *places, "--as-of", show_time(as_of_us)])
                run[name] = store.manifest(store.run_ids()[-1])
                said(encode_meaning(run[name]))
        first, second = run["encode-day-1"], run["encode-day-2"]

        with self._step("Release") as said:
            place = [*where, "--states", str(states)]
            self._do("release-commit", ["tower-release", "commit", manifest.release_id, *place])
            self._do("release-status", ["tower-release", "status", *place])
            pointer = Registry(registry).pointer()
            said(f"The release passed its checks, has states, and serves now: epoch {pointer.epoch}.")

        with self._step("Serve") as said:
            port = self._serve([*where, "--redis-url", redis.url])
            said("The gRPC service loaded the release, replayed its golden inputs and is ready.")

        with self._step("Query") as said, UserTowerClient(f"127.0.0.1:{port}", timeout_s=5.0) as client:
            requests = queries.requests_from(cut, settings.requests, manifest.config.session_limit)
            asked_at_us = time.time_ns() // 1000
            replies, latency = queries.measure_latency(client, requests)
            bare = [EmbedQuery(request.user_id) for request in requests]
            without, _ = queries.ask_in_batches(client, bare)
            answers = queries.measure_coverage(client, cut, settings.coverage_users)
            chosen = queries.pick_examples(requests, replies)
            if inputs.description.evaluation.split != "time":
                for i in chosen:
                    requests[i] = queries.with_subject(requests[i], queries.history_of(cut, requests[i].user_id))
                    replies[i] = client.embed(requests[i].user_id, requests[i].context)
            said(
                f"{percent(answers.exact_share)} of {answers.asked:,} users answered from a current state; single "
                f"requests p50 {milliseconds(latency.single_ms, 0.5)}, p99 {milliseconds(latency.single_ms, 0.99)}."
            )

        with self._step("Evaluate") as said:
            out = work / "quality.json"
            limits = ["--max-test-events", str(settings.max_test_events), "--out", str(out)]
            release = ["--release", manifest.release_id, "--dataset", inputs.dataset]
            self._do("evaluate", ["tower-evaluate", "quality", *where, *release, *files, *limits])
            quality = json.loads(out.read_text())
            said(quality_meaning(quality))

        with self._step("Report") as said:
            catalogue = queries.Catalogue(
                Registry(registry).load(manifest.release_id, parts=("head", "items"), replay=False), str(inputs.items)
            )
            examples = self._examples(cut, catalogue, requests, without, replies, chosen, quality)
            rates = queries.hit_rates(catalogue, requests, without, replies, k=20)
            ages = queries.state_ages_hours(requests, replies, (times.previous_us, times.as_of_us), asked_at_us)
            by_time = inputs.description.evaluation.split == "time"
            sessions = [bool(request.context.session_events) for request in requests]
            freshness = Freshness(
                age_hours=ages if by_time else np.zeros(0),
                users=second.counts["users"],
                encoded_first=first.counts["encoded"],
                encoded=second.counts["encoded"],
                skipped=second.counts["skipped"],
                session_share=float(np.mean(sessions)) if by_time and sessions else None,
            )
            capped = capped_texts(settings, summary, quality, answers)
            path = settings.out / "report.html"
            report = Report(
                title=f"Hybrid Tower demo: {inputs.description.name}",
                subtitle=f"{time.strftime('%d %B %Y, %H:%M')}. A daily encoder leaves a state for each user; a small "
                "head joins it with what is true at request time.",
                headlines=headlines(quality, answers, latency, freshness),
                steps=self.steps,
                data=data,
                versions=version_facts(manifest, pointer.epoch, (first, second)),
                quality=quality,
                answers=answers,
                freshness=freshness,
                latency=latency,
                examples=examples,
                examples_note=examples_note(rates, by_time),
                capped=capped,
                next_steps=next_steps(settings, inputs, manifest, self._programs),
                machine=[
                    ("Machine", hardware()),
                    *versions("torch", "apache-beam", "feast", "grpcio", "redis", "pyarrow").items(),
                    ("System", platform.platform()),
                ],
            )
            write(report, path)
            said(f"{path}, {path.stat().st_size // 1024} KB, needs nothing but a browser.")
        write(report, path)  # once more, now with the time of its own step
        total_s = time.monotonic() - started
        print_summary(self.steps, total_s, capped, path)
        if settings.record:
            record_seconds(total_s, settings)
        if settings.keep_serving:
            print(f"\nServing on 127.0.0.1:{port} (Redis at {redis.url}) until Ctrl-C.", flush=True)
            while True:
                time.sleep(3600)
        return path

    def _inputs(self) -> Inputs:
        settings = self.settings
        if settings.events is None or settings.items is None:
            folder = settings.work / "data"
            size = ["--users", "1000", "--items", "800", "--days", "8", "--events", "40000"] if settings.quick else []
            self._do("generate", ["python", "-m", "model.generator", str(folder), *size])
            dataset = str(folder / "dataset.yaml")
            description = load_description(dataset)
            return Inputs(folder / "events", folder / "items.parquet", folder / "users.parquet", dataset, description)
        if settings.dataset is None:
            description = find_description(str(settings.events))
        else:
            description = load_description(settings.dataset)
        if description.user_columns and settings.users is None:
            wanted = ", ".join(description.user_columns)
            raise ConfigError(f"the description {description.name} declares the user columns {wanted}; give USERS=...")
        # What was found or inferred is written down once, and every command is told the same.
        dataset = settings.dataset or str(settings.work / "dataset.yaml")
        if settings.dataset is None:
            Path(dataset).write_text(yaml.safe_dump(description.to_dict(), sort_keys=False), encoding="utf-8")
        read_items(str(settings.items), description)  # says what is wrong with it before the training
        return Inputs(settings.events, settings.items, settings.users, dataset, description)

    def _serve(self, flags: Sequence[str]) -> int:
        """Starts the service; its port."""
        command = ["tower-serve", *flags, "--port", "0", "--metrics-port", "0"]
        self._commands.append(self._show(command))
        print(f"$ {self._commands[-1]}", flush=True)
        log = self._log = self.settings.logs / "serve.log"
        found: list[int] = []

        def ready() -> bool:
            match = re.search(r"^ready port=(\d+)", log.read_text(errors="replace") if log.exists() else "", re.M)
            found.extend([int(match[1])] if match else [])
            return match is not None

        log.unlink(missing_ok=True)
        self._processes.serve("serve", self._program(command), ready)
        print(f"  ready on 127.0.0.1:{found[0]}", flush=True)
        return found[0]

    def _examples(
        self,
        cut: queries.Cut,
        catalogue: queries.Catalogue,
        requests: Sequence[queries.Request],
        without: Sequence[Embedding | None],
        replies: Sequence[Embedding | None],
        chosen: Sequence[int],
        quality: Mapping[str, Any],
    ) -> list[Example]:
        hide_seen = quality["seen_items"] == "excluded"
        examples = []
        for i in chosen:
            plain, rich = without[i], replies[i]
            if plain is not None and rich is not None:
                examples.append(queries.describe_example(cut, catalogue, requests[i], plain, rich, hide_seen=hide_seen))
        return examples

    @contextmanager
    def _step(self, title: str) -> Iterator[Callable[[str], None]]:
        """Times a step; it calls what it is given with what the step did and means."""
        self.step, self._commands, self._log = title, [], None
        meanings: list[str] = []
        print(f"\n{_bold(f'{len(self.steps) + 1}. {title}')}", flush=True)
        started = time.monotonic()
        yield meanings.append
        step = Step(
            title=title,
            commands=tuple(self._commands),
            seconds=time.monotonic() - started,
            meaning=" ".join(meanings),
            log=None if self._log is None else str(self._log),
        )
        self.steps.append(step)
        print(f"  {step.meaning} [{seconds(step.seconds)}]", flush=True)

    def _do(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Runs one console command, shown as the user could type it."""
        self._commands.append(self._show(command))
        print("\n".join(f"$ {line}" for line in self._commands[-2 if environment else -1 :]), flush=True)
        self._log = self.settings.logs / f"{name}.log"
        self._processes.run(name, self._program(command), environment)

    def _program(self, command: Sequence[str]) -> list[str]:
        name, *rest = command
        return [sys.executable if name == "python" else str(self._programs / name), *rest]

    def _show(self, command: Sequence[str]) -> str:
        return show_command(command, self._programs)


def show_command(command: Sequence[str], programs: Path) -> str:
    """A command as it can be typed here."""
    return shlex.join([shown_path(programs / command[0]), *command[1:]])


def shown_path(path: Path) -> str:
    """Relative to the current folder where it lies below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def prepare(settings: Settings) -> None:
    """An empty work folder. Raises ConfigError rather than remove what an earlier demo did not make."""
    work = settings.work
    if work.exists():
        if not (work / MARKER).exists() and any(work.iterdir()):
            raise ConfigError(f"{work} is not empty and was not made by the demo; give another --out")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / MARKER).touch()
    (work / "tmp").mkdir()


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
    return f"{what}; states as of {show_time(run.as_of_us)} are in Parquet and in Redis."


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
        ("state", f"{manifest.config.d_model} x {manifest.compute_dtype}, stored as {manifest.storage_codec}"),
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
    print(f"\n{_bold('What was done')}")
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
    print(f"\nDone in {seconds(total_s)}. Open {_bold(shown_path(path))}", flush=True)


def record_seconds(total_s: float, settings: Settings) -> None:
    """Note the whole time among the benchmark results."""
    command = shlex.join(["python", "-m", "deploy.demo", *sys.argv[1:]])
    target = 240.0 if settings.events is None and not settings.quick else 90.0 if settings.quick else 1200.0
    entry = {"measure": "demo.seconds", "value": round(total_s, 1), "unit": "s", "target": target, "command": command}
    record("main_job", [entry])


def child_environment(environment: Mapping[str, str], programs: Path) -> dict[str, str]:
    """The environment of all commands: our programs first, output at once, and a PATH even where there is none.

    OpenMP's threads sleep while they wait for each other, unless told otherwise. By default they spin, which on a
    machine with other work makes small matrix products ten times slower.
    """
    path = os.pathsep.join([str(programs), environment.get("PATH") or os.defpath])
    fixed = {"PATH": path, "PYTHONUNBUFFERED": "1", "FEAST_USAGE": "False"}
    return {"OMP_WAIT_POLICY": "PASSIVE", **environment, **fixed}


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def main(arguments: Sequence[str] | None = None, programs: Path = PROGRAMS) -> int:
    """Exit status: 0 done, 1 a step failed, 2 the command line is wrong, 128 + n ended by signal n."""
    settings = parse_settings(arguments)
    logging.basicConfig(level=logging.WARNING, format="  %(message)s")
    logging.getLogger("model.dataset").setLevel(logging.INFO)
    # Beam leaves folders behind where temporary files go.
    temporary = {"TMPDIR": str((settings.work / "tmp").absolute())}
    environment = child_environment(os.environ, programs) | temporary
    demo: Demo | None = None
    try:
        with Processes(settings.logs, environment) as processes:
            demo = Demo(settings, processes, programs)
            demo.run()
    except Stopped as stopped:
        print(f"\ndemo: stopped by {stopped}; everything that it started has been stopped", file=sys.stderr)
        return 128 + stopped.number
    except CommandFailed as failure:
        step = demo.step if demo else "start"
        print(f"\ndemo: step {step!r} failed: {failure}. The end of {failure.log}:", file=sys.stderr)
        print(textwrap.indent("\n".join(failure.tail()), "  | "), file=sys.stderr)
        return 1
    except TowerError as error:
        print(f"\ndemo: step {demo.step if demo else 'start'!r} failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
