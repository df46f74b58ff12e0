"""Random directions of weights: what is drawn, what perturbs a forward pass, and the update along it.

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
from .options import Options


SAMPLED = 64  # numbers of a weight that tell it from others
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
        for side, size in (("left", self.W.shape[0]), ("right", self.W.shape[1])):
            P = self.given.get(side)
            rows = size if P is None else P.shape[1]
            own = seed_of(seed, self.name, side, "epoch", epoch)
            Q = torch.linalg.qr(gaussian(rows, self.rank, own, torch.device("cpu"), torch.float32)).Q
            Q = (Q if P is None else P @ Q).to(self.W.device, self.W.dtype)
            self.U, self.V = (Q, self.V) if side == "left" else (self.U, Q)

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


class Weights:
    """All trained parameters of a model, by name.

    Args:
        trained (`Mapping[str, nn.Parameter]`): The parameters.
        matrices (`Collection[str]`): Names of those that may be perturbed in a subspace.
        options ([`Options`]): Of the run.
        given (`Mapping`): By name and side what U and V are drawn in.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], matrices: Any, options: Options, given: Mapping):
        self.options, self._epoch = options, -1
        self.step = -1  # that is drawn
        self.weights: dict[str, Weight] = {
            name: LowRankWeight(name, p, options.rank, given.get(name))
            if name in matrices and options.perturbation == "subspace" and min(p.shape) > options.rank
            else DenseWeight(name, p)
            for name, p in trained.items()
        }
        self.by_id = {id(weight.W): weight for weight in self.weights.values()}

    @property
    def portable(self) -> bool:
        """Whether all directions are the same on every device."""
        return all(isinstance(weight, LowRankWeight) or weight.kept for weight in self.weights.values())  # type: ignore

    @property
    def bases(self) -> str:
        """A hash of what U and V are drawn in; empty where they are drawn freely."""
        given = [(w.name, side, P) for w in self._low_rank for side, P in w.given.items()]
        digest = blake2b(digest_size=16)
        for name, side, P in sorted(given, key=lambda entry: entry[:2]):
            digest.update(f"{name} {side} {tuple(P.shape)} ".encode() + P.contiguous().numpy().tobytes())
        return digest.hexdigest() if given else ""

    @property
    def _low_rank(self) -> list[LowRankWeight]:
        return [weight for weight in self.weights.values() if isinstance(weight, LowRankWeight)]

    @property
    def basis_bytes(self) -> int:
        """Bytes of U and V."""
        return sum(sum(w.W.shape) * w.rank * w.W.element_size() for w in self._low_rank)

    def begin(self, step: int) -> None:
        """Draw the directions of a step, unless they are there."""
        if step == self.step:
            return
        seed, epoch = self.options.seed, step // self.options.update_interval
        if epoch != self._epoch:
            for weight in self.weights.values():
                weight.move_basis(seed, epoch)
        self._epoch, self.step = epoch, step
        drawn: dict[torch.device, list[tuple[Weight, Tensor]]] = {}
        for weight in self.weights.values():
            seeds = [seed_of(seed, weight.name, "step", step, query) for query in range(self.options.queries)]
            if isinstance(weight, DenseWeight) and not weight.kept:
                weight.seeds = seeds
                continue
            size = max(1, torch.Size(weight.code_shape).numel())
            codes = [gaussian(1, size, own, torch.device("cpu"), torch.float32) for own in seeds]
            drawn.setdefault(weight.W.device, []).append((weight, torch.cat(codes)))
        for device, entries in drawn.items():  # one transfer for all
            flat = torch.cat([codes.view(-1) for _, codes in entries])
            parts = flat.to(device).split([codes.numel() for _, codes in entries])
            for (weight, _), part in zip(entries, parts, strict=True):
                codes = part.view(self.options.queries, *weight.code_shape).to(weight.dtype)
                weight.Z = list(codes)

    def forget(self) -> None:
        """What is drawn, after the step or the seed has become another one."""
        self.step = self._epoch = -1

    def update_(self, rho: Tensor, rates: Mapping[str, float], decays: Mapping[str, float]) -> None:
        """W <- (1 - lr decay) W - lr sum_i rho_i Zt_i for every weight, with the directions of the step that is drawn.

        Args:
            rho (`torch.Tensor`): (queries,).
            rates (`Mapping[str, float]`): lr by name.
            decays (`Mapping[str, float]`): Weight decay by name.
        """
        for name, weight in self.weights.items():
            c = (rates[name] * rho).to(weight.W.device)
            weight.update_(c, 1 - rates[name] * decays[name], self.options.seed, self.step)


def fingerprint(weights: Weights) -> str:
    """A hash of a few numbers of every weight, which tells it from another start. Reads the devices."""
    digest = blake2b(digest_size=16)
    for name, weight in sorted(weights.weights.items()):
        W = weight.W.detach()
        few = W.reshape(-1)[:: max(1, W.numel() // SAMPLED)][:SAMPLED]
        digest.update(f"{name} {tuple(W.shape)} {W.dtype} ".encode())
        digest.update(few.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
