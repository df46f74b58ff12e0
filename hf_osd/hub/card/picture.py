"""The picture in a model card: losses, and how much of the gradients the subspaces miss, against steps."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


logger = logging.getLogger("hf_osd")


def series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of all rows that have a finite value under `key`."""
    rows = [row for row in log_history if key in row and "step" in row and math.isfinite(row[key])]
    return [row["step"] for row in rows], [row[key] for row in rows]


def loss_picture(log_history: Sequence[Mapping[str, Any]], title: str, of: str = "gradients") -> bytes | None:
    """A run as a PNG; `None` without losses, or without matplotlib, which is said in the log once.

    Args:
        log_history (`list[dict]`): As in `TrainerState`.
        title (`str`): The name of the model.
        of (`str`, *optional*, defaults to `"gradients"`): What P learns from.
    """
    losses, evaluations, pca = (series(log_history, key) for key in ("loss", "eval_loss", "osd/pca_loss"))
    if not losses[0] and not evaluations[0]:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _say_no_picture()
        return None

    heights = [3, 1] if pca[0] else [3]
    figure = Figure(figsize=(8, 3.2 + sum(heights) / 2), dpi=150, layout="constrained", facecolor="white")
    panels = [row[0] for row in figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)]
    for points, color, label, axes in (
        (losses, "#2f5fa8", "training", panels[0]),
        (evaluations, "#c4442f", "evaluation", panels[0]),
        (pca, "#3c8a63", "", panels[-1]),
    ):
        if points[0]:  # with a mark at each where there are few
            marker = "." if len(points[0]) < 40 else ""
            axes.plot(*points, marker=marker, markersize=5, color=color, linewidth=1.4, label=label)
    panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold", parse_math=False)
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False, loc="upper right")
    if pca[0]:
        panels[1].set_title(f"share of the {of}' energy outside the subspaces", loc="left", fontsize=9)
        panels[1].set_ylabel("outside P")
        panels[1].set_ylim(0, max(1.0, 1.05 * max(pca[1])))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


@lru_cache(maxsize=1)
def _say_no_picture() -> None:
    logger.warning("The model card has no picture of the loss: matplotlib is not installed.")
