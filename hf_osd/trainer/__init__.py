"""The names, arguments, callback and trainer for transformers."""

from .arguments import OSDTrainingArguments
from .callback import OSDCallback
from .registration import register
from .trainer import OSDTrainer


__all__ = ["OSDCallback", "OSDTrainer", "OSDTrainingArguments", "register"]
