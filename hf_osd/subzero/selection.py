"""Which parameters of a model are perturbed, which of them in subspaces, and what is refused."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hub import ProjectionState
from ..optim.groups import by_name
from ..optim.selection.targets import select
from ..optim.selection.wrappers import plain_name
from ..optim.step.sharding import is_sharded
from .options import Options


def trained_weights(
    model: nn.Module, target_modules: str | Iterable[str] | None
) -> tuple[dict[str, nn.Parameter], set[str]]:
    """The trained parameters by name, and the names of the matrices among them that are to be in subspaces.

    Raises:
        ValueError: If there is none, or one that cannot be perturbed.
    """
    # one without entries has nothing to train
    trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not trained:
        raise ValueError("The model has no parameters to train: all are frozen.")
    for name, p in trained.items():
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"{name} is {p.dtype}, whose steps would be lost: load the model in bfloat16 or float32.")
        if type(p) is not nn.Parameter and hasattr(p, "int_data"):
            raise ValueError(f"{name} is kept in 8 bits, which SubZero is not for: load the model in bfloat16.")
        if is_sharded(p):
            raise ValueError(f"{name} is sharded, which SubZero is not for: use DDP, or one process.")
    for name, module in model.named_modules():
        scripted = any(kind.__name__ == "ScriptModule" for kind in type(module).__mro__)
        if scripted or hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or 'The model'} is compiled, and SubZero has to see its functions: leave torch.compile out."
            )
    if target_modules is None:
        return trained, {name for name, p in trained.items() if p.ndim == 2}
    chosen = {plain_name(name) for name in select(model, target_modules).projected}
    return trained, {name for name, p in trained.items() if p.ndim == 2 and name in chosen}


def given_bases(
    options: Options, trained: Mapping[str, nn.Parameter], matrices: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """What U and V are drawn in by name and side, of `init`; matrices without a saved P are drawn freely.

    Raises:
        ValueError: If no matrix has a P, or one has another shape or a lower rank.
    """
    if options.init is None:
        return {}
    state: Any = options.init
    if not isinstance(state, Mapping):
        state = ProjectionState.from_pretrained(state)
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in by_name(state, matrices).items():
        if name not in matrices or min(trained[name].shape) <= options.rank:
            continue
        if tuple(entry.shape) != tuple(trained[name].shape):
            raise ValueError(f"The P of {name} is of a weight {entry.shape}, not {tuple(trained[name].shape)}.")
        if entry.rank < options.rank:
            raise ValueError(f"The P of {name} has rank {entry.rank}: give `rank` at most that.")
        sides = ("left", "right") if entry.side == "two_sided" else (entry.side,)
        found[name] = dict(zip(sides, entry.factors, strict=True))
    if not found:
        raise ValueError("`init` has no P for any matrix of this model: leave it out.")
    return found


def input_sides(
    options: Options, model: nn.Module, trained: Mapping[str, nn.Parameter], matrices: Collection[str]
) -> dict[str, str]:
    """With `source="activations"` the side of the inputs, `"right"` or `"left"`, of the matrices whose V follows them.

    They are of plain linear layers alone: of a subclass nobody knows what it does, and of a weight that is tied to an
    embedding rows are looked up as well.

    Raises:
        ValueError: If there is none.
    """
    if options.source != "activations":
        return {}
    from transformers.pytorch_utils import Conv1D

    sides = {nn.Linear: "right", Conv1D: "left"}
    uses: dict[nn.Parameter, set[str | None]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                uses.setdefault(p, set()).add(sides.get(type(module)) if name == "weight" else None)
    inputs = {name: uses[trained[name]] for name in matrices if min(trained[name].shape) > options.rank}
    followed = {name: side for name, (side, *others) in inputs.items() if side and not others}
    if not followed:
        raise ValueError("source='activations' needs linear layers with min(m, n) > `rank`: this model trains none.")
    return followed
