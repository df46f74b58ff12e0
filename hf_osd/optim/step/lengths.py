"""How long the steps of many P are, also where processes have some rows of each.

With M = XᵀX of a step X, which is a sum over rows, and u the columns of M V for a few fixed V, made as long as 1,

    ||X||² >= ||M u||,     exactly ||X||² where X has rank one, as the steps that are too long nearly have

and a fifth less where 127 directions are a third as long as the leading one.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...subspace.initialization import gaussian


Total = Callable[[Sequence[Tensor]], None]

VECTORS = 4  # one could happen to be orthogonal to the leading direction


def lengths(steps: Sequence[Tensor], total: Total | None = None) -> list[Tensor]:
    """||X||, (k,), of each of stacks (k, s, r).

    Args:
        steps (`list[torch.Tensor]`): The stacks.
        total (`Callable`, *optional*): Adds up tensors of all processes in place, where these have some rows each.
    """
    starts = [_start(X.shape[-1], X.dtype, X.device) for X in steps]
    directions = [U / torch.linalg.vector_norm(U, dim=-2, keepdim=True) for U in _products(steps, starts, total)]
    products = _products(steps, directions, total)
    # a step that is 0, or whose square is too large for its precision, is as good as infinitely long
    return [torch.linalg.vector_norm(MU, dim=-2).amax(-1).sqrt_().nan_to_num_(nan=torch.inf) for MU in products]


def _products(steps: Sequence[Tensor], vectors: Sequence[Tensor], total: Total | None) -> list[Tensor]:
    """M V of each, (k, r, VECTORS)."""
    found = [X.mT @ (X @ V) for X, V in zip(steps, vectors, strict=True)]
    if total is not None:
        total(found)
    return found


@lru_cache(maxsize=64)
def _start(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return gaussian(r, VECTORS, 0, device, dtype)
