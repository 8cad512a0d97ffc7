from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.findings import capped_texts, encode_meaning, headlines, quality_meaning, set_aside
from deploy.report import Answers
from deploy.settings import Settings
from pipelines.runs import RunManifest
from tests.deploy.test_report import make_quality, make_report

SETTINGS = Settings(
    events=Path("log"), items=Path("items"), users=None, dataset=None, out=Path("out"), quick=False, minutes=None,
    record=False, keep_serving=False,
)  # fmt: skip


def make_run(previous_run: str | None = None, **counts: int) -> RunManifest:
    return RunManifest(
        run_id="20240107T000000Z", state_version="s", release_id="r", as_of_us=1_704_585_600_000_000,
        encoded_through_us=0, shards=1, previous_run=previous_run, inputs={}, files={}, libraries={},
        counts={"users": 10, "encoded": 4, "skipped": 6} | {name.replace("_", ".", 1): n for name, n in counts.items()},
    )  # fmt: skip


def test_a_run_says_what_it_did() -> None:
    assert encode_meaning(make_run(dead_future_timestamp=1500)) == (
        "First run: encoded all 4 users seen so far; states as of 2024-01-07T00:00:00Z are in Parquet and in Redis. "
        "The 1,500 events after that are left for later runs."
    )
    assert encode_meaning(make_run("20240106T000000Z")).startswith(
        "Encoded the 4 users with new events, skipped 6 idle ones; states as of"
    )


def test_users_that_cannot_be_encoded_are_among_the_set_aside() -> None:
    data = set_aside(make_report().data, [make_run(dead_poison=2), make_run(dead_poison=1, dead_duplicate=9)])
    assert data.set_aside == {"duplicate": 2, "plain": 1, "poison": 2}


def test_quality_is_told_beside_the_best_baseline() -> None:
    assert quality_meaning(make_quality()) == (
        "The item taken next is in the top 20 for 40% of 50 test events; state only 30%, "
        "what was popular in the last 3 hours 20%."
    )
    report = make_report()
    told = headlines(make_quality(), report.answers, report.latency, report.freshness)
    assert (told[0].value, told[3].value, told[4].value) == ("0.400", "75%", "40%")
    assert "popularity at best 0.200" in told[0].meaning


def capped(answers: Answers, seconds: float = 1.0, epochs: int = 10, **settings: Any) -> list[str]:
    summary = {"capped": [], "history": [{}], "settings": {"epochs": epochs}, "train_seconds": seconds}
    return capped_texts(replace(SETTINGS, **settings), summary, make_quality() | {"sampled": False}, answers)


def test_what_was_capped_is_said_and_nothing_else() -> None:
    everyone = Answers(asked=5, users=5, kinds={}, unknown_user="")
    assert capped(everyone) == []
    assert capped(everyone, seconds=360, epochs=1) == []  # it ended by itself
    (training,) = capped(everyone, seconds=350)
    assert "limit of 6 minutes, in epoch 1 of at most 10" in training
    assert len(capped(replace(everyone, asked=4), quick=True)) == 2
