"""The state of a parameter: a flat dict of tensors, described in one place."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...update_rules import MIN_8BIT_SIZE, MIN_BLOCK_SIZE, BlockWise8bit, TensorSpec
from .plan import Plan, ProjectedPlan, Rules, StackedPlan, make_plan, names_of, rules_of
from .sharding import divided, is_sharded


def state_spec(plan: Plan, rules: Rules) -> dict[str, TensorSpec]:
    """Every entry of a parameter's state: what is allocated, what a checkpoint must hold, what `memory` adds up."""
    if isinstance(plan, StackedPlan):
        one = state_spec(plan.experts[0], rules) | {"idle_steps": TensorSpec((), torch.float32)}
        return {name: TensorSpec((plan.matrices, *entry.shape), entry.dtype) for name, entry in one.items()}
    spec = {"step": TensorSpec((), torch.float32), "skipped_steps": TensorSpec((), torch.float32)}
    for moment in rules.weight.moments(plan.update_shape):
        spec |= rules.weight_storage.spec(
            moment, "", plan.compute_dtype, divided(moment, plan.sharding, len(plan.update_shape))
        )
    if not isinstance(plan, ProjectedPlan):
        return spec
    if rules.subspace.code is None:
        spec["projection"] = TensorSpec(plan.projection_shape, plan.projection_dtype)
    else:
        shape, dtype = rules.subspace.code_spec(plan.rank)
        spec[rules.subspace.code] = TensorSpec((2, *shape) if plan.two_sided else shape, dtype)
    if rules.residual == "scaled":
        spec["residual_norm"] = TensorSpec((), plan.compute_dtype)
    if rules.projection is not None:
        spec["projection_step"] = TensorSpec((), torch.float32)
        for moment in rules.projection.moments(plan.projection_shape):
            spec |= rules.projection_storage.spec(moment, "projection_", plan.compute_dtype)
    return spec


def create_state(p: Tensor, plan: Plan, rules: Rules) -> dict[str, Tensor]:
    """Zeros for everything in `state_spec`, on the parameter's device: DTensors where they are divided."""
    state, spec = {}, state_spec(plan, rules)
    _warn_dense(plan, rules, spec)
    for name, entry in spec.items():
        value = torch.zeros(local_shape(entry, plan), dtype=entry.dtype, device=p.device)
        if plan.sharding is not None and entry.divided is not None:
            value = plan.sharding.wrap(value, entry.shape, entry.divided)
        state[name] = value
    return state


def _warn_dense(plan: Plan, rules: Rules, spec: Mapping[str, TensorSpec]) -> None:
    """Say once where sharding costs a projected weight its 8-bit moments."""
    if not isinstance(plan, ProjectedPlan) or not isinstance(rules.weight_storage, BlockWise8bit):
        return
    moments = [m for m in rules.weight.moments(plan.update_shape) if divided(m, plan.sharding, 2) is not None]
    if any(spec[m.name].dtype != torch.uint8 and math.prod(m.shape) >= MIN_8BIT_SIZE for m in moments):
        warnings.warn(
            "Moments of weights that are sharded stay in float32: to be kept in 8 bits, their rows must be whole and "
            f"a multiple of {MIN_BLOCK_SIZE} long. Use such a rank.",
            stacklevel=5,
        )


def local_shape(entry: TensorSpec, plan: Plan) -> tuple[int, ...]:
    """Shape of this process's part of a state entry."""
    return entry.shape if plan.sharding is None else plan.sharding.local_shape(entry.shape, entry.divided)


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
                spec = state_spec(plan, rules_of(group))
                expected = {name: (entry.shape, entry.dtype) for name, entry in spec.items()}
                got = {name: (tuple(value.shape), value.dtype) for name, value in states[name].items()}
                if got != expected:
                    raise ValueError(
                        f"The saved state of {plan.name} does not fit: it has {got}, expected {expected}."
                    )
                if any(
                    (entry.divided is not None) != is_sharded(states[plan.name][key]) for key, entry in spec.items()
                ):
                    kinds = ("whole", "sharded") if plan.sharding else ("sharded", "whole")
                    raise ValueError(
                        f"The saved state of {plan.name} is {kinds[0]} and the parameter is {kinds[1]}: load it with "
                        "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
                    )
        position += len(group["params"])
