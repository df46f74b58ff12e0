"""What the optimizer derives from a group and a parameter: helper objects, rebuilt at will and never saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...subspace import (
    LinearOperator,
    choose_side,
    effective_rank,
    operator_of,
)
from ..options.rules import Rules, rules_of  # noqa: F401 - `rules_of` for the rest of this folder
from .sharding import FLAT, Sharding, local, sharding_of


COUNTERS = ("step", "skipped_steps", "idle_steps")  # of a state: all the steps that the host has counted


@dataclass
class Plan:
    """How one parameter is stepped: at full size, unless it is a [`ProjectedPlan`].

    Attributes:
        name (`str`): Its name where the groups have names, else its position.
        shape (`tuple[int, ...]`): Its shape, of all processes together.
        compute_dtype (`torch.dtype`): float32, or float64 for a float64 parameter.
        seed (`int`): Seed of what is random for this parameter, the same on all processes.
        count (`int`): Steps so far, skipped ones included; what the host knows without asking the device.
        stacked (`bool`): Whether it is a [`StackedPlan`].
        sharding ([`Sharding`], *optional*): How it is divided among processes.
    """

    stacked: ClassVar[bool] = False

    name: str
    shape: tuple[int, ...]
    compute_dtype: torch.dtype
    seed: int
    count: int = field(default=0, kw_only=True)
    sharding: Sharding | None = field(default=None, kw_only=True)

    @property
    def update_shape(self) -> tuple[int, ...]:
        """Shape that the weight's rule works in."""
        return self.shape


@dataclass
class ProjectedPlan(Plan):
    """How one projected weight (m, n) is stepped.

    Attributes:
        side (`str`): `"left"`, `"right"` or `"two_sided"`.
        rank (`int`): r.
        projection_dtype (`torch.dtype`): How P is kept between steps.
        started (`bool`): Whether P has been initialised.
        idle (`int`):
            Of an expert, how many of the `count` steps were without tokens, as far as the host knows: it asks where
            the number decides.
        doubtful (`bool`):
            Whether `idle` counts the coming step, of which so far only gradients without tokens are known.
        expanded (`torch.Tensor`, *optional*): P, where the state keeps what it is made from instead.
    """

    side: str
    rank: int
    projection_dtype: torch.dtype
    started: bool = False
    idle: int = 0
    doubtful: bool = False
    expanded: Tensor | None = None

    def end_step(self) -> None:
        """Count a step."""
        self.count, self.doubtful = self.count + 1, False

    @cached_property
    def op(self) -> LinearOperator:
        """The operator of the side."""
        return operator_of(self.side, self.size[0])

    @property
    def two_sided(self) -> bool:
        """Whether both dimensions are projected, by two factors that lie below each other in P."""
        return self.side == "two_sided"

    @property
    def factor_rows(self) -> tuple[int, ...]:
        """Rows of each factor of P."""
        return self.size if self.two_sided else (self.op.projected_size(*self.size),)

    @property
    def size(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.shape[-2:]
        return m, n

    @property
    def matrices(self) -> int:
        """How many there are in the parameter."""
        return 1

    @property
    def complete(self) -> bool:
        """Whether every matrix's P has been initialised."""
        return self.started

    @property
    def update_shape(self) -> tuple[int, ...]:
        """Shape of R."""
        return self.op.low_rank_shape(*self.size, self.rank)

    @property
    def projection_shape(self) -> tuple[int, int]:
        """Shape of P."""
        return (self.op.projected_size(*self.size), self.rank)


@dataclass
class StackedPlan(ProjectedPlan):
    """How a stack (E, m, n) of experts' matrices is stepped: each by a plan of its own.

    Its state has the entries of one matrix with a leading dimension E, and `idle_steps`. `shape` is (E, m, n), what is
    inherited otherwise tells of one matrix, `started` whether any P has been initialised.

    Attributes:
        experts (`list[ProjectedPlan]`): E plans that differ in name and seed, and in when they started.
    """

    stacked: ClassVar[bool] = True

    experts: list[ProjectedPlan] = field(default_factory=list)

    @property
    def matrices(self) -> int:
        """E."""
        return len(self.experts)

    @property
    def complete(self) -> bool:
        """Whether every expert's P has been initialised."""
        return all(expert.started for expert in self.experts)


def names_of(group: Mapping[str, Any], position: int) -> list[str]:
    """The names of a group's parameters; by position over all groups where it has none."""
    names = group.get("param_names")
    return list(names) if names else [f"parameter {position + index}" for index in range(len(group["params"]))]


def make_plan(group: Mapping[str, Any], index: int, p: Tensor, position: int) -> Plan:
    """The plan of `group["params"][index]`; `position` counts parameters over all groups."""
    name = names_of(group, position - index)[index]
    compute_dtype, sharding = torch.promote_types(p.dtype, torch.float32), sharding_of(p, name)
    seed = group["seed"] * 1_000_003 + position
    if group["rank"] is None:
        return Plan(name, tuple(p.shape), compute_dtype, seed, sharding=sharding)
    m, n = p.shape[-2:]
    plan = ProjectedPlan(
        name,
        (m, n),
        compute_dtype,
        seed,
        side=group["sides"][index],
        rank=effective_rank(group["rank"], m, n),
        projection_dtype=getattr(torch, group["projection_dtype"]) if group["projection_dtype"] else compute_dtype,
        sharding=sharding,
    )
    if p.ndim == 2:
        return plan
    # far from other parameters' seeds, and different in the 32 bits that torch's generator takes
    experts = [replace(plan, name=f"{name}[{e}]", seed=plan.seed + e * 15_485_863) for e in range(len(p))]
    return StackedPlan(**{**vars(plan), "shape": tuple(p.shape)}, experts=experts)


def resume_plan(plan: Plan, state: Mapping[str, Tensor] | None, rules: Rules) -> Plan:
    """The plan with what a state that exists already tells. Reads the device: this happens once after a load."""
    if not state:
        return plan
    counters = [state[name].reshape(-1).tolist() for name in COUNTERS if name in state]
    matrices = plan.experts if isinstance(plan, StackedPlan) else [plan]
    for e, (matrix, (step, skipped, *idle)) in enumerate(zip(matrices, zip(*counters, strict=True), strict=True)):
        matrix.count = int(step + skipped + sum(idle))
        if isinstance(matrix, ProjectedPlan):
            # P may have been made in a step that was skipped in the end
            P = local(state[rules.subspace.code or "projection"])
            matrix.started = step > 0 or bool((P[e] if plan.stacked else P).any())
            matrix.idle = int(sum(idle))
    if isinstance(plan, StackedPlan):
        plan.started = any(expert.started for expert in plan.experts)
    return plan


def settle_sides(group: dict[str, Any], names: Sequence[str]) -> None:
    """Store the side of each matrix of a group. A plain tensor's never changes; a sharded one's comes when it is met.

    Raises:
        ValueError: For a side that would divide P, and for what has become of a matrix in an engine that flattens.
    """
    stored = group.get("sides") or [None] * len(names)
    sides: list[str] = []
    for name, p, side in zip(names, group["params"], stored, strict=True):
        if p.ndim not in (2, 3):
            raise ValueError(f"{name} was a matrix and has the shape {tuple(p.shape)} now. {FLAT}")
        sharding = sharding_of(p, name)
        if sharding is not None and p.ndim == 3:
            raise ValueError(
                f"{name} is a stack of experts' matrices and sharded, which OSD does not support as yet: leave it out "
                "of what is projected (`exclude_modules`), or use DDP."
            )
        if sharding is not None or side is None:
            divided = None if sharding is None else sharding.dim
            side = choose_side(p.shape[-2], p.shape[-1], group["side"], divided)
            if side == "two_sided" and sharding is not None:
                raise ValueError(
                    f"{name} is sharded, which side='two_sided' does not support: leave `side` out, or use DDP."
                )
            if (divided, side) in ((0, "left"), (1, "right")):  # the dimension that the side projects
                raise ValueError(
                    f"{name} is sharded in the dimension that side={side!r} projects: P would be divided, and every "
                    "step would exchange low-rank gradients. Leave `side` out."
                )
        if group["init"] == "given" and stored[0] is not None and side != stored[len(sides)]:
            raise ValueError(
                f"The P given as `init` for {name} is one of the {stored[len(sides)]} side, but the parameter is "
                f"sharded and projected on the {side}. Give P of that side, and side={side!r}."
            )
        sides.append(side)
    group["sides"] = sides


def given_projections(
    given: Mapping[str, Tensor] | Sequence[Tensor], group: Mapping[str, Any], names: list[str], position: int
) -> dict[str, Tensor]:
    """P_0 by name from what the user passed as `init`; `ValueError` unless every one is there and fits."""
    params = group["params"]
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"`init` has no P for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
        # A ProjectionState's entries hold P and what it was learned with
        tensors = [getattr(given[name], "projection", given[name]) for name in names]
    else:
        tensors = list(given)
        if len(tensors) != len(params):
            raise ValueError(f"`init` has {len(tensors)} tensors for {len(params)} parameters.")
    for index, (p, P) in enumerate(zip(params, tensors, strict=True)):
        plan = make_plan(group, index, p, position + index)
        assert isinstance(plan, ProjectedPlan)
        shape = (*plan.shape[:-2], *plan.projection_shape)
        if not isinstance(P, Tensor) or tuple(P.shape) != shape or not P.isfinite().all():
            got = f"shape {tuple(P.shape)}" if isinstance(P, Tensor) else type(P).__name__
            raise ValueError(
                f"`init` for {names[index]} must be a finite tensor of shape {shape}, got {got}: give the rank "
                f"and side that it was learned with, here rank {plan.rank} and {plan.side}."
            )
    return dict(zip(names, tensors, strict=True))
