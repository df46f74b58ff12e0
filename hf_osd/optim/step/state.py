"""The state of a parameter: a flat dict of tensors, described in one place."""

import math
import warnings
from collections.abc import Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor

from ...subspace import SUBSPACES
from ...update_rules import MIN_8BIT_SIZE, MIN_BLOCK_SIZE, BlockWise8bit, MomentStorage, TensorSpec, UpdateRule
from ..options.rules import Rules
from .geometry import Geometry, ProjectedGeometry
from .sharding import Sharding, divided


P_SCALE = "projection_scale"  # beside an int8 P, one for each row
P_ENTRIES = {"projection", P_SCALE} | {rule.code for rule in SUBSPACES.values() if rule.code}  # a code stands for P


def state_spec(geometry: Geometry, rules: Rules) -> dict[str, TensorSpec]:
    """Every entry of a parameter's state: what is allocated, what a checkpoint must hold, what `memory` adds up.

    Of a stack the entries of one matrix with a leading dimension E, and `idle_steps`.
    """
    if not geometry.stacked:
        return _matrix_spec(geometry, rules)
    assert isinstance(geometry, ProjectedGeometry)
    spec = _matrix_spec(geometry.expert(0), rules) | {"idle_steps": TensorSpec((), torch.float32)}
    stack: dict[str, TensorSpec] = {}
    for name, entry in spec.items():
        dim = 0 if geometry.scattered else None if entry.divided is None else entry.divided + 1
        stack[name] = TensorSpec((geometry.matrices, *entry.shape), entry.dtype, dim)
    return stack


def saved_projection(geometry: ProjectedGeometry) -> TensorSpec:
    """P as files and the Hub have it, whatever it is made of: one in int8 as the floats that it is read as."""
    dtype = geometry.compute_dtype if geometry.projection_dtype == torch.int8 else geometry.projection_dtype
    stack = (geometry.matrices,) if geometry.stacked else ()
    return TensorSpec((*stack, *geometry.projection_shape), dtype)


def divided_specs(geometry: Geometry, rules: Rules) -> list[dict[str, TensorSpec]]:
    """What the state of a whole parameter may be instead: that of the same one divided among processes, gathered."""
    if geometry.sharding is not None or geometry.stacked:
        return []
    ways = [Sharding(None, (), dim, 0, 1) for dim in range(len(geometry.shape))]
    return [state_spec(replace(geometry, sharding=way), rules) for way in ways]


def held_elsewhere(geometry: Geometry, rules: Rules) -> Set[str]:
    """Names of the entries that are in another weight's state, whose P this one uses."""
    return state_spec(replace(geometry, holder=None), rules).keys() - state_spec(geometry, rules).keys()


def _matrix_spec(geometry: Geometry, rules: Rules) -> dict[str, TensorSpec]:
    spec = {"step": TensorSpec((), torch.float32), "skipped_steps": TensorSpec((), torch.float32)}
    for moment in rules.weight.moments(geometry.update_shape):
        dim = divided(moment, geometry.sharding, len(geometry.update_shape))
        spec |= rules.weight_storage.spec(moment.kept("", geometry.compute_dtype), dim)
    if not isinstance(geometry, ProjectedGeometry):
        return spec
    if rules.restarts:
        spec["moment_step"] = TensorSpec((), torch.float32)
    if not geometry.holds_projection:
        return spec
    if rules.subspace.code is None:
        rows = None if geometry.rows is None else 0
        spec["projection"] = TensorSpec(geometry.projection_shape, geometry.projection_dtype, rows)
        if geometry.projection_dtype == torch.int8:
            spec[P_SCALE] = TensorSpec(geometry.projection_shape[:1], geometry.compute_dtype, rows)
    else:
        shape, dtype = rules.subspace.code_spec(geometry.rank)
        spec[rules.subspace.code] = TensorSpec((2, *shape) if geometry.two_sided else shape, dtype)
    if rules.residual == "scaled":
        spec["residual_norm"] = TensorSpec((), geometry.compute_dtype)
    if rules.projection is not None:
        spec["projection_step"] = TensorSpec((), torch.float32)
        spec |= _projection_moments(geometry, rules.projection, rules.projection_storage)
    return spec


def _projection_moments(
    geometry: ProjectedGeometry, rule: UpdateRule, storage: MomentStorage
) -> dict[str, TensorSpec]:
    spec: dict[str, TensorSpec] = {}
    for moment in rule.moments(geometry.projection_shape):
        by_rows = geometry.divisible and 0 in (moment.dims or (0,))
        spec |= storage.spec(moment.kept("projection_", geometry.compute_dtype), 0 if by_rows else None)
    return spec if geometry.rows else {name: entry._replace(divided=None) for name, entry in spec.items()}


def create_state(device: torch.device, geometry: Geometry, rules: Rules) -> dict[str, Tensor]:
    """Zeros for everything in `state_spec`: DTensors where they are divided."""
    state, spec = {}, state_spec(geometry, rules)
    _warn_dense(geometry, rules, spec)
    for name, entry in spec.items():
        value = torch.zeros(local_shape(name, entry, geometry), dtype=entry.dtype, device=device)
        sharding = sharding_of_entry(name, geometry)
        if sharding is not None and entry.divided is not None:
            value = sharding.wrap(value, entry.shape, entry.divided)
        state[name] = value
    return state


def exchange_moments(
    state: dict[str, Tensor], geometry: Geometry, before: Rules, rules: Rules, device: torch.device
) -> None:
    """Let a state have the moments that other rules keep: SGD's has one while its momentum is not 0."""
    new = create_state(device, geometry, rules)
    for name in state_spec(geometry, before).keys() - new.keys():
        state.pop(name, None)
    state.update({name: value for name, value in new.items() if name not in state})


def convert(state: dict[str, Tensor], geometry: Geometry, rules: Rules) -> None:
    """Bring a state into the precision of a parameter that was converted."""
    spec = state_spec(geometry, rules)
    for name in spec.keys() & state.keys():
        if state[name].is_floating_point() and spec[name].dtype.is_floating_point:  # dense in place of 8 bits may be
            state[name] = state[name].to(spec[name].dtype)


def _warn_dense(geometry: Geometry, rules: Rules, spec: Mapping[str, TensorSpec]) -> None:
    """Say once where sharding costs a projected weight its 8-bit moments."""
    if not isinstance(geometry, ProjectedGeometry) or not isinstance(rules.weight_storage, BlockWise8bit):
        return
    geometry = geometry.expert(0) if geometry.stacked else geometry
    moments = [m for m in rules.weight.moments(geometry.update_shape) if divided(m, geometry.sharding, 2) is not None]
    if any(spec[m.name].dtype != torch.uint8 and math.prod(m.shape) >= MIN_8BIT_SIZE for m in moments):
        warnings.warn(
            "Moments of weights that are sharded stay in float32: to be kept in 8 bits, their rows must be whole and "
            f"a multiple of {MIN_BLOCK_SIZE} long. Use such a rank.",
            stacklevel=5,
        )


def local_shape(name: str, entry: TensorSpec, geometry: Geometry) -> tuple[int, ...]:
    """Shape of this process's part of a state entry."""
    sharding = sharding_of_entry(name, geometry)
    return entry.shape if sharding is None else sharding.local_shape(entry.shape, entry.divided)


def sharding_of_entry(name: str, geometry: Geometry) -> Sharding | None:
    """How a state entry is divided, if it is: P and its moments by rows of their own."""
    return geometry.rows if name.startswith("projection") and geometry.rows is not None else geometry.sharding
