"""How P fares: all that a logged step saw, read from the device in one transfer."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .step.experts import ExpertWeights
from .step.full_weight import FullWeight
from .step.sharding import Sharding, local
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


def share_observations(weights: Weights) -> None:
    """Give every process what the others saw of their experts, and how many steps those skipped: one sum a mesh.

    All processes take part, whether or not their experts have gradients.
    """
    stacks: dict[tuple[Any, int], list[tuple[ExpertWeights, Tensor]]] = defaultdict(list)
    for group in weights.groups:
        for p in group["params"]:
            weight = weights.of(p)
            sharding = weight.geometry.sharding
            if isinstance(weight, ExpertWeights) and weight.geometry.scattered and sharding is not None:
                stacks[sharding.mesh, sharding.copies].append((weight, _seen_here(weight, weights)))
            weight.release()
    for members in stacks.values():
        sizes, sharding = [seen.shape[1] for _, seen in members], cast(Sharding, members[0][0].geometry.sharding)
        everyone = sharding.sum(torch.cat([seen for _, seen in members], dim=1))
        for (weight, _), (loss, error, skipped) in zip(members, everyone.split(sizes, dim=1), strict=True):
            weights.observations[weight] = (loss, error, skipped.nansum())


def _seen_here(weight: ExpertWeights, weights: Weights) -> Tensor:
    """Loss, error and skipped steps of each expert of a stack, (3, E): zero where it is on another process."""
    geometry, device = weight.geometry, weight.p.device
    nothing = torch.full((len(geometry.experts),), math.nan, device=device)
    loss, error = weights.observations.get(weight, (nothing, nothing))
    skipped = weight.slot.state.get("skipped_steps", nothing)
    seen = torch.zeros(3, geometry.matrices, device=device)
    seen[:, list(geometry.experts)] = torch.stack([value.float() for value in (loss, error, skipped)])
    return seen


def _skipped(weights: Weights) -> list[Tensor]:
    """Skipped steps of each parameter; of experts on other processes, those that were shared."""
    found = []
    for group in weights.groups:
        for p in group["params"]:
            _, _, *shared = weights.observations.get(weights.of(p), (None, None))
            weights.of(p).release()
            if "skipped_steps" in weights.state.get(p, {}):
                found.append(shared[0] if shared else local(weights.state[p]["skipped_steps"]))
    return found


def _read(
    weights: Weights, observations: Sequence[tuple[Tensor, ...]], others: Sequence[Tensor]
) -> tuple[dict[str, float], list[float]]:
    """The summary, and all numbers of `others`."""
    skipped = _skipped(weights)
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
