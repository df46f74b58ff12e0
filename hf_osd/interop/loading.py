"""A tuned model and its base, from modules, folders or the Hub."""

import os
from typing import Any

from torch import nn


Model = nn.Module | str | os.PathLike


def load_pair(model: Model, base: Model) -> tuple[nn.Module, nn.Module, set[str]]:
    """Both models, and the names of weights that the base's files lack, which are random in every load of it.

    A folder or repository is loaded as the class of the other model, or as the one that its config names, in the
    dtype that it was saved in. The base gets the number of labels of the tuned model.
    """
    tuned = model if isinstance(model, nn.Module) else _load(model, base if isinstance(base, nn.Module) else None)
    if isinstance(base, nn.Module):
        return tuned, base, set()
    from transformers import AutoConfig, PreTrainedModel

    if not isinstance(tuned, PreTrainedModel):
        raise ValueError(f"`base` must be a module too: {type(tuned).__name__} is no transformers model.")
    config = AutoConfig.from_pretrained(base)
    if config.model_type != tuned.config.model_type:
        raise ValueError(f"The tuned model is a {tuned.config.model_type}, the base {base} a {config.model_type}.")
    config.num_labels = tuned.config.num_labels
    # Only a head can have another size: all other shapes come from the base's own config.
    architecture: Any = type(tuned)
    loaded, info = architecture.from_pretrained(
        base, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    return tuned, loaded, {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}


def _load(source: str | os.PathLike, like: nn.Module | None) -> nn.Module:
    import transformers

    if like is not None:
        if not isinstance(like, transformers.PreTrainedModel):
            raise ValueError(f"`model` must be a module too: {type(like).__name__} is no transformers model.")
        return type(like).from_pretrained(source, dtype="auto")
    names = transformers.AutoConfig.from_pretrained(source).architectures or ["none"]
    architecture: Any = getattr(transformers, names[0], None)
    if architecture is None:
        raise ValueError(
            f"The config of {source} names the architecture {names[0]}, which transformers does not have: load both "
            "models yourself and give them as modules."
        )
    return architecture.from_pretrained(source, dtype="auto")
