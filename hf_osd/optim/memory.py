"""Bytes of optimizer state: predicted from shapes, measured on tensors, and what AdamW would hold.

A P that its rule keeps beside the state, as `random` does, is counted with it.
"""

from collections import Counter

import torch

from .options.rules import rules_of
from .osd import OSD, osd_of
from .step.algorithm import ProjectedWeight
from .step.experts import ExpertWeights
from .step.geometry import ProjectedGeometry
from .step.sharding import local
from .step.state import local_shape, state_spec


def predicted_entry_bytes(optimizer: OSD) -> Counter[str]:
    """Bytes of each entry of the state, such as `exp_avg`, over all parameters; see `predicted_state_bytes`."""
    sizes: Counter[str] = Counter()
    for group in optimizer.trained_groups:
        rules = rules_of(group)
        for p in group["params"]:
            geometry = optimizer.weight_of(p).geometry
            for name, entry in state_spec(geometry, rules).items():
                sizes[name] += torch.Size(local_shape(name, entry, geometry)).numel() * entry.dtype.itemsize
            if rules.subspace.keeps_expanded and isinstance(geometry, ProjectedGeometry) and geometry.holds_projection:
                P = torch.Size(geometry.projection_shape).numel() * geometry.compute_dtype.itemsize
                sizes["projection"] += len(geometry.experts) * P
    return sizes


def predicted_state_bytes(optimizer: OSD) -> int:
    """Bytes of the state once every parameter has been stepped, on this process; the state need not exist yet.

    For a weight (m, n) projected on its shorter side s to rank r: moments of r x max(m, n), P of s x r and P's
    moments, each in its storage, and three or four counters of 4 bytes.
    """
    return predicted_entry_bytes(optimizer).total()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer holds in its state now, on this process."""
    osd = osd_of(optimizer)
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    for weight in osd.weights if osd is not None else ():
        matrices = weight.experts if isinstance(weight, ExpertWeights) else [weight]
        own = [W.P.expanded for W in matrices if isinstance(W, ProjectedWeight) and W.geometry.holds_projection]
        held += [P for P in own if P is not None]
    return sum(local(value).numel() * value.element_size() for value in held)


def adamw_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that `torch.optim.AdamW` would hold on this process for the parameters: two moments in their dtype."""
    groups = optimizer.trained_groups if isinstance(optimizer, OSD) else optimizer.param_groups
    return sum(2 * local(p).numel() * p.element_size() for group in groups for p in group["params"])


def held_gradient_bytes(optimizer: OSD) -> int:
    """Bytes of gradients that a mode holds until `step()`: whole ones, and what is left of them in the subspace."""
    return 0 if optimizer._stream is None else optimizer._stream.held_bytes()
