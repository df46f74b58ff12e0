"""Make the optimizer's names known to transformers: `TrainingArguments(optim="osd_adamw8bit")` then works anywhere."""

from typing import Any

from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames

from ..optim import OPTIM_NAMES, OSD
from ..rso import RSOCallback
from .callback import OSDCallback
from .checkpoints import register_last_complete_checkpoint, register_written_checkpoint
from .gradient_norm import register_clipping
from .partial_load import register_partial_load
from .push import register_push
from .rso import RSO_NAMES, build_rso_optimizer_kwargs
from .settings import constructor_arguments


def register() -> None:
    """Add the names to `OptimizerNames`, their handlers to Trainer's table and the callbacks to every Trainer.

    Trainers also pass over torn checkpoints from then on (`checkpoints.py`) and push a model card that tells about the
    optimizer (`push.py`).

    `import hf_osd` calls it; calling it again changes nothing.
    """
    handlers: dict[str, Any] = dict.fromkeys(OPTIM_NAMES, build_optimizer_kwargs)
    handlers |= dict.fromkeys(RSO_NAMES, build_rso_optimizer_kwargs)
    for name, handler in handlers.items():
        member = _add_member(name)
        # By member as Trainer looks it up, and by string, which is what arguments hold after unpickling.
        _OPTIMIZER_HANDLERS[member] = _OPTIMIZER_HANDLERS[name] = handler
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


def _add_member(name: str) -> OptimizerNames:
    if name in OptimizerNames._value2member_map_:
        return OptimizerNames(name)
    member = str.__new__(OptimizerNames, name)
    member._name_ = name.upper()
    member._value_ = name
    # An enum member is pickled as a call of its class, which fails where this package is not imported. The arguments
    # of a run are pickled into every checkpoint and pushed to the Hub, so our members are pickled as plain strings.
    vars(member).update(__reduce_ex__=lambda protocol: (str, (name,)), __deepcopy__=lambda memo: member)
    type.__setattr__(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    return member
