import html.parser
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.markup import Bar, Curve, Markup, bars, columns, distribution, join, table, tag
from deploy.report import (
    Answers,
    Data,
    Example,
    Freshness,
    Headline,
    Latency,
    Report,
    Step,
    Suggestion,
    percent,
    render,
    seconds,
    write,
)

NASTY = "<script>alert('x')</script> & \"quotes\" </style>"


def make_quality(text: str = "test") -> dict[str, Any]:
    metrics = [f"{name}@{k}" for name in ("recall", "ndcg") for k in (10, 20)]

    def estimates(value: float) -> dict[str, Any]:
        return {name: {"value": value, "low": value / 2, "high": float("nan")} for name in metrics}

    slices = ("all", "item_seen", "user_with_history", "user_without_history")
    arms = {"context": 0.4, "no_context": 0.3, "recent_popularity": 0.2, "popularity": 0.1}
    return {
        "k": [10, 20],
        "split": {"split": "time"},
        "sampled": True,
        "test_events": 50,
        "test_events_total": 1000,
        "catalogue": 20,
        "outside_catalogue": 3,
        "seen_items": text,
        "unavailable_items": "excluded",
        "recent_hours": 3.0,
        "interval": text,
        "slices": {name: {"events": 10, "users": 5} for name in slices} | {"item_unseen": {"events": 0, "users": 0}},
        "arms": {arm: {name: estimates(value) for name in slices} for arm, value in arms.items()},
    }  # fmt: skip


def make_report(text: str = "plain", times_ms: list[float] | None = None) -> Report:
    times = np.array([1.0, 2.0, 3.0] if times_ms is None else times_ms)
    suggestion = Suggestion(name=text, detail=text, hit=True)
    example = Example(
        user=text, request=text, history=[text], session=[text],
        without=[suggestion], with_context=[suggestion], outcome=text,
    )  # fmt: skip
    return Report(
        title=text,
        subtitle=text,
        headlines=[Headline(value=text, meaning=text)],
        steps=[Step(title=text, commands=[text], seconds=61.0, meaning=text, log=text)],
        data=Data(summary=text, facts=[(text, text)], description=text, events=7, set_aside={"duplicate": 2, text: 1}),
        versions=[(text, text)],
        quality=make_quality(text),
        answers=Answers(asked=4, users=5, kinds={("EXACT", ""): 3, (text, text): 1}, unknown_user=text),
        freshness=Freshness(
            age_hours=times * 10, users=10, encoded_first=8, encoded=4, skipped=6, session_share=0.5
        ),
        latency=Latency(
            single_ms=times, concurrent_ms=times * 2, concurrency=4, concurrent_s=0.5, batch_rows=512, batch_ms=7.0
        ),
        examples=[example],
        examples_note=text,
        capped=[text],
        next_steps=[(text, text)],
        machine=[(text, text)],
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements and text of a page; checks that elements close in order."""

    void = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(name)
        self.links += [value or "" for key, value in attributes if key in ("src", "href")]
        assert not any(key.startswith("on") for key, _ in attributes)
        if name not in self.void:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data


def test_user_text_is_escaped_everywhere() -> None:
    page = Page(render(make_report(NASTY)))
    assert page.open == []
    assert "script" not in page.elements
    assert page.elements.count("style") == 1
    assert page.text.count(NASTY) > 25


def test_the_page_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write(make_report(), path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_page_says_what_was_measured() -> None:
    text = Page(render(make_report())).text
    assert "3 of 10 rows were set aside" in text
    assert "equal to an earlier row in all columns" in text
    assert "0.400" in text  # no interval where it is not known
    assert "75% of 4 users drawn from the log (5)" in text
    assert "4 of 10 users (40%)" in text
    assert "2.00 ms" in text
    assert "6 requests a second" in text
    assert "1 min 01 s" in text


def test_a_baseline_that_wins_is_named() -> None:
    report = make_report()
    assert "does better than the tower" not in Page(render(report)).text
    arms = report.quality["arms"]
    arms["recent_popularity"], arms["context"] = arms["context"], arms["recent_popularity"]
    assert "what was popular in the last 3 hours does better than the tower" in Page(render(report)).text


def test_nothing_measured_is_said_and_does_not_fail() -> None:
    text = Page(render(make_report(times_ms=[]))).text
    assert "not measured" in text
    assert "Age of the stored state" not in text


def test_tag_escapes_text_and_attributes() -> None:
    assert tag("p", "a<b", class_='"') == '<p class="&quot;">a&lt;b</p>'
    assert tag("p", Markup("<b>x</b>"), None, title=None) == "<p><b>x</b></p>"
    assert join("&", Markup("&amp;")) == "&amp;&amp;"
    assert tag("br") == "<br>"


def test_table_marks_numbers() -> None:
    assert table(["a", "b"], [["x", "1"]], numbers=[1]) == (
        '<div class="scroll"><table><thead><tr><th>a</th><th class="number">b</th></tr></thead>'
        '<tbody><tr><td>x</td><td class="number">1</td></tr></tbody></table></div>'
    )


def test_bars_are_as_long_as_their_values() -> None:
    chart = bars([Bar("a", 1.0, "1", low=0.5, high=2.0), Bar("b", 0.5, "0.5")])
    assert re.findall(r"fill main\" style=\"width:([\d.]+)%", chart) == ["50.00", "25.00"]
    assert 'style="left:25.00%;width:75.00%"' in chart
    assert chart.count("whisker") == 1


def test_columns_are_as_high_as_their_counts() -> None:
    chart = columns([2, 4, 0], ["0 h", "3 h", "6 h+"], "ages")
    assert re.findall(r"height:([\d.]+)", chart) == ["50.0", "100.0", "0"]
    assert re.findall(r"count\">(\d+)%", chart) == ["33", "67"]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1.0, 10.0, 100.0], list(range(1, 2000))])
def test_a_distribution_stays_in_its_frame(values: list[float]) -> None:
    chart = distribution([Curve("one", values), Curve("none", [])], "times", "ms")
    points = [
        tuple(map(float, point))
        for point in re.findall(r"([\d.-]+),([\d.-]+)", "".join(re.findall(r' d="(.*?)"', chart)))
    ]
    assert points[-1] == (1000.0, 0.0)
    assert all(0 <= x <= 1000.1 and 0 <= y <= 300 for x, y in points)


def test_figures_for_people() -> None:
    assert [percent(x) for x in (0.0, 0.004, 0.034, 0.5, 1.0)] == ["0%", "0.4%", "3.4%", "50%", "100%"]
    assert [seconds(x) for x in (0.04, 59.9, 125.0)] == ["0.0 s", "59.9 s", "2 min 05 s"]
