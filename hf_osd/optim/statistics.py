"""How P fares: all that a logged step saw, read from the device in one transfer."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .step.full_weight import FullWeight
from .step.weights import Weights


OBSERVED = ("pca_loss", "orthogonality")  # in the order of `step.observation`


def summarize(weights: Weights) -> dict[str, float]:
    """The values of `OSD.statistics`."""
    return _read(weights, list(weights.observed().values()), [])[0]


def summarize_each(weights: Weights) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The values of `OSD.statistics`, and those of each projected parameter, read in the same one transfer.

    Returns:
        `tuple[dict, dict]`: As `OSD.statistics`; and `pca_loss` and `orthogonality` by parameter name, in the order of
            the groups: of a stack the mean over its experts, not a number where nothing was seen or the gradient was
            broken. Empty where no step was observed.
    """
    seen = weights.observed()
    pairs = list(seen.values())
    columns = [pair[i] for i in range(len(OBSERVED)) for pair in pairs]
    means, numbers = _read(weights, pairs, columns)
    rest = iter(numbers)
    values = [_mean([next(rest) for _ in range(column.numel())]) for column in columns]
    rows = {weight: (values[i], values[len(pairs) + i]) for i, weight in enumerate(seen)}
    each: dict[str, dict[str, float]] = {}
    for weight in weights if pairs else ():
        if not isinstance(weight, FullWeight):
            row = rows.get(weight, (math.nan, math.nan))
            each[weight.geometry.name] = dict(zip(OBSERVED, row, strict=True))
    return means, each


def _read(
    weights: Weights, observations: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor]
) -> tuple[dict[str, float], list[float]]:
    """The summary, and all numbers of `others`."""
    skipped = [state["skipped_steps"] for state in weights.state.values() if "skipped_steps" in state]
    if not skipped:
        return {}, []
    device = skipped[0].device
    values = {"skipped_steps": torch.stack([value.to(device).sum() for value in skipped]).sum()}
    for i, name in enumerate(OBSERVED):
        if observations:
            # not a number where the gradient was broken: that step was skipped and shows nothing
            values[name] = torch.cat([_flat(pair[i], device) for pair in observations]).nanmean()
    numbers = torch.cat([torch.stack(list(values.values())), *(_flat(other, device) for other in others)]).tolist()
    return dict(zip(values, numbers, strict=False)), numbers[len(values) :]


def _flat(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, torch.float32).reshape(-1)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
