"""Gradient descent with momentum, as `torch.optim.SGD` without dampening."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..declare import number, option
from .protocol import Moment, RuleStep


@dataclass(frozen=True)
class SGD:
    """Heavy-ball momentum."""

    elementwise: ClassVar[bool] = True
    stackable: ClassVar[bool] = True

    momentum: float = option(
        0.9, "Decay of SGD's momentum, in both roles; 0 keeps no state.", check=number(0, below=1)
    )

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
