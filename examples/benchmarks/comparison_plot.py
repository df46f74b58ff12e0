"""The picture of a comparison: what each method reached, and how."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


REST = "0.55"  # grey, of methods without a curve


def draw(rows: list[dict[str, Any]], title: str, path: Path, shown: list[str] | None = None) -> None:
    """Perplexity of each method at its best setting, and the first seed's validation loss against steps.

    Args:
        rows (`list[dict]`): Of the results, in the order of the experiment.
        title (`str`): Of the picture.
        path (`Path`): Written to.
        shown (`list[str]`, *optional*): Methods that get a curve; defaults to the first ten.
    """
    figure = Figure(figsize=(12, max(4.2, 0.33 * len(rows) + 1.8)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    dots, curves = figure.subplots(1, 2)
    colors = {method: f"C{i}" for i, method in enumerate(shown or [row["method"] for row in rows[:10]])}
    for place, row in enumerate(rows):
        color = colors.get(row["method"], REST)
        dots.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=color, markersize=5, alpha=0.6)
        dots.plot(row["best_perplexity"], place, "|", color=color, markersize=15, markeredgewidth=2)
        mean = f"{row['best_perplexity']:.1f}"
        dots.annotate(mean, (max(row["seeds"]), place), (9, -3), textcoords="offset points", fontsize=8)
        if row["method"] in colors:
            steps, losses = zip(*row["curve"], strict=True)
            curves.plot(steps, losses, "o-", color=color, markersize=3, linewidth=1.2)
    dots.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    for label, row in zip(dots.get_yticklabels(), rows, strict=True):  # the legend of both panels
        label.set_color(colors.get(row["method"], "black"))
    dots.margins(x=0.12)
    dots.invert_yaxis()
    dots.set_xlabel("final validation perplexity")
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss (nats per token)")
    for axes in (dots, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
