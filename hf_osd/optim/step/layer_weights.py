"""The weights of a model with prepared layers, which make R in the backward pass, and P's of their inputs."""

import logging
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...layers import PreparedLayers
from ...layers.shared_input import SharedInput
from ...update_rules import GradientCheck
from ..options.rules import rules_of
from .geometry import Geometry, ProjectedGeometry
from .input_weight import InputWeight, Lesson, checked
from .movement import Movements
from .saved_weights import SavedWeights
from .sharding import INT8_NOT_SHARDED, is_sharded, local
from .state import held_elsewhere
from .weights import AnyWeight, Group


logger = logging.getLogger("hf_osd")


class LayerWeights(SavedWeights):
    """As [`Weights`]; those of prepared layers are [`InputWeight`]s.

    Args:
        layers ([`PreparedLayers`]): The model's.
    """

    prepared: ClassVar[bool] = True

    def __init__(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict],
        given: dict[str, Tensor],
        divide: bool,
        layers: PreparedLayers,
    ):
        self.layers = layers
        super().__init__(groups, state, given, divide)

    def meet(self) -> None:  # noqa: D102 - see Weights
        self.layer_of = self.layers.by_weight()
        for group in self.groups:
            if group["weight_dtype"] is not None and any(map(is_sharded, group["params"])):
                raise ValueError(INT8_NOT_SHARDED)
        divided = {p for p, layer in self.layer_of.items() if layer.sharding is not None}
        if divided and divided.isdisjoint(p for group in self.groups for p in group["params"]):
            raise ValueError(
                "The model's weights have been exchanged by `fully_shard` since: make the optimizer after it, or let "
                "accelerate prepare both."
            )
        super().meet()

    def let_go(self) -> None:  # noqa: D102
        self.layer_of = {}
        super().let_go()

    def catch_up(self) -> None:  # noqa: D102
        if self.layers.meeting.changed or not self._weights:
            self.meet()
            self.layers.meeting.changed = False
        super().catch_up()

    def with_gradients(self) -> list[tuple[Tensor, AnyWeight, Tensor, GradientCheck]]:  # noqa: D102
        self.catch_up()
        work = super().with_gradients()
        if self.divided:
            self._set_lessons([weight for _, weight, _, _ in work if isinstance(weight, InputWeight)])
        return work

    def _set_lessons(self, stepped: list[InputWeight]) -> None:
        """Let the last weight that is stepped by a P that processes divide have it move."""
        users: dict[InputWeight, set[InputWeight]] = {}
        for weight in stepped:
            users.setdefault(weight.leader, set()).add(weight)
        seen: list[tuple[InputWeight, SharedInput]] = []
        for weight in self._leaders():
            weight.lesson = weight.seen = None
            shared = weight.input
            if weight.P.rows is not None and weight.P.started and shared is not None and shared.energy is not None:
                seen.append((weight, shared))
        for weight, shared, check in checked(seen):
            weight.lesson = Lesson(shared, check, users.get(weight, set()), self.observing)

    def _leaders(self) -> list[InputWeight]:
        """Those that hold a P, and have met their input."""
        return [w for w in self._weights.values() if isinstance(w, InputWeight) and w.leader is w and w.input]

    def conclude(self) -> None:  # noqa: D102
        movements, leaders = Movements(), []
        try:
            leaders = self.learn(movements)
        finally:
            movements.finish()
            for weight in leaders:
                weight.release()

    def targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The stand-ins of layers' weights, too: each tells of R, the weight of what it gets from elsewhere."""
        layers = self.layers.by_weight()
        for p, target in super().targets():
            yield p, target
            if p in layers:
                yield p, layers[p].stand_in

    def _bind(self, weight: AnyWeight, p: Tensor, state: dict[str, Tensor]) -> None:
        super()._bind(weight, p, state)
        if isinstance(weight, InputWeight) and weight.leader is not weight:
            self.of(weight.leader.parameter)  # whose state has P

    def _use_given(self, weight: AnyWeight) -> None:
        if isinstance(weight, InputWeight):
            weight.given = None
            weight.follow(weight.rules)
        super()._use_given(weight)

    def _make(self, p: Tensor, geometry: Geometry, group: Group) -> AnyWeight:
        weight = super()._make(p, geometry, group)  # which refuses what cannot be projected
        layer = self.layer_of.get(p)
        if layer is None or not isinstance(geometry, ProjectedGeometry):
            return weight
        return InputWeight(p, geometry, group, layer, self.given.get(geometry.name), self.state)

    def share_given(self) -> None:
        """Let prepared layers that were given one and the same P share it; each other given P is one layer's own."""
        first: dict[Any, str] = {}
        holders: dict[str, str] = {}
        for weight in self:
            if isinstance(weight, InputWeight) and weight.given is not None:
                name = weight.geometry.name
                holders[name] = first.setdefault((id(weight.given), weight.layer.kind), name)
        if holders:
            self.layers.share_as(holders)
            self.meet()

    def _share(self) -> None:
        """Let weights whose layers have one input use one P."""
        own = [weight for weight in self._weights.values() if isinstance(weight, InputWeight)]
        by_name = {weight.geometry.name: weight for weight in own}
        for weight in own:
            weight.sharing = [weight]
        for weight in own:
            if weight.geometry.holder != weight.geometry.name:
                weight.share(by_name[weight.geometry.holder])  # type: ignore[index]
                state = self.state.get(weight.parameter, {})
                for name in state.keys() & held_elsewhere(weight.geometry, rules_of(weight.group)):
                    del state[name]  # of the P that it had before it met its input

    def gradient_of(self, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """R of a weight of a prepared layer, with what the model does with the weight beside calling its layers."""
        layer, G = self.layer_of[p], p.grad
        R = layer.stand_in.grad
        if layer.input is None and G is not None:
            if group["lr"] == 0:  # as where states are asked for, before anything has been computed
                return G
            self.leave(p)
            return G
        if layer.input is None:
            return None
        if G is not None and layer.sharding is None and self.layers.meeting.group is not None:
            raise ValueError(
                f"{layer.name} is used otherwise than by calling its layer, and DDP does not average that gradient: "
                "leave it out (`exclude_modules`), or use source='gradients'."
            )
        weight = self.of(p)
        assert isinstance(weight, InputWeight)
        self.of(weight.leader.parameter)
        if layer.input.kept and not weight.P.started and not self._in_use(weight.leader):
            self.layers.restart(layer.input)  # R is in the coordinates of a P that is gone: nobody is stepped by it
            R = None
            if G is None:
                return None
        layer.input.make_room()
        self.ready(weight.leader.parameter)
        weight.leader.adopt()
        if G is None or not weight.P.started:
            return R
        rest = weight.of_gradient(local(G))
        both = rest if R is None else local(R) + rest
        return both if layer.sharding is None else layer.sharding.wrap(both, layer.stand_in.shape, 0)

    def has_gradient(self, p: Tensor) -> bool:  # noqa: D102
        layer = self.layer_of.get(p)
        return super().has_gradient(p) or (layer is not None and layer.stand_in.grad is not None)

    def take(self, p: Tensor) -> Tensor | None:
        """`gradient_of` before the step, taken off; `None` where others that use P must be looked at, too."""
        weight, layer = self.of(p), self.layer_of[p]
        if not isinstance(weight, InputWeight) or layer.input is None:
            return None
        self.of(weight.leader.parameter)
        G = None
        if weight.P.started and weight.leader.mark is not None:
            G = self.gradient_of(p, weight.group)
        elif not layer.input.started and not layer.input.kept:  # a sketch's, which counts for norms alone
            G = layer.stand_in.grad
        if G is not None:
            layer.stand_in.grad = p.grad = None
        weight.release()
        return G

    def _in_use(self, leader: InputWeight) -> bool:
        """Whether any weight has been stepped by the P of this one, in the states that there are now."""
        return any(self.of(weight.parameter).count for weight in leader.sharing)

    def leave(self, p: Tensor) -> None:
        """Learn from the gradients of a weight from now on: its layers are not called."""
        layer = self.layer_of[p]
        logger.warning(
            "%s is used otherwise than by calling its layer: it learns from its gradients, not from activations.",
            layer.name,
        )
        self.layers.leave(layer.name, "its layer is not called")
        self.state.pop(p, None)
        del self._weights[p]
        self.meet()

    def learn(self, movements: Movements) -> list[InputWeight]:
        """After all weights have been stepped: let P learn from what the layers' inputs have shown.

        Returns:
            `list[InputWeight]`: Those that have been given their state.
        """
        movements.finish()  # all weights have used P, and which were skipped is counted
        leaders = self._leaders()
        taught = [w for w in leaders if w.P.rows is not None and w.P.started]
        opened: list[InputWeight] = []
        for weight in taught:
            self.ready(weight.parameter)
            opened.append(weight)
            if weight.lesson is not None:  # no weight has been stepped by it
                movements.add(weight.learn_own())
            weight.give()
        self._share_seen(taught)
        opened += self._learn([w for w in leaders if w.P.rows is None or not w.P.started], movements)
        for weight in leaders:
            stepped = any(own.stepped for own in weight.sharing)
            if stepped and weight.rules.subspace.refresh_due(weight.clock):
                opened += self._open(weight)
                weight.renew(weight.input)  # type: ignore[arg-type]
            for own in weight.sharing:
                own.stepped = False
            if weight.P.started:
                weight.schedule(weight.input)  # type: ignore[arg-type]
        self.layers.forget()
        self.layers.findable = False
        return opened

    def learn_early(self, p: Tensor, stepped: Collection[Tensor]) -> None:
        """Before the end of the step: let P of a weight learn, if all that use it have been stepped."""
        weight = self.of(p)
        if isinstance(weight, InputWeight) and all(own.parameter in stepped for own in weight.leader.sharing):
            movements = Movements()
            opened = self._learn([weight.leader], movements)
            movements.finish()
            for own in (weight, *opened):
                own.release()

    def _learn(self, leaders: Sequence[InputWeight], movements: Movements) -> list[InputWeight]:
        """Let P learn from what has been seen, if anything; see `learn`."""
        opened: list[InputWeight] = []
        for weight, shared, check in checked(
            [(w, met) for w in leaders if (met := w.input) and met.energy is not None]
        ):
            self.ready(weight.parameter)
            opened += self._open(weight) if not weight.P.started else [weight]
            self._observe_input(weight, shared, check)
            weight.learn(shared, check, movements)
            shared.A = shared.energy = None
        return opened

    def _open(self, leader: InputWeight) -> list[InputWeight]:
        """All that share a P, each with its state, if it has one."""
        for weight in leader.sharing:
            self.of(weight.parameter)
        return leader.sharing

    def give_projections(self) -> None:
        """Let the layers use the P of a state that has been loaded: the forward pass comes before the step."""
        for weight in list(self):  # its making has given it
            if isinstance(weight, InputWeight) and weight.leader is weight and weight.input:
                if not weight.P.started and self.of(weight.parameter).mark is not None and weight.P.found():
                    weight.give()  # one that was given, and saved before any step
                weight.release()
                if weight.P.started:
                    weight.schedule(weight.input)
                else:
                    weight.input.restart()
        self.layers.send_ahead()

    def _observe_input(self, leader: InputWeight, shared: SharedInput, check: GradientCheck) -> None:
        self._note(leader, leader.observe_input(shared, check) if self.observing else None)

    def _note(self, leader: InputWeight, seen: tuple[Tensor, Tensor] | None) -> None:
        if seen is not None:
            for weight in leader.sharing:
                self.observations[weight] = seen

    def _share_seen(self, taught: list[InputWeight]) -> None:
        """Put together what processes have observed, each of its own tokens, of P that they divide."""
        found = [(weight, *weight.seen) for weight in taught if weight.seen is not None]
        if not found:
            return
        group, processes = found[0][0].P.rows.group, len(found[0][0].P.rows.sizes)  # type: ignore[union-attr]
        # all lie on one mesh. The loss is 1 and a sum over tokens: 1 - sum_i (1 - loss_i)
        losses = torch.stack([loss for _, loss, _ in found])
        torch.distributed.all_reduce(losses, group=group)
        for (weight, _, error), loss in zip(found, (losses - (processes - 1)).unbind(), strict=True):
            self._note(weight, (loss, error))
