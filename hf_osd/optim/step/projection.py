"""P between steps: how it starts, is made anew, and is read from the state.

Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...subspace import OPERATORS, Start, choose_init
from ...update_rules import GradientCheck
from .gradients import EPS
from .moments import Role, carry_moments, cast
from .plan import ProjectedPlan, Rules


FACTORS_APART = 7_368_787  # between the seeds of a weight's two factors: far from other weights'


def projection_of(state: Mapping[str, Tensor], plan: ProjectedPlan, rules: Rules) -> Tensor:
    """P in the precision of the computation: the tensor in the state itself where that has it."""
    rule = rules.subspace
    if rule.code is None:
        return cast(state["projection"], plan.compute_dtype)
    if plan.expanded is not None:
        return plan.expanded
    codes = state[rule.code].unbind() if plan.two_sided else (state[rule.code],)
    parts = [
        rule.expand(code, rows, plan.rank, plan.compute_dtype)
        for code, rows in zip(codes, plan.factor_rows, strict=True)
    ]
    P = torch.cat(parts) if plan.two_sided else parts[0]
    if rule.keeps_expanded:
        plan.expanded = P
    return P


def usable(check: GradientCheck) -> Tensor:
    """bool: whether P can be made from the gradient, which is neither zero nor broken."""
    return ~check.skip & (check.inv_norm2 < 1 / EPS)


def start_projection(
    G: Tensor,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
    given: Tensor | None,
) -> bool:
    """Set P_0, unless the gradient is zero or not finite. Reads the device: this happens once.

    Args:
        given (`torch.Tensor`, *optional*):
            P_0 where the user gave one. Zero is what a saved state has for an expert that had no tokens yet: then P
            starts from the gradient.

    Returns:
        `bool`: Whether P_0 was made from this gradient, which then has nothing to teach it.
    """
    if not usable(check):
        return False
    ask_idle(state, plan, check)
    plan.count = int(state["skipped_steps"]) + plan.idle
    init = group["init"]
    if init == "given":
        if given is None:
            raise ValueError(
                f"The tensor given as `init` for {plan.name} is gone: this state was loaded before it was used. Give "
                "`init` again."
            )
        if given.any():
            state["projection"].copy_(given)
        else:
            init = "auto"
    if init != "given":
        init = _make_projection(G, state, plan, rules, init, first=True)
    plan.started = True
    return init not in ("given", "orthonormal")


def refresh_projection(
    G: Tensor, state: dict, group: Mapping[str, Any], plan: ProjectedPlan, rules: Rules, check: GradientCheck
) -> None:
    """Compute P anew from this gradient, if it is neither zero nor broken. Reads the device, as an SVD does anyway."""
    if not usable(check):
        return
    old = projection_of(state, plan, rules).clone() if group["carry_moments"] else None
    init = group["init"] if group["init"] in ("svd", "randomized_svd") else "auto"
    _make_projection(G, state, plan, rules, init, first=False)
    if old is not None:
        carry(state, plan, rules, projection_of(state, plan, rules), old, check.skip)


def moves(state: dict, plan: ProjectedPlan, rules: Rules, check: GradientCheck, first: bool | None) -> bool:
    """Whether P moves after the coming step. Reads the device for an expert, where its own count decides.

    Args:
        first (`bool`, *optional*): As `project_gradient` takes it.
    """
    rule, count = rules.subspace, plan.count - plan.idle  # no less than the expert's own
    if "idle_steps" in state and first is not False:
        if plan.doubtful or (rule.moves_at(count) and not rule.moves_at(count - 1)):
            ask_idle(state, plan, check)
    return rule.moves_at(plan.count - plan.idle)


def renewal_due(state: dict, plan: ProjectedPlan, rules: Rules, check: GradientCheck) -> bool:
    """Whether P is to be made anew from the coming gradient. Reads the device for an expert, like `moves`."""
    due = rules.subspace.refresh_due
    if plan.doubtful or due(plan.count - plan.idle):
        ask_idle(state, plan, check)
    return due(plan.count - plan.idle)


def ask_idle(state: Mapping[str, Tensor], plan: ProjectedPlan, check: GradientCheck) -> None:
    """Bring `plan.idle` up to date, for an expert with the coming step: without tokens, as far as is known now."""
    if "idle_steps" in state:
        past, coming = torch.stack([state["idle_steps"], check.found_inf - check.broken]).tolist()
        plan.idle, plan.doubtful = int(past + coming), coming > 0


def _make_projection(G: Tensor, state: dict, plan: ProjectedPlan, rules: Rules, init: str, first: bool) -> str:
    rule, sharding = rules.subspace, plan.sharding
    init = choose_init(*plan.size, plan.rank, init) if rule.uses_init else init
    if sharding is not None and init != "orthonormal" and rule.reads_gradient:
        G = sharding.full(G, plan.shape)
    stored = state[rule.code or "projection"]
    olds = None if first or rule.code is None else (stored.unbind() if plan.two_sided else (stored,))
    sides = tuple(OPERATORS) if plan.two_sided else (plan.side,)
    # Orthonormal factors of a square weight must not be the same; singular vectors must be drawn in pairs.
    apart = FACTORS_APART if init == "orthonormal" else 0
    made = [
        rule.make(
            G,
            Start(side, plan.rank, init, plan.seed + i * apart, plan.count - plan.idle, plan.compute_dtype),
            None if olds is None else olds[i],
        )
        for i, side in enumerate(sides)
    ]
    if plan.two_sided:
        new = torch.cat(made) if rule.code is None else torch.stack(made)
    else:
        new = made[0]
    stored.copy_(new if sharding is None else sharding.agree(new))
    plan.expanded = None
    return init


def carry(state: dict, plan: ProjectedPlan, rules: Rules, P: Tensor, old: Tensor, skip: Tensor) -> None:
    """Move the weight's moments from the coordinates of the old P into those of P."""

    def turn(X: Tensor, square: bool = False) -> Tensor:
        return plan.op.carry(X, P, old, square)

    carry_moments(weight_role(plan, rules), state, plan.compute_dtype, turn, skip)


def weight_role(plan: ProjectedPlan, rules: Rules) -> Role:
    """Whose moments live in the subspace."""
    return Role(rules.weight, rules.weight_storage, plan.update_shape, sharding=plan.sharding)
