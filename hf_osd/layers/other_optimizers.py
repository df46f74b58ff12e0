"""Other optimizers' steps of weights whose layers make R: they do nothing, and that is said."""

import logging
import weakref
from typing import Any
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


logger = logging.getLogger("hf_osd")


def watch_others(layers: Any) -> RemovableHandle:
    """Say once of each other optimizer that steps weights of these layers that it never gets their gradients.

    Args:
        layers ([`PreparedLayers`]): The layers, which this does not keep alive.

    Returns:
        `RemovableHandle`: Its `remove` ends that.
    """
    known: WeakSet = WeakSet()
    reference = weakref.ref(layers)

    def hook(optimizer: Any, *_: Any) -> None:
        own = reference()
        if own is None or optimizer in known:
            return
        known.add(optimizer)
        params = {p for group in optimizer.param_groups for p in group["params"]}
        if params.isdisjoint(own.parameters()) and not params.isdisjoint(own.by_weight()):
            logger.warning(
                "%s steps weights whose layers make R for another optimizer, and they get no gradients. Call "
                "`hf_osd.unload(model)` before.",
                type(optimizer).__name__,
            )

    return register_optimizer_step_pre_hook(hook)
