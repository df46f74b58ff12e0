"""What is done for all weights of one shape together: P is moved, and 8-bit moments are stepped where launches count.

What a rule computes for one P is r wide, too little to fill a processor; for the many weights of one shape that a
transformer has, it is one batched product. A step of P's optimizer is taken as it is, up to a length that leaves P
about orthonormal, and shortened to that beyond. Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from ...subspace import Movement
from ...update_rules import GradientCheck
from .lengths import Total, lengths
from .low_rank import LowRank
from .moments import Moments, Pace, joint_steps
from .projection import LiveProjection, usable, write_all
from .streams import SideStreams


# Entries of a stack of P or R, 4 MiB in float32: as much again of A and of copies of both is held while it fills, and
# of moments that are decoded for it.
STACK_LIMIT = 1 << 20
# Multiplications of a product r wide: up to there torch has another kernel for one product than for a batch of them.
ALONE_UP_TO = 16**3
# Norm of the longest step of P. Entries of one size, as of Lion's steps and Adam's first, have the signs of a rank-one
# matrix where one direction leads: without a limit their norm would grow with sqrt(s r), and P D with it.
LONGEST_STEP = 0.5


class Moving(NamedTuple):
    """A P that is to move."""

    projection: LiveProjection
    P: Tensor  # as `projection.kept` gave it, or in the precision of the computation
    A: Tensor  # (s, r), as `Movement` has it, or in the precision of the gradient
    check: GradientCheck


class Movable(Protocol):
    """A projected weight, as far as it is asked here."""

    group: Mapping[str, Any]
    moments: Moments

    @property
    def factor_dtype(self) -> torch.dtype:
        """What D is wanted in."""

    def move(self, D: Tensor, low: LowRank, check: GradientCheck) -> Moving | None:
        """W moves by D; then P may have to."""


class Stepping(NamedTuple):
    """A weight that is to move."""

    weight: Movable
    low: LowRank
    check: GradientCheck
    form: tuple  # of its moments


class Movements:
    """All that a step's weights have left to be done together: `finish` does the last of it.

    Args:
        aside ([`SideStreams`], *optional*): Where P moves, if not in its turn.

    Attributes:
        counters (`list[tuple]`): Counters that nothing else in this step reads, and what is to be added to each.
    """

    def __init__(self, aside: SideStreams | None = None) -> None:
        self._aside = aside
        self._steps: dict[tuple, list[Stepping]] = {}
        self._waiting: dict[tuple, list[Moving]] = {}
        self.counters: list[tuple[Tensor, Tensor]] = []

    def step(self, stepping: Stepping) -> None:
        """Have a weight moved, now or when as many of its shape have come as may wait."""
        weight, low, _, form = stepping
        R = low.R
        key = (id(weight.group), R.shape, R.dtype, R.device, form, weight.factor_dtype)
        waiting = self._steps.setdefault(key, [])
        waiting.append(stepping)
        if (len(waiting) + 1) * max(R.numel(), 0 if low.A is None else low.A.numel()) > STACK_LIMIT:
            self._step_all(self._steps.pop(key))

    def _step_all(self, waiting: list[Stepping]) -> None:
        """One step of each weight of one group, whose R are of one shape."""
        first = waiting[0].weight
        members = [stepping.weight.moments for stepping in waiting]
        paces = [Pace(stepping.check, lr=-1.0, weight_decay=0.0) for stepping in waiting]
        # D = weight_rule(R)
        R = torch.stack([stepping.low.R for stepping in waiting]).to(first.moments.dtype)
        directions = joint_steps(members, R, paces).to(first.factor_dtype)
        del R
        for (weight, low, check, _), D in zip(waiting, directions, strict=True):
            self.add(weight.move(D, low, check))

    def add(self, moving: Moving | None) -> None:
        """Move P, if it is to, now or when as many of its shape have come as may wait."""
        if moving is None:
            return
        projection, A = moving.projection, moving.A
        geometry, group = projection.geometry, projection.group
        alone = geometry.side == "two_sided" or group["carry_moments"] or not projection.rule.stackable
        if alone or A.numel() * geometry.rank <= ALONE_UP_TO:
            if self._aside is None:
                _move(moving)
            else:
                self._move([moving])
            return
        form = None if projection.moments is None else projection.moments.form
        key = (id(group), A.shape, A.dtype, moving.P.dtype, A.device, form)
        waiting = self._waiting.setdefault(key, [])
        waiting.append(moving)
        if (len(waiting) + 1) * A.numel() > STACK_LIMIT:
            self._move(self._waiting.pop(key))

    def _move(self, waiting: list[Moving]) -> None:
        if self._aside is None:
            _move_all(waiting)
        else:
            self._aside.run(_move_all, waiting, waiting[0].A.device)

    def finish(self) -> None:
        """Move what still waits, and count."""
        while self._steps:
            self._step_all(self._steps.popitem()[1])
        for waiting in self._waiting.values():
            _move_all(waiting)  # beside what still moves aside, where the current stream has nothing else to do
        self._waiting.clear()
        if self._aside is not None:
            self._aside.join()
        if self.counters:
            torch._foreach_add_(*map(list, zip(*self.counters, strict=True)))  # one launch for many
            self.counters.clear()


def _move(moving: Moving) -> None:
    """One movement of one P."""
    projection, kept, A, check = moving
    dtype = projection.geometry.compute_dtype
    P, A = kept.to(dtype), A.to(dtype)
    moving = moving._replace(P=P, A=A)
    old = P.clone() if projection.group["carry_moments"] else None
    move = Movement(
        A, check.inv_norm2, partial(usable, check), projection.geometry.op, partial(descend, [moving], None)
    )
    projection.rule.advance_(P, move)
    if P is not kept:
        projection.write(P)
    if old is not None:
        projection.carry(P, old, check.skip)


def _move_all(waiting: list[Moving]) -> None:
    """One movement of each P of one shape and group, told to the rule as one stack."""
    if len(waiting) == 1:
        _move(waiting[0])
        return
    first = waiting[0].projection
    rule, geometry, dtype = first.rule, first.geometry, first.geometry.compute_dtype
    A = torch.stack([moving.A for moving in waiting]).to(dtype)
    waiting[:] = [moving._replace(A=own) for moving, own in zip(waiting, A, strict=True)]  # frees the others
    P = torch.stack([moving.P for moving in waiting]).to(dtype)
    rounded = waiting[0].P.dtype != dtype
    if rounded:  # else P itself moves
        waiting[:] = [moving._replace(P=own) for moving, own in zip(waiting, P, strict=True)]
    inv_norm2 = torch.stack([moving.check.inv_norm2 for moving in waiting])[:, None, None]
    unusable = partial(usable, waiting[0].check)  # a stackable rule does not ask
    rule.advance_(P, Movement(A, inv_norm2, unusable, geometry.op, partial(descend, waiting, None)))
    if rounded:
        write_all([moving.projection for moving in waiting], P)


class Step(NamedTuple):
    """What P of one group and shape are to move by."""

    waiting: Sequence[Moving]
    step: Tensor  # (k, s, r)
    far: bool  # whether any may be longer than `LONGEST_STEP`, as far as the host knows


def descend(waiting: Sequence[Moving], made: list[Step] | None, gP: Tensor) -> None:
    """P <- (1 - alpha lr weight_decay_P) P - alpha lr projection_rule(gP), of one, or of each of a stack (k, s, r).

    A step longer than `LONGEST_STEP` is shortened to that. With a list in `made` the step is left there, for others to
    shorten and add.
    """
    projections, Ps, _, checks = zip(*waiting, strict=True)
    first, group = projections[0], projections[0].group  # of all
    if first.moments is None:
        _refuse_without_optimizer(first)
    rate, weight_decay = group["alpha"] * group["lr"], group[first.decay]
    moments, paces = map(attrgetter("moments"), projections), map(partial(Pace, lr=rate, weight_decay=0.0), checks)
    step = joint_steps(list(moments), gP.reshape(len(Ps), *Ps[0].shape), list(paces))
    if weight_decay:
        keep = torch.stack([check.keep for check in checks])[:, None, None]
        step.addcmul_(torch.stack(Ps), keep * (-rate * weight_decay))
    far = isinstance(rate, Tensor) or rate * first.spread > LONGEST_STEP  # else no step is longer, by most rules
    if made is not None:
        made.append(Step(waiting, step, far))
        return
    if far:
        shorten_([step])
    torch._foreach_add_(Ps, step.unbind())


def shorten_(steps: Sequence[Tensor], total: Total | None = None) -> None:
    """Step <- min(1, LONGEST_STEP / ||step||) step, of each of stacks (k, s, r).

    Args:
        steps (`list[torch.Tensor]`): The stacks.
        total (`Callable`, *optional*): Adds up tensors of all processes, in place, where these have some rows each.
    """
    for step, length in zip(steps, lengths(steps, total), strict=True):
        step.mul_((LONGEST_STEP / length).clamp_(max=1)[:, None, None])  # by exactly 1 most steps


def _refuse_without_optimizer(projection: LiveProjection) -> NoReturn:
    name = type(projection.rule).__name__
    raise ValueError(f"{name}.advance_ calls `descend`, but P has no optimizer: set `learns = True` in its class.")
