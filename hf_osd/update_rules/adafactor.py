"""Adafactor's direction (Shazeer and Stern 2018, arXiv 1804.04235) with a fixed learning rate and no first moment.

What `transformers.optimization.Adafactor(scale_parameter=False, relative_step=False)` computes.
"""

from collections.abc import Iterator, Sequence
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
        check = now.check
        G = G.masked_fill(check.skip, 0.0)
        if G.ndim < 2:
            v = now.moments["exp_avg_sq"].lerp_(G.square().add_(self.eps1), self._share_of_new(now, G.dtype))
            D = v.rsqrt().mul_(G)
        else:
            by_row, by_column = self._factors(_square(G, -1), _square(G, -2), now)
            D = (G * by_row.unsqueeze(-1)).mul_(by_column.unsqueeze(-2))
        return D.div_(self._excess(torch.linalg.vector_norm(D), D.numel())).masked_fill_(check.skip, 0.0)

    def by_rows(
        self,
        G: Tensor,  # (m, n), of any precision
        rows: Sequence[slice],  # all of them
        dtype: torch.dtype,  # precision of the computation
        now: RuleStep,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same of a large matrix, some rows at a time, with no temporaries but those: three passes over G."""

        def part(piece: slice) -> Tensor:
            return G[piece].to(dtype, copy=True).masked_fill_(now.check.skip, 0.0)

        def direction(piece: slice) -> Tensor:
            return part(piece).mul_(by_row[piece].unsqueeze(-1)).mul_(by_column)

        squares = [(_square(X, -1), _square(X, -2)) for X in map(part, rows)]
        by_rows, by_columns = zip(*squares, strict=True)
        by_row, by_column = self._factors(torch.cat(by_rows), torch.stack(by_columns).sum(0), now)
        norms = torch.stack([torch.linalg.vector_norm(direction(piece)) for piece in rows])
        excess = self._excess(torch.linalg.vector_norm(norms), G.numel())
        for piece in rows:
            yield piece, direction(piece).div_(excess).masked_fill_(now.check.skip, 0.0)

    def _share_of_new(self, now: RuleStep, dtype: torch.dtype) -> Tensor:
        assert isinstance(now.step, Tensor)  # for it is not stackable
        # 1 - beta2 = t^decay_rate; t is 0 only when the first gradient ever is skipped, and then nothing is kept
        return now.step.clamp(min=1.0).to(dtype).pow(self.decay_rate) * now.check.keep

    def _factors(self, row2: Tensor, col2: Tensor, now: RuleStep) -> tuple[Tensor, Tensor]:
        """What rows and columns of G are multiplied with, of the sums of their squares."""
        new, (rows, columns) = self._share_of_new(now, row2.dtype), (row2.shape[-1], col2.shape[-1])
        # row <- beta2 row + (1 - beta2) mean_j(G² + eps1), col likewise over i
        row = now.moments["exp_avg_sq_row"].lerp_(row2 / columns + self.eps1, new)
        col = now.moments["exp_avg_sq_col"].lerp_(col2 / rows + self.eps1, new)
        # D = G / sqrt(row col / mean(row))
        return (row / row.mean(dim=-1, keepdim=True)).rsqrt(), col.rsqrt()

    def _excess(self, norm: Tensor, entries: int) -> Tensor:
        # D <- D / max(1, rms(D) / clip_threshold)
        return (norm / entries**0.5 / self.clip_threshold).clamp(min=1.0)


def _square(G: Tensor, dim: int) -> Tensor:
    # A norm reads G once; G² would be a temporary of its size.
    return torch.linalg.vector_norm(G, dim=dim).square()
