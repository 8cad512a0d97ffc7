"""The release registry as the feature repository reads it: plain JSON, for one view per state version.

Feast drops every view that `feast apply` does not find, so a registry that is empty or cannot be read whole is an
error, never an empty list.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from model.errors import ConfigError

_REFUSAL = "Nothing was applied: Feast would drop the views it does not find"


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """What the definitions need of a release's manifest."""

    release_id: str
    state_version: str
    user_id_type: str
    state_width: int
    storage_codec: str
    """float32: the state is a list of numbers; any other: bytes."""


def read_releases(registry_uri: str) -> list[StoredRelease]:
    """The registry's releases, oldest first. Raises ConfigError where there is none, or one that cannot be read."""
    filesystem, root = fsspec.core.url_to_fs(registry_uri)
    folder = f"{root.rstrip('/')}/releases"
    filesystem.invalidate_cache()
    try:
        names = sorted(path.rstrip("/").rpartition("/")[2] for path in filesystem.ls(folder, detail=False))
    except OSError as error:
        raise ConfigError(f"cannot list the releases of {registry_uri}: {error}. {_REFUSAL}") from error
    names = [name for name in names if not name.startswith((".", "_"))]
    if not names:
        raise ConfigError(f"the release registry {registry_uri} holds no release. {_REFUSAL}")
    releases = []
    for name in names:
        path = f"{folder}/{name}/manifest.json"
        try:
            manifest = json.loads(filesystem.cat_file(path))
            releases.append(_stored_release(name, manifest))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"cannot read {path}: {type(error).__name__}: {error}. {_REFUSAL}") from error
    return releases


def _stored_release(name: str, manifest: Mapping[str, Any]) -> StoredRelease:
    if manifest["release_id"] != name:
        raise ValueError(f"its release_id is {manifest['release_id']!r}, its folder {name!r}")
    config = manifest["config"]
    return StoredRelease(
        release_id=name,
        state_version=str(manifest["state_version"]),
        user_id_type=str(manifest["description"]["user_id_type"]),
        state_width=int(config["d_model"]) * int(config.get("state_tokens", 1)),  # releases before tokens had one
        storage_codec=str(config["storage_codec"]),
    )


def serving_release(registry_uri: str, releases: list[StoredRelease]) -> StoredRelease:
    """The release the pointer names, else the latest. Raises ConfigError for a pointer to no release."""
    filesystem, root = fsspec.core.url_to_fs(registry_uri)
    try:
        pointer = json.loads(filesystem.cat_file(f"{root.rstrip('/')}/SERVING"))
        serving = pointer["serving"]
    except FileNotFoundError:
        serving = None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the serving pointer of {registry_uri}: {error}. {_REFUSAL}") from error
    if serving is None:
        return releases[-1]
    for release in releases:
        if release.release_id == serving:
            return release
    raise ConfigError(f"the serving pointer of {registry_uri} names {serving!r}, which is no release. {_REFUSAL}")
