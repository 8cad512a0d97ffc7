"""The whole pipeline in one command: train, release, encode twice, serve, query, evaluate, report.

    python -m deploy.demo                                     on generated data
    python -m deploy.demo --events log/ --items items.parquet [--users users.parquet] [--dataset description.yaml]

Every step is a command that can be typed; each is printed before it runs. A Redis of its own is started and stopped.
"""

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
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.results import hardware, record, versions
from deploy import queries
from deploy.findings import (
    bold,
    capped_texts,
    describe_data,
    encode_meaning,
    examples_note,
    headlines,
    next_steps,
    print_summary,
    quality_meaning,
    set_aside,
    version_facts,
)
from deploy.processes import CommandFailed, Processes, Stopped
from deploy.redis_server import start_redis
from deploy.report import (
    Example,
    Freshness,
    Report,
    Step,
    milliseconds,
    percent,
    seconds,
    write,
)
from deploy.settings import Inputs, Settings, cut_times, parse_settings, show_command
from model.dataset import find_description, load_description
from model.errors import ConfigError, TowerError
from model.event_log import read_items, read_log, read_users, show_time
from model.release import Registry
from online.client import Embedding, EmbedQuery, UserTowerClient
from pipelines.runs import RunStore

PROGRAMS = Path(sys.executable).parent
"""Where the console scripts are."""
MARKER = ".made-by-demo"


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

        store = RunStore(str(states), manifest.state_version)
        place = [*where, "--states", str(states), "--redis-url", redis.url]
        with self._step("Prepare") as said:
            states.mkdir(parents=True, exist_ok=True)
            log, day_1 = ["--events", str(inputs.events)], ["--as-of", show_time(times.previous_us)]
            self._do("release-prepare", ["tower-release", "prepare", manifest.release_id, *log, *place, *day_1])
            first = store.manifest(store.run_ids()[-1])
            said(
                "Beside whatever serves: a Feast view for the release's state version, the states of all users as of "
                f"day 1, and the item snapshot. {encode_meaning(first)}"
            )

        with self._step("Commit") as said:
            self._do("release-commit", ["tower-release", "commit", manifest.release_id, *place])
            pointer = Registry(registry).pointer()
            said(
                f"The release passed its checks (states, rows, canaries, items) and serves now: epoch {pointer.epoch}."
            )

        with self._step("Encode, day 2") as said:
            self._do("encode-day-2", ["tower-encode", *log, *place, "--as-of", show_time(times.as_of_us)])
            self._do("release-status", ["tower-release", "status", *where, "--states", str(states)])
            second = store.manifest(store.run_ids()[-1])
            said(encode_meaning(second))

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
                data=set_aside(data, (first, second)),
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
        print(f"\n{bold(f'{len(self.steps) + 1}. {title}')}", flush=True)
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

    def _do(self, name: str, command: Sequence[str]) -> None:
        """Runs one console command, shown as the user could type it."""
        self._commands.append(self._show(command))
        print(f"$ {self._commands[-1]}", flush=True)
        self._log = self.settings.logs / f"{name}.log"
        self._processes.run(name, self._program(command))

    def _program(self, command: Sequence[str]) -> list[str]:
        name, *rest = command
        return [sys.executable if name == "python" else str(self._programs / name), *rest]

    def _show(self, command: Sequence[str]) -> str:
        return show_command(command, self._programs)


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
