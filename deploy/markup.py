"""HTML built from values, so that text is escaped unless it says it is markup; and charts made of it.

The charts are HTML and CSS, with SVG only for a curve: they follow the page's width and colours, light or dark.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | None
"""Plain text, which is escaped, or Markup, which is not. None is nothing."""

_VOID = ("meta", "br", "path", "line")


def tag(name: str, /, *content: Content, **attributes: str | None) -> Markup:
    """<name attributes>content</name>; `class_` is class, `_` in a name is `-`, an attribute of None is left out."""
    head = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{head}>" if name in ("meta", "br") else f"<{name}{head}/>")
    return Markup(f"<{name}{head}>{join(*content)}</{name}>")


def join(*content: Content) -> Markup:
    """One after another."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in content if part))


def table(head: Sequence[Content], rows: Sequence[Sequence[Content]], *, numbers: Sequence[int] = ()) -> Markup:
    """A table in a box that scrolls sideways where it is too wide. numbers: columns that are aligned as such."""

    def cells(name: str, row: Sequence[Content]) -> Markup:
        return tag("tr", *(tag(name, cell, class_="number" if i in numbers else None) for i, cell in enumerate(row)))

    body = tag("tbody", *(cells("td", row) for row in rows))
    top = tag("thead", cells("th", head)) if any(head) else None
    return tag("div", tag("table", top, body), class_="scroll")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its label, value, and the interval in which the value lies."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    tone: str = "main"
    """main | other: the colour."""


def bars(entries: Sequence[Bar]) -> Markup:
    """Horizontal bars from 0, with whiskers where an interval is known."""
    top = max([entry.value for entry in entries] + [entry.high or 0.0 for entry in entries] + [1e-12])

    def percent(value: float) -> str:
        return f"{max(0.0, min(100.0, 100 * value / top)):.2f}%"

    rows = []
    for entry in entries:
        whisker = None
        if entry.low is not None and entry.high is not None:
            width = percent(entry.high - entry.low)
            whisker = tag("i", "", class_="whisker", style=f"left:{percent(entry.low)};width:{width}")
        fill = tag("i", "", class_=f"fill {entry.tone}", style=f"width:{percent(entry.value)}")
        rows += [
            tag("span", entry.label, class_="label"),
            tag("span", fill, whisker, class_="track"),
            tag("span", entry.text, class_="value"),
        ]
    return tag("div", *rows, class_="bars")


def columns(counts: Sequence[int], labels: Sequence[str], title: str) -> Markup:
    """A histogram: one column a bin, `labels` under the columns (an empty one leaves a column without)."""
    top, total = max([1, *counts]), max(1, sum(counts))
    stacks = [
        tag(
            "span",
            tag("b", f"{100 * count / total:.0f}%" if count else "", class_="count"),
            tag("i", "", class_="column", style=f"height:{100 * count / top:.1f}%" if count else "height:0"),
            title=f"{label}: {count:,}",
        )
        for count, label in zip(counts, labels, strict=True)
    ]
    below = [tag("span", label) for label in labels]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", *stacks, class_="columns"),
        tag("div", *below, class_="axis"),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """Sorted or unsorted values to show the distribution of."""

    label: str
    values: Sequence[float]
    tone: str = "main"


def distribution(curves: Sequence[Curve], title: str, unit: str) -> Markup:
    """Cumulative shares over a logarithmic axis, with lines at half and at 99%."""
    everything = [max(value, 1e-6) for curve in curves for value in curve.values]
    if not everything:
        return tag("p", "Nothing was measured.")
    low, high = math.log10(min(everything)), math.log10(max(everything))
    low, high = math.floor(low * 4) / 4, max(math.ceil(high * 4) / 4, math.floor(low * 4) / 4 + 0.5)

    def across(value: float) -> float:
        return 1000 * (math.log10(max(value, 1e-6)) - low) / (high - low)

    paths = []
    for curve in curves:
        ordered = sorted(curve.values)
        if not ordered:
            continue
        picked = sorted({round(i * (len(ordered) - 1) / 300) for i in range(301)})
        points = " ".join(f"{across(ordered[i]):.1f},{300 - 300 * (i + 1) / len(ordered):.1f}" for i in picked)
        start = f"{across(ordered[0]):.1f},300"
        paths.append(tag("path", d=f"M{start} L{points} L1000,0", class_=f"curve {curve.tone}"))
    guides = [tag("line", x1="0", x2="1000", y1=f"{y}", y2=f"{y}", class_="guide") for y in (3, 150)]
    picture = tag(
        "svg", *guides, *paths, viewBox="0 0 1000 300", preserveAspectRatio="none", role="img", aria_label=title
    )
    ticks = [tag("span", _tick(value, unit), style=f"left:{across(value) / 10:.1f}%") for value in _ticks(low, high)]
    legend = [tag("span", tag("i", "", class_=f"key {curve.tone}"), curve.label) for curve in curves]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", *legend, class_="legend"),
        tag(
            "div", picture, tag("span", "99%", class_="mark top"), tag("span", "50%", class_="mark half"), class_="plot"
        ),
        tag("div", *ticks, class_="ticks"),
    )


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high - low < 2 else (1,)
    values = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]


def _tick(value: float, unit: str) -> str:
    return f"{value:g} {unit}"
