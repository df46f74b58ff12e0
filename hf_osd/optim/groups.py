"""What is decided once for a parameter group: its options are checked, sides and P's learning rate settled."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..declare import plain
from ..layers import PreparedLayers
from ..subspace import SubspaceRule, name_rule
from ..text import shortened
from ..update_rules import RULES, require_bitsandbytes
from .options import table as options
from .options.mode import Mode, refuse_in_mode
from .selection.wrappers import DDP, plain_name, plain_names
from .step.geometry import ProjectedGeometry, geometry_of, names_of
from .step.sharding import refuse_flat
from .step.sides import is_matrix, is_projected, settle_sides


def settle_group(
    group: dict[str, Any],
    where: str,
    position: int,
    mode: Mode,
    all_projected: bool,
    layers: PreparedLayers | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Validate a new group and store in it what is decided once: primitives only.

    Args:
        group (`dict`): The group, complete. Changed in place.
        where (`str`): What messages call it.
        position (`int`): Number of parameters in the groups before it.
        mode ([`Mode`]): The optimizer's.
        all_projected (`bool`): Whether it asks for that, or leaves what is no matrix at full size.
        layers ([`PreparedLayers`], *optional*): The model's.

    Returns:
        P_0 by name where the user gave one, and the names of parameters whose rank is not low.
    """
    group.update({name: plain(value) for name, value in group.items() if name in options.DEFAULTS or name == "lr"})
    options.check_lr(group["lr"], where)
    if isinstance(group["subspace"], SubspaceRule):
        group["subspace"] = name_rule(group["subspace"])
    options.validate(group, where)
    refuse_in_mode(group, mode, where)
    if any(RULES[rule].eight_bit for rule in (group["weight_rule"], options.projection_rule(group)) if rule):
        require_bitsandbytes()
    names = names_of(group, position)
    for name, p in zip(names, group["params"], strict=True):
        refuse_flat(p, name)
    given: str | Sequence[Tensor] | Mapping[str, Tensor] = group["init"]
    if not isinstance(given, str):
        group["init"] = "given"
    if group["rank"] is None:
        return {}, []
    for name, p in zip(names, group["params"], strict=True):
        if all_projected and not is_matrix(p):
            raise ValueError(
                f"{name} has shape {tuple(p.shape)} and cannot be projected: only matrices can, and stacks of "
                "them such as experts' weights. Put it into a group without `rank`."
            )
    if group["source"] == "activations" and layers is None:
        raise ValueError(
            f"source='activations' of {where} needs a model with prepared layers: use create_osd_optimizer."
        )
    settle_sides(group, names, {} if layers is None else layers.by_weight())
    group["alpha"] = options.projection_alpha(group, group["lr"])
    clipped = [
        name
        for name, p in zip(names, group["params"], strict=True)
        if is_projected(p, group) and group["rank"] >= min(p.shape[-2:])
    ]
    return {} if isinstance(given, str) else given_projections(given, group, names, position), clipped


def with_plain_names(params: Iterable) -> Any:
    """Parameters, pairs or groups as they are given to an optimizer, without the wrappers of their model in names."""
    if isinstance(params, Tensor):  # which torch refuses
        return params
    groups: list[Any] = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [
        group if isinstance(group["params"], (Tensor, set)) else {**group, "params": list(group["params"])}
        for group in groups
    ]
    pairs = [group for group in groups if all(isinstance(entry, tuple) for entry in group["params"])]
    names = iter(plain_names([name for group in pairs for name, _ in group["params"]]))
    for group in pairs:
        group["params"] = [(next(names), p) for _, p in group["params"]]
    return groups


def refuse_same_names(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` where two parameters have one name: a state is loaded by names."""
    seen: set[str] = set()
    for group in groups:
        for name in group.get("param_names") or ():
            if name in seen:
                raise ValueError(
                    f"Two parameters are called {name}, and states are loaded by names: make them differ, as "
                    "`named_parameters(prefix=...)` does, or give none."
                )
            seen.add(name)


def warn_clipped(clipped: Sequence[str]) -> None:
    """Say once, for all matrices, that their rank is not low."""
    if clipped:
        warnings.warn(
            f"`rank` is not below min(m, n) for {len(clipped)} matrices: they are projected at full rank, "
            f"which saves no memory. Choose a smaller rank or leave them out: {shortened(clipped, 3)}.",
            stacklevel=4,
        )


def warn_far(groups: Sequence[Mapping[str, Any]]) -> None:
    """Say once where P's learning rate is so large that most steps of P would be too long."""
    for group in groups:
        rule, rate = options.projection_rule(group), group["lr"] * group["alpha"]
        if rule is None or not group["params"]:
            continue
        # a column's step: the other rules have entries of about one size, SGD those of a gradient of norm 1
        rows = 1 if rule == "sgd" else max(min(p.shape[-2:]) for p in group["params"])
        if rate * rows**0.5 > 1:
            root = "" if rule == "sgd" else f" sqrt({rows})"
            warnings.warn(
                f"lr alpha{root} = {rate * rows**0.5:.2g}: P turns far at each step, and longer steps are cut. "
                f"Use an alpha of {group['alpha'] / (rate * rows**0.5):.1g} or less, or a lower learning rate.",
                stacklevel=4,
            )
            return


def given_projections(
    given: Mapping[str, Tensor] | Sequence[Tensor], group: Mapping[str, Any], names: list[str], position: int
) -> dict[str, Tensor]:
    """P_0 by name from what the user passed as `init`; `ValueError` unless every one is there and fits."""
    places = [index for index, p in enumerate(group["params"]) if is_projected(p, group)]
    names = [names[index] for index in places]
    if isinstance(given, Mapping):
        given = {plain_name(name): P for name, P in given.items()}
        if not any(name in given for name in names):  # of a model in DDP
            given = {name.removeprefix(f"{DDP}."): P for name, P in given.items()}
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"`init` has no P for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
        # A ProjectionState's entries hold P and what it was learned with
        tensors = [getattr(given[name], "projection", given[name]) for name in names]
    else:
        tensors = list(given)
        if len(tensors) != len(names):
            raise ValueError(f"`init` has {len(tensors)} tensors for {len(names)} parameters.")
    for index, name, P in zip(places, names, tensors, strict=True):
        geometry = geometry_of(group, index, group["params"][index], position + index)
        assert isinstance(geometry, ProjectedGeometry)
        shape = (*geometry.shape[:-2], *geometry.projection_shape)
        if not isinstance(P, Tensor) or tuple(P.shape) != shape or not P.isfinite().all():
            got = f"shape {tuple(P.shape)}" if isinstance(P, Tensor) else type(P).__name__
            raise ValueError(
                f"`init` for {name} must be a finite tensor of shape {shape}, got {got}: give the rank "
                f"and side that it was learned with, here rank {geometry.rank} and {geometry.side}."
            )
    return dict(zip(names, tensors, strict=True))
