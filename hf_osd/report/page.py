"""The page: what the template shows, from runs."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..optim.statistics import OBSERVED
from ..text import format_bytes, printable
from ..version import __version__
from .charts import COLORS, heat_map, limits_of, line_chart
from .memory import PARTS
from .runs import Run
from .settings import text_of


TEMPLATES = Path(__file__).parent / "templates"
TITLES = {"pca_loss": "PCA loss", "orthogonality": "Orthogonality"}
NO_VALUE = "–"


def render(runs: Sequence[Run], errors: Mapping[str, str]) -> str:
    """The HTML of a page that needs nothing but itself: no script, no request.

    Args:
        runs (`list[Run]`): What is shown, at least one.
        errors (`dict[str, str]`): By name, why other runs could not be read.

    Raises:
        ImportError: Without matplotlib or jinja2.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError('a report needs matplotlib and jinja2: pip install ".[report]" in a clone') from error
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # names and settings come from files
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        version=__version__,
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        errors=errors,
        cards=[_card(i, run) for i, run in enumerate(runs)],
        colors=COLORS,
        charts=_charts(runs),
        metrics=_metrics(runs),
        heat_maps=_heat_maps(runs),
        memory=_memory(runs),
        throughput=_throughput(runs),
        differences=_differences(runs),
        settings=[(i, run.name, _texts(run.settings)) for i, run in enumerate(runs)],
    )


def _card(index: int, run: Run) -> dict[str, Any]:
    """A run's name and key figures."""
    losses, evaluations = run.series("loss")[1], run.series("eval_loss")[1]
    state, adamw = run.memory.state, run.memory.adamw_state
    figures = [
        ("steps", f"{run.steps:,}", ""),
        ("training loss", _number(losses[-1] if losses else None), ""),
        (
            "evaluation loss",
            _number(evaluations[-1] if evaluations else None),
            f"best {_number(min(evaluations))}" if evaluations and min(evaluations) < evaluations[-1] else "",
        ),
        ("PCA loss", _number(run.last("osd/pca_loss")), "outside the subspaces"),
        ("optimizer state", _bytes(state), f"{state / adamw:.0%} of AdamW’s" if state and adamw else ""),
        ("speed", *_speed(run.throughput())),
    ]
    return {
        "index": index,
        "name": run.name,
        "optimizer": text_of(run.settings.get("Training", {}).get("optim", "")),
        "figures": [figure for figure in figures if figure[1] != NO_VALUE],
        "notes": run.notes,
    }


def _charts(runs: Sequence[Run]) -> dict[str, list[tuple[str, str, str | None]]]:
    """By section: titles, what they show, and pictures."""
    lines: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {
        "loss": [
            ("Training loss", "mean since the last logged step", "loss", {}),
            ("Evaluation loss", "on the evaluation data", "eval_loss", {"markers": True}),
        ],
        "schedule": [
            ("Learning rate", "of the weights", "learning_rate", {"from_zero": True}),
            (
                "Gradient norm",
                "before clipping; with source=activations of what its layers make, not of G",
                "grad_norm",
                {},
            ),
        ],
        "subspaces": [
            (
                "PCA loss",
                "share of the gradients’ energy outside the subspaces, or with source=activations of the layers’ "
                "inputs’: mean of all layers, and from the least to the largest of them",
                "osd/pca_loss",
                {"band": "pca_loss", "from_zero": True},
            ),
            (
                "Orthogonality",
                "‖PᵀP − I‖ / √r, 0 for orthonormal columns: mean of all layers, and from the least to the largest",
                "osd/orthogonality",
                {"band": "orthogonality", "from_zero": True},
            ),
        ],
    }
    return {
        section: [
            (title, text, line_chart(runs, key, title, name=f"{section}{i}", **options))
            for i, (title, text, key, options) in enumerate(charts)
        ]
        for section, charts in lines.items()
    }


def _metrics(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Names of what evaluations found, with each run's value."""
    found = [run.metrics() for run in runs]
    names = sorted({name for own in found for name in own})
    return [(name, [_number(own.get(name)) for own in found]) for name in names]


def _heat_maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run with statistics its pictures, and a table of the first and last values."""
    limits = {key: limits_of(runs, key) for key in OBSERVED}
    shown = []
    for i, run in enumerate(runs):
        if run.layers is None:
            continue
        pictures = [
            (
                TITLES[key],
                heat_map(run.layers, key, f"{TITLES[key]} of each layer, {run.name}", limits[key], name=f"{key}-{i}"),
            )
            for key in OBSERVED
        ]
        rows = []
        for j, name in enumerate(run.layers.names):
            seen = {key: [v for v in run.layers.values[key][j] if math.isfinite(v)] for key in OBSERVED}
            rows.append((name, *(_number(seen[key][k] if seen[key] else None) for key in OBSERVED for k in (0, -1))))
        shown.append({"index": i, "name": run.name, "pictures": pictures, "rows": rows})
    return shown


def _memory(runs: Sequence[Run]) -> dict[str, Any]:
    """Bars in per cent of the largest run, and the figures."""
    widest = max(run.memory.total for run in runs)
    used = [part for part in PARTS if any(part in run.memory.parts for run in runs)]
    bars = [
        {
            "index": i,
            "name": run.name,
            "parts": [(PARTS.index(part), part, size / widest * 100) for part, size in run.memory.parts.items()],
            "cells": [
                *(_bytes(run.memory.parts.get(part)) for part in used),
                *map(_bytes, (run.memory.state, run.memory.adamw_state, run.memory.peak)),
            ],
        }
        for i, run in enumerate(runs)
        if run.memory.parts
    ]
    return {"parts": [(PARTS.index(part), part) for part in used], "bars": bars}


def _throughput(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rates of each run, and the steps per second in per cent of the fastest."""
    rates = [run.throughput() for run in runs]
    widest = max((rate["steps_per_second"] or 0 for rate in rates), default=0)
    return [
        {
            "index": i,
            "name": run.name,
            "share": (rate["steps_per_second"] or 0) / widest * 100 if widest else 0,
            "cells": [
                _number(rate["steps_per_second"]),
                _number(rate["samples_per_second"]),
                _number(rate["tokens_per_second"]),
                _seconds(rate["seconds"]),
                _number(run.last("eval_samples_per_second")),
            ],
        }
        for i, (run, rate) in enumerate(zip(runs, rates, strict=True))
        if any(value is not None for value in (*rate.values(), run.last("eval_samples_per_second")))
    ]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """By section, the settings in which the runs differ, with each run's value."""
    sections = list(dict.fromkeys(section for run in runs for section in run.settings))
    found = []
    for section in sections:
        names = list(dict.fromkeys(name for run in runs for name in run.settings.get(section, {})))
        texts = [_texts(run.settings).get(section) for run in runs]  # None: nothing of this kind was saved
        rows = [(name, [NO_VALUE if text is None else text.get(name, NO_VALUE) for text in texts]) for name in names]
        known = [i for i, text in enumerate(texts) if text is not None]
        differing = [(name, values) for name, values in rows if len({values[i] for i in known}) > 1]
        if differing:
            found.append((section, differing))
    return found


def _texts(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    return {section: {name: text_of(value) for name, value in values.items()} for section, values in settings.items()}


def _speed(rate: Mapping[str, float | None]) -> tuple[str, str]:
    for name, unit in (
        ("tokens_per_second", "tokens"),
        ("samples_per_second", "samples"),
        ("steps_per_second", "steps"),
    ):
        if rate[name] is not None:
            return _number(rate[name]), f"{unit} per second"
    return NO_VALUE, ""


def _number(value: float | None) -> str:
    """With four digits, or all that stand before the point."""
    if value is None:
        return NO_VALUE
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:#.4g}".rstrip(".")


def _bytes(size: float | None) -> str:
    return NO_VALUE if size is None else format_bytes(size, 2)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    )
