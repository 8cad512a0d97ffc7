"""Test sets and popularity by hand; the report and the command on a tiny release."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.config import TowerConfig
from model.errors import ConfigError, DataError
from model.features import build_vocabularies
from model.hybrid_tower import HybridTower
from model.live_items import live_logits
from model.records import Context
from model.release import Registry
from model.state_codec import as_stored
from model.training import evaluate
from model.training.data import EventArrays
from model.training.evaluate import (
    Candidates,
    LiveCatalogue,
    embed_requests,
    encode_requests,
    evaluate_quality,
    make_test_set,
    popularity_ranks,
    rank_live,
    recent_popularity_ranks,
    repeat_share,
)
from model.training.skew import skew_study
from tests.builders import make_description, make_event, make_event_table

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
SMALL = TowerConfig(
    d_model=8, num_layers=1, num_heads=2, history_limit=4, embedding_dim=8, head_hidden=16, hash_rows=8, context_dim=8,
    session_limit=3, subject_limit=2,
)  # fmt: skip
BY_TIME = {"split": "time", "test_from": "2022-01-09T00:00:00Z", "test_until": "2022-01-10T00:00:00Z"}


def make_case(tmp_path, evaluation=BY_TIME, config=SMALL, **changes):
    """Hours count from 2022-01-08T00:00Z; the test by time is hours 24 to 48."""
    description = make_description(
        user_columns=[], item_columns={}, event_columns=[], evaluation=evaluation, **changes
    )  # fmt: skip
    rows = {
        1: [(1, 1), (2, 2), (1, 3), (3, 25), (4, 30)],
        2: [(1, 4), (2, 5), (5, 26)],
        3: [(3, 27), (5, 28)],
        4: [(2, 6), (1, 50)],
    }
    histories = {
        user: [make_event(item, "click", DAY_US * 19_000 + hour * HOUR_US, device="web") for item, hour in events]
        for user, events in rows.items()
    }
    table = make_event_table(histories, description)
    items = pa.table({"item_id": pa.array(range(1, 8), pa.int64())})
    torch.manual_seed(0)
    tower = HybridTower.build(config, description, build_vocabularies(description, table, None), items)
    with torch.no_grad():
        tower.head.cold_state_D.normal_()
    registry = Registry(tmp_path / "registry")
    manifest = registry.write(tower, items, trained_until_us=0)
    release = registry.load(manifest.release_id)
    return release, table, items, EventArrays.build(table, None, release.featuriser, description)


def test_a_time_split_asks_the_window_from_the_last_refresh(tmp_path):
    release, table, _, arrays = make_case(tmp_path)
    test = make_test_set(table, arrays, release.manifest.description, limit=None, seed=0)
    # users 1, 2, 3 in the window; hour 50 is past it
    assert test.target_B.tolist() == [3, 4, 7, 8, 9]
    assert test.cut_B.tolist() == [2, 2, 6, 7, 7]  # 7 is below user 3's first event: a cold start
    assert test.history_B.tolist() == [True, True, True, False, False]
    assert test.seen_item_B.tolist() == [False] * 5  # items 3, 4, 5 first occur in the test
    assert test.trained_T.sum() == 6
    sampled = make_test_set(table, arrays, release.manifest.description, limit=2, seed=3)
    assert (len(sampled.target_B), sampled.total) == (2, 5)


def test_leave_one_out_asks_the_last_event_from_all_before_it(tmp_path):
    release, table, _, arrays = make_case(tmp_path, {"split": "leave_one_out"})
    test = make_test_set(table, arrays, release.manifest.description, limit=None, seed=0)
    assert test.target_B.tolist() == [4, 7, 9, 11]
    assert test.cut_B.tolist() == [3, 6, 8, 10]
    assert test.seen_item_B.tolist() == [False, False, False, True]


def test_an_empty_test_is_an_error(tmp_path):
    empty = {"split": "time", "test_from": "2022-01-20T00:00:00Z"}
    release, table, _, arrays = make_case(tmp_path, empty)
    with pytest.raises(DataError, match="no positive test event"):
        make_test_set(table, arrays, release.manifest.description, limit=None, seed=0)


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_requests_see_the_states_that_are_stored(tmp_path, codec):
    config = replace(SMALL, storage_codec=codec, state_tokens=2)
    release, table, _, arrays = make_case(tmp_path, config=config)
    states, row = encode_requests(release.encoder, arrays, np.array([3, 9]), np.array([2, 7]))
    assert row.tolist() == [0, -1]
    encoded = release.encode(table.slice(0, 3), np.array([0, 3]))
    assert states.shape == (1, 16)
    np.testing.assert_allclose(states.numpy(), as_stored(release.codec, encoded), atol=1e-6)
    assert np.abs(states.numpy() - encoded).max() > 1e-5


def test_requests_embed_as_the_release_embeds_them(tmp_path):
    release, table, _, arrays = make_case(tmp_path)
    target, cut = np.array([3, 4, 7, 9]), np.array([2, 2, 6, 7])
    found = embed_requests(
        release.encoder, release.head, release.item_table, arrays, target, cut, with_context=False, batch=3
    )  # fmt: skip
    states = release.encode(table.slice(0, 3), np.array([0, 3]))
    other = release.encode(table.slice(5, 2), np.array([0, 2]))
    rows = np.concatenate([states, states, other, release.cold_state[None]])
    wanted = release.embed(rows, [Context()] * 4, [None] * 4)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    # history_limit: the state after event 4 reads events 1 to 4 only
    last = embed_requests(
        release.encoder, release.head, release.item_table, arrays, np.array([4]), np.array([4]), with_context=False
    )
    state = release.encode(table.slice(1, 4), np.array([0, 4]))
    np.testing.assert_allclose(last.numpy(), release.embed(state, [Context()], [None]), atol=1e-6)


def test_popularity_by_hand():
    count = np.array([5, 2, 2, 0, 5])
    item = np.array([0, 4, 1, 2, 3, 7])
    assert popularity_ranks(count, item, lambda b: None).tolist() == [1, 2, 3, 4, 5, 6]
    without_first = np.array([False, True, True, True, True])
    assert popularity_ranks(count, item, lambda b: without_first).tolist() == [6, 1, 2, 3, 4, 6]


def test_recent_popularity_sees_the_hours_before_each_request(tmp_path):
    _, _, _, arrays = make_case(tmp_path)
    rows = np.array([3, 7, 9])
    item, time = arrays.item_T[rows], arrays.time_us_T[rows]
    # hour 25, last 22 h: hours 3 to 24 hold items 1 (3 h, 4 h), 2 (5 h, 6 h); asked item 3 (row 2) ties with 4 others
    # hour 26: hours 4 to 25 hold item 2 twice, items 1 and 3 once; item 5 (row 4) is behind them and item 4
    # hour 28: hours 6 to 27 hold item 3 twice, items 2 and 5 once; item 5 is third
    found = recent_popularity_ranks(arrays, item, time, 22, lambda b: None)
    assert found.tolist() == [3, 5, 3]


def test_repeats(tmp_path):
    *_, arrays = make_case(tmp_path)
    assert repeat_share(arrays) == pytest.approx(1 / 12)  # user 1 takes item 1 twice


def test_report_has_every_arm_and_slice(tmp_path):
    release, table, items, _ = make_case(tmp_path, available_from="born")
    births = pa.array([0, 0, 0, DAY_US * 19_002, 0, None, 0], pa.int64())
    items = items.append_column("available_from_us", births)
    report = evaluate_quality(release, table, items, None, ks=(2, 7), resamples=20)
    assert set(report["arms"]) == {"context", "no_context", "popularity", "recent_popularity"}
    assert report["slices"]["all"] == {"events": 5, "users": 3}
    assert report["slices"]["user_without_history"] == {"events": 2, "users": 1}
    assert "item_seen" not in report["arms"]["context"]  # no such event
    assert report["seen_items"] == "kept"
    for arm in report["arms"].values():
        # item 4 is asked before it is born: a miss; the others are among the six that are left
        assert arm["all"]["recall@7"]["value"] == pytest.approx(0.8)
    assert json.loads(json.dumps(report)) == report
    excluded = evaluate_quality(release, table, items, None, ks=(2,), seen="exclude", resamples=20)
    assert excluded["seen_items"] == "excluded"
    assert excluded["arms"]["popularity"]["all"]["mrr"]["value"] > report["arms"]["popularity"]["all"]["mrr"]["value"]


def test_items_outside_the_catalogue_are_misses(tmp_path):
    release, table, items, _ = make_case(tmp_path)
    index = table.column_names.index("item_id")
    changed = table["item_id"].to_pylist()
    changed[3] = 999
    table = table.set_column(index, "item_id", pa.array(changed, pa.int64()))
    report = evaluate_quality(release, table, items, None, ks=(7,), resamples=20)
    assert report["outside_catalogue"] == 1
    assert report["arms"]["popularity"]["all"]["recall@7"]["value"] == pytest.approx(0.8)
    assert "1 test events ask for items outside" in evaluate.show(report)


def test_command_prints_and_writes_the_report(tmp_path, capsys):
    release, table, items, _ = make_case(tmp_path)
    raw = table.select(["user_id", "item_id", "event_type", "device"]).append_column(
        "timestamp", pa.array(table["timestamp_us"].to_numpy() // 1_000_000)
    )
    pq.write_table(raw, tmp_path / "events.parquet")
    pq.write_table(items, tmp_path / "items.parquet")
    common = [
        "quality", "--registry", str(tmp_path / "registry"), "--events", str(tmp_path / "events.parquet"),
        "--items", str(tmp_path / "items.parquet"), "--k", "5", "--resamples", "20",
    ]  # fmt: skip
    out = tmp_path / "report/quality.json"
    assert evaluate.main([*common, "--out", str(out), "--max-test-events", "3"]) == 0
    text = capsys.readouterr().out
    assert "3 test events of 5, sampled with seed 0" in text
    assert "tower, with context" in text
    report = json.loads(out.read_text())
    assert report["release_id"] == release.manifest.release_id
    assert not math.isnan(report["arms"]["context"]["all"]["recall@5"]["high"])
    assert evaluate.main([*common, "--release", "serving"]) == 1
    assert "nothing serves" in capsys.readouterr().err


def test_no_context_differs_from_context(tmp_path):
    release, _, _, arrays = make_case(tmp_path)
    target, cut = np.array([4]), np.array([2])
    options = release.encoder, release.head, release.item_table, arrays, target, cut
    assert not torch.allclose(embed_requests(*options), embed_requests(*options, with_context=False))


def test_live_ranks_are_those_of_the_whole_score(tmp_path):
    """Requests in groups of a bucket, scored as if one by one, and ranked among what was born and not had."""
    config = replace(SMALL, live_windows_h=(1.0, 24.0), live_dim=4, live_recent=2)
    release, table, items, arrays = make_case(tmp_path, available_from="born", config=config)
    torch.nn.init.normal_(release.head.live.weight)  # it begins with no weight on the E values
    births = pa.array([0, 0, 0, 0, 0, None, DAY_US * 19_002], pa.int64())
    items = items.append_column("available_from_us", births)
    target = np.array([3, 4, 7, 8, 9])
    cut = arrays.refresh_cut_T[target]
    candidates = Candidates.of(release, arrays, items, target, exclude_seen=True)
    counts = arrays.live_counts(config)
    requests = arrays.live_requests(target, counts, config)
    users = embed_requests(release.encoder, release.head, release.item_table, arrays, target, cut)
    catalogue = LiveCatalogue.of(release.items, release.item_table)
    arms = {"recent": (users, requests), "nothing recent": (users, requests.without_recent())}
    found = rank_live(catalogue, counts, arms, candidates, chunk=2)
    item_BN = torch.arange(7).expand(5, 7)
    for arm, (_, asked) in arms.items():
        with torch.no_grad():
            score_BN = users[:, :8] @ release.item_table[:7].T / 0.07 + live_logits(
                release.items.live, counts, asked, users[:, 8:] / 0.07, item_BN, release.items.is_known(item_BN)
            )
        for b, item in enumerate(arrays.item_T[target].tolist()):
            allowed = candidates.mask(b)
            ahead = [bool(allowed[n]) and bool(score_BN[b, n] > score_BN[b, item]) for n in range(7)]
            assert found[arm][b] == 1 + sum(ahead)
    report = evaluate_quality(release, table, items, None, ks=(2,), resamples=20)
    assert set(report["arms"]) == {"context", "no_context", "popularity", "recent_popularity"}
    with pytest.raises(ConfigError, match="studies take releases without them"):
        skew_study([release, release], table, items, None)
