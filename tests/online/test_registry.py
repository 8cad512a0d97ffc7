"""Following the pointer: what is loaded, what is refused, and what stays."""

import json
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from model.errors import CheckpointError, GoldenMismatch
from model.item_index import ItemIndex
from model.release import Pointer, Registry
from online import registry as following
from online.registry import Follower, load_release
from online.residents import Loaded, ResidentSet, Role
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


# Items


def test_a_release_brings_its_items(world: World) -> None:
    world.write_items(world.a, world.b)
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.registry.commit(world.b.release_id)
    watched.follower.refresh()
    residents = watched.changes[0].residents
    assert [(r.role, r.index.embedding_version) for r in residents if r.index is not None] == [
        (Role.SERVING, world.b.embedding_version),
        (Role.PREVIOUS, world.a.embedding_version),
    ]
    watched.registry.rollback()
    watched.follower.refresh()
    assert watched.changes[1].residents[0].index is residents[1].index, "loaded once"
    assert watched.refusals == []


def test_missing_items_are_looked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the release serves; they come without loading the release again."""
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    (first,) = watched.changes
    assert first.serving.index is None
    assert watched.refusals == [], "a snapshot that is not there yet is nothing wrong"
    monkeypatch.setattr(following, "monotonic", lambda: following._RETRY_AFTER_S + 1e9)
    watched.follower.refresh()
    assert len(watched.changes) == 1, "nothing new, nothing told"
    world.write_items(world.a)
    monkeypatch.setattr(following, "monotonic", lambda: 2 * following._RETRY_AFTER_S + 1e9)
    watched.follower.refresh()
    assert watched.changes[1].serving.index is not None
    assert watched.changes[1].serving.head is first.serving.head
    assert watched.changes[1].epoch == 1


@pytest.mark.parametrize("fault", ["torn", "golden"])
def test_items_that_are_wrong_are_refused_and_the_release_serves_without(
    world: World, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write_items(world.a)
    folder = world.registry / "items" / world.a.embedding_version
    if fault == "torn":
        (folder / "items.parquet").write_bytes((folder / "items.parquet").read_bytes()[:-9])
    else:
        read = following.read_snapshot

        def shifted(registry: Registry, version: str) -> ItemIndex:
            index = read(registry, version)
            return ItemIndex(version, index.item_ids, index.item_NE + 0.01)

        monkeypatch.setattr(following, "read_snapshot", shifted)
    watched = Watched(world.registry)
    watched.registry.commit(world.a.release_id)
    watched.follower.refresh()
    assert watched.roles() == {Role.SERVING: world.a.release_id}
    assert watched.changes[0].serving.index is None
    assert watched.refusals == [(world.a.release_id, "item_index")]


# Many moves, with loading that costs nothing


class Pointers:
    """A registry that is nothing but a pointer."""

    def __init__(self) -> None:
        self.now = Pointer()

    def pointer(self) -> Pointer:
        return self.now


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_moves(built_world: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moves and fails: epochs only rise, a set is of one pointer, a change is announced before it is seen."""
    draw = random.Random(seed)
    time_s = [0.0]
    monkeypatch.setattr(following, "monotonic", lambda: time_s[0])
    manifest, head = built_world.a, built_world.oracle.releases[built_world.a.release_id]
    broken: set[str] = set()
    without_items: set[str] = set()

    def load(release_id: str) -> Loaded:
        if release_id in broken:
            raise CheckpointError(f"{release_id} is torn")
        return Loaded(replace(manifest, release_id=release_id, embedding_version=f"e-{release_id}"), head)

    def load_snapshot(version: str) -> ItemIndex | None:
        if version in without_items:
            return None
        return ItemIndex(version, pa.array([1]), torch.zeros(1, 16))

    announced: list[ResidentSet] = []
    seen: list[ResidentSet] = []

    def announce(residents: ResidentSet) -> None:
        assert follower.current is (seen[-1] if seen else None), "announced before it is seen"
        announced.append(residents)

    pointers = Pointers()
    follower = Follower(
        pointers,  # type: ignore[arg-type]
        before_change=announce,
        on_change=seen.append,
        load=load,
        load_snapshot=load_snapshot,
    )
    names = [f"r{n}" for n in range(5)]
    for _ in range(1000):
        match draw.randrange(5):
            case 0 | 1:
                epoch = pointers.now.epoch + draw.choice([1, 1, 1, 2, -1])
                serving, prepared, previous = (draw.choice(names) for _ in range(3))
                pointers.now = Pointer(max(1, epoch), serving, draw.choice([None, prepared]), previous)
            case 2:
                broken ^= {draw.choice(names)}
            case 3:
                without_items ^= {f"e-{draw.choice(names)}"}
            case _:
                time_s[0] += 11.0
        before = follower.pointer.epoch
        follower.refresh()
        assert follower.pointer.epoch >= before
        current = follower.current
        if current is not None:
            named = {Role.SERVING: follower.pointer.serving, Role.PREVIOUS: follower.pointer.previous,
                     Role.PREPARED: follower.pointer.prepared}  # fmt: skip
            assert current.epoch == follower.pointer.epoch
            assert all(named[r.role] == r.release_id for r in current.residents)
            assert current.serving.release_id == follower.pointer.serving
            assert all(r.index is None or r.index.embedding_version == r.embedding_version for r in current.residents)
    assert announced == seen
    assert len(seen) > 50
