"""The engines around a run that flatten parameters, and how a run says that it uses one."""

import os
from typing import Any

from transformers import TrainingArguments

from ..optim.step.sharding import FLAT
from .optim_args import optim_name


def refuse_flat_engines(args: TrainingArguments) -> None:
    """Raise `ValueError` where a run is to use DeepSpeed, FSDP1 or XLA's FSDP, all of which flatten parameters."""
    engine = engine_of(args)
    if engine is not None:
        forget_engine(args)
        raise ValueError(f"{optim_name(args)} cannot be used with {engine}. {FLAT}")


def engine_of(args: TrainingArguments) -> str | None:
    """DeepSpeed, FSDP1 or XLA's FSDP, if a run is to use one of them."""
    engine = None
    if (
        args.deepspeed
        or getattr(args, "deepspeed_plugin", None) is not None
        or told_by_launcher("ACCELERATE_USE_DEEPSPEED")
    ):
        engine = "DeepSpeed"
    elif args.fsdp:
        config: dict[str, Any] = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        plugin: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
        if config.get("xla"):
            engine = "XLA's FSDP"
        elif int(plugin.get("fsdp_version", config.get("version", 1))) == 1:
            engine = "FSDP1"
    elif told_by_launcher("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1":
        engine = "FSDP1"
    return engine


def forget_engine(args: TrainingArguments) -> None:
    """Take back what accelerate has noted in the environment for a run that is refused: later runs would go by it."""
    if args.fsdp:
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def told_by_launcher(name: str) -> bool:
    """What `accelerate launch` tells its processes."""
    return os.environ.get(name, "false").lower() in ("true", "1")
