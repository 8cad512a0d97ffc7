"""Proto to records and back. Whatever arrives is checked here once; what passes is what the loaded releases declare.

Replies are written as bytes: a float array is already what protobuf wants on the wire, and all that repeats from
request to request (release, epoch, versions, answer, reason) is encoded once and spliced.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from time import monotonic

import numpy as np

from model.errors import ConfigError
from model.records import Context, Event, Id, SubjectItem
from model.retrieval.rules import Plan
from online.engine import Answered, Request, Retrieved
from online.errors import RequestError
from online.generated import tower_pb2 as pb
from online.guard import Answer
from online.items import Wishes
from online.residents import ResidentSet

MAX_ROWS = 1024
"""Most requests in one EmbedBatch."""
MAX_ITEMS = 1000
"""Most items of one Retrieve."""
DEFAULT_ITEMS = 100
MAX_WINDOW = 10_000
"""Most candidates that exploration draws from."""
MAX_EXCLUDED = 10_000
"""Most seen and blocked items of one Retrieve."""
MAX_BID_POWER = 10.0
MAX_SESSION_EVENTS = 1000
MAX_SUBJECT_ITEMS = 100
MAX_TEXT = 1024
"""Most characters of a string id, an event type or a context value."""

_ID_FIELDS = {"int64": "int_id", "string": "string_id"}


def read_request(
    message: pb.EmbedRequest, residents: ResidentSet, *, deadline: float, strict_by_default: bool
) -> Request:
    """A checked request. deadline: seconds of `time.monotonic`.

    Raises RequestError, which names the field, what was wanted and what was found.
    """
    description = residents.description
    user_id = _read_id(message.user_id, description.user_id_type, "user_id")
    if message.policy == pb.POLICY_UNSPECIFIED:
        strict = strict_by_default
    elif message.policy in (pb.POLICY_COLD_START, pb.POLICY_STRICT):
        strict = message.policy == pb.POLICY_STRICT
    else:
        raise RequestError(f"policy: wanted POLICY_COLD_START or POLICY_STRICT, got {message.policy}")
    return Request(
        user_id=user_id,
        context=_read_context(message.context, residents) if message.HasField("context") else _EMPTY,
        deadline=deadline,
        strict=strict,
        expected_embedding_version=message.expected_embedding_version,
        accept_previous=message.accept_previous_release,
    )


def read_plan(message: pb.RetrieveRequest) -> Plan:
    """How many items are asked for, under which caps. Raises RequestError."""
    if not 0 <= message.k <= MAX_ITEMS:
        raise RequestError(f"k: wanted 1 to {MAX_ITEMS}, or 0 for {DEFAULT_ITEMS}, got {message.k}")
    if not 0 <= message.exploration_window <= MAX_WINDOW:
        raise RequestError(f"exploration_window: wanted 0 to {MAX_WINDOW}, got {message.exploration_window}")
    try:
        return Plan(
            k=message.k or DEFAULT_ITEMS,
            advertiser_cap=message.advertiser_cap if message.HasField("advertiser_cap") else None,
            category_cap=message.category_cap if message.HasField("category_cap") else None,
            exploration_share=message.exploration_share,
            exploration_window=message.exploration_window,
        )
    except ConfigError as error:
        raise RequestError(str(error)) from None


def read_wishes(message: pb.RetrieveRequest, item_id_type: str) -> Wishes:
    """What is wanted of items; whether the answering release knows such values is seen later. Raises RequestError."""
    excluded = len(message.seen) + len(message.blocked)
    if excluded > MAX_EXCLUDED:
        raise RequestError(f"seen and blocked: at most {MAX_EXCLUDED} items together, got {excluded}")
    if not 0 <= message.bid_power <= MAX_BID_POWER:  # NaN too
        raise RequestError(f"bid_power: wanted a number in [0, {MAX_BID_POWER:g}], got {message.bid_power}")
    if not 0 <= message.min_budget < math.inf:
        raise RequestError(f"min_budget: wanted a finite number, at least 0, got {message.min_budget}")
    return Wishes(
        required={name: _values(values) for name, values in message.required.items()},
        forbidden={name: _values(values) for name, values in message.forbidden.items()},
        ranges={name: _range(name, span) for name, span in message.ranges.items()},
        min_budget=message.min_budget,
        excluded=(
            *(_read_id(item, item_id_type, "seen") for item in message.seen),
            *(_read_id(item, item_id_type, "blocked") for item in message.blocked),
        ),
        bid_power=message.bid_power,
        seed=message.seed,
    )


def _values(message: pb.Values) -> list[str | int]:
    return [*message.names, *message.bits]


def _range(name: str, message: pb.Range) -> tuple[float, float]:
    least = message.least if message.HasField("least") else -math.inf
    most = message.most if message.HasField("most") else math.inf
    if not least <= most:  # NaN too
        raise RequestError(f"ranges[{name!r}]: wanted least at most as large as most, got {least} and {most}")
    return least, most


_EMPTY = Context()


def _read_id(message: pb.Id, wanted: str, name: str) -> Id:
    kind = message.WhichOneof("kind")
    if kind != _ID_FIELDS[wanted]:
        raise RequestError(f"{name}: the releases declare {wanted} ids, wanted {_ID_FIELDS[wanted]}, got {kind}")
    if kind == "int_id":
        return message.int_id
    return _text(message.string_id, name)


def _text(value: str, name: str) -> str:
    if len(value) > MAX_TEXT:
        raise RequestError(f"{name}: at most {MAX_TEXT} characters, got {len(value)}")
    return value


def _read_context(message: pb.Context, residents: ResidentSet) -> Context:
    features: dict[str, str] = dict(message.features)
    for name, value in features.items():
        if name not in residents.context_columns:
            known = ", ".join(sorted(residents.context_columns)) or "none"
            raise RequestError(f"context.features: {name!r} is not declared; the loaded releases know: {known}")
        _text(value, f"context.features[{name!r}]")
    session: tuple[Event, ...] = ()
    if message.session_events:
        session = _read_session(message.session_events, residents.description.item_id_type)
    subjects: tuple[SubjectItem, ...] = ()
    if message.subject_items:
        subjects = _read_subjects(message.subject_items, residents.description.item_id_type)
    query = None
    if message.query_vector:
        query = np.array(message.query_vector, np.float32)
        if len(query) not in residents.query_dims:
            wanted = " or ".join(str(dim) for dim in sorted(residents.query_dims))
            raise RequestError(f"context.query_vector: wanted {wanted} values, got {len(query)}")
        if not np.isfinite(query).all():
            raise RequestError("context.query_vector: every value must be finite")
    time_us = message.timestamp_us if message.HasField("timestamp_us") else None
    return Context(features, time_us, session, subjects, query)


def _read_session(messages: Sequence[pb.SessionEvent], id_type: str) -> tuple[Event, ...]:
    if len(messages) > MAX_SESSION_EVENTS:
        raise RequestError(f"context.session_events: at most {MAX_SESSION_EVENTS}, got {len(messages)}")
    events = tuple(
        Event(
            _read_id(message.item_id, id_type, "context.session_events.item_id"),
            _text(message.event_type, "context.session_events.event_type"),
            message.timestamp_us,
        )
        for message in messages
    )
    for before, after in pairwise(events):
        if after.timestamp_us < before.timestamp_us:
            raise RequestError(
                f"context.session_events: wanted oldest first, got {after.timestamp_us} after {before.timestamp_us}"
            )
    return events


def _read_subjects(messages: Sequence[pb.SubjectItem], id_type: str) -> tuple[SubjectItem, ...]:
    if len(messages) > MAX_SUBJECT_ITEMS:
        raise RequestError(f"context.subject_items: at most {MAX_SUBJECT_ITEMS}, got {len(messages)}")
    subjects = []
    for message in messages:
        confidence = message.confidence if message.HasField("confidence") else 1.0
        if not 0.0 <= confidence <= 1.0:  # NaN too
            raise RequestError(f"context.subject_items.confidence: wanted a number in [0, 1], got {confidence}")
        subjects.append(SubjectItem(_read_id(message.item_id, id_type, "context.subject_items.item_id"), confidence))
    return tuple(subjects)


def write_reply(answered: Answered) -> bytes:
    """A serialised EmbedReply."""
    resident = answered.resident
    floats = answered.embedding_E.astype("<f4", copy=False).tobytes()
    fixed = _fixed_part(
        len(floats),
        resident.release_id,
        answered.epoch,
        resident.state_version,
        resident.embedding_version,
        answered.answer,
        answered.reason,
    )
    return fixed + floats + _STATE_AGE + _varint(answered.state_age_us)


def write_retrieved(retrieved: Retrieved) -> bytes:
    """A serialised RetrieveReply."""
    answered, found = retrieved.answered, retrieved.found
    resident = answered.resident
    reply = pb.RetrieveReply(
        release_id=resident.release_id,
        epoch=answered.epoch,
        state_version=resident.state_version,
        embedding_version=resident.embedding_version,
        state_age_us=answered.state_age_us,
        answer=_ANSWERS[answered.answer],
        reason=answered.reason,
        index_embedding_version=found.embedding_version,
        index_revision=found.revision,
    )
    if found.counted is not None:
        reply.counts_since_us, reply.counts_until_us = found.counted.since_us, found.counted.until_us
        reply.counts_are_short = found.counts_are_short
    for item_id, score in zip(found.item_ids, found.score_K.tolist(), strict=True):
        item = reply.items.add(score=score)
        if isinstance(item_id, str):
            item.item_id.string_id = item_id
        else:
            item.item_id.int_id = item_id
    return reply.SerializeToString()


_EMBEDDING = pb.EmbedReply.EMBEDDING_FIELD_NUMBER << 3 | 2
_STATE_AGE = bytes([pb.EmbedReply.STATE_AGE_US_FIELD_NUMBER << 3])


_ANSWERS = {
    Answer.EXACT: pb.ANSWER_EXACT,
    Answer.PREVIOUS_RELEASE: pb.ANSWER_PREVIOUS_RELEASE,
    Answer.COLD_START: pb.ANSWER_COLD_START,
    Answer.BRIDGED: pb.ANSWER_BRIDGED,
}


@lru_cache(maxsize=1024)
def _fixed_part(
    size: int, release_id: str, epoch: int, state_version: str, embedding_version: str, answer: Answer, reason: str
) -> bytes:
    """All that stands before the packed floats; fields of a message may come in any order."""
    reply = pb.EmbedReply(
        release_id=release_id,
        epoch=epoch,
        state_version=state_version,
        embedding_version=embedding_version,
        answer=_ANSWERS[answer],
        reason=reason,
    )
    return reply.SerializeToString() + bytes([_EMBEDDING]) + _varint(size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_REPLY_IN_ROW = bytes([pb.EmbedBatchRow.REPLY_FIELD_NUMBER << 3 | 2])
_ROW = bytes([pb.EmbedBatchReply.ROWS_FIELD_NUMBER << 3 | 2])


def write_batch(rows: Sequence[bytes | tuple[int, str]]) -> bytes:
    """A serialised EmbedBatchReply. rows: a serialised EmbedReply, or (status code, message) of a failed row."""
    parts = []
    for row in rows:
        if isinstance(row, bytes):
            data = _REPLY_IN_ROW + _varint(len(row)) + row
        else:
            code, message = row
            data = pb.EmbedBatchRow(error=pb.RowError(code=code, message=message)).SerializeToString()
        parts += [_ROW, _varint(len(data)), data]
    return b"".join(parts)


def deadline_after(time_remaining_s: float | None, default_s: float) -> float:
    """When a request must be answered, in seconds of `time.monotonic`; without a deadline, the default."""
    if time_remaining_s is None or not math.isfinite(time_remaining_s) or time_remaining_s > _FOREVER_S:
        time_remaining_s = default_s
    return monotonic() + time_remaining_s


_FOREVER_S = 86_400.0
"""gRPC says "no deadline" with a time centuries away."""
