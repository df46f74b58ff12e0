"""How P fares: what a logged step saw, read from the device in one transfer."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .step.plan import ProjectedPlan


if TYPE_CHECKING:
    from .osd import OSD

OBSERVED = ("pca_loss", "orthogonality")  # in the order of `algorithm.observation`


def summarize(
    states: Iterable[Mapping[str, Tensor]], observations: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """The values of `OSD.statistics`.

    Args:
        states (`Iterable[dict]`): The parameters' states.
        observations (`list[tuple]`): What `algorithm.observation` returned for each projected parameter.
    """
    return _read(states, observations, [])[0]


def summarize_each(optimizer: "OSD") -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The values of `OSD.statistics`, and those of each projected parameter, read in the same one transfer.

    Returns:
        `tuple[dict, dict]`: As `OSD.statistics`; and `pca_loss` and `orthogonality` by parameter name, in the order of
            the groups: of a stack the mean over its experts, not a number where nothing was seen or the gradient was
            broken. Empty where no step was observed.
    """
    seen = optimizer._steps.observed()
    pairs = list(seen.values())
    columns = [pair[i] for i in range(len(OBSERVED)) for pair in pairs]
    means, numbers = _read(optimizer.state.values(), pairs, columns)
    rest = iter(numbers)
    values = [_mean([next(rest) for _ in range(column.numel())]) for column in columns]
    rows = {p: (values[i], values[len(pairs) + i]) for i, p in enumerate(seen)}
    each: dict[str, dict[str, float]] = {}
    for p in (p for group in optimizer.param_groups for p in group["params"] if pairs):
        plan = optimizer.plan_of(p)
        if isinstance(plan, ProjectedPlan):
            each[plan.name] = dict(zip(OBSERVED, rows.get(p, (math.nan, math.nan)), strict=True))
    return means, each


def _read(
    states: Iterable[Mapping[str, Tensor]], observations: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor]
) -> tuple[dict[str, float], list[float]]:
    """The summary, and all numbers of `others`."""
    skipped = [state["skipped_steps"] for state in states if "skipped_steps" in state]
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
