"""GaLore's rule (Zhao et al. 2024, arXiv 2403.03507): P is the top singular vectors of every k-th gradient."""

from dataclasses import dataclass

from .protocol import SubspaceRule


@dataclass(frozen=True)
class PeriodicSVD(SubspaceRule):
    """P is computed anew from the gradient at steps 0, k, 2k, ... (GaLore, Algorithm 2).

    An exact SVD costs about 4 m n min(m, n) multiplications and more, the randomized one (`init="randomized_svd"`,
    and `"auto"` for large matrices) some 6 products with the gradient. The state is P, s x r.

    Args:
        update_interval (`int`, *optional*, defaults to 200):
            k, GaLore's `update_proj_gap`.
    """

    update_interval: int = 200

    def refresh_due(self, count: int) -> bool:
        """At every `update_interval`-th step."""
        return count % self.update_interval == 0
