"""All weights of an optimizer by parameter: made when a parameter is first met, derived, and never saved."""

import logging
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...subspace.precision import own_precision
from ...update_rules import GradientCheck
from ..options.rules import Rules, rule_options_of, rules_of
from .algorithm import ProjectedWeight
from .experts import ExpertWeights
from .full_weight import FullWeight
from .geometry import Geometry, ProjectedGeometry, geometry_of, names_of
from .gradients import check_gradients, refuse_unsupported
from .projection import usable
from .sharding import Sharding, local
from .sides import settle_sides
from .state import create_state, state_spec


logger = logging.getLogger("hf_osd")

Group = dict[str, Any]
AnyWeight = FullWeight | ProjectedWeight | ExpertWeights


class Weights:
    """The weights of some groups, which go by the groups' options and by the state as they are at each step.

    Args:
        groups (`list[dict]`): Parameter groups that have been settled.
        state (`dict`): State by parameter, of the optimizer.
        given (`dict[str, torch.Tensor]`): P_0 by parameter name, where the user gave one; emptied as it is used.

    Attributes:
        device_types (`set[str]`): Of the parameters, as they were when last met, where there is autocast.
        observing (`bool`): Whether the coming step is observed.
        observations (`dict`): By weight, what `observe` saw in the last step that was.
    """

    def __init__(self, groups: list[Group], state: MutableMapping[Tensor, dict], given: dict[str, Tensor]):
        self.groups, self.state, self.given = groups, state, given
        self.observing = False
        self.observations: dict[AnyWeight, tuple[Tensor, Tensor]] = {}
        self._weights: dict[Tensor, AnyWeight] = {}
        self.meet()

    def __iter__(self) -> Iterator[AnyWeight]:
        """In the order of the groups."""
        for group in self.groups:
            for p in group["params"]:
                weight = self.of(p)
                weight.release()
                yield weight

    def of(self, p: Tensor) -> AnyWeight:
        """The weight of a parameter, with the state that it has now, if any, until its next step."""
        # Parameters may be exchanged behind the optimizer's back (accelerate's FSDP2 path does), or be converted, and
        # so may states and their tensors, to start anew or by a user's own loading.
        weight = self._weights.get(p)
        if weight is None or weight.dtype is not p.dtype:
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
        state, name = self.state.setdefault(p, {}), weight.geometry.name
        state.update(create_state(p.device, weight.geometry, weight.rules))
        weight.mark = weakref.ref(state["step"])
        self._bind(weight, p, state)
        if not isinstance(weight, FullWeight) and weight.group["init"] == "given":
            given = self.given.pop(name, None)
            if given is None:  # it was used, and the state that it went into is gone
                logger.warning("%s starts from its gradient: the P given as `init` was used.", name)
            else:
                weight.slot.state["projection"].copy_(given)
                weight.resume()

    def use_given(self) -> None:
        """Put each P that was given and not used yet into its state, which training then starts from."""
        for p, weight in list(self._weights.items()):
            if weight.geometry.name in self.given:
                self.ready(p).release()

    def missing_states(self) -> dict[int, dict[str, Tensor]]:
        """Zeros for each trainable parameter that never had a gradient, by its position; kept nowhere."""
        return {
            index: create_state(weight.p.device, weight.geometry, weight.rules)
            for index, (p, weight) in enumerate(self._weights.items())
            if p.requires_grad and p not in self.state
        }

    def only_make_states(self) -> bool:
        """Make all states where the first step has zero gradients and lr 0; whether it was so.

        By such a step `torch.distributed.checkpoint` has states made, and it must not count.
        """
        trainable = [p for p in self._weights if p.requires_grad]
        if any(group["lr"] for group in self.groups) or any(p.grad is None for p in trainable):
            return False
        with own_precision(self.device_types):
            checks = [check for *_, check in self.with_gradients()]
        if any(bool((usable(check) | (check.broken > 0)).any()) for check in checks):
            return False
        for p in trainable:
            self.ready(p).release()
        return True

    def _bind(self, weight: AnyWeight, p: Tensor, state: dict[str, Tensor]) -> None:
        if weight.geometry.sharding is not None:  # FSDP2 may have moved its part
            weight.p = local(p)
            state = {name: local(value) for name, value in state.items()}
        weight.slot.state = state

    def meet(self) -> None:
        """Make weights for all parameters as they are now, and for no others."""
        known, self._weights, position = self._weights, {}, 0
        types = {p.device.type for group in self.groups for p in group["params"]}
        self.device_types = set(filter(torch.amp.is_autocast_available, types))
        self._options: list[Any] = [None] * len(self.groups)  # of each group, as its weights go by them
        self._rules: list[Rules | None] = [None] * len(self.groups)
        for group in self.groups:
            _name_again(group, known)
            if group["rank"] is not None:
                settle_sides(group, names_of(group, position))
            for index, p in enumerate(group["params"]):
                weight = known.get(p)
                if weight is None or weight.group is not group or weight.dtype is not p.dtype:
                    weight = self._make(p, geometry_of(group, index, p, position), group)
                    _convert(self.state.get(p, {}), weight)
                self._weights[p] = weight
                position += 1
        self.follow()

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        if not isinstance(geometry, ProjectedGeometry):
            return FullWeight(local(p), geometry, group)
        if p.dtype == torch.float16:
            raise ValueError(
                f"{geometry.name} is float16, which P's gradient over- and underflows. "
                "Load with dtype=torch.bfloat16, or in float32 under autocast."
            )
        return (ExpertWeights if geometry.stacked else ProjectedWeight)(local(p), geometry, group)

    def follow(self) -> None:
        """Go by the groups' options as they are now: schedulers change betas between steps."""
        for index, group in enumerate(self.groups):
            options = rule_options_of(group)
            if options != self._options[index]:
                self._options[index] = options
                before, rules = self._rules[index], rules_of(group)
                self._rules[index] = rules
                for p in group["params"]:
                    weight = self._weights.get(p)
                    if weight is not None:  # else it will, once it is met
                        if before is not None and before.moments != rules.moments:
                            _exchange_moments(self.state.get(p, {}), weight, rules)
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


def _name_again(group: Group, known: Mapping[Tensor, AnyWeight]) -> None:
    """Let the names and sides of a group be those of its parameters, where users have taken some out of it."""
    own = [known[p].geometry if p in known and known[p].group is group else None for p in group["params"]]
    for key, attribute in (("param_names", "name"), ("sides", "side")):
        stored = group.get(key)
        if stored is None:
            continue
        if len(stored) != len(own) and None in own:
            raise ValueError("A parameter group was given parameters by hand: use `add_param_group`.")
        group[key] = [
            stored[index] if geometry is None else getattr(geometry, attribute) for index, geometry in enumerate(own)
        ]


def _exchange_moments(state: dict[str, Tensor], weight: AnyWeight, rules: Rules) -> None:
    """Let a state have the moments that other rules keep: SGD's has one while its momentum is not 0."""
    if state:
        new = create_state(weight.p.device, weight.geometry, rules)
        for name in state_spec(weight.geometry, weight.rules).keys() - new.keys():
            state.pop(name, None)
        state.update({name: value for name, value in new.items() if name not in state})


def _convert(state: dict[str, Tensor], weight: AnyWeight) -> None:
    """Bring a state into the precision of a parameter that was converted."""
    spec = state_spec(weight.geometry, rules_of(weight.group)) if state else {}
    for name in spec.keys() & state.keys():
        if state[name].is_floating_point():
            state[name] = state[name].to(spec[name].dtype)
