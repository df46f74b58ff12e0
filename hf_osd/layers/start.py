"""How P starts where it is learned from activations: it must be there before the first forward pass.

Letters and shapes as in `subspace.operators`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..subspace import Start, SubspaceRule
from ..subspace.initialization import gaussian


@dataclass
class FirstProjection:
    """P of a layer's input before the first step.

    Attributes:
        rule ([`SubspaceRule`]): How P moves.
        side (`str`): `"right"`, or `"left"` where the layer stores its weight transposed.
        init (`str`): `"orthonormal"`, `"given"`, or what is made of the first inputs.
        rank (`int`): r.
        seed (`int`): The weight's, the same on all processes.
        dtype (`torch.dtype`): Precision of the computation.
        given (`torch.Tensor`, *optional*): P_0, where the user gave one.
    """

    rule: SubspaceRule
    side: str
    init: str
    rank: int
    seed: int
    dtype: torch.dtype
    given: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether weights can be stepped by it; else it is a sketch, Ω, and P starts as orth(xᵀ x Ω)."""
        return self.rule.code is not None or self.init == "orthonormal" or self.given is not None

    def draw(self, rows: int, device: torch.device) -> Tensor:
        """P, (n, r), from the seed alone: the same on every process, whatever it is given."""
        if self.given is not None:
            return self.given.to(device, self.dtype)
        if self.rule.code is not None:
            start = Start(self.side, self.rank, self.init, self.seed, 0, self.dtype)
            code = self.rule.make(torch.empty(0, device=device), start, None)
            return self.rule.expand(code, rows, self.rank, self.dtype)
        P = gaussian(rows, self.rank, self.seed, device, self.dtype)
        return torch.linalg.qr(P).Q.contiguous() if self.complete else P.mul_(rows**-0.5)
