"""Every change that `import hf_osd` makes to transformers: names, callbacks, and one table of what is replaced.

A function that replaces another is called with that one as its first argument. Without [`OSD`] or [`SubZero`] as the
optimizer all do what the original does.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers import trainer as transformers_trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from ..hub.files import remove_set
from ..layers import CHILD
from ..names import add_names
from ..optim import OPTIM_NAMES, OSD
from ..optim.osd import osd_of
from ..optim.selection.wrappers import unwrapped
from ..subzero import NAME as SUBZERO
from ..subzero import SubZero, subzero_of
from . import forward_only
from .callback import OSDCallback
from .checkpoints import last_complete_checkpoint, load_converted
from .gathered import gather_projections
from .load_time import (
    forget,
    has_state,
    load_state,
    load_weights,
    refused_without_cause,
    save_state,
    sharded_when_loaded,
)
from .on_object import on_object
from .partial_load import fitted
from .push import Destination, make_card
from .settings import constructor_arguments, uses_osd


logger = logging.getLogger("hf_osd")


class Patch(NamedTuple):
    """One function of transformers that is replaced.

    Attributes:
        owner (`type` or module): Holds it.
        name (`str`): Its name there.
        why (`str`): The reason.
        replacement (`Callable`): Called with the original and then with the arguments.
    """

    owner: Any
    name: str
    why: str
    replacement: Callable[..., Any]

    def apply(self) -> None:
        """Replace the function, unless that has been done: the replacement carries a mark."""
        original = getattr(self.owner, self.name)
        if getattr(original, "replaced_by_hf_osd", False):
            return

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return self.replacement(original, *args, **kwargs)

        replaced.replaced_by_hf_osd = True  # type: ignore[attr-defined]
        setattr(self.owner, self.name, replaced)


def _find_complete_checkpoint(original: Callable, folder: str) -> str | None:
    return last_complete_checkpoint(folder)


def _note_folder(original: Callable, self: TrainerState, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, trainer, *args, **kwargs).arguments
    self.run_folder = Path(trainer._get_output_dir(given["trial"]))  # type: ignore[attr-defined]
    return original(self, trainer, *args, **kwargs)


def _note_checkpoint(original: Callable, self: Trainer, model: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
    # On the state, which callbacks see; no fields of it, so they are not saved.
    folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
    self.state.written_checkpoint = folder  # type: ignore[attr-defined]
    destination = Destination(self.hub_model_id, self.args.hub_token, self.args.hub_revision)
    self.state.pushes_to = destination  # type: ignore[attr-defined]
    osd = osd_of(self.optimizer)
    if self.args.should_save:
        remove_set(folder)  # P of an earlier run, whose checkpoint this overwrites
    if osd is not None:
        if self.args.should_save:
            forget(folder)
        gather_projections(self.state, osd, self.args.should_save)
    return original(self, model, trial, *args, **kwargs)


def _note_destination(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    token, revision = (given.get(key) or getattr(self.args, f"hub_{key}") for key in ("token", "revision"))
    state: Any = self.state
    state.pushes_to = Destination(None, token, revision)
    try:
        return original(self, *args, **kwargs)
    finally:
        vars(state).pop("pushes_to", None)


def _construct(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> None:
    owner = next(kind for kind in type(self).__mro__ if "create_model_card" in vars(kind))
    Patch(owner, "create_model_card", "keeps what a user wrote, and adds our section", make_card).apply()
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if not refused_without_cause(given):
        return original(self, *args, **kwargs)
    given["args"].save_only_model = True  # the constructor reads it for that refusal alone
    try:
        return original(self, *args, **kwargs)
    finally:
        given["args"].save_only_model = False


def _save_divided(original: Callable, self: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
    osd = osd_of(self.optimizer)
    if osd is None or not sharded_when_loaded(self.model):
        return original(self, output_dir, *args, **kwargs)
    save_state(self.model, osd, Path(output_dir))
    if self.args.should_save:
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))


def _load_states(original: Callable, self: Trainer, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
    forward_only.resume(subzero_of(self.optimizer), checkpoint)
    if osd_of(self.optimizer) is not None and checkpoint is not None:
        if has_state(checkpoint):
            return _fit_schedule(_load_divided, self, checkpoint)
        if not Path(checkpoint, SCHEDULER_NAME).is_file():
            logger.warning("%s has no state of the optimizer: P, moments and the schedule start anew.", checkpoint)
    return _fit_schedule(original, self, checkpoint, *args, **kwargs)


def _load_divided(self: Any, checkpoint: str) -> None:
    load_state(self.model, getattr(self.optimizer, "optimizer", self.optimizer), checkpoint)
    self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


def _fit_schedule(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    scheduler: Any = self.lr_scheduler
    osd = osd_of(self.optimizer)
    if osd is None or not osd.partial_load or not hasattr(scheduler, "load_state_dict"):
        return original(self, *args, **kwargs)
    load_state_dict = scheduler.load_state_dict
    # Trainer reads the file itself
    with on_object(scheduler, "load_state_dict", lambda state: load_state_dict(fitted(state, scheduler, osd))):
        return original(self, *args, **kwargs)


def _load_whole(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    if osd_of(self.optimizer) is None and not uses_osd(self.args):
        return original(self, *args, **kwargs)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    folder = str(given.get("resume_from_checkpoint", self.state.best_model_checkpoint))
    model = self.model if given.get("model") is None else given["model"]
    if sharded_when_loaded(model) and isinstance(model, PreTrainedModel):
        return load_weights(model, folder)
    results: list[Any] = []
    with on_object(self, "_issue_warnings_after_load", results.append):
        original(self, *args, **kwargs)
    for result in results:
        if result.unexpected_keys and isinstance(model, PreTrainedModel):
            result = load_converted(model, folder)
        self._issue_warnings_after_load(result)
    return None


def _load_best(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    osd, subzero = osd_of(self.optimizer), subzero_of(self.optimizer)
    if subzero is not None:
        subzero.note_end()
    if osd is not None and osd.layers is not None and osd.layers.int8:
        osd.remove()  # floats, which take those of the checkpoint as they are: the training has ended
    return _load_whole(original, self, *args, **kwargs)


def _count_own(original: Callable, of: Any, *args: Any, **kwargs: Any) -> Any:
    model: Any = of.model if isinstance(of, Trainer) else of
    stand_ins = unwrapped(model)._modules.get(CHILD)
    if stand_ins is None:
        return original(of, *args, **kwargs)
    with on_object(stand_ins, "counting", True):
        return original(of, *args, **kwargs)


def _leave_clipping(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    osd, subzero = osd_of(self.optimizer), subzero_of(self.optimizer)
    if subzero is not None:
        return forward_only.clip(self, subzero)
    if osd is None or not osd.mode.layerwise:
        return original(self, *args, **kwargs)
    return torch.zeros(())  # `OSDCallback` logs the true one, which is known after the step


PATCHES = (
    Patch(
        TrainerState,
        "init_training_references",
        "each trial of a hyperparameter search has its own statistics",
        _note_folder,
    ),
    Patch(
        transformers_trainer,
        "get_last_checkpoint",
        "`train(resume_from_checkpoint=True)` could only fail on a torn checkpoint: it passes over them",
        _find_complete_checkpoint,
    ),
    Patch(
        Trainer,
        "_save_checkpoint",
        "P goes into the folder that is saved, which in a hyperparameter search is not in `output_dir`; "
        "one that is written over is no complete checkpoint until it is complete again",
        _note_checkpoint,
    ),
    Patch(
        Trainer,
        "push_to_hub",
        "the model card on the Hub is read with the token and at the revision of the push",
        _note_destination,
    ),
    Patch(
        Trainer,
        "__init__",
        "a class's own model card, as trl's, is covered when the first of it is made; what we can save is not refused",
        _construct,
    ),
    Patch(
        Trainer,
        "_load_optimizer_and_scheduler",
        "states are divided among processes; with `partial_load` a saved schedule is fitted to the groups of now",
        _load_states,
    ),
    Patch(
        Trainer,
        "_save_optimizer_and_scheduler",
        "of a model that was sharded when it was loaded each process would write its own part over the others'",
        _save_divided,
    ),
    Patch(
        Trainer,
        "_load_from_checkpoint",
        "weights that are saved in the Hub's layout (experts', ViT's) are left out of a resume (its issue 48805)",
        _load_whole,
    ),
    Patch(
        Trainer,
        "_load_best_model",
        "likewise `load_best_model_at_end` leaves those of the last step beside others of the best one",
        _load_best,
    ),
    Patch(
        Trainer,
        "_clip_grad_norm",
        "an optimizer that takes gradients clips them: Trainer would see those of full-size parameters alone",
        _leave_clipping,
    ),
    Patch(
        Trainer,
        "_get_grad_norm",
        "SubZero's only gradient is rho, which is none of the model's",
        forward_only.grad_norm,
    ),
    Patch(Trainer, "floating_point_ops", "those of stand-ins are none", _count_own),
    Patch(transformers_trainer, "get_model_param_count", "stand-ins are no parameters of the model", _count_own),
    Patch(Trainer, "training_step", "SubZero evaluates the loss at two points", forward_only.training_step),
    Patch(Trainer, "_wrap_model", "SubZero has no gradients that DDP would need room for", forward_only.wrap_model),
)


def register() -> None:
    """Add the names to `OptimizerNames`, their handler to Trainer's table, our callback to every Trainer, and patch.

    `import hf_osd` has it called when Trainer is imported (`startup.py`); calling it again changes nothing.
    """
    handler: Any = build_optimizer_kwargs
    add_names(OptimizerNames)
    for name in OPTIM_NAMES:
        # By member as Trainer looks it up, and by string, which is what arguments hold after unpickling.
        _OPTIMIZER_HANDLERS[OptimizerNames(name)] = _OPTIMIZER_HANDLERS[name] = handler
    forward: Any = build_subzero_kwargs
    _OPTIMIZER_HANDLERS[OptimizerNames(SUBZERO)] = _OPTIMIZER_HANDLERS[SUBZERO] = forward
    callbacks: list[Any] = transformers_trainer.DEFAULT_CALLBACKS
    callbacks += [OSDCallback] if OSDCallback not in callbacks else []
    for patch in PATCHES:
        patch.apply()


def build_optimizer_kwargs(context: OptimizerContext) -> tuple[type[OSD], dict[str, Any]]:
    """Trainer's handler: the optimizer's class and what to construct it with beside groups of parameters."""
    return OSD, constructor_arguments(context.args, context.model)


def build_subzero_kwargs(context: OptimizerContext) -> tuple[type[SubZero], dict[str, Any]]:
    """The same for SubZero, which takes the model in the place of groups."""
    return SubZero, forward_only.subzero_arguments(context.args, context.model)
