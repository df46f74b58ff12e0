"""The picture of a comparison: what each method reached, and how."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


FAR = 1.15  # times the median perplexity: methods beyond it are named at the edge
COLORS = [f"C{i}" for i in range(10) if i != 7] + ["black"]
REST = "0.55"  # grey like C7, of methods without a curve


def draw(rows: list[dict[str, Any]], title: str, path: Path, shown: list[str] | None = None) -> None:
    """Perplexity of each method at its best setting, and the first seed's validation loss against steps.

    Args:
        rows (`list[dict]`): Of the results, in the order of the experiment.
        title (`str`): Of the picture.
        path (`Path`): Written to.
        shown (`list[str]`, *optional*): Methods that get a curve; defaults to the first ten. Ten at most.
    """
    figure = Figure(figsize=(12, max(4.2, 0.33 * len(rows) + 1.8)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    dots, curves = figure.subplots(1, 2)
    colors = dict(zip(shown or [row["method"] for row in rows], COLORS, strict=False))
    means = [row["best_perplexity"] for row in rows]
    end = FAR * statistics.median(means)
    for place, (row, mean) in enumerate(zip(rows, means, strict=True)):
        color = colors.get(row["method"], REST)
        text = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        if mean > end:
            dots.annotate(f"{mean:.1f} →", (end, place), (-4, 0), ha="right", color=color, **text)
        else:
            dots.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=color, markersize=5, alpha=0.6)
            dots.plot(mean, place, "|", color=color, markersize=15, markeredgewidth=2)
            dots.annotate(f"{mean:.1f}", (max(row["seeds"]), place), (9, 0), **text)
        if row["method"] in colors:
            steps, losses = zip(*row["curve"], strict=True)
            curves.plot(steps, losses, "o-", color=color, markersize=3, linewidth=1.2)
    dots.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    for label, row in zip(dots.get_yticklabels(), rows, strict=True):  # the legend of both panels
        label.set_color(colors.get(row["method"], "black"))
    dots.margins(x=0.12)
    dots.set_xlim(right=end if max(means) > end else None)
    dots.set_ylim(len(rows) - 0.4, -0.6)
    dots.set_xlabel("final validation perplexity")
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss (nats per token)")
    for axes in (dots, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
