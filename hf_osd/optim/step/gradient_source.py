"""What a step takes of a gradient: R, and A, all that P learns of it.

Letters and shapes as in `subspace.operators`.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...subspace.precision import full_precision, reduced_precision
from .low_rank import LowRank
from .moments import Moments
from .movement import STACK_LIMIT
from .projection import LiveProjection


class GradientSource:
    """Where a step's R and A come from: here the gradient G. A source that has no G leaves `LowRank.G` at `None`.

    Args:
        P ([`LiveProjection`]): The projection.
        moments ([`Moments`]): Of the weight.
        keeps_G (`bool`): Whether the rest of the step needs G.
        every (`int`): k: A is made of one block in k of the long dimension of G, another one at each movement of P.
    """

    def __init__(self, P: LiveProjection, moments: Moments, keeps_G: bool, every: int):
        self.P, self.moments, self.keeps_G, self.every = P, moments, keeps_G, every
        self.rho, self.stride = P.rule.mixes, P.rule.stride
        self.op, self.dtype, self.sharding = P.geometry.op, P.geometry.compute_dtype, P.geometry.sharding

    def low_rank(self, G: Tensor, count: int | Tensor | None) -> LowRank:
        """R = down(G, P), and A after so many steps, or `None` where P does not move."""
        kept, A = self.P.kept(), None
        P = kept.to(G.dtype)
        with full_precision(G):
            R = self.op.down(G, P)
        if count is not None:
            with reduced_precision(G):
                # A = k correlate(G_b, R_b): in the mean over k movements correlate(G, R)
                if isinstance(count, Tensor):
                    G_b, R_b, k = self._gathered(G, R, count)
                    A = self.op.correlate(G_b, R_b, P, k)
                else:
                    b, k = self._block(G, count)
                    A = k * self._mixed(G[b], R, b) if self.rho else self.op.correlate(G[b], R[b], P, k)
            if self.sharding is not None and self.P.rows is None:
                A = self.sharding.sum(A.to(self.dtype))
        if self.keeps_G:
            return LowRank(R.to(self.dtype), A, G)
        light = A is not None and A.dtype == P.dtype and P.dtype.itemsize <= kept.dtype.itemsize
        # on a GPU a launch costs more than to hold a small P beside the wide A
        return LowRank(R, A, P=P if light and not P.is_cpu and 2 * P.numel() <= STACK_LIMIT else None)

    def _block(self, G: Tensor, count: int) -> tuple[Any, int]:
        """Which part of G, and of R, A is made of now, as an index, and how many of them there are."""
        dim = self.op.long_dim
        if self.every == 1 or dim is None:
            return ..., 1
        length = G.shape[dim]
        k = max(1, min(self.every, length))
        turn = count // self.stride % k
        rows = slice(length * turn // k, length * (turn + 1) // k)
        return (rows if dim == 0 else (slice(None), rows)), k

    def _gathered(self, G: Tensor, R: Tensor, count: Tensor) -> tuple[Tensor, Tensor, int]:
        """That part of G and of R, as copies, and their number, where the device alone knows whose turn it is."""
        dim = self.op.long_dim
        if self.every == 1 or dim is None:
            return G, R, 1
        k = max(1, min(self.every, G.shape[dim]))
        rows, inside = blocks(G.shape[dim], k, G.device)
        turn = count.remainder(k).long()
        b = rows.index_select(0, turn).view(-1)
        R_b = R.index_select(dim, b)
        if inside is not None:
            R_b.mul_(inside.index_select(0, turn).view((-1, 1) if dim == 0 else (1, -1)))
        return G.index_select(dim, b), R_b, k

    def _mixed(self, G_b: Tensor, R: Tensor, b: Any) -> Tensor:
        """A = correlate(rho M + (1 - rho) G, Z), with M = up(m) and Z = rho m + (1 - rho) R: momentum mixed in."""
        rho, op, m, P = self.rho, self.op, self.moments.load()[0]["exp_avg"].to(R.dtype), self.P.read().to(R.dtype)
        Z = torch.lerp(R, m, rho)
        return op.correlate(G_b, Z[b], P).mul_(1 - rho).add_(op.correlate_up(m[b], Z[b], P), alpha=rho)


@lru_cache(maxsize=64)
def blocks(length: int, k: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Indices of the k blocks of a dimension, (k, L), and which are of the block, where some have one too many."""
    starts = torch.arange(k + 1, device=device) * length // k
    rows = starts[:-1, None] + torch.arange(-(-length // k), device=device)
    return rows, None if length % k == 0 else rows < starts[1:, None]
