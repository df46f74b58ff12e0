"""One step for a projected parameter: a matrix, or a stack of experts', each stepped as a parameter of its own.

An expert that had no tokens has a zero gradient, and is left alone, as a module without gradient is: nothing of its
weights, moments and P changes. Only `idle_steps` counts, so that the host, which has counted on, agrees with the state
after a resume.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..update_rules import GradientCheck
from .param_step import step_matrix, usable
from .plan import ProjectedPlan, Rules, StackedPlan


def step_matrices(
    p: Tensor,  # (m, n), or (E, m, n)
    G: Tensor,  # like p
    state: dict[str, Tensor],  # of a stack entries (E, ...)
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,  # of a stack tensors (E,)
    given: Tensor | None,  # like P, where the user gave P_0; zero for an expert that is to start from its gradient
    observe: bool,
) -> tuple[Tensor, Tensor] | None:
    """`step_matrix` for a projected weight, or for each expert's in a stack.

    Experts that have not started are asked in one transfer whether they can: nothing is read back once all have.

    Returns:
        What `observation` sees, of a stack for every expert that has started.
    """
    if not isinstance(plan, StackedPlan):
        return step_matrix(p, G, state, group, plan, rules, check, given, observe)
    state["idle_steps"].add_(check.found_inf - check.broken)
    ready = [True] * plan.matrices
    if not plan.complete:
        ready = [expert.started or fit for expert, fit in zip(plan.experts, usable(check).tolist(), strict=True)]
    entries = {name: value.unbind() for name, value in state.items()}
    checks = [GradientCheck(*row) for row in zip(*(field.unbind() for field in check), strict=True)]
    seen = []
    for e, (W, G_e, expert) in enumerate(zip(p.unbind(), G.unbind(), plan.experts, strict=True)):
        if not ready[e]:
            continue
        own = {name: values[e] for name, values in entries.items()}
        P = given[e] if given is not None else None
        pair = step_matrix(W, G_e, own, group, expert, rules, checks[e], P, observe)
        if pair is not None:
            seen.append(pair)
    plan.started = any(expert.started for expert in plan.experts)
    return (torch.stack([loss for loss, _ in seen]), torch.stack([error for _, error in seen])) if seen else None
