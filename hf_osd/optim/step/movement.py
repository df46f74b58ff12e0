"""How P moves after a step has used it: by itself, or together with others of its shape.

What a rule computes for one P is r wide, too little to fill a processor; for the many weights of one shape that a
transformer has, it is one batched product. A step of P's optimizer is taken as it is, up to a length that leaves P
about orthonormal, and shortened to that beyond. Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ...subspace import Movement
from ...update_rules import GradientCheck
from .lengths import Total, lengths
from .projection import LONGEST_STEP, LiveProjection, usable
from .streams import SideStreams


# Entries of a stack of P, 4 MiB in float32: as much again of A and of copies of both is held while it fills.
STACK_LIMIT = 1 << 20
# Multiplications of a product r wide: up to there torch has another kernel for one product than for a batch of them.
ALONE_UP_TO = 16**3


class Moving(NamedTuple):
    """A P that is to move."""

    projection: LiveProjection
    A: Tensor  # (s, r), as `Movement` has it
    check: GradientCheck


class Movements:
    """All that a step's weights have left to be done together: `finish` does the last of it.

    Args:
        aside ([`SideStreams`], *optional*): Where P moves, if not in its turn.

    Attributes:
        counters (`list[tuple]`): Counters that nothing else in this step reads, and what is to be added to each.
    """

    def __init__(self, aside: SideStreams | None = None) -> None:
        self._aside = aside
        self._waiting: dict[tuple, list[Moving]] = {}
        self.counters: list[tuple[Tensor, Tensor]] = []

    def add(self, projection: LiveProjection, A: Tensor, check: GradientCheck) -> None:
        """Move P now, or when as many of its shape have come as may wait."""
        geometry, group = projection.geometry, projection.group
        alone = geometry.side == "two_sided" or group["carry_moments"] or not projection.rule.stackable
        if alone or A.numel() * geometry.rank <= ALONE_UP_TO:
            if self._aside is None:
                _move(projection, A, check)
            else:
                self._move([Moving(projection, A, check)])
            return
        key = (id(group), A.shape, A.dtype, A.device)
        waiting = self._waiting.setdefault(key, [])
        waiting.append(Moving(projection, A, check))
        if (len(waiting) + 1) * A.numel() > STACK_LIMIT:
            self._move(self._waiting.pop(key))

    def _move(self, waiting: list[Moving]) -> None:
        if self._aside is None:
            _move_all(waiting)
        else:
            self._aside.run(_move_all, waiting, waiting[0].A.device)

    def finish(self) -> None:
        """Move those that still wait, and count."""
        for waiting in self._waiting.values():
            _move_all(waiting)  # beside what still moves aside, where the current stream has nothing else to do
        self._waiting.clear()
        if self._aside is not None:
            self._aside.join()
        if self.counters:
            torch._foreach_add_(*map(list, zip(*self.counters, strict=True)))  # one launch for many
            self.counters.clear()


def _move(projection: LiveProjection, A: Tensor, check: GradientCheck) -> None:
    """One movement of one P."""
    P, carries = projection.read(), projection.group["carry_moments"]
    old = P.clone() if carries or projection.rule.learns else None

    def descend(gP: Tensor) -> None:
        if projection.moments is None:
            _refuse_without_optimizer(projection)
        projection.slot.state["projection_step"].add_(check.keep)
        if projection.descend(P, gP, check) and old is not None:
            shorten_([([P], old.unsqueeze(0))])

    move = Movement(A, check.inv_norm2, partial(usable, check), projection.geometry.op, descend)
    projection.rule.advance_(P, move)
    projection.write(P)
    if carries and old is not None:
        projection.carry(P, old, check.skip)


def _move_all(waiting: list[Moving]) -> None:
    """One movement of each P of one shape and group, told to the rule as one stack."""
    if len(waiting) == 1:
        _move(*waiting[0])
        return
    first, Ps = waiting[0].projection, [moving.projection.read() for moving in waiting]
    A = torch.stack([moving.A for moving in waiting])
    waiting[:] = [moving._replace(A=own) for moving, own in zip(waiting, A, strict=True)]  # frees the others
    inv_norm2 = torch.stack([moving.check.inv_norm2 for moving in waiting])[:, None, None]

    def descend(gP: Tensor) -> None:
        if first.moments is None:
            _refuse_without_optimizer(first)
        counters = [moving.projection.slot.state["projection_step"] for moving in waiting]
        torch._foreach_add_(counters, [moving.check.keep for moving in waiting])
        far = False
        for moving, P, own in zip(waiting, Ps, gP.unbind(), strict=True):
            far = moving.projection.descend(P, own, moving.check)
        if far:  # of one group and shape
            shorten_([(Ps, before)])

    before = torch.stack(Ps)
    unusable = partial(usable, waiting[0].check)  # a stackable rule does not ask
    first.rule.advance_(before, Movement(A, inv_norm2, unusable, first.geometry.op, descend))
    for moving, P in zip(waiting, Ps, strict=True):
        moving.projection.write(P)


def shorten_(stacks: Sequence[tuple[list[Tensor], Tensor]], total: Total | None = None) -> None:
    """P <- before + min(1, LONGEST_STEP / ||step||) step, where P is before + step.

    Args:
        stacks (`list`): P of one shape each, and what they were before, (k, s, r).
        total (`Callable`, *optional*): Adds up tensors of all processes, in place, where these have some rows each.
    """
    steps = [torch.stack(Ps).sub_(before) for Ps, before in stacks]
    for (Ps, _), step, length in zip(stacks, steps, lengths(steps, total), strict=True):
        excess = (1 - LONGEST_STEP / length).clamp_(min=0)  # exactly 0 of most steps, which stay what they are
        torch._foreach_sub_(Ps, step.mul_(excess[:, None, None]).unbind())


def _refuse_without_optimizer(projection: LiveProjection) -> NoReturn:
    name = type(projection.rule).__name__
    raise ValueError(f"{name}.advance_ calls `descend`, but P has no optimizer: set `learns = True` in its class.")
