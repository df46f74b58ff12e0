"""Resuming with `partial_load` where the run has other parameter groups: its schedule goes on for those of now."""

import functools
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer

from ..optim import OSD


def register_partial_load() -> None:
    """Let every Trainer with an [`OSD`] that loads partially fit a saved schedule to the groups of now."""
    original = Trainer._load_optimizer_and_scheduler
    if getattr(original, "fits_schedule", False):
        return

    @functools.wraps(original)
    def load(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        scheduler: Any = self.lr_scheduler
        osd = getattr(self.optimizer, "optimizer", self.optimizer)
        if not (isinstance(osd, OSD) and osd.partial_load and hasattr(scheduler, "load_state_dict")):
            return original(self, *args, **kwargs)
        load_state_dict = scheduler.load_state_dict
        # on the object, for this one call: Trainer reads the file itself
        scheduler.load_state_dict = lambda state: load_state_dict(fitted(state, scheduler, osd))
        try:
            return original(self, *args, **kwargs)
        finally:
            del scheduler.load_state_dict

    load.fits_schedule = True  # type: ignore[attr-defined]
    Trainer._load_optimizer_and_scheduler = load  # type: ignore[method-assign]


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
