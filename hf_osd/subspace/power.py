"""One step of power iteration at each training step, as in LDAdam (arXiv 2410.16103) and Dion (arXiv 2504.05295).

With M = up(m, P) the momentum that the weight's rule holds in the subspace,

    B = rho M + (1 - rho) G           Z = down(B, P) = rho m + (1 - rho) R           where PᵀP = I
    P <- orth(B Zᵀ)                   B Zᵀ = rho P (m Zᵀ) + (1 - rho) G Zᵀ

(left side). Orthonormal columns come from a QR decomposition whose signs are fixed, so that P turns smoothly.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declare import Need, number, option
from .protocol import Moved, Movement


@dataclass(frozen=True)
class PowerIteration(Moved):
    """P follows the dominant subspace of momentum and gradient by one power step and a QR decomposition.

    A step costs one product with the gradient and the QR of an s x r matrix. The state is P, s x r.
    """

    two_sided: ClassVar[bool] = False

    mixing: float = option(
        0.9,
        "Share of the momentum in what P follows, rho (Adam's beta1; LDAdam's is 0.908).\n\n"
        "0 looks at the last gradient alone, and is the only choice with rules that keep no first moment.",
        check=number(0, below=1),
        needs=(
            Need(
                lambda group: group["source"] == "gradients",
                "with source='activations', where P follows inputs, which have no momentum",
            ),
        ),
        card="share of the momentum in what P follows",
    )

    @property
    def mixes(self) -> float:
        """The share of the momentum."""
        return self.mixing

    def advance_(self, P: Tensor, move: Movement) -> None:
        """Orthonormal columns that span those of A."""
        Q, T = torch.linalg.qr(move.A)
        # Q's columns have no sign of their own: those of T's diagonal make the decomposition unique
        Q.mul_(torch.where(T.diagonal() < 0, -1.0, 1.0).to(Q.dtype))
        P.copy_(torch.where(move.usable(), Q, P))
