"""A small typed client of the services UserTower and Recommender."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import numpy as np
from numpy.typing import NDArray

from model.records import Context, Id
from online.generated import tower_pb2 as pb

_SERVICE = "/hybridtower.v1.UserTower/"
_RECOMMENDER = "/hybridtower.v1.Recommender/"


@dataclass(frozen=True, slots=True)
class Embedding:
    """A reply of Embed."""

    vector: NDArray[np.float32]
    """f32 [E], L2-normalised."""
    answer: str
    """EXACT, PREVIOUS_RELEASE, BRIDGED or COLD_START."""
    reason: str
    """Why the serving release's stored state was not used; "" for EXACT."""
    release_id: str
    epoch: int
    state_version: str
    embedding_version: str
    state_age_us: int


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A reply of Retrieve; what it says of the embedding is as in `Embedding`."""

    item_ids: list[Id]
    """Best first."""
    scores: NDArray[np.float32]
    """f32 [K]: dot products of the user's and the items' embeddings, or what else ScoredItem.score is."""
    answer: str
    reason: str
    release_id: str
    epoch: int
    state_version: str
    embedding_version: str
    index_embedding_version: str
    """Of the index that was searched; always equal to embedding_version."""
    state_age_us: int
    index_revision: int
    """Updates the index had seen; each server counts for itself."""
    counts_since_us: int = 0
    """Of a release with live item features: the events of this span were counted."""
    counts_until_us: int = 0
    counts_are_short: bool = False
    """The span is shorter than the longest window, or ends too long ago."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What Retrieve may show, see RetrieveRequest in tower.proto; the default asks for nothing."""

    required: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    """Field (category, country, language) -> names or bits, of which an item has at least one."""
    forbidden: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Attribute -> (least, most), both included; None for an open end."""
    min_budget: float = 0.0
    seen: Sequence[Id] = ()
    blocked: Sequence[Id] = ()
    bid_power: float = 0.0
    advertiser_cap: int | None = None
    category_cap: int | None = None
    exploration_share: float = 0.0
    exploration_window: int = 0
    seed: int = 0


NO_RULES = Rules()


@dataclass(frozen=True, slots=True)
class RowError:
    """A row of EmbedBatch that failed."""

    status: grpc.StatusCode
    message: str


@dataclass(frozen=True, slots=True)
class EmbedQuery:
    """One row of EmbedBatch; the arguments of `UserTowerClient.embed`."""

    user_id: Id
    context: Context | None = None
    policy: str | None = None
    expected_embedding_version: str = ""
    accept_previous_release: bool = False


_POLICIES = {None: pb.POLICY_UNSPECIFIED, "cold_start": pb.POLICY_COLD_START, "strict": pb.POLICY_STRICT}
_ANSWERS = {
    pb.ANSWER_EXACT: "EXACT",
    pb.ANSWER_PREVIOUS_RELEASE: "PREVIOUS_RELEASE",
    pb.ANSWER_COLD_START: "COLD_START",
    pb.ANSWER_BRIDGED: "BRIDGED",
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class UserTowerClient:
    """Calls one server over one channel; safe to use from several threads.

    Errors arrive as grpc.RpcError with the status codes listed in tower.proto.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """target: host:port. timeout_s: deadline of each call, None for the server's. credentials: TLS where given."""
        if credentials is None:
            self.channel = grpc.insecure_channel(target)
        else:
            self.channel = grpc.secure_channel(target, credentials)
        self._timeout_s = timeout_s
        self._embed = self.channel.unary_unary(
            _SERVICE + "Embed", pb.EmbedRequest.SerializeToString, pb.EmbedReply.FromString
        )
        self._embed_batch = self.channel.unary_unary(
            _SERVICE + "EmbedBatch", pb.EmbedBatchRequest.SerializeToString, pb.EmbedBatchReply.FromString
        )
        self._retrieve = self.channel.unary_unary(
            _RECOMMENDER + "Retrieve", pb.RetrieveRequest.SerializeToString, pb.RetrieveReply.FromString
        )

    def embed(
        self,
        user_id: Id,
        context: Context | None = None,
        *,
        policy: str | None = None,
        expected_embedding_version: str = "",
        accept_previous_release: bool = False,
    ) -> Embedding:
        """One user's embedding. policy: cold_start or strict; None for the server's default."""
        query = EmbedQuery(user_id, context, policy, expected_embedding_version, accept_previous_release)
        return _embedding(self._embed(write_query(query), timeout=self._timeout_s))

    def embed_batch(self, queries: Iterable[EmbedQuery]) -> list[Embedding | RowError]:
        """Many users in one call; a row that failed has its error in its place."""
        message = pb.EmbedBatchRequest(requests=[write_query(query) for query in queries])
        reply = self._embed_batch(message, timeout=self._timeout_s)
        return [
            _embedding(row.reply) if row.HasField("reply") else RowError(_CODES[row.error.code], row.error.message)
            for row in reply.rows
        ]

    def retrieve(
        self,
        user_id: Id,
        context: Context | None = None,
        *,
        k: int = 0,
        rules: Rules = NO_RULES,
        policy: str | None = None,
        expected_embedding_version: str = "",
        accept_previous_release: bool = False,
    ) -> Retrieval:
        """The k best items that the rules allow; 0 for the server's default. The rest is as for `embed`."""
        query = EmbedQuery(user_id, context, policy, expected_embedding_version, accept_previous_release)
        return _retrieval(self._retrieve(write_retrieve(query, k, rules), timeout=self._timeout_s))

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_query(query: EmbedQuery) -> pb.EmbedRequest:
    """The query as an EmbedRequest."""
    return pb.EmbedRequest(
        user_id=_id(query.user_id),
        context=None if query.context is None else write_context(query.context),
        policy=_POLICIES[query.policy],
        expected_embedding_version=query.expected_embedding_version,
        accept_previous_release=query.accept_previous_release,
    )


def write_retrieve(query: EmbedQuery, k: int = 0, rules: Rules = NO_RULES) -> pb.RetrieveRequest:
    """Query and rules as a RetrieveRequest."""
    return pb.RetrieveRequest(
        query=write_query(query),
        k=k,
        required={name: _values(values) for name, values in rules.required.items()},
        forbidden={name: _values(values) for name, values in rules.forbidden.items()},
        ranges={name: pb.Range(least=least, most=most) for name, (least, most) in rules.ranges.items()},
        min_budget=rules.min_budget,
        seen=map(_id, rules.seen),
        blocked=map(_id, rules.blocked),
        bid_power=rules.bid_power,
        advertiser_cap=rules.advertiser_cap,
        category_cap=rules.category_cap,
        exploration_share=rules.exploration_share,
        exploration_window=rules.exploration_window,
        seed=rules.seed,
    )


def _values(values: Sequence[str | int]) -> pb.Values:
    return pb.Values(
        names=[v for v in values if isinstance(v, str)], bits=[v for v in values if isinstance(v, int)]
    )  # fmt: skip


def write_context(context: Context) -> pb.Context:
    """The context as a message."""
    return pb.Context(
        features=dict(context.features),
        timestamp_us=context.timestamp_us,
        session_events=[
            pb.SessionEvent(item_id=_id(e.item_id), event_type=e.event_type, timestamp_us=e.timestamp_us)
            for e in context.session_events
        ],
        subject_items=[pb.SubjectItem(item_id=_id(s.item_id), confidence=s.confidence) for s in context.subject_items],
        query_vector=None if context.query_vector is None else context.query_vector.tolist(),
    )


def _id(value: Id) -> pb.Id:
    return pb.Id(string_id=value) if isinstance(value, str) else pb.Id(int_id=value)


def _embedding(reply: pb.EmbedReply) -> Embedding:
    return Embedding(
        vector=np.array(reply.embedding, np.float32),
        answer=_ANSWERS.get(reply.answer, str(reply.answer)),
        reason=reply.reason,
        release_id=reply.release_id,
        epoch=reply.epoch,
        state_version=reply.state_version,
        embedding_version=reply.embedding_version,
        state_age_us=reply.state_age_us,
    )


def _retrieval(reply: pb.RetrieveReply) -> Retrieval:
    ids = [item.item_id for item in reply.items]
    return Retrieval(
        item_ids=[i.string_id if i.WhichOneof("kind") == "string_id" else i.int_id for i in ids],
        scores=np.array([item.score for item in reply.items], np.float32),
        answer=_ANSWERS.get(reply.answer, str(reply.answer)),
        reason=reply.reason,
        release_id=reply.release_id,
        epoch=reply.epoch,
        state_version=reply.state_version,
        embedding_version=reply.embedding_version,
        index_embedding_version=reply.index_embedding_version,
        state_age_us=reply.state_age_us,
        index_revision=reply.index_revision,
        counts_since_us=reply.counts_since_us,
        counts_until_us=reply.counts_until_us,
        counts_are_short=reply.counts_are_short,
    )
