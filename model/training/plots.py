"""Plots of studies. matplotlib is imported only where a plot is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
        found = study["recall"][arm]
        values = np.array([point["value"] for point in found])
        spans = np.array([[point["value"] - point["low"], point["high"] - point["value"]] for point in found]).T
        shares = [100 * share for share in study["shares"]]
        axis.errorbar(shares, values, np.maximum(spans, 0), label=title, color=colour, marker=marker, capsize=3)
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
