"""What stock Feast sees: one view per state version in the release registry, over the daily job's Parquet.

`feast apply` imports this module and takes the definitions it finds, so it always mirrors the releases. It refuses
(ConfigError) rather than define nothing: Feast drops the views that an apply does not find.
The alias, FeatureService `user_state`, moves with `feast apply`, not with the flip of the serving pointer.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Bytes, Float32, Int64, String

from feature_repo.environment import FEAST_REDIS, FEAST_REGISTRY, REGISTRY, STATES
from feature_repo.layout import ENTITY, SERVICE, view_name
from feature_repo.releases import StoredRelease, read_releases, serving_release
from model.errors import ConfigError

FOREVER = timedelta(days=36_500)
"""`materialize-incremental` starts its first window this long before now; a ttl of 0 would mean one year and leave the
states of an older log out. Feast does not enforce it online: the service checks age itself."""


@dataclass(frozen=True, slots=True)
class Definitions:
    """Everything that `feast apply` registers."""

    entity: Entity
    views: tuple[FeatureView, ...]
    service: FeatureService


def define(registry_uri: str, states_uri: str) -> Definitions:
    """The entity, a view per state version, and the service for a registry and a folder of states.

    Every committed run is read: a run's folder appears whole, by one rename, so the pattern never meets half of one.
    The pattern also takes in the empty table of `write_schema_file`. Raises ConfigError.
    """
    releases = read_releases(registry_uri)
    serving = serving_release(registry_uri, releases)
    id_types = {release.user_id_type for release in releases}
    if not id_types <= {"int64", "string"} or len(id_types) > 1:
        raise ConfigError(f"the releases of {registry_uri} must share one user_id_type, int64 or string: {id_types}")
    is_int = id_types == {"int64"}
    entity = Entity(
        name=ENTITY,
        join_keys=[ENTITY],
        value_type=ValueType.INT64 if is_int else ValueType.STRING,
        description="A user of the event log.",
    )
    by_version = {release.state_version: release for release in releases}
    views = {
        version: _view(release, entity, Field(name=ENTITY, dtype=Int64 if is_int else String), states_uri)
        for version, release in by_version.items()
    }
    service = FeatureService(
        name=SERVICE,
        features=[views[serving.state_version]],
        description="The user states of the serving release, as of the last `feast apply`.",
        tags={"release_id": serving.release_id, "state_version": serving.state_version},
    )
    return Definitions(entity, tuple(views.values()), service)


def states_schema(user_id_type: str, storage_codec: str) -> pa.Schema:
    """Columns of the job's states files."""
    return pa.schema(
        [
            pa.field(ENTITY, pa.int64() if user_id_type == "int64" else pa.string()),
            pa.field("state", pa.list_(pa.float32()) if storage_codec == "float32" else pa.binary()),
            pa.field("state_version", pa.string()),
            pa.field("history_until", pa.int64()),
            pa.field("encoded_at", pa.int64()),
            pa.field("event_timestamp", pa.timestamp("us", "UTC")),
        ]
    )


def write_schema_file(states_uri: str, release: StoredRelease) -> None:
    """An empty states table beside the runs, unless it is there.

    Without it one release that has not been encoded yet would fail `feast materialize` for all views: Feast reads the
    columns from the files the pattern finds. Raises ConfigError where the states cannot be written.
    """
    filesystem, root = fsspec.core.url_to_fs(states_uri)
    folder = f"{root.rstrip('/')}/{release.state_version}/runs.empty/schema/states"
    path = f"{folder}/shard-00000.parquet"
    try:
        if filesystem.exists(path):
            return
        sink = pa.BufferOutputStream()
        pq.write_table(states_schema(release.user_id_type, release.storage_codec).empty_table(), sink)
        filesystem.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}"
        filesystem.pipe_file(temporary, sink.getvalue().to_pybytes())
        filesystem.mv(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write the schema of {release.state_version} under {states_uri}: {error}") from error


def _view(release: StoredRelease, entity: Entity, entity_field: Field, states_uri: str) -> FeatureView:
    name = view_name(release.state_version)
    state_type = Array(Float32) if release.storage_codec == "float32" else Bytes
    source = FileSource(
        name=f"{name}__runs",
        path=f"{states_uri}/{release.state_version}/runs*/*/states/shard-*.parquet",
        timestamp_field="event_timestamp",
    )
    return FeatureView(
        name=name,
        entities=[entity],
        ttl=FOREVER,
        source=source,
        schema=[
            entity_field,
            Field(name="state", dtype=state_type, description=f"What the encoder leaves, as {release.storage_codec}."),
            Field(name="state_version", dtype=String),
            Field(name="history_until", dtype=Int64, description="Last event seen, microseconds since the epoch."),
            Field(name="encoded_at", dtype=Int64, description="As-of time of the run, microseconds since the epoch."),
        ],
        tags={
            "state_version": release.state_version,
            "state_width": str(release.state_width),
            "storage_codec": release.storage_codec,
        },
    )


def _from_environment(environ: Mapping[str, str]) -> Definitions:
    missing = [name for name in (REGISTRY, STATES, FEAST_REDIS, FEAST_REGISTRY) if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set: run feast with the variables of `python -m feature_repo.environment`"
        )
    for name in (REGISTRY, STATES):
        if "://" not in environ[name] and not os.path.isabs(environ[name]):
            raise ConfigError(f"{name} must be an absolute path or a URI, got {environ[name]!r}")
    for release in read_releases(environ[REGISTRY]):
        write_schema_file(environ[STATES], release)
    return define(environ[REGISTRY], environ[STATES])


_definitions = _from_environment(os.environ)

# Feast finds definitions as attributes of the module.
user = _definitions.entity
user_state = _definitions.service
globals().update({view.name: view for view in _definitions.views})
