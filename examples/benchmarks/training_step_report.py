"""Tables and picture of `training_step.py`, from its result alone."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from environment import named
from step_report import OURS_COLOR, PEER_COLOR, case
from whole_models import BASELINE


PARTS = ("forward", "backward", "optimizer")
SHADES = (0.45, 0.7, 1.0)


def title(row: dict[str, Any]) -> str:
    """Name of a row."""
    blocks = f", {row['blocks']} of {row['all_blocks']} blocks" if row["blocks"] < row["all_blocks"] else ""
    return case(row) + blocks


def ratio(entry: dict[str, Any], of: str = "median") -> float:
    """Time over that of fused AdamW beside it, what is done at some steps only spread over all."""
    return (entry["whole"][of] + entry["renewal"]) / entry["beside"][of]


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios of medians, one column a case, and what fused AdamW takes."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = [f"| | {' | '.join(title(row) for row in rows)} |", "| --- " * (len(rows) + 1) + "|"]
    for name in names:
        entries = [row["seconds"].get(name) for row in rows]
        if name != BASELINE:
            lines.append(f"| {name} | {' | '.join('-' if e is None else f'{ratio(e):.2f}' for e in entries)} |")
    base = " | ".join(_duration(row["seconds"][BASELINE]["whole"]["median"]) for row in rows)
    return "\n".join([*lines, f"| {BASELINE} | {base} |"]) + "\n"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def table(row: dict[str, Any]) -> str:
    """Markdown: everything of one case."""
    sequences, tokens = row["batch"]
    lines = [
        f"**{title(row)}**, {sequences} x {tokens} tokens, {row['rounds']} steps; median / minimum in ms",
        "",
        f"| | first step | whole step | {' | '.join(PARTS)} | spread over steps | of {BASELINE} | tokens per second |",
        "| --- " * (6 + len(PARTS)) + "|",
    ]
    for name, entry in row["seconds"].items():
        cells = [f"{1e3 * entry['first']:.0f}", *(_times(entry[part]) for part in ("whole", *PARTS))]
        cells += [f"{1e3 * entry['renewal']:.1f}", f"{ratio(entry):.3f} / {ratio(entry, 'minimum'):.3f}"]
        cells.append(f"{sequences * tokens / (entry['whole']['median'] + entry['renewal']):,.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, reason in row["left_out"].items():
        lines.append(f"| {name} | {reason} |" + " |" * (4 + len(PARTS)))
    return "\n".join(lines) + "\n"


def _times(entry: dict[str, float]) -> str:
    digits = 0 if entry["median"] >= 0.01 else 2
    return f"{1e3 * entry['median']:.{digits}f} / {1e3 * entry['minimum']:.{digits}f}"


def draw(rows: list[dict[str, Any]], heading: str, path: Path) -> None:
    """Bars of the parts over the whole of fused AdamW, one panel a case; what is spread counts to the optimizer."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    size = (max(9, 3 + 3 * len(rows)), 1.5 + 0.35 * len(names))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        for y, name in enumerate(names):
            entry, left = row["seconds"].get(name), 0.0
            if entry is None:
                continue
            for part, shade in zip(PARTS, SHADES, strict=True):
                seconds = entry[part]["median"] + entry["renewal"] * (part == "optimizer")
                width = seconds / entry["beside"]["median"]
                color = OURS_COLOR if name.startswith("osd_") else PEER_COLOR
                axes.barh(y, width, left=left, color=color, alpha=shade, height=0.75)
                left += width
            axes.text(left, y, f" {ratio(entry):.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlim(0, 1.2 * max(ratio(entry) for entry in row["seconds"].values()))
        axes.set_title(title(row), loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    text = f"time of a step / that of {BASELINE}: {', '.join(PARTS)}, from pale to dark (lower is faster)"
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`, `<path>_all.md` and `<path>.png`."""
    rows = result["rows"]
    named(path, ".md").write_text(summary(rows), encoding="utf-8")
    named(path, "_all.md").write_text("\n".join(table(row) for row in rows), encoding="utf-8")
    draw(rows, result["title"], named(path, ".png"))
