"""P of one weight between steps: how it starts, is made anew, and is read from the state.

Letters and shapes as in `subspace.operators`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layers.int8 import Int8Weight
from ...subspace import OPERATORS, Start, SubspaceRule, choose_init
from ...update_rules import GradientCheck
from ..options.rules import Rules
from ..options.table import decay_of_projection
from .geometry import ProjectedGeometry
from .gradients import EPS
from .moments import Moments
from .rounding import noise_of, round_into_, rounded
from .slot import Slot
from .state import P_SCALE


ROUNDING_APART = 32_452_843  # between the seeds of rounding a weight and its P
FACTORS_APART = 7_368_787  # between the seeds of a weight's two factors: far from other weights'


class Make(NamedTuple):
    """How a P is to be made from a gradient.

    Attributes:
        init (`str`): As the group has it.
        steps (`int`): Steps of the weight so far.
        first (`bool`): Whether there is no P yet.
    """

    init: str
    steps: int
    first: bool


class LiveProjection:
    """P of one matrix, or what a rule keeps instead of it, and P's own optimizer.

    Args:
        geometry ([`ProjectedGeometry`]): Of the weight.
        group (`dict`): The weight's group, live.
        slot ([`Slot`]): Holds the state of the weight.

    Attributes:
        started (`bool`): Whether P has been initialised.
        count (`int`): Steps of the weight, or of the one that P goes by, when P moves.
        rule ([`SubspaceRule`]): How P moves.
        decay (`str`): Name of the group's option that is P's weight decay.
        spread (`float`): Norm of a P whose entries are 1.
        expanded (`torch.Tensor`, *optional*): P beside the state, where the rule keeps it there.
        rows ([`Rows`], *optional*): How processes divide P, where they do: the state has this one's rows.
        gathered (`torch.Tensor`, *optional*): The whole of such a P, while it is here.
        copies (`int`): On how many processes each part of what such a P learns from is.
        sent_in (`torch.dtype`, *optional*): Precision in which the gradient of such a P is sent, if not its own.
    """

    def __init__(self, geometry: ProjectedGeometry, group: Mapping[str, Any], slot: Slot):
        self.geometry, self.group, self.slot = geometry, group, slot
        self.rows = geometry.rows
        self.sent_in: torch.dtype | None = None
        self.copies = 1 if geometry.sharding is None else geometry.sharding.copies
        self.started, self.count = False, 0
        self.carried: dict[str, Moments] = {}  # of each weight by name: what lives in P's coordinates
        self.forget()

    def follow(self, rules: Rules) -> None:
        """Go by these rules from now on."""
        geometry = self.geometry
        self.rule = rules.subspace
        self.decay = decay_of_projection(self.group)
        self.spread = math.prod(geometry.projection_shape) ** 0.5
        self.key = rules.subspace.code or "projection"
        self.moments: Moments | None = None
        if rules.projection is not None:
            shape, dtype = geometry.projection_shape, geometry.compute_dtype
            self.moments = Moments(
                rules.projection, rules.projection_storage, shape, dtype, self.slot, "projection_", self.rows
            )

    def forget(self) -> None:
        """Drop what was derived from the state."""
        self.expanded: Tensor | None = None
        self.gathered: Tensor | None = None

    def read(self) -> Tensor:
        """P in the precision of the computation: the tensor in the state itself where that has it."""
        return self.kept().to(self.geometry.compute_dtype)

    def kept(self) -> Tensor:
        """P as it is kept or was gathered: an int8 one is read by `to`."""
        if self.rule.code is not None:
            return self._expand(self.rule)
        if self.rows is not None:
            return self.whole()
        P = self.slot.state["projection"]
        return P if P.dtype != torch.int8 else self.stored

    @property
    def stored(self) -> Tensor:
        """P in the state, or this process's rows of it: to copy into it is to round to nearest."""
        state = self.slot.state
        P = state["projection"]
        return P if P.dtype != torch.int8 else Int8Weight(P, state[P_SCALE], torch.int8)

    def whole(self) -> Tensor:
        """All of a divided P, in the precision that it is kept or was gathered in: from all processes, if need be."""
        assert self.rows is not None
        if self.gathered is not None:
            return self.gathered
        own = self.stored
        own = own if own.is_floating_point() else own.to(self.geometry.compute_dtype)
        return self.rows.full(own, self.geometry.projection_shape)

    def _expand(self, rule: SubspaceRule) -> Tensor:
        if self.expanded is not None:
            return self.expanded
        geometry = self.geometry
        codes = self.slot.state[self.key].unbind() if geometry.two_sided else (self.slot.state[self.key],)
        parts = [
            rule.expand(code, rows, geometry.rank, geometry.compute_dtype)
            for code, rows in zip(codes, geometry.factor_rows, strict=True)
        ]
        P = torch.cat(parts) if geometry.two_sided else parts[0]
        if rule.keeps_expanded:
            self.expanded = P
        return P

    def write(self, P: Tensor) -> None:
        """Keep a P that has moved; nothing to do where it is the tensor in the state.

        In bfloat16 and int8 it is rounded at random: most steps are too small for it, and so add up.
        """
        stored = self.stored
        if P is stored:
            return
        if isinstance(stored, Int8Weight):
            stored.move_(P, self.noise)
        elif stored.dtype == torch.bfloat16:
            round_into_(stored, P.float(), self.noise)
        else:
            stored.copy_(P)

    @property
    def noise(self) -> torch.Generator:
        """What P is rounded with now."""
        return noise_of(self.slot.state["projection"].device, self.geometry.seed + ROUNDING_APART, self.count)

    def make(self, G: Tensor, how: Make) -> str:
        """A new P from the gradient G, (m, n) or this process's part of it; the settled `init` it was made by."""
        rule, geometry = self.rule, self.geometry
        init = choose_init(*geometry.size, geometry.rank, how.init) if rule.uses_init else how.init
        if geometry.sharding is not None and init != "orthonormal" and rule.reads_gradient:
            G = geometry.sharding.full(G, geometry.shape)
        stored = self.stored if rule.code is None else self.slot.state[self.key]
        olds = None if how.first or rule.code is None else stored.unbind() if geometry.two_sided else (stored,)
        sides = tuple(OPERATORS) if geometry.two_sided else (geometry.side,)
        # Orthonormal factors of a square weight must not be the same; singular vectors must be drawn in pairs.
        apart = FACTORS_APART if init == "orthonormal" else 0
        made = [
            rule.make(
                G,
                Start(side, geometry.rank, init, geometry.seed + i * apart, how.steps, geometry.compute_dtype),
                None if olds is None else olds[i],
            )
            for i, side in enumerate(sides)
        ]
        new = made[0]
        if geometry.two_sided:
            new = torch.cat(made) if rule.code is None else torch.stack(made)
        new = new if geometry.sharding is None else geometry.sharding.agree(new)
        stored.copy_(new if self.rows is None else self.rows.own(new))
        self.forget()
        if self.rows is not None:
            self.gathered = _as_kept(new, stored)
        return init

    def found(self) -> bool:
        """Whether the state has a divided P, given or loaded, that no step has used yet. Asks all processes."""
        if self.rows is None:
            return False
        some = self.slot.state["projection"].any().to(torch.float32)
        self.started = bool(self.rows.sum(some))
        return self.started

    def renew(self, G: Tensor, how: Make, check: GradientCheck) -> None:
        """A new P from G, in which the weights' moments go on as the group says."""
        old = self.read().clone() if self.group["carry_moments"] else None
        self.make(G, how)
        if old is not None:
            self.carry(self.read(), old, check.skip)
        if self.group["restart_moments"]:
            for moments in self._living():
                moments.restart()

    def carry(self, P: Tensor, old: Tensor, skip: Tensor) -> None:
        """Turn the weights' moments from the coordinates of the old P into those of P."""
        op = self.geometry.op

        def turn(X: Tensor, square: bool = False) -> Tensor:
            return op.carry(X, P, old, square)

        for moments in self._living():
            moments.carry(turn, skip)

    def _living(self) -> Iterator[Moments]:
        """The weights' moments; of a weight that has not been stepped yet there are none."""
        return (moments for moments in self.carried.values() if moments.slot.state)


def write_all(projections: Sequence[LiveProjection], P: Tensor) -> None:
    """As `write`, of a stack (k, s, r) of P that are kept in less than their precision."""
    stored = [projection.stored for projection in projections]
    if isinstance(stored[0], Int8Weight):
        for projection, own in zip(projections, P, strict=True):
            projection.write(own)
        return
    if stored[0].dtype == torch.bfloat16:
        P = rounded(P.float(), [projection.noise for projection in projections])
    torch._foreach_copy_(stored, P.to(stored[0].dtype).unbind())


def _as_kept(P: Tensor, stored: Tensor) -> Tensor:
    """What becomes of P where it is copied into what is kept so."""
    return Int8Weight.from_float(P).plain() if isinstance(stored, Int8Weight) else P.to(stored.dtype)


def usable(check: GradientCheck) -> Tensor:
    """bool: whether P can be made from the gradient, which is neither zero nor broken."""
    return ~check.skip & (check.inv_norm2 < 1 / EPS)
