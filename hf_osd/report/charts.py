"""The report's pictures: SVG that takes its colours from the page, so that they follow its light and dark theme."""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..text import printable
from .layers import Layers
from .runs import Run


# Colours that no picture has otherwise: `_finish` replaces them by the page's variables.
INK, MUTED, GRID, RUN_COLOR = "#fd0001", "#fd0002", "#fd0003", "#fe000{}"
COLORS = 8  # of runs, a digit; later ones have them again, with dashes
SIZE = (5.6, 3.0)  # inches at 72 points: text is about as large as the page's own on a screen and on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
MAX_COLUMNS = 800  # steps of a heat map; more would not be seen


def line_chart(
    runs: Sequence[Run],
    key: str,
    label: str,
    *,
    markers: bool = False,
    from_zero: bool = False,
    band: str | None = None,
    name: str,
) -> str | None:
    """A line for each run that has values under `key`, `None` if there is none.

    Args:
        runs (`list[Run]`): Their positions are their colours.
        key (`str`): In the log history.
        label (`str`): What is drawn.
        markers (`bool`): Whether each value is marked; few are in any case.
        from_zero (`bool`): Whether the values' axis begins at 0.
        band (`str`, *optional*): Name of the statistics of layers, from the least to the largest of which a band is
            shaded.
        name (`str`): Unique in the page.
    """
    drawn = [(i, run, run.series(key)) for i, run in enumerate(runs)]
    drawn = [(i, run, points) for i, run, points in drawn if points[0]]
    if not drawn:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, run, (steps, values) in drawn:
            color = RUN_COLOR.format(i % COLORS)
            before = [points for j, _, points in drawn if j < i]
            # dashes let the same line of an earlier run be seen, and tell runs with the same colour apart
            dashes = "--" if i >= COLORS else (0, (6, 6)) if (steps, values) in before else "-"
            if band is not None and run.layers is not None:
                axes.fill_between(*run.layers.spread(band), color=color, alpha=0.13, linewidth=0, gid=f"run-{i}-band")
            marker = "o" if markers or len(steps) < 3 else ""
            axes.plot(
                steps,
                values,
                linestyle=dashes,
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                gid=f"run-{i}-line",
            )
        _steps_axis(axes, max(run.steps for run in runs))
        if from_zero:
            axes.set_ylim(bottom=0)

    return _svg(draw, SIZE, name, label)


def heat_map(layers: Layers, key: str, label: str, limits: tuple[float, float], *, name: str) -> str:
    """Weights from top to bottom, grouped by kind with their first layer on top, steps from left to right.

    Args:
        layers (`Layers`): What is drawn.
        key (`str`): `pca_loss` or `orthogonality`.
        label (`str`): What it is.
        limits (`tuple[float, float]`): What the ends of the colour scale stand for.
        name (`str`): Unique in the page.
    """
    every = math.ceil(len(layers.steps) / MAX_COLUMNS)
    steps, values = layers.steps[::every], [row[::every] for row in layers.values[key]]
    kinds = layers.kinds()
    height = min(max(1.0 + 0.09 * len(values), 0.9 + 0.22 * len(kinds), 2.6), 5.0)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        # "none": the picture keeps one pixel for a value, and the browser enlarges it
        image: dict[str, Any] = {
            "cmap": "viridis",
            "vmin": limits[0],
            "vmax": limits[1],
            "aspect": "auto",
            "interpolation": "none",
        }
        axes.imshow(values, extent=(0, len(steps), len(values), 0), **image)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        edges = [0]
        for _, count in kinds:
            edges.append(edges[-1] + count)
        axes.hlines(edges[1:-1], 0, len(steps), color=GRID, linewidth=1)
        centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
        axes.set_yticks(centres, _short([kind for kind, _ in kinds]), parse_math=False)
        shown = sorted({round(i * (len(steps) - 1) / 5) for i in range(6)})
        axes.set_xticks([i + 0.5 for i in shown], [f"{steps[i]:g}" for i in shown])
        axes.set_xlabel("step")
        scale = axes.inset_axes((1.025, 0, 0.025, 1))
        ramp = [[limits[0] + (limits[1] - limits[0]) * i / 127] for i in range(128)]
        scale.imshow(ramp, origin="lower", extent=(0, 1, *limits), **image)
        scale.grid(False)
        scale.spines[:].set_visible(False)
        scale.set_xticks([])
        scale.yaxis.tick_right()

    return _svg(draw, (SIZE[0], height), name, label)


def limits_of(runs: Sequence[Run], key: str) -> tuple[float, float]:
    """One colour scale for all runs: from the least to the largest value, without the most extreme hundredth."""
    values = sorted(
        value
        for run in runs
        if run.layers is not None
        for row in run.layers.values[key]
        for value in row
        if math.isfinite(value)
    )
    if not values:
        return 0.0, 1.0
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    return (low, high) if high > low else (low, low + max(abs(low), 1.0) * 1e-3)


def _steps_axis(axes: Any, last: int) -> None:
    """The same for all pictures, so that they can be compared."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_xlim(-0.01 * last, 1.02 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(visible=False, axis="x")


def _svg(draw: Callable[[Any], None], size: tuple[float, float], name: str, label: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a report needs matplotlib and jinja2: pip install ".[report]" in a clone') from error

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _finish(text.getvalue(), name, label)


def _finish(svg: str, name: str, label: str) -> str:
    """For use in a page: no head, ids of its own, classes for what belongs to a run, and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="(run-\d+)-\w+"', r'class="\1"', svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(RUN_COLOR.format(r"(\d)"), r"var(--run-\1)", svg)
    opening = re.sub(r' (width|height)="[^"]*"', "", svg[: svg.index(">")])
    return f'{opening} role="img" aria-label="{escape(printable(label), quote=True)}"{svg[svg.index(">") :]}'


def _short(kinds: Sequence[str], length: int = 24) -> list[str]:
    """Their last parts where these differ, and not more than fits beside a picture."""
    kinds = [printable(kind) for kind in kinds]
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    chosen = last if len(set(last)) == len(kinds) else kinds
    return [kind if len(kind) <= length else f"…{kind[1 - length :]}" for kind in chosen]
