"""The state of a parameter: a flat dict of tensors, described in one place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..update_rules import TensorSpec
from .plan import Plan, ProjectedPlan, Rules, StackedPlan, make_plan, names_of, rules_of


def state_spec(plan: Plan, rules: Rules) -> dict[str, TensorSpec]:
    """Every entry of a parameter's state: what is allocated, what a checkpoint must hold, what `memory` adds up."""
    if isinstance(plan, StackedPlan):
        one = state_spec(plan.experts[0], rules) | {"idle_steps": TensorSpec((), torch.float32)}
        return {name: TensorSpec((plan.matrices, *entry.shape), entry.dtype) for name, entry in one.items()}
    spec = {"step": TensorSpec((), torch.float32), "skipped_steps": TensorSpec((), torch.float32)}
    for moment in rules.weight.moments(plan.update_shape):
        spec |= rules.weight_storage.spec(moment, "", plan.compute_dtype)
    if not isinstance(plan, ProjectedPlan):
        return spec
    spec["projection"] = TensorSpec(plan.projection_shape, plan.projection_dtype)
    if rules.projection is not None:
        spec["projection_step"] = TensorSpec((), torch.float32)
        for moment in rules.projection.moments(plan.projection_shape):
            spec |= rules.projection_storage.spec(moment, "projection_", plan.compute_dtype)
    return spec


def create_state(p: Tensor, plan: Plan, rules: Rules) -> dict[str, Tensor]:
    """Zeros for everything in `state_spec`, on the parameter's device."""
    spec = state_spec(plan, rules)
    return {name: torch.zeros(entry.shape, dtype=entry.dtype, device=p.device) for name, entry in spec.items()}


def check_state_dict(
    groups: Sequence[Mapping[str, Any]], states: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]
) -> None:
    """Raise `ValueError` unless every saved entry has the shape and dtype that the saved options ask for.

    Args:
        groups (`list[dict]`): The saved groups.
        states (`dict`): Saved state by parameter name; an empty one is that of a parameter that was never stepped.
        params (`dict[str, torch.Tensor]`): The parameters by name.
    """
    position = 0
    for group in groups:
        for index, name in enumerate(names_of(group, position)):
            if states.get(name):
                plan = make_plan(group, index, params[name], position + index)
                expected = {name: tuple(entry) for name, entry in state_spec(plan, rules_of(group)).items()}
                got = {name: (tuple(value.shape), value.dtype) for name, value in states[name].items()}
                if got != expected:
                    raise ValueError(
                        f"The saved state of {plan.name} does not fit: it has {got}, expected {expected}."
                    )
        position += len(group["params"])
