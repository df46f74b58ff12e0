"""`extract_lora`: what training changed in a model's weights as a PEFT LoRA adapter.

Letters: dW (m, n) = W_tuned - W_base, with m outputs and n inputs; B (m, r), A (r, n) LoRA's factors; r the rank.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..text import shortened
from .changes import CARRY, CONTAINERS, check_same_architecture, find_changes, relative_text
from .loading import Model, load_pair
from .lora_adapter import ExtractedLayer, ExtractedLora, build_adapter
from .low_rank import balanced_factors


ENERGY = 0.9


def extract_lora(
    model: Model,
    base: Model,
    rank: int | str = 16,
    *,
    energy: float | None = None,
    max_rank: int | None = None,
    carry: str = "auto",
    modules_to_save: Iterable[str] = (),
    exact: bool = False,
) -> ExtractedLora:
    """Turn the change of a model's weights since its base into a PEFT LoRA adapter.

    Each linear layer (`nn.Linear`, GPT-2's `Conv1D`) whose matrix changed gets the best approximation of rank r of
    its change, dW ~ B A. All layers are stored with the largest of their ranks, smaller ones filled up with zeros, and
    `lora_alpha` is that rank: LoRA's scaling is 1 in programs that read one alpha for all. Models are read matrix by
    matrix: beside the two of them there is one matrix in float64 at a time. Needs peft.

    What LoRA cannot express is carried as it is, or reported: LoRA's `bias` holds the biases of these layers, and
    `modules_to_save` other modules in full. An adapter with biases replaces those of the model that it is loaded on;
    peft allows one such adapter at a time. vLLM refuses both, llama.cpp drops norms and its converter stops at the
    rest: for them take `carry="none"`.

    Args:
        model (`nn.Module`, `str` or `os.PathLike`):
            The model after training: a module, a folder, or a repository on the Hub.
        base (`nn.Module`, `str` or `os.PathLike`): Before training; not modified.
        rank (`int` or `str`, *optional*, defaults to 16):
            r; of a smaller layer min(m, n). At full rank the adapter is the change. `"auto"`: for each layer the
            smallest that keeps `energy`.
        energy (`float`, *optional*, defaults to 0.9 with `rank="auto"`):
            Share of ||dW||² of each layer to keep, up to 1.
        max_rank (`int`, *optional*): Limit for `rank="auto"`; layers that it cuts keep less than `energy`.
        carry (`str`, *optional*, defaults to `"auto"`):
            What else the adapter holds. `"none"`: nothing, so that vLLM and llama.cpp take it. `"head"`: the task
            head alone, that is, what stands beside a transformers model's trunk and output embedding, or what
            `base`'s files lack. `"auto"`: norms and biases too, which are small. `"all"`: everything that can be,
            embeddings in full size included (tied ones twice); single weights of a module that holds LoRA layers
            cannot.
        modules_to_save (`list[str]`, *optional*):
            More modules to carry in full, by their full names. If `base` is a module, name layers that were random
            when it was loaded ("newly initialized"): a change since a random start means nothing at the next load.
        exact (`bool`, *optional*, defaults to `False`):
            Compute the exact SVD of large matrices (min(m, n) > 1024) too. `rank="auto"` always does.

    Returns:
        [`ExtractedLora`]: The adapter, the share of the change that it keeps by layer, and what it leaves out; what
        it leaves out is warned of as well.

    Raises:
        ValueError: If no matrix changed, the models differ in the name or shape of a weight (the first difference is
            named), or an argument cannot be.

    Example:
    ```python
    >>> import copy, torch
    >>> from hf_osd import OSD, extract_lora

    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
    >>> tuned = copy.deepcopy(base)
    >>> optimizer = OSD([{"params": [tuned[0].weight], "rank": 4}], lr=1e-2, subspace="static")
    >>> tuned(torch.randn(8, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> adapter = extract_lora(tuned, base, rank="auto", energy=0.99)
    >>> adapter.layers["0"].rank <= 4
    True

    ```
    `adapter.save_pretrained(folder)` writes it; `peft.PeftModel.from_pretrained(base, folder)` loads it.
    """
    fixed, energy = _check(rank, energy, max_rank, carry)
    import peft  # noqa: F401 - needed at the end: its absence is said before the work

    tuned, before, new = load_pair(model, base)
    check_same_architecture(tuned, before)
    modules_to_save = list(modules_to_save)
    for name in modules_to_save:
        found = dict(before.named_modules(remove_duplicate=False)).get(name)
        if found is None:
            raise ValueError(f"`modules_to_save` names {name!r}, which is no module of the base.")
        if not name or isinstance(found, CONTAINERS):
            raise ValueError(f"`modules_to_save` names {name!r}, a {type(found).__name__}: name modules inside it.")
    changes = find_changes(tuned, before, carry, modules_to_save, new)
    if not changes.linear:
        others = sorted({*changes.carried, *changes.dropped})
        more = f"; what changed: {shortened(others, 5)}" if others else ", nor anything else: are they the same?"
        raise ValueError(f"No matrix of a linear layer differs between the model and the base{more}")
    layers: dict[str, ExtractedLayer] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in changes.linear:
        layer: Any = before.get_submodule(name)
        dW = _change(tuned.get_submodule(name), layer)
        B, A, kept = balanced_factors(dW, fixed, energy, max_rank, exact)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        factors[name] = tuple(factor.to("cpu", dtype).contiguous() for factor in (B, A))  # type: ignore[assignment]
        layers[name] = ExtractedLayer((dW.shape[0], dW.shape[1]), A.shape[0], kept, float(dW.norm()))
    peft_model = build_adapter(tuned, before, changes, factors)
    if not isinstance(base, nn.Module):
        peft_model.peft_config["default"].base_model_name_or_path = os.fspath(base)
    if changes.dropped:
        _warn(changes.dropped)
    carried = {**changes.carried, **changes.biases}
    model_bytes = sum(p.numel() * p.element_size() for p in before.parameters())
    return ExtractedLora(peft_model, layers, carried, changes.dropped, model_bytes)


def _check(rank: int | str, energy: float | None, max_rank: int | None, carry: str) -> tuple[int | None, float | None]:
    """The fixed rank, or the energy; the other is `None`."""
    auto = rank == "auto"
    if not auto and (type(rank) is not int or rank < 1):
        raise ValueError(f"`rank` must be a positive integer or 'auto', got {rank!r}.")
    if not auto and (energy is not None or max_rank is not None):
        raise ValueError("`energy` and `max_rank` are for rank='auto': a fixed rank leaves them nothing to decide.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must be above 0 and at most 1, got {energy!r}.")
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise ValueError(f"`max_rank` must be a positive integer, got {max_rank!r}.")
    if carry not in CARRY:
        raise ValueError(f"`carry` must be one of {', '.join(map(repr, CARRY))}, got {carry!r}.")
    return (None, ENERGY if energy is None else energy) if auto else (int(rank), None)


def _change(after: Any, before: Any) -> Tensor:
    """The change dW (m, n) in float64; Conv1D keeps its weight as (inputs, outputs)."""
    W, W_base = after.weight.detach(), before.weight.detach()
    dW = W.double() - W_base.to(W.device, torch.float64)
    return dW if isinstance(after, nn.Linear) else dW.mT


def _warn(dropped: Mapping[str, float]) -> None:
    largest = sorted(dropped, key=lambda name: (math.isinf(dropped[name]), -dropped[name]))
    shown = shortened([f"{name} ({relative_text(dropped[name])})" for name in largest], 5)
    warnings.warn(
        f"The adapter leaves out what changed beside its matrices: {shown}. A wider `carry` ('auto', 'all') "
        "takes in what can be carried; `dropped` of the result lists it.",
        stacklevel=3,
    )
