"""One step for one parameter: Algorithm 1 of the paper, or its weight rule alone at full size.

Letters and shapes as in `subspace.operators`.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..subspace import choose_init, initial_projection, pca_loss
from ..update_rules import GradientCheck, Moment, MomentStorage, UpdateRule
from . import options
from .gradients import EPS
from .plan import Plan, ProjectedPlan, Rules
from .rounding import PIECE, add_rounded_, rounding_noise
from .sharding import Sharding, divided


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
    rule, lr = rules.weight, group["lr"]
    _count(state, "step", check)
    plan.count += 1
    decay, noise = _decay(group, check), rounding_noise(p, group, plan)
    for piece in _pieces(p, grad, rule):
        W, G = (p, grad) if piece is None else (p.view(-1)[piece], grad.view(-1)[piece])
        G = _cast(G, plan.compute_dtype)
        D = _direction(
            rule, rules.weight_storage, state, "", G, plan.update_shape, "step", check, piece, plan.sharding
        )
        _update_full(W, D, -lr, decay, noise)


def start_projection(
    G: Tensor, state: dict, group: Mapping[str, Any], plan: ProjectedPlan, check: GradientCheck, given: Tensor | None
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
        init = _make_projection(G, state, plan, init)
    plan.started, plan.idle = True, _idle_steps(state, check)
    plan.count = int(state["skipped_steps"]) + plan.idle
    return init not in ("given", "orthonormal")


def refresh_projection(
    G: Tensor, state: dict, group: Mapping[str, Any], plan: ProjectedPlan, check: GradientCheck
) -> None:
    """Compute P anew from this gradient, if it is neither zero nor broken. Reads the device, as an SVD does anyway."""
    if usable(check):
        _make_projection(G, state, plan, group["init"] if group["init"] in ("svd", "randomized_svd") else "auto")


def _make_projection(G: Tensor, state: dict, plan: ProjectedPlan, init: str) -> str:
    init, sharding = choose_init(*plan.size, plan.rank, init), plan.sharding
    if sharding is not None and init != "orthonormal":
        G = sharding.full(G, plan.shape)
    P = initial_projection(G, plan.side, plan.rank, init, plan.seed, plan.compute_dtype)
    if sharding is not None:
        P = sharding.agree(P)
    state["projection"].copy_(P)
    return init


def usable(check: GradientCheck) -> Tensor:
    """bool: whether P can be made from the gradient, which is neither zero nor broken."""
    return ~check.skip & (check.inv_norm2 < 1 / EPS)


def _idle_steps(state: Mapping[str, Tensor], check: GradientCheck) -> int:
    """Of an expert, with the coming step; others have none."""
    return int(state["idle_steps"] + check.found_inf - check.broken) if "idle_steps" in state else 0


class LowRankGradient(NamedTuple):
    """All that a step needs of a gradient, so that G itself can go: it adds up over micro-batches and processes."""

    R: Tensor  # down(G, P)
    A: Tensor | None  # correlate(G, R), shaped like P; None where P does not move


def project_gradient(
    G: Tensor,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
    given: Tensor | None,
    first: bool = True,
) -> LowRankGradient | None:
    """Start P, or renew it where that is due, and take the products of a step that read G, (m, n).

    Args:
        given (`torch.Tensor`, *optional*): P_0 where the user gave one.
        first (`bool`, *optional*, defaults to `True`):
            Whether no gradient of this step has been projected yet, so that P may still be replaced.

    Returns:
        `LowRankGradient`: Without A where P was just made from this gradient and is stationary there; `None` before
        the first gradient of any use, as long as there is no P.
    """
    fresh = False
    if not plan.started:
        fresh = start_projection(G, state, group, plan, check, given)
        if not plan.started:
            return None
    elif first and rules.subspace.refresh_due(plan.count - plan.idle):
        plan.idle = _idle_steps(state, check)
        if rules.subspace.refresh_due(plan.count - plan.idle):
            refresh_projection(G, state, group, plan, check)
    op = plan.op
    P_G = _cast(_cast(state["projection"], plan.compute_dtype), G.dtype)
    R = op.down(G, P_G)
    A = None
    if rules.subspace.learns and not fresh:
        A = _cast(op.correlate(G, R), plan.compute_dtype)
        if plan.sharding is not None:
            A = plan.sharding.sum(A)
    return LowRankGradient(_cast(R, plan.compute_dtype), A)


def step_projected(
    p: Tensor,
    low: LowRankGradient,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    rules: Rules,
    check: GradientCheck,
) -> None:
    """One step of Algorithm 1 from a projected gradient. P is used first and moved after."""
    plan.count += 1
    lr, stored = group["lr"], state["projection"]
    P = _cast(stored, plan.compute_dtype)
    _count(state, "step", check)
    # D = weight_rule(R)
    D = _direction(
        rules.weight, rules.weight_storage, state, "", low.R, plan.update_shape, "step", check, sharding=plan.sharding
    )
    # W <- (1 - lr weight_decay) W - lr scale up(D, P)
    _update_projected(p, D, P, group, plan, check)
    if low.A is None:
        return

    def descend(gP: Tensor) -> None:
        # P <- (1 - alpha lr weight_decay_P) P - alpha lr projection_rule(gP)
        assert rules.projection is not None
        _count(state, "projection_step", check)
        D_P = _direction(
            rules.projection,
            rules.projection_storage,
            state,
            "projection_",
            gP,
            plan.projection_shape,
            "projection_step",
            check,
        )
        lr_P, decay = group["alpha"] * lr, options.projection_weight_decay(group)
        if decay:
            P.mul_(1 - lr_P * decay * check.keep)
        P.add_(D_P, alpha=-lr_P)

    rules.subspace.advance_(P, low.A, check.inv_norm2, descend)
    if P is not stored:
        stored.copy_(P)


def _update_full(W: Tensor, D: Tensor, alpha: float, decay: Tensor | None, noise: torch.Generator | None) -> None:
    """W <- decay W + alpha D."""
    if noise is not None:
        D = torch.atleast_1d(D)
        add_rounded_(W, lambda X, rows: X.add_(D[rows], alpha=alpha), decay, noise)
        return
    if decay is not None:
        W.mul_(decay)
    W.add_(D, alpha=alpha)


def _update_projected(
    p: Tensor, D: Tensor, P: Tensor, group: Mapping[str, Any], plan: ProjectedPlan, check: GradientCheck
) -> None:
    """W <- (1 - lr weight_decay) W - lr scale up(D, P)."""
    op, alpha = plan.op, -group["lr"] * group["scale"]
    decay, noise = _decay(group, check), rounding_noise(p, group, plan)
    if noise is not None:
        add_rounded_(p, lambda X, rows: op.add_up_(X, *op.factors(D, P, rows), alpha=alpha), decay, noise)
        return
    if decay is not None:
        p.mul_(decay)
    op.add_up_(p, _cast(D, p.dtype), _cast(P, p.dtype), alpha=alpha)


def _decay(group: Mapping[str, Any], check: GradientCheck) -> Tensor | None:
    """Factor on W, 1 where the step is skipped; `None` without weight decay."""
    return 1 - group["lr"] * group["weight_decay"] * check.keep if group["weight_decay"] else None


def observation(state: dict, R: Tensor, plan: ProjectedPlan, check: GradientCheck) -> tuple[Tensor, Tensor]:
    """Share of the gradient's energy outside the subspace, and ||PᵀP - I|| / sqrt(r), as 0-dim tensors."""
    P = _cast(state["projection"], plan.compute_dtype)
    C = P.mT @ P
    C.diagonal().sub_(1)
    K = plan.op.gram(R)
    if plan.sharding is not None:
        K = plan.sharding.sum(K)
    return pca_loss(P, K, check.inv_norm2), torch.linalg.matrix_norm(C) / math.sqrt(plan.rank)


def _direction(
    rule: UpdateRule,
    storage: MomentStorage,
    state: dict,
    prefix: str,
    G: Tensor,
    shape: tuple[int, ...],
    step: str,
    check: GradientCheck,
    piece: slice | None = None,
    sharding: Sharding | None = None,
) -> Tensor:
    moments = _moments(rule, shape)
    if sharding is not None and rule.elementwise and not G.numel():
        return G  # a process with no part of the parameter
    values = {moment.name: storage.load(state, moment, prefix, G.dtype, piece) for moment in moments}
    if sharding is None or rule.elementwise:
        D = rule.direction(G, values, state[step], check)
    else:  # means over the whole parameter
        whole = {m.name: sharding.wrap(values[m.name], m.shape, divided(m, sharding, len(shape))) for m in moments}
        D = sharding.unwrap(rule.direction(sharding.wrap(G, shape, sharding.dim), whole, state[step], check))
    for moment in moments:
        storage.store(state, moment, prefix, values[moment.name], piece, check.skip)
    return D


@lru_cache(maxsize=1024)
def _moments(rule: UpdateRule, shape: tuple[int, ...]) -> tuple[Moment, ...]:
    return rule.moments(shape)  # asked for at every step of every parameter


def _cast(X: Tensor, dtype: torch.dtype) -> Tensor:
    return X if X.dtype == dtype else X.to(dtype)  # `to` costs microseconds even where it does nothing


def _count(state: dict, name: str, check: GradientCheck) -> None:
    state[name].add_(check.keep)


def _pieces(p: Tensor, grad: Tensor, rule: UpdateRule) -> Iterator[slice | None]:
    whole = p.numel() <= PIECE or not rule.elementwise
    if whole or not (p.is_contiguous() and grad.is_contiguous()):
        yield None
        return
    for start in range(0, p.numel(), PIECE):
        yield slice(start, min(start + PIECE, p.numel()))
