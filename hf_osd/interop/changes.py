"""What changed between two models of one architecture, and in which form an adapter can carry it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..optim.selection.targets import linear_classes


CARRY = {"head": ("head",), "auto": ("head", "vectors"), "all": ("head", "vectors", "matrices")}


@dataclass
class Changes:
    """The modules of a model whose weights differ from the base's, by what an adapter can do for them.

    Attributes:
        linear (`list[str]`): Linear layers whose matrix changed: LoRA.
        biases (`dict[str, float]`): Biases of these layers that changed, with the relative change: LoRA's `bias`.
        carried (`dict[str, float]`): Modules to carry in full, with their relative change: `modules_to_save`.
        dropped (`dict[str, float]`): What stays as it is in the base, with the relative change that is lost.
    """

    linear: list[str] = field(default_factory=list)
    biases: dict[str, float] = field(default_factory=dict)
    carried: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)


def entries(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and saved buffers by name, the objects themselves; nothing is copied."""
    state = model.state_dict(prefix=prefix, keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def check_same_architecture(tuned: nn.Module, base: nn.Module) -> None:
    """Raise `ValueError` that names the first difference in names, shapes or kind of the weights."""
    ours, theirs = entries(tuned), entries(base)
    for name in [*ours, *theirs]:
        fault = None
        if name not in theirs or name not in ours:
            fault = f"{name} is only in the {'tuned model' if name in ours else 'base'}"
        elif ours[name].shape != theirs[name].shape:
            fault = f"{name} has the shape {tuple(ours[name].shape)}, in the base {tuple(theirs[name].shape)}"
        elif ours[name].is_floating_point() != theirs[name].is_floating_point():
            fault = f"{name} is {ours[name].dtype}, in the base {theirs[name].dtype}"
        if fault:
            raise ValueError(
                f"The tuned model ({type(tuned).__name__}) and the base ({type(base).__name__}) must have the same "
                f"weights: {fault}. Load the base with the class and config of the tuned model; merge adapters first."
            )
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, linear_classes()) and isinstance(weight, Tensor) and not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({type(module).__name__}): its change cannot be computed. Give the base in full "
                "precision; the adapter can then be loaded on the quantised one."
            )


def find_changes(
    tuned: nn.Module, base: nn.Module, carry: str, modules_to_save: Iterable[str] = (), new: Iterable[str] = ()
) -> Changes:
    """Sort every weight that differs.

    Args:
        tuned (`nn.Module`): The model after training.
        base (`nn.Module`): Before, with the same weights by name and shape.
        carry (`str`): `"head"`, `"auto"` or `"all"`, see [`extract_lora`].
        modules_to_save (`Iterable[str]`, *optional*): Modules to carry whatever `carry` is.
        new (`Iterable[str]`, *optional*): Names of weights that the base's files lack: they are random in every load.
    """
    changes, ours, theirs = Changes(), entries(tuned), entries(base)
    modules = dict(tuned.named_modules(remove_duplicate=False))
    forced = [*modules_to_save, *{name.rpartition(".")[0] for name in new if "." in name}]
    heads = _topmost([*forced, *_heads(tuned, ours)])
    embedded = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    differing: dict[str, dict[str, tuple[float, float]]] = {}
    for name in ours:
        change, size = _norms(ours[name], theirs[name])
        owner, _, leaf = name.rpartition(".")
        if not math.isfinite(change):
            raise ValueError(f"{name} has values that are not finite: there is no change to extract.")
        if change > 0:
            owner = next((head for head in heads if _within(name, head)), owner)
            differing.setdefault(owner, {})[leaf] = (change, size)
    for owner, found in differing.items():
        module, is_head = modules[owner], owner in heads
        weight = getattr(module, "weight", None)
        if isinstance(module, linear_classes()) and not is_head and id(weight) not in embedded:
            if "weight" in found:
                changes.linear.append(owner)
                found.pop("weight")
            _sort_bias(changes, owner, found, carry)
            continue
        tied = {id(value) for value in module.state_dict(keep_vars=True).values()} & embedded
        kind = "head" if is_head else "vectors"
        if tied or (not is_head and any(ours[f"{owner}.{leaf}".lstrip(".")].dim() > 1 for leaf in found)):
            kind = "matrices"
        wanted = kind in CARRY[carry] or owner in forced
        (changes.carried if wanted else changes.dropped)[owner] = relative(found)
    _settle(changes)
    return changes


def relative(found: Mapping[str, tuple[float, float]]) -> float:
    """||change|| / ||base|| over several weights; infinite where the base has zeros only."""
    change, size = (math.sqrt(sum(pair[i] for pair in found.values())) for i in (0, 1))
    return change / size if size else math.inf


def relative_text(change: float) -> str:
    """A relative change for people; weights that were zero have none."""
    return f"{100 * change:.2g}%" if math.isfinite(change) else "from zero"


def _sort_bias(changes: Changes, owner: str, found: dict[str, tuple[float, float]], carry: str) -> None:
    for leaf in found:
        layer = owner in changes.linear and leaf == "bias" and "vectors" in CARRY[carry]
        (changes.biases if layer else changes.dropped)[f"{owner}.{leaf}"] = relative({leaf: found[leaf]})


def _settle(changes: Changes) -> None:
    """Weights of the model itself, and of modules around a LoRA layer, cannot be carried; parts of others need not."""
    top = set(_topmost(changes.carried))
    for name in list(changes.carried):
        if not name or any(_within(layer, name) for layer in changes.linear):
            changes.dropped[name or "(the model itself)"] = changes.carried.pop(name)
        elif name not in top:
            del changes.carried[name]


def _heads(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The parts of a transformers model beside its trunk; not an output embedding, which the base has too."""
    trunk = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if not isinstance(trunk, nn.Module):
        return []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    children = {name.partition(".")[0] for name in names if "." in name}
    return [name for name, child in model.named_children() if name in children and child not in (trunk, output)]


def _topmost(names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    return [name for name in names if not any(other != name and _within(name, other) for other in names)]


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")


def _norms(after: Tensor, before: Tensor) -> tuple[float, float]:
    """(||after - before||², ||before||²) in float64."""
    old = before.detach().to(after.device, torch.float64)
    return float((after.detach().double() - old).square().sum()), float(old.square().sum())
