"""Adafactor's direction (Shazeer and Stern 2018, arXiv 1804.04235) with a fixed learning rate and no first moment.

What `transformers.optimization.Adafactor(scale_parameter=False, relative_step=False)` computes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .protocol import Moment, RuleStep


@dataclass(frozen=True)
class Adafactor:
    """A second moment kept as its row and column means.

    Args:
        eps1 (`float`, *optional*, defaults to 1e-30): Added to squared gradients, the paper's.
        clip_threshold (`float`, *optional*, defaults to 1.0): Largest root mean square of a direction, the paper's.
        decay_rate (`float`, *optional*, defaults to -0.8): beta2 at step t is 1 - t^decay_rate, the paper's.
    """

    elementwise: ClassVar[bool] = False
    stackable: ClassVar[bool] = False

    eps1: float = 1e-30
    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """`exp_avg_sq_row` and `exp_avg_sq_col` for matrices, `exp_avg_sq` for vectors."""
        if len(shape) < 2:
            return (Moment("exp_avg_sq", shape, signed=False),)
        *dims, rows, columns = range(len(shape))
        return (
            Moment("exp_avg_sq_row", shape[:-1], signed=False, dims=(*dims, rows)),
            Moment("exp_avg_sq_col", shape[:-2] + shape[-1:], signed=False, dims=(*dims, columns)),
        )

    def direction(self, G: Tensor, now: RuleStep) -> Tensor:
        """G over the root of the factored second moment, its root mean square clipped."""
        moments, check, step = now.moments, now.check, now.step
        assert isinstance(step, Tensor)  # for it is not stackable
        G = G.masked_fill(check.skip, 0.0)
        # 1 - beta2 = t^decay_rate; t is 0 only when the first gradient ever is skipped, and then nothing is kept
        new = step.clamp(min=1.0).to(G.dtype).pow(self.decay_rate) * check.keep
        if G.ndim < 2:
            v = moments["exp_avg_sq"].lerp_(G.square().add_(self.eps1), new)
            D = v.rsqrt().mul_(G)
        else:
            # row <- beta2 row + (1 - beta2) mean_j(G² + eps1), col likewise over i
            row = moments["exp_avg_sq_row"].lerp_(self._mean_square(G, -1), new)
            col = moments["exp_avg_sq_col"].lerp_(self._mean_square(G, -2), new)
            # D = G / sqrt(row col / mean(row))
            D = G * (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
            D.mul_(col.rsqrt().unsqueeze(-2))
        # D <- D / max(1, rms(D) / clip_threshold)
        rms = torch.linalg.vector_norm(D) / D.numel() ** 0.5
        return D.div_((rms / self.clip_threshold).clamp(min=1.0)).masked_fill_(check.skip, 0.0)

    def _mean_square(self, G: Tensor, dim: int) -> Tensor:
        # A norm reads G once; G² would be a temporary of its size.
        return torch.linalg.vector_norm(G, dim=dim).square() / G.shape[dim] + self.eps1
