"""All weights of an optimizer by parameter: made when a parameter is first met, derived, and never saved."""

import logging
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...layers import PreparedLayers
from ...layers.layer import LayerInfo
from ...layers.shared_input import SharedInput
from ...subspace.precision import own_precision
from ...update_rules import GradientCheck
from ..options.rules import Rules, rule_options_of, rules_of
from ..options.table import lr_of_step
from .algorithm import ProjectedWeight
from .experts import ExpertWeights
from .full_weight import FullWeight
from .geometry import Geometry, ProjectedGeometry, geometry_of, names_of
from .gradients import check_gradients, check_of, refuse_unsupported
from .input_weight import InputWeight
from .movement import Movements
from .projection import usable
from .sharding import Sharding, local
from .sides import FULL_SIZE, settle_sides
from .state import create_state, held_elsewhere, state_spec


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
        device_types (`set[str]`): Of the parameters, as they were when last met, where there is autocast.
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
        self._weights: dict[Tensor, AnyWeight] = {}
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
        if weight.group["init"] == "given":
            given = self.given.pop(name, None)
            if isinstance(weight, InputWeight):
                weight.given = None
                weight.follow(weight.rules)
            if not weight.geometry.holds_projection:  # it is in another's state
                return
            if given is None:  # it was used, and the state that it went into is gone
                logger.warning("%s starts P anew: the P given as `init` was used.", name)
            else:
                weight.slot.state["projection"].copy_(given)
                weight.resume()

    def share_given(self) -> None:
        """Let prepared layers that were given one and the same P share it; each other given P is one layer's own."""
        first: dict[Any, str] = {}
        holders: dict[str, str] = {}
        for weight in self:
            if isinstance(weight, InputWeight) and weight.given is not None:
                name = weight.geometry.name
                holders[name] = first.setdefault((id(weight.given), weight.layer.kind), name)
        if self.layers is not None and holders:
            self.layers.share_as(holders)
            self.meet()

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

    def with_shared(self, states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """States by position in which those of weights that share a P have it, too."""
        places = {weight: index for index, weight in enumerate(self._weights.values())}
        whole = dict(states)
        for weight, index in places.items():
            if index in states and isinstance(weight, InputWeight):
                held = states.get(places[weight.leader], {})
                shared = held.keys() & held_elsewhere(weight.geometry, weight.rules)
                whole[index] = states[index] | {name: held[name] for name in shared}
        return whole

    def only_make_states(self) -> bool:
        """Make all states where the first step has zero gradients and lr 0; whether it was so.

        By such a step `torch.distributed.checkpoint` has states made, and it must not count.
        """
        self.meet()
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
        if isinstance(weight, InputWeight) and weight.leader is not weight:
            self.of(weight.leader.p)  # whose state has P

    def let_go(self) -> None:
        """Hold no parameter: before the first step they may be exchanged, and must not be alive twice."""
        self._weights.clear()

    def meet(self) -> None:
        """Make weights for all parameters as they are now, and for no others."""
        known, self._weights, position = self._weights, {}, 0
        self._layer_of = {} if self.layers is None else self.layers.by_weight()
        types = {p.device.type for group in self.groups for p in group["params"]}
        self.device_types = set(filter(torch.amp.is_autocast_available, types))
        self._options: list[Any] = [None] * len(self.groups)  # of each group, as its weights go by them
        self._rules: list[Rules | None] = [None] * len(self.groups)
        for group in self.groups:
            _name_again(group, self._met)
            if group["rank"] is not None:
                if group["source"] == "activations" and self.layers is None:
                    raise ValueError(
                        "This optimizer is a copy, without the prepared layers of its model: make one with "
                        "create_osd_optimizer and load its state."
                    )
                settle_sides(group, names_of(group, position), self._layer_of)
            for index, p in enumerate(group["params"]):
                geometry, weight = geometry_of(group, index, p, position), known.get(p)
                as_before = weight is not None and weight.group is group and weight.dtype is p.dtype
                if weight is None or not as_before or weight.geometry.holder != geometry.holder:
                    weight = self._make(p, geometry, group)
                    _convert(self.state.get(p, {}), weight)
                self._weights[p], self._met[p] = weight, (weight.geometry, group)
                position += 1
        self._share()
        self.follow()

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        if not isinstance(geometry, ProjectedGeometry):
            return FullWeight(local(p), geometry, group)
        if p.dtype == torch.float16:
            raise ValueError(
                f"{geometry.name} is float16, which P's gradient over- and underflows. "
                "Load with dtype=torch.bfloat16, or in float32 under autocast."
            )
        if p in self._layer_of:
            return InputWeight(p, geometry, group, self._layer_of[p], self.given.get(geometry.name))
        return (ExpertWeights if geometry.stacked else ProjectedWeight)(local(p), geometry, group)

    def _share(self) -> None:
        """Let weights whose layers have one input use one P."""
        own = [weight for weight in self._weights.values() if isinstance(weight, InputWeight)]
        by_name = {weight.geometry.name: weight for weight in own}
        for weight in own:
            if weight.geometry.holder != weight.geometry.name:
                weight.share(by_name[weight.geometry.holder])  # type: ignore[index]
                state = self.state.get(weight.p, {})
                for name in state.keys() & held_elsewhere(weight.geometry, rules_of(weight.group)):
                    del state[name]  # of the P that it had before it met its input

    def follow(self) -> None:
        """Go by the groups' options as they are now: schedulers change betas between steps."""
        for index, group in enumerate(self.groups):
            if type(group["lr"]) is not float:
                group["lr"] = lr_of_step(group["lr"], f"parameter group {index}")
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
        if self.layers is not None and self.layers.meeting.changed:
            self.meet()
            self.layers.meeting.changed = False
        self.follow()
        layers = self._layer_of
        params: list[Tensor] = []
        arrived: list[Tensor] = []
        for group in self.groups:
            for p in group["params"]:
                G = self._of_layer(p, group) if layers and p in layers else p.grad
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
            if group["lr"] == 0:  # as where states are asked for, before anything has been computed
                return G
            self.leave(p)
            return G
        if layer.input is None:
            return None
        if G is not None and self.layers is not None and self.layers.meeting.group is not None:
            raise ValueError(
                f"{layer.name} is used otherwise than by calling its layer, and DDP does not average that gradient: "
                "leave it out (`exclude_modules`), or use source='gradients'."
            )
        weight = self.of(p)
        assert isinstance(weight, InputWeight) and self.layers is not None
        self.of(weight.leader.p)
        if layer.input.kept and not weight.P.started and not self._in_use(weight.leader):
            self.layers.restart(layer.input)  # R is in the coordinates of a P that is gone: nobody is stepped by it
            R = None
            if G is None:
                return None
        layer.input.make_room()
        self.ready(weight.leader.p)
        weight.leader.adopt()
        if G is None or not weight.P.started:
            return R
        rest = weight.op.down(G, weight.P.read().to(G.dtype))
        return rest if R is None else R + rest

    def _in_use(self, leader: InputWeight) -> bool:
        """Whether any weight has been stepped by the P of this one, in the states that there are now."""
        sharing = [w for w in self._weights.values() if isinstance(w, InputWeight) and w.leader is leader]
        return any(self.of(weight.p).count for weight in sharing)

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

    def learn(self, layers: PreparedLayers, movements: Movements) -> list[InputWeight]:
        """After all weights have been stepped: let P learn from what the layers' inputs have shown.

        Returns:
            `list[InputWeight]`: Those that have been given their state.
        """
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
        layers.forget()
        layers.findable = False
        return leaders + sharing

    def give_projections(self) -> None:
        """Let the layers use the P of a state that has been loaded: the forward pass comes before the step."""
        for weight in self:  # its making has given it
            if isinstance(weight, InputWeight) and weight.leader is weight and weight.input and not weight.P.started:
                weight.input.restart()

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


def _name_again(group: Group, met: Mapping[Tensor, tuple[Geometry, Group]]) -> None:
    """Let the names and sides of a group be those of its parameters, where users have taken some out of it."""
    own = [met[p][0] if p in met and met[p][1] is group else None for p in group["params"]]
    for key, attribute in (("param_names", "name"), ("sides", "side")):
        stored = group.get(key)
        if stored is None:
            continue
        if len(stored) != len(own) and None in own:
            raise ValueError("A parameter group was given parameters by hand: use `add_param_group`.")
        group[key] = [
            stored[index] if geometry is None else getattr(geometry, attribute, FULL_SIZE)
            for index, geometry in enumerate(own)
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
