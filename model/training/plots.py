"""Plots of studies. matplotlib is imported only where a plot is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import ConfigError
from model.skew import labels, slices


def draw_skew(study: Mapping[str, Any], path: Path) -> None:
    """The three slices as heat maps, PNG or SVG by the path's ending. Raises ConfigError without matplotlib."""
    plt = plotting()
    names, panels = labels(study), slices(study)
    high = max(float(values.max()) for values in panels.values())
    size = 1.4 + 0.72 * len(names)
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * size, size + 0.6), layout="constrained")
    for axis, (part, values) in zip(axes, panels.items(), strict=True):
        axis.imshow(values, cmap="Blues", vmin=0, vmax=high)
        axis.set_title(f"{part} of another release", fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        columns = {"encoder": "head, index", "head": "head", "index": "index"}[part]
        rows = {"encoder": "encoder", "head": "encoder, index", "index": "encoder, head"}[part]
        axis.set_xlabel(columns, fontsize=9)
        axis.set_ylabel(rows, fontsize=9)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.55 * high else "black"
            shown = f"{value:.3f}".removeprefix("0")
            axis.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    found = study["sensitivity"]
    figure.suptitle(
        f"{study['dataset']}: Recall@{study['k']}; skew sensitivity {found['value']:.3f} "
        f"({found['low']:.3f} to {found['high']:.3f})",
        fontsize=11,
    )
    save_plot(plt, figure, path)


def plotting() -> Any:
    """matplotlib's pyplot, without a display. Raises ConfigError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.fonttype"] = "none"  # letters as text: a tenth of the size
        matplotlib.rcParams["svg.hashsalt"] = "hybrid-tower"
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib (pip install matplotlib): {error}") from None
    return plt


def save_plot(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure, the same bytes for the same figure. Raises ConfigError for an ending other than png or svg."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"a plot is written as .png or .svg, got {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw_bridge(study: Mapping[str, Any], path: Path) -> None:
    """Recall by the share of users backfilled, a line an arm, PNG or SVG. Raises ConfigError without matplotlib."""
    plt = plotting()
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    names = {
        "bridge": f"bridge ({study['kind']}), new head",
        "previous_release": "previous release",
        "cold_start": "cold start",
    }
    for (arm, title), colour, marker in zip(names.items(), ("C0", "C1", "C7"), "os^", strict=True):
        shares = [100 * share for share in study["shares"]]
        _errorbars(axis, shares, study["recall"][arm], title, colour, marker)
    axis.set_xlabel("users backfilled, %")
    axis.set_ylabel(f"Recall@{study['k']}")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    old, new = (_short(study[end]) for end in ("from", "to"))
    state = "enabled" if study["is_enabled"] else "off"
    axis.set_title(f"{study['dataset']}: bridge from {old} to {new} ({state})", fontsize=10)
    save_plot(plt, figure, path)


def _short(release: Mapping[str, Any]) -> str:
    if release["epoch"] is None:
        return str(release["release_id"])
    return f"seed {release['seed']} epoch {release['epoch']}"


def draw_staleness(study: Mapping[str, Any], path: Path) -> None:
    """Recall by the age of the state, with and without context, a panel a segment. Raises ConfigError."""
    plt = plotting()
    segments = study["segments"]
    names = [point["name"] for point in study["points"]]
    line = [p for p, name in enumerate(names) if name != "daily"]
    columns = min(3, len(segments))
    rows = -(-len(segments) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.7 * columns, 3.0 * rows), layout="constrained", squeeze=False
    )  # fmt: skip
    for axis in axes.flat[len(segments) :]:
        axis.remove()
    for axis, (segment, found) in zip(axes.flat, segments.items(), strict=False):
        arms = {"context": ("with context", "C0", "o"), "no_context": ("without", "C1", "s")}
        for arm, (title, colour, marker) in arms.items():
            _errorbars(axis, range(len(line)), [found["recall"][arm][p] for p in line], title, colour, marker)
            if "daily" in names:
                daily = found["recall"][arm][names.index("daily")]["value"]
                axis.axhline(daily, color=colour, linestyle=":", linewidth=1, label=f"{title}, daily refresh")
        axis.set_xticks(range(len(line)), [names[p] for p in line], fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{segment}: {found['requests']:,} requests", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    axes[0, 0].set_ylabel(f"Recall@{study['k']}")
    figure.supxlabel("age of the state", fontsize=9)
    figure.suptitle(f"{study['dataset']}: what the age of a state costs", fontsize=11)
    save_plot(plt, figure, path)


def draw_audit(study: Mapping[str, Any], path: Path) -> None:
    """Recall of every context with full and with empty history, a panel a kind of context. Raises ConfigError."""
    plt = plotting()
    kinds = [kind for kind in ("replayed", "pseudo") if study[kind] is not None]
    titles = {"replayed": "replayed context", "pseudo": "subjects drawn from the answer"}
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.2 * len(kinds), 3.2), layout="constrained", squeeze=False, sharey=True
    )  # fmt: skip
    for axis, kind in zip(axes[0], kinds, strict=True):
        for h, (history, colour) in enumerate((("full", "C0"), ("empty", "C7"))):
            recall = study[kind][history]["recall"]
            values, spans = _values(list(recall.values()))
            places = np.arange(len(recall)) + 0.4 * h - 0.2
            axis.bar(places, values, 0.38, yerr=spans, color=colour, label=f"{history} history", capsize=3)
        axis.set_xticks(range(len(recall)), list(recall), fontsize=9)
        axis.set_title(titles[kind], fontsize=10)
    axes[0, 0].set_ylabel(f"Recall@{study['k']}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"{study['dataset']}: whose context helps", fontsize=11)
    save_plot(plt, figure, path)


def draw_refresh(study: Mapping[str, Any], path: Path) -> None:
    """Recall by refresh budget, a line a policy, with and without context. Raises ConfigError without matplotlib."""
    plt = plotting()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    by_policy: dict[str, list[Mapping[str, Any]]] = {}
    for arm in study["arms"]:
        by_policy.setdefault(arm["policy"], []).append(arm)
    ends = by_policy.pop("nobody") + by_policy.pop("all")
    titles = (("context", "with context"), ("no_context", "without context"))
    for axis, (name, title) in zip(axes, titles, strict=True):
        for p, (policy, arms) in enumerate(by_policy.items()):
            points = [ends[0], *arms, ends[1]]
            axis.plot(
                [100 * point["budget"] for point in points], [point["recall"][name]["value"] for point in points],
                label=policy.replace("_", " "), color=f"C{p}", marker="os^D"[p % 4], markersize=4,
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("budget, % of users with a state and events new that day", fontsize=9)
    axes[0].set_ylabel(f"Recall@{study['k']}")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{study['dataset']}: whom to renew", fontsize=11)
    save_plot(plt, figure, path)


def _values(found: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values, and how far their intervals reach below and above."""
    values = np.array([point["value"] for point in found])
    spans = np.array([[point["value"] - point["low"], point["high"] - point["value"]] for point in found]).T
    return values, np.maximum(spans, 0)


def _errorbars(
    axis: Any, places: Sequence[float], found: Sequence[Mapping[str, float]], title: str, colour: str, marker: str
) -> None:
    values, spans = _values(found)
    axis.errorbar(places, values, spans, label=title, color=colour, marker=marker, capsize=3)
