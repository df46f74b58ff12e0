"""Online PCA, the paper's rule for P (section 3.2, Eq. 6 and Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..declare import number, option
from .protocol import Moved, Movement


@dataclass(frozen=True)
class OnlinePCA(Moved):
    """P takes one step of its own optimizer on Eq. 6, at every training step or every k-th.

    A step costs one product of the gradient, or of a part of it (`projection_sample`), with an r-wide matrix, A, and
    r-wide ones beside it. The state is P, s x r, and the moments of its optimizer.
    """

    learns: ClassVar[bool] = True
    stackable: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    lambda_: float = option(
        0.1, "Weight of the orthogonality term of the PCA loss, Eq. 6 (the paper's default).", check=number(0)
    )

    def advance_(self, P: Tensor, move: Movement) -> None:
        """One step of P's optimizer on the gradient of Eq. 6."""
        move.descend(move.op.pca_gradient(P, move.A, move.inv_norm2, self.lambda_))
