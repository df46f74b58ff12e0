"""All weights of an optimizer by parameter: made when a parameter is first met, derived, and never saved."""

import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from ..options.rules import rule_options_of, rules_of
from .algorithm import ProjectedWeight
from .experts import ExpertWeights
from .full_weight import FullWeight
from .geometry import Geometry, ProjectedGeometry, geometry_of, names_of
from .gradients import check_gradients, refuse_unsupported
from .sharding import Sharding, local
from .sides import settle_sides
from .state import create_state


Group = dict[str, Any]
AnyWeight = FullWeight | ProjectedWeight | ExpertWeights


class Weights:
    """The weights of some groups, which go by the groups' options and by the state as they are at each step.

    Args:
        groups (`list[dict]`): Parameter groups that have been settled.
        state (`dict`): State by parameter, of the optimizer.
        given (`dict[str, torch.Tensor]`): P_0 by parameter name, where the user gave one; emptied as it is used.

    Attributes:
        device_types (`set[str]`): Of the parameters, as they were at first, where there is autocast.
        observing (`bool`): Whether the coming step is observed.
        observations (`dict`): By weight, what `observe` saw in the last step that was.
    """

    def __init__(self, groups: list[Group], state: MutableMapping[Tensor, dict], given: dict[str, Tensor]):
        self.groups, self.state, self.given = groups, state, given
        self.observing = False
        self.observations: dict[AnyWeight, tuple[Tensor, Tensor]] = {}
        types = {p.device.type for group in groups for p in group["params"]}
        self.device_types = set(filter(torch.amp.is_autocast_available, types))
        self._weights: dict[Tensor, AnyWeight] = {}
        self._options: list[Any] = [None] * len(groups)  # of each group, as its weights go by them

    def __iter__(self) -> Iterator[AnyWeight]:
        """In the order of the groups."""
        for group in self.groups:
            for p in group["params"]:
                weight = self.of(p)
                weight.release()
                yield weight

    def of(self, p: Tensor) -> AnyWeight:
        """The weight of a parameter, with the state that it has now, if any, until its next step."""
        # Parameters may be exchanged behind the optimizer's back (accelerate's FSDP2 path does), and so may states and
        # their tensors, to start anew or by a user's own loading.
        weight = self._weights.get(p)
        if weight is None:
            self.meet()
            weight = self._weights[p]
        state = self.state.get(p, {})
        mark = state.get("step")
        if mark is None:
            if weight.mark is not None:
                weight.mark = None
                weight.release()
                weight.begin()
        else:
            self._bind(weight, p, state)
            if weight.mark is None or weight.mark() is not mark:
                weight.mark = weakref.ref(mark)
                weight.resume()
        return weight

    def ready(self, p: Tensor) -> AnyWeight:
        """The weight of a parameter, with a state to step with."""
        weight = self.of(p)
        if weight.mark is None:
            self.create_state(weight, p)
        return weight

    def create_state(self, weight: AnyWeight, p: Tensor) -> None:
        """Zeros, when a weight is first stepped and not before: then all other states need not be there yet."""
        state = self.state.setdefault(p, {})
        state.update(create_state(p.device, weight.geometry, weight.rules))
        weight.mark = weakref.ref(state["step"])
        self._bind(weight, p, state)

    def _bind(self, weight: AnyWeight, p: Tensor, state: dict[str, Tensor]) -> None:
        if weight.geometry.sharding is not None:  # FSDP2 may have moved its part
            weight.p = local(p)
            state = {name: local(value) for name, value in state.items()}
        weight.slot.state = state

    def meet(self) -> None:
        """Make weights for all parameters as they are now, and for no others."""
        known, self._weights, position = self._weights, {}, 0
        for group in self.groups:
            if group["rank"] is not None:
                settle_sides(group, names_of(group, position))
            for index, p in enumerate(group["params"]):
                self._weights[p] = known.get(p) or self._make(p, geometry_of(group, index, p, position), group)
                position += 1
        self._options = [None] * len(self.groups)
        self.follow()

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        if not isinstance(geometry, ProjectedGeometry):
            return FullWeight(local(p), geometry, group)
        return (ExpertWeights if geometry.stacked else ProjectedWeight)(local(p), geometry, group, self.given)

    def follow(self) -> None:
        """Go by the groups' options as they are now: schedulers change betas between steps."""
        for index, group in enumerate(self.groups):
            options = rule_options_of(group)
            if options != self._options[index]:
                self._options[index] = options
                rules = rules_of(group)
                for p in group["params"]:
                    weight = self._weights.get(p)
                    if weight is not None:  # else it will, once it is met
                        weight.follow(rules)

    def with_gradients(self) -> list[tuple[Tensor, AnyWeight, Tensor, GradientCheck]]:
        """The parameters that have a gradient, their weights, all that this process has of it, and its check."""
        self.follow()
        params: list[Tensor] = []
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout is not torch.strided or p.grad.is_complex():
                        refuse_unsupported(p.grad, self.of(p).geometry.name)
                    params.append(p)
        weights: list[AnyWeight] = []
        grads: list[Tensor] = []
        stacked: list[bool] = []
        shardings: list[Sharding | None] = []
        for p in params:
            weight = self.of(p)
            sharding = weight.geometry.sharding
            weights.append(weight)
            grads.append(p.grad if sharding is None else sharding.unwrap(p.grad))  # type: ignore[arg-type]
            stacked.append(isinstance(weight, ExpertWeights))
            shardings.append(sharding)
        return list(zip(params, weights, grads, check_gradients(grads, stacked, shardings), strict=True))

    def observe(self, weight: AnyWeight, arrived: Any, check: GradientCheck) -> None:
        """See how P fares, before the step; `arrived` is what `weight.project` gave."""
        seen = None if isinstance(weight, FullWeight) else weight.observe(arrived, check)
        if seen is not None:
            self.observations[weight] = seen

    def observed(self) -> dict[AnyWeight, tuple[Tensor, Tensor]]:
        """`observations` in the order of the groups, whatever order the steps had: their mean is one in every mode."""
        return {weight: self.observations[weight] for weight in self if weight in self.observations}
