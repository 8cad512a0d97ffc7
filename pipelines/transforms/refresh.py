"""Whose history is encoded in a run, and who is deferred to a later one. Arrow in, Arrow out; no files, no Beam.

Legend: U users of a shard, C candidates.

Candidates are the users with events that their stored state has not seen. Without a budget all are encoded. With one,
users without a row yet are encoded whatever the budget is, and of the others the best by expected gain (model.refresh).
The rest are deferred: their events stay in the tail, their row stays as it is, and they are candidates of the next run.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.refresh import best, daily_rates
from pipelines.runs import RunPlan, deferred_schema, parse_as_of_us
from pipelines.transforms.merge_tail import Histories, Index, whole


@dataclass(frozen=True, slots=True)
class Chosen:
    """What becomes of a shard's users with unseen events."""

    encoded: Index
    """Ranks in the histories, ascending."""
    deferred: pa.Table
    """deferred_schema, by user."""


def choose(histories: Histories, known: pa.Array, before: pa.Table, plan: RunPlan, shard: int) -> Chosen:
    """Divide the users with unseen events into those encoded now and those deferred.

    known: ids of the last run's users, who have a row, [-]. before: whom the last run deferred, deferred_schema.
    """
    row_U = pc.index_in(histories.users, value_set=whole(before["user_id"])).fill_null(-1).to_numpy()
    was_U = row_U >= 0
    unseen_U = histories.new_U.copy()
    unseen_U[was_U] += before["new_events"].to_numpy()[row_U[was_U]]
    unseen_U = np.minimum(unseen_U, np.diff(histories.offsets))
    candidates = np.flatnonzero(unseen_U)
    empty = deferred_schema(histories.users.type).empty_table()
    if plan.refresh is None or plan.previous_run is None:
        return Chosen(candidates, empty)
    has_row_U = pc.is_in(histories.users, value_set=known).to_numpy(zero_copy_only=False)
    old = candidates[has_row_U[candidates]]
    changed = int(np.count_nonzero(has_row_U & (histories.new_U > 0)))
    budget = plan.refresh.budget.of(changed, shard, plan.shards)
    taken = best(_expected_gains(histories, old, unseen_U, plan), unseen_U[old], budget)
    left = np.delete(old, taken)
    through_U = np.full(len(unseen_U), parse_as_of_us(plan.previous_run))
    through_U[was_U] = before["current_through"].to_numpy()[row_U[was_U]]
    deferred = [histories.users.take(pa.array(left)), pa.array(through_U[left]), pa.array(unseen_U[left])]
    return Chosen(np.setdiff1d(candidates, left), pa.table(deferred, schema=empty.schema))


def _expected_gains(histories: Histories, users: Index, unseen_U: Index, plan: RunPlan) -> NDArray[np.float64]:
    assert plan.refresh is not None
    lengths = np.diff(histories.offsets)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    time_us = histories.events["timestamp_us"].to_numpy()[histories.rows_of(users)]
    new = unseen_U[users]
    gains = plan.refresh.table.gains(new, np.maximum(lengths - new, 1))
    expected: NDArray[np.float64] = daily_rates(time_us, offsets, plan.as_of_us) * gains
    return expected
