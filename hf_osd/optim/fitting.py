"""Which entries of a saved state fit the parameters that it is loaded for, in the form that these have them."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ..update_rules import TensorSpec
from .options.rules import rules_of
from .step.geometry import Geometry, geometry_of, names_of
from .step.sharding import is_sharded
from .step.state import divided_specs, held_elsewhere, state_spec


def fitting_states(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[str, Mapping[str, Tensor]],
    params: Mapping[str, Tensor],
    divide: bool,
) -> tuple[dict[str, dict[str, Tensor]], list[tuple[str, str, str]]]:
    """The saved states, in the dtypes of today: second moments may have been saved in bfloat16.

    Entries that others keep beside ours come along. A P that another weight's state holds is left out. Moments of
    whole parameters may be as those are kept that are divided: dense, or in 8-bit blocks of rows.

    Args:
        groups (`list[dict]`): The saved groups.
        states (`dict`): Saved state by parameter name; an empty one is that of a parameter that was never stepped.
        params (`dict[str, torch.Tensor]`): The parameters by name.
        divide (`bool`): Whether processes divide P here, where they can.

    Returns:
        Those in which every entry has the shape and dtype that the saved options ask for, and (parameter, what its
        state has, what it should have) for the others.

    Raises:
        ValueError: For a sharded state of a whole parameter, and the other way round.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unfit: list[tuple[str, str, str]] = []
    position = 0
    for group in groups:
        for index, name in enumerate(names_of(group, position)):
            if states.get(name):
                geometry = geometry_of(group, index, params[name], position + index, divide)
                rules = rules_of(group)
                spec, entries = state_spec(geometry, rules), dict(states[name])
                for key in entries.keys() & held_elsewhere(geometry, rules):
                    del entries[key]
                state = _as_wide(_of_saved({key: entries.pop(key) for key in spec if key in entries}), spec)
                got, expected = _entries(state), _entries(spec)
                if any(got == _entries(form) for form in (spec, *divided_specs(geometry, rules))):
                    state = _divided_as_here(state, geometry, spec)
                    _refuse_other_sharding(state, geometry, spec)
                    expected = got  # steps go by the tensors
                if got == expected or not state:
                    found[name] = state | entries
                else:
                    unfit.append((name, ", ".join(got - expected) or "-", ", ".join(expected - got) or "-"))
        position += len(group["params"])
    return found, unfit


def _entries(state: Mapping[str, Tensor | TensorSpec]) -> Set[str]:
    return {f"{name} {tuple(entry.shape)} {str(entry.dtype)[6:]}": None for name, entry in state.items()}.keys()


def _of_saved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the absmax of dense moments, which torch's `set_state_dict` adds from this run, where it has codes."""
    beside_dense = {f"{name}_absmax" for name, value in state.items() if value.dtype != torch.uint8}
    return {name: value for name, value in state.items() if name not in beside_dense}


def _as_wide(state: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    wide = {name for name, entry in spec.items() if entry.dtype == torch.float32 and not name.endswith("step")}
    return {
        name: value.float() if name in wide and value.dtype == torch.bfloat16 else value
        for name, value in state.items()
    }


def _divided_as_here(
    state: dict[str, Tensor], geometry: Geometry, spec: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """P and its moments, of a sharded weight, divided or whole as this run has them. Asks all processes."""
    if geometry.sharding is None:
        return state
    found: dict[str, Any] = dict(state)
    for name, value in state.items():
        if not name.startswith("projection") or (spec[name].divided is not None) == is_sharded(value):
            continue
        if geometry.rows is None:
            found[name] = found[name].full_tensor()
        else:
            found[name] = geometry.rows.wrap(geometry.rows.own(value).clone(), value.shape, spec[name].divided)
    return found


def _refuse_other_sharding(state: Mapping[str, Tensor], geometry: Geometry, spec: Mapping[str, TensorSpec]) -> None:
    if any((spec[key].divided is not None) != is_sharded(entry) for key, entry in state.items()):
        kinds = ("whole", "sharded") if geometry.sharding else ("sharded", "whole")
        raise ValueError(
            f"The saved state of {geometry.name} is {kinds[0]}, the parameter {kinds[1]}: load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )
