"""A projection that never moves: the control that the other rules are measured against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Static:
    """P stays what it was at the first step."""

    learns: ClassVar[bool] = False

    def refresh_due(self, count: int) -> bool:
        """Never."""
        return False

    def advance_(self, P: Tensor, A: Tensor, inv_norm2: Tensor, descend: Callable[[Tensor], None]) -> None:
        """Nothing moves."""
