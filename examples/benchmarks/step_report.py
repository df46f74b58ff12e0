"""Tables and picture of `step_time.py`, from its result alone."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from contenders import BARE
from environment import named


OURS_COLOR, PEER_COLOR = "#2f5fa8", "#b9b9b9"


def case(row: dict[str, Any]) -> str:
    """Name of a row."""
    return f"LLaMA {Path(row['model']).stem.upper()}, rank {row['rank']}"


def ratio(row: dict[str, Any], name: str) -> float | None:
    """Time over that of the three bare products, what is done at some steps only spread over all."""
    found = row["seconds"].get(name)
    return found["amortised"] / row["seconds"][BARE]["median"] if found else None


def summary(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: the ratios of these contenders, one column a case."""
    lines = [f"| | {' | '.join(case(row) for row in rows)} |", "| --- " * (len(rows) + 1) + "|"]
    for name in names:
        values = [ratio(row, name) for row in rows]
        if name != BARE and any(value is not None for value in values):
            lines.append(f"| {name} | {' | '.join('-' if v is None else f'{v:.2f}' for v in values)} |")
    bare = " | ".join(f"{1e3 * row['seconds'][BARE]['median']:.1f} ms" for row in rows)
    return "\n".join([*lines, f"| {BARE} | {bare} |"]) + "\n"


def table(row: dict[str, Any]) -> str:
    """Markdown: everything of one case."""
    lines = [
        f"**{case(row)}**, one of {row['blocks']} blocks, {row['rounds']} steps",
        "",
        "| | first step, ms | median, ms | worst, ms | all steps, ms | of three products | waits | operators | "
        "launches |",
        "| --- " * 9 + "|",
    ]
    for name, found in row["seconds"].items():
        cells = [f"{1e3 * found[key]:.2f}" for key in ("first", "median", "worst", "amortised")]
        cells += [f"{ratio(row, name):.2f}", str(found["waits"]), str(found["operators"])]
        cells.append("-" if found["launches"] is None else str(found["launches"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, reason in row["left_out"].items():
        lines.append(f"| {name} | {reason} |" + " |" * 7)
    return "\n".join(lines) + "\n"


def accuracy(kernels: dict[str, dict[str, float]]) -> str:
    """Markdown: time and error of one product by each kernel."""
    lines = ["**One product**, (2736, 1024) x (1024, 128)", "", "| kernel | ms | relative error |", "| --- " * 3 + "|"]
    for name, found in kernels.items():
        lines.append(f"| {name} | {1e3 * found['seconds']:.2f} | {found['relative_error']:.1e} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], names: list[str], title: str, path: Path) -> None:
    """Bars of the ratios to the three bare products, one panel a case."""
    names = [name for name in names if name != BARE and any(name in row["seconds"] for row in rows)]
    size = (max(7.5, 2.5 + 2.5 * len(rows)), 1.3 + 0.27 * len(names))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        values = [ratio(row, name) for name in names]
        colors = [OURS_COLOR if name.startswith("osd_") else PEER_COLOR for name in names]
        bars = axes.barh(range(len(names)), [value or 0 for value in values], color=colors, height=0.75)
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
        texts = axes.bar_label(bars, [f"{v:.2f}" if v else "not measured" for v in values], fontsize=8, padding=2)
        for text in texts:  # the line at 1 stays behind them
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set_xlim(0, 1.25 * max(value or 0 for value in values))
        axes.set_title(case(row), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.supxlabel("time of a step / time of its three bare products (lower is faster)", fontsize=9)
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`, `<path>_all.md` and `<path>.png`."""
    rows, names = result["rows"], result["table"]
    named(path, ".md").write_text(summary(rows, names), encoding="utf-8")
    everything = [table(row) for row in rows] + ([accuracy(result["kernels"])] if "kernels" in result else [])
    named(path, "_all.md").write_text("\n".join(everything), encoding="utf-8")
    draw(rows, names, result["title"], named(path, ".png"))
