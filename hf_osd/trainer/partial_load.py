"""Resuming with `partial_load` where the run has other parameter groups: its schedule goes on for those of now."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def fitted(state: Mapping[str, Any], scheduler: Any, optimizer: Optimizer) -> dict[str, Any]:
    """A saved schedule whose values for each group are those of the optimizer's groups.

    Saved learning rates go by the place of a group, and that may have another multiple or other parameters now.

    Args:
        state (`dict`): The schedule's `state_dict`.
        scheduler: The schedule that is to load it.
        optimizer (`torch.optim.Optimizer`): With the learning rates that it has loaded.
    """
    groups, saved = optimizer.param_groups, len(state.get("base_lrs", state.get("_last_lr", ())))
    own: dict[str, Any] = {}
    if saved != len(groups):
        others = (name for name, value in state.items() if isinstance(value, list) and len(value) == saved)
        own = {name: getattr(scheduler, name) for name in others}
        own["lr_lambdas"] = [None] * len(groups)  # each keeps its own
    own["base_lrs"] = [group.get("initial_lr", group["lr"]) for group in groups]
    own["_last_lr"] = [group["lr"] for group in groups]
    if "_schedulers" in state:  # of those that take turns, or go together
        pairs = zip(state["_schedulers"], scheduler._schedulers, strict=True)
        own["_schedulers"] = [fitted(one, schedule, optimizer) for one, schedule in pairs]
    return {**state, **{name: value for name, value in own.items() if name in state}}
