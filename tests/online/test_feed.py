"""tower-feed: what it sends is what a server then answers with."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import yaml

from model.item_index import write_snapshot
from model.records import Context
from model.release import Registry
from model.retrieval.rows import ItemRows, Layout, write_rows
from online.client import Rules
from online.event_feed import STREAM
from online.feed import main
from online.item_feed import stream_key
from tests.online.helpers import NOW_US, fresh_users, serving, wait_until
from tests.releases import SMALL, make_items, make_release

CONFIG = replace(SMALL, live_windows_h=(1.0, 3.0), live_dim=4, live_bucket_s=60)
MINUTE_US = 60_000_000


@pytest.fixture
def stream(redis_server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server, socket_timeout=5) as client:
        client.delete(STREAM, f"{STREAM}:number")
        yield client
        client.delete(STREAM, f"{STREAM}:number")


def test_all_that_it_sends_arrives(
    tmp_path: Path, redis_server: str, stream: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(tmp_path / "registry")
    manifest = make_release(registry.uri, seed=6, config=CONFIG)
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    version = manifest.embedding_version
    stream.delete(stream_key(version), f"{stream_key(version)}:number")

    def feed(*argv: str) -> str:
        assert main([*argv, "--redis-url", redis_server]) == 0
        return capsys.readouterr().out.strip()

    log = tmp_path / "events.parquet"
    times_us = NOW_US - MINUTE_US * np.array([5 * 60, 100, 30, 2, 20_000])
    columns = {"user_id": [1, 2, 3, 4, 5], "item_id": [10, 11, 12, 13, 14], "event_type": ["click"] * 5}
    surfaces = {name: pa.nulls(5, pa.string()) for name in ("surface", "device")}
    stamps = pa.array(times_us, pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({**columns, **surfaces, "timestamp": stamps}), log)
    description = tmp_path / "dataset.yaml"
    description.write_text(yaml.safe_dump(manifest.description.to_dict()))
    told = feed("events", "--events", str(log), "--backfill", "--batch", "2", "--dataset", str(description))
    assert told == "sent 4 events, 1 older than 168 h"

    new = make_items(2).set_column(0, "item_id", pa.array([900, 901])).append_column("bid", pa.array([50.0, 2.0]))
    pq.write_table(new, tmp_path / "new.parquet")
    told = feed("items", "--items", str(tmp_path / "new.parquet"), "--registry", registry.uri, "--batch", "1")
    assert told == f"sent 2 items for embedding version {version}"

    own = ItemRows.build(version, Layout(embedding_dim=CONFIG.embedding_dim), [902], np.ones((1, CONFIG.embedding_dim)))
    write_rows(own, tmp_path / "rows.parquet")
    assert feed("rows", "--rows", str(tmp_path / "rows.parquet")).endswith("as update 3")
    user = fresh_users()
    with serving(Path(registry.uri), redis_server) as (_, client):
        reply = client.retrieve(user, Context(timestamp_us=NOW_US), k=100)
        assert set(reply.item_ids) == {*range(10, 60), 900, 901, 902}
        assert not reply.counts_are_short, "the log was said to be whole, and reaches over three hours"
        assert reply.index_revision == 4
        changes = pa.table({"item_id": [902, 900], "budget": [3.0, 4.0], "eligible": [True, False]})
        pq.write_table(changes, tmp_path / "changes.parquet")
        feed("change", "--changes", str(tmp_path / "changes.parquet"), "--embedding-version", version)
        wait_until(lambda: client.retrieve(user, k=100, rules=Rules(min_budget=1.0)).item_ids == [902])
        feed("delete", "--items", "902", "10", "--embedding-version", version)
        wait_until(lambda: set(client.retrieve(user, k=100).item_ids) == {*range(11, 60), 901})


def test_what_is_wrong_is_told(
    tmp_path: Path, redis_server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"item_id": [1], "price": [2.0]}), tmp_path / "changes.parquet")
    argv = ["change", "--changes", str(tmp_path / "changes.parquet"), "--embedding-version", "v"]
    assert main([*argv, "--redis-url", redis_server]) == 1
    assert "at least one of bid, budget, eligible; it has item_id, price" in capsys.readouterr().err
    assert main(["items", "--items", "x", "--registry", str(tmp_path), "--redis-url", redis_server]) == 1
    assert "no release serves" in capsys.readouterr().err
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(SystemExit):
        main(argv)
    assert "REDIS_URL" in capsys.readouterr().err
