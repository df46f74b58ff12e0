"""The part of a parameter's gradients that is kept between the backward pass and its step.

Letters and shapes as in `subspace.operators`; G_i is the gradient of micro-batch i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..step.algorithm import FIRST, LATER, Turn
from ..step.low_rank import LowRank


Lows = list[LowRank | None]  # of a matrix one, of a stack one for each expert; None without a P as yet


class Arrived(NamedTuple):
    """A parameter's gradient, ready to be stepped with."""

    gradient: Tensor | Lows
    energy: Tensor  # squared norm that A belongs to: () or, of a stack, (E,)
    norm2: Tensor  # likewise of the gradient; a stand-in where it is a sum that never was whole


@dataclass
class Window:
    """A parameter's gradients since the last step: their sum, or what is kept of it."""

    G: Tensor | None = None
    lows: Lows | None = None
    energy: Tensor | None = None  # sum of ||G_i||²
    R_energy: Tensor | None = None  # sum of ||R_i||²

    def add_whole(self, G: Tensor) -> None:
        """Add a gradient as it is, which is then ours."""
        self.G = G if self.G is None else self.G.add_(G)

    def add(self, lows: Lows, energy: Tensor) -> None:
        """Add a gradient's image; of one that came before there was a P, it counts only whether it was finite."""
        R_energy = squared_norms_of_R(lows, energy)
        if self.lows is None or self.energy is None or self.R_energy is None:
            self.lows, self.energy, self.R_energy = lows, energy, R_energy
            return
        self.energy, self.R_energy = self.energy + energy, self.R_energy + R_energy
        self.lows = [_sum(a, b) for a, b in zip(self.lows, lows, strict=True)]

    def turns(self, matrices: int) -> list[Turn]:
        """Of the next gradient of each of so many matrices: the first one with an image may replace P."""
        return [FIRST] * matrices if self.lows is None else [FIRST if low is None else LATER for low in self.lows]

    def nbytes(self) -> int:
        """Bytes held."""
        parts = [X for low in self.lows or () if low is not None for X in low]
        return sum(X.nbytes for X in (self.G, *parts) if isinstance(X, Tensor))

    def arrived(self) -> Arrived:
        """What the window has come to."""
        assert self.lows is not None and self.energy is not None and self.R_energy is not None
        norm2 = norm_stand_in(self.energy, self.lows, self.R_energy)
        return Arrived(self.lows, self.energy, norm2)


def squared_norms_of_R(lows: Sequence[LowRank | None], like: Tensor) -> Tensor:
    """||R||² of each matrix, zero without one, in the shape of `like`: () or (E,)."""
    zero = like.new_zeros(())
    return torch.stack([zero if low is None else low.R.square().sum() for low in lows]).view_as(like)


def norm_stand_in(energy: Tensor, lows: Sequence[LowRank | None], R_energy: Tensor) -> Tensor:
    """||G||² of a sum of gradients, from the sums of their ||G_i||² and ||R_i||² and its R.

        ||G||² ~ sum ||G_i||² * ||R||² / sum ||R_i||²

    that is, the part outside the subspace is taken to add up as the part inside does. It scales P's gradient, and
    clipping goes by it; never the update of the weights.
    """
    # Where nothing lies in the subspace (0 / 0) the parts' own; a broken gradient stays one.
    return torch.where(R_energy == 0, energy, energy * (squared_norms_of_R(lows, energy) / R_energy))


def _sum(a: LowRank | None, b: LowRank | None) -> LowRank | None:
    if a is None or b is None:
        return a or b
    # a P that was made in this window is not moved in it: the first has no A
    return LowRank(a.R.add_(b.R), None if a.A is None or b.A is None else a.A.add_(b.A))
