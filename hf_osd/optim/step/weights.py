"""All weights of an optimizer by parameter: made when a parameter is first met, derived, and never saved."""

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...declare import plain
from ...layers.layer import LayerInfo
from ...update_rules import GradientCheck
from ..options.rules import Rules, rule_options_of, rules_of
from ..options.table import lr_of_step, projection_alpha, warn_one_rate
from .algorithm import ProjectedWeight
from .experts import ExpertWeights
from .full_weight import FullWeight
from .geometry import Geometry, ProjectedGeometry, geometry_of, name_again, names_of
from .gradients import check_gradients, refuse_unsupported
from .sharding import Sharding, local
from .sides import settle_sides
from .state import convert, create_state, exchange_moments


logger = logging.getLogger("hf_osd")

Group = dict[str, Any]
AnyWeight = FullWeight | ProjectedWeight | ExpertWeights


class Weights:
    """The weights of some groups, which go by the groups' options and by the state as they are at each step.

    Args:
        groups (`list[dict]`): Parameter groups that have been settled.
        state (`dict`): State by parameter, of the optimizer.
        given (`dict[str, torch.Tensor]`): P_0 by parameter name, where the user gave one; emptied as it is used.
        divide (`bool`, *optional*, defaults to `True`): Whether processes divide P, where they can.
        capturable (`bool`, *optional*, defaults to `False`): Whether a CUDA graph may hold their steps.

    Attributes:
        divided (`bool`): Whether they do, of any weight.
        device_types (`set[str]`): Of the parameters, as they were when last met, where there is autocast.
        observing (`bool`): Whether the coming step is observed.
        observations (`dict`): By weight, what `observe` saw in the last step that was.
        layer_of (`Mapping[torch.Tensor, LayerInfo]`): By parameter, what its layers know that make R.
        prepared (`bool`): Whether there may be such.
    """

    layer_of: Mapping[Tensor, LayerInfo] = MappingProxyType({})
    prepared: ClassVar[bool] = False

    def __init__(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict],
        given: dict[str, Tensor],
        divide: bool = True,
        capturable: bool = False,
    ):
        self.groups, self.state, self.given = groups, state, given
        self.divide, self.capturable = divide, capturable
        self.observing = False
        self.observations: dict[AnyWeight, tuple[Tensor, ...]] = {}
        self._weights: dict[Tensor, AnyWeight] = {}
        self._projection_lrs: list[float | None] = []  # of each group, as its alpha goes by
        self._met = WeakTensorKeyDictionary()  # parameter -> its geometry and group, when last met
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

    def settled(self, p: Tensor) -> bool:
        """Whether a step of `p` makes and reads nothing that the last one has not. Asks the host alone."""
        weight, mark = self._weights.get(p), self.state.get(p, {}).get("step")
        same = weight is not None and weight.dtype is p.dtype and weight.mark is not None and weight.mark() is mark
        return same and weight.settled  # type: ignore[union-attr]

    def ready(self, p: Tensor) -> AnyWeight:
        """The weight of a parameter, with a state to step with."""
        weight = self.of(p)
        if weight.mark is None:
            self.create_state(weight, p)
        return weight

    def create_state(self, weight: AnyWeight, p: Tensor) -> None:
        """Zeros, when a weight is first stepped and not before: then all other states need not be there yet."""
        if not self.state:  # the run's first step: schedules have set their first learning rates
            warn_one_rate(self.groups)
        state = self.state.setdefault(p, {})
        state.update(create_state(p.device, weight.geometry, weight.rules))
        weight.mark = weakref.ref(state["step"])
        self._bind(weight, p, state)
        if weight.group["init"] == "given":
            self._use_given(weight)

    def _use_given(self, weight: AnyWeight) -> None:
        given = self.given.pop(weight.geometry.name, None)
        if not weight.geometry.holds_projection:  # it is in another's state
            return
        if given is None:  # it was used, and the state that it went into is gone
            logger.warning("%s starts P anew: the P given as `init` was used.", weight.geometry.name)
        else:
            rows = weight.geometry.rows
            if isinstance(weight, ExpertWeights):
                weight.keep(given)
            elif isinstance(weight, ProjectedWeight):
                weight.P.stored.copy_(given if rows is None else rows.own(given))
            weight.resume()
            if rows is not None and isinstance(weight, ProjectedWeight):
                weight.P.started = bool(given.any())

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
            if p.requires_grad and "step" not in self.state.get(p, {})
        }

    def _bind(self, weight: AnyWeight, p: Tensor, state: dict[str, Tensor]) -> None:
        if weight.geometry.sharding is not None:  # FSDP2 may have moved its part
            weight.p = local(p)
            state = {name: local(value) for name, value in state.items()}
        weight.slot.state = state

    def let_go(self) -> None:
        """Hold no parameter: before the first step they may be exchanged, and must not be alive twice."""
        self._weights.clear()

    def meet(self) -> None:
        """Make weights for all parameters as they are now, and for no others."""
        known, self._weights, position = self._weights, {}, 0
        types = {p.device.type for group in self.groups for p in group["params"]}
        self.device_types = set(filter(torch.amp.is_autocast_available, types))
        self._options: list[Any] = [None] * len(self.groups)  # of each group, as its weights go by them
        self._rules: list[Rules | None] = [None] * len(self.groups)
        self._projection_lrs += [group["projection_lr"] for group in self.groups[len(self._projection_lrs) :]]
        for group in self.groups:
            name_again(group, self._met)
            if group["rank"] is not None:
                if group["source"] == "activations" and not self.prepared:
                    raise ValueError(
                        "This optimizer is a copy, without the prepared layers of its model: make one with "
                        "create_osd_optimizer and load its state."
                    )
                settle_sides(group, names_of(group, position), self.layer_of)
            for index, p in enumerate(group["params"]):
                geometry, weight = geometry_of(group, index, p, position, self.divide), known.get(p)
                as_before = weight is not None and weight.group is group and weight.dtype is p.dtype
                if weight is None or not as_before or weight.geometry.holder != geometry.holder:
                    weight = self._make(p, geometry, group)
                    weight.capturable = self.capturable
                    if self.state.get(p):
                        convert(self.state[p], geometry, rules_of(group))
                self._weights[p], self._met[p] = weight, (weight.geometry, group)
                position += 1
        self.divided = any(weight.geometry.rows is not None for weight in self._weights.values())
        self._share()
        self.follow()

    def _share(self) -> None:
        """Let weights use the P of others: none here."""

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        if geometry.sharding is not None and self.capturable:
            raise ValueError(f"{geometry.name} is sharded (FSDP2), which `capturable` is not for: leave it out.")
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
            if type(group["lr"]) is not float:
                group["lr"] = lr_of_step(group["lr"], f"parameter group {index}")
            if group["projection_lr"] != self._projection_lrs[index]:
                self._projection_lrs[index] = group["projection_lr"]
                group["alpha"] = projection_alpha(group, plain(group.get("initial_lr", group["lr"])))
            options = rule_options_of(group)
            if options != self._options[index]:
                self._options[index] = options
                before, rules = self._rules[index], rules_of(group)
                self._rules[index] = rules
                for p in group["params"]:
                    weight = self._weights.get(p)
                    if weight is not None:  # else it will, once it is met
                        state = self.state.get(p)
                        if state and before is not None and before.moments != rules.moments:
                            exchange_moments(state, weight.geometry, before, rules, p.device)
                        weight.follow(rules)

    def catch_up(self) -> None:
        """Know all that has changed since the last step."""
        self.follow()

    def take(self, p: Tensor) -> Tensor | None:
        """What a layer has made of a weight, where it can be stepped at once: there is none."""

    def learn_early(self, p: Tensor, stepped: Collection[Tensor]) -> None:
        """After that step."""

    def conclude(self) -> None:
        """What is left of a step when all weights have been stepped: nothing here."""

    def targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters, each with what its gradient arrives at."""
        for group in self.groups:
            for p in group["params"]:
                yield p, p

    def with_gradients(self) -> list[tuple[Tensor, AnyWeight, Tensor, GradientCheck]]:
        """The parameters that have a gradient, their weights, all that this process has of it, and its check."""
        self.follow()
        own = self.layer_of
        params: list[Tensor] = []
        arrived: list[Tensor] = []
        for group in self.groups:
            for p in group["params"]:
                G = self.gradient_of(p, group) if own and p in own else p.grad
                if G is not None:
                    if G.layout is not torch.strided or G.is_complex():
                        refuse_unsupported(G, self.of(p).geometry.name)
                    params.append(p)
                    arrived.append(G)
        weights: list[AnyWeight] = []
        grads: list[Tensor] = []
        stacked: list[bool] = []
        shardings: list[Sharding | None] = []
        for p, G in zip(params, arrived, strict=True):
            weight = self.of(p)
            sharding = weight.geometry.sharding
            weights.append(weight)
            grads.append(G if sharding is None else sharding.unwrap(G))
            stacked.append(isinstance(weight, ExpertWeights))
            shardings.append(sharding)
        return list(zip(params, weights, grads, check_gradients(grads, stacked, shardings), strict=True))

    def gradient_of(self, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """What a layer has made in the place of a gradient, where that is so."""
        return p.grad

    def has_gradient(self, p: Tensor) -> bool:
        """Whether there is any, or what a layer has made."""
        return p.grad is not None

    def observe(self, weight: AnyWeight, arrived: Any, check: GradientCheck) -> None:
        """See how P fares, before the step; `arrived` is what `weight.project` gave."""
        seen = None if isinstance(weight, FullWeight) else weight.observe(arrived, check)
        if seen is not None:
            self.observations[weight] = seen

    def observed(self) -> dict[AnyWeight, tuple[Tensor, ...]]:
        """`observations` in the order of the groups, whatever order the steps had: their mean is one in every mode."""
        return {weight: self.observations[weight] for weight in self if weight in self.observations}
