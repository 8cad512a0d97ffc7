from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Policy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_UNSPECIFIED: _ClassVar[Policy]
    POLICY_COLD_START: _ClassVar[Policy]
    POLICY_STRICT: _ClassVar[Policy]

class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWER_UNSPECIFIED: _ClassVar[Answer]
    ANSWER_EXACT: _ClassVar[Answer]
    ANSWER_PREVIOUS_RELEASE: _ClassVar[Answer]
    ANSWER_COLD_START: _ClassVar[Answer]
    ANSWER_BRIDGED: _ClassVar[Answer]
POLICY_UNSPECIFIED: Policy
POLICY_COLD_START: Policy
POLICY_STRICT: Policy
ANSWER_UNSPECIFIED: Answer
ANSWER_EXACT: Answer
ANSWER_PREVIOUS_RELEASE: Answer
ANSWER_COLD_START: Answer
ANSWER_BRIDGED: Answer

class Id(_message.Message):
    __slots__ = ("int_id", "string_id")
    INT_ID_FIELD_NUMBER: _ClassVar[int]
    STRING_ID_FIELD_NUMBER: _ClassVar[int]
    int_id: int
    string_id: str
    def __init__(self, int_id: _Optional[int] = ..., string_id: _Optional[str] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("item_id", "event_type", "timestamp_us")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    item_id: Id
    event_type: str
    timestamp_us: int
    def __init__(self, item_id: _Optional[_Union[Id, _Mapping]] = ..., event_type: _Optional[str] = ..., timestamp_us: _Optional[int] = ...) -> None: ...

class SubjectItem(_message.Message):
    __slots__ = ("item_id", "confidence")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    item_id: Id
    confidence: float
    def __init__(self, item_id: _Optional[_Union[Id, _Mapping]] = ..., confidence: _Optional[float] = ...) -> None: ...

class Context(_message.Message):
    __slots__ = ("features", "timestamp_us", "session_events", "subject_items", "query_vector")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    SESSION_EVENTS_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_ITEMS_FIELD_NUMBER: _ClassVar[int]
    QUERY_VECTOR_FIELD_NUMBER: _ClassVar[int]
    features: _containers.ScalarMap[str, str]
    timestamp_us: int
    session_events: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    subject_items: _containers.RepeatedCompositeFieldContainer[SubjectItem]
    query_vector: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, features: _Optional[_Mapping[str, str]] = ..., timestamp_us: _Optional[int] = ..., session_events: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ..., subject_items: _Optional[_Iterable[_Union[SubjectItem, _Mapping]]] = ..., query_vector: _Optional[_Iterable[float]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("user_id", "context", "policy", "expected_embedding_version", "accept_previous_release")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EMBEDDING_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_PREVIOUS_RELEASE_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    context: Context
    policy: Policy
    expected_embedding_version: str
    accept_previous_release: bool
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., policy: _Optional[_Union[Policy, str]] = ..., expected_embedding_version: _Optional[str] = ..., accept_previous_release: _Optional[bool] = ...) -> None: ...

class EmbedReply(_message.Message):
    __slots__ = ("embedding", "release_id", "epoch", "state_version", "embedding_version", "state_age_us", "answer", "reason")
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_US_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    embedding: _containers.RepeatedScalarFieldContainer[float]
    release_id: str
    epoch: int
    state_version: str
    embedding_version: str
    state_age_us: int
    answer: Answer
    reason: str
    def __init__(self, embedding: _Optional[_Iterable[float]] = ..., release_id: _Optional[str] = ..., epoch: _Optional[int] = ..., state_version: _Optional[str] = ..., embedding_version: _Optional[str] = ..., state_age_us: _Optional[int] = ..., answer: _Optional[_Union[Answer, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class EmbedBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[EmbedRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[EmbedRequest, _Mapping]]] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class EmbedBatchRow(_message.Message):
    __slots__ = ("reply", "error")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reply: EmbedReply
    error: RowError
    def __init__(self, reply: _Optional[_Union[EmbedReply, _Mapping]] = ..., error: _Optional[_Union[RowError, _Mapping]] = ...) -> None: ...

class EmbedBatchReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[EmbedBatchRow]
    def __init__(self, rows: _Optional[_Iterable[_Union[EmbedBatchRow, _Mapping]]] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("names", "bits")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    bits: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., bits: _Optional[_Iterable[int]] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("least", "most")
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    least: float
    most: float
    def __init__(self, least: _Optional[float] = ..., most: _Optional[float] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("query", "k", "required", "forbidden", "ranges", "min_budget", "seen", "blocked", "bid_power", "advertiser_cap", "category_cap", "exploration_share", "exploration_window", "seed")
    class RequiredEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    class ForbiddenEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    class RangesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Range
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Range, _Mapping]] = ...) -> None: ...
    QUERY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    FORBIDDEN_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    MIN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    BID_POWER_FIELD_NUMBER: _ClassVar[int]
    ADVERTISER_CAP_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_CAP_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_SHARE_FIELD_NUMBER: _ClassVar[int]
    EXPLORATION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    query: EmbedRequest
    k: int
    required: _containers.MessageMap[str, Values]
    forbidden: _containers.MessageMap[str, Values]
    ranges: _containers.MessageMap[str, Range]
    min_budget: float
    seen: _containers.RepeatedCompositeFieldContainer[Id]
    blocked: _containers.RepeatedCompositeFieldContainer[Id]
    bid_power: float
    advertiser_cap: int
    category_cap: int
    exploration_share: float
    exploration_window: int
    seed: int
    def __init__(self, query: _Optional[_Union[EmbedRequest, _Mapping]] = ..., k: _Optional[int] = ..., required: _Optional[_Mapping[str, Values]] = ..., forbidden: _Optional[_Mapping[str, Values]] = ..., ranges: _Optional[_Mapping[str, Range]] = ..., min_budget: _Optional[float] = ..., seen: _Optional[_Iterable[_Union[Id, _Mapping]]] = ..., blocked: _Optional[_Iterable[_Union[Id, _Mapping]]] = ..., bid_power: _Optional[float] = ..., advertiser_cap: _Optional[int] = ..., category_cap: _Optional[int] = ..., exploration_share: _Optional[float] = ..., exploration_window: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class ScoredItem(_message.Message):
    __slots__ = ("item_id", "score")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    item_id: Id
    score: float
    def __init__(self, item_id: _Optional[_Union[Id, _Mapping]] = ..., score: _Optional[float] = ...) -> None: ...

class RetrieveReply(_message.Message):
    __slots__ = ("items", "release_id", "epoch", "state_version", "embedding_version", "state_age_us", "answer", "reason", "index_embedding_version", "index_revision", "counts_since_us", "counts_until_us", "counts_are_short")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_US_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    INDEX_EMBEDDING_VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_REVISION_FIELD_NUMBER: _ClassVar[int]
    COUNTS_SINCE_US_FIELD_NUMBER: _ClassVar[int]
    COUNTS_UNTIL_US_FIELD_NUMBER: _ClassVar[int]
    COUNTS_ARE_SHORT_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoredItem]
    release_id: str
    epoch: int
    state_version: str
    embedding_version: str
    state_age_us: int
    answer: Answer
    reason: str
    index_embedding_version: str
    index_revision: int
    counts_since_us: int
    counts_until_us: int
    counts_are_short: bool
    def __init__(self, items: _Optional[_Iterable[_Union[ScoredItem, _Mapping]]] = ..., release_id: _Optional[str] = ..., epoch: _Optional[int] = ..., state_version: _Optional[str] = ..., embedding_version: _Optional[str] = ..., state_age_us: _Optional[int] = ..., answer: _Optional[_Union[Answer, str]] = ..., reason: _Optional[str] = ..., index_embedding_version: _Optional[str] = ..., index_revision: _Optional[int] = ..., counts_since_us: _Optional[int] = ..., counts_until_us: _Optional[int] = ..., counts_are_short: _Optional[bool] = ...) -> None: ...
