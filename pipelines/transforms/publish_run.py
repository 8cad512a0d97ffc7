"""Committed runs go to Redis, oldest first, each from its Parquet files; a run's canaries go last."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines import faults
from pipelines.io import read_parquet
from pipelines.runs import CANARIES, RunPlan, RunStore, file_name


def runs_to_publish(store: RunStore, run_id: str) -> list[str]:
    """The run itself and every earlier one whose rows were never sent: users idle since then have no newer row."""
    sent = store.published()
    return [name for name in store.run_ids() if name <= run_id and (name == run_id or name not in sent)]


def publish_runs(plan: RunPlan) -> None:
    """Send the plan's run, and what earlier runs still owe, to Redis. Sending again changes nothing there.

    Raises StoreUnavailable when Redis does not answer; what was sent stays, and a re-run sends the rest.
    """
    # needs Redis's client, which a job that publishes nothing may lack
    from pipelines.transforms.publish import Pace, connect

    assert plan.redis_url is not None
    pace = None if plan.rows_per_s is None else Pace(plan.rows_per_s)
    with connect(plan.redis_url) as client:
        for run_id in runs_to_publish(plan.store, plan.run_id):
            counts = _publish_run(client, plan, run_id, pace)
            plan.fault.reach(faults.AFTER_PUBLISH)
            plan.store.mark_published(run_id, counts)


def _publish_run(client: Any, plan: RunPlan, run_id: str, pace: Any) -> dict[str, int]:
    from pipelines.transforms.publish import publish_table

    store, codec = plan.store, plan.codec
    counts: Counter[str] = Counter(written=0, stale=0, rejected=0)
    manifest = store.manifest(run_id)
    done, before = store.publish_progress(run_id)
    counts.update(before)
    for shard in _progress(range(done, manifest.shards), run_id, manifest.shards):
        states = read_parquet(store.run(run_id), file_name("states", shard))
        counts.update(asdict(publish_table(client, states, store.state_version, plan.token, codec=codec, pace=pace)))
        store.note_progress(run_id, shard + 1, counts)
        if len(states):
            plan.fault.reach(faults.MID_PUBLISH)
    if CANARIES in manifest.files:  # last: who sees a run's canaries knows that all its rows were sent
        publish_table(client, read_parquet(store.run(run_id), CANARIES), store.state_version, plan.token, codec=codec)
    for name, count in counts.items():
        Metrics.counter("tower_encode", f"published.{name}").inc(count)
    return dict(counts)


def _progress(shards: range, run_id: str, total: int) -> Any:
    """A bar with the time left, on a terminal."""
    if not sys.stderr.isatty():
        return shards
    from tqdm import tqdm

    return tqdm(shards, desc=f"publish {run_id}", unit="shard", initial=shards.start, total=total)


class Publish(beam.DoFn):
    """Element: (0, run id). Gives it back once its rows are in Redis; without a Redis URL, at once."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
        if self._plan.redis_url is not None:
            publish_runs(self._plan)
        yield element
