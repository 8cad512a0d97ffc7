"""Expected gain of renewing a state, by hand."""

import numpy as np
import pytest

from model.errors import ConfigError
from model.refresh import KNOWN_FROM, NEW_FROM, PRIOR_REQUESTS, GainTable, RefreshBudget, best, daily_rates

DAY_US = 86_400_000_000


def test_a_steady_user_has_the_rate_of_their_events():
    """Four events a day for two months: the decayed count is close to 4; half of it two days after the last."""
    time_us = np.arange(240) * DAY_US // 4
    offsets = np.array([0, 240])
    now_us = int(time_us[-1])
    assert daily_rates(time_us, offsets, now_us)[0] == pytest.approx(4, rel=0.1)
    half = daily_rates(time_us, offsets, now_us + 2 * DAY_US)[0]
    assert half == pytest.approx(daily_rates(time_us, offsets, now_us)[0] / 2)


def test_rates_by_hand():
    """One event now, one two days ago and none: ln 2 / 2 times 1, 1 + 1/2, 0."""
    time_us = np.array([10, 8, 10]) * DAY_US
    found = daily_rates(time_us, np.array([0, 1, 3, 3]), 10 * DAY_US)
    np.testing.assert_allclose(found, np.log(2) / 2 * np.array([1, 1.5, 0]))


def test_the_table_shrinks_towards_the_mean():
    """1,000 requests with gain 0.4 in one cell, 1,000 with 0 in another: the mean is 0.2, empty cells have it."""
    new = np.repeat([1, 9], 1000)
    known = np.repeat([2, 70], 1000)
    table = GainTable.estimate(new, known, np.repeat([0.4, 0.0], 1000), "test")
    assert PRIOR_REQUESTS == 1000
    assert table.gains(np.array([1, 8, 15, 2]), np.array([1, 64, 99, 1])) == pytest.approx([0.3, 0.1, 0.1, 0.2])
    assert GainTable.estimate(new, known, np.full(2000, -1.0), "test").gain_NK.max() == 0
    again = GainTable.from_dict(table.to_dict())
    np.testing.assert_allclose(again.gain_NK, table.gain_NK, atol=1e-6)
    with pytest.raises(ConfigError, match="buckets"):
        GainTable.from_dict(table.to_dict() | {"new_from": [1, 2]})
    none = np.empty(0, np.int64)
    assert GainTable.estimate(none, none, np.empty(0), "test").gain_NK.tolist() == [[0] * len(KNOWN_FROM)] * len(
        NEW_FROM
    )


def test_the_assumed_gain_is_the_new_share():
    table = GainTable.assumed()
    assert table.gains(np.array([1, 4, 100]), np.array([1, 5, 1])) == pytest.approx([1 / 2, 4 / 8, 16 / 17])


def test_the_best_by_score_then_new_events_then_number():
    score, new = np.array([0.1, 0.5, 0.5, 0.5, 0.0]), np.array([9, 1, 2, 1, 9])
    assert best(score, new, 1).tolist() == [2]
    assert best(score, new, 2).tolist() == [1, 2]
    assert best(score, new, 4).tolist() == [0, 1, 2, 3]
    assert best(score, new, 99).tolist() == [0, 1, 2, 3, 4]
    assert best(score, new, 0).tolist() == []


def test_budgets():
    assert RefreshBudget.parse("25%").of(10) == 3  # a whole user
    assert RefreshBudget.parse("100%").of(7) == 7
    assert RefreshBudget.parse("10%").of(30) == 3
    assert RefreshBudget.parse("0").of(7) == 0
    assert [RefreshBudget.parse("8").of(9, shard, 3) for shard in range(3)] == [3, 3, 2]
    assert RefreshBudget.parse("8").of(1, 0, 3) == 3  # deferred users may take the places
    assert [str(RefreshBudget.parse(text)) for text in ("2.5%", "40")] == ["2.5%", "40"]
    for text in ("101%", "-1", "x", "2.5", "%"):
        with pytest.raises(ConfigError, match="a share like 25%"):
            RefreshBudget.parse(text)
