"""GaLore's rule (Zhao et al. 2024, arXiv 2403.03507): P is the top singular vectors of every k-th gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PeriodicSVD:
    """P is computed anew from the gradient at steps 0, k, 2k, ...; the moments are kept as they are, as GaLore does.

    Args:
        update_interval (`int`, *optional*, defaults to 200):
            k, GaLore's `update_proj_gap`.
    """

    learns: ClassVar[bool] = False

    update_interval: int = 200

    def refresh_due(self, count: int) -> bool:
        """At every `update_interval`-th step."""
        return count % self.update_interval == 0

    def advance_(self, P: Tensor, A: Tensor, inv_norm2: Tensor, descend: Callable[[Tensor], None]) -> None:
        """P only changes where `refresh_due` says so."""
