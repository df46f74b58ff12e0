"""Trainer's own clipping steps back where the optimizer clips: it would see some of the gradients only."""

import functools
from typing import Any

import torch
from transformers import Trainer

from ..optim import OSD


CAN_LEAVE_CLIPPING = hasattr(Trainer, "_clip_grad_norm")  # not yet a method in transformers 5.2


def register_clipping() -> None:
    """Let every Trainer leave clipping to an [`OSD`] that takes gradients off the parameters.

    With `layerwise` no gradient is left for Trainer, and its clipping does nothing anyway. With `ddp_compression`
    those of the full-size parameters are, and would be clipped by a norm of their own.
    """
    if not CAN_LEAVE_CLIPPING or getattr(Trainer._clip_grad_norm, "leaves_clipping", False):
        return
    original = Trainer._clip_grad_norm

    @functools.wraps(original)
    def clip_grad_norm(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        osd = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(osd, OSD) or not osd.mode.takes_gradients:
            return original(self, *args, **kwargs)
        return torch.zeros(())  # `OSDCallback` logs the true one, which is known after the step

    clip_grad_norm.leaves_clipping = True  # type: ignore[attr-defined]
    Trainer._clip_grad_norm = clip_grad_norm  # type: ignore[method-assign]
