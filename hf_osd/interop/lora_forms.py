"""How peft takes a linear layer: as a module, as a bare parameter, or not at all.

Most layers are targets by their module: peft adds B A x to what the layer gives. That fails where the layer gives
something else than W x + b, such as a router's tuple, and where peft takes the name for one of a fused layer of
experts; then the weight itself is the target, W + B A. Both forms have the same tensors under the same names. Neither
has an effect where the model reads a layer's weight and does not call it, as Mamba does with `dt_proj`.
"""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.selection.targets import linear_classes


MODULE, PARAMETER = "module", "parameter"


def lora_form(model: nn.Module, name: str) -> str | None:
    """`"module"`, `"parameter"`, or `None` where LoRA has no effect or peft refuses it (Mamba's `out_proj`)."""
    if not name or is_read(model, name):  # the model itself has no name that a target could have
        return None
    forms = [MODULE, PARAMETER] if is_plain(model.get_submodule(name)) else [PARAMETER]
    return next((form for form in forms if _taken(name, form, getattr(model, "config", None))), None)


def targets(forms: dict[str, str]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that name these layers."""
    return {
        "target_modules": [name for name, form in forms.items() if form == MODULE],
        "target_parameters": [f"{name}.weight" for name, form in forms.items() if form == PARAMETER],
    }


def is_plain(layer: Any) -> bool:
    """Whether a layer gives x Wᵀ + b; one with a forward of its own is asked on a row of ones."""
    if type(layer).forward in [cls.forward for cls in linear_classes()]:
        return True
    x = layer.weight.new_ones(1, layer.weight.shape[1])
    with torch.no_grad():
        try:
            y = layer(x)
        except (TypeError, RuntimeError, ValueError):  # it takes more, or other shapes
            return False
        wanted = nn.functional.linear(x, layer.weight, layer.bias)
    return isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, rtol=0.01, atol=0.01)


def is_read(model: nn.Module, name: str) -> bool:
    """Whether the module around a layer multiplies with its weight itself, or never calls it, from its source."""
    parent, _, leaf = name.rpartition(".")
    cls = type(model.get_submodule(parent))
    try:
        source = "".join(
            inspect.getsource(method)
            for key, method in vars(cls).items()
            if inspect.isfunction(method) and "init" not in key and "reset" not in key
        )
    except OSError:  # made where there is no file
        return False
    weight = rf"(?<!isinstance\()\bself\.{re.escape(leaf)}\.weight\b(?!\.)"
    called = re.search(rf"\bself\.{re.escape(leaf)}\(", source)
    return re.search(weight + (r"\s*@" if called else ""), source) is not None


def _taken(name: str, form: str, config: Any) -> bool:
    """Ask peft itself, with a model that has this one layer under this name, and the config that peft looks into."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    stub: Any = nn.Linear(1, 1)
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, stub)
        stub = parent
    stub.config = config
    try:
        inject_adapter_in_model(LoraConfig(r=1, **targets({name: form})), stub)
    except ValueError:  # refused, or half of what peft fuses
        return False
    return isinstance(stub.get_submodule(name), LoraLayer)
