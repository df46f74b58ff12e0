"""Make the optimizer's names known to transformers: `TrainingArguments(optim="osd_adamw8bit")` then works anywhere."""

from typing import Any

from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames

from ..names import RSO_NAMES, add_names
from ..optim import OPTIM_NAMES, OSD
from ..rso import RSOCallback
from .callback import OSDCallback
from .checkpoints import register_last_complete_checkpoint, register_written_checkpoint
from .construction import constructor_arguments
from .gradient_norm import register_clipping
from .partial_load import register_partial_load
from .push import register_push
from .rso import build_rso_optimizer_kwargs


def register() -> None:
    """Add the names to `OptimizerNames`, their handlers to Trainer's table and the callbacks to every Trainer.

    Trainers also pass over torn checkpoints from then on (`checkpoints.py`) and push a model card that tells about the
    optimizer (`push.py`).

    `import hf_osd` has it called when Trainer is imported (`startup.py`); calling it again changes nothing.
    """
    handlers: dict[str, Any] = dict.fromkeys(OPTIM_NAMES, build_optimizer_kwargs)
    handlers |= dict.fromkeys(RSO_NAMES, build_rso_optimizer_kwargs)
    add_names(OptimizerNames)
    for name, handler in handlers.items():
        # By member as Trainer looks it up, and by string, which is what arguments hold after unpickling.
        _OPTIMIZER_HANDLERS[OptimizerNames(name)] = _OPTIMIZER_HANDLERS[name] = handler
    register_last_complete_checkpoint()
    register_written_checkpoint()
    register_partial_load()
    register_push()
    register_clipping()
    callbacks: list[Any] = transformers_trainer.DEFAULT_CALLBACKS
    callbacks += [callback for callback in (OSDCallback, RSOCallback) if callback not in callbacks]


def build_optimizer_kwargs(context: OptimizerContext) -> tuple[type[OSD], dict[str, Any]]:
    """Trainer's handler: the optimizer's class and everything to construct it with."""
    if context.model is None:
        raise ValueError(f"{context.args.optim} needs the model to choose what it projects.")
    return OSD, constructor_arguments(context.args, context.model)
