"""Which parameters have a learning rate of their own kind: `embedding_lr_ratio` and `task_head_lr_ratio`."""

from collections.abc import Mapping

from torch import nn

from ..options.presets import Ratio
from .blocks import embeddings
from .targets import Selection
from .task_heads import task_outputs


# Option -> the parameters of a model that it is for.
KINDS = {"embedding_lr_ratio": embeddings, "task_head_lr_ratio": task_outputs}


def multiples(model: nn.Module, selection: Selection, ratios: Mapping[str, Ratio]) -> dict[str, float]:
    """By name, the multiple of the learning rate that each parameter of these kinds has.

    Args:
        model (`nn.Module`): The model.
        selection ([`Selection`]): Its trainable parameters.
        ratios (`dict[str, Ratio]`): By option, as `lr_ratios` gives them.

    Raises:
        ValueError: For a ratio that is required and has no parameters.
    """
    trained = {
        "embedding_lr_ratio": (
            selection.full_size,
            "No embedding or head that is known as one is trained at full size",
            "leave {it} out. `lr_pattern` takes names, as wte:16",
        ),
        "task_head_lr_ratio": (
            selection.projected | selection.full_size,
            "No head of a task that is known as one is trained",
            "name its layer in `lr_pattern`, as classifier:64",
        ),
    }
    found: dict[str, float] = {}
    for option, ratio in ratios.items():
        candidates, complaint, remedy = trained[option]
        known = KINDS[option](model)
        names = [name for name, p in candidates.items() if p in known]
        if ratio.required and not names:
            it = "it" if ratio.preset is None else f"preset={ratio.preset!r}, which sets it,"
            raise ValueError(f"{complaint}: give `{option}` 1, or {remedy.format(it=it)}.")
        found |= dict.fromkeys(names, ratio.value)
    return found
