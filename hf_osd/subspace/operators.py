"""Linear operators between a gradient and its low-rank image (paper, sections 3 and 4.3).

Letters, here and in every module of `subspace`:

    W (m, n)  weight as torch stores it          P  projection: (m, r) on the left side, (n, r) on the right
    G (m, n)  its gradient, never modified       R  low-rank gradient, R = down(G, P)
    r         rank                               D  low-rank direction, shaped like R

`up` is the adjoint of `down`: <down(G, P), D> = <G, up(D, P)>.
"""

from typing import Protocol

import torch
from torch import Tensor

from .pca import pca_gradient, pca_loss


class LinearOperator(Protocol):
    """What a side must offer. `Left` and `Right` have no state; `TwoSided` knows where in P its second factor starts.

    Attributes:
        long_dim (`int`, *optional*): The dimension of R that is not projected; `None` where both are.
    """

    @property
    def long_dim(self) -> int | None:
        """As above."""

    def projected_size(self, m: int, n: int) -> int:
        """Number of rows of P: the dimension of W that is projected."""

    def low_rank_shape(self, m: int, n: int, r: int) -> tuple[int, int]:
        """Shape of R and D."""

    def split(self, P: Tensor) -> tuple[Tensor, ...]:
        """The factors that P holds, each with orthonormal columns where P is well: views."""

    def down(self, G: Tensor, P: Tensor) -> Tensor:
        """R, the low-rank image of a gradient G (m, n)."""

    def up(self, D: Tensor, P: Tensor) -> Tensor:
        """The adjoint of `down`: D lifted to (m, n). Allocates it; a step uses `add_up_`."""

    def add_up_(self, W: Tensor, D: Tensor, P: Tensor, alpha: float) -> None:
        """W <- W + alpha * up(D, P), accumulated by the product itself: nothing of size (m, n) is allocated."""

    def factors(self, D: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """D and P such that `up` of them is those rows of up(D, P); views where that is possible."""

    def gram(self, R: Tensor) -> Tensor:
        """What `pca_loss` needs of R, (r, r): Pᵀ G Gᵀ P (left) or Pᵀ Gᵀ G P (right). A sum over the long dimension."""

    def correlate(self, G: Tensor, Z: Tensor, P: Tensor | None = None, k: int = 1) -> Tensor:
        """K G Zᵀ (left) or k Gᵀ Z (right), shaped like P. With Z = R it is all that a rule learns of G."""

    def correlate_up(self, D: Tensor, Z: Tensor, P: Tensor) -> Tensor:
        """correlate(up(D, P), Z, P) without up."""

    def carry(self, X: Tensor, P: Tensor, old: Tensor, square: bool = False) -> Tensor:
        """A moment in the coordinates of P, by `overlap`; with `square` through the squared overlaps."""

    def pca_loss(self, P: Tensor, K: Tensor, inv_norm2: Tensor) -> Tensor:
        """|| up(down(Ĝ)) - Ĝ ||², 0-dim, from K = gram(R): the share of the gradient's energy outside the subspace."""

    def pca_gradient(self, P: Tensor, A: Tensor, inv_norm2: Tensor, lambda_: float) -> Tensor:
        """Gradient of Eq. 6 at P, from A = correlate(G, R, P)."""


class Left:
    """R = Pᵀ G (r, n) with P (m, r)."""

    long_dim = 1

    @staticmethod
    def projected_size(m: int, n: int) -> int:  # noqa: D102 - see LinearOperator
        return m

    @staticmethod
    def low_rank_shape(m: int, n: int, r: int) -> tuple[int, int]:  # noqa: D102
        return (r, n)

    @staticmethod
    def split(P: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (P,)

    @staticmethod
    def down(G: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return P.t() @ G

    @staticmethod
    def up(D: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return P @ D

    @staticmethod
    def add_up_(W: Tensor, D: Tensor, P: Tensor, alpha: float) -> None:  # noqa: D102
        W.addmm_(P, D, alpha=alpha)

    @staticmethod
    def factors(D: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:  # noqa: D102
        return D, P[rows]

    @staticmethod
    def gram(R: Tensor) -> Tensor:  # noqa: D102
        return R @ R.t()

    @staticmethod
    def correlate(G: Tensor, Z: Tensor, P: Tensor | None = None, k: int = 1) -> Tensor:  # noqa: D102
        return torch.addmm(G.new_empty(()), G, Z.t(), beta=0, alpha=k)  # beta 0: what is there is ignored

    @staticmethod
    def correlate_up(D: Tensor, Z: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return P @ (D @ Z.t())

    @staticmethod
    def carry(X: Tensor, P: Tensor, old: Tensor, square: bool = False) -> Tensor:  # noqa: D102
        Q = overlap(P, old)
        return (Q.square_() if square else Q) @ X

    pca_loss = staticmethod(pca_loss)
    pca_gradient = staticmethod(pca_gradient)


class Right:
    """R = G P (m, r) with P (n, r)."""

    long_dim = 0

    @staticmethod
    def projected_size(m: int, n: int) -> int:  # noqa: D102
        return n

    @staticmethod
    def low_rank_shape(m: int, n: int, r: int) -> tuple[int, int]:  # noqa: D102
        return (m, r)

    @staticmethod
    def split(P: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (P,)

    @staticmethod
    def down(G: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return G @ P

    @staticmethod
    def up(D: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return D @ P.t()

    @staticmethod
    def add_up_(W: Tensor, D: Tensor, P: Tensor, alpha: float) -> None:  # noqa: D102
        W.addmm_(D, P.t(), alpha=alpha)

    @staticmethod
    def factors(D: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:  # noqa: D102
        return D[rows], P

    @staticmethod
    def gram(R: Tensor) -> Tensor:  # noqa: D102
        return R.t() @ R

    @staticmethod
    def correlate(G: Tensor, Z: Tensor, P: Tensor | None = None, k: int = 1) -> Tensor:  # noqa: D102
        return torch.addmm(G.new_empty(()), G.t(), Z, beta=0, alpha=k)

    @staticmethod
    def correlate_up(D: Tensor, Z: Tensor, P: Tensor) -> Tensor:  # noqa: D102
        return P @ (D.t() @ Z)

    @staticmethod
    def carry(X: Tensor, P: Tensor, old: Tensor, square: bool = False) -> Tensor:  # noqa: D102
        Q = overlap(P, old)
        return X @ (Q.square_() if square else Q).t()

    pca_loss = staticmethod(pca_loss)
    pca_gradient = staticmethod(pca_gradient)


def overlap(P: Tensor, old: Tensor) -> Tensor:
    """Pᵀ old (oldᵀ old)⁻¹, (r, r): what turns R of the old P into R of P, for a gradient in the old P's span.

    Pᵀ old where old has orthonormal columns; the identity where P has not moved.
    """
    L = torch.linalg.cholesky_ex(old.t() @ old).L
    return torch.cholesky_solve(old.t() @ P, L).t()


def choose_side(m: int, n: int, side: str = "auto", divided: int | None = None) -> str:
    """The side that a weight (m, n) is projected on: the only place that decides it.

    Args:
        m (`int`): Rows of the weight.
        n (`int`): Columns of the weight.
        side (`str`, *optional*, defaults to `"auto"`):
            `"left"`, `"right"` and `"two_sided"` are taken as they are; `"auto"` projects the shorter dimension, which
            makes P and its moments smallest, and the right one of a square weight, as GaLore and the paper do.
        divided (`int`, *optional*):
            The dimension that is divided among processes. `"auto"` projects the other one, so that `down` and `up`
            need no communication, although P, which every process holds, can be the larger of the two then.

    Returns:
        `str`: `"left"`, `"right"` or `"two_sided"`.
    """
    if side != "auto":
        return side
    if divided is not None:
        return "left" if divided == 1 else "right"
    return "left" if m < n else "right"


def effective_rank(rank: int, m: int, n: int) -> int:
    """The rank a weight (m, n) is projected to: the one asked for, clipped to min(m, n)."""
    return min(rank, m, n)
