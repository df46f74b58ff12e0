"""`init_lora_from_projection`: start a LoRA adapter in the subspace that OSD has learned."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..hub import Projection, ProjectionState
from ..text import shortened


def init_lora_from_projection(
    peft_model: nn.Module,
    state: ProjectionState | str | os.PathLike,
    adapter_name: str = "default",
    *,
    strict: bool = True,
) -> list[str]:
    """Start LoRA's factors from a learned P. The model's output does not change: B A = 0, as in every fresh adapter.

    LoRA adds B A to a layer with m outputs and n inputs, with A (r, n) and B (m, r). P spans either the layer's
    inputs or its outputs, whichever OSD has projected:

    * inputs (the right side of an `nn.Linear`, the left of a `Conv1D`, whose weight is transposed): A = Pᵀ, B = 0.
    * outputs: a subspace of outputs is what B's columns span, so B = P, and A = 0 instead. A then learns in the
      geometry of OSD, dW = P A, from the first step on.
    * both (`side="two_sided"`): the factor of the inputs is taken.

    P's columns have norm 1 up to a few percent. peft's own start of A has rows of norm 0.58 (uniform within
    1 / sqrt(n)), so the same learning rate moves the layer up to 1.7 times as far here.

    A LoRA rank below P's takes the first columns: P starts as singular vectors in descending order, and OSD moves
    columns without exchanging them. They are not sorted again: P's own singular values are all near 1.

    Args:
        peft_model (`peft.PeftModel`): Any model with LoRA layers whose adapter has not been trained.
        state ([`ProjectionState`], `str` or `os.PathLike`): P by parameter name, or where to read it: a folder, or a
            repository on the Hub.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of the model.
        strict (`bool`, *optional*, defaults to `True`):
            Refuse an adapter with layers that `state` has no P for; `False` leaves them as peft started them.

    Returns:
        `list[str]`: Names of the layers that were set.

    Raises:
        ValueError: If a layer has no P (with `strict`), none has, a shape or rank does not fit, or B A is not 0.

    Example:
    ```python
    >>> import torch
    >>> from hf_osd import OSD, ProjectionState, init_lora_from_projection

    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    >>> optimizer = OSD([{"params": [("0.weight", model[0].weight)], "rank": 8}], lr=1e-3)
    >>> model(torch.randn(4, 32)).square().mean().backward()
    >>> optimizer.step()
    >>> state = ProjectionState.from_optimizer(optimizer)

    >>> from peft import LoraConfig, get_peft_model
    >>> peft_model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"]))
    >>> init_lora_from_projection(peft_model, state)
    ['0']
    >>> A = peft_model.base_model.model[0].lora_A["default"].weight
    >>> torch.equal(A, state["0.weight"].projection.T)
    True

    ```
    """
    if not isinstance(state, ProjectionState):
        state = ProjectionState.from_pretrained(state)
    layers = _lora_layers(peft_model, adapter_name)
    missing = [name for name in layers if f"{name}.weight" not in state]
    if missing and (strict or len(missing) == len(layers)):
        raise ValueError(
            f"There is no P for {shortened(missing, 5)}; P was learned for {shortened(state, 5)}. Give the adapter "
            "the target_modules that have a P"
            + (", or strict=False to leave the others as peft starts them." if len(missing) < len(layers) else ".")
        )
    # All is checked before anything is changed.
    starts = {
        name: _start(name, layer, adapter_name, state[f"{name}.weight"])
        for name, layer in layers.items()
        if name not in missing
    }
    with torch.no_grad():
        for filled, zeroed, P in starts.values():
            filled.copy_(P)
            zeroed.zero_()
    return list(starts)


def _start(name: str, layer: Any, adapter_name: str, entry: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """The factor that is filled, the one that becomes zero, and what the first is filled with."""
    if adapter_name not in layer.lora_A:
        raise ValueError(f"{name} is {type(layer).__name__}: P belongs to linear layers only.")
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    (m, n), r = (B.shape[0], A.shape[1]), A.shape[0]
    stored = (n, m) if layer.fan_in_fan_out else (m, n)
    if entry.shape != stored:
        raise ValueError(f"P of {name} was learned for a weight of shape {entry.shape}, the layer's is {stored}.")
    if r > entry.rank:
        raise ValueError(f"The adapter has rank {r} at {name}, P only {entry.rank}: use LoraConfig(r={entry.rank}).")
    if (A.any() and B.any()) or not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(
            f"The adapter at {name} is not fresh (B A is not 0): P would replace what it holds. Add a new adapter, "
            "with init_lora_weights=True."
        )
    if entry.side == "two_sided":
        return A, B, entry.factors[0 if layer.fan_in_fan_out else 1][:, :r].mT
    P = entry.projection[:, :r]
    if (entry.side == "left") == layer.fan_in_fan_out:  # the side of the inputs
        return A, B, P.mT
    return B, A, P


def _lora_layers(peft_model: nn.Module, adapter_name: str) -> dict[str, Any]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model: Any = peft_model.base_model.model if isinstance(peft_model, PeftModel) else peft_model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.r}
    if not found:
        known = sorted({key for layer in layers.values() for key in layer.r})
        raise ValueError(
            f"The model has no LoRA adapter {adapter_name!r}" + (f"; it has {', '.join(known)}." if known else ".")
        )
    return found
