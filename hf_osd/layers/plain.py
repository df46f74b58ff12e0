"""Plain layers again, in the place of prepared ones."""

from typing import Any

from torch import nn

from .int8 import Int8Weight
from .layer import LayerInfo
from .linear import InSubspace


CHILD = "osd_stand_ins"  # the model's, while it is prepared


def unload(model: nn.Module) -> nn.Module:
    """Give a model its plain layers back, in place; nothing changes in a model that has none of ours.

    Args:
        model (`nn.Module`): A model that an optimizer with `source="activations"` was made for, or what wraps it.

    Returns:
        `nn.Module`: The model.
    """
    unload_others(model)
    return model


def unload_others(model: nn.Module, keep: Any = None) -> None:
    """The same, but for the layers of one [`PreparedLayers`]."""
    found = {vars(module)["osd"].stand_ins for module in model.modules() if isinstance(module, InSubspace)}
    for prepared in found - {keep}:
        prepared.remove()
    for module in model.modules():
        if module._modules.get(CHILD) is not keep:
            module._modules.pop(CHILD, None)  # of a copy


def make_plain(layer: LayerInfo) -> Int8Weight | None:
    """Make a layer plain; the int8 weight that it had, if one, for which it has a float one now."""
    own = [m for m in layer.modules if isinstance(m, InSubspace) and vars(m).get("osd") is layer]  # no other's since
    W: Any = layer.modules[0]._parameters.get("weight")
    kept = W if own and isinstance(W, Int8Weight) else None
    if kept is not None:
        give_weight(own, nn.Parameter(W.plain(), W.requires_grad))
    for module in own:
        module.__class__ = module.plain  # type: ignore[assignment]
        del vars(module)["osd"]
    return kept


def quantize_again(layer: LayerInfo, kept: Int8Weight) -> None:
    """Give a layer the int8 weight again that `make_plain` told of: to the bit, unless it has changed since."""
    W: Any = layer.modules[0].weight
    same = kept.reads_as(W)
    kept.convert_(W)
    if not same:
        kept.copy_rows_(W.detach())
    kept.requires_grad_(W.requires_grad)
    give_weight(layer.modules, kept)


def give_weight(modules: list[Any], W: Any) -> None:
    """Let layers that are tied have one weight."""
    for module in modules:
        module.weight = W
