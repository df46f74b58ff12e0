"""Where peft has put what in a model: adapters of its own, the model's layers, and copies that are trained in full."""

import sys
from dataclasses import dataclass, field

from torch import nn

from .wrappers import WRAPPERS


@dataclass
class ModuleNames:
    """The modules of a model by what they are to peft. Without adapters, every module is the model's own.

    Attributes:
        plain (`dict[str, str]`):
            Name of each of the model's own modules -> the same without what peft and torch put in between, so
            `base_model.model.model.layers.0.q_proj.base_layer` -> `model.layers.0.q_proj`.
        adapters (`set[str]`):
            Modules that belong to adapters (LoRA's A and B, prompt encoders, ...), or are the frozen originals of
            copies.
        copies (`set[str]`): Modules of the trained copies that `modules_to_save` makes.
        wrappers (`set[str]`): Modules of peft's around one of the model's own.
    """

    plain: dict[str, str] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)
    wrappers: set[str] = field(default_factory=set)


def module_names(model: nn.Module) -> ModuleNames:
    """Sort the modules of a model: a `PeftModel`, one with injected adapters, or one without any."""
    names = ModuleNames({"": ""})
    inner: dict[str, str | None] = {}  # wrapper -> its child that is no adapter's; None where all of them are copies
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if name and (parent in names.adapters or inner.get(parent, last) not in (last, None)):
            names.adapters.add(name)
            continue
        if name:
            stem = names.plain[parent]
            names.plain[name] = stem if parent in inner or last in WRAPPERS else f"{stem}.{last}".removeprefix(".")
        if parent in names.copies or inner.get(parent, last) is None:
            names.copies.add(name)
        child = _inner_child(module)
        if child is not None:
            inner[name] = child
        elif parent in inner and last == "modules_to_save":
            inner[name] = None
        if name in inner:
            names.wrappers.add(name)
    return names


def _inner_child(module: nn.Module) -> str | None:
    """Which child of a wrapper of peft's is the model's own."""
    if "peft" not in sys.modules:  # then nothing of it is in the model
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, (PeftModel, PeftMixedModel)):
        return "base_model"
    if isinstance(module, BaseTuner):
        return "model"
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, ModulesToSaveWrapper):
        return "modules_to_save"
    return "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else None
