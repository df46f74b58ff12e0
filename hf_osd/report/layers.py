"""PCA loss and orthogonality of every projected weight over the steps of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optim.statistics import OBSERVED
from ..text import layer_and_kind
from ..trainer.statistics_file import number, read_lines


@dataclass
class Layers:
    """Values by weight and logged step.

    Attributes:
        names (`list[str]`): The weights, by kind and, within a kind, by layer.
        steps (`list[float]`): Ascending.
        times (`list[float]`): Seconds since 1970 at which each step was logged; not a number where it is not known.
        values (`dict[str, list[list[float]]]`):
            `pca_loss` and `orthogonality`: for each of the names a value for each of the steps, not a number where
            there is none.
        memory (`dict[str, Any]`): What else the last header says, such as `optimizer_state_bytes`.
    """

    names: list[str]
    steps: list[float]
    times: list[float]
    values: dict[str, list[list[float]]]
    memory: dict[str, Any] = field(default_factory=dict)

    def spread(self, key: str) -> tuple[list[float], list[float], list[float]]:
        """Steps, and the least and the largest of the weights' values at each."""
        lows, highs, steps = [], [], []
        for i, step in enumerate(self.steps):
            seen = [row[i] for row in self.values[key] if math.isfinite(row[i])]
            if seen:
                steps.append(step)
                lows.append(min(seen))
                highs.append(max(seen))
        return steps, lows, highs

    def kinds(self) -> list[tuple[str, int]]:
        """Each kind of weight and the number of its rows, in the order of `names`."""
        counts: dict[str, int] = {}
        for name in self.names:
            kind = layer_and_kind(name)[1]
            counts[kind] = counts.get(kind, 0) + 1
        return list(counts.items())


def read_layers(path: Path, until: int | None = None) -> Layers | None:
    """Read `_osd_statistics.jsonl`.

    Args:
        path (`Path`): The file.
        until (`int`, *optional*): Leave out later steps.

    Returns:
        `Layers` or `None`: `None` where there is no row.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    header: dict[str, Any] = {}
    rows: dict[float, tuple[float, dict[str, dict[str, float]]]] = {}  # by step: the last line of a step counts
    order: dict[str, None] = {}  # as an ordered set
    for line in read_lines(path):
        if "names" in line:
            header = line
            order |= dict.fromkeys(header["names"])
        elif until is None or line["step"] <= until:
            seen = {key: dict(zip(header["names"], line[key], strict=True)) for key in OBSERVED}
            rows[float(line["step"])] = (_value(number(line.get("time"))), seen)
    if not rows:
        return None
    names, steps = _sorted(list(order)), sorted(rows)
    values = {key: [[_value(rows[step][1][key].get(name)) for step in steps] for name in names] for key in OBSERVED}
    return Layers(names, steps, [rows[step][0] for step in steps], values, header)


def _sorted(names: Sequence[str]) -> list[str]:
    kinds = list(dict.fromkeys(layer_and_kind(name)[1] for name in names))
    return sorted(names, key=lambda name: (kinds.index(layer_and_kind(name)[1]), layer_and_kind(name)[0]))


def _value(value: float | None) -> float:
    return math.nan if value is None else float(value)
