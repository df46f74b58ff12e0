"""Bytes of optimizer state: predicted from shapes, measured on tensors, and what AdamW would hold."""

import torch

from .osd import OSD
from .plan import rules_of
from .state import state_spec


def predicted_state_bytes(optimizer: OSD) -> int:
    """Bytes of the state once every parameter has been stepped; the state need not exist yet.

    For a weight (m, n) projected on its shorter side s to rank r: moments of r x max(m, n), P of s x r and P's
    moments, each in its storage, and three or four counters of 4 bytes.
    """
    total = 0
    for group in optimizer.param_groups:
        rules = rules_of(group)
        for p in group["params"]:
            for entry in state_spec(optimizer.plan_of(p), rules).values():
                total += torch.Size(entry.shape).numel() * entry.dtype.itemsize
    return total


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer holds in its state now."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def adamw_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that `torch.optim.AdamW` would hold for the same parameters: two moments in the parameters' dtype."""
    return sum(2 * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])


def held_gradient_bytes(optimizer: OSD) -> int:
    """Bytes of gradients that a mode holds until `step()`: whole ones, and what is left of them in the subspace."""
    return 0 if optimizer._stream is None else optimizer._stream.held_bytes()
