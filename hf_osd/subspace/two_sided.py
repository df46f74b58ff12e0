"""The two-sided operator of the paper's section 4.3: R = Pᵀ G Q, whose state is r x r.

P (m, r) and Q (n, r) lie below each other in one tensor (m + n, r), so that everything that is done to a projection
is done to both. Both minimise the two-sided form of Eq. 6,

    loss(P, Q) = || P Pᵀ Ĝ Q Qᵀ - Ĝ ||² + lambda (|| PᵀP - I ||² + || QᵀQ - I ||²),      Ĝ = G / ||G||

With R = Pᵀ G Q, B = G Q, E = Gᵀ P, C = PᵀP, F = QᵀQ and s = 1 / max(||G||², eps),

    loss   = 1 - 2 s ||R||² + s <C R F, R> + lambda (...)
    grad_P = s (-4 B Rᵀ + 2 B F Rᵀ C + 2 P R F Rᵀ) + 4 lambda P (C - I)
    grad_Q = s (-4 E R  + 2 E C R F  + 2 Q Rᵀ C R) + 4 lambda Q (F - I)

Letters and shapes as in `operators`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .operators import Left, LinearOperator, Right


@dataclass(frozen=True)
class TwoSided:
    """R = Pᵀ G Q (r, r) with P (m, r) above Q (n, r). One product with G more than the one-sided operators."""

    long_dim: ClassVar[int | None] = None

    m: int

    def projected_size(self, m: int, n: int) -> int:  # noqa: D102 - see LinearOperator
        return m + n

    def low_rank_shape(self, m: int, n: int, r: int) -> tuple[int, int]:  # noqa: D102
        return (r, r)

    def split(self, P: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return P[: self.m], P[self.m :]

    def down(self, G: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        P, Q = self.split(P)
        return P.t() @ (G @ Q)

    def up(self, D: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        P, Q = self.split(P)
        return (P @ D) @ Q.t()

    def add_up_(self, W: Tensor, D: Tensor, P: Tensor, alpha: float) -> None:  # noqa: D102
        rows = W.shape[0]  # of W, which may be some of its rows: see `factors`
        W.addmm_(P[:rows] @ D, P[rows:].t(), alpha=alpha)

    def factors(self, D: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:  # noqa: D102
        P, Q = self.split(P)
        return D, torch.cat([P[rows], Q])

    def gram(self, R: Tensor) -> Tensor:
        """R itself."""
        return R

    def correlate(self, G: Tensor, Z: Tensor, P: Tensor | None = None, k: int = 1) -> Tensor:
        """B above E, (m + n, r); they do not depend on Z, and are linear in G."""
        assert P is not None
        P, Q = self.split(P)
        return torch.cat([G @ Q, G.t() @ P])

    def correlate_up(self, D: Tensor, Z: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        P, Q = self.split(P)
        return torch.cat([P @ D @ (Q.t() @ Q), Q @ D.t() @ (P.t() @ P)])

    def carry(self, X: Tensor, P: Tensor, old: Tensor, square: bool = False) -> Tensor:  # noqa: D102
        (P, Q), (old_P, old_Q) = self.split(P), self.split(old)
        return Right.carry(Left.carry(X, P, old_P, square), Q, old_Q, square)

    def pca_loss(self, P: Tensor, K: Tensor, inv_norm2: Tensor) -> Tensor:  # noqa: D102
        R, (P, Q) = K, self.split(P)
        # loss = 1 - 2 s ||R||² + s <C R F, R>
        CRF = (P.t() @ P) @ R @ (Q.t() @ Q)
        return 1 - inv_norm2 * ((2 * R - CRF) * R).sum()

    def pca_gradient(self, P: Tensor, A: Tensor, inv_norm2: Tensor, lambda_: float) -> Tensor:
        """As in the module's equations; R is Pᵀ B."""
        (P, Q), (B, E) = self.split(P), self.split(A)
        R = P.t() @ B
        return torch.cat(
            [_factor_gradient(P, Q, B, R, inv_norm2, lambda_), _factor_gradient(Q, P, E, R.t(), inv_norm2, lambda_)]
        )


def _factor_gradient(P: Tensor, Q: Tensor, B: Tensor, R: Tensor, inv_norm2: Tensor, lambda_: float) -> Tensor:
    C, F = P.t() @ P, Q.t() @ Q
    FRt = F @ R.t()
    # grad_P = B s (2 F Rᵀ C - 4 Rᵀ) + P (2 s R F Rᵀ + 4 lambda (C - I))
    on_B = (FRt @ C).mul_(2).sub_(R.t(), alpha=4).mul_(inv_norm2)
    on_P = (R @ FRt).mul_(2 * inv_norm2).add_(C, alpha=4 * lambda_)
    on_P.diagonal().sub_(4 * lambda_)
    return torch.addmm(P @ on_P, B, on_B)


def operator_of(side: str, m: int) -> LinearOperator:
    """The operator of a side, for a weight of m rows."""
    return TwoSided(m) if side == "two_sided" else OPERATORS[side]


OPERATORS: dict[str, LinearOperator] = {"left": Left(), "right": Right()}
SIDES = (*OPERATORS, "two_sided")
