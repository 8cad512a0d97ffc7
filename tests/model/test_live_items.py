"""Live item features: counts by hand, the draws' expectations, and one score however it is computed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import TowerConfig
from model.errors import ConfigError
from model.live_items import LiveCounts, LiveItems, LiveRequests, catalogue_logits, live_logits, time_chunks
from tests.releases import make_tower

HOUR_US = 3_600_000_000
MINUTE_US = 60_000_000
START_US = 19_000 * 24 * HOUR_US
ROWS = 6
CONFIG = TowerConfig(d_model=8, num_heads=2, live_windows_h=(1.0, 3.0), live_dim=4, live_bucket_s=600, live_recent=2)


def counts_of(*events, config=CONFIG):
    """Events as (user, item, minutes since the start)."""
    user, item, minute = (np.array(column, np.int64) for column in zip(*events, strict=True))
    return LiveCounts.build(user, item, START_US + minute * MINUTE_US, ROWS, config)


def at(counts, minutes):
    return counts.bucket(torch.tensor([START_US + m * MINUTE_US for m in minutes]))


COUNTS = counts_of((0, 1, 0), (0, 2, 5), (1, 1, 100), (1, 2, 109), (1, 3, 110), (2, 1, 300))


def test_features_hold_what_happened_before_the_last_whole_bucket():
    # item 1 at minute 119, that is bucket 110 to 119: events of minutes 0 and 100 came before minute 110.
    # Within an hour: 100 only; all items then: 100 and 109 (item 3's 110 is in the bucket itself).
    row = COUNTS.item_features(torch.tensor([1]), at(COUNTS, [119]))[0]
    one_hour = [math.log(2), math.log(2) - math.log(3)]
    three_hours = [math.log(3), math.log(3) - math.log(5)]
    past = three_hours
    # the first event is in bucket 0, the request in bucket 11
    assert row.tolist() == pytest.approx([*one_hour, *three_hours, *past, 1.0, math.log(12)])


def test_an_item_without_events_before_the_bucket_has_no_age():
    rows = COUNTS.item_features(torch.tensor([3, 5]), at(COUNTS, [119, 119]))
    assert rows[:, ::2][:, :3].tolist() == [[0.0] * 3] * 2
    assert rows[:, -2:].tolist() == [[0.0, 0.0]] * 2


def test_a_window_ends_where_it_says():
    # the hour before bucket 6 (minutes 0 to 59) holds minute 0; before bucket 7 (minutes 10 to 69) it does not
    rows = COUNTS.item_features(torch.tensor([1, 1]), at(COUNTS, [60, 70]))
    assert rows[:, 0].tolist() == pytest.approx([math.log(2), 0.0])


def test_nothing_after_a_request_changes_its_features():
    later = counts_of((0, 1, 0), (0, 2, 5), (1, 1, 100), (1, 2, 109), (1, 1, 110), (3, 4, 111), (3, 1, 115))
    items = torch.arange(ROWS)
    bucket = at(COUNTS, [119]).expand(ROWS)
    assert torch.equal(COUNTS.item_features(items, bucket), later.item_features(items, at(later, [119]).expand(ROWS)))


def test_pairs_are_counted_by_user_and_order():
    source, item = torch.tensor([1, 2, 1, 1]), torch.tensor([2, 1, 3, 2])
    found = COUNTS.pair_features(source, item, at(COUNTS, [119, 119, 119, 104]))
    # 1 to 2 at minutes 5 and 109; within three hours both; 2 to 1 never; 1 to 3 never; before minute 100 once
    both = [math.log(3), math.log(3) - math.log(3)] * 2
    once = [math.log(2), 0.0] * 2
    assert found.tolist() == [pytest.approx(both), [0.0] * 4, [0.0] * 4, pytest.approx(once)]


def test_an_event_a_day_later_follows_nothing():
    day = 24 * 60
    assert counts_of((0, 1, 0), (0, 2, day)).follower_S.tolist() == [2]
    assert counts_of((0, 1, 0), (0, 2, day + 1)).follower_S.tolist() == []


def test_followers_are_packed_by_request():
    position, item = COUNTS.followers(torch.tensor([2, -1, 1, 5]))
    assert list(zip(position.tolist(), item.tolist(), strict=True)) == [(0, 3), (2, 2)]


def test_draws_stand_for_the_sum_over_all_items():
    """Each draw over how often its item was expected adds up to the sum over items, on average."""
    torch.manual_seed(0)
    drawn = torch.tensor([0, 1, 2, 3, 4])
    worth = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])  # item 5 is never drawn
    for minute in (119, 5):  # two events in the hour before; none
        items, log_count = COUNTS.draw(at(COUNTS, [minute]).expand(40_000), drawn, 4, 1.0)
        sums = (worth[items] / log_count.exp()).sum(1)
        error = float(sums.std()) / 200
        assert abs(float(sums.mean()) - 31.0) < 5 * error
    recent = COUNTS.draw(at(COUNTS, [119]).expand(1000), drawn, 4, 1.0)[0][:, :2]
    assert set(recent.unique().tolist()) == {1, 2}


def test_the_expected_count_of_a_draw_by_hand():
    items, log_count = COUNTS.draw(at(COUNTS, [119]).expand(50), torch.tensor([0, 1, 2, 3, 4]), 4, 1.0)
    # two of four draws from minutes 60 to 109, where items 1 and 2 have one event each; two among five items
    wanted = {0: 0.4, 1: 1.4, 2: 1.4, 3: 0.4, 4: 0.4}
    assert log_count.exp().flatten().tolist() == pytest.approx([wanted[item] for item in items.flatten().tolist()])


def test_it_begins_as_a_count_and_a_blend():
    live = LiveItems(CONFIG).requires_grad_(False)
    item, bucket = torch.tensor([1, 2, 3]), at(COUNTS, [119]).expand(3)
    feature, is_known = COUNTS.item_features(item, bucket), torch.tensor([True, False, True])
    # within the hour before minute 110: item 1 once, item 2 once, item 3 never
    wanted = [[math.log(2), 0, 0, 0], [math.log(2), 0, 0, 0], [0, 0, 0, 0]]
    assert live(feature, is_known).tolist() == [pytest.approx(row) for row in wanted]
    pair = COUNTS.pair_features(torch.tensor([1]), item, bucket)
    gain = live.follows(pair, feature, is_known, torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    # 2 followed 1 twice of twice, in either span: (1 + 2) / (1 + 2); of all clicks in the hour it has (1 + 1) / (1 + 2)
    assert gain.tolist() == pytest.approx([0, math.log(1 + 1 / (2 / 3)), 0])


def test_what_a_request_had_is_taken_down_whether_it_has_followers_or_not():
    live = LiveItems(CONFIG).requires_grad_(False)
    live.had.fill_(1.5)
    # three latest, of which live_recent = 2 are followed; 5 is no item of the catalogue
    requests = LiveRequests(at(COUNTS, [5]), torch.tensor([[4, 5, 0]]), torch.zeros(1, 3))
    psi, is_known = torch.zeros(1, 4), torch.ones(5, dtype=torch.bool)
    items = torch.arange(5)[None]
    assert catalogue_logits(live, COUNTS, requests, psi, is_known).tolist() == [[-1.5, 0, 0, 0, -1.5]]
    assert live_logits(live, COUNTS, requests, psi, items, is_known[None]).tolist() == [[-1.5, 0, 0, 0, -1.5]]


def test_some_items_and_the_whole_catalogue_score_alike():
    torch.manual_seed(1)
    live = LiveItems(CONFIG).requires_grad_(False)
    is_known = torch.tensor([True, False, True, True, False])
    bucket = at(COUNTS, [119]).expand(3)
    requests = LiveRequests(bucket, torch.tensor([[1, 2], [3, -1], [-1, -1]]), torch.rand(3, 2) * 5)
    psi = torch.randn(3, 4)
    items = torch.arange(5)
    whole = catalogue_logits(live, COUNTS, requests, psi, is_known)
    some = live_logits(live, COUNTS, requests, psi, items.expand(3, 5), is_known.expand(3, 5))
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)
    alone = catalogue_logits(live, COUNTS, requests.without_recent(), psi, is_known)
    had = torch.zeros(3, 5)
    had[[0, 0, 1], [1, 2, 3]] = live.had
    gain = whole - alone + had
    # 1 was followed by 2 and 2 by 3, but the latter in the request's own bucket
    assert gain[0, 2] > 0.01
    assert int((gain.abs() > 1e-6).sum()) == 1


def test_requests_of_many_buckets_score_as_those_of_one():
    torch.manual_seed(2)
    live = LiveItems(CONFIG).requires_grad_(False)
    bucket = at(COUNTS, [119, 5, 119, 300])
    requests = LiveRequests(bucket, torch.tensor([[1, 2], [1, -1], [2, 1], [1, 1]]), torch.rand(4, 2))
    psi, is_known = torch.randn(4, 4), torch.tensor([True, False, True, True, False])
    together = catalogue_logits(live, COUNTS, requests, psi, is_known)
    for b in range(4):
        alone = catalogue_logits(live, COUNTS, requests.rows(slice(b, b + 1)), psi[b : b + 1], is_known)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_chunks_keep_to_both_bounds():
    buckets = np.array([4, 2, 4, 2, 4, 9])
    assert [part.tolist() for part in time_chunks(buckets, 2, 9)] == [[1, 3], [0, 2], [4, 5]]
    assert [part.tolist() for part in time_chunks(buckets, 9, 2)] == [[1, 3, 0, 2, 4], [5]]
    assert list(time_chunks(buckets[:0], 9, 2)) == []


@pytest.mark.parametrize("windows", [(3.0, 1.0), (1.0, 1.0), (0.1,)])
def test_windows_rise_and_hold_a_bucket(windows):
    with pytest.raises(ConfigError, match="live_windows_h must rise"):
        replace(CONFIG, live_windows_h=windows)


def test_the_config_keeps_its_windows():
    assert TowerConfig.from_dict(CONFIG.to_dict() | {"live_windows_h": [1.0, 3.0]}) == CONFIG
    assert CONFIG.live_width == 4
    assert replace(CONFIG, live_windows_h=()).live_width == 0


def test_an_item_read_as_unknown_keeps_its_features_and_loses_its_id():
    tower, _ = make_tower()
    items, embedder = tower.items, tower.items.embedder
    rows, count = embedder.num_rows, embedder.shape.num_items
    with torch.no_grad():
        unknown = embedder(torch.arange(count) + rows)
        same_id = embedder.id_embedding.weight[embedder.hash_row_I[:count]] - embedder.id_embedding.weight[:count]
        torch.testing.assert_close(unknown, embedder(torch.arange(count)) + same_id)
        table = items.table(with_unknown=True)
        torch.testing.assert_close(table[:rows], items.table())
        torch.testing.assert_close(table[rows:], items(torch.arange(rows) + rows))
        torch.testing.assert_close(table[rows + count :], table[count:rows])  # hash rows have nothing to lose
    assert items.is_known(torch.tensor([0, count - 1, count, rows, rows + 1])).tolist() == [True, True] + [False] * 3
    embedder.use_hash_rows(torch.arange(count) > 0)
    assert items.is_known(torch.tensor([0, 1])).tolist() == [False, True]
