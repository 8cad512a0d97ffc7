"""Releases with live item features behind the service: the scores of the offline model on the same events."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
import torch

from model.config import TowerConfig
from model.item_index import write_snapshot
from model.live_items import LiveCounts, LiveRequests, catalogue_logits
from model.live_search import Counted
from model.records import Context, Event
from model.release import Registry, Release
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.scalars import counting_config, item_scalars
from model.retrieval.scorer import InteractionScorer, ScorerConfig
from model.training.data import EventArrays
from online.client import Retrieval
from online.event_feed import STREAM, Reason, send_events
from online.item_feed import send
from online.server import Server
from tests.online.helpers import NOW_US, fresh_users, serving, wait_until
from tests.releases import SMALL, make_tower

CONFIG = replace(SMALL, live_windows_h=(0.5, 3.0), live_dim=4, live_bucket_s=60, live_recent=2)
MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
AT_US = NOW_US - 20 * MINUTE_US
UNKNOWN = 1_000_001
"""An item that no release knows."""


@pytest.fixture
def stream(redis_server: str) -> Iterator[redis.Redis]:
    """The stream of events, empty before and after."""
    with redis.Redis.from_url(redis_server, socket_timeout=5) as client:
        client.delete(STREAM, f"{STREAM}:number")
        yield client
        client.delete(STREAM, f"{STREAM}:number")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """A committed release with lively weights in its live part too, and its items."""
    tower, items = make_tower(seed=5, config=CONFIG)
    with torch.no_grad():
        assert tower.items.live is not None
        assert tower.head.live is not None
        for part in (tower.items.live, tower.head.live):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    registry = Registry(tmp_path)
    manifest = registry.write(tower, items, trained_until_us=1_600_000_000_000_000)
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    return release


def make_events(count: int, *, seed: int = 0, from_us: int = AT_US - 5 * HOUR_US, until_us: int = NOW_US) -> pa.Table:
    """Events of 30 users, one in ten of an item that nobody knows, some neutral."""
    random = np.random.default_rng(seed)
    item = np.where(random.random(count) < 0.1, UNKNOWN + random.integers(0, 5, count), random.integers(10, 60, count))
    time_us = random.integers(from_us, until_us, count)
    time_us[: count // 5] = time_us[: count // 5] // HOUR_US * HOUR_US  # ties, and times at the beginning of a bucket
    time_us[-1] = until_us - 1  # the log goes on to its end: offline, windows stop moving where it does not
    return pa.table(
        {
            "user_id": random.integers(0, 30, count),
            "item_id": item,
            "event_type": random.choice(["click", "view"], count, p=[0.8, 0.2]),
            "timestamp_us": time_us,
        }
    )


def counts_of(release: Release, events: pa.Table, config: TowerConfig = CONFIG) -> LiveCounts:
    """As evaluation counts a log, of which duplicates are set aside."""
    first = {tuple(row.values()): n for n, row in reversed(list(enumerate(events.to_pylist())))}
    events = events.take(sorted(first.values()))
    columns = {name: pa.nulls(len(events), pa.string()) for name in ("surface", "device", "country")}
    columns |= {"order": pa.array(np.arange(len(events)))}
    for name, values in columns.items():
        events = events.append_column(name, values)
    events = events.sort_by([("user_id", "ascending"), ("timestamp_us", "ascending"), ("order", "ascending")])
    description = release.manifest.description
    return EventArrays.build(events.combine_chunks(), None, release.featuriser, description).live_counts(config)


def offline_scores(release: Release, events: pa.Table, context: Context, at_us: int) -> np.ndarray[Any, Any]:
    """The whole score of every catalogue item for a user without a state: f32 [N]."""
    counts = counts_of(release, events)
    user_1V = torch.from_numpy(release.embed(release.cold_state[None], [context], [None])) / CONFIG.temperature
    limit = max(CONFIG.live_recent, CONFIG.session_limit)
    latest = list(context.session_events[::-1][:limit])
    ids = pa.array([event.item_id for event in latest], pa.int64())
    recent_1K = np.full((1, limit), -1)
    recent_1K[0, : len(latest)] = release.featuriser.item_rows(ids)
    log_gap_1K = np.zeros((1, limit), np.float32)
    log_gap_1K[0, : len(latest)] = np.log1p([max(0, at_us - event.timestamp_us) / 1e6 for event in latest])
    asked = LiveRequests(
        counts.bucket(torch.tensor([at_us])), torch.from_numpy(recent_1K), torch.from_numpy(log_gap_1K)
    )  # fmt: skip
    items, live = release.items, release.items.live
    assert live is not None
    assert release.item_table is not None
    count, width = release.featuriser.num_items, CONFIG.embedding_dim
    with torch.inference_mode():
        is_known_N = items.is_known(torch.arange(count))
        score_1N = user_1V[:, :width] @ release.item_table[:count].T
        score_1N = score_1N + catalogue_logits(live, counts, asked, user_1V[:, width:], is_known_N)
    return score_1N[0].numpy()


def check(release: Release, events: pa.Table, reply: Retrieval, context: Context, at_us: int) -> None:
    """The reply is the best of the offline scores, in their order, with their values."""
    score_N = offline_scores(release, events, context, at_us)
    ids = release.featuriser.item_ids.to_pylist()
    row_of = {item_id: row for row, item_id in enumerate(ids)}
    own_K = score_N[[row_of[item_id] for item_id in reply.item_ids]]
    np.testing.assert_allclose(reply.scores, own_K, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(reply.scores, np.sort(score_N)[::-1][: len(reply.scores)], atol=1e-4, rtol=1e-5)


def counted_by(server: Server) -> Counted:
    """The counts that the serving release reads now."""
    residents = server.follower.current
    assert residents is not None
    assert residents.serving.index is not None
    assert residents.serving.index.counted is not None
    return residents.serving.index.counted


def session(*items: int, at_us: int = AT_US) -> tuple[Event, ...]:
    """Clicks a minute apart, the last one just before a time."""
    return tuple(Event(item, "click", at_us - (len(items) - n) * MINUTE_US) for n, item in enumerate(items))


CONTEXTS = [
    Context({"device": "tv"}, AT_US, session(12, 33, 12, 41)),
    Context({}, AT_US, session(15, UNKNOWN + 1)),
    Context({}, AT_US, session(15, UNKNOWN + 900, 59)),  # never counted, by an event or an update
    Context({"device": "web"}, AT_US),
    Context({}, AT_US - 2 * HOUR_US, session(20, 21, 22, at_us=AT_US - 2 * HOUR_US)),
    Context(
        {}, NOW_US // HOUR_US * HOUR_US - 4 * HOUR_US, session(30, at_us=NOW_US // HOUR_US * HOUR_US - 4 * HOUR_US)
    ),
]


def test_answers_are_the_offline_scores_on_the_same_events(
    release: Release, stream: redis.Redis, redis_server: str, tmp_path: Path
) -> None:
    """Events there when the server starts, and events that come later; contexts of several times."""
    first, later = make_events(600), make_events(300, seed=1)
    send_events(stream, first.slice(0, 250), since_us=AT_US - 5 * HOUR_US)
    send_events(stream, first.slice(250))
    user = fresh_users()
    with serving(tmp_path, redis_server) as (server, client):
        replies = [client.retrieve(user, context, k=50) for context in CONTEXTS]
        for context, reply in zip(CONTEXTS, replies, strict=True):
            assert context.timestamp_us is not None
            check(release, first, reply, context, context.timestamp_us)
            assert len(reply.item_ids) == 50
            assert reply.counts_since_us == AT_US - 5 * HOUR_US
            assert NOW_US - MINUTE_US < reply.counts_until_us <= time.time_ns() // 1000
            assert not reply.counts_are_short
        assert len({tuple(reply.item_ids) for reply in replies}) == len(replies), "contexts matter"
        before = counted_by(server)
        send_events(stream, later)
        wait_until(lambda: counted_by(server) is not before)
        both = pa.concat_tables([first, later]).combine_chunks()
        for context in CONTEXTS:
            assert context.timestamp_us is not None
            check(release, both, client.retrieve(user, context, k=7), context, context.timestamp_us)


def test_without_a_time_the_servers_clock_counts(
    release: Release, stream: redis.Redis, redis_server: str, tmp_path: Path
) -> None:
    events = make_events(200)
    send_events(stream, events)
    context = Context({"device": "tv"}, None, session(12, 33, at_us=NOW_US))
    with serving(tmp_path, redis_server, now_us=lambda: NOW_US) as (_, client):
        check(release, events, client.retrieve(fresh_users(), context, k=50), context, NOW_US)


def test_short_counts_are_said(release: Release, stream: redis.Redis, redis_server: str, tmp_path: Path) -> None:
    """Nothing was sent; then events without a word on how far back they are whole; then a backfill that says so."""
    user = fresh_users()
    with serving(tmp_path, redis_server) as (server, client):
        reply = client.retrieve(user, CONTEXTS[0], k=3)
        assert reply.counts_are_short
        assert len(reply.item_ids) == 3
        send_events(stream, make_events(10))
        send_events(stream, make_events(20), since_us=NOW_US - 5 * HOUR_US)
        wait_until(lambda: not client.retrieve(user, CONTEXTS[0], k=3).counts_are_short)
        version = release.manifest.embedding_version
        assert server.metrics.registry.get_sample_value("tower_live_short", {"embedding_version": version}) == 0


def test_bad_events_are_counted_and_the_others_are_not_held_up(
    release: Release, stream: redis.Redis, redis_server: str, tmp_path: Path
) -> None:
    good = make_events(100)
    now_us = time.time_ns() // 1000
    bad = pa.table(
        {
            "user_id": pa.array([None, 1, 1, 1, 1, 1], pa.int64()),
            "item_id": pa.array([10, None, 10, 10, 10, 10], pa.int64()),
            "event_type": ["click", "click", "click", "click", "buy", "click"],
            "timestamp_us": pa.array(
                [now_us, now_us, None, now_us + HOUR_US, now_us, now_us - 400 * HOUR_US], pa.int64()
            ),
        }
    )
    stream.xadd(STREAM, {"number": 1, "data": b"no parquet"})
    stream.set(f"{STREAM}:number", 1)
    stream.xadd(STREAM, {"hello": "there"})
    wrong = make_events(3).set_column(0, "user_id", pa.array(["a", "b", "c"]))
    for batch in (bad, wrong, good, good.slice(0, 7)):
        send_events(stream, batch)
    with serving(tmp_path, redis_server) as (server, client):
        reply = client.retrieve(fresh_users(), CONTEXTS[0], k=50)
        check(release, good, reply, CONTEXTS[0], AT_US)
        positive = sum(kind == "click" for kind in good["event_type"].slice(0, 7).to_pylist())
        wanted = {
            Reason.UNREADABLE: 3, Reason.NULL_USER: 1, Reason.NULL_ITEM: 1, Reason.NULL_TIMESTAMP: 1,
            Reason.FUTURE_TIMESTAMP: 1, Reason.UNDECLARED_EVENT_TYPE: 1, Reason.TOO_OLD: 1, Reason.DUPLICATE: positive,
        }  # fmt: skip
        for reason, count in wanted.items():
            labels = {"embedding_version": release.manifest.embedding_version, "reason": reason}
            assert server.metrics.registry.get_sample_value("tower_live_events_refused_total", labels) == count, reason


def test_an_item_that_came_later_is_counted_by_itself(
    release: Release, stream: redis.Redis, redis_server: str, tmp_path: Path
) -> None:
    """Two new items with the same embedding: the one that is clicked ranks above the other."""
    version = release.manifest.embedding_version
    assert release.item_table is not None
    row = release.item_table[release.featuriser.num_items].numpy()
    new = [UNKNOWN + 3, UNKNOWN + 4]
    client_rows = ItemRows.build(version, Layout(embedding_dim=CONFIG.embedding_dim), new, np.stack([row, row]))
    send(stream, client_rows)
    clicks = pa.table(
        {
            "user_id": list(range(40)), "item_id": [new[1]] * 40, "event_type": ["click"] * 40,
            "timestamp_us": [AT_US - 5 * MINUTE_US - n for n in range(40)],
        }
    )  # fmt: skip
    send_events(stream, clicks)
    with serving(tmp_path, redis_server) as (_, client):
        reply = client.retrieve(fresh_users(), CONTEXTS[3], k=52)
        assert set(new) <= set(reply.item_ids)
        assert reply.index_revision == 2
        scores = dict(zip(reply.item_ids, reply.scores.tolist(), strict=True))
        assert abs(scores[new[0]] - scores[new[1]]) > 0.05
        # had: what the session holds loses as much, new or not
        had = client.retrieve(fresh_users(), replace(CONTEXTS[3], session_events=session(new[0])), k=52)
        assert set(new) <= set(had.item_ids)


def test_a_trained_scorer_scores_with_the_counts_of_now(stream: redis.Redis, redis_server: str, tmp_path: Path) -> None:
    """Probabilities of the release's scorer over embeddings and scalars, as evaluation makes them; new items too."""
    tower, items = make_tower(seed=8)
    scoring = ScorerConfig(hidden=(12, 8), windows_h=(0.5, 3.0), bucket_s=60)
    scorer = InteractionScorer.of(scoring, SMALL.embedding_dim)
    registry = Registry(tmp_path)
    manifest = registry.write(tower, items, trained_until_us=1_600_000_000_000_000, scorer=(scoring, scorer.eval()))
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    events = make_events(400)
    send_events(stream, events, since_us=AT_US - 5 * HOUR_US)
    assert release.item_table is not None
    count, version = release.featuriser.num_items, manifest.embedding_version
    layout = Layout(embedding_dim=SMALL.embedding_dim, scalars=scoring.scalars)
    send(stream, ItemRows.build(version, layout, [UNKNOWN + 700], release.item_table[3:4].numpy()))
    config = counting_config(scoring, SMALL)
    counts = counts_of(release, events, config)
    context = CONTEXTS[0]
    with torch.inference_mode():
        user_1E = torch.from_numpy(release.embed(release.cold_state[None], [context], [None]))
        bucket = counts.bucket(torch.tensor(AT_US))
        scalar_NS = item_scalars(counts, torch.arange(count), bucket)
        score_N = release.scorer(user_1E, torch.cat([release.item_table[:count], scalar_NS], 1))[0, 0].numpy()
        without_N = release.scorer(user_1E, torch.cat([release.item_table[:count], 0 * scalar_NS], 1))[0, 0].numpy()
        assert np.abs(without_N - score_N).max() > 1e-3, "scalars matter"
        none_1S = item_scalars(counts, torch.tensor([counts.num_rows]), bucket)  # of no item
        new = release.scorer(user_1E, torch.cat([release.item_table[3:4], none_1S], 1))[0, 0]
    with serving(tmp_path, redis_server) as (_, client):
        reply = client.retrieve(fresh_users(), context, k=60)
        assert not reply.counts_are_short
        assert len(reply.item_ids) == count + 1
        wanted = {item: score_N[row] for row, item in enumerate(release.featuriser.item_ids.to_pylist())}
        wanted[UNKNOWN + 700] = float(new)
        np.testing.assert_allclose(reply.scores, [wanted[item] for item in reply.item_ids], atol=1e-6)
        np.testing.assert_allclose(reply.scores, sorted(wanted.values(), reverse=True), atol=1e-6)


def test_a_scorer_without_scalars_needs_no_events(redis_server: str, tmp_path: Path) -> None:
    tower, items = make_tower(seed=8)
    scoring = ScorerConfig(hidden=(12, 8))
    scorer = InteractionScorer.of(scoring, SMALL.embedding_dim).eval()
    registry = Registry(tmp_path)
    manifest = registry.write(tower, items, trained_until_us=1_600_000_000_000_000, scorer=(scoring, scorer))
    registry.commit(manifest.release_id)
    release = registry.load(manifest.release_id)
    write_snapshot(registry, release)
    with serving(tmp_path, redis_server) as (server, client):
        reply = client.retrieve(fresh_users(), CONTEXTS[0], k=50)
        assert (reply.counts_until_us, reply.counts_are_short) == (0, False)
        assert release.item_table is not None
        user_1E = torch.from_numpy(release.embed(release.cold_state[None], [CONTEXTS[0]], [None]))
        score_N = release.scorer(user_1E, release.item_table[:50])[0, 0].detach().numpy()
        rows = [int(item) - 10 for item in reply.item_ids]
        np.testing.assert_allclose(reply.scores, score_N[rows], atol=1e-6)
        assert server.feeds._following[0].events is None
