"""Stock Feast on the job's Parquet and on the publisher's rows: `feast` processes against a real Redis.

Importing Feast takes many seconds, so one fixture runs each process once and the tests look at what they left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from deploy.redis_server import start_redis
from feature_repo import layout
from feature_repo.environment import feast_environment
from feature_repo.layout import StateRow
from model.state_codec import StateCodec, as_stored
from pipelines.transforms.publish import PublishCounts, connect, publish_table
from tests.feature_repo.test_releases import write_pointer, write_release

REPOSITORY = Path(__file__).parents[2]
SERVING, NEXT = "a" * 16, "b" * 16  # state versions; the second has no run yet
CODECS = {"c" * 16: StateCodec("float16"), "d" * 16: StateCodec("int8", tokens=2)}  # by state version
VIEW = layout.view_name(SERVING)
DAY_1_S, DAY_2_S = 1_507_950_000, 1_508_036_400  # 2017-10-14 and 15, 03:00


def state_of(user_id: int | str, as_of_s: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    number = user_id if isinstance(user_id, int) else len(user_id)
    return np.array([number / 3, -0.0, 1e-42, as_of_s % 97], np.float32)


def row_of(user_id: int | str, as_of_s: int, version: str = SERVING) -> StateRow:
    return StateRow(
        state=state_of(user_id, as_of_s),
        state_version=version,
        history_until_us=as_of_s * 1_000_000 - 7,
        encoded_at_us=as_of_s * 1_000_000,
        event_timestamp_s=as_of_s,
    )


def make_table(user_ids: list[Any], as_of_s: int, version: str = SERVING) -> pa.Table:
    users, codec = len(user_ids), CODECS.get(version)
    states = [state_of(user, as_of_s) for user in user_ids]
    as_of_us = pa.array([as_of_s * 1_000_000] * users, pa.int64())
    return pa.table(
        {
            "user_id": pa.array(user_ids, pa.string() if user_ids and isinstance(user_ids[0], str) else pa.int64()),
            "state": pa.array([list(state) for state in states], pa.list_(pa.float32()))
            if codec is None
            else pa.array([codec.encode(state[None]).tobytes() for state in states], pa.binary()),
            "state_version": pa.array([version] * users, pa.string()),
            "history_until": pa.array([as_of_s * 1_000_000 - 7] * users, pa.int64()),
            "encoded_at": as_of_us,
            "event_timestamp": as_of_us.cast(pa.timestamp("us", "UTC")),
        }
    )


def commit_run(
    states: Path,
    run_id: str,
    as_of_s: int,
    shards: list[list[Any]],
    stage: str = "runs",
    version: str = SERVING,
) -> None:
    folder = states / version / stage / run_id / "states"
    folder.mkdir(parents=True)
    for shard, user_ids in enumerate(shards):
        pq.write_table(make_table(user_ids, as_of_s, version), folder / f"shard-{shard:05d}.parquet")


READ = """
import json, sys
from datetime import datetime, timezone
from feast import FeatureStore, RepoConfig
from feature_repo import features

asked = json.load(sys.stdin)
store = FeatureStore(repo_path="feature_repo")
service = store.get_feature_service("user_state")
answer = {
    "views": sorted(view.name for view in store.list_feature_views()),
    "service": [projection.name for projection in service.feature_view_projections],
    "online": store.get_online_features(service, [{"user_id": user} for user in asked["users"]]).to_dict(),
    "types": {view.name: str(view.features[0].dtype) for view in store.list_feature_views()},
    "blobs": {},
}
for view in asked["byte_views"]:
    fields = [f"{view}:{name}" for name in ("state", "state_version", "history_until", "encoded_at")]
    found = store.get_online_features(fields, [{"user_id": user} for user in asked["byte_users"]]).to_dict()
    found["state"] = [None if state is None else state.hex() for state in found["state"]]
    answer["blobs"][view] = found

# String ids: a registry, a Feast registry and a Redis database of their own.
made = features.define(asked["string_registry"], asked["string_states"])
stock = FeatureStore(config=RepoConfig(**{**store.config.model_dump(exclude_unset=True, by_alias=True),
    "registry": {"registry_type": "sql", "path": asked["string_feast_registry"]},
    "online_store": {"type": "redis", "connection_string": asked["string_redis"]},
    "offline_store": {"type": "dask"},
}))
stock.apply([made.entity, *made.views, made.service])
stock.materialize_incremental(datetime(2017, 10, 14, 12, tzinfo=timezone.utc))
entities = [{"user_id": user} for user in asked["strings"]]
answer["strings"] = stock.get_online_features(stock.get_feature_service("user_state"), entities).to_dict()
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Stage:
    """What the processes left behind."""

    url: str
    outputs: dict[str, subprocess.CompletedProcess[str]]
    incremental: dict[int, dict[bytes, bytes]]
    """The hashes after the first materialisation."""
    published: PublishCounts
    answer: dict[str, Any]
    string_hashes: dict[str, dict[bytes, bytes]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("feast")
    registry, states = folder / "registry", folder / "states"
    write_release(registry, "r1", SERVING)
    write_release(registry, "r2", NEXT)
    for version, codec in CODECS.items():
        config = {"d_model": 4 // codec.tokens, "state_tokens": codec.tokens, "storage_codec": codec.name}
        write_release(registry, f"r3{codec.name}", version, config=config)
    write_pointer(registry, "r1")
    states.mkdir()
    with start_redis(folder / "redis") as server, connect(server.url) as client:
        variables = feast_environment(str(registry), str(states), server.url)
        outputs: dict[str, subprocess.CompletedProcess[str]] = {}

        def run(name: str, command: list[str], question: Any = None, **changes: str) -> str:
            outputs[name] = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ | variables | changes,
                input=json.dumps(question),
                capture_output=True,
                text=True,
                check=False,
            )
            return outputs[name].stdout

        def feast(name: str, *arguments: str, **changes: str) -> None:
            run(name, [str(Path(sys.executable).with_name("feast")), "-c", "feature_repo", *arguments], **changes)

        feast("apply", "apply")  # before any run
        commit_run(states, "20171014T030000Z", DAY_1_S, [[1, 2], [], [3, -4]])
        for version in CODECS:
            commit_run(states, "20171014T030000Z", DAY_1_S, [[21, 22], []], version=version)
        feast("incremental", "materialize-incremental", "2017-10-14T12:00:00")
        incremental = {user: client.hgetall(layout.redis_key(user)) for user in (1, 2, 3, -4, 7)}

        commit_run(states, "20171015T030000Z", DAY_2_S, [[2], [], [7]])
        commit_run(states, "20171015T040000Z", DAY_2_S + 3600, [[1, 2, 3]], stage="staging")
        feast("materialize", "materialize", "2017-10-14T00:00:00", "2017-10-16T00:00:00")
        published = publish_table(client, make_table([3, 100, -101], DAY_2_S), SERVING, 5)
        for version, codec in CODECS.items():
            published += publish_table(client, make_table([22, 23], DAY_2_S, version), version, 5, codec=codec)

        write_release(folder / "strings", "s1", SERVING, description={"user_id_type": "string"})
        commit_run(folder / "string_states", "20171014T030000Z", DAY_1_S, [["", "ž"], ["7"]])
        question = {
            "users": [1, 2, 3, -4, 7, 100, -101, 999],
            "strings": ["", "ž", "7"],
            "byte_views": [layout.view_name(version) for version in CODECS],
            "byte_users": [21, 22, 23, 1],
            "string_registry": str(folder / "strings"),
            "string_states": str(folder / "string_states"),
            "string_feast_registry": f"sqlite:///{folder / 'strings.db'}",
            "string_redis": variables["HT_FEAST_REDIS"].replace("db=0", "db=1"),
        }
        told = run("read", [sys.executable, "-W", "ignore", "-c", READ], question)
        (folder / "empty" / "releases").mkdir(parents=True)
        feast("refused", "apply", HT_REGISTRY=str(folder / "empty"))
        with connect(server.url.removesuffix("0") + "1") as strings:
            string_hashes = {user: strings.hgetall(layout.redis_key(user)) for user in question["strings"]}
        answer = json.loads(told.splitlines()[-1]) if told.strip() else {}
        yield Stage(server.url, outputs, incremental, published, answer, string_hashes)


def check(stage: Stage, name: str) -> None:
    done = stage.outputs[name]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def stored(stage: Stage, user_id: int) -> dict[bytes, bytes]:
    with redis.Redis.from_url(stage.url, socket_timeout=5) as client:
        return client.hgetall(layout.redis_key(user_id))


def test_apply_works_before_any_run(stage: Stage) -> None:
    check(stage, "apply")
    check(stage, "read")
    assert stage.answer["views"] == [layout.view_name(version) for version in (SERVING, NEXT, *CODECS)]
    types = dict.fromkeys((SERVING, NEXT), "Array(Float32)") | dict.fromkeys(CODECS, "Bytes")
    assert stage.answer["types"] == {layout.view_name(version): name for version, name in types.items()}
    assert stage.answer["service"] == [VIEW]


def test_incremental_rows_are_our_bytes(stage: Stage) -> None:
    check(stage, "incremental")
    for user in (1, 2, 3, -4):
        assert stage.incremental[user] == layout.encode_row(row_of(user, DAY_1_S), VIEW)
        values = [stage.incremental[user][field] for field in layout.row_fields(VIEW)]
        assert layout.decode_row(values) == row_of(user, DAY_1_S)
    assert stage.incremental[7] == {}


def test_materialize_takes_the_latest_committed_run(stage: Stage) -> None:
    check(stage, "materialize")
    for user, as_of_s in {1: DAY_1_S, 2: DAY_2_S, -4: DAY_1_S, 7: DAY_2_S}.items():
        assert stored(stage, user) == layout.encode_row(row_of(user, as_of_s), VIEW)


def test_stock_feast_reads_what_we_published(stage: Stage) -> None:
    assert stage.published == PublishCounts(written=3 + 2 * len(CODECS))
    check(stage, "read")
    online = stage.answer["online"]
    expected = {1: DAY_1_S, 2: DAY_2_S, 3: DAY_2_S, -4: DAY_1_S, 7: DAY_2_S, 100: DAY_2_S, -101: DAY_2_S}
    for place, user in enumerate(online["user_id"]):
        if user == 999:
            assert online["state"][place] is None
            continue
        row = row_of(user, expected[user])
        assert np.array(online["state"][place], np.float32).tobytes() == row.state.tobytes()
        assert online["state_version"][place] == SERVING
        assert online["history_until"][place] == row.history_until_us
        assert online["encoded_at"][place] == row.encoded_at_us


@pytest.mark.parametrize("version", CODECS)
def test_states_by_a_codec_are_the_same_bytes_both_ways(stage: Stage, version: str) -> None:
    """21 was materialized by Feast, 22 by Feast and then by us, 23 by us; 1 has no such state."""
    check(stage, "read")
    codec, view = CODECS[version], layout.view_name(version)
    online = stage.answer["blobs"][view]
    assert online["state"][3] is None
    for place, (user, as_of_s) in enumerate({21: DAY_1_S, 22: DAY_2_S, 23: DAY_2_S}.items()):
        row = row_of(user, as_of_s, version)
        fields = layout.encode_row(row, view, codec)
        kept = stored(stage, user)
        assert {field: kept[field] for field in fields} == fields
        found = layout.decode_row([kept[field] for field in layout.row_fields(view)], codec)
        assert found == replace(row, state=as_stored(codec, row.state[None])[0])
        assert bytes.fromhex(online["state"][place]) == codec.encode(row.state[None]).tobytes()
        assert online["history_until"][place] == row.history_until_us


def test_string_ids(stage: Stage) -> None:
    check(stage, "read")
    for place, user in enumerate(stage.answer["strings"]["user_id"]):
        row = row_of(user, DAY_1_S)
        assert stage.string_hashes[user] == layout.encode_row(row, VIEW)
        assert stage.answer["strings"]["history_until"][place] == row.history_until_us


def test_apply_on_an_empty_registry_refuses(stage: Stage) -> None:
    done = stage.outputs["refused"]
    assert done.returncode != 0
    assert "holds no release" in done.stdout + done.stderr
    assert stored(stage, 1)
