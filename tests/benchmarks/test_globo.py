"""The rivals' counts against counting one by one, and the whole benchmark on a small made-up log."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import globo
from model.config import TowerConfig
from model.live_items import LiveCounts

DAY_S = 86_400
CPU = torch.device("cpu")


def test_running_counts_are_those_of_counting_each_time() -> None:
    random = np.random.default_rng(0)
    time_us = np.sort(random.integers(0, 40_000_000_000, 300))
    item = random.integers(0, 5, 300)
    asked_us = np.sort(np.concatenate([random.integers(0, 45_000_000_000, 60), time_us[:3]]))
    counts = globo.RunningCounts(item, time_us, 5, 3.0, CPU)
    found = torch.cat([counts.ahead(part) for part in np.array_split(asked_us, 7)])
    for row, now_us in zip(found, asked_us, strict=True):
        inside = (time_us < now_us) & (time_us >= now_us - 3 * 3_600_000_000)
        assert row.tolist() == np.bincount(item[inside], minlength=5).tolist()


def test_coclicks_by_hand() -> None:
    second = 1_000_000
    user, item = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 2, 1, 2, 1, 3])
    time_us = np.array([10, 20, 30, 40, 50, 60]) * second
    exact = LiveCounts.build(user, item, time_us, 6, TowerConfig(live_windows_h=(1.0,)), bucket_s=1)
    source = torch.tensor([1, 1, 1, -1, 2])
    bucket = exact.bucket(torch.tensor([40, 41, 61, 61, 61]) * second)
    # at 40 s the second user's step is not yet past; item 2 was followed by nothing
    wanted = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert globo.coclicks(exact, source, bucket, 4).tolist() == wanted


@pytest.fixture
def small_news(tmp_path: Path) -> Path:
    """Ten days, forty users; each day eight new articles, two of which get most clicks."""
    random = np.random.default_rng(1)
    start_s = int(globo.FIRST_DAY.timestamp()) - 3 * DAY_S
    rows = []
    for day in range(10):
        for user in random.choice(40, 25, replace=False):
            times = start_s + day * DAY_S + np.sort(random.integers(0, DAY_S, 3))
            hot = random.permutation(2)
            articles = [8 * day + hot[0], 8 * day + hot[1], 8 * day + random.integers(2, 8)]
            rows += [(int(user), int(article) + 100, int(time)) for article, time in zip(articles, times, strict=True)]
    rows.sort()
    user_ids, item_ids, times = zip(*rows, strict=True)
    columns = ("environment", "device_group", "os", "country", "region", "referrer_type")
    events = {"user_id": user_ids, "item_id": item_ids, "event_type": ["click"] * len(rows), "timestamp": times}
    folder = tmp_path / "globo-news"
    folder.mkdir()
    pq.write_table(
        pa.table(events | {name: random.integers(0, 3, len(rows)) for name in columns}), folder / "events.parquet"
    )
    first = {item: min(time for _, other, time in rows if other == item) for item in set(item_ids)}
    items = pa.table({"item_id": list(first), "first_click_ts": list(first.values())})
    pq.write_table(items, folder / "items.parquet")
    return tmp_path


def test_the_whole_of_it(small_news: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--data", str(small_news), "--device", "cpu", "--no-record", "--resamples", "20", "--out", str(out),
        "--config", "d_model=8", "embedding_dim=8", "num_heads=2", "num_layers=1", "context_dim=8", "head_hidden=16",
        "--settings", "tokens_per_step=64", "epochs=6", "warmup_steps=5", "learning_rate=0.01", "patience=9",
    ]  # fmt: skip
    assert globo.main(options) == 0
    report = json.loads((out / "globo.json").read_text())
    whole = report["slices"]["all"]
    assert whole["events"] == report["test_events"] == 7 * 25 * 3
    assert set(whole["recall@20"]) == {*globo.TOWERS, *globo.RIVALS}
    assert report["slices"]["item_unseen"]["events"] == whole["events"]  # every day's articles are new
    assert sum(report["slices"][f"2017-10-{day}"]["events"] for day in range(10, 17)) == whole["events"]
    recall = {arm: cell["value"] for arm, cell in whole["recall@20"].items()}
    assert recall["state+context+live"] > recall["state"] + 0.2
    assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in whole["recall@20"].values())
    ratio, hit = globo.entries(report)
    assert ratio["value"] == pytest.approx(recall["state+context+live"] / recall["state"], abs=1e-3)
    assert hit["rival_value"] == pytest.approx(max(recall[arm] for arm in globo.RIVALS), abs=1e-4)
    assert globo.show(report).count("hybrid / state") == len(report["slices"])


def test_a_report_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cell = {"value": 0.5}
    days = {f"2017-10-1{day}": {"recall@20": dict.fromkeys((*globo.TOWERS, *globo.RIVALS), cell)} for day in range(7)}
    (tmp_path / "globo.json").write_text(json.dumps({"slices": {"all": {}} | days}))
    assert globo.main(["--plot", str(tmp_path / "globo.json")]) == 0
    assert "<svg" in (tmp_path / "globo.svg").read_text()
