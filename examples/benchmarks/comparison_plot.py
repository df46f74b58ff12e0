"""The picture of a comparison: what each method reached, and how."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


CURVES = 8  # more cannot be told apart


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Perplexity of each method at its best setting, every seed a dot; validation loss against steps of the first seed.

    Args:
        rows (`list[dict]`): Of the results, in the order of the experiment.
        title (`str`): Of the picture.
        path (`Path`): Written to.
    """
    figure = Figure(figsize=(12, max(4.2, 0.32 * len(rows) + 1.6)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    dots, curves = figure.subplots(1, 2)
    drawn = [row for row in rows if row.get("curve_shown", True)][:CURVES]
    for place, row in enumerate(rows):
        color = f"C{drawn.index(row)}" if row in drawn else "0.45"
        dots.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=color, markersize=4, alpha=0.6)
        dots.plot(row["best_perplexity"], place, "|", color=color, markersize=14, markeredgewidth=2)
        setting = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["best"].items())
        dots.annotate(f"{row['best_perplexity']:.1f}", (max(row["seeds"]), place), (8, -3), textcoords="offset points", fontsize=8)
        if row in drawn:
            curves.plot(*zip(*row["curve"], strict=True), "o-", color=color, markersize=3, linewidth=1.2, label=row["label"])
    dots.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
    dots.invert_yaxis()
    dots.set_xlabel("final validation perplexity")
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss (nats per token)")
    curves.legend(frameon=False, fontsize=8)
    for axes in (dots, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
