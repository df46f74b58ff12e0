"""One step of a weight whose layers make R in the backward pass, and whose P learns from their inputs.

Letters and shapes as in `subspace.operators`, `layers.shared_input` and `layers.outside`. P moves once, after all
weights that share it have been stepped with it: after all weights of the step, and where processes divide it with the
last of its own, as long as all of it is there. What it learns from is then of each process's own tokens; the sum is of
gP, see `divided`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.int8 import Int8Weight
from ...layers.layer import LayerInfo
from ...layers.shared_input import SharedInput
from ...layers.start import FirstProjection
from ...update_rules import GradientCheck
from ..options.general import projection_sample_of, residual_sample_of
from ..options.rules import Rules
from .algorithm import ONLY, ProjectedWeight, Turn
from .geometry import ProjectedGeometry
from .gradients import check_of
from .low_rank import LowRank, Update
from .movement import Movements, Moving
from .observation import observation
from .projection import Make, usable
from .residual import SignOfColumns
from .rounding import add_to_int8_
from .sharding import local
from .weight import Weight


class Lesson(NamedTuple):
    """What a divided P is to learn from.

    Attributes:
        shared ([`SharedInput`]): The input.
        check ([`GradientCheck`]): Of ||x||², of all processes.
        users (`set[InputWeight]`): Those that are stepped by P before, as far as they have not been.
        observed (`bool`): Whether the step is.
    """

    shared: SharedInput
    check: GradientCheck
    users: set["InputWeight"]
    observed: bool


class InputWeight(ProjectedWeight):
    """A weight of a prepared layer.

    Args:
        p (`torch.Tensor`): W.
        geometry ([`ProjectedGeometry`]): Its facts.
        group (`dict`): Its group.
        layer ([`LayerInfo`]): What its layers know.
        given (`torch.Tensor`, *optional*): P_0, where the user gave one.
        states (`Mapping[torch.Tensor, dict]`): Of all parameters.

    Attributes:
        parameter (`torch.Tensor`): W as the optimizer has it: `p` is this process's part of it.
        layer ([`LayerInfo`]): What its layers know.
        leader ([`InputWeight`]): The weight that holds P, maybe itself.
        given (`torch.Tensor`, *optional*): P_0, where the user gave one.
        sharing (`list[InputWeight]`): Those that use its P, if it holds one: itself and others.
        stepped (`bool`): Whether it has been, since that was last asked.
        lesson ([`Lesson`], *optional*): Of a divided P that it holds, until that is on its way.
        seen (`tuple`, *optional*): What was observed of it: of this process's tokens.
    """

    def __init__(
        self,
        p: Tensor,
        geometry: ProjectedGeometry,
        group: Mapping[str, Any],
        layer: LayerInfo,
        given: Tensor | None,
        states: Mapping[Tensor, Mapping[str, Tensor]],
    ):
        super().__init__(local(p), geometry, group)
        self.parameter = p
        self.layer, self.leader, self.given, self.stepped = layer, self, given, False
        self.sharing = [self]
        self.lesson: Lesson | None = None
        self.seen: tuple[Tensor, Tensor] | None = None
        self._states = states
        self.P.copies = 1  # processes have tokens of their own, also where they have the same part of W
        self.P.sent_in = None if p.dtype == geometry.compute_dtype else p.dtype  # as A of a whole P

    def share(self, leader: "InputWeight") -> None:
        """Use the P of another weight."""
        self.leader, self.P, self.slots = leader, leader.P, [self.slot, leader.slot]
        leader.sharing.append(self)

    @property
    def clock(self) -> int:
        """Steps that P goes by: of the weight that has made most, for some may be frozen."""
        return max(weight.count for weight in self.sharing)

    def project(self, G: Tensor, check: GradientCheck, turn: Turn = ONLY) -> LowRank | None:
        """What has arrived: R itself, and G_S beside it, if any; `None` as long as there is no P."""
        if not self.P.started:
            return None
        if self.layer.residual_sample is None:
            return LowRank(G, None)
        assert self.input is not None
        r, short, columns = self.geometry.rank, self._short, self.input.columns
        # R as where G is there. The precision of G tells how much of a rest is rounding
        R = G.narrow(short, 0, r).to(self.geometry.compute_dtype).contiguous()
        return LowRank(R, None, G.narrow(short, r, len(range(self.input.size)[columns])), columns=columns)

    def update(self, low: LowRank | None, check: GradientCheck, movements: Movements) -> None:
        """As of every matrix; the next forward pass needs the next P, see `LayerWeights.learn`."""
        super().update(low, check, movements)
        self.stepped = low is not None

    def of_gradient(self, G: Tensor) -> Tensor:
        """What its layers would have made of a gradient that W has from elsewhere: R, and with it G_S."""
        R, shared = self.op.down(G, self.P.read().to(G.dtype)), self.input
        if shared is None or shared.residual_sample is None:
            return R
        return torch.cat([R, shared.columns_of(G, self._short)], dim=self._short)

    @property
    def _short(self) -> int:
        """The dimension of R that is projected: that of the inputs."""
        return 0 if self.layer.transposed else 1

    def move(self, D: Tensor, low: LowRank, check: GradientCheck) -> Moving | None:
        """As of every matrix; then a divided P moves, if this was the last weight that uses it."""
        super().move(D, low, check)
        lesson = self.leader.lesson
        if lesson is None:
            return None
        lesson.users.discard(self)
        return None if lesson.users else self.leader.learn_own()

    def learn_own(self) -> Moving:
        """What a divided P is to move by: of its lesson, which this ends."""
        assert self.lesson is not None
        (shared, check, _, observed), self.lesson = self.lesson, None
        A, dtype = shared.A, self.geometry.compute_dtype
        if A is None:  # of a process that has not called its layers
            A = torch.zeros_like(self.P.kept(), dtype=dtype)
        elif shared.averaged:  # what all have is the sum of so many equal parts
            A = A / len(self.P.rows.sizes)  # type: ignore[union-attr]
        shared.A, A = None, A.to(dtype)
        if observed:
            self.seen = observation(self.P, self.P.read().mT @ A, check)
        self.P.count = self.clock
        return Moving(self.P, self.P.kept(), A, check)

    @property
    def factor_dtype(self) -> torch.dtype:
        """See `ProjectedWeight`; what is added to int8 weights is rounded at random."""
        return self.geometry.compute_dtype if isinstance(self.p, Int8Weight) else super().factor_dtype

    def _add_(self, update: Update, rate: Any, check: GradientCheck) -> None:
        W: Any = self.p
        if isinstance(W, Int8Weight):
            add_to_int8_(W, self.op, update, rate, self._rounding(check))
        else:
            super()._add_(update, rate, check)

    def follow(self, rules: Rules) -> None:  # noqa: D102 - see Weight
        super().follow(rules)
        group, geometry, layer = self.group, self.geometry, self.layer
        if rules.residual == "scaled" or residual_sample_of(group) not in (None, layer.residual_sample):
            raise ValueError(
                f"`residual` and `residual_sample` of {geometry.name} cannot become other ones: its layers were "
                "prepared for those that the optimizer was made with. Make another one."
            )
        self.residual = None if rules.residual == "none" else SignOfColumns(geometry, group, self.slot)
        layer.every = projection_sample_of(group)
        layer.kind = (id(group), geometry.rank)  # those of one group move P alike
        layer.first = FirstProjection(
            rules.subspace,
            geometry.side,
            group["init"],
            geometry.rank,
            geometry.seed,
            geometry.compute_dtype,
            self.given,
        )
        if layer.input is not None and layer.input.leader == geometry.name:
            layer.input.first, layer.input.every = layer.first, layer.every

    def begin(self) -> None:  # noqa: D102
        if self.leader is self:
            super().begin()
        else:
            Weight.begin(self)

    def resume(self) -> None:  # noqa: D102
        if self.leader is not self:
            Weight.resume(self)
            return
        super().resume()
        if self.P.rows is not None:  # it may have moved while this weight did not
            states = (self._states.get(weight.parameter, {}) for weight in self.sharing)
            self.P.started = any("step" in state and bool(state["step"] > 0) for state in states)
        if self.P.started and self.input is not None:
            self.give()
            self.schedule(self.input)

    @property
    def input(self) -> SharedInput | None:
        """Of its layer."""
        return self.layer.input

    def adopt(self) -> None:
        """Keep in the state, which is new, the P that the forward pass has used; a sketch is none."""
        shared = self.input
        if self.P.started or shared is None or not shared.started or shared.P is None:
            return
        if self.P.rule.code is None:
            rows = self.P.rows if shared.rows is None else None  # else it has this process's already
            self.P.stored.copy_(shared.P if rows is None else rows.own(shared.P))
        elif shared.code is not None:  # of a state that is gone
            self.slot.state[self.P.key].copy_(shared.code)
            self.P.forget()
        else:
            self.P.make(shared.P, Make(self.group["init"], 0, first=True))
        self.P.started = True
        self.give()

    def learn(self, shared: SharedInput, check: GradientCheck, movements: Movements) -> None:
        """Start or move P by what its input has shown since the last step; `check` is of ||x||²."""
        A = shared.A
        if A is not None and A.dtype != self.geometry.compute_dtype:  # the model has been converted since
            A = A.to(self.geometry.compute_dtype)
        if A is not None and not self.P.started:
            if not usable(check):  # reads the device: this happens once
                shared.P = shared.first.draw(A.shape[0], A.device)
                return
            # P_0 = orth(xᵀ x Ω)
            P, rows = torch.linalg.qr(A).Q, self.P.rows
            self.P.stored.copy_(P if rows is None else rows.own(P))
            self.P.started = True
            for weight in self.sharing:
                if weight.mark is not None:
                    Weight.resume(weight)  # steps that were skipped before
        elif A is not None and self.P.rule.moves():  # its rule may be another now
            self.P.count = self.clock
            movements.add(Moving(self.P, self.P.kept(), A, check))
        if self.P.started:
            self.give()

    def renew(self, shared: SharedInput) -> None:
        """Make P anew, without a look at anything; the moments of all that share it follow."""
        assert shared.P is not None
        none = torch.zeros((), device=shared.P.device)
        self.P.renew(shared.P, Make(self.group["init"], self.clock, first=False), check_of(none, False))
        self.give()

    def give(self) -> None:
        """P for the next forward pass, or this process's rows of it."""
        rows, code = self.P.rows, None if self.P.rule.code is None else self.slot.state[self.P.key]
        self.layer.use(self.P.stored if rows is not None else self.projection, code, rows)

    def schedule(self, shared: SharedInput) -> None:
        """Whether P is to learn in the next forward pass, and of which tokens."""
        clock, rule = self.clock, self.P.rule
        shared.learns, shared.turn = rule.moves_at(clock), clock // rule.stride % shared.every
        shared.columns_turn = clock

    def observe_input(self, shared: SharedInput, check: GradientCheck) -> tuple[Tensor, Tensor] | None:
        """Share of the inputs outside the subspace and error of P's orthogonality; `None` where nothing was seen."""
        if shared.A is None or not self.P.started:
            return None
        return observation(self.P, self.P.read().mT @ shared.A, check)  # K = Pᵀ xᵀ x P

    def observe(self, low: LowRank | None, check: GradientCheck) -> None:
        """Nothing: see `observe_input`."""


def checked(
    seen: list[tuple[InputWeight, SharedInput]],
) -> Iterator[tuple[InputWeight, SharedInput, GradientCheck]]:
    """With what has been seen of inputs its check, made for all at once."""
    if seen:
        norms2 = torch.stack([shared.norm2() for _, shared in seen])
        checks = map(GradientCheck._make, zip(*map(torch.unbind, check_of(norms2, True)), strict=True))
        yield from ((weight, shared, check) for (weight, shared), check in zip(seen, checks, strict=True))
