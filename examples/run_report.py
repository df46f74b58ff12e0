"""What a training run reports: perplexity, throughput, memory, `results.json` and `loss.png`.

Nothing here depends on the optimizer, so runs with different optimizers are measured alike.
"""

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_osd import OSD, SubZero
from hf_osd.optim import state_bytes


REPORTED_PACKAGES = (
    "hf_osd",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "galore-torch",
    "peft",
    "trl",
)
REPORTED_ARGUMENTS = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm optim_args optim_target_modules per_device_train_batch_size gradient_accumulation_steps "
    "bf16 fp16 seed"
).split()


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where it cannot be held in a float."""
    return math.exp(loss) if loss < 700 else math.inf


class PerplexityCallback(TrainerCallback):
    """Adds `eval_perplexity` to every evaluation that is logged, on screen and in the log history."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Called by the trainer with the entry that it has just appended to `state.log_history`."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = state.log_history[-1]["eval_perplexity"] = perplexity(logs["eval_loss"])


class TrainingClock(TrainerCallback):
    """Measures the seconds spent in training steps and in loading their data, without evaluation and checkpoints.

    Every evaluation that is logged gets `train_seconds` and `train_cpu_seconds`, of all threads, since the one before.

    Attributes:
        seconds (`float`): training time so far.
        cpu_seconds (`float`): of it, what the process computed, on all its threads.
        first_step (`int`): the step this session began at, above 0 after resuming.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.first_step = 0
        self._started: tuple[float, float] | None = None
        self._logged = (0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the step that this session starts at."""
        self.first_step = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock where it stands still."""
        if self._started is None:
            self._started = time.perf_counter(), time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock before an evaluation, a checkpoint and the end."""
        running = self._started is not None
        if running and (control.should_evaluate or control.should_save or control.should_training_stop):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._started[0]
            self.cpu_seconds += time.process_time() - self._started[1]
            self._started = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As after a step: what happens once an epoch is asked for here."""
        self.on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Adds the times to an evaluation's entry."""
        if "eval_loss" in logs:
            since = self.seconds - self._logged[0], self.cpu_seconds - self._logged[1]
            state.log_history[-1] |= dict(zip(("train_seconds", "train_cpu_seconds"), since, strict=True))
            self._logged = self.seconds, self.cpu_seconds


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yields the tensors of one optimizer state entry; GaLore keeps its projection in an object's `ortho_matrix`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "ortho_matrix"):
        yield from tensors_in(value.ortho_matrix)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Sums the bytes of all tensors in `optimizer.state`, those that several parameters share once.

    Of an `OSD` also what it keeps beside its state; of a `SubZero` U and V.

    Args:
        optimizer (`torch.optim.Optimizer`):
            An optimizer after its first step, also as wrapped by accelerate.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate.optimizer.AcceleratedOptimizer
        optimizer = optimizer.optimizer
    if isinstance(optimizer, OSD):  # a P may be kept beside its state
        return state_bytes(optimizer)
    if isinstance(optimizer, SubZero):
        return optimizer.weights.basis_bytes
    distinct = {id(tensor): tensor for state in optimizer.state.values() for tensor in tensors_in(state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def adamw_state_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of AdamW's two moments, which have the shape and dtype of the trained parameters."""
    return 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def peak_memory_bytes() -> int:
    """Returns the peak of the memory allocated on the GPU or, without one, of this process' resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tokens_seen(state: TrainerState, args: TrainingArguments, sequence_length: int, blocks: int | None) -> int:
    """Returns the training tokens up to `state.global_step`.

    Args:
        state (`TrainerState`):
            Holds the step.
        args (`TrainingArguments`):
            Holds the batch size.
        sequence_length (`int`):
            Tokens of a block.
        blocks (`int`, *optional*):
            Blocks of an epoch, whose last step may be smaller; `None` for a stream.
    """
    blocks_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if blocks is None:
        return state.global_step * blocks_per_step * sequence_length
    epochs, steps = divmod(state.global_step, math.ceil(blocks / blocks_per_step))
    return (epochs * blocks + steps * blocks_per_step) * sequence_length


def optimizer_settings(args: TrainingArguments) -> dict[str, Any]:
    """Returns the arguments that determine the updates: Trainer's, and what was given of `osd_*`."""
    given = [field.name for field in dataclasses.fields(args) if field.name.startswith("osd_")]
    settings = {key: getattr(args, key) for key in ("optim", *REPORTED_ARGUMENTS, *given)}
    return {key: getattr(value, "value", value) for key, value in settings.items() if value is not None}


def parameter_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns what the optimizer itself holds for each group: the number of its parameters and all its settings."""
    kept = (bool, int, float, str, list, tuple)
    return [
        {"tensors": len(group["params"]), "parameters": sum(p.numel() for p in group["params"])}
        | {key: value for key, value in group.items() if key != "params" and isinstance(value, kept)}
        for group in optimizer.param_groups
    ]


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of those `REPORTED_PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_environment() -> dict[str, Any]:
    """Returns versions and hardware."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"versions": installed_versions(), "device": device, "cpu_count": os.cpu_count(), "platform": sys.platform}


def build_results(
    trainer: Trainer, clock: TrainingClock, *, model_name: str, dataset_name: str, sequence_length: int
) -> dict[str, Any]:
    """Gathers everything worth keeping of a finished run.

    Args:
        trainer (`Trainer`):
            After training and a final evaluation.
        clock (`TrainingClock`):
            The callback that measured the training time.
        model_name (`str`):
            Name of the model configuration.
        dataset_name (`str`):
            Name of the data set.
        sequence_length (`int`):
            Tokens of a block.

    Returns:
        `dict[str, Any]`: the contents of `results.json`.
    """
    args, state = trainer.args, trainer.state
    blocks = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    seen, seen_before = (
        tokens_seen(dataclasses.replace(state, global_step=step), args, sequence_length, blocks)
        for step in (state.global_step, clock.first_step)
    )
    eval_loss = next(entry["eval_loss"] for entry in reversed(state.log_history) if "eval_loss" in entry)
    return {
        "model": model_name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "dataset": dataset_name,
        "sequence_length": sequence_length,
        "steps": state.global_step,
        "tokens_seen": seen,
        "eval_loss": eval_loss,
        "perplexity": perplexity(eval_loss),
        "tokens_per_second": (seen - seen_before) / clock.seconds if clock.seconds else None,
        "training_seconds": clock.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "optimizer_state_bytes": optimizer_state_bytes(trainer.optimizer),
        "adamw_state_bytes": adamw_state_bytes(trainer.model),
        "settings": optimizer_settings(args),
        "parameter_groups": parameter_groups(trainer.optimizer),
        "environment": describe_environment(),
        "log_history": state.log_history,
    }


def write_results(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON, at once: what is cut off here leaves no part of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
