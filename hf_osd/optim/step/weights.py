"""The step of one parameter in two halves: what reads its gradient, and what moves its weight and P.

Between the two lies what is small enough to be kept, or sent: a `LowRankGradient` for each matrix.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...update_rules import GradientCheck
from .algorithm import LowRankGradient, step_full
from .experts import observe_matrices, project_matrices, step_matrices
from .gradients import refuse_unsupported
from .movement import Movements
from .plan import (
    Plan,
    ProjectedPlan,
    Rules,
    StackedPlan,
    make_plan,
    names_of,
    resume_plan,
    rules_of,
    settle_sides,
)
from .sharding import local
from .state import create_state


if TYPE_CHECKING:
    from ..osd import OSD


class ParameterSteps:
    """Steps of an [`OSD`]'s parameters, and what is derived for them: rebuilt at will and never saved.

    Attributes:
        observations (`dict`): What `observation` saw in the last step of each projected parameter.
    """

    def __init__(self, optimizer: "OSD"):
        self._optimizer = weakref.ref(optimizer)  # no cycle: its state is freed with the last reference to it
        self.observations: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._plans: dict[Tensor, Plan] = {}

    @property
    def optimizer(self) -> "OSD":
        """Whose steps these are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def observed(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """`observations` in the order of the groups, whatever order the steps had: their mean is one in every mode."""
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        return {p: self.observations[p] for p in params if p in self.observations}

    def plan_of(self, p: Tensor) -> Plan:
        """How `p` is stepped."""
        # Parameters may be exchanged behind the optimizer's back (accelerate's FSDP2 path does), so plans are made
        # when a parameter is first met, and read the state, which may have been loaded, at that moment only.
        plan = self._plans.get(p)
        if plan is None:
            self.make_plans()
            plan = self._plans[p]
        return plan

    def make_plans(self) -> None:
        """Plans for all parameters as they are now, and for no others."""
        known, self._plans, position = self._plans, {}, 0
        for group in self.optimizer.param_groups:
            if group["rank"] is not None:
                settle_sides(group, names_of(group, position))
            for index, p in enumerate(group["params"]):
                plan = known.get(p)
                if plan is None:
                    plan = resume_plan(
                        make_plan(group, index, p, position), self.optimizer.state.get(p), rules_of(group)
                    )
                self._plans[p] = plan
                position += 1

    def gradients(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Parameters that have a gradient, all that this process has of it, and their groups."""
        found = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    plan = self.plan_of(p)
                    refuse_unsupported(p.grad, plan.name)
                    found.append((p, p.grad if plan.sharding is None else plan.sharding.unwrap(p.grad), group))
        return found

    def makes_projection(self, p: Tensor, group: dict[str, Any], first: Sequence[bool] | None) -> bool:
        """Whether the next gradient of a projected parameter makes a P; `first` as in `project`."""
        plan = self.plan_of(p)
        assert isinstance(plan, ProjectedPlan)
        due = rules_of(group).subspace.refresh_due
        matrices = plan.experts if isinstance(plan, StackedPlan) else [plan]
        renewed = [True] * len(matrices) if first is None else first
        return any(
            may and (not matrix.started or due(matrix.count - matrix.idle + matrix.doubtful))
            for matrix, may in zip(matrices, renewed, strict=True)
        )

    def project(
        self, p: Tensor, G: Tensor, group: dict[str, Any], check: GradientCheck, first: Sequence[bool] | None = None
    ) -> list[LowRankGradient | None]:
        """The half of a projected parameter's step that reads G; a matrix without a P, as yet, has nothing to give.

        Args:
            first (`list[bool]`, *optional*):
                Of one of several gradients of this step, for each matrix whether none has been projected yet.
        """
        plan, rules, given = self.plan_of(p), rules_of(group), self.optimizer._given_projections
        assert isinstance(plan, ProjectedPlan)
        state = self._state_of(p, plan, rules)
        lows = project_matrices(G, state, group, plan, rules, check, given.get(plan.name), first)
        if plan.complete:
            given.pop(plan.name, None)  # copied into the state: not kept twice
        return lows

    def apply(
        self,
        p: Tensor,
        gradient: Tensor | Sequence[LowRankGradient | None],
        group: dict[str, Any],
        check: GradientCheck,
        norm_check: GradientCheck | None = None,
        movements: Movements | None = None,
    ) -> None:
        """The half that moves the weight, and P.

        Args:
            gradient (`torch.Tensor` or `list`): Whole for a full-size parameter; what `project` gave else.
            check (`GradientCheck`): Of the gradients that A is made of.
            norm_check (`GradientCheck`, *optional*): Of the gradient that R is made of, where that is another.
            movements (`Movements`, *optional*): Takes what is better done for many parameters at once.
        """
        plan, rules = self.plan_of(p), rules_of(group)
        state = self._state_of(p, plan, rules)
        later = Movements() if movements is None else movements
        later.count(state["skipped_steps"], check.broken)
        if isinstance(gradient, Tensor):
            step_full(local(p), gradient, state, group, plan, rules, check)
        else:
            assert isinstance(plan, ProjectedPlan)
            if self.optimizer.collect_statistics:
                seen = observe_matrices(gradient, state, plan, rules, norm_check or check)
                if seen is not None:
                    self.observations[p] = seen
            step_matrices(local(p), gradient, state, group, plan, rules, check, later)
        if movements is None:
            later.finish()

    def _state_of(self, p: Tensor, plan: Plan, rules: Rules) -> dict[str, Tensor]:
        state = self.optimizer.state[p]
        if not state:
            state.update(create_state(p, plan, rules))
        return state if plan.sharding is None else {name: local(value) for name, value in state.items()}
