"""A page a person reads from the recorded figures: benchmarks/results/<theme>.json -> <theme>.md beside it.

python -m benchmarks.page
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def show(value: Any) -> str:
    """A figure with four significant digits; large counts with separators."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def render(theme: str, entries: list[Mapping[str, Any]]) -> str:
    """The theme's page, in Markdown."""
    lines = [
        f"# {theme}",
        "",
        f"Made by `python -m benchmarks.page` from [{theme}.json]({theme}.json); medians; the format is described in",
        "CONTRIBUTING.md.",
        "",
        "| measure | value | unit | target | beside | its value | date | hardware |",
        "|---|---:|---|---:|---|---:|---|---|",
    ]
    for entry in entries:
        cells = [
            f"`{entry['measure']}`", show(entry["value"]), entry["unit"], show(entry.get("target")),
            entry.get("rival") or "", show(entry.get("rival_value")), entry.get("date", ""), entry.get("hardware", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Commands", ""]
    commands: dict[str, list[str]] = {}
    for entry in entries:
        commands.setdefault(entry.get("command", "?"), []).append(entry["measure"])
    for command, measures in commands.items():
        lines.append(f"- `{command}`: {', '.join(measures)}")
    notes = [(entry["measure"], entry["note"]) for entry in entries if entry.get("note")]
    if notes:
        lines += ["", "## Notes", "", *(f"- `{measure}`: {note}" for measure, note in notes)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Render every theme."""
    for path in sorted(FOLDER.glob("*.json")):
        path.with_suffix(".md").write_text(render(path.stem, json.loads(path.read_text())))
        print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
