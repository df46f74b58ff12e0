"""The halves of a projected parameter's step: of a matrix, or of a stack of experts', each a parameter of its own.

An expert that had no tokens has a zero gradient, and is left alone, as a module without gradient is: nothing of its
weights, moments and P changes. Only `idle_steps` counts, so that the host, which has counted on, agrees with the state
after a resume.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from .algorithm import LowRankGradient, observation, project_gradient, step_projected
from .movement import Movements
from .plan import ProjectedPlan, Rules, StackedPlan
from .projection import usable


def project_matrices(
    G: Tensor,  # (m, n), or (E, m, n)
    state: dict[str, Tensor],  # of a stack entries (E, ...)
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,  # of a stack tensors (E,)
    given: Tensor | None,  # like P, where the user gave P_0; zero for an expert that is to start from its gradient
    first: Sequence[bool] | None = None,  # for each matrix, as `project_gradient` takes it
) -> list[LowRankGradient | None]:
    """`project_gradient` for the matrix of a projected weight, or for each expert's in a stack.

    Experts that have not started are asked in one transfer whether they can: nothing is read back once all have.
    """
    if not isinstance(plan, StackedPlan):
        return [project_gradient(G, state, group, plan, rules, check, given, None if first is None else first[0])]
    ready = [True] * plan.matrices
    if not plan.complete:
        ready = [expert.started or fit for expert, fit in zip(plan.experts, usable(check).tolist(), strict=True)]
    own_states, checks = _by_expert(state), _checks_by_expert(check)
    lows: list[LowRankGradient | None] = [None] * plan.matrices
    for e, (G_e, expert) in enumerate(zip(G.unbind(), plan.experts, strict=True)):
        if ready[e]:
            P, own_first = None if given is None else given[e], None if first is None else first[e]
            lows[e] = project_gradient(G_e, own_states[e], group, expert, rules, checks[e], P, own_first)
    plan.started = any(expert.started for expert in plan.experts)
    return lows


def step_matrices(
    p: Tensor,  # (m, n), or (E, m, n)
    lows: Sequence[LowRankGradient | None],  # as `project_matrices` gave them
    state: dict[str, Tensor],
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
    movements: Movements,
) -> None:
    """`step_projected` for each matrix that has a P."""
    if not isinstance(plan, StackedPlan):
        (low,) = lows
        if low is not None:
            step_projected(p, low, state, group, plan, rules, check, movements)
        return
    state["idle_steps"].add_(check.found_inf - check.broken)
    parts = zip(p.unbind(), lows, _by_expert(state), plan.experts, _checks_by_expert(check), strict=True)
    for W, low, own, expert, own_check in parts:
        if low is not None:
            step_projected(W, low, own, group, expert, rules, own_check, movements)
        elif expert.started:  # without tokens in all of the step's gradients
            expert.end_step()


def observe_matrices(
    lows: Sequence[LowRankGradient | None],
    state: dict[str, Tensor],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
) -> tuple[Tensor, Tensor] | None:
    """What `observation` sees, of a stack for every expert that has started."""
    if not isinstance(plan, StackedPlan):
        return None if lows[0] is None else observation(state, lows[0].R, plan, rules, check)
    parts = zip(lows, _by_expert(state), plan.experts, _checks_by_expert(check), strict=True)
    seen = [
        observation(own, low.R, expert, rules, own_check) for low, own, expert, own_check in parts if low is not None
    ]
    return (torch.stack([loss for loss, _ in seen]), torch.stack([error for _, error in seen])) if seen else None


def _by_expert(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    entries = {name: value.unbind() for name, value in state.items()}
    return [dict(zip(entries, values, strict=True)) for values in zip(*entries.values(), strict=True)]


def _checks_by_expert(check: GradientCheck) -> list[GradientCheck]:
    return [GradientCheck(*row) for row in zip(*(field.unbind() for field in check), strict=True)]
