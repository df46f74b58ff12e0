"""SubZero in every Trainer: what it is constructed with, its two passes, one rho for all processes, and its log.

Trainer computes a loss in `compute_loss`, by the model or outside of it (label smoothing, `compute_loss_func`, trl's
losses); that is what is evaluated at two points. The rest of a step goes on as ever, with the directional derivative
as the only gradient.
"""

import copy
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..optim.selection.targets import parse_modules
from ..optim.selection.wrappers import unwrapped
from ..subzero import NAME, SubZero, SubZeroLog, subzero_of
from ..subzero.options import KEYS, Options, refuse_targets
from ..subzero.summary import announce_summary
from .engines import engine_of, forget_engine, told_by_launcher
from .ignored_by_ddp import ignore_all_but_one, unmark
from .on_object import on_object
from .optim_args import optim_name, parse_optim_args


# Their losses are no functions to descend: the value of what is detached in them does not change with the weights.
SURROGATES = frozenset({"GRPOTrainer", "RLOOTrainer"})
UNUSED = ("adam_beta1", "adam_beta2", "adam_epsilon")


logger = logging.getLogger("hf_osd")


def subzero_arguments(args: TrainingArguments, model: nn.Module | None) -> dict[str, Any]:
    """Keyword arguments of [`SubZero`], the model included."""
    if model is None:
        raise ValueError(f"optim={NAME!r} needs the model: get_optimizer_cls_and_kwargs(args, model).")
    targets = args.optim_target_modules
    return {
        "model": model,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "target_modules": None if targets is None else parse_modules(targets),
        **_options(args),
    }


def _options(args: TrainingArguments) -> dict[str, Any]:
    return {"seed": args.seed, **parse_optim_args(args.optim_args, KEYS)}


def check_subzero(args: TrainingArguments, optimizer: Any = None) -> None:
    """Raise `ValueError` for arguments of a run with SubZero that are wrong or would be ignored.

    Args:
        args (`TrainingArguments`): Of the run.
        optimizer (`torch.optim.Optimizer`, *optional*): That of the user's own, which `args.optim` does not tell.
    """
    if optimizer is None and optim_name(args) == NAME:
        refuse_targets(Options(**_options(args)), args.optim_target_modules, "optim_target_modules")
        for name in UNUSED:
            if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` has no effect with optim={NAME!r}. Leave it out.")
    elif subzero_of(optimizer) is None:
        return
    engine = engine_of(args) or ("FSDP" if args.fsdp or told_by_launcher("ACCELERATE_USE_FSDP") else None)
    if engine is not None:
        forget_engine(args)
        raise ValueError(f"SubZero cannot be used with {engine}, which divides the weights: use DDP.")
    if args.fp16 or getattr(args, "mixed_precision", None) == "fp16":  # the launcher's
        raise ValueError("SubZero has no gradients for fp16's GradScaler: use bf16=True.")
    if args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("SubZero has to see the model's functions: leave `torch_compile` out.")
    if args.neftune_noise_alpha is not None:
        raise ValueError("`neftune_noise_alpha` has no effect with SubZero, in which no layer trains. Leave it out.")
    if getattr(args, "loss_type", None) == "dft":
        raise ValueError("loss_type='dft' is no loss that two of its values could tell the slope of: use 'nll'.")


def training_step(
    original: Callable, self: Trainer, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`Trainer.training_step`, with the loss at two points in the place of the loss."""
    own = subzero_of(self.optimizer)
    if own is None:
        return original(self, model, inputs, *args, **kwargs)
    compute_loss = self.compute_loss

    def two_points(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts = {name: value for name, value in vars(self).items() if type(value) in (int, float)}

        def loss() -> torch.Tensor:  # which may take labels out of the inputs; and what it counts, it counts once
            vars(self).update(counts)
            found: Any = compute_loss(model, copy.copy(inputs), *args, **kwargs)
            return found

        # one of a subclass, as trl's, may ask `self.model.training` which metrics it is to add to
        return own.forward(loss, but=own.model)

    with on_object(self, "compute_loss", two_points):
        loss = original(self, model, inputs, *args, **kwargs)
    if self.accelerator.sync_gradients:
        own.average()
    return loss


def clip(self: Trainer, own: SubZero) -> torch.Tensor:
    """`Trainer._clip_grad_norm` of rho."""
    return nn.utils.clip_grad_norm_([own.direction], self.args.max_grad_norm)


def grad_norm(original: Callable, self: Trainer, model: nn.Module, grad_norm: Any = None) -> Any:
    """`Trainer._get_grad_norm` of rho."""
    own = subzero_of(self.optimizer)
    if own is not None and own.direction.grad is not None and grad_norm is None:
        return own.direction.grad.norm()
    return original(self, model, grad_norm=grad_norm)


def wrap_model(original: Callable, self: Trainer, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Trainer._wrap_model`, before which DDP is told of one small weight only: it would hold gradients of all.

    Not of one for an evaluation. A mark of a training that never began, as where a resume was refused, goes.
    """
    own = subzero_of(self.optimizer)
    unmark(unwrapped(model))
    given = inspect.signature(original).bind(self, model, *args, **kwargs).arguments
    if own is not None and given.get("training", True):
        check_subzero(self.args, self.optimizer)  # one that a subclass has made
        if self.args.n_gpu > 1:
            raise ValueError("SubZero needs a process for each GPU: start it with torchrun or accelerate.")
        for kind in type(self).__mro__:
            if kind.__name__ in SURROGATES:
                raise ValueError(f"SubZero cannot train with {kind.__name__}, whose loss tells no slope.")
        ignore_all_but_one(own.model)
    return original(self, model, *args, **kwargs)


@torch.no_grad()
def begin_training(own: SubZero | None) -> None:
    """Make all processes start from the first one's weights, as DDP would have, and say what is perturbed."""
    if own is None:
        return
    own.forget_rho()  # of a run that was broken off between two micro-batches
    if own.replaced:
        logger.warning("The model has other weights than the last step has left: SubZero and its log start anew.")
        own.restart()
    unmark(own.model)
    if dist.is_available() and dist.is_initialized():
        for weight in own.weights.weights.values():
            dist.broadcast(weight.W.detach(), 0)
    announce_summary(own)


def resume(own: SubZero | None, checkpoint: str | None) -> None:
    """Where a checkpoint has no state that Trainer would load, begin anew from its weights, and say so."""
    if own is None or checkpoint is None:
        return
    if all(Path(checkpoint, name).is_file() for name in (OPTIMIZER_NAME, SCHEDULER_NAME)):
        return
    logger.warning("%s has no state of the optimizer: directions, schedule and the log start anew.", checkpoint)
    own.restart()


def save_log(own: SubZero | None, folder: Path, args: TrainingArguments) -> None:
    """Put the list of rho beside the model, where it tells all."""
    if own is None or not own.steps or own.weights.following or own.replaced:
        return
    if args.should_save and folder.is_dir():
        SubZeroLog.from_optimizer(own).save_pretrained(folder)
