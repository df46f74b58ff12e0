"""The empty step by which `torch.distributed.checkpoint` has an optimizer make its states: it must not count."""

import torch

from ...subspace.precision import own_precision
from ...update_rules import GradientCheck
from .geometry import Geometry
from .projection import usable
from .weights import Weights


def only_make_states(weights: Weights) -> bool:
    """Make all states where the first step has zero gradients and lr 0; whether it was so."""
    weights.meet()
    trainable = [p for group in weights.groups for p in group["params"] if p.requires_grad]
    geometries = {p: weights.of(p).geometry for p in trainable}
    # all processes must come to the same: of experts that others have, this one cannot tell whether it is a step
    everywhere = [p for p in trainable if not geometries[p].scattered]
    if any(group["lr"] for group in weights.groups) or not everywhere or any(p.grad is None for p in everywhere):
        return False
    with own_precision(weights.device_types):
        checks = {p: check for p, _, _, check in weights.with_gradients()}
    if any(_is_useful(checks.get(p), geometry, p.device) for p, geometry in geometries.items()):
        return False
    for p in trainable:
        weights.ready(p).release()
    return True


def _is_useful(check: GradientCheck | None, geometry: Geometry, device: torch.device) -> bool:
    """Whether a gradient is there and anything but zero, for an expert of any process."""
    some = torch.zeros((), device=device) if check is None else (usable(check) | (check.broken > 0)).any()
    if geometry.scattered and geometry.sharding is not None:
        some = geometry.sharding.sum(some.float())
    return bool(some)
