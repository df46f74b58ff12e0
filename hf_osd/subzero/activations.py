"""V that follows a layer's inputs x (T, n): their top right singular vectors, in which the gradient is, too.

The gradient of y = x Wᵀ is G = dYᵀ x, whose rows are combinations of the x. Of every k-th token of all passes at
W + eps Zt since V last moved, on the first process,

    A = sum x_kᵀ (x_k V)        V <- orth(V + eta A),  eta = 1 / (SHIFT ||A||)

which is Oja's rule (1982) with a step so large that it is power iteration; what x has no part in stays. V moves after
1, 2, 4, ... and all multiples of F steps, on ever more inputs, and until then U and V stay, as SubZero wants it.

    mu = sqrt(m / r)        E[Ztᵀ Zt] = m V Vᵀ,    E[rho Zt] = G V Vᵀ

are MeZO's within V, so that outputs change as with MeZO, and its eps and learning rates hold. Before V has moved it is
random, and mu that of `weight`. `Conv1D` stores Wᵀ: there U follows, and m is n.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim.options.general import PROJECTION_SAMPLE
from ..subspace.precision import reduced_precision
from .weight import LowRankWeight


SHIFT = 1e-6  # of ||A||, above float32's rounding of A: where x has less, V hardly turns


class FollowingWeight(LowRankWeight):
    """A matrix of a layer whose inputs V follows.

    Args:
        name, W, rank, given: See [`LowRankWeight`]; V starts in what is given.
        side (`str`): `"right"`, or `"left"` where U is what follows.
    """

    def __init__(self, name: str, W: nn.Parameter, rank: int, given: Mapping[str, Tensor] | None, side: str):
        super().__init__(name, W, rank, given)
        self.side = side
        self.basis: Tensor | None = None  # V, once it has moved
        self.A: Tensor | None = None

    def move_basis(self, seed: int, epoch: int) -> None:
        """Draw U, and V until it has moved."""
        super().move_basis(seed, epoch)
        self._use()

    @torch.no_grad()
    def observe(self, x: Tensor, turn: int) -> None:
        """Add what the tokens of some inputs say to A; nothing, if they are not finite.

        Args:
            x (`torch.Tensor`): (..., n).
            turn (`int`): Which of the first k tokens is the first to be looked at.
        """
        x = x.reshape(-1, x.shape[-1])
        x = x[turn % max(min(PROJECTION_SAMPLE, len(x)), 1) :: PROJECTION_SAMPLE]
        x = x.to(self.dtype) if x.dtype == torch.float16 else x  # whose range the sums of squares leave
        V = self.V if self.side == "right" else self.U
        with torch.autocast(x.device.type, enabled=False), reduced_precision(x):
            A = (x.mT @ (x @ V.to(x.dtype))).to(self.dtype)
        A = torch.where(A.isfinite().all(), A, 0)
        self.A = A if self.A is None else self.A.add_(A)

    def follow_(self) -> None:
        """Move V, to what the first process makes of it."""
        V = self.V if self.side == "right" else self.U
        if self.A is not None:  # on the first process alone
            A = self.A.div_(self.A.norm().clamp(min=torch.finfo(self.dtype).tiny))
            V = torch.linalg.qr(A.add_(V, alpha=SHIFT)).Q.to(V.dtype)
        self.basis, self.A = V.clone(memory_format=torch.contiguous_format), None
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.basis, 0)
        self._use()

    def _use(self) -> None:
        """Let V be what follows, with its mu, or what is drawn."""
        (m, n), right = self.W.shape, self.side == "right"
        if self.basis is None:
            self.mu = (m * n) ** 0.5 / self.rank
            return
        self.U, self.V = (self.U, self.basis) if right else (self.basis, self.V)
        self.mu = ((m if right else n) / self.rank) ** 0.5

    @property
    def A_bytes(self) -> int:
        """Bytes of A."""
        return self.W.shape[1 if self.side == "right" else 0] * self.rank * self.dtype.itemsize

    def state(self) -> dict[str, Tensor]:
        """V and A, where they are, under names for the optimizer's state."""
        found = {"basis": self.basis, "A": None if self.A is None else self.A.clone()}
        return {f"{key}.{self.name}": value for key, value in found.items() if value is not None}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Take them from there."""
        basis, A = (state.get(f"{key}.{self.name}") for key in ("basis", "A"))
        self.basis = None if basis is None else basis.to(self.W.device, self.W.dtype).contiguous()
        self.A = None if A is None else A.to(self.W.device, self.dtype, copy=True)


def follows_after(steps: int, interval: int) -> bool:
    """Whether V moves after so many steps: 1, 2, 4, ... below the interval, and its multiples."""
    return steps % interval == 0 or (steps < interval and steps & (steps - 1) == 0)


def is_observer() -> bool:
    """Whether this is the process whose inputs V follows."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
