"""Resuming with `partial_load` where the run has other parameter groups: its schedule goes on for those of now."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def fitted(state: Mapping[str, Any], scheduler: Any, optimizer: Optimizer) -> dict[str, Any]:
    """A saved schedule whose values for each group are those of the optimizer's groups, where the number differs.

    Args:
        state (`dict`): The schedule's `state_dict`.
        scheduler: The schedule that is to load it.
        optimizer (`torch.optim.Optimizer`): With the learning rates that it has loaded.
    """
    groups, saved = optimizer.param_groups, len(state.get("base_lrs", state.get("_last_lr", ())))
    if saved == len(groups):
        return dict(state)
    own = {
        "base_lrs": [group.get("initial_lr", group["lr"]) for group in groups],
        "_last_lr": [group["lr"] for group in groups],
        "lr_lambdas": [None] * len(groups),  # each keeps its own
    }
    others = {name for name, value in state.items() if isinstance(value, list) and len(value) == saved}
    return {**state, **{name: own.get(name, getattr(scheduler, name)) for name in others}}
