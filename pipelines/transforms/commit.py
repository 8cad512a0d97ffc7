"""All shards of a run become visible at once."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator

import apache_beam as beam

from model.errors import DataError
from model.release import library_versions
from pipelines import faults
from pipelines.runs import MANIFEST, RunManifest, RunPlan


def commit_run(shard_reports: Iterable[bytes], plan: RunPlan) -> RunManifest:
    """Write the manifest as staging's last file and move staging to its place in runs/.

    shard_reports: what EncodeShard gives; a shard may report twice, after a retry. A run that another attempt
    committed meanwhile from the same inputs is taken as it is.
    Raises DataError when a shard is missing or the run was committed from other inputs.
    """
    reports = {}
    for data in shard_reports:
        report = json.loads(data)
        reports[report["shard"]] = report
    missing = sorted(set(range(plan.shards)) - set(reports))
    if missing:
        raise DataError(f"run {plan.run_id} is not committed: shards {missing} of {plan.shards} did not report")
    counts: Counter[str] = Counter(dict.fromkeys(("events", "users", "encoded", "skipped"), 0))
    files: dict[str, str] = {}
    for shard in sorted(reports):
        counts.update(reports[shard]["counts"])
        files |= reports[shard]["files"]
    manifest = RunManifest(
        run_id=plan.run_id,
        state_version=plan.store.state_version,
        release_id=plan.release_id,
        as_of_us=plan.as_of_us,
        encoded_through_us=min(report["encoded_through_us"] for report in reports.values()),
        shards=plan.shards,
        previous_run=plan.previous_run,
        inputs=plan.inputs,
        counts=dict(counts),
        files=files,
        libraries=library_versions(),
    )
    plan.fault.reach(faults.BEFORE_MANIFEST)
    if not _committed_already(plan):
        plan.staging.write(MANIFEST, manifest.to_bytes())
        plan.fault.reach(faults.AFTER_MANIFEST)
        plan.staging.move_to(plan.store.run(plan.run_id), last=MANIFEST)
    plan.store.sweep_staging(plan.run_id)
    plan.fault.reach(faults.AFTER_RENAME)
    return manifest


def _committed_already(plan: RunPlan) -> bool:
    if plan.run_id not in plan.store.run_ids():
        return False
    found = plan.store.manifest(plan.run_id).inputs["fingerprint"]
    if found != plan.inputs["fingerprint"]:
        raise DataError(f"run {plan.run_id} was committed meanwhile, from other inputs")
    return True


class Commit(beam.DoFn):
    """Element: (0, reports of all shards). Gives (0, run id)."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        manifest = commit_run(element[1], self._plan)
        yield 0, manifest.run_id.encode()
