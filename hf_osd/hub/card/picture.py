"""The picture in a model card: losses, and how much of the gradients the subspaces miss, against steps."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


logger = logging.getLogger("hf_osd")

TRAIN_COLOR, EVAL_COLOR, PCA_COLOR, MUTED = "#2f5fa8", "#c4442f", "#3c8a63", "#5a5a5a"


def series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of all rows that have a finite value under `key`."""
    rows = [row for row in log_history if key in row and "step" in row and math.isfinite(row[key])]
    return [row["step"] for row in rows], [row[key] for row in rows]


def save_loss_picture(log_history: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draw a run.

    Args:
        log_history (`list[dict]`): As in `TrainerState`.
        path (`Path`): The PNG to write.
        title (`str`): What was trained.

    Returns:
        `bool`: Whether there is a picture: not without matplotlib, which is said in the log once, nor without losses.
    """
    losses, evaluations, pca = (series(log_history, key) for key in ("loss", "eval_loss", "osd/pca_loss"))
    if not losses[0] and not evaluations[0]:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        _say_no_picture()
        return False

    figure = Figure(figsize=(8, 5.2 if pca[0] else 4.2), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(
        2 if pca[0] else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + bool(pca[0])]
    )
    top, bottom = panels[0][0], panels[-1][0]
    _line(top, losses, TRAIN_COLOR, "training")
    _line(top, evaluations, EVAL_COLOR, "evaluation", marker="o")
    if evaluations[0]:
        last = evaluations[0][-1], evaluations[1][-1]
        top.annotate(f"{last[1]:.3f}", last, (0, 8), textcoords="offset points", ha="right", color=EVAL_COLOR)
    top.set_ylabel("loss")
    top.set_title(title, loc="left", fontsize=12, fontweight="bold", parse_math=False)
    top.legend(frameon=False, loc="upper right")
    if pca[0]:
        _line(bottom, pca, PCA_COLOR, "")
        bottom.set_ylabel("outside P")
        bottom.set_ylim(0, max(1.0, 1.05 * max(pca[1])))
        bottom.set_title("share of the gradients' energy outside the subspaces", loc="left", fontsize=9, color=MUTED)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in {top, bottom}:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f"_{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _line(axes: Any, points: tuple[list[int], list[float]], color: str, label: str, marker: str = "") -> None:
    """A line, with its points where there are few of them."""
    if points[0]:
        marker = marker or ("." if len(points[0]) < 40 else "")
        axes.plot(*points, marker=marker, markersize=4.5, color=color, linewidth=1.4, label=label)


@lru_cache(maxsize=1)
def _say_no_picture() -> None:
    logger.warning("The model card has no picture of the loss: matplotlib is not installed.")
