"""How P moves after a step has used it: by itself, or together with others of its shape.

What a rule computes for one P is r wide, too little to fill a processor; for the many weights of one shape that a
transformer has, it is one batched product. Letters and shapes as in `subspace.operators`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...subspace import Movement
from ...update_rules import GradientCheck
from ..options import table as options
from .moments import Role, update_
from .plan import ProjectedPlan, Rules
from .projection import carry, usable


# Entries of a stack of P, 4 MiB in float32: as much again of A and of copies of both is held while it fills.
STACK_LIMIT = 1 << 20
# Multiplications of a product r wide: up to there torch has another kernel for one product than for a batch of them.
ALONE_UP_TO = 16**3


class Moving(NamedTuple):
    """A P that is to move."""

    P: Tensor  # (s, r), in the precision of the computation
    A: Tensor  # (s, r), as `Movement` has it
    state: dict
    plan: ProjectedPlan
    check: GradientCheck


class Movements:
    """What a step's weights have left to be done together: `finish` does the last of it."""

    def __init__(self) -> None:
        self._waiting: dict[tuple, tuple[list[Moving], Mapping[str, Any], Rules]] = {}
        self._counters: list[tuple[Tensor, Tensor]] = []

    def add(self, moving: Moving, group: Mapping[str, Any], rules: Rules) -> None:
        """Move P now, or when as many of its shape have come as may wait."""
        A, r = moving.A, moving.plan.rank
        alone = moving.plan.two_sided or group["carry_moments"] or not rules.subspace.stackable
        if alone or A.numel() * r <= ALONE_UP_TO:
            _move([moving], group, rules)
            return
        key = (id(group), A.shape, A.dtype, A.device)
        waiting, _, _ = self._waiting.setdefault(key, ([], group, rules))
        waiting.append(moving)
        if (len(waiting) + 1) * A.numel() > STACK_LIMIT:
            _move(*self._waiting.pop(key))

    def count(self, counter: Tensor, number: Tensor) -> None:
        """Add to a counter that nothing else in this step reads."""
        self._counters.append((counter, number))

    def finish(self) -> None:
        """Move those that still wait, and count."""
        for waiting, group, rules in self._waiting.values():
            _move(waiting, group, rules)
        self._waiting.clear()
        _count(self._counters)
        self._counters.clear()


def _move(all_moving: list[Moving], group: Mapping[str, Any], rules: Rules) -> None:
    """One movement of each P; several are told to the rule as one stack."""
    rule, op, check = rules.subspace, all_moving[0].plan.op, all_moving[0].check
    olds = [moving.P.clone() if group["carry_moments"] else None for moving in all_moving]
    if len(all_moving) == 1:
        P, A, inv_norm2 = all_moving[0].P, all_moving[0].A, check.inv_norm2
    else:
        P, A = torch.stack([moving.P for moving in all_moving]), torch.stack([moving.A for moving in all_moving])
        all_moving[:] = [moving._replace(A=own) for moving, own in zip(all_moving, A, strict=True)]  # frees the others
        inv_norm2 = torch.stack([moving.check.inv_norm2 for moving in all_moving])[:, None, None]

    def descend(gP: Tensor) -> None:
        if rules.projection is None:
            raise ValueError(
                f"{type(rule).__name__}.advance_ calls `descend`, but P has no optimizer: set `learns = True` in its "
                "class."
            )
        _count([(moving.state["projection_step"], moving.check.keep) for moving in all_moving])
        for moving, own in zip(all_moving, [gP] if gP.ndim == 2 else gP.unbind(), strict=True):
            _descend(moving, own, group, rules)

    rule.advance_(P, Movement(A, inv_norm2, partial(usable, check), op, descend))
    for moving, old in zip(all_moving, olds, strict=True):
        P, state, plan = moving.P, moving.state, moving.plan
        if P is not state["projection"]:
            state["projection"].copy_(P)
        if old is not None:
            carry(state, plan, rules, P, old, moving.check.skip)


def _count(counters: Sequence[tuple[Tensor, Tensor]]) -> None:
    if counters:
        torch._foreach_add_(*map(list, zip(*counters, strict=True)))  # one launch for many


def _descend(moving: Moving, gP: Tensor, group: Mapping[str, Any], rules: Rules) -> None:
    # P <- (1 - alpha lr weight_decay_P) P - alpha lr projection_rule(gP)
    P, _, state, plan, check = moving
    assert rules.projection is not None
    role = Role(rules.projection, rules.projection_storage, plan.projection_shape, "projection_")
    lr_P, decay = options.projection_step_size(group), options.projection_weight_decay(group)
    update_(role, state, P, gP, check, lr_P, decay)
