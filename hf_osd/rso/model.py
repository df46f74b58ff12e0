"""Put peft's LoRA layers into a model, in place, with A = Pᵀ frozen and everything else as it was."""

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..optim import ALL_LINEAR, DEFAULT_RANK, Selection, select
from ..optim.factory import decay_parameter_names
from ..optim.selection.adapters import module_names
from ..optim.selection.quantised import is_quantised
from ..optim.selection.targets import linear_classes
from ..optim.step.sharding import is_sharded
from ..text import shortened
from .options import DEFAULT_INTERVAL, RSOOptions, check_scale
from .outer_loop import OuterLoop, outer_loop
from .plain_state import ADAPTER, keep_plain


def create_rso_model(
    model: nn.Module,
    rank: int = DEFAULT_RANK,
    *,
    interval: int = DEFAULT_INTERVAL,
    eta: float | None = None,
    sampling: str = "gaussian",
    seed: int = 0,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
) -> nn.Module:
    """Prepare a model for Randomized Subspace Optimization (https://huggingface.co/papers/2502.07222), in place.

    Not for you if the learning rate cannot be tuned anew, if adapters are what you want (the weights change here), or
    if a checkpoint may not be larger than the model: to continue exactly, it holds W and B beside W + P B.

    Every targeted linear layer becomes a LoRA layer of peft's with frozen A = Pᵀ and scaling 1, whose B starts at 0
    and is all that is trained of it; P acts on the inputs. All other parameters (embeddings, norms, biases, head) are
    trained at full size as before. `state_dict()` is that of the plain model with W + P B in it, and plain state dicts
    can be loaded: checkpoints need neither this package nor peft.

    Args:
        model (`nn.Module`): A model without adapters, unquantised and not sharded.
        rank (`int`, *optional*, defaults to 128): r.
        interval (`int`, *optional*, defaults to 200):
            Steps of the inner optimizer with one P. Steps are counted by [`RSOCallback`], or by your loop.
        eta (`float`, *optional*):
            Adds ||B||² / (2 eta) to the objective of each interval: B / eta is added to B's gradient after clipping,
            so that an adaptive inner optimizer sees the gradient of the whole subproblem (4a). `None`, no such term,
            is the limit of a large eta; the theory asks for 1 / (2 L), with a smoothness constant that nobody knows.
            Decoupled from the moments, the same term is AdamW's `weight_decay` on B, with eta = 1 / weight_decay.
        sampling (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"`: entries of P are N(0, 1/r). `"orthonormal"`: columns are orthogonal, with norm sqrt(n/r).
        seed (`int`, *optional*, defaults to 0): All P are drawn from it; the same on all processes.
        target_modules, exclude_modules: Which linear layers, see [`~optim.selection.targets.select`].

    Returns:
        `nn.Module`: The model itself.

    Raises:
        ValueError: For wrong options, an empty selection, and models on which RSO would do something else.
        ImportError: Without peft.
    """
    options = RSOOptions(rank, interval, eta, sampling, seed)
    selection = _select(model, rank, target_modules, exclude_modules)
    names = [name.removesuffix(".weight") for name in selection.projected]
    trained = [p for p in model.parameters() if p.requires_grad]
    _inject(model, names, rank)
    for p in trained:  # peft has frozen everything
        p.requires_grad_(True)
    layers = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(False)  # type: ignore[union-attr]
        layer.lora_A[ADAPTER].weight.requires_grad_(False)  # type: ignore[union-attr, index]
        keep_plain(layer)
    model._rso_loop = OuterLoop(layers, options)  # type: ignore[assignment]
    return model


def unload_rso_model(model: nn.Module) -> nn.Module:
    """Undo [`create_rso_model`], in place: W + P B are the weights again, and they require gradients.

    Raises:
        ValueError: If the model is not prepared for RSO.
    """
    loop = outer_loop(model)
    if loop is None:
        raise ValueError("The model is not prepared for RSO: there is nothing to unload.")
    for name, layer in loop.layers.items():
        layer.merge(adapter_names=[ADAPTER])  # type: ignore[operator]
        base: Any = layer.base_layer
        base.weight.requires_grad_(True)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    vars(model).pop("_rso_loop")
    return model


def rso_param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    scale: float = 1.0,
    decay_names: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Up to three groups: B, and full-size parameters with weight decay or without.

    Args:
        model (`nn.Module`): From [`create_rso_model`].
        lr (`float`): Learning rate of the full-size parameters.
        weight_decay (`float`, *optional*, defaults to 0):
            Of B, whose decay is a decoupled proximal term, and of full-size matrices. W itself never decays.
        scale (`float`, *optional*, defaults to 1):
            B's learning rate is `scale * lr`. At 1, W's entries move as far per step as Adam at full size moves them.
        decay_names (`Collection[str]`, *optional*): Defaults to what `Trainer` decides.
    """
    check_scale(scale)
    loop = outer_loop(model)
    if loop is None:
        raise ValueError("The model is not prepared for RSO: call `create_rso_model` first.")
    decay_names = decay_parameter_names(model) if decay_names is None else decay_names
    factors = [B for _, B in loop.factors()]
    known = {id(B) for B in factors}
    groups: list[dict[str, Any]] = [{"params": factors, "lr": scale * lr, "weight_decay": weight_decay}]
    for decays in (True, False):
        full_size = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in known and (name in decay_names) == decays
        ]
        if full_size:
            groups.append({"params": full_size, "lr": lr, "weight_decay": weight_decay if decays else 0.0})
    return groups


def _select(model: nn.Module, rank: int, target_modules: Any, exclude_modules: Any) -> Selection:
    """What is targeted, or `ValueError` with the reason for models on which RSO would do something else."""
    if outer_loop(model) is not None:
        raise ValueError(
            "The model is already prepared for RSO. Train it so with any ordinary `optim`, such as 'adamw_torch', or "
            "`unload_rso_model` it first."
        )
    if module_names(model).adapters:
        raise ValueError(
            "RSO changes the weights under adapters and uses LoRA layers for itself: it cannot be combined with the "
            "model's adapters. Merge them (`merge_and_unload`), or train them with optim='adamw_torch'."
        )
    if any(is_quantised(module) for module in model.modules()):
        raise ValueError(
            "RSO adds P B to the weights, and quantised ones would round it away. Load the model in full precision, "
            "without `quantization_config`."
        )
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("RSO does not work on sharded parameters (FSDP, tensor parallelism): use DDP, or OSD.")
    selection = select(model, target_modules, exclude_modules, rank)
    if selection.ignored:
        warnings.warn(f"No linear layers, left at full size: {shortened(selection.ignored, 5)}.", stacklevel=3)
    for name, p in selection.projected.items():
        owner, _, last = name.rpartition(".")
        layer = model.get_submodule(owner)
        if last != "weight" or not isinstance(layer, linear_classes()):
            kind = "a stack of experts' weights" if p.ndim == 3 else "no linear layer's own weight"
            raise ValueError(
                f"{name} is {kind}, which RSO cannot train: leave it at full size with `exclude_modules`, or use OSD."
            )
        n = p.shape[1] if isinstance(layer, nn.Linear) else p.shape[0]  # Conv1D stores (in, out)
        if rank >= n:
            raise ValueError(
                f"`rank` of RSO must be below the {n} inputs of {name}, got {rank}. Choose a lower one, or leave the "
                "layer out with `exclude_modules`."
            )
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if _is_in(p, selection)]
    if len(names) > len(selection.projected):
        shared = sorted(set(names) - selection.projected.keys())
        raise ValueError(f"{shortened(shared, 3)} share weights with other layers: leave them out.")
    return selection


def _is_in(p: nn.Parameter, selection: Selection) -> bool:
    return any(p is q for q in selection.projected.values())


def _inject(model: nn.Module, names: list[str], rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("RSO is built on peft's LoRA layers: run `pip install peft`.") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # scaling 1
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(re.escape(name) for name in names),  # a string must match whole names
        fan_in_fan_out=any(not isinstance(model.get_submodule(name), nn.Linear) for name in names),
    )
    inject_adapter_in_model(config, model, ADAPTER)
    vars(model).pop("peft_config", None)  # to everybody else this is no model with adapters
