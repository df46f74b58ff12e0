"""Random directions of a weight: what is drawn, what perturbs a forward pass, and the update along it.

SubZero (Yu et al. 2025, arXiv 2410.08989) and MeZO (Malladi et al. 2023, arXiv 2305.17333). Letters:

    W (m, n)            a weight                      Zt = mu U Z Vᵀ   its direction, mu = sqrt(m n) / r
    U (m, r), V (n, r)  orthonormal columns           Zt = Z           of other shapes, and where r >= min(m, n)
    Z (r, r), or as W   of N(0, 1)                    so that E||Zt||² = m n in both

Every draw is made from a seed of its own, a hash of the run's seed, the parameter's name, and the step or the epoch of
U and V: no order of draws matters, and nothing has to be stored to draw again.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.step.gradients import PIECE
from ..optim.step.rounding import Rounding, add_rounded_, noise_of, pieces
from ..subspace.initialization import gaussian


DRAWN_ON_CPU = 2**16  # entries: the same on every device up to here; more, and none but the device is fast enough


def seed_of(*words: object) -> int:
    """A seed that is made of words and numbers alone."""
    digest = blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Weight:
    """One trained parameter and its directions at the present step, one for each query.

    Args:
        name (`str`): Its name, from which its random numbers are drawn.
        W (`nn.Parameter`): The parameter.
    """

    code_shape: tuple[int, ...]  # of Z

    def __init__(self, name: str, W: nn.Parameter):
        self.name, self.W = name, W
        self.dtype = torch.promote_types(W.dtype, torch.float32)  # of updates
        self.Z: list[Tensor] = []

    def move_basis(self, seed: int, epoch: int) -> None:
        """Draw what stays for many steps."""

    def perturbed(self, query: int, scale: float) -> Tensor:
        """W + scale Zt, a new tensor."""
        raise NotImplementedError

    def update_(self, c: Tensor, decay: float, seed: int, step: int) -> None:
        """W <- decay W - sum_i c_i Zt_i. Of bfloat16 it is rounded at random, once.

        Args:
            c (`torch.Tensor`): (queries,), on W's device.
            decay (`float`): 1 - lr weight_decay.
            seed (`int`): The run's.
            step (`int`): The step.
        """
        W, add_ = self.W.detach(), self._adding(c.to(self.dtype))
        if W.dtype == torch.bfloat16:
            noise = noise_of(W.device, seed_of(seed, "rounding", self.name), step)
            add_rounded_(W, add_, Rounding(noise, None if decay == 1 else torch.tensor(decay, device=W.device)))
            return
        W = torch.atleast_1d(W)
        if decay != 1:
            W.mul_(decay)
        for piece in pieces(W):
            add_(W[piece], piece)

    def _adding(self, c: Tensor) -> Any:
        """What adds - sum_i c_i Zt_i of the rows W[piece] to a tensor, in place; called for the pieces in order."""
        raise NotImplementedError


class LowRankWeight(Weight):
    """A matrix that is perturbed in a subspace.

    Args:
        name, W: See [`Weight`].
        rank (`int`): r.
        given (`Mapping[str, torch.Tensor]`, *optional*):
            What U or V is drawn in, by `"left"` and `"right"`: (m, r') or (n, r'), r' >= r.
    """

    def __init__(self, name: str, W: nn.Parameter, rank: int, given: Mapping[str, Tensor] | None = None):
        super().__init__(name, W)
        self.rank, self.code_shape = rank, (rank, rank)
        self.mu = W.numel() ** 0.5 / rank
        self.given = {side: torch.linalg.qr(P.to("cpu", torch.float32)).Q for side, P in (given or {}).items()}
        self.U = self.V = W.detach().new_empty(0)
        # a smaller product, and a temporary of 16 MiB; bfloat16 would round the perturbation away
        self.may_be_made = W.numel() <= PIECE and W.dtype in (torch.float32, torch.float64)

    def move_basis(self, seed: int, epoch: int) -> None:
        """Draw U and V: QR of Gaussian matrices in float32, on the CPU, so that all devices have the same."""
        self.U, self.V = (self._drawn_basis(side, seed, epoch) for side in ("left", "right"))

    def _drawn_basis(self, side: str, seed: int, epoch: int) -> Tensor:
        P = self.given.get(side)
        rows = self.W.shape[0 if side == "left" else 1] if P is None else P.shape[1]
        own = seed_of(seed, self.name, side, "epoch", epoch)
        Q = torch.linalg.qr(gaussian(rows, self.rank, own, torch.device("cpu"), torch.float32)).Q
        return (Q if P is None else P @ Q).to(self.W.device, self.W.dtype)

    def perturbed(self, query: int, scale: float) -> Tensor:
        """W + scale Zt, a new tensor."""
        B = (scale * self.mu * self.Z[query]).to(self.W.dtype) @ self.V.mT
        return torch.addmm(self.W.detach(), self.U, B)

    def is_made_for(self, rows: int) -> bool:
        """Whether a product of so many rows is cheaper with W + scale Zt than with both."""
        return self.may_be_made and rows * sum(self.W.shape) > self.W.numel()

    def add_linear_(self, y: Tensor, x: Tensor, query: int, scale: float) -> Tensor:
        """Add scale x Ztᵀ of x (..., n) to y (..., m)."""
        x = x.reshape(-1, self.W.shape[1]).to(y.dtype)
        return self._add_(y, x @ self.V.to(y.dtype) @ self.Z[query].mT.to(y.dtype), self.U, scale)

    def add_transposed_(self, y: Tensor, x: Tensor, query: int, scale: float) -> Tensor:
        """Add scale x Zt of x (..., m) to y (..., n)."""
        x = x.reshape(-1, self.W.shape[0]).to(y.dtype)
        return self._add_(y, x @ self.U.to(y.dtype) @ self.Z[query].to(y.dtype), self.V, scale)

    def add_rows_(self, y: Tensor, rows: Tensor, query: int, scale: float) -> Tensor:
        """Add scale Zt[rows] to y (..., n)."""
        return self._add_(y, self.U[rows.reshape(-1)] @ self.Z[query].to(y.dtype), self.V, scale)

    def _add_(self, y: Tensor, t: Tensor, B: Tensor, scale: float) -> Tensor:
        """Add scale mu t Bᵀ to y, of t (tokens, r)."""
        if not y.is_contiguous():
            y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(t, B.mT.to(y.dtype), alpha=scale * self.mu)
        return y

    def _adding(self, c: Tensor) -> Any:
        # sum_i c_i Zt_i = mu U (sum_i c_i Z_i) Vᵀ
        C = torch.einsum("q,qij->ij", c, torch.stack(self.Z))
        B = -self.mu * (C @ self.V.mT.to(self.dtype))
        return lambda X, piece: X.addmm_(self.U[piece].to(self.dtype), B)


class DenseWeight(Weight):
    """A parameter of any shape, perturbed in every entry. Large directions are drawn in pieces where they are used."""

    def __init__(self, name: str, W: nn.Parameter):
        super().__init__(name, W)
        self.kept = W.numel() <= DRAWN_ON_CPU
        self.code_shape = tuple(W.shape)
        self.seeds: list[int] = []  # of the directions that are not kept

    def perturbed(self, query: int, scale: float) -> Tensor:
        """W + scale Z, a new tensor."""
        X = self.W.detach().clone()
        rows = torch.atleast_1d(X)
        for piece, Z in zip(pieces(rows), self._drawn(query), strict=True):
            rows[piece].add_(Z, alpha=scale)
        return X

    def _drawn(self, query: int) -> Iterator[Tensor]:
        """Z, a few rows at a time."""
        if self.kept:
            yield torch.atleast_1d(self.Z[query])
            return
        generator = torch.Generator(self.W.device).manual_seed(self.seeds[query])
        for piece in pieces(self.W):
            shape = self.W[piece].shape
            yield torch.randn(shape, generator=generator, dtype=torch.float32, device=self.W.device)

    def _adding(self, c: Tensor) -> Any:
        drawn = [self._drawn(i) for i in range(len(c))]

        def add_(X: Tensor, piece: slice) -> None:
            for i, Z in enumerate(drawn):
                X.addcmul_(next(Z).to(X.dtype), c[i], value=-1)

        return add_
