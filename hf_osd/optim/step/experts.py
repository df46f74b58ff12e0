"""Weights of experts in one parameter (E, m, n), each a matrix that is stepped by itself.

An expert that had no tokens has a zero gradient, and is left alone, as a module without gradient is: nothing of its
weights, moments and P changes. Only `idle_steps` counts, so that the host, which has counted on, agrees with the state
after a resume.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from ..options.rules import Rules
from .algorithm import LATER, ONLY, OVERDUE, ProjectedWeight, Turn
from .geometry import ProjectedGeometry
from .low_rank import LowRank
from .movement import STACK_LIMIT, Movements
from .sharding import Sharding
from .state import P_SCALE, state_spec
from .weight import Weight


class ExpertWeight(ProjectedWeight):
    """One expert's matrix. It knows how many of the host's steps were without tokens, and asks where that decides.

    Attributes:
        idle (`int`): Steps without tokens, of the `count`, as far as the host knows.
        doubtful (`bool`):
            Whether `idle` counts the coming step, of which so far only gradients without tokens are known.
    """

    idle, doubtful = 0, False

    @property
    def steps(self) -> int:
        """Steps with tokens: no less than the expert's own."""
        return self.count - self.idle

    def follow(self, rules: Rules) -> None:  # noqa: D102 - see Weight
        super().follow(rules)
        self.source.sharding = None  # the stack sums the A of many experts at once

    def begin(self) -> None:  # noqa: D102
        super().begin()
        self.idle, self.doubtful = 0, False

    def resume(self) -> None:  # noqa: D102
        super().resume()
        self.idle, self.doubtful = int(self.slot.state["idle_steps"]), False
        self.count += self.idle

    def _counted(self) -> Tensor:
        return super()._counted() + self.slot.state["idle_steps"]

    def project(self, G: Tensor, check: GradientCheck, turn: Turn = ONLY) -> LowRank | None:
        """As of every matrix; of several gradients the first that may have had tokens decides over P."""
        low = super().project(G, check, turn)
        return None if turn is Turn.FIRST and self.doubtful else low

    def update(self, low: LowRank | None, check: GradientCheck, movements: Movements) -> None:
        """As of every matrix; a step in all of whose gradients the expert had no tokens is counted, too."""
        if self.started:
            self.doubtful = False
            self.count += low is None
        super().update(low, check, movements)

    def renews(self, check: GradientCheck) -> bool:
        """Whether P is to be made anew. Reads the device where the expert's own count decides."""
        due = self.rules.subspace.refresh_due
        if self.doubtful or due(self.steps):
            self.ask(check)
        return self.overdue or due(self.steps)

    def moves(self, check: GradientCheck, turn: Turn) -> bool:
        """Whether P moves. Reads the device where the expert's own count decides."""
        moves_at = self.rules.subspace.moves_at
        if turn is not LATER and (self.doubtful or (moves_at(self.steps) and not moves_at(self.steps - 1))):
            self.ask(check)
        return moves_at(self.steps)

    def recount(self, check: GradientCheck) -> None:  # noqa: D102
        self.ask(check)
        super().recount(check)
        self.count += self.idle

    def ask(self, check: GradientCheck) -> None:
        """Bring `idle` up to date, with the coming step: without tokens, as far as is known now."""
        past, coming = torch.stack([self.slot.state["idle_steps"], check.found_inf - check.broken]).tolist()
        self.idle, self.doubtful = int(past + coming), coming > 0


class ExpertWeights(Weight):
    """A stack (E, m, n). Its state has the entries of one matrix with a leading dimension E, and `idle_steps`.

    Where experts are divided among processes, E is below the number of those that are here, which may be none.

    Attributes:
        experts (`list[ExpertWeight]`): E weights, whose parameters and states are views made for each use.
    """

    geometry: ProjectedGeometry

    def __init__(self, p: Tensor, geometry: ProjectedGeometry, group: Mapping[str, Any]):
        super().__init__(p, geometry, group)
        self.experts = [ExpertWeight(p, geometry.expert(e), group) for e in geometry.experts]
        self.slots += [expert.slot for expert in self.experts]

    def follow(self, rules: Rules) -> None:  # noqa: D102 - see Weight
        self.rules, self._entries = rules, tuple(state_spec(self.geometry, rules))
        for expert in self.experts:
            expert.capturable = self.capturable
            expert.follow(rules)

    def begin(self) -> None:  # noqa: D102
        for expert in self.experts:
            expert.begin()

    def resume(self) -> None:
        """Go on from a state that has been loaded. Reads the device."""
        self._open()
        overdue = self.slot.state.get(OVERDUE, torch.zeros(len(self.experts))).tolist()
        for expert, due in zip(self.experts, overdue, strict=True):
            expert.resume()
            expert.overdue = bool(due)

    @property
    def started(self) -> bool:
        """Whether any expert has a P."""
        return any(expert.started for expert in self.experts)

    @property
    def settled(self) -> bool:  # noqa: D102 - see Weight
        return all(expert.settled for expert in self.experts)

    @property
    def projection(self) -> Tensor:
        """P of all experts, zero of those that have none yet, as `ProjectedWeight.projection`."""
        if self.rules.subspace.code is None and P_SCALE not in self.slot.state:
            return self.slot.state["projection"]
        self._open()
        geometry = self.geometry
        shape = (len(self.experts), *geometry.projection_shape)
        P = torch.zeros(shape, dtype=geometry.compute_dtype, device=self.p.device)
        for own, expert in zip(P, self.experts, strict=True):
            if expert.started:
                own.copy_(expert.P.read())
        return P

    def keep(self, P: Tensor) -> None:
        """Start from these P (E, s, r), of all experts; zero is none."""
        self._open()
        for expert, own in zip(self.experts, P[list(self.geometry.experts)], strict=True):
            expert.P.stored.copy_(own)

    def project(
        self,
        G: Tensor,  # (E, m, n)
        check: GradientCheck,  # its tensors are (E,)
        turns: Sequence[Turn] | None = None,  # of each expert's gradient
    ) -> list[LowRank | None]:
        """The first half of each expert's step.

        Experts that have not started are asked in one transfer whether they can: nothing is read back once all have.
        """
        ready = [True] * len(self.experts)
        if not all(expert.started for expert in self.experts):
            fit = check.skip.logical_not().tolist()
            ready = [expert.started or own for expert, own in zip(self.experts, fit, strict=True)]
        self._open()
        turns = [ONLY] * len(self.experts) if turns is None else turns
        parts = zip(self.experts, G.unbind(), checks_by_expert(check), turns, ready, strict=True)
        lows = [expert.project(own, check, turn) if fit else None for expert, own, check, turn, fit in parts]
        if self.geometry.sharding_of_expert is not None:
            sum_over_processes(lows, self.geometry.sharding_of_expert)
        if any(expert.overdue for expert in self.experts):
            self.slot.state[OVERDUE] = torch.tensor([float(expert.overdue) for expert in self.experts])
        else:
            self.slot.state.pop(OVERDUE, None)
        return lows

    def update(self, lows: Sequence[LowRank | None], check: GradientCheck, movements: Movements) -> None:
        """The second half of each expert's step."""
        self.slot.state["idle_steps"].add_(check.found_inf - check.broken)
        self._open()
        for expert, low, own in zip(self.experts, lows, checks_by_expert(check), strict=True):
            expert.update(low, own, movements)

    def observe(self, lows: Sequence[LowRank | None], check: GradientCheck) -> tuple[Tensor, Tensor] | None:
        """What `ProjectedWeight.observe` sees of every expert that has started, (started,) each.

        Where experts are on different processes, of each that is here: not a number of one that has not started.
        """
        self._open()
        parts = zip(self.experts, lows, checks_by_expert(check), strict=True)
        found = [expert.observe(low, own) for expert, low, own in parts]
        if self.geometry.scattered:
            nothing = torch.full((), float("nan"), device=self.p.device)
            found = [(nothing, nothing) if seen is None else seen for seen in found]
        seen = [seen for seen in found if seen is not None]
        return (torch.stack([loss for loss, _ in seen]), torch.stack([error for _, error in seen])) if seen else None

    def _open(self) -> None:
        """Give each expert its part of the parameter and of the state, as they are now."""
        entries = (self.slot.state[name].unbind() for name in self._entries)
        for expert, p, *values in zip(self.experts, self.p.unbind(), *entries, strict=True):
            expert.p = p
            expert.slot.state = dict(zip(self._entries, values, strict=True))


def checks_by_expert(check: GradientCheck) -> list[GradientCheck]:
    """The check of each expert's gradient: 0-dim tensors."""
    return [GradientCheck(*row) for row in zip(*(field.unbind() for field in check), strict=True)]


def sum_over_processes(lows: list[LowRank | None], sharding: Sharding) -> None:
    """Let each A be the sum over the parts of its expert's gradient: a few exchanges for all of them."""
    moving = [(i, low) for i, low in enumerate(lows) if low is not None and low.A is not None]
    many = max(1, STACK_LIMIT // moving[0][1].A.numel()) if moving else 1  # type: ignore[union-attr]
    for start in range(0, len(moving), many):
        bucket = moving[start : start + many]
        A = torch.stack([low.A for _, low in bucket])  # type: ignore[misc]
        A = sharding.sum(A.to(torch.promote_types(A.dtype, torch.float32)))
        for (i, low), own in zip(bucket, A.unbind(), strict=True):
            lows[i] = low._replace(A=own)
