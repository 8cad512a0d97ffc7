"""Requests are checked against what the releases declare; replies are what protobuf would write."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.records import Context, Event, SubjectItem
from online import wire
from online.client import EmbedQuery, write_query
from online.engine import Answered
from online.errors import RequestError
from online.generated import tower_pb2 as pb
from online.guard import Answer
from online.residents import ResidentSet
from tests.online.conftest import World
from tests.online.helpers import residents_of


@pytest.fixture(scope="module")
def residents(built_world: World) -> ResidentSet:
    return residents_of(5, serving=built_world.oracle.releases[built_world.a.release_id])


def read(message: pb.EmbedRequest, residents: ResidentSet, **changes: Any) -> Any:
    return wire.read_request(message, residents, deadline=1.0, strict_by_default=changes.get("strict", False))


def test_a_request_arrives_as_it_was_sent(residents: ResidentSet) -> None:
    residents = replace(residents, query_dims=frozenset({2}))
    query = np.array([0.5, -1.5], np.float32)
    session = (Event(1, "click", 5), Event(2, "view", 5))
    context = Context({"device": "tv"}, 123, session, (SubjectItem(3, 0.25), SubjectItem(4)), query)
    request = read(write_query(EmbedQuery(7, context, "strict", "v", True)), residents)
    assert request.user_id == 7
    assert replace(request.context, query_vector=None) == replace(context, query_vector=None)
    np.testing.assert_array_equal(request.context.query_vector, query)
    assert (request.strict, request.expected_embedding_version, request.accept_previous) == (True, "v", True)


def test_absent_parts_stay_absent(residents: ResidentSet) -> None:
    assert read(write_query(EmbedQuery(7)), residents).context == Context()
    assert read(write_query(EmbedQuery(7, Context())), residents).context == Context()


def test_the_server_decides_where_the_request_does_not(residents: ResidentSet) -> None:
    assert read(write_query(EmbedQuery(7)), residents, strict=True).strict
    assert not read(write_query(EmbedQuery(7, policy="cold_start")), residents, strict=True).strict


ID = pb.Id(int_id=7)
BAD: list[tuple[pb.EmbedRequest, str]] = [
    (pb.EmbedRequest(), "user_id.*int64.*wanted int_id, got None"),
    (pb.EmbedRequest(user_id=pb.Id(string_id="7")), "user_id.*wanted int_id, got string_id"),
    (pb.EmbedRequest(user_id=ID, policy=9), "policy.*got 9"),  # type: ignore[arg-type]
    (pb.EmbedRequest(user_id=ID, context=pb.Context(features={"colour": "red"})), "'colour'.*know: country, device"),
    (pb.EmbedRequest(user_id=ID, context=pb.Context(features={"device": "x" * 1025})), "at most 1024"),
    (pb.EmbedRequest(user_id=ID, context=pb.Context(query_vector=[1.0])), "query_vector.*wanted 0 values, got 1"),
    (pb.EmbedRequest(user_id=ID, context=pb.Context(query_vector=[math.nan, 1.0])), "finite"),
    (
        pb.EmbedRequest(user_id=ID, context=pb.Context(session_events=[pb.SessionEvent(item_id=pb.Id(string_id="a"))])),
        "session_events.item_id.*wanted int_id",
    ),
    (
        pb.EmbedRequest(
            user_id=ID,
            context=pb.Context(
                session_events=[pb.SessionEvent(item_id=ID, timestamp_us=2), pb.SessionEvent(item_id=ID)]
            ),
        ),
        "oldest first",
    ),
    (
        pb.EmbedRequest(user_id=ID, context=pb.Context(session_events=[pb.SessionEvent(item_id=ID)] * 1001)),
        "at most 1000, got 1001",
    ),
    (
        pb.EmbedRequest(user_id=ID, context=pb.Context(subject_items=[pb.SubjectItem(item_id=ID)] * 101)),
        "at most 100, got 101",
    ),
    (
        pb.EmbedRequest(
            user_id=ID, context=pb.Context(subject_items=[pb.SubjectItem(item_id=ID, confidence=math.nan)])
        ),
        r"\[0, 1\]",
    ),
    (
        pb.EmbedRequest(user_id=ID, context=pb.Context(subject_items=[pb.SubjectItem(item_id=ID, confidence=1.5)])),
        r"\[0, 1\], got 1.5",
    ),
]


@pytest.mark.parametrize(("message", "complaint"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_told_what_was_wanted(
    residents: ResidentSet, message: pb.EmbedRequest, complaint: str
) -> None:
    if complaint == "finite":
        residents = replace(residents, query_dims=frozenset({2}))
    with pytest.raises(RequestError, match=complaint):
        read(message, residents)


@pytest.mark.parametrize("age_us", [0, 127, 128, 86_400_000_000])
def test_a_spliced_reply_reads_as_protobuf(residents: ResidentSet, age_us: int) -> None:
    vector = np.arange(100, dtype=np.float32)
    answered = Answered(vector, residents.serving, 5, Answer.COLD_START, "torn_row", age_us)
    serving = residents.serving
    wanted = pb.EmbedReply(
        embedding=vector.tolist(),
        release_id=serving.release_id,
        epoch=5,
        state_version=serving.state_version,
        embedding_version=serving.embedding_version,
        state_age_us=age_us,
        answer=pb.ANSWER_COLD_START,
        reason="torn_row",
    )
    data = wire.write_reply(answered)
    assert pb.EmbedReply.FromString(data) == wanted
    batch = pb.EmbedBatchReply.FromString(wire.write_batch([data, (9, "no"), data]))
    assert [row.WhichOneof("result") for row in batch.rows] == ["reply", "error", "reply"]
    assert batch.rows[2].reply == wanted
    assert batch.rows[1].error == pb.RowError(code=9, message="no")


def test_the_answers_have_the_numbers_of_the_proto() -> None:
    assert {answer.name: answer.value for answer in Answer} == {
        "EXACT": pb.ANSWER_EXACT,
        "PREVIOUS_RELEASE": pb.ANSWER_PREVIOUS_RELEASE,
        "COLD_START": pb.ANSWER_COLD_START,
        "BRIDGED": pb.ANSWER_BRIDGED,
    }


def test_a_request_without_a_deadline_gets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "monotonic", lambda: 100.0)
    assert wire.deadline_after(None, 0.25) == 100.25
    assert wire.deadline_after(math.inf, 0.25) == 100.25
    assert wire.deadline_after(3e8, 0.25) == 100.25
    assert wire.deadline_after(5.0, 0.25) == 105.0
