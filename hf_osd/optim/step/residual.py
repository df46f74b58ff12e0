"""The part of the gradient outside the subspace, which Algorithm 1 throws away, used without a state of its own.

`scaled` (Fira, Chen et al. 2024, arXiv 2410.01673): the residual G - P R is scaled like the weight's rule has scaled
the inside, for each column j of R (each row on the right side),

    S = phi (G - P R)         phi_j = ||D_j|| / ||R_j||
    S <- S min(1, gamma ||S_{t-1}|| / ||S||)                        the norm-growth limiter

and added to up(D). It takes no product with G: up(D) + S = up(D - phi R) + phi G. Nor does ||S||:
||G_j - P R_j||² = ||G_j||² - 2 ||R_j||² + R_jᵀ C R_j with C = PᵀP. The two-sided R has no columns of G, so
there phi is one number for the whole matrix.

`sign` (FRUGAL, Zmushko et al. 2024, arXiv 2411.07837): the residual takes a step of signSGD, sign(G - P R). That is
one product more, and worked out a few rows at a time. Its entries have the size of AdamW's as they are, so that
`scale="auto"`, which gives up(D) that size, leaves them alone: they are `residual_scale` of AdamW's at every rank.

Where G never exists (`source="activations"`), the layers make some columns S of it, every k-th, others at each step
(`layers.outside`; of a layer that stores Wᵀ they are rows). The residual is of these,

    S_S = sqrt(k) sign(G_S - (R Pᵀ)_S)                                                    0 in all other columns

whose entries have the root mean square of signs.

Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...subspace.precision import full_precision
from ...update_rules import GradientCheck
from .geometry import ProjectedGeometry
from .gradients import EPS
from .low_rank import LowRank, Update
from .moments import add_times_
from .rounding import PIECE
from .slot import Slot


GROWTH_LIMIT = 1.01  # gamma, Fira's default


class Residual:
    """The residual of one matrix."""

    def __init__(self, geometry: ProjectedGeometry, group: Mapping[str, Any], slot: Slot):
        self.geometry, self.group, self.slot = geometry, group, slot
        self._long = geometry.op.long_dim

    def extend(self, update: Update, low: LowRank, check: GradientCheck) -> Update:
        """The update with S in it."""
        raise NotImplementedError

    def _sum(self, X: Tensor) -> Tensor:
        sharding = self.geometry.sharding
        return X if sharding is None else sharding.sum(X)

    def _outside(self, low: LowRank, P: Tensor) -> Tensor:
        """||G_j - P R_j||² of each column j in the shape of phi, or ||G - up(R)||² of the whole matrix.

        0 where that is no more than rounding, as of a gradient that P has just been made from and whose rank is no
        larger: the sign of such a rest is arbitrary, and its norm would hold down all that follow through the limiter.
        """
        R, G, op = low.R, low.G, self.geometry.op
        assert G is not None
        if self._long is None:  # ||G||² loss, for the loss of PCA is ||G - up(R)||² / ||G||²
            # not the norm of the check, which is that of the gradient before clipping
            K, energy = self._sum(op.gram(R)), self._sum(torch.linalg.vector_norm(G, dtype=R.dtype).square())
            outside = energy * op.pca_loss(P, K, 1 / energy.clamp(min=EPS))
        else:
            short = 1 - self._long
            # ||G_j||² - 2 ||R_j||² + R_jᵀ C R_j
            with full_precision(R):
                C = P.t() @ P
                CR = C @ R if short == 0 else R @ C
            energy = _squares(G, short, R.dtype)
            outside = energy + ((CR - 2 * R) * R).sum(dim=short, keepdim=True)
        return torch.where(outside > _rounding(G, R) * energy, outside, 0.0)

    def _rows_of(self, X: Tensor, rows: slice) -> Tensor:
        """The part of X, which broadcasts with G, that belongs to these rows."""
        return X[rows] if self._long == 0 and X.ndim else X


class Scaled(Residual):
    """Fira's: S = phi (G - P R) with the norm-growth limiter; `state["residual_norm"]` is ||S||."""

    def extend(self, update: Update, low: LowRank, check: GradientCheck) -> Update:
        """The update with S in it; moves `residual_norm` on."""
        D, P, _ = update
        R, G = low.R, low.G
        assert G is not None
        outside = self._outside(low, P)
        phi = self._scaling(D, R).masked_fill(outside == 0, 0.0) * self.group["residual_scale"]
        norm2 = (phi.square() * outside).sum()
        if self._long is not None:
            norm2 = self._sum(norm2)
        phi = (phi * self._limit(norm2, check)).masked_fill(check.skip, 0.0)

        def add_rest(X: Tensor, rows: slice, rate: float | Tensor) -> None:
            part = G[rows] * self._rows_of(phi, rows)
            add_times_(X, part.masked_fill_(check.skip, 0.0), rate)  # 0 times NaN is no 0

        return Update(D - torch.where(check.skip, 0.0, phi * R), P, add_rest)

    def _scaling(self, D: Tensor, R: Tensor) -> Tensor:
        """phi, in a shape that broadcasts with G and R; 0 where nothing lies in the subspace."""
        if self._long is None:
            outside, inside = self._sum(torch.stack([D.square().sum(), R.square().sum()])).sqrt().unbind()
        else:
            inside = torch.linalg.vector_norm(R, dim=1 - self._long, keepdim=True)
            outside = torch.linalg.vector_norm(D, dim=1 - self._long, keepdim=True)
        return torch.where(inside > 0, outside / inside, 0.0)

    def _limit(self, norm2: Tensor, check: GradientCheck) -> Tensor:
        """min(1, gamma ||S_{t-1}|| / ||S_t||), 0-dim; the first residual is the measure of the next."""
        norm, before = norm2.sqrt(), self.slot.state["residual_norm"].to(norm2.dtype)
        limit = torch.ones_like(norm)
        limit = torch.where((before > 0) & (norm > 0), (GROWTH_LIMIT * before / norm).clamp(max=1.0), limit)
        self.slot.state["residual_norm"].copy_(torch.where(check.skip, before, norm * limit))
        return limit


class Sign(Residual):
    """FRUGAL's: S = sign(G - P R), 0 where nothing lies outside."""

    def _scale(self) -> float:
        """Of S: such that `scale="auto"` leaves it alone."""
        return self.group["residual_scale"] / (self.geometry.full_scale if self.group["scale"] == "auto" else 1.0)

    def extend(self, update: Update, low: LowRank, check: GradientCheck) -> Update:
        """The update with S in it."""
        D, P, _ = update
        R, G, op = low.R, low.G, self.geometry.op
        assert G is not None
        scale = self._scale()
        some = (self._outside(low, P) > 0) & ~check.skip

        def add_rest(X: Tensor, rows: slice, rate: float | Tensor) -> None:
            S = G[rows].to(R.dtype, copy=True)
            op.add_up_(S, *op.factors(R, P, rows), alpha=-1.0)
            add_times_(X, S.sign_().masked_fill_(~self._rows_of(some, rows), 0.0), rate * scale)

        return Update(D, P, add_rest)


class SignOfColumns(Sign):
    """The same of some columns of G, of the rows of a layer that stores Wᵀ."""

    def extend(self, update: Update, low: LowRank, check: GradientCheck) -> Update:
        """The update with S in it."""
        D, P, _ = update
        R, G, own, op = low.R, low.G, low.columns, self.geometry.op
        assert G is not None and own is not None and self._long is not None
        k, short, P_own = own.step, 1 - self._long, P[own].to(R.dtype)
        scale = k**0.5 * self._scale()

        def signs(part: slice) -> Tensor:
            # G_S - (R Pᵀ)_S
            S = G[part].to(R.dtype, copy=True)
            energy = _squares(S, short, R.dtype)
            op.add_up_(S, *op.factors(R, P_own, part), alpha=-1.0)
            nothing = _squares(S, short, R.dtype) <= _rounding(G, R) * energy
            return S.sign_().masked_fill_(nothing | check.skip, 0.0)

        if short:
            return Update(D, P, lambda X, rows, rate: add_times_(X[:, own], signs(rows), rate * scale))
        S = signs(slice(None))  # what lies outside of a column is known of all its rows

        def add_rest(X: Tensor, rows: slice, rate: float | Tensor) -> None:
            first = (own.start - rows.start) % k  # of these rows
            part = S[(rows.start + first - own.start) // k :][: len(range(first, len(X), k))]
            if isinstance(rate, Tensor) and rate.ndim:  # one for each row
                rate = rate[first::k]
            add_times_(X[first::k], part, rate * scale)

        return Update(D, P, add_rest)


def _rounding(G: Tensor, R: Tensor) -> float:
    """Share of the energy that may be no more than rounding."""
    return max(4 * torch.finfo(G.dtype).eps, 64 * torch.finfo(R.dtype).eps)


def _squares(G: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """||G_j||² of each row (`dim` 1) or column, whose norms torch computes on one core: (m, 1) or (1, n)."""
    if dim:
        return torch.linalg.vector_norm(G, dim=1, keepdim=True, dtype=dtype).square_()
    parts = [G[rows].to(dtype).square().sum(0, keepdim=True) for rows in pieces(G)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


RESIDUALS: dict[str, type[Residual]] = {"scaled": Scaled, "sign": Sign}


def pieces(G: Tensor) -> Iterator[slice]:
    """Rows of a matrix, as many at a time as keep temporaries small."""
    rows = max(1, PIECE // max(1, G.shape[1]))
    for start in range(0, G.shape[0], rows):
        yield slice(start, min(start + rows, G.shape[0]))
