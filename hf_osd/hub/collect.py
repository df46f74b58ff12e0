"""The P that an optimizer holds: copied to the CPU, and whole wherever its parts are."""

from collections.abc import Iterator

from torch import Tensor

from ..optim.osd import OSD
from ..optim.step.algorithm import ProjectedWeight
from ..optim.step.experts import ExpertWeights
from ..optim.step.full_weight import FullWeight
from ..optim.step.sharding import local
from ..optim.step.state import P_ENTRIES, create_state
from .projection import Projection


def projections_of(osd: OSD, include_moments: bool = False) -> Iterator[tuple[str, Projection, int]]:
    """Name, P and steps of every projected weight that has a P, one by one."""
    shared: dict[str, Tensor] = {}
    groups = [group for group in osd.trained_groups if group["rank"] is not None]
    for group in groups:
        for p in group["params"]:
            weight = osd.weight_of(p)
            if isinstance(weight, FullWeight):
                continue
            name, scattered, begun = weight.geometry.name, weight.geometry.scattered, bool(osd.state.get(p))
            if not scattered and not (begun and weight.started):
                continue
            if include_moments and weight.geometry.sharding is not None:
                raise ValueError(
                    f"`include_moments` needs the state of {name} in one place, but it is sharded over processes. "
                    "Save it with torch.distributed.checkpoint, or P alone."
                )
            if not begun:  # here; zeros, kept nowhere
                made = create_state(p.device, weight.geometry, weight.rules)
                weight.slot.state = {key: local(value) for key, value in made.items()}
            steps = _steps(weight)
            projection = _copy(weight, include_moments, shared)
            if not scattered or projection.projection.any():
                yield name, projection, steps


def gathers(osd: OSD) -> bool:
    """Whether `ProjectionState.from_optimizer` exchanges, so that all processes must call it."""
    return any(weight.geometry.scattered or weight.geometry.rows is not None for weight in osd.weights)


def _copy(weight: ProjectedWeight | ExpertWeights, include_moments: bool, shared: dict[str, Tensor]) -> Projection:
    """All that the optimizer holds for one weight, copied to the CPU: P itself, whatever it is made of there.

    Args:
        weight ([`ProjectedWeight`]): The weight.
        include_moments (`bool`): Whether to copy all other entries of its state.
        shared (`dict[str, torch.Tensor]`): Copies of P that others use, by the name of the weight that holds it.
    """
    own = P_ENTRIES | {weight.rules.subspace.code}
    kept = {name: value for name, value in weight.slot.state.items() if include_moments and name not in own}
    values = {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}
    geometry = weight.geometry
    P = None if geometry.holder is None else shared.get(geometry.holder)
    if P is None:
        P = _whole(weight, weight.projection).detach().to("cpu", copy=True)
    if geometry.holder is not None:
        shared[geometry.holder] = P
    weight.release()
    other = None if geometry.holds_projection else geometry.holder
    return Projection(P, geometry.side, geometry.rank, geometry.shape, values, other)


def _steps(weight: ProjectedWeight | ExpertWeights) -> int:
    """Steps so far, of a stack those of the expert with the most."""
    return int(_whole(weight, weight.slot.state["step"]).max())


def _whole(weight: ProjectedWeight | ExpertWeights, X: Tensor) -> Tensor:
    """An entry of the state of all experts, of which X has those that are here. An exchange where they are apart."""
    geometry = weight.geometry
    if not geometry.scattered or geometry.sharding is None:
        return X
    return geometry.sharding.full(X, (geometry.matrices, *X.shape[1:]))
