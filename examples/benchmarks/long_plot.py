"""The picture of a long comparison: what each method reached, and how, by tokens and by time."""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from comparison_plot import COLORS, dots


def draw(rows: list[dict[str, Any]], seconds: dict[str, float], title: str, path: Path) -> None:
    """Final perplexities, and the validation losses of the first seed against tokens and minutes of one core.

    Args:
        rows (`list[dict]`): Of the results, in the order of the experiment.
        seconds (`dict`): Of the processor for a step, by method; who has none is not drawn against time.
            Where nobody has any, time is left out.
        title (`str`): Of the picture.
        path (`Path`): Written to.
    """
    figure = Figure(figsize=(16, max(4.8, 0.33 * len(rows) + 1.8)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    final, by_tokens, *by_time = figure.subplots(1, 3 if seconds else 2)
    colors = dict(zip((row["method"] for row in rows), cycle(COLORS), strict=False))
    dashed = [row["method"] for row in rows[len(COLORS) :]]  # whose colors others have had
    told = [row | {"label": f"{row['label']} (dashed)"} if row["method"] in dashed else row for row in rows]
    dots(final, told, colors)
    for row in rows:
        steps, losses = zip(*row["curves"][0], strict=True)
        millions = row["tokens_seen"] / row["steps"] / 1e6
        line = "--" if row["method"] in dashed else "-"
        style: dict[str, Any] = {"color": colors[row["method"]], "linestyle": line, "linewidth": 1.2}
        by_tokens.plot([step * millions for step in steps], losses, **style)
        if row["method"] in seconds:
            by_time[0].plot([step * seconds[row["method"]] / 60 for step in steps], losses, **style)
    ends = [loss for row in rows for _, loss in row["curves"][0][len(row["curves"][0]) // 5 :] if math.isfinite(loss)]
    if ends:  # the first evaluations would hide the rest
        for axes in (by_tokens, *by_time):
            axes.set_ylim(min(ends) - 0.05, max(ends) + 0.05)
    by_tokens.set_xlabel("million tokens")
    for axes in by_time:
        axes.set_xlabel("minutes of one core, without evaluation")
    by_tokens.set_ylabel("validation loss (nats per token)")
    for axes in (final, by_tokens, *by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
