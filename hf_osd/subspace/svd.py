"""GaLore's rule (Zhao et al. 2024, arXiv 2403.03507): P is the top singular vectors of every k-th gradient."""

from dataclasses import dataclass

from .protocol import Renewed


@dataclass(frozen=True)
class PeriodicSVD(Renewed):
    """P is computed anew from the gradient at steps 0, k, 2k, ... (GaLore, Algorithm 2).

    An exact SVD costs about 4 m n min(m, n) multiplications and more, the randomized one (`init="randomized_svd"`,
    and `"auto"` for large matrices) some 6 products with the gradient. The state is P, s x r.
    """
