"""What changed between two models of one architecture, and in which form an adapter can carry it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..optim.selection.targets import linear_classes
from .lora_forms import lora_form


CARRY = {"none": (), "head": ("head",), "auto": ("head", "vectors"), "all": ("head", "vectors", "matrices")}
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # peft carries modules that are called

Norms = tuple[float, float]  # (||change||², ||base||²)


@dataclass
class Changes:
    """The weights of a model that differ from the base's, by what an adapter can do for them.

    Attributes:
        linear (`dict[str, str]`): Linear layers that changed, and the form in which peft takes them: LoRA.
        biases (`dict[str, float]`): Biases of these layers that changed, with the relative change: LoRA's `bias`.
        carried (`dict[str, float]`): Modules to carry in full, with their relative change: `modules_to_save`.
        dropped (`dict[str, float]`):
            What stays as it is in the base, with the relative change that is lost: modules, or single weights of what
            cannot be carried as a whole.
    """

    linear: dict[str, str] = field(default_factory=dict)
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
    """Sort every weight that differs: each one is in exactly one part of the result, by its name or its module's.

    Args:
        tuned (`nn.Module`): The model after training.
        base (`nn.Module`): Before, with the same weights by name and shape.
        carry (`str`): `"none"`, `"head"`, `"auto"` or `"all"`, see [`extract_lora`].
        modules_to_save (`Iterable[str]`, *optional*): Modules to carry whatever `carry` is.
        new (`Iterable[str]`, *optional*): Names of weights that the base's files lack: they are random in every load.
    """
    ours, theirs, kinds = entries(tuned), entries(base), CARRY[carry]
    modules = dict(tuned.named_modules(remove_duplicate=False))
    embedded = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    random = [name.rpartition(".")[0] for name in new if "." in name]
    forced = [*modules_to_save, *(random if kinds else [])]
    heads = _topmost(
        name
        for name in [*modules_to_save, *random, *_heads(tuned)]
        if name in modules and not isinstance(modules[name], CONTAINERS)  # the stand-ins of prepared layers hide
    )
    differing = _differing(ours, theirs)
    owners = _by_owner(differing, modules, heads)
    uses = Counter(map(id, modules.values()))  # peft wraps one that has several names under the first of them only

    changes, carried = Changes(), []
    for owner, names in owners.items():
        module = modules[owner]
        linear = isinstance(module, linear_classes()) and owner not in heads and uses[id(module)] == 1
        linear = linear and id(module.weight) not in embedded
        trained = f"{owner}.weight" in names or ("vectors" in kinds and f"{owner}.bias" in names)
        form = lora_form(base, owner) if linear and trained else None
        if form:
            changes.linear[owner] = form
            continue
        tied = any(id(value) in embedded for value in entries(module).values())
        kind = "head" if owner in heads else "vectors"
        if tied or (kind != "head" and any(ours[name].dim() > 1 for name in names)):
            kind = "matrices"
        if kind in kinds or owner in forced:
            carried.append(owner)
    _distribute(changes, owners, differing, carried, "vectors" in kinds)
    return changes


def _distribute(
    changes: Changes, owners: dict[str, list[str]], differing: dict[str, Norms], wanted: list[str], biases: bool
) -> None:
    """Every weight that differs and that no LoRA layer has: into the biases, the carried modules, or the dropped."""
    # peft carries every module whose name ends in the given one, and none that holds a LoRA layer.
    around = {name for layer in changes.linear for name in _upwards(layer)}
    possible = {owner for owner in owners if owner and not any(name.endswith(owner) for name in around)}
    carried = _topmost(owner for owner in wanted if owner in possible)
    parts: dict[str, list[str]] = {}
    for owner, names in owners.items():
        top = next((name for name in carried if _within(owner, name)), None)
        apart = owner not in possible or any(_within(name, owner) for name in carried)
        for name in names:
            if owner in changes.linear:
                if name == f"{owner}.bias" and biases:
                    changes.biases[name] = relative([differing[name]])
                elif name != f"{owner}.weight":
                    parts[name] = [name]
            else:
                parts.setdefault(top or (name if apart else owner), []).append(name)
    for part, names in parts.items():
        (changes.carried if part in carried else changes.dropped)[part] = relative(differing[name] for name in names)


def relative(norms: Iterable[Norms]) -> float:
    """||change|| / ||base|| over several weights; infinite where the base has zeros only."""
    change, size = (math.sqrt(sum(squares)) for squares in zip(*norms, strict=True))
    return change / size if size else math.inf


def relative_text(change: float) -> str:
    """A relative change for people; weights that were zero have none."""
    return f"{100 * change:.2g}%" if math.isfinite(change) else "from zero"


def _differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Norms]:
    found = {}
    for name in ours:
        norms = _norms(ours[name], theirs[name])
        if not math.isfinite(norms[0]):
            raise ValueError(f"{name} has values that are not finite: there is no change to extract.")
        if norms[0] > 0:
            found[name] = norms
    return found


def _by_owner(names: Iterable[str], modules: Mapping[str, nn.Module], heads: list[str]) -> dict[str, list[str]]:
    """Weights by the head that they are in, or else the smallest module that could be carried for them."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owner = next((head for head in heads if _within(name, head)), None)
        if owner is None:
            around = _upwards(name.rpartition(".")[0])
            owner = next(module for module in around if not isinstance(modules[module], CONTAINERS))
        owners.setdefault(owner, []).append(name)
    return owners


def _heads(model: nn.Module) -> list[str]:
    """The parts of a transformers model beside its trunk; not an output embedding, which the base has too.

    A part that holds the output embedding is taken apart: of BERT's `cls` remains `cls.predictions.transform`.
    """
    trunk = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if not isinstance(trunk, nn.Module):
        return []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name in _beside(model, output) if name and model.get_submodule(name) is not trunk]


def _beside(module: nn.Module, part: nn.Module | None, prefix: str = "") -> list[str]:
    """The largest submodules that do not hold a part."""
    found = []
    for name, child in module.named_children():
        if child is not part:
            inside = any(inner is part for inner in child.modules())
            found += _beside(child, part, f"{prefix}{name}.") if inside else [prefix + name]
    return found


def _upwards(name: str) -> list[str]:
    """A module and all that are around it, the model itself (`""`) last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:k]) for k in range(len(parts), -1, -1)]


def _topmost(names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    return [name for name in names if not any(other != name and _within(name, other) for other in names)]


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")


def _norms(after: Tensor, before: Tensor) -> Norms:
    """(||after - before||², ||before||²) in float64."""
    old = before.detach().to(after.device, torch.float64)
    return float((after.detach().double() - old).square().sum()), float(old.square().sum())
