"""All weights of an optimizer by parameter: made when a parameter is first met, derived, and never saved."""

import logging
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...layers import PreparedLayers
from ...layers.layer import LayerInfo
from ...layers.shared_input import SharedInput
from ...update_rules import GradientCheck
from ..options.rules import rule_options_of, rules_of
from .algorithm import ProjectedWeight
from .experts import ExpertWeights
from .full_weight import FullWeight
from .geometry import Geometry, ProjectedGeometry, geometry_of, names_of
from .gradients import check_gradients, check_of, refuse_unsupported
from .input_weight import InputWeight
from .movement import Movements
from .sharding import Sharding, local
from .sides import settle_sides
from .state import create_state


logger = logging.getLogger("hf_osd")

Group = dict[str, Any]
AnyWeight = FullWeight | ProjectedWeight | ExpertWeights


class Weights:
    """The weights of some groups, which go by the groups' options and by the state as they are at each step.

    Args:
        groups (`list[dict]`): Parameter groups that have been settled.
        state (`dict`): State by parameter, of the optimizer.
        given (`dict[str, torch.Tensor]`): P_0 by parameter name, where the user gave one; emptied as it is used.
        layers ([`PreparedLayers`], *optional*): The model's, where P is learned from activations.

    Attributes:
        device_types (`set[str]`): Of the parameters, as they were at first, where there is autocast.
        observing (`bool`): Whether the coming step is observed.
        observations (`dict`): By weight, what `observe` saw in the last step that was.
    """

    def __init__(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict],
        given: dict[str, Tensor],
        layers: PreparedLayers | None = None,
    ):
        self.groups, self.state, self.given, self.layers = groups, state, given, layers
        self._layer_of: dict[Tensor, LayerInfo] = {}
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
        if isinstance(weight, InputWeight) and weight.leader is not weight:
            self.of(weight.leader.p)  # whose state has P

    def meet(self) -> None:
        """Make weights for all parameters as they are now, and for no others."""
        known, self._weights, position = self._weights, {}, 0
        self._layer_of = {} if self.layers is None else self.layers.by_weight()
        for group in self.groups:
            if group["rank"] is not None:
                if group["source"] == "activations" and self.layers is None:
                    raise ValueError(
                        "This optimizer is a copy, without the prepared layers of its model: make one with "
                        "create_osd_optimizer and load its state."
                    )
                settle_sides(group, names_of(group, position), self._layer_of)
            for index, p in enumerate(group["params"]):
                geometry, weight = geometry_of(group, index, p, position), known.get(p)
                if weight is None or weight.geometry.holder != geometry.holder:
                    weight = self._make(p, geometry, group)
                self._weights[p] = weight
                position += 1
        self._share()
        self._options = [None] * len(self.groups)
        self.follow()

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        if not isinstance(geometry, ProjectedGeometry):
            return FullWeight(local(p), geometry, group)
        if p in self._layer_of:
            return InputWeight(p, geometry, group, self.given, self._layer_of[p])
        return (ExpertWeights if geometry.stacked else ProjectedWeight)(local(p), geometry, group, self.given)

    def _share(self) -> None:
        """Let weights whose layers have one input use one P."""
        own = [weight for weight in self._weights.values() if isinstance(weight, InputWeight)]
        by_name = {weight.geometry.name: weight for weight in own}
        for weight in own:
            if weight.geometry.holder != weight.geometry.name:
                weight.share(by_name[weight.geometry.holder])  # type: ignore[index]

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
        if self.layers is not None:
            self.layers.agree()
            if self.layers.meeting.changed:
                self.meet()
                self.layers.meeting.changed = False
        self.follow()
        params: list[Tensor] = []
        arrived: list[Tensor] = []
        for group in self.groups:
            for p in group["params"]:
                G = p.grad if p not in self._layer_of else self._of_layer(p, group)
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

    def _of_layer(self, p: Tensor, group: Group) -> Tensor | None:
        """R of a weight of a prepared layer, with what the model does with the weight beside calling its layers."""
        layer, G = self._layer_of[p], p.grad
        R = layer.stand_in.grad
        if layer.input is None and G is not None:
            if group["lr"] == 0:  # asks for a state, before anything has been computed
                self.ready(p)
                return None
            self.leave(p)
            return G
        if layer.input is None:
            return None
        if G is not None and self.layers is not None and self.layers.meeting.group is not None:
            raise ValueError(
                f"{layer.name} is used otherwise than by calling its layer, and DDP does not average that gradient: leave "
                "it out (`exclude_modules`), or use source='gradients'."
            )
        weight = self.of(p)
        assert isinstance(weight, InputWeight)
        self.ready(weight.leader.p)
        weight.leader.adopt()
        if G is None or not weight.P.started:
            return R
        rest = weight.op.down(G, weight.P.read().to(G.dtype))
        return rest if R is None else R + rest

    def leave(self, p: Tensor) -> None:
        """Learn from the gradients of a weight from now on: its layers are not called."""
        layer = self._layer_of[p]
        logger.warning(
            "%s is used otherwise than by calling its layer: it learns from its gradients, not from activations.",
            layer.name,
        )
        assert self.layers is not None
        self.layers.leave(layer.name, "its layer is not called")
        self.state.pop(p, None)
        del self._weights[p]
        self.meet()

    def learn(self, movements: Movements) -> list[InputWeight]:
        """After all weights have been stepped: let P learn from what the layers' inputs have shown.

        Returns:
            `list[InputWeight]`: Those that have been given their state.
        """
        if self.layers is None:
            return []
        leaders = [w for w in self._weights.values() if isinstance(w, InputWeight) and w.leader is w and w.input]
        seen = [(w, w.input) for w in leaders if w.input is not None and w.input.energy is not None]
        if seen:
            norms2 = torch.stack([shared.energy for _, shared in seen])  # type: ignore[misc]
            checks = map(GradientCheck._make, zip(*map(torch.unbind, check_of(norms2, True)), strict=True))
            for (weight, shared), check in zip(seen, checks, strict=True):
                self.ready(weight.p)
                self._observe_input(weight, shared, check)
                weight.learn(shared, check, movements)
        due = {weight for weight in leaders if weight.renewal_due}
        sharing = [w for w in self._weights.values() if isinstance(w, InputWeight) and w.leader in due] if due else []
        for weight in sharing:
            self.of(weight.p)  # with its state, if it has not been stepped now
        for weight in due:
            weight.renew(weight.input)  # type: ignore[arg-type]
        self.layers.forget()
        self.layers.findable = False
        return leaders + sharing

    def give_projections(self) -> None:
        """Let the layers use the P of a state that has been loaded: the forward pass comes before the step."""
        for weight in self:
            weight.release()  # its making has given it

    def _observe_input(self, leader: InputWeight, shared: SharedInput, check: GradientCheck) -> None:
        seen = leader.observe_input(shared, check) if self.observing else None
        if seen is not None:
            for weight in self._weights.values():
                if isinstance(weight, InputWeight) and weight.leader is leader:
                    self.observations[weight] = seen

    def observe(self, weight: AnyWeight, arrived: Any, check: GradientCheck) -> None:
        """See how P fares, before the step; `arrived` is what `weight.project` gave."""
        seen = None if isinstance(weight, FullWeight) else weight.observe(arrived, check)
        if seen is not None:
            self.observations[weight] = seen

    def observed(self) -> dict[AnyWeight, tuple[Tensor, Tensor]]:
        """`observations` in the order of the groups, whatever order the steps had: their mean is one in every mode."""
        return {weight: self.observations[weight] for weight in self if weight in self.observations}
