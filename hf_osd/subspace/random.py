"""Random subspaces, drawn anew every k steps: stochastic subspace descent (Kozak et al. 2019, arXiv 1904.01145).

Also GoLore's P (He et al. 2024, arXiv 2410.11289), which converges where top singular vectors follow the noise,
Flora's (Hao et al. 2024, arXiv 2402.03293), and RSO's (Chen et al. 2025, arXiv 2502.07222).
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor

from ..declare import boolean, one_of, option
from .initialization import gaussian
from .protocol import Renewed, Start


DISTRIBUTIONS = ("orthonormal", "gaussian")


@dataclass(frozen=True)
class Random(Renewed):
    """P is drawn anew at steps 0, k, 2k, ..., without a look at the gradient.

    Its state is a seed of 8 bytes. P itself, s x r, is kept beside the state until the next one is drawn, so that a
    step costs nothing, and is drawn again from the seed after a resume: on the CPU, the same on every device.
    """

    reads_gradient: ClassVar[bool] = False
    uses_init: ClassVar[bool] = False
    code: ClassVar[str | None] = "projection_seed"
    keeps_expanded: ClassVar[bool] = True

    distribution: str = option(
        "orthonormal",
        "`orthonormal` columns, uniform over all subspaces (GoLore), or `gaussian` entries N(0, 1/s) (Flora).",
        check=one_of(DISTRIBUTIONS),
        card="distribution of P",
    )
    unbiased: bool = option(
        False,
        "Make P longer by sqrt(s/r), so that E[P Pᵀ] = I (RSO).",
        check=boolean(),
        card="P with E[P Pᵀ] = I",
    )

    def make(self, G: Tensor, start: Start, old: Tensor | None) -> Tensor:
        """The seed of the next P, int64, 0-dim."""
        digest = blake2b(f"{start.seed} {start.steps} {start.side}".encode(), digest_size=8).digest()
        return torch.tensor(int.from_bytes(digest, "little") >> 1, dtype=torch.int64, device=G.device)

    def code_spec(self, rank: int) -> tuple[tuple[int, ...], torch.dtype]:
        """One integer."""
        return (), torch.int64

    def expand(self, code: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
        """P, drawn on the CPU. Reads the device."""
        P = gaussian(rows, rank, int(code), code.device, dtype)
        P = torch.linalg.qr(P).Q.contiguous() if self.distribution == "orthonormal" else P.mul_(rows**-0.5)
        return P.mul_(self.length(rows, rank))

    def length(self, rows: int, rank: int) -> float:
        """Of the columns of P: sqrt(s/r) where it is unbiased."""
        return (rows / rank) ** 0.5 if self.unbiased else 1.0
