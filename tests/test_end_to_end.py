"""One user down all paths: the split pipeline over real Beam, Redis and gRPC equals the undivided model, and training,
batch and service see the same features."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import redis
import torch

from deploy.redis_server import start_redis
from feature_repo.environment import feast_environment
from feature_repo.layout import fence_field, redis_key, view_name
from model.canary import CODEC_TOLERANCE
from model.generator import GeneratorSettings, generate
from model.records import Context, Event
from model.training.data import EventArrays
from online.client import Embedding
from tests.deployment import CONFIG, ML_1M, Deployment, contexts_of, deploy, differences, largest_difference

CODECS = [{}, {"storage_codec": "float16"}, {"storage_codec": "int8", "state_tokens": 2}]


@pytest.fixture(scope="module", params=CODECS, ids=["float32", "float16", "int8 of 2 tokens"])
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    config = replace(CONFIG, **request.param)
    folder = tmp_path_factory.mktemp("generated")
    generate(GeneratorSettings(users=300, items=200, days=5, events=12_000, seed=3), folder / "data")
    description_path = str(folder / "data/dataset.yaml")
    with (
        start_redis(folder / "redis") as server,  # of its own: whole hashes are compared
        deploy(folder, folder / "data", server.url, description_path=description_path, config=config) as deployment,
    ):
        yield deployment


@pytest.fixture(scope="module")
def ml_1m(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Deployment]:
    if not ML_1M.exists():
        pytest.skip("the ml-1m data set is not beside the checkout (../shared/data/ml-1m)")
    with deploy(tmp_path_factory.mktemp("ml-1m"), ML_1M, redis_server, description_path="ml-1m") as deployment:
        yield deployment


def check_features(deployment: Deployment, count: int) -> None:
    """Training (the whole log featurised once, then a window), Beam (the run's tails) and gRPC (a session)."""
    featuriser, limit = deployment.tower.featuriser, CONFIG.history_limit
    log = EventArrays.build(deployment.events, deployment.users, featuriser, featuriser.description)
    row_of_user = {user: row for row, user in enumerate(log.user_ids.to_pylist())}
    run = deployment.store.run_ids()[-1]
    folder = Path(deployment.store.run(run).uri.removeprefix("file://")) / "tails"
    tails = pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])
    user_ids, _, _ = deployment.histories(count, seed=2)
    for user in user_ids:
        row = row_of_user[user]
        end = int(log.offsets[row + 1])
        start = max(int(log.offsets[row]), end - limit)
        training = log.events.window(torch.tensor([start]), torch.tensor([end]))
        stored = tails.filter(pc.equal(tails["user_id"], user)).to_pylist()[0]
        batch = featuriser.events(
            pa.table(
                {
                    "item_id": pa.array(stored["item_id"], featuriser.item_ids.type),
                    "event_type": pa.array(stored["event_type"], pa.string()),
                    "timestamp_us": pa.array(stored["timestamp_us"], pa.int64()),
                    **{name: pa.array(stored[name], pa.string()) for name in featuriser.event_columns},
                }
            ),
            np.array([0, len(stored["item_id"])]),
        )
        for field in ("item_T", "type_T", "gap_T", "column_TC", "time_us_T", "offsets"):
            assert torch.equal(getattr(training, field), getattr(batch, field)), (user, field)
        session = tuple(
            Event(item, kind, time_us)
            for item, kind, time_us in zip(stored["item_id"], stored["event_type"], stored["timestamp_us"], strict=True)
        )
        request = featuriser.contexts([Context(session_events=session)], [None])
        kept = int(request.session_length_B)
        assert request.session_item_BK[0, :kept].tolist() == training.item_T[-kept:].tolist()
        assert request.session_type_BK[0, :kept].tolist() == training.type_T[-kept:].tolist()


def check_contexts(deployment: Deployment, count: int) -> None:
    """What training says of a target equals what the service says of the same request."""
    featuriser = deployment.tower.featuriser
    description = featuriser.description
    log = EventArrays.build(deployment.events, deployment.users, featuriser, description)
    users = {} if deployment.users is None else {row["user_id"]: row for row in deployment.users.to_pylist()}
    random = np.random.default_rng(4)
    targets = np.sort(random.choice(np.flatnonzero(log.positive_T), count, replace=False))
    cuts = np.array([random.integers(log.offsets[log.user_T[t]] - 1, t) for t in targets])
    events = deployment.events
    contexts, until_us = [], []
    for target, cut in zip(targets.tolist(), cuts.tolist(), strict=True):
        cold = cut < log.offsets[log.user_T[target]]
        first = int(log.offsets[log.user_T[target]]) if cold else cut + 1
        row = events.slice(target, 1).to_pylist()[0]
        features = {name: row[name] for name in description.context_columns}
        features |= {name: users.get(row["user_id"], {}).get(name) for name in description.user_columns}
        session = [
            Event(e["item_id"], e["event_type"], e["timestamp_us"])
            for e in events.slice(first, target - first).to_pylist()
        ]
        until_us.append(None if cold else int(log.time_us_T[cut]))
        # The service drops events at the state's own time; training cuts after them (EventArrays.tie_end_T).
        contexts.append(
            Context({k: v for k, v in features.items() if v is not None}, row["timestamp_us"], tuple(session))
        )
    untied = np.array([cut < 0 or log.tie_end_T[cut] == cut or cut < log.offsets[log.user_T[t]]
                       for t, cut in zip(targets, cuts, strict=True)])  # fmt: skip
    training = log.contexts(targets, cuts, CONFIG)
    online = featuriser.contexts(contexts, until_us)
    assert untied.sum() > count / 3
    for field in (
        "category_BC", "hour_B", "weekday_B", "age_B", "session_item_BK", "session_type_BK", "session_gap_BK",
        "session_length_B", "subject_item_BM", "subject_weight_BM", "query_BQ",
    ):  # fmt: skip
        assert torch.equal(getattr(training, field)[untied], getattr(online, field)[untied]), field


def test_the_split_pipeline_equals_the_undivided_model(generated: Deployment) -> None:
    found = differences(generated, 200)
    # Batches of another size move a number by 1e-7: near the middle between two steps of a codec, it rounds the other
    # way, and the user's embedding moves with it.
    assert (found < 1e-5).mean() >= (1.0 if generated.manifest.storage_codec == "float32" else 0.95)
    assert found.max() < 1e-5 + CODEC_TOLERANCE[generated.manifest.storage_codec]


def test_all_paths_see_the_same_features(generated: Deployment) -> None:
    check_features(generated, 50)
    check_contexts(generated, 100)


def test_rows_of_stock_feast_are_served_alike(generated: Deployment) -> None:
    """The job's rows are deleted, stock `feast materialize` writes them from the job's Parquet, the answers stay."""
    user_ids, table, offsets = generated.histories(60, seed=5)
    contexts = contexts_of(generated, user_ids, table, offsets)

    def ask() -> list[Embedding]:
        return [generated.client.embed(user, context) for user, context in zip(user_ids, contexts, strict=True)]

    before = ask()
    with redis.Redis.from_url(generated.redis_url, socket_timeout=5) as client:
        keys = [redis_key(user) for user in generated.events["user_id"].unique().to_pylist()]
        written = {key: client.hgetall(key) for key in keys}
        client.delete(*keys)
        assert {reply.answer for reply in ask()} == {"COLD_START"}
        environment = feast_environment(generated.registry_uri, generated.store.states_uri, generated.redis_url)
        as_of = datetime.fromtimestamp(generated.store.manifest(generated.store.run_ids()[-1]).as_of_us / 1e6, UTC)
        day = timedelta(days=1)
        for arguments in (["apply"], ["materialize", f"{as_of - day:%FT%T}", f"{as_of + day:%FT%T}"]):
            done = subprocess.run(
                [str(Path(sys.executable).with_name("feast")), "-c", "feature_repo", *arguments],
                cwd=Path(__file__).parents[1], env=os.environ | environment, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        fence = fence_field(view_name(generated.manifest.state_version))
        for key, fields in written.items():
            assert client.hgetall(key) == {name: value for name, value in fields.items() if name != fence}
    for ours, stock in zip(before, ask(), strict=True):
        assert stock.answer == "EXACT"
        assert np.array_equal(ours.vector, stock.vector)


def test_a_thousand_users_of_ml_1m(ml_1m: Deployment) -> None:
    assert largest_difference(ml_1m, 1_000) < 1e-5
    check_features(ml_1m, 50)
    check_contexts(ml_1m, 200)
