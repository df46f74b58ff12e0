"""Gradient descent with momentum, as `torch.optim.SGD` without dampening."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .protocol import Moment, RuleStep


@dataclass(frozen=True)
class SGD:
    """Heavy-ball momentum.

    Args:
        momentum (`float`, *optional*, defaults to 0.9): Decay of the momentum; 0 keeps no state.
    """

    elementwise: ClassVar[bool] = True

    momentum: float = 0.9

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """`momentum_buffer`, in the shape of the gradient; nothing without momentum."""
        return (Moment("momentum_buffer", shape, signed=True),) if self.momentum else ()

    def carry(self, moments: dict[str, Tensor], turn: Callable[..., Tensor], step: Tensor) -> None:
        """The momentum into another basis."""
        for b in moments.values():
            b.copy_(turn(b))

    def direction(self, G: Tensor, now: RuleStep) -> Tensor:
        """The momentum, or the gradient itself."""
        G = G.masked_fill(now.check.skip, 0.0)
        if not self.momentum:
            return G
        b, keep = now.moments["momentum_buffer"], now.check.keep
        # b <- momentum b + G
        # D  = b
        b.mul_(1 - (1 - self.momentum) * keep).add_(G)
        return b * keep
