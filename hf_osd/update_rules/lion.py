"""Lion's direction (Chen et al. 2023, arXiv 2302.06675)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declare import betas, option
from .adamw import BETAS
from .protocol import Moment, RuleStep


@dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum. The betas, of that interpolation and of its decay, are the paper's."""

    elementwise: ClassVar[bool] = True
    stackable: ClassVar[bool] = True

    betas: tuple[float, float] = option((0.9, 0.99), BETAS, check=betas(), argument="adam_beta1 and adam_beta2")

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """`exp_avg`, in the shape of the gradient."""
        return (Moment("exp_avg", shape, signed=True),)

    def carry(self, moments: dict[str, Tensor], turn: Callable[..., Tensor], step: Tensor) -> None:
        """The momentum into another basis."""
        moments["exp_avg"].copy_(turn(moments["exp_avg"]))

    def direction(self, G: Tensor, now: RuleStep) -> Tensor:
        """Entries are -1, 0 and 1."""
        m, check = now.moments["exp_avg"], now.check
        G = G.masked_fill(check.skip, 0.0)
        # D  = sign(beta1 m + (1 - beta1) G)
        D = torch.lerp(m, G, 1 - self.betas[0]).sign_().mul_(check.keep)
        # m <- beta2 m + (1 - beta2) G
        m.lerp_(G, (1 - self.betas[1]) * check.keep)
        return D
