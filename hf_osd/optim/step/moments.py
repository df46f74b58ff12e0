"""A rule and its moments in the state of one parameter: loaded, used and stored again at each step."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ...update_rules import GradientCheck, MomentStorage, RuleStep, UpdateRule
from .sharding import Sharding, divided
from .slot import Slot


class Pace(NamedTuple):
    """How far a step goes.

    Attributes:
        check (`GradientCheck`): Of the gradient; the step goes nowhere where `check.skip`.
        lr (`float` or `torch.Tensor`): Learning rate; on the device it is not read.
        weight_decay (`float`): Decoupled weight decay.
        piece (`slice`, *optional*): The flat piece of the parameter that is stepped; all of it by default.
    """

    check: GradientCheck
    lr: float | Tensor
    weight_decay: float
    piece: slice | None = None


def add_times_(X: Tensor, D: Tensor, rate: float | Tensor) -> None:
    """X <- X + rate D, where D may be overwritten: on the device, where the rate is there."""
    if isinstance(rate, Tensor):
        X.add_(D.mul_(rate))
    else:
        X.add_(D, alpha=rate)


class Moments:
    """A rule in one of its two roles: the weight's, or its projection's.

    Args:
        rule ([`UpdateRule`]): The rule.
        storage ([`MomentStorage`]): How its moments are kept.
        shape (`tuple[int, ...]`): Shape of its gradients, of all processes together.
        dtype (`torch.dtype`): Precision of the computation.
        slot ([`Slot`]): Holds the state of the parameter.
        prefix (`str`, *optional*): Of its entries in the state: empty for the weight, or `"projection_"`.
        sharding ([`Sharding`], *optional*): How its gradients are divided among processes.
        step (`str`, *optional*): Name of the entry that counts its steps, behind the prefix.

    Attributes:
        counter (`str`): That name with the prefix.
        kept (`list[tuple[str, KeptMoment]]`): Its moments by name.
        fused (`bool`): Whether the rule has `update_`.
        stackable (`bool`): Whether the moments of several may be decoded and encoded together: `form` tells.
    """

    def __init__(
        self,
        rule: UpdateRule,
        storage: MomentStorage,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        slot: Slot,
        prefix: str = "",
        sharding: Sharding | None = None,
        step: str = "step",
    ):
        self.rule, self.storage, self.shape, self.sharding = rule, storage, shape, sharding
        self.dtype, self.slot = dtype, slot
        self.counter = prefix + step
        self._moments = rule.moments(shape)
        self.kept = [(moment.name, moment.kept(prefix, dtype)) for moment in self._moments]
        self.fused = hasattr(rule, "update_")
        self.stackable = rule.stackable and storage.stackable

    @property
    def form(self) -> tuple | None:
        """How the state has them: those of several that have one form can be stacked; `None` where these cannot."""
        if not self.stackable:
            return None
        forms = tuple(self.storage.form(self.slot.state, kept) for _, kept in self.kept)
        return None if not forms or None in forms else forms

    def direction(self, G: Tensor, check: GradientCheck, piece: slice | None = None) -> Tensor:
        """D = rule(G), for the gradient `G` or for the flat piece of it that is `G`."""
        sharding, rule = self.sharding, self.rule
        if sharding is not None and rule.elementwise and not G.numel():
            return G  # a process with no part of the parameter
        values, stored = self.load(piece)
        now = RuleStep(values, self.slot.state[self.counter], check)
        if self.fused:
            D = torch.zeros_like(G, memory_format=torch.contiguous_format)
            rule.update_(D, G, now)  # type: ignore[attr-defined]
        elif sharding is None or rule.elementwise:
            D = rule.direction(G, now)
        else:  # means over the whole parameter
            whole = now._replace(moments=self._whole(values, sharding))
            D = sharding.unwrap(rule.direction(sharding.wrap(G, self.shape, sharding.dim), whole))
        if stored:
            self._store(values, stored, check.skip)
        return D

    def _whole(self, values: dict[str, Tensor], sharding: Sharding) -> dict[str, Tensor]:
        return {
            m.name: sharding.wrap(values[m.name], m.shape, divided(m, sharding, len(self.shape)))
            for m in self._moments
        }

    def update_(self, W: Tensor, G: Tensor, pace: Pace) -> None:
        """W <- (1 - lr weight_decay) W - lr rule(G), or nothing where `pace.check.skip`."""
        check, lr, weight_decay, piece = pace
        if self.fused and W.dtype == G.dtype and W.is_contiguous() and W.numel():
            values, stored = self.load(piece)
            self.rule.update_(  # type: ignore[attr-defined]
                W, G, RuleStep(values, self.slot.state[self.counter], check, lr, weight_decay)
            )
            if stored:
                self._store(values, stored, check.skip)
            return
        D = self.direction(G, check, piece)
        if weight_decay:
            W.mul_(1 - lr * weight_decay * check.keep)
        add_times_(W, D, -lr)

    def carry(self, turn: Callable[..., Tensor], skip: Tensor) -> None:
        """Move the moments into another basis.

        Args:
            turn (`Callable`):
                Gives a tensor shaped like R in the new coordinates; with `square=True` through the squared overlaps.
            skip (`torch.Tensor`): bool, 0-dim: nothing has changed.
        """
        values, stored = self.load()
        new = {name: value.clone() for name, value in values.items()}
        self.rule.carry(new, turn, self.slot.state[self.counter])  # type: ignore[attr-defined]
        for name, value in values.items():  # the stored tensor itself, where nothing is decoded
            value.copy_(torch.where(skip, value, new[name]))
        self._store(values, stored, skip)

    def restart(self) -> None:
        """Be as before the first step."""
        state = self.slot.state
        keys = [key for _, kept in self.kept for key in self.storage.spec(kept)]
        torch._foreach_zero_([state[key] for key in (self.counter, *keys) if key in state])

    def load(self, piece: slice | None = None) -> tuple[dict[str, Tensor], list]:
        """The moments by name, in the precision of the computation, and what storing them takes."""
        values, stored = {}, []
        for name, kept in self.kept:
            value = self.slot.state[kept.key]
            if piece is None and value.dtype == kept.dtype:  # the rule works on the stored tensor itself
                values[name] = value
                continue
            values[name], own = self.storage.load(self.slot.state, kept, piece)
            if own is not None:
                stored.append((name, own))
        return values, stored

    def _store(self, values: dict[str, Tensor], stored: list, skip: Tensor) -> None:
        for name, own in stored:
            self.storage.store(own, values[name], skip)


def launches(X: Tensor) -> bool:
    """Whether what is done to X costs launches of kernels. On a CPU a stack only leaves the caches."""
    return not X.is_cpu


def joint_steps(members: Sequence[Moments], G: Tensor, paces: Sequence[Pace]) -> Tensor:
    """-lr rule(G) of each of several parameters, 0 where it is skipped; their steps are counted.

    Args:
        members (`list[Moments]`): k of one rule, storage, shape and `form`.
        G (`torch.Tensor`): Their gradients, a stack (k, ...).
        paces (`list[Pace]`): Of each: with one learning rate, without weight decay, and not in pieces.
    """
    first, counters, checks = members[0], [], []
    for moments, pace in zip(members, paces, strict=True):
        counters.append(moments.slot.state[moments.counter])
        checks.append(pace.check)
    torch._foreach_add_(counters, list(map(attrgetter("keep"), checks)))
    if len(members) > 1 and launches(G) and first.form is not None:
        apart = (-1, *[1] * (G.ndim - 1))
        skip, keep = (torch.stack([getattr(c, name) for c in checks]).view(apart) for name in ("skip", "keep"))
        unknown = skip.new_empty(0)
        check = GradientCheck(inv_norm2=unknown, skip=skip, found_inf=unknown, keep=keep, broken=unknown)
        return _stacked_steps(members, G, RuleStep({}, counters, check, paces[0].lr))
    steps = torch.zeros_like(G, memory_format=torch.contiguous_format)
    for moments, step, own, pace in zip(members, steps, G, paces, strict=True):
        moments.update_(step, own, pace)
    return steps


def _stacked_steps(members: Sequence[Moments], G: Tensor, now: RuleStep) -> Tensor:
    """As `joint_steps`, of moments that are decoded for it: all of them at once."""
    first, states = members[0], [moments.slot.state for moments in members]
    names, kept = zip(*first.kept, strict=True)
    values, stored = first.storage.load_stack(states, kept)
    now.moments.update(zip(names, values, strict=True))
    if first.fused:
        steps = torch.zeros_like(G, memory_format=torch.contiguous_format)
        first.rule.update_(steps, G, now)  # type: ignore[attr-defined]
    else:
        steps = first.rule.direction(G, now).mul_(-now.lr)
    first.storage.store_stack(stored, values, now.check.skip)
    return steps
