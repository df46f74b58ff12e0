"""A rule's direction from a gradient, with moments that are loaded from the state and stored there again."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...update_rules import GradientCheck, Moment, MomentStorage, UpdateRule
from .sharding import Sharding, divided


class Role(NamedTuple):
    """Whose direction it is: the weight's or the projection's.

    Attributes:
        rule ([`UpdateRule`]): The rule.
        storage ([`MomentStorage`]): How its moments are kept.
        shape (`tuple[int, ...]`): Shape of its gradients, of all processes together.
        prefix (`str`): Of its entries in the state: empty, or `"projection_"`.
        sharding ([`Sharding`], *optional*): How its gradients are divided among processes.
    """

    rule: UpdateRule
    storage: MomentStorage
    shape: tuple[int, ...]
    prefix: str = ""
    sharding: Sharding | None = None

    @property
    def step(self) -> str:
        """Name of its step counter."""
        return self.prefix + "step"


def direction(role: Role, state: dict, G: Tensor, check: GradientCheck, piece: slice | None = None) -> Tensor:
    """The rule's direction for the gradient `G`, or for the flat piece of it that is `G`."""
    rule, shape, sharding = role.rule, role.shape, role.sharding
    if sharding is not None and rule.elementwise and not G.numel():
        return G  # a process with no part of the parameter
    values = load_moments(role, state, G.dtype, piece)
    if sharding is None or rule.elementwise:
        D = rule.direction(G, values, state[role.step], check)
    else:  # means over the whole parameter
        whole = {
            m.name: sharding.wrap(values[m.name], m.shape, divided(m, sharding, len(shape)))
            for m in _moments(rule, shape)
        }
        D = sharding.unwrap(rule.direction(sharding.wrap(G, shape, sharding.dim), whole, state[role.step], check))
    store_moments(role, state, values, check.skip, piece)
    return D


def update_(
    role: Role,
    state: dict,
    W: Tensor,
    G: Tensor,
    check: GradientCheck,
    lr: float,
    weight_decay: float,
    piece: slice | None = None,
) -> None:
    """W <- (1 - lr weight_decay) W - lr direction(G), or nothing where `check.skip`."""
    fused = getattr(role.rule, "update_", None)
    if fused is not None and W.dtype == G.dtype and W.is_contiguous() and W.numel():
        values = load_moments(role, state, G.dtype, piece)
        fused(W, G, values, state[role.step], check, lr, weight_decay)
        store_moments(role, state, values, check.skip, piece)
        return
    D = direction(role, state, G, check, piece)
    if weight_decay:
        W.mul_(1 - lr * weight_decay * check.keep)
    W.add_(D, alpha=-lr)


def carry_moments(role: Role, state: dict, dtype: torch.dtype, turn: Callable[..., Tensor], skip: Tensor) -> None:
    """Move the moments into another basis.

    Args:
        role ([`Role`]): Of the weight.
        state (`dict`): Its state.
        dtype (`torch.dtype`): Precision of the computation.
        turn (`Callable`):
            Gives a tensor shaped like R in the new coordinates; with `square=True` through the squared overlaps.
        skip (`torch.Tensor`): bool, 0-dim: nothing has changed.
    """
    values = load_moments(role, state, dtype)
    new = {name: value.clone() for name, value in values.items()}
    role.rule.carry(new, turn, state[role.step])  # type: ignore[attr-defined]
    for name, value in values.items():  # the stored tensor itself, where nothing is decoded
        value.copy_(torch.where(skip, value, new[name]))
    store_moments(role, state, values, skip)


def load_moments(role: Role, state: dict, dtype: torch.dtype, piece: slice | None = None) -> dict[str, Tensor]:
    """The rule's moments by name, in `dtype`."""
    moments = _moments(role.rule, role.shape)
    return {moment.name: role.storage.load(state, moment, role.prefix, dtype, piece) for moment in moments}


def store_moments(
    role: Role, state: dict, values: dict[str, Tensor], skip: Tensor, piece: slice | None = None
) -> None:
    """Keep what `load_moments` gave, updated in place."""
    for moment in _moments(role.rule, role.shape):
        role.storage.store(state, moment, role.prefix, values[moment.name], piece, skip)


@lru_cache(maxsize=1024)
def _moments(rule: UpdateRule, shape: tuple[int, ...]) -> tuple[Moment, ...]:
    return rule.moments(shape)  # asked for at every step of every parameter


def cast(X: Tensor, dtype: torch.dtype) -> Tensor:
    """X in `dtype`; itself where it is."""
    return X if X.dtype == dtype else X.to(dtype)  # `to` costs microseconds even where it does nothing
