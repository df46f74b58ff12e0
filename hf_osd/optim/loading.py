"""Load a saved state: exactly, or not at all; for the parameters that fit, where the user asks for that."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .compatibility import differences, restored_options, table, traits
from .options.rules import rules_of
from .options.table import DEFAULTS
from .step.geometry import geometry_of, names_of
from .step.sharding import is_sharded
from .step.state import state_spec


State = dict[Tensor, dict[str, Tensor]]


def match_state(
    live_groups: list[dict[str, Any]], state_dict: Mapping[str, Any], partial: bool
) -> tuple[State, list[dict[str, Any]]]:
    """What to set in an optimizer so that it continues from `state_dict`. Changes nothing.

    Args:
        live_groups (`list[dict]`): The optimizer's groups.
        state_dict (`dict`): A saved state, as `state_dict()` gives it.
        partial (`bool`): Whether to leave out parameters that differ instead of refusing.

    Returns:
        The state by parameter, on the parameters' devices in the saved dtypes, and the groups to restore.

    Raises:
        ValueError: With a table of what differs, or if an entry is missing or has another shape or dtype.
    """
    # one that was saved before there was an option had its default
    saved_groups = [{**DEFAULTS, **group} for group in state_dict["param_groups"]]
    params: dict[str, Tensor] = {}
    for group in live_groups:
        params.update(zip(names_of(group, len(params)), group["params"], strict=True))
    keys: dict[str, Any] = {}
    for group in saved_groups:
        keys.update(zip(names_of(group, len(keys)), group["params"], strict=True))
    saved, current = traits(saved_groups, params), traits(live_groups, params)
    rows = differences(saved, current)
    as_saved = not rows
    if partial:  # the groups stay as they are now, whatever place a parameter has had in them
        rows = differences(saved, current, placed=False)
    elif rows:
        raise ValueError(
            f"The state was saved by another optimizer: {len(rows)} of {len(saved | current)} parameters differ.\n"
            f"{table(rows)}\n"
            "Use the options it was saved with, or set `partial_load` to start the differing parameters anew."
        )
    different = {name for name, _, _ in rows}
    by_name = {name: state_dict["state"].get(key, {}) for name, key in keys.items() if name not in different}
    check_state_dict(saved_groups, by_name, params)
    if rows:
        warnings.warn(
            f"{len(rows)} of {len(saved | current)} parameters differ from the saved state and start anew.\n"
            f"{table(rows)}",
            stacklevel=4,
        )
    if as_saved:
        replaced = restored_options(saved_groups, live_groups)
        if replaced:
            warnings.warn(f"The saved state's options are restored: {'; '.join(replaced)}.", stacklevel=4)
    state = {params[name]: _to_device(entries, params[name]) for name, entries in by_name.items() if entries}
    return state, saved_groups if as_saved else _with_schedule(live_groups, saved_groups)


def _to_device(entries: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    # A copy where nothing moves: the state is changed in place, and the saved one must not be.
    return {
        name: value.detach().clone() if value.device == p.device else value.to(p.device)
        for name, value in entries.items()
    }


def _with_schedule(live_groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The live groups with the learning rate that the saved run had come to, for their first parameter or else any."""
    owners: dict[str, dict[str, Any]] = {}
    for group in saved_groups:
        owners.update(dict.fromkeys(names_of(group, len(owners)), group))
    groups: list[dict[str, Any]] = []
    position = 0
    for group in live_groups:
        names = names_of(group, position)
        owner = next((owners[name] for name in names if name in owners), saved_groups[0])
        schedule: dict[str, Any] = {name: owner[name] for name in ("lr", "initial_lr") if name in owner}
        groups.append({**group, **schedule, "params": list(range(position, position + len(names)))})
        position += len(names)
    return groups


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
                geometry = geometry_of(group, index, params[name], position + index)
                spec = state_spec(geometry, rules_of(group))
                expected = {name: (entry.shape, entry.dtype) for name, entry in spec.items()}
                got = {name: (tuple(value.shape), value.dtype) for name, value in states[name].items()}
                if got != expected:
                    raise ValueError(
                        f"The saved state of {geometry.name} does not fit: it has {got}, expected {expected}."
                    )
                if any(
                    (entry.divided is not None) != is_sharded(states[geometry.name][key])
                    for key, entry in spec.items()
                ):
                    kinds = ("whole", "sharded") if geometry.sharding else ("sharded", "whole")
                    raise ValueError(
                        f"The saved state of {geometry.name} is {kinds[0]}, the parameter {kinds[1]}: load it with "
                        "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
                    )
        position += len(group["params"])
