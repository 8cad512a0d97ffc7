"""The demo's report: plain values in, one self-contained HTML page out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.markup import Bar, Content, Curve, Markup, bars, columns, distribution, join, table, tag

_ARMS = (
    ("context", "Tower, state and context", "main"),
    ("no_context", "Tower, state only", "main"),
    ("recent_popularity", "Popular lately", "other"),
    ("popularity", "Popular overall", "other"),
)
_SLICES = (
    ("item_seen", "Items the training has seen"),
    ("item_unseen", "Items new since the training"),
    ("user_with_history", "Users with a stored state"),
    ("user_without_history", "Users without one (cold start)"),
)
_REASONS = {
    "null_user": "no user id",
    "null_item": "no item id",
    "null_timestamp": "no time, or one that cannot be read",
    "future_timestamp": "later than the end of the log asked for",
    "undeclared_event_type": "of a type that the description does not declare",
    "duplicate": "equal to an earlier row in all columns",
    "poison": "the encoder fails on this user",
    "non_finite_state": "the user's state is not finite",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the demo."""

    title: str
    commands: Sequence[str]
    seconds: float
    meaning: str
    log: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """One number at the top."""

    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The data that went in."""

    summary: str
    facts: Sequence[tuple[str, str]]
    description: str
    """The dataset description as YAML."""
    events: int
    set_aside: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """How the service answered: counts by (kind, reason), of all users and of the timed requests."""

    asked: int
    users: int
    """All users of the log."""
    kinds: Mapping[tuple[str, str], int]
    unknown_user: str
    """What was said to a user who does not exist."""

    @property
    def exact_share(self) -> float:
        """Share answered from a current state."""
        return sum(n for (kind, _), n in self.kinds.items() if kind == "EXACT") / max(1, self.asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Freshness:
    """How old the states were, and what had happened since."""

    age_hours: NDArray[np.float64]
    """Request time minus the time of the encode that wrote the state."""
    users: int
    encoded_first: int
    encoded: int
    """Users that the second run encoded: those with new events."""
    skipped: int
    session_share: float | None
    """Share of the requests that brought events newer than the state; None where none could."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of requests in milliseconds, as the client saw them."""

    single_ms: NDArray[np.float64]
    concurrent_ms: NDArray[np.float64]
    concurrency: int
    concurrent_s: float
    batch_rows: int
    batch_ms: float
    errors: int = 0

    @property
    def per_second(self) -> float:
        """Requests answered in a second of the concurrent phase."""
        return len(self.concurrent_ms) / max(self.concurrent_s, 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """One recommended item."""

    name: str
    detail: str = ""
    hit: bool = False
    """It is what the user took next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What one user was recommended."""

    user: str
    request: str
    history: Sequence[str]
    """Last items of the stored state, latest first."""
    session: Sequence[str]
    """What the context said."""
    without: Sequence[Suggestion]
    with_context: Sequence[Suggestion]
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything on the page."""

    title: str
    subtitle: str
    headlines: Sequence[Headline]
    steps: Sequence[Step]
    data: Data
    versions: Sequence[tuple[str, str]]
    quality: Mapping[str, Any]
    """The report of `tower-evaluate quality`."""
    answers: Answers
    freshness: Freshness
    latency: Latency
    examples: Sequence[Example]
    examples_note: str
    capped: Sequence[str]
    next_steps: Sequence[tuple[str, str]]
    """(what for, command)."""
    machine: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render(report: Report) -> str:
    """The page."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    parts = [
        tag("h1", report.title),
        tag("p", report.subtitle, class_="soft"),
        tag(
            "div", *(tag("div", tag("b", h.value), tag("span", h.meaning)) for h in report.headlines), class_="numbers"
        ),
        _examples(report),
        _quality(report.quality),
        _steps(report.steps),
        _data(report.data),
        _versions(report.versions),
        _freshness(report.freshness),
        _coverage(report.answers),
        _latency(report.latency),
        _capped(report.capped),
        _next(report.next_steps),
        _section("Measured on", _facts(report.machine)) if report.machine else None,
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", report.title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *parts)), lang='en')}\n"


def write(report: Report, path: Path) -> None:
    """The page as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")


def span(quality: Mapping[str, Any]) -> str:
    """The window of recent popularity."""
    hours = float(quality["recent_hours"])
    return f"{hours:g} hours" if hours < 48 else f"{hours / 24:g} days"


def percent(share: float) -> str:
    """A share for people."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 10 or value == 0 else f"{value:.1f}%" if value >= 1 else f"{value:.2g}%"


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def milliseconds(values: NDArray[np.float64], quantile: float) -> str:
    """A quantile for people."""
    return f"{np.quantile(values, quantile):.2f} ms" if len(values) else "not measured"


def _section(title: str, *content: Content) -> Markup:
    return tag("section", tag("h2", title), *content)


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in facts))


def _steps(steps: Sequence[Step]) -> Markup:
    rows: list[list[Content]] = []
    for step in steps:
        said: list[Content] = [step.meaning]
        if step.commands:
            said += [tag("br"), *(tag("code", command, class_="soft small") for command in step.commands)]
        if step.log:
            said += [tag("br"), tag("span", f"log: {step.log}", class_="soft small")]
        rows.append([tag("b", step.title), join(*said), seconds(step.seconds)])
    total = sum(step.seconds for step in steps)
    rows.append([tag("b", "In all"), "", seconds(total)])
    listed = table(["Step", "What it did and what it means", "Time"], rows, numbers=[2])
    return _section("What ran", tag("div", listed, class_="stack"))


def _data(data: Data) -> Markup:
    aside = sum(data.set_aside.values())
    if aside:
        rows = [
            [reason, _REASONS.get(reason, ""), f"{count:,}"]
            for reason, count in sorted(data.set_aside.items(), key=lambda entry: -entry[1])
        ]
        told: Content = join(
            tag("p", f"{aside:,} of {data.events + aside:,} rows were set aside, none silently:"),
            table(["Reason", "The row is", "Rows"], rows, numbers=[2]),
        )
    else:
        told = tag("p", "No row was set aside.")
    return _section(
        "The data",
        tag("p", data.summary),
        _facts(data.facts),
        tag("h3", "Rows set aside"),
        told,
        tag("details", tag("summary", "The dataset description"), tag("pre", data.description)),
    )


def _versions(versions: Sequence[tuple[str, str]]) -> Markup:
    return _section(
        "Versions",
        tag(
            "p",
            "A stored state may be read only by a head of its own state version, and an embedding searched only in an "
            "index of its own embedding version. Every row and every reply carries them.",
        ),
        _facts(versions),
    )


def _estimate(arms: Mapping[str, Any], arm: str, part: str, metric: str) -> Mapping[str, float] | None:
    found: Mapping[str, float] | None = arms.get(arm, {}).get(part, {}).get(metric)
    return found


def _known(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _quality(quality: Mapping[str, Any]) -> Markup:
    ks = list(quality["k"])
    k = 20 if 20 in ks else ks[-1]
    recall, ndcg = f"recall@{k}", f"ndcg@{k}"
    arms = quality["arms"]
    sampled = f" (drawn from {quality['test_events_total']:,})" if quality["sampled"] else ""
    split = "held-out days" if quality["split"]["split"] == "time" else "each user's last event, held out"
    out = quality.get("outside_catalogue", 0)
    intro = (
        f"{quality['test_events']:,} test events{sampled} from {split}, each ranked among all {quality['catalogue']:,} "
        f"items. Items the user had before are {quality['seen_items']}; items not yet available are "
        f"{quality['unavailable_items']}."
        + (f" {out:,} events ask for items that the catalogue lacks and count as misses." if out else "")
    )
    chart, rows = [], []
    for arm, title, tone in _ARMS:
        label = f"Popular in the last {span(quality)}" if arm == "recent_popularity" else title
        found, rank = _estimate(arms, arm, "all", recall), _estimate(arms, arm, "all", ndcg)
        if found is None or rank is None:
            continue
        value = found["value"]
        low, high = _known(found["low"]), _known(found["high"])
        chart.append(Bar(label=label, value=value, text=f"{value:.3f}", low=low, high=high, tone=tone))
        rows.append([label, _interval(found), _interval(rank)])
    parts: list[Content] = [
        tag("p", intro),
        _verdict(quality, recall),
        tag("h3", f"Recall@{k}: how often the item taken next is among the first {k}"),
        bars(chart),
        table(["", f"Recall@{k}", f"NDCG@{k}"], rows, numbers=[1, 2]),
        tag("p", f"In brackets: interval of {quality['interval']}.", class_="soft small"),
        tag("h3", f"Where it comes from: Recall@{k} by part of the test"),
    ]
    slices = []
    for part, title in _SLICES:
        size = quality["slices"].get(part, {}).get("events", 0)
        share = f"{size:,} ({percent(size / max(1, quality['test_events']))})"
        values = [_estimate(arms, arm, part, recall) for arm, _, _ in _ARMS]
        slices.append([title, share, *("-" if value is None else f"{value['value']:.3f}" for value in values)])
    heads = ["", "Test events", "State and context", "State only", "Popular lately", "Popular overall"]
    parts.append(table(heads, slices, numbers=[1, 2, 3, 4, 5]))
    return _section("Quality", *parts)


def _verdict(quality: Mapping[str, Any], metric: str) -> Markup | None:
    """Said plainly where a baseline wins."""
    arms = quality["arms"]
    tower, lately, overall = (
        _estimate(arms, arm, "all", metric) for arm in ("context", "recent_popularity", "popularity")
    )
    if tower is None or lately is None or overall is None:
        return None
    if tower["value"] >= max(lately["value"], overall["value"]):
        return None
    better = (
        f"what was popular in the last {span(quality)}" if lately["value"] > overall["value"] else "overall popularity"
    )
    unseen = quality["slices"].get("item_unseen", {}).get("events", 0) / max(1, quality["test_events"])
    return tag(
        "p",
        f"On this data {better} does better than the tower as trained here. {percent(unseen)} of the test events are "
        "on items that the training has not seen. See below what was capped, and the table by part.",
    )


def _interval(estimate: Mapping[str, float]) -> str:
    low, high = _known(estimate["low"]), _known(estimate["high"])
    span = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate['value']:.3f}{span}"


def _freshness(freshness: Freshness) -> Markup:
    share = freshness.encoded / max(1, freshness.users)
    parts: list[Content] = [
        tag(
            "p",
            f"The second daily run found new events for {freshness.encoded:,} of {freshness.users:,} users "
            f"({percent(share)}) and encoded only those; {freshness.skipped:,} idle users kept the state they had, "
            f"which is still current. The first run encoded {freshness.encoded_first:,}.",
        )
    ]
    if len(freshness.age_hours):
        edges, labels = _age_bins(freshness.age_hours)
        counts = np.histogram(np.minimum(freshness.age_hours, edges[-1]), edges)[0]
        parts.append(columns(counts.tolist(), labels, "Age of the stored state when it was asked for"))
        parts.append(
            tag(
                "p",
                "States older than the last run are those of users who did nothing in the meantime.",
                class_="soft small",
            )
        )
    if freshness.session_share is not None:
        parts.append(
            tag(
                "p",
                f"{percent(freshness.session_share)} of the requests brought events newer than the stored state. The "
                "head reads them as a session, so what happened a minute ago counts today, not tomorrow.",
            )
        )
    return _section("Freshness", *parts)


def _age_bins(age_hours: NDArray[np.float64]) -> tuple[list[float], list[str]]:
    """Bins in hours that hold nearly all ages: of 3 hours up to two days, else of whole days."""
    longest = float(np.quantile(age_hours, 0.99))
    step = 3.0 if longest <= 48 else 24.0 * max(1, round(longest / 24 / 12))
    count = max(2, min(16, int(np.ceil(longest / step))))
    edges = [i * step for i in range(count + 1)]
    if step < 24:
        labels = [f"{edge:g} h" if i % 2 == 0 else "" for i, edge in enumerate(edges[:-1])]
    else:
        labels = [f"{edge / 24:g} d" for edge in edges[:-1]]
    labels[-1] = (labels[-1] or f"{edges[-2]:g} h") + "+"
    return edges, labels


def _coverage(answers: Answers) -> Markup:
    rows: list[list[Content]] = [
        [kind, reason or "-", f"{count:,}", percent(count / max(1, answers.asked))]
        for (kind, reason), count in sorted(answers.kinds.items(), key=lambda entry: -entry[1])
    ]
    asked = "all users of the log" if answers.asked == answers.users else f"{answers.asked:,} users drawn from the log"
    return _section(
        "Coverage",
        tag(
            "p",
            f"{percent(answers.exact_share)} of {asked} ({answers.users:,}) are answered from a current state. The "
            "others had no event before the states were cut; they get the learned cold-start state, and the reply "
            "says so.",
        ),
        table(["Answer", "Reason", "Users", "Share"], rows, numbers=[2, 3]),
        tag("p", f"A user who does not exist: {answers.unknown_user}.", class_="soft small"),
    )


def _latency(latency: Latency) -> Markup:
    rows = [
        [name, f"{len(values):,}", *(milliseconds(values, q) for q in (0.5, 0.95, 0.99))]
        for name, values in (
            ("One at a time", latency.single_ms),
            (f"{latency.concurrency} at a time", latency.concurrent_ms),
        )
    ]
    return _section(
        "Latency",
        tag(
            "p",
            "From the client, over gRPC on this machine, with the client taking its share of the same processors: read "
            "the state from Redis, check it, run the head on state and context. "
            f"Concurrent: {latency.per_second:,.0f} requests a second. "
            f"One batch of {latency.batch_rows:,} users: {latency.batch_ms:.1f} ms. Failed: {latency.errors:,}.",
        ),
        table(["Requests", "Number", "p50", "p95", "p99"], rows, numbers=[1, 2, 3, 4]),
        distribution(
            [
                Curve("one at a time", latency.single_ms.tolist()),
                Curve(f"{latency.concurrency} at a time", latency.concurrent_ms.tolist(), "other"),
            ],
            "Share of requests answered within this time",
            "ms",
        ),
    )


def _examples(report: Report) -> Markup:
    return _section("What the context does", tag("p", report.examples_note), *map(_example, report.examples))


def _example(example: Example) -> Markup:
    return tag(
        "div",
        tag("b", f"User {example.user}"),
        tag("span", f" {example.request}", class_="soft"),
        tag(
            "div",
            _listed("Last in the stored state", example.history),
            _listed("What the context says", example.session),
            class_="lists",
        ),
        tag(
            "div",
            _suggested("Top 5 from the state only", example.without),
            _suggested("Top 5 with the context", example.with_context),
            class_="lists",
        ),
        tag("p", example.outcome, class_="soft small"),
        class_="example",
    )


def _listed(title: str, names: Sequence[str]) -> Markup:
    return tag("div", tag("h4", title), tag("ul", *(tag("li", name) for name in names or ["nothing"])))


def _suggested(title: str, suggestions: Sequence[Suggestion]) -> Markup:
    entries = [
        tag(
            "li",
            suggestion.name,
            tag("small", f" {suggestion.detail}") if suggestion.detail else None,
            " \N{LEFTWARDS ARROW} taken next" if suggestion.hit else None,
            class_="hit" if suggestion.hit else None,
        )
        for suggestion in suggestions
    ]
    return tag("div", tag("h4", title), tag("ol", *entries))


def _capped(capped: Sequence[str]) -> Markup:
    if not capped:
        return _section("What was capped", tag("p", "Nothing."))
    return _section("What was capped", tag("ul", *(tag("li", text) for text in capped)))


def _next(next_steps: Sequence[tuple[str, str]]) -> Markup:
    return _section(
        "How to go on",
        *(join(tag("div", purpose, class_="small"), tag("pre", command)) for purpose, command in next_steps),
    )
