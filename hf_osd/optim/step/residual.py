"""What of the gradient lies outside the subspace, which Algorithm 1 throws away, used without a state of its own.

`scaled` (Fira, Chen et al. 2024, arXiv 2410.01673): the residual G - P R is scaled like the weight's rule has scaled
the inside, for each column j of R (each row on the right side) or for the whole matrix,

    S = phi (G - P R)         phi_j = ||D_j|| / ||R_j||
    S <- S min(1, gamma ||S_{t-1}|| / ||S||)                        the norm-growth limiter

and added to up(D). It takes no product with G: up(D) + S = up(D - phi R) + phi G. Nor does ||S||:
||G_j - P R_j||² = ||G_j||² - 2 ||R_j||² + R_jᵀ C R_j with C = PᵀP.

`sign` (FRUGAL, Zmushko et al. 2024, arXiv 2411.07837): the residual takes a step of signSGD, sign(G - P R). That is
one product more, and worked out a few rows at a time.

Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from .gradients import EPS
from .plan import ProjectedPlan
from .rounding import PIECE


GROWTH_LIMIT = 1.01  # gamma, Fira's default


class Residual(NamedTuple):
    """What a step adds to up(D).

    Attributes:
        D (`torch.Tensor`): The direction that `up` takes, with what is subtracted in the subspace.
        add_ (`Callable`): Adds `alpha` times the rest of these rows to its first argument: `add_(X, rows, alpha)`.
    """

    D: Tensor
    add_: Callable[[Tensor, slice, float], object]


def residual_update(
    G: Tensor,  # (m, n) gradient, or this process's part of it
    R: Tensor,
    D: Tensor,
    P: Tensor,
    state: dict,
    group: Mapping[str, Any],
    plan: ProjectedPlan,
    check: GradientCheck,
) -> Residual:
    """The residual's part of a step; `state["residual_norm"]` moves on with `residual="scaled"`."""
    scaling = scaling_of(plan)
    outside = _outside(G, R, P, plan, scaling)
    if group["residual"] == "sign":
        return Residual(D, _sign_step(G, R, P, outside > 0, plan, check, group["residual_scale"]))
    phi = _scaling(D, R, plan, scaling).masked_fill(outside == 0, 0.0) * group["residual_scale"]
    norm2 = (phi.square() * outside).sum()
    if plan.sharding is not None and scaling == "column":
        norm2 = plan.sharding.sum(norm2)
    phi = (phi * _limit(norm2, state, check)).masked_fill(check.skip, 0.0)

    def add_(X: Tensor, rows: slice, alpha: float) -> None:
        part = G[rows] * _rows_of(phi, rows, plan)
        X.add_(part.masked_fill_(check.skip, 0.0), alpha=alpha)  # 0 times NaN is no 0

    return Residual(D - torch.where(check.skip, 0.0, phi * R), add_)


def scaling_of(plan: ProjectedPlan) -> str:
    """`column`, as Fira's; the two-sided R has no columns of G."""
    return "column" if plan.op.long_dim is not None else "matrix"


def pieces(G: Tensor) -> Iterator[slice]:
    """Rows of a matrix, as many at a time as keep temporaries small."""
    rows = max(1, PIECE // max(1, G.shape[1]))
    for start in range(0, G.shape[0], rows):
        yield slice(start, min(start + rows, G.shape[0]))


def _scaling(D: Tensor, R: Tensor, plan: ProjectedPlan, scaling: str) -> Tensor:
    """phi, in a shape that broadcasts with G and R; 0 where nothing lies in the subspace."""
    if scaling == "column":
        short = 1 - plan.op.long_dim  # type: ignore[operator]
        inside = torch.linalg.vector_norm(R, dim=short, keepdim=True)
        outside = torch.linalg.vector_norm(D, dim=short, keepdim=True)
    else:
        both = torch.stack([D.square().sum(), R.square().sum()])
        if plan.sharding is not None:
            both = plan.sharding.sum(both)
        outside, inside = both.sqrt().unbind()
    return torch.where(inside > 0, outside / inside, 0.0)


def _outside(G: Tensor, R: Tensor, P: Tensor, plan: ProjectedPlan, scaling: str) -> Tensor:
    """||G_j - P R_j||² of each column j in the shape of `_scaling`'s phi, or ||G - up(R)||² of the whole matrix.

    0 where that is no more than rounding, as of a gradient that P has just been made from and whose rank is no larger:
    the sign of such a rest is arbitrary, and its norm would hold down all that follow through the limiter.
    """
    rounding = max(4 * torch.finfo(G.dtype).eps, 64 * torch.finfo(R.dtype).eps)
    if scaling == "matrix":  # ||G||² loss, for the loss of PCA is ||G - up(R)||² / ||G||²
        # not the norm of `check`, which is that of the gradient before clipping
        K, energy = plan.op.gram(R), torch.linalg.vector_norm(G, dtype=R.dtype).square()
        if plan.sharding is not None:
            K, energy = plan.sharding.sum(K), plan.sharding.sum(energy)
        outside = energy * plan.op.pca_loss(P, K, 1 / energy.clamp(min=EPS))
    else:
        short = 1 - plan.op.long_dim  # type: ignore[operator]
        # ||G_j||² - 2 ||R_j||² + R_jᵀ C R_j
        C = P.t() @ P
        CR = C @ R if short == 0 else R @ C
        energy = torch.linalg.vector_norm(G, dim=short, keepdim=True, dtype=R.dtype).square_()
        outside = energy + ((CR - 2 * R) * R).sum(dim=short, keepdim=True)
    return torch.where(outside > rounding * energy, outside, 0.0)


def _limit(norm2: Tensor, state: dict, check: GradientCheck) -> Tensor:
    """min(1, gamma ||S_{t-1}|| / ||S_t||), 0-dim; the first residual is the measure of the next."""
    norm, before = norm2.sqrt(), state["residual_norm"].to(norm2.dtype)
    limit = torch.where(
        (before > 0) & (norm > 0), (GROWTH_LIMIT * before / norm).clamp(max=1.0), torch.ones_like(norm)
    )
    state["residual_norm"].copy_(torch.where(check.skip, before, norm * limit))
    return limit


def _sign_step(
    G: Tensor, R: Tensor, P: Tensor, some: Tensor, plan: ProjectedPlan, check: GradientCheck, scale: float
) -> Callable[[Tensor, slice, float], object]:
    some = some & ~check.skip

    def add_(X: Tensor, rows: slice, alpha: float) -> None:
        # sign(G - P R), 0 where nothing lies outside
        S = G[rows].to(R.dtype, copy=True)
        plan.op.add_up_(S, *plan.op.factors(R, P, rows), alpha=-1.0)
        X.add_(S.sign_().masked_fill_(~_rows_of(some, rows, plan), 0.0), alpha=alpha * scale)

    return add_


def _rows_of(X: Tensor, rows: slice, plan: ProjectedPlan) -> Tensor:
    """What belongs to these rows of what broadcasts with G."""
    return X[rows] if plan.op.long_dim == 0 and X.ndim else X
