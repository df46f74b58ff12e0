"""All trained weights of a model: their directions at a step, and what tells them from others.

Letters as in `weight`.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from ..subspace.initialization import gaussian
from .activations import FollowingWeight, follows_after
from .options import Options
from .weight import DenseWeight, LowRankWeight, Weight, seed_of


SAMPLED = 64  # numbers of a weight that tell it from others


class Weights:
    """All trained parameters of a model, by name.

    Args:
        trained (`Mapping[str, nn.Parameter]`): The parameters.
        matrices (`Collection[str]`): Names of those that may be perturbed in a subspace.
        options ([`Options`]): Of the run.
        given (`Mapping`): By name and side what U and V are drawn in.
        sides (`Mapping`): By name the side of the inputs, of those whose V is to follow them.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        matrices: Any,
        options: Options,
        given: Mapping[str, Mapping[str, Tensor]],
        sides: Mapping[str, str],
    ):
        self.options, self._epoch = options, -1
        self.step = -1  # that is drawn
        self.weights: dict[str, Weight] = {}
        for name, p in trained.items():
            if name not in matrices or options.perturbation == "dense" or min(p.shape) <= options.rank:
                self.weights[name] = DenseWeight(name, p)
            elif name in sides:
                self.weights[name] = FollowingWeight(name, p, options.rank, given.get(name), sides[name])
            else:
                self.weights[name] = LowRankWeight(name, p, options.rank, given.get(name))
        self.by_id = {id(weight.W): weight for weight in self.weights.values()}

    @property
    def portable(self) -> bool:
        """Whether all directions are the same on every device."""
        return all(isinstance(weight, LowRankWeight) or weight.kept for weight in self.weights.values())  # type: ignore

    @property
    def bases(self) -> str:
        """A hash of what U and V are drawn in; empty where they are drawn freely."""
        given = [(w.name, side, P) for w in self.low_rank for side, P in w.given.items()]
        digest = blake2b(digest_size=16)
        for name, side, P in sorted(given, key=lambda entry: entry[:2]):
            digest.update(f"{name} {side} {tuple(P.shape)} ".encode() + P.contiguous().numpy().tobytes())
        return digest.hexdigest() if given else ""

    @property
    def matrices(self) -> str:
        """A hash of which are perturbed in subspaces, and of the side of those that follow inputs."""
        names = sorted(f"{weight.name} {getattr(weight, 'side', '')}" for weight in self.low_rank)
        return blake2b(",".join(names).encode(), digest_size=16).hexdigest()

    @property
    def low_rank(self) -> list[LowRankWeight]:
        """Those that are perturbed in subspaces."""
        return [weight for weight in self.weights.values() if isinstance(weight, LowRankWeight)]

    @property
    def following(self) -> list[FollowingWeight]:
        """Those whose V follows the inputs."""
        return [weight for weight in self.weights.values() if isinstance(weight, FollowingWeight)]

    @property
    def basis_bytes(self) -> int:
        """Bytes of U and V, and of what V that follows has seen."""
        drawn = sum(sum(w.W.shape) * w.rank * w.W.element_size() for w in self.low_rank)
        return drawn + sum(w.A_bytes for w in self.following)

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

    def follow_(self, steps: int) -> None:
        """After so many steps, move the V that follow inputs, if it is time."""
        if follows_after(steps, self.options.update_interval):
            for weight in self.following:
                weight.follow_()


def fingerprint(weights: Weights) -> str:
    """A hash of a few numbers of every weight, which tells it from another start. Reads the devices."""
    digest = blake2b(digest_size=16)
    for name, weight in sorted(weights.weights.items()):
        digest.update(f"{name} {tuple(weight.W.shape)} {weight.W.dtype} ".encode())
        digest.update(_few(weight).numpy().tobytes())
    return digest.hexdigest()


def means(weights: Weights) -> list[float]:
    """The mean of the same numbers for every weight, by which a distance can be told."""
    return [_few(weight).mean().item() for _, weight in sorted(weights.weights.items())]


def _few(weight: Weight) -> Tensor:
    W = weight.W.detach()
    return W.reshape(-1)[:: max(1, W.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.float64)
