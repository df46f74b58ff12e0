"""The names, arguments, callback and trainer for transformers."""

from .arguments import OSDTrainingArguments
from .callback import OSDCallback
from .checkpoints import last_complete_checkpoint
from .patches import register
from .trainer import OSDTrainer


__all__ = ["OSDCallback", "OSDTrainer", "OSDTrainingArguments", "last_complete_checkpoint", "register"]
