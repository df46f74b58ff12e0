"""Adam's direction (Kingma and Ba 2015, arXiv 1412.6980). AdamW's decoupled decay is the optimizer's part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..declare import betas, number, option
from .protocol import Moment, RuleStep


BETAS = (
    "Decay rates of the moments, in both roles.\n\n"
    "Where the rules of W and P have other default ones, schedules such as `OneCycleLR` cycle those that are given."
)


@dataclass(frozen=True)
class AdamW:
    """Adam with bias correction. The defaults are torch's."""

    elementwise: ClassVar[bool] = True
    stackable: ClassVar[bool] = True

    betas: tuple[float, float] = option((0.9, 0.999), BETAS, check=betas(), argument="adam_beta1 and adam_beta2")
    eps: float = option(
        1e-8, "Added to the root of the second moment, in both roles.", check=number(0), argument="adam_epsilon"
    )

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """`exp_avg` and `exp_avg_sq`, both in the shape of the gradient."""
        return (Moment("exp_avg", shape, signed=True), Moment("exp_avg_sq", shape, signed=False))

    def carry(self, moments: dict[str, Tensor], turn: Callable[..., Tensor], step: Tensor) -> None:
        """Both moments into another basis: LDAdam's projection-aware update (arXiv 2410.16103, Algorithm 2).

        The second moment is a variance plus the square of the mean. Variances go through squared overlaps, as if the
        entries of the gradient were independent.
        """
        m, v = moments["exp_avg"], moments["exp_avg_sq"]
        t = step.clamp(min=1).to(m.dtype)
        b1, b2 = 1 - self.betas[0] ** t, 1 - self.betas[1] ** t
        # m <- Q m
        # v <- (1 - beta2^t) | Q² (v / (1 - beta2^t) - m̂²) + (Q m̂)² |,    m̂ = m / (1 - beta1^t)
        mean, variance = turn(m / b1), v / b2 - (m / b1).square()
        m.copy_(mean).mul_(b1)
        v.copy_(turn(variance, square=True).add_(mean.square_()).abs_()).mul_(b2)

    def direction(self, G: Tensor, now: RuleStep) -> Tensor:
        """One pass of torch's fused kernel over a zero tensor, which `found_inf` stops on the device."""
        D = torch.zeros_like(G, memory_format=torch.contiguous_format)
        self.update_(D, G, now)
        return D

    def update_(self, W: Tensor, G: Tensor, now: RuleStep) -> None:
        """W <- (1 - lr weight_decay) W - lr D, in the same pass; nothing where now.check.skip."""
        # m <- beta1 m + (1 - beta1) G
        # v <- beta2 v + (1 - beta2) G²
        # D  = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        m, v, check = now.moments["exp_avg"], now.moments["exp_avg_sq"], now.check
        tensors = (W, G.contiguous(), m, v)  # the kernel walks memory, and the moments are contiguous
        stack = isinstance(now.step, list)
        Ws, Gs, ms, vs = map(torch.unbind, tensors) if stack else zip(tensors, strict=True)
        torch._fused_adamw_(
            Ws,
            Gs,
            ms,
            vs,
            (),
            now.step if isinstance(now.step, list) else [now.step],
            lr=now.lr,  # type: ignore[arg-type]  # one of two overloads
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=now.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=None if stack else check.found_inf,  # it takes one for all
        )
        if stack:
            W.masked_fill_(check.skip, 0.0)
