"""Leases: what each server has loaded, told to the registry, so that nothing it may still read is collected.

    <registry>/leases/<server_id>.json     rewritten every third of its life; removed when the server drains

A lease guards availability, not the promise: rows name their version, so a server whose lease has run out (paused, cut
off) finds rows missing and answers cold starts, flagged, but never mixes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.release import Registry

FOLDER = "leases"
CLOCK_SKEW_US = 300_000_000
"""How far the clocks of servers and operators may be apart. Collecting waits this much longer than a lease lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """One release that a server has loaded and may answer with."""

    release_id: str
    role: str
    """serving, prepared or previous."""
    state_version: str
    embedding_version: str
    has_items: bool
    """Whether the item index of its embedding_version is loaded too."""
    canary: str
    """passed, failed, or unknown: not yet checked, or its rows cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What one server process has loaded."""

    server_id: str
    address: str
    """host:port of the requests, for people."""
    epoch: int
    """Of the pointer the server follows."""
    releases: tuple[Leased, ...]
    written_at_us: int
    """By the server's clock."""
    expires_at_us: int

    def is_live(self, now_us: int, *, tolerance_us: int = 0) -> bool:
        """Whether the server may still be at work."""
        return now_us < self.expires_at_us + tolerance_us

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Lease":
        """The inverse of dataclasses.asdict."""
        releases = tuple(Leased(**leased) for leased in values["releases"])
        return cls(**{**values, "releases": releases})


def write_lease(registry: Registry, lease: Lease) -> None:
    """Tell the registry; replaces the server's lease before."""
    registry.put(_path(lease.server_id), json.dumps(asdict(lease)).encode())


def drop_lease(registry: Registry, server_id: str) -> None:
    """The server has loaded nothing any more."""
    registry.remove(_path(server_id))


def read_leases(registry: Registry) -> list[Lease]:
    """Every lease, run out or not, by server id. One that cannot be read is none: servers write them whole."""
    leases = []
    for name in registry.names(FOLDER):
        content = registry.get(f"{FOLDER}/{name}")
        if content is not None:
            leases.append(Lease.from_dict(json.loads(content)))
    return leases


def live_leases(registry: Registry, now_us: int, *, tolerance_us: int = 0) -> list[Lease]:
    """The leases that have not run out. tolerance_us: CLOCK_SKEW_US where something is to be removed."""
    return [lease for lease in read_leases(registry) if lease.is_live(now_us, tolerance_us=tolerance_us)]


def _path(server_id: str) -> str:
    return f"{FOLDER}/{server_id}.json"
