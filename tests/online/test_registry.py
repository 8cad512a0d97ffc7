"""Following the pointer: what is loaded, what is refused, and what stays."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model.errors import GoldenMismatch
from model.release import Pointer, Registry
from online.registry import Follower, load_release
from online.residents import ResidentSet, Role
from tests.online.conftest import World


class Watched:
    """A follower and what it said."""

    def __init__(self, registry: Path, **options: Any) -> None:
        self.changes: list[ResidentSet] = []
        self.refusals: list[tuple[str, str]] = []
        self.registry = Registry(registry)
        self.follower = Follower(
            self.registry,
            on_change=self.changes.append,
            on_refusal=lambda name, kind: self.refusals.append((name, kind)),
            **options,
        )

    def roles(self) -> dict[Role, str]:
        current = self.follower.current
        assert current is not None
        return {r.role: r.release_id for r in current.residents}


def set_pointer(registry: Path, pointer: Pointer) -> None:
    (registry / "SERVING").write_text(json.dumps(asdict(pointer)))


def test_nothing_committed_nothing_loaded(world: World) -> None:
    watched = Watched(world.registry)
    watched.follower.refresh()
    assert watched.follower.current is None
    assert (watched.changes, watched.refusals) == ([], [])


def test_it_follows_commits_and_rollbacks(world: World) -> None:
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    first = watched.follower.current

    watched.registry.commit(world.b.release_id)
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.b.release_id, Role.PREVIOUS: world.a.release_id}

    watched.registry.rollback()
    watched.follower.refresh()
    assert watched.roles()[Role.SERVING] == world.a.release_id
    assert [residents.epoch for residents in watched.changes] == [1, 2, 3]
    assert first is watched.changes[0]
    assert first.epoch == 1, "a set that a request has pinned must not change"
    assert first.residents[0].head is watched.changes[2].residents[0].head, "a loaded release is loaded once"


def test_a_prepared_release_is_loaded(world: World) -> None:
    watched = Watched(world.registry)
    set_pointer(world.registry, Pointer(4, serving=world.a.release_id, prepared=world.b.release_id))
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id, Role.PREPARED: world.b.release_id}


def test_a_lower_epoch_is_refused(world: World) -> None:
    watched = Watched(world.registry)
    set_pointer(world.registry, Pointer(5, serving=world.a.release_id))
    watched.follower.refresh()
    set_pointer(world.registry, Pointer(4, serving=world.b.release_id))
    watched.follower.refresh()
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    assert watched.refusals == [("", "lower_epoch")]


def test_a_release_that_fails_golden_is_refused_and_the_old_set_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    load, attempts = Registry.load, []

    def failing(self: Registry, release_id: str, **options: Any) -> Any:
        if release_id == world.b.release_id:
            attempts.append(release_id)
            raise GoldenMismatch("outputs differ here")
        return load(self, release_id, **options)

    monkeypatch.setattr(Registry, "load", failing)
    watched.registry.commit(world.b.release_id)
    watched.follower.refresh()
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    assert watched.changes[-1].epoch == 1
    assert watched.refusals == [(world.b.release_id, "golden")]
    assert len(attempts) == 1, "golden outputs do not change by trying again"

    watched.registry.rollback()  # the refused release is now the previous one
    watched.follower.refresh()
    assert watched.changes[-1].epoch == 3
    assert watched.roles() == {Role.SERVING: world.a.release_id}


def test_a_release_that_is_gone_is_refused(world: World) -> None:
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    set_pointer(world.registry, Pointer(9, serving="no-such-release"))
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    assert watched.refusals == [("no-such-release", "checkpoint")]


def test_a_head_that_cannot_be_built_is_refused(world: World) -> None:
    def make_head(release: Any) -> Any:
        raise GoldenMismatch("the serving head differs")

    registry = Registry(world.registry)
    watched = Watched(world.registry, load=partial(load_release, registry, make_head=make_head))
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    assert watched.follower.current is None
    assert watched.refusals == [(world.a.release_id, "golden")]


def test_an_unreadable_pointer_changes_nothing(world: World) -> None:
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    (world.registry / "SERVING").write_text("{torn")
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    assert watched.refusals == [("", "registry")]
