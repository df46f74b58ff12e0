"""Trainer's own clipping steps back where the optimizer clips: it would see some of the gradients only."""

import functools
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

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


def refuse_ignored_by_mode(optimizer: OSD, args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that an optimizer of the user's own, which takes gradients, would not hear of.

    One that Trainer builds has been told.
    """
    mode = optimizer.mode
    if mode.takes_gradients and (args.max_grad_norm or None) != mode.max_grad_norm:
        raise ValueError(
            f"Trainer would clip by max_grad_norm={args.max_grad_norm}, but this optimizer takes the gradients before "
            f"it, and clips by max_grad_norm={mode.max_grad_norm}. Give both the same (TrainingArguments: 0 for none)."
        )
    if mode.layerwise and args.gradient_accumulation_steps > 1 and not mode.gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} needs an optimizer with "
            "`gradient_accumulation=True`: this one steps with the first of them."
        )
