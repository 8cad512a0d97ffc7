"""A rollout under load, in small: the scenario of benchmarks/rollout.py, and proof that its detector detects."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rollout
from benchmarks.rollout import FIRST_DAYS, Asked, Expected, Judge, LoadPlan, Notes, Reply, Scale, Verdict, World
from deploy.redis_server import start_redis
from feature_repo import layout
from model.item_index import write_snapshot
from online import guard
from online.generated import tower_pb2 as pb
from pipelines import encode_users
from pipelines.runs import iso
from tests.online.helpers import Rows, serving

TINY = Scale(
    users=400,
    events=12_000,
    asked=100,
    singles_per_s=15.0,
    batches_per_s=4.0,
    retrieves_per_s=4.0,
    warm_up_s=0.5,
    steady_s=1.0,
    between_s=0.5,
    after_s=1.0,
    min_rows=0,
    rows_per_s=400.0,
    dailies_after=1,
    outage_s=0.5,
    pause_s=0.3,
    lag_poll_ms=1000.0,
    in_process=True,
    background=False,
)
FAST = replace(TINY, singles_per_s=200.0, batches_per_s=50.0, retrieves_per_s=50.0)


def test_nothing_is_mixed_or_lost_from_a_to_b_and_back(tmp_path: Path) -> None:
    outcome = rollout.Scenario(tmp_path, TINY).run()
    verdict, facts = outcome.verdict, outcome.facts
    assert verdict.mixed == []
    assert verdict.failed_outside.total() == 0
    assert verdict.epochs_back == 0
    assert verdict.stale == 0
    assert facts["least difference"] > 100 * rollout.TOLERANCE
    # epoch 2 commits A, 3 prepares B, 4 commits B, 5 rolls back
    assert [entry.split(": ")[1] for entry in facts["pointer"]] == ["-", "A", "A", "B", "A"]
    assert all(verdict.asked[kind] > 20 for kind in rollout.METHODS)
    assert all({3, 4, 5} <= seen for seen in verdict.epochs)
    kinds = {kind for tally in verdict.phases for kind in tally.kinds}
    assert {"A exact", "B exact", "A beside", "A cold: unknown_user", "A cold: store_unavailable"} <= kinds
    assert facts["servers end on"] == ["A", "A"]
    for name in "AB":  # B's rows are still there and as fresh, so that it could be committed again
        for what in ("rows fresh", "active users fresh"):
            fresh, wanted = facts[f"{name}: {what}"]
            assert fresh == wanted > 0
        assert facts[f"{name}: states off by at most"] < rollout.TOLERANCE
    for writer in ("zombie", "older token, other states", "an hour ahead"):
        assert facts[f"{writer}: rows changed"] == 0
    assert facts["older token, other states: refused"] > 0
    assert facts["an hour ahead: exit status of tower-encode"] == 1
    assert facts["an hour ahead, its own clock too"] == "refused by Redis's clock"
    rollout.plot(outcome, tmp_path / "rollout.svg")
    assert (tmp_path / "rollout.svg").stat().st_size < 150_000
    assert rollout.timeline(outcome).count("\n") == 1 + len(outcome.notes.phases) - 1


class Rig:
    """B serves beside A, both with rows as of the third day, on a Redis of its own."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.world: World = rollout.build(folder, TINY)
        self.asked: Asked = rollout.choose(self.world, TINY.asked)
        self.expected = Expected(self.world, self.asked)
        self.redis_url = redis_url
        registry = self.world.registry
        a, b = (one.manifest for one in (self.world.a, self.world.b))
        registry.commit(a.release_id)
        for day in range(1, FIRST_DAYS):
            self.world.open_day(day)
        self._encode(FIRST_DAYS - 1)
        registry.prepare(b.release_id)
        for one in (self.world.a, self.world.b):
            write_snapshot(registry, one)
        self.world.open_day(FIRST_DAYS)
        self._encode(FIRST_DAYS)
        registry.commit(b.release_id)

    def _encode(self, day: int) -> None:
        places = ["--registry", self.world.registry.uri, "--states", str(self.world.states)]
        flags = ["--events", str(self.world.log), "--as-of", iso(self.world.as_of_us(day)), "--shards", "4"]
        assert encode_users.main([*places, *flags, "--redis-url", self.redis_url]) == 0

    def mislabel(self) -> None:
        """A's rows stand in B's view: a writer that took the wrong name."""
        a, b = (layout.row_fields(layout.view_name(r.manifest.state_version)) for r in (self.world.a, self.world.b))
        rows = Rows(self.redis_url)
        for user in self.asked.users:
            assert isinstance(user, int)
            values = rows.redis.hmget(layout.redis_key(user), a)
            if all(values):
                rows.put(user, dict(zip(b, values, strict=True)))
        rows.close()

    def judge(self, requests: int) -> Verdict:
        """What a server of this process answers, held against what is expected."""
        notes, found = Notes(), list[Reply]()
        notes.phase(notes.before)
        with serving(Path(self.world.registry.uri), self.redis_url) as (server, _):
            targets = [f"127.0.0.1:{server.port}"]
            plan: LoadPlan = rollout.plan_load(self.asked, self.world.a.manifest.embedding_version, targets, FAST)
            for kind in rollout.METHODS:
                rollout.ask(plan, 0, kind, _StopAfter(requests), found)
        return self.judge_of().judge(found, notes, 1)

    def judge_of(self) -> Judge:
        """Of the pointers there were so far."""
        pointers = {change.pointer.epoch: change.pointer for change in self.world.registry.history()}
        names = {self.world.a.manifest.release_id: "A", self.world.b.manifest.release_id: "B"}
        return Judge(self.expected, pointers, names)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("rig")
    with start_redis(folder / "redis") as redis:
        yield Rig(folder, redis.url)


class _StopAfter(threading.Event):
    """Set after it was asked so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_epochs_that_go_back_are_counted() -> None:
    """An answer of epoch 3 is received at 2.0: sent later, pinned to 2 is a step back; sent earlier it is not."""
    pinned = [(1.0, 2.0, 3), (1.5, 2.5, 2), (2.1, 2.6, 2), (2.2, 2.7, 3)]
    assert rollout._epochs_back(pinned) == 1


def test_a_reply_of_another_run_or_vector_is_mixed(rig: Rig) -> None:
    with serving(Path(rig.world.registry.uri), rig.redis_url) as (server, _):
        plan = rollout.plan_load(rig.asked, "", [f"127.0.0.1:{server.port}"], FAST)
        found: list[Reply] = []
        rollout.ask(plan, 0, "single", _StopAfter(8), found)
    replies = [(reply, rollout._rows_of(reply)[0][0][1]) for reply in found]
    reply, row = next((reply, row) for reply, row in replies if row.answer == pb.ANSWER_EXACT)
    judge = rig.judge_of()

    def complaint() -> str:
        return judge.complaint(row, Asked.kind(reply.first, reply.variant), reply.first, reply.sent_s, reply.received_s)

    assert complaint() == ""
    right = type(row).FromString(row.SerializeToString())
    row.embedding[0] += 2e-4
    assert "off by" in complaint()
    row = type(row).FromString(right.SerializeToString())
    row.state_age_us += rollout.DAY_US
    assert "no run" in complaint()
    row = type(row).FromString(right.SerializeToString())
    row.epoch = 1  # where A served
    assert "at epoch 1" in complaint()
    row = type(row).FromString(right.SerializeToString())
    row.state_version = rig.world.a.manifest.state_version
    assert "are not those of" in complaint()


def test_items_of_another_index_or_order_are_mixed(rig: Rig) -> None:
    b = rig.world.b.manifest
    judge = rig.judge_of()
    user_E = rig.expected.cold[b.release_id, 0]
    score_N = rig.expected.items[b.release_id] @ user_E
    ids = rig.world.b.featuriser.item_ids.to_pylist()
    best = np.argsort(-score_N)[: rollout.BEST]
    items = [pb.ScoredItem(item_id=pb.Id(int_id=ids[row]), score=float(score_N[row])) for row in best]

    def complaint(items: list[pb.ScoredItem], index: str = b.embedding_version) -> str:
        reply = pb.RetrieveReply(
            items=items, release_id=b.release_id, epoch=rig.world.registry.pointer().epoch,
            state_version=b.state_version, embedding_version=b.embedding_version, index_embedding_version=index,
            answer=pb.ANSWER_COLD_START, reason="unknown_user",
        )  # fmt: skip
        return judge.complaint(reply, "plain", 0, 0.0, 0.0)

    assert complaint(items) == ""
    assert "an index of version" in complaint(items, rig.world.a.manifest.embedding_version)
    assert "not the best" in complaint(items[::-1])
    assert "not the best" in complaint(items[1:])
    swapped = [pb.ScoredItem(item_id=items[-1].item_id, score=items[0].score), *items[1:]]
    assert "do not have the scores" in complaint(swapped)


def test_without_the_version_check_the_detector_trips(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rig.judge(requests=20).mixed == []
    rig.mislabel()
    guarded = rig.judge(requests=20)
    assert guarded.mixed == []
    assert guarded.phases[0].kinds["B cold: version_mismatch"] > 0
    left = tuple(check for check in guard.CHECKS if check[1] is not guard.carries_version)
    assert len(left) == len(guard.CHECKS) - 1
    monkeypatch.setattr(guard, "CHECKS", left)
    unguarded = rig.judge(requests=20)
    # what asks for B alone meets A's rows; who wants A is answered from A's view as before
    assert len(unguarded.mixed) == unguarded.phases[0].kinds["B exact"] > 100
