"""One step for one parameter: Algorithm 1 of the paper, or its weight rule alone at full size.

Letters and shapes as in `subspace.operators`.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...subspace.precision import reduced_precision
from ...update_rules import GradientCheck, UpdateRule
from .moments import Role, cast, direction, load_moments, update_
from .movement import Movements, Moving
from .plan import Plan, ProjectedPlan, Rules
from .projection import moves, projection_of, refresh_projection, renewal_due, start_projection, weight_role
from .residual import Residual, pieces, residual_update
from .rounding import PIECE, add_rounded_, rounding_noise


def step_full(
    p: Tensor,
    grad: Tensor,
    state: dict,
    group: Mapping[str, Any],
    plan: Plan,
    rules: Rules,
    check: GradientCheck,
) -> None:
    """W <- (1 - lr weight_decay) W - lr rule(G), in pieces where the rule works element by element."""
    role = Role(rules.weight, rules.weight_storage, plan.update_shape, sharding=plan.sharding)
    _count(state, "step", check)
    plan.count += 1
    lr, noise = group["lr"], rounding_noise(p, group, plan)
    for piece in _pieces(p, grad, role.rule):
        W, G = (p, grad) if piece is None else (p.view(-1)[piece], grad.view(-1)[piece])
        G = cast(G, plan.compute_dtype)
        if noise is None:
            update_(role, state, W, G, check, lr, group["weight_decay"], piece)
        else:
            D = torch.atleast_1d(direction(role, state, G, check, piece))
            add_rounded_(W, partial(_add_rows, D, -lr), _decay(group, check), noise)


class LowRankGradient(NamedTuple):
    """All that a step needs of a gradient, so that G itself can go: it adds up over micro-batches and processes."""

    R: Tensor  # down(G, P)
    A: Tensor | None  # correlate(G, Z, P), shaped like P; None where P does not move
    G: Tensor | None = None  # the gradient itself, where its residual is used: then nothing is added up


def project_gradient(
    G: Tensor,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
    given: Tensor | None,
    first: bool | None = None,
) -> LowRankGradient | None:
    """Start P, or renew it where that is due, and take the products of a step that read G, (m, n).

    Args:
        given (`torch.Tensor`, *optional*): P_0 where the user gave one.
        first (`bool`, *optional*):
            Of one of several gradients of this step, whether none of them has been projected yet, so that P may still
            be replaced.

    Returns:
        `LowRankGradient`: Without A where P was just made from this gradient and is stationary there, or does not move
        at this step; `None` before the first gradient of any use, as long as there is no P, and of one of several
        where an expert is found without tokens: the next one may be its first.
    """
    fresh = False
    if not plan.started:
        fresh = start_projection(G, state, group, plan, rules, check, given)
        if not plan.started:
            return None
    elif first is not False and renewal_due(state, plan, rules, check):
        refresh_projection(G, state, group, plan, rules, check)
    moving = not fresh and moves(state, plan, rules, check, first)
    if first and plan.doubtful:
        return None
    P = cast(projection_of(state, plan, rules), G.dtype)
    R = plan.op.down(G, P)
    A = _correlate(G, R, P, state, plan, rules) if moving else None
    return LowRankGradient(cast(R, plan.compute_dtype), A, G if rules.residual != "none" else None)


def _correlate(G: Tensor, R: Tensor, P: Tensor, state: dict, plan: ProjectedPlan, rules: Rules) -> Tensor:
    """A = correlate(rho M + (1 - rho) G, Z), with M = up(m) and Z = rho m + (1 - rho) R; rho is 0 for most rules."""
    rho, op = rules.subspace.mixes, plan.op
    with reduced_precision(G):
        if rho:
            m = cast(load_moments(weight_role(plan, rules), state, plan.compute_dtype)["exp_avg"], R.dtype)
            Z = torch.lerp(R, m, rho)
            A = op.correlate(G, Z, P).mul_(1 - rho).add_(op.correlate_up(m, Z, P), alpha=rho)
        else:
            A = op.correlate(G, R, P)
    A = cast(A, plan.compute_dtype)
    return A if plan.sharding is None else plan.sharding.sum(A)


def step_projected(
    p: Tensor,
    low: LowRankGradient,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
    movements: Movements,
) -> None:
    """One step of Algorithm 1 from a projected gradient. P is used here, and then left to `movements`."""
    plan.end_step()
    P = projection_of(state, plan, rules)
    _count(state, "step", check)
    # D = weight_rule(R)
    D = direction(weight_role(plan, rules), state, low.R, check)
    residual = None if low.G is None else residual_update(low.G, low.R, D, P, state, group, plan, check)
    # W <- (1 - lr weight_decay) W - lr scale (up(D, P) + residual)
    _update_projected(p, D, P, residual, group, plan, check)
    if low.A is not None:
        movements.add(Moving(P, low.A, state, plan, check), group, rules)


def _add_rows(D: Tensor, alpha: float, X: Tensor, rows: slice) -> None:
    X.add_(D[rows], alpha=alpha)


def _update_projected(
    p: Tensor,
    D: Tensor,
    P: Tensor,
    residual: Residual | None,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    check: GradientCheck,
) -> None:
    """W <- (1 - lr weight_decay) W - lr scale (up(D, P) + residual)."""
    op, alpha = plan.op, -group["lr"] * group["scale"]
    decay, noise = _decay(group, check), rounding_noise(p, group, plan)
    if residual is not None:
        D = residual.D
    if noise is not None:

        def add_(X: Tensor, rows: slice) -> None:
            op.add_up_(X, *op.factors(D, P, rows), alpha=alpha)
            if residual is not None:
                residual.add_(X, rows, alpha)

        add_rounded_(p, add_, decay, noise)
        return
    if decay is not None:
        p.mul_(decay)
    op.add_up_(p, cast(D, p.dtype), cast(P, p.dtype), alpha=alpha)
    if residual is not None:
        for rows in pieces(p):
            residual.add_(p[rows], rows, alpha)


def _decay(group: Mapping[str, Any], check: GradientCheck) -> Tensor | None:
    """Factor on W, 1 where the step is skipped; `None` without weight decay."""
    return 1 - group["lr"] * group["weight_decay"] * check.keep if group["weight_decay"] else None


def observation(
    state: dict, R: Tensor, plan: ProjectedPlan, rules: Rules, check: GradientCheck
) -> tuple[Tensor, Tensor]:
    """Share of the gradient's energy outside the subspace, and ||PᵀP - I|| / sqrt(r), as 0-dim tensors."""
    P, factors = projection_of(state, plan, rules), plan.op.split
    errors = []
    for factor in factors(P):
        C = factor.mT @ factor
        C.diagonal().sub_(1)
        errors.append(torch.linalg.matrix_norm(C) / math.sqrt(plan.rank))
    K = plan.op.gram(R)
    if plan.sharding is not None:
        K = plan.sharding.sum(K)
    error = errors[0] if len(errors) == 1 else torch.stack(errors).mean()
    return plan.op.pca_loss(P, K, check.inv_norm2), error


def _count(state: dict, name: str, check: GradientCheck) -> None:
    state[name].add_(check.keep)


def _pieces(p: Tensor, grad: Tensor, rule: UpdateRule) -> Iterator[slice | None]:
    whole = p.numel() <= PIECE or not rule.elementwise
    if whole or not (p.is_contiguous() and grad.is_contiguous()):
        yield None
        return
    for start in range(0, p.numel(), PIECE):
        yield slice(start, min(start + PIECE, p.numel()))
