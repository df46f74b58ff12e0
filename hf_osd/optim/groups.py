"""What is decided once for a parameter group: its options are checked, sides and P's learning rate settled."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
        if p.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, which P's gradient over- and underflows. Load with dtype=torch.bfloat16, or in "
                "float32 under autocast."
            )
    if group["source"] == "activations" and layers is None:
        raise ValueError(
            f"source='activations' of {where} needs a model whose layers are prepared for it: use create_osd_optimizer."
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


def given_projections(
    given: Mapping[str, Tensor] | Sequence[Tensor], group: Mapping[str, Any], names: list[str], position: int
) -> dict[str, Tensor]:
    """P_0 by name from what the user passed as `init`; `ValueError` unless every one is there and fits."""
    params = group["params"]
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"`init` has no P for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
        _refuse_other_sides(given, group, names)
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


def _refuse_other_sides(given: Mapping[str, Any], group: Mapping[str, Any], names: list[str]) -> None:
    """Raise `ValueError` for P of a ProjectionState that belongs to the other dimension: of a square, it would fit."""
    for name, side in zip(names, group["sides"], strict=True):
        own = getattr(given[name], "side", side)
        if own != side:
            way_out = f"Give side={own!r}." if group["source"] == "gradients" else "Use source='gradients' for it."
            raise ValueError(
                f"The P given as `init` for {name} is of the {own} side, here it is projected on the {side}. {way_out}"
            )
