"""Who clips gradients: Trainer, or an optimizer that takes them before Trainer sees them."""

from transformers import Trainer, TrainingArguments

from ..optim import OSD


CAN_LEAVE_CLIPPING = hasattr(Trainer, "_clip_grad_norm")  # not yet a method in transformers 5.2


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
