"""The picture of a comparison: what each method reached, and how."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


FAR = 1.15  # times the median perplexity: methods beyond it are named at the edge
COLORS = [f"C{i}" for i in range(10) if i != 7] + ["black"]
REST = "0.55"  # grey like C7, of methods without a curve


def draw(
    rows: list[dict[str, Any]], title: str, path: Path, shown: list[str] | None = None, against: str | None = None
) -> None:
    """Perplexity of each method at its best setting, and how the first seed came there.

    Args:
        rows (`list[dict]`): Of the results, in the order of the experiment.
        title (`str`): Of the picture.
        path (`Path`): Written to.
        shown (`list[str]`, *optional*): Methods that get a curve; defaults to the first ten. Ten at most.
        against (`str`, *optional*):
            An option of the grids to show perplexity against; defaults to loss against steps. A method without it gets
            a dotted line.
    """
    figure = Figure(figsize=(12, max(4.2, 0.33 * len(rows) + 1.8)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    left, curves = figure.subplots(1, 2)
    colors = dict(zip(shown or [row["method"] for row in rows], COLORS, strict=False))
    dots(left, rows, colors)
    for row in rows:
        color = colors.get(row["method"], REST)
        if row["method"] in colors and against and against not in row["grid"]:
            curves.axhline(row["seeds"][0], color=color, linestyle=":", linewidth=1.2)
        elif row["method"] in colors:
            curves.plot(*_curve(row, against), "o-", color=color, markersize=3, linewidth=1.2)
    if against:
        curves.set_xscale("log")
    curves.set_xlabel(against or "step")
    curves.set_ylabel("final validation perplexity, first seed" if against else "validation loss (nats per token)")
    for axes in (left, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def dots(axes: Axes, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """The final perplexities of every method: a dot for each seed, a line at their mean; the labels are a legend.

    Args:
        axes (`Axes`): Drawn into.
        rows (`list[dict]`): Of the results.
        colors (`dict[str, str]`): By method; the others are grey.
    """
    means = [row["best_perplexity"] for row in rows]
    end = FAR * statistics.median(means)
    for place, (row, mean) in enumerate(zip(rows, means, strict=True)):
        color = colors.get(row["method"], REST)
        text = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        if mean > end:
            axes.annotate(f"{mean:.1f} →", (end, place), (-4, 0), ha="right", color=color, **text)
        else:
            axes.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=color, markersize=5, alpha=0.6)
            axes.plot(mean, place, "|", color=color, markersize=15, markeredgewidth=2)
            axes.annotate(f"{mean:.1f}", (max(row["seeds"]), place), (9, 0), **text)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):  # the legend of the other panels
        label.set_color(colors.get(row["method"], "black"))
    axes.margins(x=0.12)
    axes.set_xlim(right=end if max(means) > end else None)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("final validation perplexity")


def _curve(row: dict[str, Any], against: str | None) -> tuple[list[float], list[float]]:
    """Validation losses by step, or perplexities by the values of an option, the others as at the best."""
    if against is None:
        steps, losses = zip(*row["curve"], strict=True)
        return list(steps), list(losses)
    place = list(row["grid"]).index(against)
    best = list(row["best"].values())
    points = []
    for text, perplexity in row["perplexity"].items():
        values = [float(value) for value in text.split(" × ")]
        if values[:place] + values[place + 1 :] == best[:place] + best[place + 1 :]:
            points.append((values[place], perplexity))
    return [value for value, _ in points], [perplexity for _, perplexity in points]
