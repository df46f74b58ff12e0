"""The names, arguments, callback and trainer for transformers."""

# First: the registration that follows it imports our modules, and none may be half imported then, here or in a thread.
import transformers.trainer  # noqa: F401

from .arguments import OSDTrainingArguments
from .callback import OSDCallback
from .checkpoints import last_complete_checkpoint
from .patches import register
from .trainer import OSDTrainer


__all__ = ["OSDCallback", "OSDTrainer", "OSDTrainingArguments", "last_complete_checkpoint", "register"]
