"""Which parameters of a model are projected, and why. Names match as in peft."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ...text import shortened
from .adapters import ModuleNames, module_names
from .blocks import block_prefixes, given_heads, head_prefixes
from .matching import PLAIN_NAME, match, without
from .quantised import EXPERTS, WAY_OUT, is_quantised


ALL_LINEAR = "all-linear"


@dataclass
class Selection:
    """The trainable parameters of a model by what happens to them.

    Attributes:
        projected (`dict[str, nn.Parameter]`): Matrices (m, n) and experts' stacks (E, m, n) to project, by name.
        full_size (`dict[str, nn.Parameter]`): All others.
        ignored (`list[str]`): Modules that were asked for but are not linear layers.
        left_out (`list[str]`): Those of them with matrices to train that are not projected.
        nameable (`list[str]`): Matrices right in those, which can be asked for by name.
        frozen (`list[str]`): Linear layers that were asked for but do not require gradients.
        quantised (`list[str]`): Quantised layers that `all-linear` has left.
        adapters (`bool`): Whether the model has adapters of peft's.
    """

    projected: dict[str, nn.Parameter] = field(default_factory=dict)
    full_size: dict[str, nn.Parameter] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    nameable: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    adapters: bool = False

    @property
    def hint(self) -> str:
        """How the matrices of what is ignored are asked for."""
        return f"; their matrices have names: {shortened(self.nameable, 3)}" if self.nameable else ""


def select(
    model: nn.Module,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
    rank: int | None = None,
) -> Selection:
    """Choose the matrices to project.

    Args:
        model (`nn.Module`): The model. Frozen parameters are left out of everything.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            `"all-linear"`: every linear layer and every layer of experts inside the model's blocks (the elements of
            its `nn.ModuleList`s, and of containers of several alike, see [`~optim.selection.blocks.block_prefixes`];
            of a model without any, every one), neither heads nor gates of a single row; and of a `PeftModel` the
            linear layers that `modules_to_save` trains wherever they are, if `rank` is low for them. A list, or a
            string of plain names with commas between them: modules with that name or whose name ends in `.` + it, and
            parameters (m, n) or (E, m, n) such as `q_proj.weight`, `experts.gate_up_proj` and `in_proj_weight`.
            Another string: a regular expression that must match the whole name, of a parameter by its own words and
            without matching its module: `(?!.*q_proj$).*` leaves `q_proj.weight` as well. Names are those that the
            model has without the wrappers of peft and torch.
        exclude_modules (`str` or `list[str]`, *optional*):
            What to leave out again, matched likewise, with all that is inside of it.
        rank (`int`, *optional*): r, for the choice among `modules_to_save`: a classifier of two rows stays whole.

    Returns:
        [`Selection`]: `nn.Linear`, GPT-2's `Conv1D`, the 3-D parameters (E, m, n) of modules whose class name ends
        in `Experts` and parameters that are named are projected, never the factors of adapters. Of a linear layer that
        computes its weight (`weight_norm`, `spectral_norm`) it is the parameter of the weight's shape. A weight shared
        by several modules counts once, under its name in `named_parameters`.

    Raises:
        ValueError: If nothing is selected, a name in a list projects nothing, or a quantised layer is named.
    """
    wanted = parse_modules(target_modules)
    unwanted = None if exclude_modules is None else parse_modules(exclude_modules)
    if unwanted == ALL_LINEAR:
        raise ValueError(f"exclude_modules={ALL_LINEAR!r} would leave nothing to project: name what to leave out.")
    known = module_names(model)
    stacks = expert_stacks(model, known)
    names = {name: plain for name, plain in known.plain.items() if name and name not in known.wrappers}
    names |= {stack: _join(known.plain[owner], stack.rpartition(".")[2]) for stack, owner in stacks.items()}
    matrices = _matrices(model, known, names)
    names |= matrices

    def matching(wanted: str | list[str]) -> dict[str, nn.Parameter | nn.Module]:
        if wanted == ALL_LINEAR:
            matched = _all_linear(model, known, stacks, rank)
        else:
            matched = match(wanted, names, known, "target_modules")
            # a layer of experts stands for its stacks
            matched = [part for name in matched for part in [s for s in stacks if stacks[s] == name] or [name]]
        return {name: _part(_named(model, name)) for name in matched}

    parts = matched = matching(wanted)
    if unwanted:
        parts = without(parts, unwanted, names, known, partial(_parts, model))
    selection, chosen = Selection(adapters=bool(known.adapters)), set()
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            if part.requires_grad:
                chosen.add(part)
            else:
                selection.frozen.append(name)
        elif is_quantised(model.get_submodule(name)):
            selection.quantised.append(name)
        else:
            selection.ignored.append(name)
            selection.nameable += [matrix for matrix in matrices if matrix.rpartition(".")[0] == name]
    if selection.quantised and wanted != ALL_LINEAR:
        raise ValueError(
            f"`target_modules` names quantised layers, whose weights cannot be trained: "
            f"{shortened(selection.quantised, 3)}. {WAY_OUT}"
        )
    for name, p in model.named_parameters():
        if p.requires_grad:
            (selection.projected if p in chosen else selection.full_size)[name] = p
    # a pattern takes in activations, norms and what holds layers, too, of which nobody needs to be told
    selection.left_out = [name for name in selection.ignored if _has_other(parts[name], chosen)]
    if not selection.projected:
        weights = {name: linear_weight(model.get_submodule(name)) for name in known.plain}
        others = [name for name, weight in weights.items() if weight is not None and weight.requires_grad]
        _refuse_empty(selection, wanted, unwanted, not matched, others)
    for entry in wanted if isinstance(wanted, list) else ():
        _refuse_idle(entry, matching([entry]).values())
    return selection


def _has_other(module: nn.Parameter | nn.Module, chosen: set[nn.Parameter]) -> bool:
    """Whether there are matrices in a module that are not chosen."""
    assert isinstance(module, nn.Module)
    return any(p.ndim > 1 and p.requires_grad and p not in chosen for p in module.parameters())


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The layers whose weight is a matrix to project; Conv1D stores it as (in, out), which changes nothing here."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def expert_stacks(model: nn.Module, known: ModuleNames) -> dict[str, str]:
    """Parameters (E, m, n) that hold a matrix for each of E experts -> the name of their module.

    transformers' mixture-of-experts models keep them in classes named `MixtralExperts`, `GptOssExperts` and so on,
    each matrix as (out, in) or (in, out), which changes nothing here. Other 3-D parameters, such as convolutions'
    kernels, are no stacks of matrices.
    """
    return {
        _join(owner, name): owner
        for owner in known.plain
        if any(cls.__name__.endswith(EXPERTS) for cls in type(model.get_submodule(owner)).__mro__)
        and not is_quantised(model.get_submodule(owner))
        for name, p in model.get_submodule(owner).named_parameters(recurse=False)
        if p.ndim == 3 and p.is_floating_point()
    }


def linear_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter that is a linear layer's weight, or that its weight is computed from in the same shape."""
    if not isinstance(module, linear_classes()):
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)
        weight = next((p for p in module.parameters() if tuple(p.shape) == shape), None)
    return weight if weight is not None and weight.is_floating_point() else None


def _named(model: nn.Module, name: str) -> nn.Parameter | nn.Module:
    owner, _, last = name.rpartition(".")
    own: nn.Parameter | None = model.get_submodule(owner)._parameters.get(last)
    return model.get_submodule(name) if own is None else own


def _part(found: nn.Parameter | nn.Module) -> nn.Parameter | nn.Module:
    """The weight of a layer, or the module where it has none to train."""
    weight = None if isinstance(found, nn.Parameter) or is_quantised(found) else linear_weight(found)
    return found if weight is None else weight


def _parts(model: nn.Module, name: str, inside: bool) -> set[nn.Parameter | nn.Module]:
    found = _named(model, name)
    if isinstance(found, nn.Parameter):
        return {found}
    return {_part(found), *(found.modules() if inside else ()), *found.parameters(recurse=inside)}


def _matrices(model: nn.Module, known: ModuleNames, names: Mapping[str, str]) -> dict[str, str]:
    """The model's own parameters (m, n) and (E, m, n) that are no stacks of experts, to be named as those are."""
    return {
        _join(owner, name): _join(plain, name)
        for owner, plain in known.plain.items()
        if owner not in known.wrappers and not is_quantised(model.get_submodule(owner))
        for name, p in model.get_submodule(owner).named_parameters(recurse=False)
        if p.ndim in (2, 3) and p.is_floating_point() and _join(owner, name) not in names
    }


def _all_linear(model: nn.Module, known: ModuleNames, stacks: Mapping[str, str], rank: int | None) -> list[str]:
    modules = {name: model.get_submodule(name) for name in known.plain if name not in known.wrappers}
    quantised = {name for name, module in modules.items() if is_quantised(module)}
    layers = {name for name, module in modules.items() if isinstance(module, linear_classes())} | quantised
    blocks, heads = block_prefixes(modules, layers.__contains__), given_heads(model)
    left = () if blocks else head_prefixes(modules, known.plain)

    def inside(name: str) -> bool:
        return f"{name}.".startswith(blocks) if blocks else not f"{name}.".startswith(left)

    found = []
    for name in modules:
        if name not in layers:
            continue
        weight = linear_weight(modules[name])
        size = 2 if name in quantised else 0 if weight is None else min(weight.shape)  # codes have another shape
        if inside(name) and modules[name] not in heads and size > 1:
            found.append(name)
        elif name in known.copies and (rank is None or rank < size):
            found.append(name)
    return found + [stack for stack, owner in stacks.items() if inside(owner)]


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}".removeprefix(".")


def parse_modules(modules: str | Iterable[str]) -> str | list[str]:
    """What a user means: `all-linear`, a list of names, or a text that is a regular expression for whole names.

    A text of plain names with commas between them is a list of names, and one plain name is one too.
    """
    if isinstance(modules, str):
        names: list[Any] = [name.strip() for name in modules.split(",")]
        if not all(map(PLAIN_NAME.fullmatch, names)):
            return modules
    else:
        names = list(modules) if isinstance(modules, Iterable) else [modules]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"Modules to project, or not to, are given as a text or a list of texts, got {modules!r}.")
    if ALL_LINEAR not in map(_shorthand, names):
        return names
    if len(names) > 1:
        raise ValueError(f"{ALL_LINEAR!r} stands alone: it cannot be combined with other names, got {names}.")
    return ALL_LINEAR


def _shorthand(name: str) -> str:
    return ALL_LINEAR if name.lower().replace("_", "-") == ALL_LINEAR else name


def _refuse_idle(entry: str, parts: Iterable[nn.Parameter | nn.Module]) -> None:
    """Raise `ValueError` for one of several names that projects nothing, whatever is left out again."""
    weights = [part for part in parts if isinstance(part, nn.Parameter)]
    if any(weight.requires_grad for weight in weights):
        return
    why, inside = "frozen" if weights else "no linear layer", []
    for module in parts if not weights else ():
        assert isinstance(module, nn.Module)
        inside += [name for name, layer in module.named_modules() if linear_weight(layer) is not None]
        inside += [name for name, p in module.named_parameters() if p.ndim in (2, 3)]
    way_out = f"Name what is in it, such as '{entry}.{inside[0]}'." if inside else "Leave it out."
    raise ValueError(f"{entry!r} in `target_modules` projects nothing, for it is {why}. {way_out}")


def _refuse_empty(
    selection: Selection,
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None,
    unmatched: bool,
    others: list[str],  # layers that could be named
) -> None:
    if selection.quantised:
        count = len(selection.quantised)
        raise ValueError(f"Nothing to project: {count} layers are quantised, and cannot be trained. {WAY_OUT}")
    reasons = []
    if unmatched and isinstance(target_modules, str) and target_modules != ALL_LINEAR:
        reasons.append("this string is a regular expression for the whole name of a module")
    if selection.frozen:
        reasons.append(f"{len(selection.frozen)} matching layers are frozen")
    if selection.ignored:
        reasons.append(f"{shortened(selection.ignored, 3)} matched but are no linear layers{selection.hint}")
    if unmatched and target_modules == ALL_LINEAR:
        reasons.append("those it has are heads, or outside of its blocks" if others else "it has none")
    named = [f"names such as {others[:1]}"] if others else []
    default = ["target_modules='all-linear'"] if target_modules != ALL_LINEAR else []
    way_out = " or ".join([*default, *named, "an optimizer that does not project"])
    if selection.adapters:
        reasons.append("adapters' factors are small and never projected")
        way_out = (
            "optim='adamw_torch' for adapters alone, or train some layers in full beside them: name them in "
            "`modules_to_save` of the adapter's config, or set `requires_grad`"
        )
    raise ValueError(
        f"Nothing to project: target_modules={target_modules!r}, exclude_modules={exclude_modules!r} select no "
        f"trainable linear layer{' (' + '; '.join(reasons) + ')' if reasons else ''}. Use {way_out}."
    )
