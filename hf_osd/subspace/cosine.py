"""Columns of the discrete cosine transform, chosen by the gradient's energy (Modoranu et al. 2025, arXiv 2505.17967).

    q_k(i) = c_k sqrt(2 / s) cos(pi (i + 1/2) k / s),   i, k = 0 ... s - 1,   c_0 = sqrt(1/2), c_k = 1      (DCT-II)

is an orthonormal basis that need not be stored. P holds the r columns on which the gradient has most energy,
||q_kᵀ X||² with X = G on the left side and Gᵀ on the right.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .protocol import Renewed, Start


COLUMNS_AT_ONCE = 512  # of X: bounds the temporaries of the transform


@dataclass(frozen=True)
class Cosine(Renewed):
    """The r best columns of the DCT-II basis are chosen anew at steps 0, k, 2k, ....

    Choosing costs m n log s by FFT. Its state are the r indices, 8 bytes each; a step makes P of them, s x r cosines.
    """

    uses_init: ClassVar[bool] = False
    code: ClassVar[str | None] = "projection_columns"

    def make(self, G: Tensor, start: Start, old: Tensor | None) -> Tensor:
        """The indices k of the columns, (r,) int64; those that stay keep their place, so that moments stay theirs."""
        X = G if start.side == "left" else G.mT
        best = cosine_energies(X, start.dtype).topk(start.rank).indices
        if old is None:
            return best.sort().values
        chosen = torch.zeros(X.shape[0], dtype=torch.bool, device=G.device).index_fill_(0, best, True)
        stays = chosen[old]
        chosen[old] = False
        return old.masked_scatter(~stays, chosen.nonzero().flatten())

    def code_spec(self, rank: int) -> tuple[tuple[int, ...], torch.dtype]:
        """One index a column."""
        return (rank,), torch.int64

    def expand(self, code: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
        """The columns themselves. Reads nothing back."""
        i = torch.arange(rows, dtype=dtype, device=code.device) + 0.5
        # an angle of (i + 1/2) k pi / s: k (2 i + 1) mod 4 s is exact in integers, the angle of it in floats
        turns = ((2 * i).long().unsqueeze(1) * code).remainder_(4 * rows).to(dtype)
        P = turns.mul_(math.pi / (2 * rows)).cos_().mul_(math.sqrt(2 / rows))
        c = (code == 0).to(dtype).mul_(math.sqrt(0.5) - 1).add_(1)
        return P.mul_(c)


def cosine_energies(X: Tensor, dtype: torch.dtype) -> Tensor:
    """||q_kᵀ X||² for every k, (s,), of X (s, l), in slices of columns."""
    s = X.shape[0]
    # Makhoul 1980: the DCT-II of x is the real part of exp(-i pi k / 2 s) FFT(x_0, x_2, x_4, ..., x_5, x_3, x_1)
    order = torch.cat([torch.arange(i, s, 2, device=X.device) for i in (0, 1)])
    order[-(s // 2) :] = order[-(s // 2) :].flip(0)
    angle = torch.arange(s, dtype=dtype, device=X.device) * (math.pi / (2 * s))
    twist = torch.polar(torch.ones_like(angle), -angle).unsqueeze(1)
    energies = torch.zeros(s, dtype=dtype, device=X.device)
    for part in X.split(COLUMNS_AT_ONCE, dim=1):
        spectrum = torch.fft.fft(part.to(dtype)[order], dim=0)
        energies += (spectrum * twist).real.square_().sum(dim=1)
    energies[0] /= 2  # c_0²
    return energies.mul_(2 / s)
