"""A whole deployment on one machine for tests and benchmarks: untrained release, one run, real Redis, real server."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from model.config import TowerConfig
from model.dataset import load_description
from model.event_log import offsets_of, read_items, read_log, read_users
from model.features import build_vocabularies
from model.hybrid_tower import HybridTower
from model.records import Context, Event, Id
from model.release import Manifest, Registry
from online.client import Embedding, EmbedQuery, UserTowerClient
from online.server import Server
from online.settings import Settings
from pipelines import encode_users
from pipelines.runs import RunStore

ML_1M = Path(__file__).parents[2] / "shared" / "data" / "ml-1m"
CONFIG = TowerConfig(d_model=32, num_layers=2, num_heads=2, history_limit=50, embedding_dim=32, hash_rows=64)


@dataclass(frozen=True)
class Deployment:
    """A data set, an untrained release of it, one committed run, and a server that answers from it."""

    tower: HybridTower
    manifest: Manifest
    events: pa.Table
    users: pa.Table | None
    store: RunStore
    client: UserTowerClient
    registry_uri: str
    redis_url: str

    def histories(self, count: int, seed: int = 0) -> tuple[list[Id], pa.Table, np.ndarray]:
        """Random users of the log, their events one user after another, and the offsets."""
        user_ids, offsets = offsets_of(self.events["user_id"])
        chosen = np.sort(np.random.default_rng(seed).choice(len(user_ids), min(count, len(user_ids)), replace=False))
        rows = np.concatenate([np.arange(offsets[u], offsets[u + 1]) for u in chosen])
        lengths = np.diff(offsets)[chosen]
        return (
            user_ids.take(pa.array(chosen)).to_pylist(),
            self.events.take(pa.array(rows)),
            np.concatenate([[0], np.cumsum(lengths)]),
        )


@contextmanager
def deploy(
    folder: Path, data: Path, redis_url: str, *, description_path: str, config: TowerConfig = CONFIG
) -> Iterator[Deployment]:
    """Build an untrained release of a data set, run the daily job into `folder` and Redis, serve until the exit."""
    description = load_description(description_path)
    events_path = data / "events.parquet" if (data / "events.parquet").exists() else data / "events"
    events, _ = read_log(str(events_path), description)
    items = read_items(str(data / "items.parquet"), description)
    users = read_users(str(data / "users.parquet"), description) if description.user_columns else None
    items = items.select(["item_id", *description.item_columns])
    torch.manual_seed(7)
    tower = HybridTower.build(config, description, build_vocabularies(description, events, users), items).eval()
    registry = Registry(folder / "registry")
    manifest = registry.write(tower, items, trained_until_us=pc.max(events["timestamp_us"]).as_py())
    states = folder / "states"
    argv = ["--events", str(events_path), "--registry", registry.uri, "--states", str(states)]
    assert encode_users.main([*argv, "--redis-url", redis_url, "--shards", "4"]) == 0
    registry.commit(manifest.release_id)
    server = Server(Settings(registry=registry.uri, redis_url=redis_url, port=0, metrics_port=0, notice_s=0))
    server.start()
    try:
        assert server.ready.wait(30)
        with UserTowerClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            store = RunStore(str(states), manifest.state_version)
            yield Deployment(tower, manifest, events, users, store, client, registry.uri, redis_url)
    finally:
        server.stop()


def contexts_of(deployment: Deployment, user_ids: list[Id], table: pa.Table, offsets: np.ndarray) -> list[Context]:
    """Contexts with every declared part for two users of three, none for the third."""
    vocabularies = deployment.tower.featuriser.vocabularies
    random = np.random.default_rng(1)
    items = deployment.tower.featuriser.item_ids
    contexts = []
    for number in range(len(user_ids)):
        last_us = table["timestamp_us"][int(offsets[number + 1]) - 1].as_py()
        session = tuple(
            Event(items[int(random.integers(len(items)))].as_py(), vocabularies.event_types[0], last_us + 1_000_000 * k)
            for k in range(1, int(random.integers(1, 12)))
        )
        features = {
            name: str(random.choice(vocabularies.columns[name])) for name in deployment.tower.featuriser.head_columns
        }
        contexts.append(Context(features, last_us + 60_000_000, session) if number % 3 else Context())
    return contexts


def largest_difference(deployment: Deployment, count: int) -> float:
    """Largest |difference| between embeddings by gRPC and the undivided model in this process."""
    return float(differences(deployment, count).max())


def differences(deployment: Deployment, count: int) -> NDArray[np.float32]:
    """The same by user: f32 [count]."""
    user_ids, table, offsets = deployment.histories(count)
    contexts = contexts_of(deployment, user_ids, table, offsets)
    wanted = deployment.tower.embed(table, offsets, contexts)
    replies = [deployment.client.embed(user, context) for user, context in zip(user_ids, contexts, strict=True)]
    assert {reply.answer for reply in replies} == {"EXACT"}
    assert {reply.embedding_version for reply in replies} == {deployment.manifest.embedding_version}
    batch = deployment.client.embed_batch(
        EmbedQuery(user, context) for user, context in zip(user_ids[:100], contexts, strict=False)
    )
    for one, row in zip(replies, batch, strict=False):
        assert isinstance(row, Embedding)
        assert np.abs(one.vector - row.vector).max() < 1e-6
    found: NDArray[np.float32] = np.abs(np.stack([reply.vector for reply in replies]) - wanted).max(1)
    return found
