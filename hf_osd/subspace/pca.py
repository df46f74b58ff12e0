"""The loss of online PCA (paper, Eq. 6) and its gradient in closed form.

    loss(P) = || P Pᵀ Ĝ - Ĝ ||² + lambda || PᵀP - I ||²,    Ĝ = G / ||G||

With R = Pᵀ G at hand (left side; the right side is the same for Gᵀ) and

    s = 1 / max(||G||², eps)     C = Pᵀ P     K = s R Rᵀ     A = s G Rᵀ

the gradient needs one more product with G (A); everything else is r wide:

    grad = 2 (A C + P K) - 4 A + 4 lambda (P C - P)
    loss = 1 - 2 tr K + tr(C K) + lambda || C - I ||²

Letters and shapes as in `operators`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from .precision import narrowed, reduced_precision


def pca_loss(
    P: Tensor,  # (s, r) projection
    K: Tensor,  # (r, r) gram(R), without the factor s
    inv_norm2: Tensor,  # () s = 1 / max(||G||², eps)
    lambda_: float = 0.0,
) -> Tensor:
    """Eq. 6 at P, a 0-dim tensor. With `lambda_=0` it is the share of the gradient's energy outside the subspace."""
    C = P.t() @ P
    K = K * inv_norm2
    # loss = 1 - 2 tr K + tr(C K) + lambda || C - I ||²
    loss = 1 - 2 * K.trace() + (C * K).sum()
    if lambda_:
        C.diagonal().sub_(1)
        loss = loss + lambda_ * C.square().sum()
    return loss


def pca_gradient(
    P: Tensor,  # (s, r) projection, or a stack (k, s, r) of them
    A: Tensor,  # like P: correlate(G, R), without the factor s, in the precision of P
    inv_norm2: Tensor,  # () s = 1 / max(||G||², eps); (k, 1, 1) of a stack
    lambda_: float,
) -> Tensor:
    """Gradient of Eq. 6 at P, like P, without autograd and without anything of size (m, n), (m, m) or (n, n)."""
    dtype, (P, A) = P.dtype, narrowed(P, A)
    I = _identity(P.shape[-1], P.dtype, P.device)  # noqa: E741 - its name in the paper
    many = P.ndim == 3
    with reduced_precision(A):
        E = (torch.baddbmm if many else torch.addmm)(I, P.mT, P, beta=-1)  # C - I
        K = P.mT @ A  # = R Rᵀ without s, and cheaper: A is (s, r), R is as long as the other side
        # grad = 2 (A C + P K) - 4 A + 4 lambda (P C - P)
        #      = A 2 s (C - 2 I) + P (2 s K + 4 lambda (C - I))        with A and K without s
        two_s = 2 * inv_norm2
        on_A = (E - I).mul_(two_s)
        on_P = K.mul_(two_s).add_(E, alpha=4 * lambda_)
        grad = P @ on_P
        return (grad.baddbmm_(A, on_A) if many else grad.addmm_(A, on_A)).to(dtype)


@lru_cache(maxsize=64)
def _identity(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(r, dtype=dtype, device=device)
