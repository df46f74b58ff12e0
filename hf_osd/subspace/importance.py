"""Sampled singular vectors (I3S, arXiv 2502.05790), so that the subspace does not freeze to the dominant one.

Of the left singular vectors of X (G on the left side, Gᵀ on the right), r are drawn without replacement with
probabilities proportional to their singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .initialization import singular_vectors
from .protocol import Renewed, Start


@dataclass(frozen=True)
class Importance(Renewed):
    """P is drawn from the singular vectors of the gradient at steps 0, k, 2k, ....

    An SVD each time, as with `svd`. The exact one draws among all min(m, n) singular vectors, the randomized one
    (`init="randomized_svd"`, and `"auto"` for large matrices) among the top 2 r. The state is P, s x r.
    """

    def make(self, G: Tensor, start: Start, old: Tensor | None) -> Tensor:
        """The vectors drawn, in order of their singular values."""
        if start.init == "orthonormal":
            return super().make(G, start, old)
        X = (G if start.side == "left" else G.mT).to(start.dtype)
        U, S = singular_vectors(X, min(2 * start.rank, *G.shape), start.init, start.seed)
        # Drawn on the CPU: one seed gives the same draw on every device. Vectors without weight come last.
        weights = S.double().div(S.max()).clamp(min=1e-12).cpu()
        generator = torch.Generator("cpu").manual_seed((start.seed + start.steps) % 2**63)
        drawn = torch.multinomial(weights, start.rank, generator=generator).sort().values
        return U[:, drawn.to(U.device)].contiguous()
