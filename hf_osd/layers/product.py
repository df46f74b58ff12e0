"""The product of a linear layer whose backward pass makes R, and never the gradient of the weight.

Letters and shapes as in `subspace.operators`; x (T, n) are the layer's inputs, one row for each of T tokens, and dY
(T, m) the gradients of its outputs y = x Wᵀ + b. The gradient would be G = dYᵀ x, so

    R = G P = dYᵀ (x P)

needs x P (T, r) alone, which is all that is kept of x. Where there is a residual x P and R stand here for what comes
beside them as well, see `outside`. `Conv1D` stores Wᵀ: there R = Pᵀ G = (x P)ᵀ dY, on the left side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..subspace.precision import full_precision
from .int8 import plain
from .shared_input import Seen


class SubspaceProduct(torch.autograd.Function):
    """y = x Wᵀ + b. The gradient of the stand-in B, shaped like R, is R; W gets none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        B: Tensor,
        xP: Tensor,
        transposed: bool,
        kept: Seen | None = None,
    ) -> Tensor:
        """Plain product: neither P nor B has a part in it."""
        ctx.take, seen = kept or (None, ())
        ctx.save_for_backward(W, xP, *seen)
        ctx.transposed = transposed
        V = plain(W)  # freed on return, and made again in the backward pass
        return F.linear(x, V.t() if transposed else V, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of x as of any linear layer, of b if there is one, and R."""
        (dY,), (W, xP, *seen), needs = gradients, ctx.saved_tensors, ctx.needs_input_grad
        dx = None
        if needs[0]:
            V = plain(W).to(dY.dtype)  # autocast's copy in half precision is not kept since the forward pass
            dx = dY @ (V.t() if ctx.transposed else V)
        dY = dY.reshape(-1, dY.shape[-1])
        R = None
        if needs[3]:
            with full_precision(dY):
                xP = xP.to(dY.dtype)
                R = xP.t() @ dY if ctx.transposed else dY.t() @ xP
        db = dY.sum(0) if needs[2] else None
        if seen:  # last: a pass that has failed before leaves nothing
            ctx.take(seen)
        return dx, None, db, R, None, None, None
