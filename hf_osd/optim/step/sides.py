"""The side of each matrix of a group: decided once, and again where a parameter is sharded after that."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...layers.layer import LayerInfo
from ...subspace import choose_side
from .sharding import FLAT, sharding_of
from .stacks import lies_whole, sharding_of_expert


FULL_SIZE = "full size"  # in place of the side


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter can be projected: a matrix with rows and columns, or a stack of any number of them."""
    return p.ndim in (2, 3) and 0 not in p.shape[-2:]


def is_projected(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter of a group is."""
    return group["rank"] is not None and is_matrix(p)


def settle_sides(group: dict[str, Any], names: Sequence[str], layers: Mapping[Tensor, LayerInfo]) -> None:
    """Store the side of each matrix of a group, and `FULL_SIZE` of what is no matrix.

    A plain tensor's side never changes; a sharded one's comes when it is met.

    A weight of a prepared layer is projected on the side of the inputs, and which weight's state has P of its input is
    stored, too: it is known once the layer has been called.

    Args:
        group (`dict`): The group.
        names (`list[str]`): Of its parameters.
        layers (`dict[torch.Tensor, LayerInfo]`): The prepared ones by weight.

    Raises:
        ValueError: For a side that would divide P, and for what has become of a matrix in an engine that flattens.
    """
    stored = group.get("sides") or [None if is_matrix(p) else FULL_SIZE for p in group["params"]]
    sides = [
        layers[p].side if p in layers else FULL_SIZE if before == FULL_SIZE else _side(name, p, group["side"], before)
        for name, p, before in zip(names, group["params"], stored, strict=True)
    ]
    if group["source"] == "activations":
        inputs = [layers[p].input if p in layers else None for p in group["params"]]
        group["inputs"] = [
            None if p not in layers else name if shared is None else shared.leader
            for name, p, shared in zip(names, group["params"], inputs, strict=True)
        ]
    if group["init"] == "given":
        for name, side, before in zip(names, sides, stored, strict=True):
            if before is not None and side != before:
                raise ValueError(
                    f"The P given as `init` for {name} is one of the {before} side, but the parameter is sharded and "
                    f"projected on the {side}. Give P of that side, and side={side!r}."
                )
    group["sides"] = sides


def _side(name: str, p: Tensor, asked: str, before: str | None) -> str:
    if not is_matrix(p):
        raise ValueError(f"{name} was a matrix and has the shape {tuple(p.shape)} now. {FLAT}")
    sharding = sharding_of(p, name)
    if p.ndim == 3:
        sharding = None if lies_whole(sharding) else sharding_of_expert(sharding)
    if sharding is None:
        return before or choose_side(p.shape[-2], p.shape[-1], asked)
    side = choose_side(p.shape[-2], p.shape[-1], asked, sharding.dim)
    if side == "two_sided":
        raise ValueError(f"{name} is sharded, which side='two_sided' does not support: leave `side` out, or use DDP.")
    if (sharding.dim, side) in ((0, "left"), (1, "right")):  # the dimension that the side projects: P would be divided
        raise ValueError(f"{name} is sharded in the dimension that side={side!r} projects. Leave `side` out.")
    return side
