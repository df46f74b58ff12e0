"""`Projection`: P of one weight, with what is needed to use it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..subspace import operator_of
from .checks import numel


DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # how an optimizer keeps P
MOMENT_DTYPES = (*DTYPES, torch.uint8)


@dataclass(frozen=True, eq=False)
class Projection:
    """P of one weight W (m, n), or of a stack (E, m, n) of experts' weights. Letters as in `subspace.operators`.

    Attributes:
        projection (`torch.Tensor`):
            P: (m, r) on the left side, (n, r) on the right, (m + n, r) with two sides. Of a stack (E, m, r) and so on,
            zero for an expert that has had no tokens yet.
        side (`str`): `"left"`, `"right"` or `"two_sided"`.
        rank (`int`): r.
        shape (`tuple[int, ...]`): (m, n) or (E, m, n).
        moments (`dict[str, torch.Tensor]`, *optional*):
            The other entries of the weight's optimizer state, by their names there and in their format (8-bit moments
            as codes), or nothing. The seed or the indices that some rules make P from are none of them.
        holder (`str`, *optional*):
            Name of another weight whose P this is, where layers that are given one input share it
            (`source="activations"`).
    """

    projection: Tensor
    side: str
    rank: int
    shape: tuple[int, ...]
    moments: dict[str, Tensor] = field(default_factory=dict)
    holder: str | None = None

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """What of P has orthonormal columns: itself; with two sides P (m, r) and Q (n, r), which lie below each other.

        Views; of a stack each with the leading dimension.
        """
        return self.projection.split(self.shape[-2:], dim=-2) if self.side == "two_sided" else (self.projection,)


def projection_shape(side: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Shape of P."""
    *stack, m, n = shape
    return (*stack, operator_of(side, m).projected_size(m, n), rank)


def is_moment_shape(got: tuple[int, ...], side: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether a state entry can have this shape: a counter, a moment of R or of P, or a vector that belongs to one.

    Of a stack (E, m, n) it has a leading dimension E. Vectors are 8-bit scales and Adafactor's means. Which rule has
    which entries is left to the optimizer, so that a file stays readable when rules change.
    """
    *stack, m, n = shape
    if list(got[: len(stack)]) != stack:
        return False
    got = got[len(stack) :]
    own, low_rank = projection_shape(side, (m, n), rank), operator_of(side, m).low_rank_shape(m, n, rank)
    return got in ((), own, low_rank) or (len(got) == 1 and got[0] <= max(numel(own), numel(low_rank)))


def check_values(name: str, entry: Projection) -> None:
    """Raise `ValueError` unless shapes are those that side, rank and (m, n) ask for, and all values are finite."""
    shape = projection_shape(entry.side, entry.shape, entry.rank)
    if tuple(entry.projection.shape) != shape:
        raise ValueError(f"P of {name} must have the shape {shape}, got {tuple(entry.projection.shape)}.")
    if entry.projection.dtype not in DTYPES:
        raise ValueError(f"P of {name} must be one of {', '.join(map(str, DTYPES))}, got {entry.projection.dtype}.")
    for kind, value in entry.moments.items():
        fits = is_moment_shape(tuple(value.shape), entry.side, entry.shape, entry.rank)
        if not fits or value.dtype not in MOMENT_DTYPES:
            raise ValueError(f"{kind} of {name} cannot be {value.dtype} of shape {tuple(value.shape)}.")
    for kind, value in (("P", entry.projection), *entry.moments.items()):
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{kind} of {name} has values that are not finite.")
