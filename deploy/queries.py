"""What the demo asks the service: real users, at times when they really came, with what was known at that moment."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deploy.report import Answers, Example, Latency, Suggestion
from model.dataset import DatasetDescription
from model.event_log import list_files, offsets_of, read_items, show_time
from model.records import Context, Event, Id, SubjectItem
from model.release import Release
from online.client import Embedding, EmbedQuery, UserTowerClient

BATCH = 512
_HOUR_US = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Cut:
    """A log divided at the time of the states."""

    events: pa.Table
    """All events, canonical, by user in event order."""
    users: pa.Table | None
    description: DatasetDescription
    as_of_us: int
    """The states know events up to here."""
    until_us: int
    """Requests come from events before this time."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and the item that its user took next where the log tells."""

    user_id: Id
    context: Context
    next_item: Id | None


def requests_from(cut: Cut, count: int, session_limit: int, seed: int = 0) -> list[Request]:
    """`count` requests, at most as many as there are, in random order.

    Of a log split by time: each just before a positive event later than the states, with that event's own context and
    the user's events since the states as session. Otherwise: users of the log at its end, with no session.
    """
    rng = np.random.default_rng(seed)
    description = cut.description
    if description.evaluation.split != "time":
        users = pc.unique(cut.events["user_id"])
        picked = users.take(pa.array(rng.permutation(len(users))[:count]))
        features = _user_features(cut, picked)
        return [Request(user, Context(features[i], cut.as_of_us), None) for i, user in enumerate(picked.to_pylist())]
    when = cut.events["timestamp_us"].to_numpy()
    later = cut.events.filter(pa.array((when > cut.as_of_us) & (when < cut.until_us))).combine_chunks()
    positive = pc.is_in(later["event_type"], pa.array(description.positive_types, pa.string())).to_numpy()
    rows = rng.permutation(np.flatnonzero(positive))[:count]
    _, offsets = offsets_of(later["user_id"])
    first = np.maximum(offsets[np.searchsorted(offsets, rows, side="right") - 1], rows - session_limit)
    asked = later.take(pa.array(rows)).to_pylist()
    users = pa.array([row["user_id"] for row in asked], description.user_id_arrow)
    features = _user_features(cut, users)
    requests = []
    for i, row in enumerate(asked):
        earlier = later.slice(int(first[i]), int(rows[i] - first[i])).to_pylist()
        session = tuple(Event(event["item_id"], event["event_type"], event["timestamp_us"]) for event in earlier)
        known = {name: row[name] for name in description.context_columns if row[name] is not None}
        context = Context(known | features[i], row["timestamp_us"], session)
        requests.append(Request(row["user_id"], context, row["item_id"]))
    return requests


def _user_features(cut: Cut, users: pa.Array) -> list[dict[str, str]]:
    names = cut.description.user_columns
    if cut.users is None or not names:
        return [{} for _ in users]
    rows = cut.users.select(list(names)).take(pc.index_in(users, value_set=cut.users["user_id"].combine_chunks()))
    return [{name: value for name, value in row.items() if value is not None} for row in rows.to_pylist()]


def ask(client: UserTowerClient, requests: Sequence[Request]) -> tuple[list[Embedding | None], NDArray[np.float64]]:
    """One after another, with their context: replies (None where one failed) and times in milliseconds."""
    replies: list[Embedding | None] = []
    times = np.zeros(len(requests))
    for i, request in enumerate(requests):
        started = time.perf_counter()
        try:
            replies.append(client.embed(request.user_id, request.context))
        except grpc.RpcError:
            replies.append(None)
        times[i] = 1e3 * (time.perf_counter() - started)
    return replies, times


def ask_together(
    client: UserTowerClient, requests: Sequence[Request], concurrency: int
) -> tuple[NDArray[np.float64], float, int]:
    """The same from several threads: times in milliseconds of those answered, seconds in all, and how many failed."""
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        parts = list(pool.map(lambda i: ask(client, requests[i::concurrency]), range(concurrency)))
    elapsed = time.perf_counter() - started
    answered = [np.array([reply is not None for reply in replies], bool) for replies, _ in parts]
    times = [times[good] for (_, times), good in zip(parts, answered, strict=True)]
    return np.concatenate(times), elapsed, len(requests) - sum(map(len, times))


def ask_in_batches(client: UserTowerClient, queries: Sequence[EmbedQuery]) -> tuple[list[Embedding | None], float]:
    """In calls of BATCH users: replies (None where one failed), and the median time of a call in milliseconds."""
    replies: list[Embedding | None] = []
    times = []
    for start in range(0, len(queries), BATCH):
        part = queries[start : start + BATCH]
        started = time.perf_counter()
        rows = client.embed_batch(part)
        times.append(1e3 * (time.perf_counter() - started))
        replies += [row if isinstance(row, Embedding) else None for row in rows]
    return replies, float(np.median(times)) if times else 0.0


def measure_latency(
    client: UserTowerClient, requests: Sequence[Request], concurrency: int = 4
) -> tuple[list[Embedding | None], Latency]:
    """Replies to the requests, and how long they took alone, together and in batches."""
    ask(client, requests[:50])  # connections, caches
    replies, single_ms = ask(client, requests)
    good = np.array([reply is not None for reply in replies], bool)
    concurrent_ms, concurrent_s, failed = ask_together(client, requests, concurrency)
    batch = [EmbedQuery(request.user_id, request.context) for request in requests[:BATCH]]
    _, batch_ms = ask_in_batches(client, batch * 3 if len(batch) == BATCH else batch)
    latency = Latency(
        single_ms=single_ms[good],
        concurrent_ms=concurrent_ms,
        concurrency=concurrency,
        concurrent_s=concurrent_s,
        batch_rows=len(batch),
        batch_ms=batch_ms,
        errors=int((~good).sum()) + failed,
    )
    return replies, latency


def measure_coverage(client: UserTowerClient, cut: Cut, most: int, seed: int = 0) -> Answers:
    """How the service answers all users of the log, or `most` of them, and one who does not exist."""
    users = pc.unique(cut.events["user_id"])
    asked = users
    if len(users) > most:
        asked = users.take(pa.array(np.random.default_rng(seed).choice(len(users), most, replace=False)))
    replies, _ = ask_in_batches(client, [EmbedQuery(user) for user in asked.to_pylist()])
    kinds = Counter(("FAILED", "") if reply is None else (reply.answer, reply.reason) for reply in replies)
    stranger = client.embed(unknown_user(users, cut.description))
    return Answers(
        asked=len(asked),
        users=len(users),
        kinds=dict(kinds),
        unknown_user=f"answered {stranger.answer} ({stranger.reason or 'no reason given'})",
    )


def unknown_user(users: pa.Array, description: DatasetDescription) -> Id:
    """An id that no user has."""
    if description.user_id_type == "int64":
        highest = pc.max(users).as_py()
        return int(highest + 1 if highest < 2**63 - 1 else pc.min(users).as_py() - 1)
    name, known = "no-such-user", set(users.to_pylist())
    while name in known:
        name += "-"
    return name


def state_ages_hours(
    requests: Sequence[Request], replies: Sequence[Embedding | None], as_of_us: Sequence[int], now_us: int
) -> NDArray[np.float64]:
    """Request time minus the time of the encode, of the requests answered from a state.

    as_of_us: times of the encodes there were. now_us: about when the requests were sent. A reply counts a state's age
    from today's clock, while the requests are of the log's time; so the encode is found first.
    """
    ages = []
    for request, reply in zip(requests, replies, strict=True):
        if reply is not None and reply.answer == "EXACT" and request.context.timestamp_us is not None:
            about_us = now_us - reply.state_age_us
            encoded_at_us = min(as_of_us, key=lambda known, about=about_us: abs(known - about))  # type: ignore[misc]
            ages.append(max(0, request.context.timestamp_us - encoded_at_us) / _HOUR_US)
    return np.array(ages, np.float64)


class Catalogue:
    """The release's items: what they are called, what they score, and since when they may be shown."""

    def __init__(self, release: Release, items_uri: str) -> None:
        description = release.manifest.description
        table = read_items(items_uri, description)
        self.item_ids: list[Id] = release.featuriser.item_ids.to_pylist()
        self._row = {item: row for row, item in enumerate(self.item_ids)}
        if release.item_table is None:
            raise ValueError("the items part of the release is not loaded")
        self._vectors_NE = release.item_table[: len(self.item_ids)].cpu().numpy()
        self._born_us_N = np.full(len(self.item_ids), np.iinfo(np.int64).min)
        if "available_from_us" in table.column_names:
            born = pc.fill_null(table["available_from_us"], np.iinfo(np.int64).min).to_numpy()
            rows = [self._row.get(item, -1) for item in table["item_id"].to_pylist()]
            for row, born_us in zip(rows, born.tolist(), strict=True):
                if row >= 0:
                    self._born_us_N[row] = born_us
        self._titles = _titles(items_uri)
        shown = [name for name, kind in description.item_columns.items() if kind != "number"]
        self._details = {
            row["item_id"]: ", ".join(_words([row[name] for name in shown]))
            for row in table.select(["item_id", *shown]).to_pylist()
        }

    def name(self, item: Id) -> str:
        """Its title, or its id."""
        return self._titles.get(str(item)) or f"item {item}"

    def detail(self, item: Id) -> str:
        """Its categories."""
        return self._details.get(item, "")

    def full_name(self, item: Id) -> str:
        """Both."""
        detail = self.detail(item)
        return f"{self.name(item)} ({detail})" if detail else self.name(item)

    def scores(self, vectors_BE: NDArray[np.float32], time_us_B: Sequence[int]) -> NDArray[np.float32]:
        """f32 [B, N]; -inf for items that are not available yet."""
        score_BN: NDArray[np.float32] = vectors_BE @ self._vectors_NE.T
        score_BN[self._born_us_N[None] > np.array(time_us_B)[:, None]] = -np.inf
        return score_BN

    def rows(self, items: Sequence[Id]) -> list[int]:
        """Of the items that the catalogue has."""
        return [self._row[item] for item in items if item in self._row]

    def rank(self, score_N: NDArray[np.float32], item: Id) -> int | None:
        """1 is best; None for an item that the catalogue lacks or that is excluded."""
        row = self._row.get(item)
        return None if row is None or score_N[row] == -np.inf else int((score_N > score_N[row]).sum()) + 1


def _titles(items_uri: str) -> dict[str, str]:
    titles: dict[str, str] = {}
    for path in list_files(items_uri):
        if "title" in pq.read_schema(path).names:
            table = pq.read_table(path, columns=["item_id", "title"])
            titles |= {str(row["item_id"]): str(row["title"]) for row in table.to_pylist() if row["title"] is not None}
    return titles


def _words(values: Sequence[Any]) -> list[str]:
    words: list[str] = []
    for value in values:
        words += value if isinstance(value, list) else [] if value is None else [value]
    return [word for word in words if word]


def hit_rates(
    catalogue: Catalogue,
    requests: Sequence[Request],
    without: Sequence[Embedding | None],
    with_context: Sequence[Embedding | None],
    k: int,
) -> tuple[int, float, float] | None:
    """Over the requests answered both ways from a state: how many, and how often the item taken next was among the
    first k without context and with it. None where the log does not tell what came next."""
    pairs = [
        (request, plain, rich)
        for request, plain, rich in zip(requests, without, with_context, strict=True)
        if request.next_item is not None and plain is not None and rich is not None and rich.answer == "EXACT"
    ]
    if not pairs:
        return None
    hits = np.zeros(2)
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
        when = [request.context.timestamp_us or 0 for request, _, _ in part]
        for side, place in enumerate((1, 2)):
            score_BN = catalogue.scores(np.stack([pair[place].vector for pair in part]), when)  # type: ignore[union-attr]
            for score_N, (request, _, _) in zip(score_BN, part, strict=True):
                rank = catalogue.rank(score_N, request.next_item)  # type: ignore[arg-type]
                hits[side] += rank is not None and rank <= k
    return len(pairs), float(hits[0] / len(pairs)), float(hits[1] / len(pairs))


def pick_examples(requests: Sequence[Request], replies: Sequence[Embedding | None], count: int = 3) -> list[int]:
    """The first requests of different users answered from a state; those with a session of two events first."""
    exact = [i for i, reply in enumerate(replies) if reply is not None and reply.answer == "EXACT"]
    exact.sort(key=lambda i: len(requests[i].context.session_events) < 2)  # stable
    users: dict[Id, int] = {}
    for i in exact:
        users.setdefault(requests[i].user_id, i)
    return list(users.values())[:count]


def history_of(cut: Cut, user_id: Id) -> list[Id]:
    """The user's items up to the as-of time, latest first."""
    mine = cut.events.filter(pc.equal(cut.events["user_id"], pa.scalar(user_id, cut.description.user_id_arrow)))
    known = mine.filter(pc.less_equal(mine["timestamp_us"], cut.as_of_us))
    return list(reversed(known["item_id"].to_pylist()))


def with_subject(request: Request, history: Sequence[Id]) -> Request:
    """For a log that does not go on: the user looks at the last item again."""
    context = request.context
    subject = Context(context.features, context.timestamp_us, subject_items=(SubjectItem(history[0]),))
    return Request(request.user_id, subject, None)


def describe_example(
    cut: Cut,
    catalogue: Catalogue,
    request: Request,
    without: Embedding,
    with_context: Embedding,
    *,
    hide_seen: bool,
    top: int = 5,
) -> Example:
    """What this user was recommended with and without the context. hide_seen: leave out what the user had before."""
    history = history_of(cut, request.user_id)
    context = request.context
    session = [event.item_id for event in context.session_events]
    when = context.timestamp_us or cut.as_of_us
    score_BN = catalogue.scores(np.stack([without.vector, with_context.vector]), [when, when])
    if hide_seen:
        seen = [item for item in (*history, *session) if item != request.next_item]
        score_BN[:, catalogue.rows(seen)] = -np.inf

    def best(score_N: NDArray[np.float32]) -> list[Suggestion]:
        rows = [row for row in np.argsort(-score_N)[:top] if score_N[row] > -np.inf]
        items = [catalogue.item_ids[row] for row in rows]
        return [
            Suggestion(name=catalogue.name(i), detail=catalogue.detail(i), hit=i == request.next_item) for i in items
        ]

    said = [", ".join(f"{name} {value}" for name, value in context.features.items())] if context.features else []
    said += [
        f"{_ago(when - event.timestamp_us)}: {catalogue.full_name(event.item_id)}, {event.event_type}"
        for event in context.session_events[:-5:-1]
    ]
    said += [f"and {len(session) - 4} earlier"] if len(session) > 4 else []
    said += [f"looking at {catalogue.full_name(subject.item_id)}" for subject in context.subject_items]
    outcome = f"Answered {with_context.answer}."
    if request.next_item is not None:
        ranks = [catalogue.rank(score_N, request.next_item) for score_N in score_BN]
        if None in ranks:
            outcome += f" Taken next: {catalogue.full_name(request.next_item)}, which the catalogue lacks."
        else:
            outcome += (
                f" Taken next: {catalogue.full_name(request.next_item)}, at rank {ranks[0]:,} from the state only and "
                f"{ranks[1]:,} with the context, of {int((score_BN[1] > -np.inf).sum()):,} items."
            )
    return Example(
        user=str(request.user_id),
        request=f"on {show_time(when - when % 1_000_000).replace('T', ' at ').replace('Z', ' UTC')}",
        history=[catalogue.full_name(item) for item in history[:5]],
        session=said,
        without=best(score_BN[0]),
        with_context=best(score_BN[1]),
        outcome=outcome,
    )


def _ago(span_us: int) -> str:
    minutes = span_us / 60_000_000
    if minutes < 1:
        return f"{span_us // 1_000_000} s ago"
    return f"{minutes:.0f} min ago" if minutes < 100 else f"{minutes / 60:.0f} h ago"
