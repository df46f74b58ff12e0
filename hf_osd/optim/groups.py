"""What is decided once for a parameter group: its options are checked, sides and P's learning rate settled."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..declare import plain
from ..layers import PreparedLayers
from ..subspace import SubspaceRule, name_rule
from ..text import shortened
from ..update_rules import RULES, require_bitsandbytes
from .options import table as options
from .options.mode import Mode, refuse_in_mode
from .step.geometry import ProjectedGeometry, geometry_of, names_of
from .step.sharding import refuse_flat
from .step.sides import settle_sides


def settle_group(
    group: dict[str, Any], where: str, position: int, mode: Mode, layers: PreparedLayers | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Validate a new group and store in it what is decided once: primitives only.

    Args:
        group (`dict`): The group, complete. Changed in place.
        where (`str`): What messages call it.
        position (`int`): Number of parameters in the groups before it.
        mode ([`Mode`]): The optimizer's.
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
        if p.ndim not in (2, 3):
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
    clipped = [name for name, p in zip(names, group["params"], strict=True) if group["rank"] >= min(p.shape[-2:])]
    return {} if isinstance(given, str) else given_projections(given, group, names, position), clipped


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
    params = group["params"]
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"`init` has no P for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
        # A ProjectionState's entries hold P and what it was learned with
        tensors = [getattr(given[name], "projection", given[name]) for name in names]
    else:
        tensors = list(given)
        if len(tensors) != len(params):
            raise ValueError(f"`init` has {len(tensors)} tensors for {len(params)} parameters.")
    for index, (p, P) in enumerate(zip(params, tensors, strict=True)):
        geometry = geometry_of(group, index, p, position + index)
        assert isinstance(geometry, ProjectedGeometry)
        shape = (*geometry.shape[:-2], *geometry.projection_shape)
        if not isinstance(P, Tensor) or tuple(P.shape) != shape or not P.isfinite().all():
            got = f"shape {tuple(P.shape)}" if isinstance(P, Tensor) else type(P).__name__
            raise ValueError(
                f"`init` for {names[index]} must be a finite tensor of shape {shape}, got {got}: give the rank "
                f"and side that it was learned with, here rank {geometry.rank} and {geometry.side}."
            )
    return dict(zip(names, tensors, strict=True))
