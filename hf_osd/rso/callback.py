"""RSO's outer loop in a Trainer."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..text import announce, format_bytes, format_count
from .memory import subspace_bytes, trained_parameters
from .outer_loop import OuterLoop, outer_loop


class RSOCallback(TrainerCallback):
    """Added to every Trainer by `import hf_osd`; silent unless the model comes from [`create_rso_model`].

    Every `interval` optimizer steps, before the next one: W <- W + P B, B <- 0, a new P, and the optimizer's moments
    of B start anew. A training that goes on from a checkpoint gets W, B, P and moments back as they were.
    """

    def __init__(self) -> None:
        self._loop: OuterLoop | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs: Any,
    ) -> None:
        """Start at P_0, or where the checkpoint was."""
        self._loop = loop = outer_loop(model) if isinstance(model, nn.Module) else None
        if loop is None:
            return
        loop.begin(_unwrap(optimizer), state.global_step)
        if state.is_world_process_zero:
            announce(_summary(loop, model))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer=None,
        **kwargs: Any,
    ) -> None:
        """End the interval where the coming step begins another."""
        if self._loop is not None:
            self._loop.before_step(_unwrap(optimizer), state.global_step)


def _unwrap(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _summary(loop: OuterLoop, model: Any) -> str:
    parameters = dict(trained_parameters(model))
    weights = {id(layer.base_layer.weight) for layer in loop.layers.values()}  # type: ignore[union-attr]
    inside = sum(p.numel() for p in parameters.values() if id(p) in weights)
    outside = sum(p.numel() for p in parameters.values()) - inside
    options = loop.options
    return (
        f"RSO: {len(loop.layers)} matrices ({format_count(inside, 'M')} parameters) trained in {options.sampling} "
        f"subspaces of rank {options.rank}, new every {options.interval} steps, {format_count(outside, 'M')} "
        f"parameters at full size; P and B {format_bytes(subspace_bytes(model), smallest='MB')}"
    )
