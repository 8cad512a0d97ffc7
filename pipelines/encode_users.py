"""tower-encode: the daily encode. Reads its flags, decides which runs are due, and runs one Beam graph for each.

The graph is Create, ParDo and GroupByKey with one leaf, elements are (int, bytes): it runs the same on every engine.
"""

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.utils.shared import Shared

from model import event_log
from model.errors import ConfigError, DataError, StoreUnavailable, TowerError
from model.refresh import GainTable, RefreshBudget, study_name
from model.release import Manifest, Registry
from model.state_codec import StateCodec
from pipelines.io import Folder
from pipelines.options import DEFAULT_SHARDS, EncodeSettings, parse_settings
from pipelines.runs import SECOND_US, RefreshPolicy, RunManifest, RunPlan, RunStore, iso, run_id_of
from pipelines.transforms.commit import Commit
from pipelines.transforms.encode_shard import EncodeShard
from pipelines.transforms.publish_run import Publish, publish_runs
from pipelines.transforms.read_shard import ReadShard, sources

log = logging.getLogger(__name__)

CLOCK_TOLERANCE_US = 300 * SECOND_US
"""How far ahead of our clock an as-of time may be; later rows Redis would refuse."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the job failed, 2 the command line is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        settings = parse_settings(argv, os.environ)
    except ConfigError as error:
        print(f"tower-encode: {error}", file=sys.stderr)
        return 2
    try:
        run_job(settings)
    except TowerError as error:
        print(f"tower-encode: {error}", file=sys.stderr)
        return 1
    return 0


def run_job(settings: EncodeSettings) -> list[RunManifest]:
    """Encode and publish every run that is due; prints one line each. Raises TowerError, or whatever the engine does.

    What was committed stays committed: the same call again does only what is left.
    """
    registry = Registry(settings.registry)
    releases = releases_to_encode(registry, settings.release)
    description = releases[0].description
    as_of_us = settings.as_of_us
    if as_of_us is None:
        as_of_us = -(-event_log.log_end_us(settings.events, description) // SECOND_US) * SECOND_US
    if as_of_us > time.time_ns() // 1000 + CLOCK_TOLERANCE_US:
        raise ConfigError(f"the as-of time {iso(as_of_us)} lies in the future; give the true one with --as-of")
    if settings.redis_url is not None:
        _check_redis_clock(settings.redis_url, as_of_us)
    inputs = describe_inputs(settings.events)
    token = registry.next_token() if settings.redis_url else 0
    done = []
    failed: list[Exception] = []
    for release in releases:
        try:
            done.append(_run_release(settings, release, as_of_us, inputs, token))
        except Exception as error:  # a release that fails must not keep the others' states from being current
            failed.append(error)
            if len(releases) > 1:
                print(f"tower-encode: release {release.release_id} failed: {error}", file=sys.stderr)
    if failed:
        raise failed[0]
    return done


def _run_release(
    settings: EncodeSettings, release: Manifest, as_of_us: int, inputs: dict[str, Any], token: int
) -> RunManifest:
    """One release's run, encoded and published as far as that is still to be done."""
    event_log.check_log(settings.events, release.description)
    plan = plan_run(settings, release, as_of_us, inputs, token)
    if settings.republish:
        plan.store.forget_published()
    started = time.monotonic()
    try:
        if plan.run_id not in plan.store.run_ids():
            run_graph(plan, event_log.row_groups(settings.events), settings.beam_args)
        elif plan.redis_url is not None:
            publish_runs(plan)
    except Exception:
        there = plan.run_id in plan.store.run_ids()
        print(
            f"tower-encode: run {plan.run_id} of state version {release.state_version} "
            + ("is committed but not fully published" if there else "is not committed, nothing of it is visible")
            + "; the same command does what is left",
            file=sys.stderr,
        )
        raise
    manifest = plan.store.manifest(plan.run_id)
    print(_summary(manifest, plan, time.monotonic() - started), flush=True)
    return manifest


def _check_redis_clock(redis_url: str, as_of_us: int) -> None:
    """Before anything is encoded: our own clock may be the one that is wrong. A Redis that is away costs no run."""
    from pipelines.transforms.publish import check_clock, connect

    try:
        with connect(redis_url) as client:
            check_clock(client, as_of_us)
    except StoreUnavailable as error:
        log.warning("%s; encoding goes on, publishing will be tried", error)


def releases_to_encode(registry: Registry, wanted: str) -> list[Manifest]:
    """One release for each state version asked for, the serving one first. wanted: an id, `serving` or `all`.

    Raises ConfigError when there is none, CheckpointError for an unknown id.
    """
    if wanted not in ("serving", "all"):
        return [registry.manifest(wanted)]
    pointer = registry.pointer()
    if wanted == "serving":
        if pointer.serving is None:
            raise ConfigError(f"no release serves in {registry.uri} yet; name one with --release")
        return [registry.manifest(pointer.serving)]
    names = pointer.resident() or registry.releases()[-1:]
    if not names:
        raise ConfigError(f"{registry.uri} holds no release; tower-train makes one")
    by_version: dict[str, Manifest] = {}
    for manifest in map(registry.manifest, names):
        by_version.setdefault(manifest.state_version, manifest)
    return list(by_version.values())


def describe_inputs(events: str) -> dict[str, Any]:
    """The log's files by content: {"fingerprint": hex, "files": [{"name", "sha256"}]}.

    Names are relative to the log, so that a copy of it elsewhere is the same input.
    """
    files = []
    for path in event_log.list_files(events):
        folder, _, name = path.rpartition("/")
        files.append(
            {
                "name": name if path == events else path[len(events.rstrip("/")) + 1 :],
                "sha256": Folder(folder or ".").sha256(name),
            }
        )
    digest = hashlib.sha256("\n".join(f"{file['name']} {file['sha256']}" for file in files).encode())
    return {"fingerprint": digest.hexdigest(), "files": files}


def plan_run(settings: EncodeSettings, release: Manifest, as_of_us: int, inputs: dict[str, Any], token: int) -> RunPlan:
    """What one run of one release will do. Raises ConfigError or DataError where it may not run."""
    store = RunStore(settings.states, release.state_version)
    run_id = run_id_of(as_of_us)
    committed = store.run_ids()
    previous = store.manifest(committed[-1]) if committed else None
    if run_id in committed:
        if store.manifest(run_id).inputs["fingerprint"] != inputs["fingerprint"]:
            raise DataError(
                f"run {run_id} of state version {release.state_version} was committed from other events than "
                f"{settings.events}, and a committed run is not replaced; give a later --as-of to add these"
            )
        if settings.full:
            raise ConfigError(f"run {run_id} is committed and is not replaced; --full needs a later --as-of")
    elif previous is not None and run_id < previous.run_id:
        raise ConfigError(
            f"the as-of time {iso(as_of_us)} is before the last run, {previous.run_id}, of state version "
            f"{release.state_version}; late events count in the next run, with a later --as-of"
        )
    carried = None if settings.full else previous
    if carried is not None and settings.shards not in (None, carried.shards):
        raise ConfigError(
            f"--shards {settings.shards}, but the last run, {carried.run_id}, has {carried.shards} shards; leave the "
            "flag out, or rebuild from the whole log with --full"
        )
    return RunPlan(
        store=store,
        run_id=run_id,
        as_of_us=as_of_us,
        shards=settings.shards or (previous.shards if previous else DEFAULT_SHARDS),
        previous_run=carried.run_id if carried else None,
        inputs=inputs,
        registry_uri=settings.registry,
        release_id=release.release_id,
        device=settings.device,
        batch_tokens=settings.batch_tokens,
        source_paths=event_log.list_files(settings.events),
        description=release.description,
        history_limit=release.config.history_limit,
        codec=StateCodec.of(release.config),
        redis_url=settings.redis_url,
        rows_per_s=settings.rows_per_s,
        token=token,
        fault=settings.fault,
        refresh=None if settings.refresh_budget is None else _refresh(settings, release, settings.refresh_budget),
    )


def _refresh(settings: EncodeSettings, release: Manifest, budget: RefreshBudget) -> RefreshPolicy:
    """The gain table of the release's own study, or the assumed one."""
    study = Registry(settings.registry).read_study(study_name(release.release_id))
    return RefreshPolicy(budget, GainTable.assumed() if study is None else GainTable.from_dict(study["table"]))


def build_graph(pipeline: beam.Pipeline, plan: RunPlan, groups: list[event_log.RowGroup]) -> Any:
    """The whole job. Gives the one leaf, (0, run id)."""
    pair = tuple[int, bytes]
    return (
        pipeline
        | "Sources" >> beam.Create(sources(groups))
        | "ReadShard" >> beam.ParDo(ReadShard(plan)).with_output_types(pair)
        | "ByShard" >> beam.GroupByKey()
        | "EncodeShard" >> beam.ParDo(EncodeShard(plan, Shared())).with_output_types(pair)
        | "ByRun" >> beam.GroupByKey()
        | "Commit" >> beam.ParDo(Commit(plan)).with_output_types(pair)
        | "Publish" >> beam.ParDo(Publish(plan)).with_output_types(pair)
    )


def run_graph(plan: RunPlan, groups: list[event_log.RowGroup], beam_args: Sequence[str]) -> None:
    """Run the job on the engine the flags name. Raises DataError when the engine ends without a committed run."""
    options = PipelineOptions(list(beam_args))
    runner = options.view_as(StandardOptions).runner
    if runner in (None, "DirectRunner", "FnApiRunner"):  # Beam's DirectRunner may download another one
        runner = FnApiRunner()
    pipeline = beam.Pipeline(runner=runner, options=options)
    build_graph(pipeline, plan, groups)
    with _progress(plan):
        pipeline.run().wait_until_finish()
    if plan.run_id not in plan.store.run_ids():
        raise DataError(f"the engine finished, but run {plan.run_id} was not committed")


@contextmanager
def _progress(plan: RunPlan) -> Iterator[None]:
    """A bar over the shards in staging, on a terminal. Looks at files, so it shows any engine's progress."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    done = threading.Event()
    written = plan.staging / "dead_letters"

    def watch() -> None:
        with tqdm(total=plan.shards, unit="shard", desc=f"encode {plan.run_id}") as bar:
            while not done.wait(0.5):
                bar.update(len(written.names()) - bar.n)
            bar.update(plan.shards - bar.n if plan.run_id in plan.store.run_ids() else 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _summary(manifest: RunManifest, plan: RunPlan, seconds: float) -> str:
    counts = manifest.counts
    users = f"{counts['users']:,}: {counts['encoded']:,} encoded, {counts['skipped']:,} unchanged"
    if "deferred" in counts:
        users += f", {counts['deferred']:,} deferred"
    rows = [
        ("run", f"{manifest.run_id} of state version {manifest.state_version} (release {manifest.release_id})"),
        ("events", f"{counts['events']:,} read"),
        ("users", users),
    ]
    if plan.refresh is not None:
        rows.append(
            ("budget", f"{plan.refresh.budget} of the changed users with a row; gain: {plan.refresh.table.source}")
        )
    if manifest.encoded_through_us < manifest.as_of_us:
        rows.append(("current", f"all users through {iso(manifest.encoded_through_us)}"))
    dead = [f"{count:,} {name.removeprefix('dead.')}" for name, count in counts.items() if name.startswith("dead.")]
    rows.append(("set aside", ", ".join(dead) or "none"))
    if plan.redis_url is None:
        rows.append(("Redis", "not asked for"))
    else:
        sent = plan.store.publish_counts(manifest.run_id)
        rows.append(("Redis", ", ".join(f"{count:,} {name}" for name, count in sent.items())))
    rows.append(("time", f"{seconds:.1f} s"))
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


if __name__ == "__main__":
    sys.exit(main())
