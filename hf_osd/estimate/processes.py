"""What each of several processes holds where FSDP2 divides a model among them, from shapes alone."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..optim import OSD
from ..optim.options.mode import why_whole
from ..optim.options.rules import rules_of
from ..optim.step.geometry import Geometry, ProjectedGeometry
from ..optim.step.rows import Rows
from ..optim.step.sharding import Sharding
from ..optim.step.state import P_ENTRIES, local_shape, state_spec
from ..subspace import choose_side


@dataclass(frozen=True)
class Share:
    """Bytes of the process that has most; rows are divided as `torch.chunk` does.

    Attributes:
        weights (`int`): Parameters and buffers; of what is gathered for a forward pass nothing.
        gradients (`int`): Of what is trained; of layers that learn from activations R.
        state (`int`): The optimizer's moments, without P's.
        projection (`int`): P, or what stands for it in the state.
        projection_moments (`int`): Of P.
    """

    weights: int
    gradients: int
    state: int
    projection: int
    projection_moments: int


def share(model: nn.Module, optimizer: OSD, processes: int, *, divide: bool) -> Share:
    """What one of so many processes holds.

    Args:
        model (`nn.Module`): The model, whole, on the meta device.
        optimizer ([`OSD`]): Of its parameters.
        processes (`int`): How many there are.
        divide (`bool`): Whether they divide P where they can (`divide_projection`).
    """
    sizes: Counter[str] = Counter()
    layers = {} if optimizer.layers is None else optimizer.layers.by_weight()
    stand_ins = {layer.stand_in for layer in layers.values()}
    # what a layer stores transposed goes by its gradients there, see `layers.divided`
    made = {p: layer.stand_in for p, layer in layers.items() if not layer.transposed}
    for group in optimizer.trained_groups:
        rules = rules_of(group)
        for p in group["params"]:
            geometry = optimizer.weight_of(p).geometry
            if p in layers and p not in made:
                geometry = replace(geometry, holder=None)
            geometry = _sharded(geometry, group, processes, divide)
            for name, entry in state_spec(geometry, rules).items():
                shape = local_shape(name, entry, geometry)
                if geometry.stacked:  # whole experts
                    shape = (_part(entry.shape[0], processes), *entry.shape[1:])
                sizes[_kind(name)] += math.prod(shape) * entry.dtype.itemsize
    params = [p for p in model.parameters() if p not in stand_ins]
    return Share(
        sum(_bytes(X, processes) for X in params) + sum(X.nbytes for X in model.buffers()),
        sum(_bytes(made.get(p, p), processes) for p in params if p.requires_grad),
        **{name: sizes[name] for name in ("state", "projection", "projection_moments")},
    )


def _kind(name: str) -> str:
    if name in P_ENTRIES:
        return "projection"
    return "projection_moments" if name.startswith("projection_") else "state"


def _sharded(geometry: Geometry, group: dict, processes: int, divide: bool) -> Geometry:
    """The geometry on the first process of a mesh that nobody has made."""
    if not geometry.shape or geometry.stacked:
        return geometry
    sharding = Sharding(None, (), 0, _part(geometry.shape[0], processes), 1)
    geometry = replace(geometry, sharding=sharding)
    if not isinstance(geometry, ProjectedGeometry):
        return geometry
    geometry = replace(geometry, side=choose_side(*geometry.size, group["side"], 0))
    if not divide or why_whole(group) is not None:
        return geometry
    part = _part(geometry.projection_shape[0], processes)
    return replace(geometry, rows=Rows(None, (), 0, part, 1, (part,) * processes, 0))


def _bytes(X: torch.Tensor, processes: int) -> int:
    return X.nbytes if not X.ndim else math.prod((_part(X.shape[0], processes), *X.shape[1:])) * X.element_size()


def _part(size: int, processes: int) -> int:
    return -(-size // processes)
