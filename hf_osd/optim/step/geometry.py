"""Facts of a parameter that are settled before its first step: shape, side, rank, precision and seed.

They follow from its group and tensor, so they are never saved. Letters and shapes as in `subspace.operators`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...subspace import LinearOperator, effective_rank, operator_of
from ..options.mode import why_whole
from .rows import Rows, rows_of
from .sharding import Sharding, sharding_of
from .sides import FULL_SIZE
from .stacks import lies_whole, local_experts, sharding_of_expert


SEEDS_APART = 1_000_003  # between the seeds of two groups' parameters of one position
# Far from other parameters' seeds, and different in the 32 bits that torch's generator takes.
EXPERTS_APART = 15_485_863


@dataclass(frozen=True)
class Geometry:
    """Facts of a parameter that is stepped at full size, unless it is a [`ProjectedGeometry`].

    Attributes:
        name (`str`): Its name where the groups have names, else its position.
        shape (`tuple[int, ...]`): Its shape, of all processes together.
        compute_dtype (`torch.dtype`): float32, or float64 for a float64 parameter.
        seed (`int`): Seed of all that is random for this parameter, the same on all processes.
        sharding ([`Sharding`], *optional*): How it is divided among processes.
        holder (`str`, *optional*): The weight in whose state its P is, where that is learned from activations.
        rows ([`Rows`], *optional*): How P and its moments are divided among processes, where they are.
    """

    name: str
    shape: tuple[int, ...]
    compute_dtype: torch.dtype
    seed: int
    sharding: Sharding | None = field(default=None, kw_only=True)
    holder: str | None = field(default=None, kw_only=True)
    rows: Rows | None = field(default=None, kw_only=True)

    @property
    def update_shape(self) -> tuple[int, ...]:
        """Shape that the weight's rule works in."""
        return self.shape

    @property
    def holds_projection(self) -> bool:
        """Whether there is a P in its state."""
        return False

    @property
    def stacked(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return False

    @property
    def scattered(self) -> bool:
        """Whether these are on different processes, each of them whole."""
        return False


@dataclass(frozen=True)
class ProjectedGeometry(Geometry):
    """Facts of a projected weight (m, n), or of a stack (E, m, n) of experts' weights.

    Apart from `shape`, `matrices` and `stacked`, everything tells of one matrix.

    Attributes:
        side (`str`): `"left"`, `"right"` or `"two_sided"`.
        rank (`int`): r.
        projection_dtype (`torch.dtype`): How P is kept between steps.
    """

    side: str
    rank: int
    projection_dtype: torch.dtype

    @cached_property
    def op(self) -> LinearOperator:
        """The operator of the side."""
        return operator_of(self.side, self.size[0])

    @property
    def size(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.shape[-2:]
        return m, n

    @property
    def stacked(self) -> bool:
        """Whether it is a stack."""
        return len(self.shape) == 3

    @property
    def matrices(self) -> int:
        """E, or 1."""
        return self.shape[0] if self.stacked else 1

    @property
    def holds_projection(self) -> bool:  # noqa: D102 - see Geometry
        return self.holder in (None, self.name)

    @property
    def two_sided(self) -> bool:
        """Whether both dimensions are projected, by two factors that lie below each other in P."""
        return self.side == "two_sided"

    @property
    def divisible(self) -> bool:
        """Whether rows of P may be divided, here or where a checkpoint goes on: 8-bit blocks end with them then."""
        return not self.stacked and self.sharding is not None and self.sharding.dim is not None

    @property
    def factor_rows(self) -> tuple[int, ...]:
        """Rows of each factor of P."""
        return self.size if self.two_sided else (self.op.projected_size(*self.size),)

    @cached_property
    def full_scale(self) -> float:
        """sqrt(s/r), for each factor of P: by it up(D) has the root mean square of D."""
        return math.prod(rows / self.rank for rows in self.factor_rows) ** 0.5

    @property
    def update_shape(self) -> tuple[int, ...]:
        """Shape of R."""
        return self.op.low_rank_shape(*self.size, self.rank)

    @property
    def projection_shape(self) -> tuple[int, int]:
        """Shape of P."""
        return (self.op.projected_size(*self.size), self.rank)

    @property
    def scattered(self) -> bool:  # noqa: D102
        return self.stacked and lies_whole(self.sharding)

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """The places in the stack of the experts that are on this process."""
        if self.scattered:
            assert self.sharding is not None
            return local_experts(self.sharding, self.matrices)
        return tuple(range(self.matrices))

    @cached_property
    def sharding_of_expert(self) -> Sharding | None:
        """How the matrix of each expert lies; `None` for one that is on this process alone."""
        return sharding_of_expert(self.sharding)

    def expert(self, e: int) -> "ProjectedGeometry":
        """Facts of one expert's matrix in a stack, wherever it is."""
        name, seed = f"{self.name}[{e}]", self.seed + e * EXPERTS_APART
        return replace(self, name=name, shape=self.size, seed=seed, sharding=self.sharding_of_expert)


def names_of(group: Mapping[str, Any], position: int) -> list[str]:
    """The names of a group's parameters; by position over all groups where it has none."""
    names = group.get("param_names")
    return list(names) if names else [f"parameter {position + index}" for index in range(len(group["params"]))]


def name_again(group: dict[str, Any], met: Mapping[Tensor, tuple[Geometry, Mapping[str, Any]]]) -> None:
    """Let the names and sides of a group be those of its parameters, where users have taken some out of it."""
    own = [met[p][0] if p in met and met[p][1] is group else None for p in group["params"]]
    for key, attribute in (("param_names", "name"), ("sides", "side")):
        stored = group.get(key)
        if stored is None:
            continue
        if len(stored) != len(own) and None in own:
            raise ValueError("A parameter group was given parameters by hand: use `add_param_group`.")
        group[key] = [
            stored[index] if geometry is None else getattr(geometry, attribute, FULL_SIZE)
            for index, geometry in enumerate(own)
        ]


def geometry_of(group: Mapping[str, Any], index: int, p: Tensor, position: int, divide: bool = False) -> Geometry:
    """The geometry of `p`, which is, or was when the group was saved, `group["params"][index]`.

    Args:
        group (`dict`): A group that has been settled, live or saved.
        index (`int`): Place in the group.
        p (`torch.Tensor`): The parameter, on any device.
        position (`int`): Place over all groups.
        divide (`bool`, *optional*, defaults to `False`): Whether processes are to divide P, where they can.
    """
    name = names_of(group, position - index)[index]
    compute_dtype, sharding = torch.promote_types(p.dtype, torch.float32), sharding_of(p, name)
    seed = group["seed"] * SEEDS_APART + position
    if group["rank"] is None or group["sides"][index] == FULL_SIZE:
        return Geometry(name, tuple(p.shape), compute_dtype, seed, sharding=sharding)
    geometry = ProjectedGeometry(
        name,
        tuple(p.shape),
        compute_dtype,
        seed,
        side=group["sides"][index],
        rank=effective_rank(group["rank"], *p.shape[-2:]),
        projection_dtype=getattr(torch, group["projection_dtype"]) if group["projection_dtype"] else compute_dtype,
        sharding=sharding,
        holder=group["inputs"][index] if group.get("inputs") else None,
    )
    if not divide or sharding is None or not geometry.divisible or why_whole(group) is not None:
        return geometry
    return replace(geometry, rows=rows_of(sharding, geometry.projection_shape[0]))
