"""RSO from a stock Trainer: `optim="rso_adamw"` or `"rso_adamw8bit"`, as strict as the `osd_` names."""

import os
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.trainer_optimizer import OptimizerContext

from ..names import RSO_NAMES
from ..optim import DEFAULT_RANK
from ..rso.model import create_rso_model, rso_param_groups
from ..rso.options import DEFAULT_INTERVAL, RSOOptions, check_scale
from ..update_rules import require_bitsandbytes
from .settings import (
    KINDS,
    WITHOUT_OPTIM_ARGS,
    engine_of,
    forget_engine,
    keys_of,
    optim_name,
    parse_optim_args,
    target_modules_of,
    typed,
)


# Keys of `optim_args`, and where they are given in `OSDTrainingArguments`.
RSO_KINDS: dict[str, type] = {key: KINDS[key] for key in ("rank", "scale", "seed")}
RSO_KINDS |= {"interval": int, "eta": float, "sampling": str}
FIELDS = {"rank": "osd_rank", "scale": "osd_scale", "seed": "osd_seed"}
FIELDS |= {key: f"rso_{key}" for key in ("interval", "eta", "sampling")}


class RSOSettings(NamedTuple):
    """What a run's arguments ask of RSO."""

    options: RSOOptions
    scale: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None


def uses_rso(args: TrainingArguments) -> bool:
    """Whether the run's optimizer is one of RSO's."""
    return optim_name(args) in RSO_NAMES


def read_rso_settings(args: TrainingArguments) -> RSOSettings:
    """All options of a run with an `rso_` optimizer, complete and validated.

    Raises:
        ValueError: For unknown keys, wrong types and ranges, options given twice, and options without effect.
    """
    given = parse_optim_args(args.optim_args, RSO_KINDS)
    for key, field in FIELDS.items():
        value = getattr(args, field, None)
        if value is not None and key in given:
            raise ValueError(f"{key!r} is given twice: in `optim_args` and as `{field}`.")
        if value is not None:
            given[key] = typed(value, RSO_KINDS[key], f"`{field}`")
    allowed = {*FIELDS.values(), "osd_exclude_modules"}
    stray = sorted(name for name in _own_fields(args) if name not in allowed)
    if stray:
        raise ValueError(f"{', '.join(stray)} have no effect with optim={optim_name(args)!r}: leave them out.")
    scale = given.pop("scale", 1.0)
    check_scale(scale)
    defaults = {"rank": DEFAULT_RANK, "interval": DEFAULT_INTERVAL, "seed": args.seed}
    return RSOSettings(RSOOptions(**(defaults | given)), scale, *target_modules_of(args))


def check_rso_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` as early as possible for arguments that are wrong or would be ignored."""
    if uses_rso(args):
        engine = engine_of(args) or ("FSDP2" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else None)
        if engine is not None:
            forget_engine(args)
            raise ValueError(
                f"{optim_name(args)} cannot be used with {engine}: its outer loop needs whole weights. Use DDP, or an "
                "`osd_` optimizer with FSDP2."
            )
        read_rso_settings(args)
        return
    stray = sorted(name for name in _own_fields(args) if name.startswith("rso_"))
    if stray:
        raise ValueError(
            f"{', '.join(stray)} need optim={' or '.join(map(repr, RSO_NAMES))}, but optim is {optim_name(args)!r}."
        )
    if optim_name(args) in WITHOUT_OPTIM_ARGS and keys_of(args.optim_args) & RSO_KINDS.keys():
        raise ValueError(
            f"optim={optim_name(args)!r} ignores optim_args={args.optim_args!r}. For RSO choose one of "
            f"{', '.join(RSO_NAMES)}; else leave `optim_args` out."
        )


def build_rso_optimizer_kwargs(context: OptimizerContext) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Trainer's handler: prepares the model in place and returns the inner optimizer's class and arguments."""
    args, model = context.args, context.model
    if model is None:
        raise ValueError(f"{args.optim} needs the model to prepare it.")
    settings = read_rso_settings(args)
    create_rso_model(
        model,
        **asdict(settings.options),
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
    )
    kwargs: dict[str, Any] = {
        "params": rso_param_groups(model, args.learning_rate, args.weight_decay, scale=settings.scale),
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if optim_name(args) == "rso_adamw":
        return torch.optim.AdamW, kwargs
    require_bitsandbytes()
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit, kwargs


def _own_fields(args: TrainingArguments) -> list[str]:
    """Fields of `OSDTrainingArguments` that were given."""
    return [name for name, value in vars(args).items() if name.startswith(("osd_", "rso_")) and value is not None]
