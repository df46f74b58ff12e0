"""One step of a parameter that is not projected: W <- (1 - lr weight_decay) W - lr weight_rule(G)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from .algorithm import ONLY, Turn
from .moments import Pace, add_decayed_, add_times_
from .movement import Movements
from .rounding import PIECE, add_rounded_, pieces
from .weight import Weight


class FullWeight(Weight):
    """A parameter of any shape that is stepped at full size."""

    def project(self, G: Tensor, check: GradientCheck, turn: Turn = ONLY) -> Tensor:
        """G itself."""
        return G

    def update(self, G: Tensor, check: GradientCheck, movements: Movements) -> None:
        """W <- (1 - lr weight_decay) W - lr rule(G), in pieces where the rule can."""
        if G.shape != self.geometry.shape:
            self.refuse_other_shape(G)
        self.slot.state["step"].add_(check.keep)
        self.count += 1
        lr, weight_decay = self.group["lr"], self.group["weight_decay"]
        rounds = self.group["stochastic_rounding"] and self.p.dtype == torch.bfloat16
        rounding = self._rounding(check) if rounds else None
        if self.moments.in_rows and self.p.numel() > PIECE:
            for rows, D in self.moments.by_rows(G, check, list(pieces(self.p))):
                if rounding is None:
                    add_decayed_(self.p[rows], D, Pace(check, lr, weight_decay))
                else:
                    add_rounded_(self.p[rows], partial(_add_rows, D, -lr), rounding)
            return
        for piece in flat_pieces(self.p, G, self.moments.rule.elementwise):
            W, part = (self.p, G) if piece is None else (self.p.view(-1)[piece], G.view(-1)[piece])
            part = part.to(self.geometry.compute_dtype)
            if rounding is None:
                self.moments.update_(W, part, Pace(check, lr, weight_decay, piece))
            else:
                D = torch.atleast_1d(self.moments.direction(part, check, piece))
                add_rounded_(W, partial(_add_rows, D, -lr), rounding)


def _add_rows(D: Tensor, rate: float | Tensor, X: Tensor, rows: slice) -> None:
    add_times_(X, D[rows], rate)


def flat_pieces(p: Tensor, G: Tensor, elementwise: bool) -> Iterator[slice | None]:
    """Flat slices to work through a large parameter by; `None` where it is taken whole."""
    whole = p.numel() <= PIECE or not elementwise
    if whole or not (p.is_contiguous() and G.is_contiguous()):
        yield None
        return
    for start in range(0, p.numel(), PIECE):
        yield slice(start, min(start + PIECE, p.numel()))
