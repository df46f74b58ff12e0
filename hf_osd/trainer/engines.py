"""Which engines of accelerate and transformers hand the optimizer parameters that have rows and columns."""

import os
from typing import Any

from transformers import TrainingArguments

from ..optim.step.sharding import FLAT


def refuse_flat_engines(args: TrainingArguments) -> None:
    """Raise `ValueError` where a run is to use DeepSpeed, FSDP1 or XLA's FSDP, all of which flatten parameters."""
    engine = engine_of(args)
    if engine is not None:
        raise ValueError(f"{args.optim} cannot be used with {engine}. {FLAT}")


def engine_of(args: TrainingArguments) -> str | None:
    """DeepSpeed, FSDP1 or XLA's FSDP, if a run is to use one of them."""
    engine = None
    if (
        args.deepspeed
        or getattr(args, "deepspeed_plugin", None) is not None
        or _environment("ACCELERATE_USE_DEEPSPEED")
    ):
        engine = "DeepSpeed"
    elif args.fsdp:
        config: dict[str, Any] = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        plugin: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
        if config.get("xla"):
            engine = "XLA's FSDP"
        elif int(plugin.get("fsdp_version", config.get("version", 1))) == 1:
            engine = "FSDP1"
    elif _environment("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") == "1":
        engine = "FSDP1"
    return engine


def _environment(name: str) -> bool:
    """What `accelerate launch` tells its processes."""
    return os.environ.get(name, "false").lower() in ("true", "1")
