"""Which parameters of a model are projected, and why. Names match as in peft."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


ALL_LINEAR = "all-linear"


@dataclass
class Selection:
    """The trainable parameters of a model by what happens to them.

    Attributes:
        projected (`dict[str, nn.Parameter]`): Matrices to project, by name.
        full_size (`dict[str, nn.Parameter]`): All others.
        ignored (`list[str]`): Modules that were asked for but are not linear layers.
        frozen (`list[str]`): Linear layers that were asked for but do not require gradients.
    """

    projected: dict[str, nn.Parameter] = field(default_factory=dict)
    full_size: dict[str, nn.Parameter] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)


def select(
    model: nn.Module,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: str | Iterable[str] | None = None,
) -> Selection:
    """Choose the matrices to project.

    Args:
        model (`nn.Module`): The model. Frozen parameters are left out of everything.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            `"all-linear"`: every linear layer inside the model's blocks (the elements of its `nn.ModuleList`s; of a
            model without any, every linear layer), not the output head. A list: modules with that name or whose name
            ends in `.` + it. Another string: a regular expression that must match the whole name.
        exclude_modules (`str` or `list[str]`, *optional*): What to leave out again, matched likewise.

    Returns:
        [`Selection`]: `nn.Linear` and GPT-2's `Conv1D` are projected. A weight shared by several modules counts once,
        under its name in `named_parameters`.

    Raises:
        ValueError: If nothing is selected, or a name in a list matches no module.
    """
    wanted = _normalise(target_modules)
    unwanted = None if exclude_modules is None else _normalise(exclude_modules)
    names = [name for name, _ in model.named_modules() if name]
    matched = _all_linear(model) if wanted == ALL_LINEAR else _match(wanted, names, "target_modules")
    if unwanted == ALL_LINEAR:
        raise ValueError(f"exclude_modules={ALL_LINEAR!r} would leave nothing to project: name what to leave out.")
    if unwanted:
        excluded = _match(unwanted, names, "exclude_modules")
        matched = [name for name in matched if name not in set(excluded)]
    selection, chosen = Selection(), set()
    for name in matched:
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if not isinstance(module, linear_classes()) or weight is None or not weight.is_floating_point():
            selection.ignored.append(name)
        elif not weight.requires_grad:
            selection.frozen.append(name)
        else:
            chosen.add(weight)
    for name, p in model.named_parameters():
        if p.requires_grad:
            (selection.projected if p in chosen else selection.full_size)[name] = p
    if not selection.projected:
        _refuse_empty(selection, wanted, unwanted)
    return selection


def linear_classes() -> tuple[type[nn.Module], ...]:
    """The layers whose weight is a matrix to project; Conv1D stores it as (in, out), which changes nothing here."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def _all_linear(model: nn.Module) -> list[str]:
    blocks = tuple(
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear_classes())
        and module is not head
        and (not blocks or any(name == block or name.startswith(block + ".") for block in blocks))
    ]


def _normalise(modules: str | Iterable[str]) -> str | list[str]:
    if not isinstance(modules, str):
        modules = list(modules)
        if [ALL_LINEAR] != [_shorthand(name) for name in modules]:
            if any(_shorthand(name) == ALL_LINEAR for name in modules):
                raise ValueError(f"{ALL_LINEAR!r} stands alone: it cannot be combined with other names.")
            return modules
        modules = modules[0]
    return _shorthand(modules)


def _shorthand(name: str) -> str:
    return ALL_LINEAR if name.lower().replace("_", "-") == ALL_LINEAR else name


def _match(wanted: str | list[str], names: list[str], option: str) -> list[str]:
    if isinstance(wanted, str):
        try:
            return [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise ValueError(f"`{option}` {wanted!r} is not a regular expression: {error}.") from error
    for entry in wanted:
        if not any(name == entry or name.endswith("." + entry) for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(1000)})
            close = difflib.get_close_matches(entry, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The model has: {', '.join(known)}."
            raise ValueError(f"{entry!r} in `{option}` matches no module.{hint}")
    return [name for name in names if any(name == entry or name.endswith("." + entry) for entry in wanted)]


def _refuse_empty(
    selection: Selection, target_modules: str | list[str], exclude_modules: str | list[str] | None
) -> None:
    reasons = []
    if selection.frozen:
        reasons.append(f"{len(selection.frozen)} matching layers are frozen")
    if selection.ignored:
        reasons.append(f"{', '.join(selection.ignored[:3])} matched but are no linear layers")
    raise ValueError(
        f"Nothing to project: target_modules={target_modules!r}, exclude_modules={exclude_modules!r} select no "
        f"trainable linear layer{' (' + '; '.join(reasons) + ')' if reasons else ''}. Use "
        "target_modules='all-linear', names such as ['q_proj', 'v_proj'], or an optimizer that does not project."
    )
