"""Linear operators between a gradient and its low-rank image (paper, sections 3 and 4.3).

Letters, here and in every module of `subspace`:

    W (m, n)  weight as torch stores it          P  projection: (m, r) on the left side, (n, r) on the right
    G (m, n)  its gradient, never modified       R  low-rank gradient, R = down(G, P)
    r         rank                               D  low-rank direction, shaped like R

`up` is the adjoint of `down`: <down(G, P), D> = <G, up(D, P)>.
"""

from typing import Protocol

from torch import Tensor


class LinearOperator(Protocol):
    """What a side must offer. All methods are static: an operator has no state."""

    @staticmethod
    def projected_size(m: int, n: int) -> int:
        """Number of rows of P: the dimension of W that is projected."""

    @staticmethod
    def low_rank_shape(m: int, n: int, r: int) -> tuple[int, int]:
        """Shape of R and D."""

    @staticmethod
    def down(G: Tensor, P: Tensor) -> Tensor:
        """R, the low-rank image of a gradient G (m, n)."""

    @staticmethod
    def up(D: Tensor, P: Tensor) -> Tensor:
        """The adjoint of `down`: D lifted to (m, n). Allocates it; a step uses `add_up_`."""

    @staticmethod
    def add_up_(W: Tensor, D: Tensor, P: Tensor, alpha: float) -> None:
        """W <- W + alpha * up(D, P), accumulated by the product itself: nothing of size (m, n) is allocated."""

    @staticmethod
    def factors(D: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Views of D and P such that `up` of them is those rows of up(D, P)."""

    @staticmethod
    def gram(R: Tensor) -> Tensor:
        """Pᵀ G Gᵀ P (left) or Pᵀ Gᵀ G P (right) from R alone, (r, r)."""

    @staticmethod
    def correlate(G: Tensor, R: Tensor) -> Tensor:
        """G Gᵀ P (left) or Gᵀ G P (right) from G and R, shaped like P."""


class Left:
    """R = Pᵀ G (r, n) with P (m, r)."""

    @staticmethod
    def projected_size(m: int, n: int) -> int:  # noqa: D102 - see LinearOperator
        return m

    @staticmethod
    def low_rank_shape(m: int, n: int, r: int) -> tuple[int, int]:  # noqa: D102
        return (r, n)

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
    def correlate(G: Tensor, R: Tensor) -> Tensor:  # noqa: D102
        return G @ R.t()


class Right:
    """R = G P (m, r) with P (n, r)."""

    @staticmethod
    def projected_size(m: int, n: int) -> int:  # noqa: D102
        return n

    @staticmethod
    def low_rank_shape(m: int, n: int, r: int) -> tuple[int, int]:  # noqa: D102
        return (m, r)

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
    def correlate(G: Tensor, R: Tensor) -> Tensor:  # noqa: D102
        return G.t() @ R


OPERATORS: dict[str, type[LinearOperator]] = {"left": Left, "right": Right}


def choose_side(m: int, n: int, side: str = "auto", divided: int | None = None) -> str:
    """The side that a weight (m, n) is projected on: the only place that decides it.

    Args:
        m (`int`): Rows of the weight.
        n (`int`): Columns of the weight.
        side (`str`, *optional*, defaults to `"auto"`):
            `"left"` and `"right"` are taken as they are; `"auto"` projects the shorter dimension, which makes P and
            its moments smallest and is what GaLore and the paper do.
        divided (`int`, *optional*):
            The dimension that is divided among processes. `"auto"` projects the other one, so that `down` and `up`
            need no communication, although P, which every process holds, can be the larger of the two then.

    Returns:
        `str`: `"left"` or `"right"`.
    """
    if side != "auto":
        return side
    if divided is not None:
        return "left" if divided == 1 else "right"
    return "left" if m <= n else "right"


def effective_rank(rank: int, m: int, n: int) -> int:
    """The rank a weight (m, n) is projected to: the one asked for, clipped to min(m, n)."""
    return min(rank, m, n)
