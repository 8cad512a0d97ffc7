"""The places where tests kill the job, named once.

The job's main reads HT_CRASH_AT and hands the fault on; nothing else reads the environment. In production it is None.
"""

import os
import signal
from dataclasses import dataclass

CRASH_VARIABLE = "HT_CRASH_AT"

AFTER_READ = "after-read"
"""All events are grouped by shard, nothing is written."""
AFTER_STAGE_SHARD = "after-stage-shard-{}"
"""One shard's files are in staging, the next shard's are not."""
BEFORE_MANIFEST = "before-manifest"
AFTER_MANIFEST = "after-manifest"
"""The run is complete in staging and not yet visible."""
AFTER_RENAME = "after-rename"
"""The run is visible, nothing is published."""
MID_PUBLISH = "mid-publish"
"""Some shards are in Redis, others are not."""
AFTER_PUBLISH = "after-publish"
"""All rows are in Redis; the note that says so is not yet written."""

BEFORE_COLLECT_NOTE = "before-collect-note-{}"
"""One step's rows are collected, which is not yet noted."""
AFTER_COLLECT_STEP = "after-collect-step-{}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Kills this process, as a power cut would, when it reaches one point."""

    at: str | None = None

    def reach(self, point: str) -> None:
        """Die here if this is the point; else nothing."""
        if self.at == point:
            os.kill(os.getpid(), signal.SIGKILL)


def crash_points(shards: int) -> list[str]:
    """Every point of an encode job of so many shards, in the order in which it reaches them."""
    stages = [AFTER_STAGE_SHARD.format(shard) for shard in range(shards)]
    return [AFTER_READ, *stages, BEFORE_MANIFEST, AFTER_MANIFEST, AFTER_RENAME, MID_PUBLISH, AFTER_PUBLISH]
