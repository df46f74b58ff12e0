"""From training arguments and a model to everything that `OSD` is constructed with."""

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..hub import ProjectionState
from ..optim import osd_kwargs
from ..subspace.initialization import INITS
from .optim_args import read_settings


def constructor_arguments(
    args: TrainingArguments, model: nn.Module, decay_names: Collection[str] | None = None
) -> dict[str, Any]:
    """Keyword arguments of [`OSD`].

    Args:
        args (`TrainingArguments`): With an `osd_` name as `optim`.
        model (`nn.Module`): The model.
        decay_names (`Collection[str]`, *optional*): Parameters with weight decay; defaults to what `Trainer` decides.
    """
    settings = read_settings(args)
    options = settings.options
    if options["init"] not in INITS:
        state = ProjectionState.from_pretrained(options["init"])
        ranks = {entry.rank for entry in state.values()}
        options["init"] = state
        if options["rank"] is None and len(ranks) == 1:
            options["rank"] = ranks.pop()
    kwargs = osd_kwargs(
        model,
        options,
        settings.target_modules,
        settings.exclude_modules,
        decay_names,
        ddp_compression=settings.mode["ddp_compression"],
        rank_pattern=settings.rank_pattern,
    )
    return {"lr": args.learning_rate, "partial_load": settings.partial_load, **settings.mode, **kwargs}
