"""Between the two halves of a step: all that is needed of a gradient, and all that is done to a weight.

Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """All that a step needs of a gradient, so that G itself can go: it adds up over micro-batches.

    R and A may be in the precision of the gradient until they are used: those of many weights are converted at once.
    """

    R: Tensor  # down(G, P)
    A: Tensor | None  # correlate(G, Z, P), shaped like P; None where P does not move
    G: Tensor | None = None  # the gradient itself, where its residual is used: then nothing is added up
    P: Tensor | None = None  # as it made R, where that is worth being held until W moves
    columns: slice | None = None  # of G, where that is no more than these (its rows, where P is on the left)

    def wide(self, dtype: torch.dtype) -> "LowRank":
        """R and A in the precision of the computation: to be added up, scaled or kept."""
        return self._replace(R=self.R.to(dtype), A=None if self.A is None else self.A.to(dtype), P=None)


class Update(NamedTuple):
    """A step of a weight, up to learning rate and scale: up(D, P) + S.

    Attributes:
        D (`torch.Tensor`): Low-rank direction.
        P (`torch.Tensor`): The projection.
        add_rest (`Callable`, *optional*): Adds `rate` times the rows of S to its first argument, `(X, rows, rate)`.
    """

    D: Tensor
    P: Tensor
    add_rest: Callable[[Tensor, slice, float | Tensor], object] | None = None
