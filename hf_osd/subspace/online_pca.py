"""Online PCA, the paper's rule for P (section 3.2, Eq. 6 and Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .protocol import Movement, SubspaceRule


@dataclass(frozen=True)
class OnlinePCA(SubspaceRule):
    """P takes one step of its own optimizer on Eq. 6, at every training step or every k-th.

    A step costs one product of the gradient with an r-wide matrix, A, and r-wide ones beside it. The state is P,
    s x r, and the moments of its optimizer.

    Args:
        lambda_ (`float`, *optional*, defaults to 0.1):
            Weight of the orthogonality term, the paper's default.
        projection_interval (`int`, *optional*, defaults to 1):
            k: P moves after the steps 0, k, 2k, ... only, and A is not computed at the others. The paper's is 1.
    """

    learns: ClassVar[bool] = True
    stackable: ClassVar[bool] = True

    lambda_: float = 0.1
    projection_interval: int = 1

    def moves_at(self, count: int) -> bool:
        """At every `projection_interval`-th step."""
        return count % self.projection_interval == 0

    def advance_(self, P: Tensor, move: Movement) -> None:
        """One step of P's optimizer on the gradient of Eq. 6."""
        move.descend(move.op.pca_gradient(P, move.A, move.inv_norm2, self.lambda_))
