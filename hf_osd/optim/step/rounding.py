"""Stochastic rounding of the update of bfloat16 weights (Gupta et al. 2015, arXiv 1502.02551).

bfloat16 keeps 8 significant bits: a step below 1/512 of a weight is rounded away, and so is every one that follows.
Rounded up or down at random, with probabilities that make the mean exact, steps of any size add up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.int8 import Int8Weight
from ...subspace import LinearOperator
from ...subspace.precision import full_precision
from .gradients import PIECE
from .low_rank import Update


def refuse_without_bfloat16(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` if rounding is asked for and no parameter of any group would be rounded."""
    asked = any(group["stochastic_rounding"] for group in groups)
    if asked and not any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        raise ValueError(
            "`stochastic_rounding` has no effect: no parameter is bfloat16. Load the model with dtype=torch.bfloat16, "
            "or leave it out."
        )


class Rounding(NamedTuple):
    """How an update is rounded into a weight.

    Attributes:
        noise (`torch.Generator`): The random numbers of this step of this parameter.
        decay (`torch.Tensor`, *optional*): Factor on W, 0-dim.
    """

    noise: torch.Generator
    decay: Tensor | None


def noise_of(device: torch.device, seed: int, count: int) -> torch.Generator:
    """The random numbers of a parameter's step.

    They depend on seed, position and step alone: the same on all processes and after a resume, from what the host
    knows, and the global generators are not touched.

    Args:
        device (`torch.device`): Of the parameter.
        seed (`int`): The parameter's.
        count (`int`): Its steps so far, skipped ones included.
    """
    # Hashed, because a generator on the CPU looks at the low 32 bits of its seed only.
    digest = blake2b(f"{seed} {count}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def add_rounded_(
    W: Tensor,  # bfloat16
    add_: Callable[[Tensor, slice], object],  # adds the update of the rows W[slice] to its first argument, in place
    rounding: Rounding,
) -> None:
    """W <- round(decay W + update), rounded once, with float32 temporaries of a few rows."""
    W = torch.atleast_1d(W)
    for piece in pieces(W):
        X = W[piece].to(torch.float32)
        if rounding.decay is not None:
            X.mul_(rounding.decay)
        add_(X, piece)
        round_into_(W[piece], X, rounding.noise)


def pieces(W: Tensor) -> Iterator[slice]:
    """The rows of W (at least one dimension), a few at a time, in order."""
    rows = max(1, PIECE // max(1, W[:1].numel()))
    for start in range(0, W.shape[0], rows):
        yield slice(start, min(start + rows, W.shape[0]))


def add_to_int8_(W: Int8Weight, op: LinearOperator, update: Update, alpha: float, rounding: Rounding) -> None:
    """W <- round(decay W + alpha (up(D, P) + S)), rounded once, with float32 temporaries of a few rows.

    Of the rows of W = diag(s) K, in units of their scales s: X = decay K + diag(alpha / s) (up(D, P) + S). Where W is
    read in bfloat16 so are the factors of up(D, P), as for a bfloat16 W: 0.3% of a step, without bias, is far below
    what rounding adds.
    """
    D, P, add_rest = update
    left, right = (P, D) if op.long_dim else (D, P.t())
    narrow = W.dtype == torch.bfloat16
    right = right.to(torch.bfloat16) if narrow else right
    for rows in W.pieces():
        X = W.int_data[rows].to(D.dtype)
        if rounding.decay is not None:
            X.mul_(rounding.decay)
        rate = alpha / W.scale[rows, None]
        own = left[rows] * rate
        if narrow:
            X.add_(own.to(torch.bfloat16) @ right)
        else:
            with full_precision(X):
                X.addmm_(own, right)
        if add_rest is not None:
            add_rest(X, rows, rate)
        W.round_rows_(X, rows, rounding.noise)


def round_into_(W: Tensor, X: Tensor, noise: torch.Generator) -> None:
    """W <- X, up with probability (X - down) / (up - down), where down <= X <= up are neighbours in bfloat16.

    What bfloat16 can hold is kept, infinities and NaN included.
    """
    W.copy_(rounded(X[None], [noise])[0])


def rounded(X: Tensor, noises: Sequence[torch.Generator]) -> Tensor:
    """What `round_into_` leaves of each of a stack (k, ...), by numbers of its own; in float32, as X is."""
    # bfloat16 is the upper half of float32's bits: 16 random bits are added below, and the carry decides
    bits = torch.empty(X.shape, dtype=torch.int32, device=X.device)
    for own, noise in zip(bits, noises, strict=True):
        own.random_(0, 1 << 16, generator=noise)
    bits.add_(X.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(X.isnan(), X, bits.view(torch.float32))  # a carry could make a number of NaN
