"""What an update rule must offer, and what it is told about a gradient."""

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class KeptMoment(NamedTuple):
    """A moment as the optimizer keeps it.

    Attributes:
        key (`str`): Name of its entry in the state.
        shape (`tuple`): Its shape.
        signed (`bool`): Whether it takes negative values.
        dtype (`torch.dtype`): Precision of the computation.
    """

    key: str
    shape: tuple[int, ...]
    signed: bool
    dtype: torch.dtype


class Moment(NamedTuple):
    """One state tensor of a rule.

    Attributes:
        name (`str`): As in `torch.optim` where it means the same (`exp_avg`, `exp_avg_sq`).
        shape (`tuple`): Its shape.
        signed (`bool`): Whether it takes negative values: 8-bit storage has a map for each case.
        dims (`tuple[int, ...]`, *optional*): The dimensions of the gradient that it has; all of them by default.
    """

    name: str
    shape: tuple[int, ...]
    signed: bool
    dims: tuple[int, ...] | None = None

    def kept(self, prefix: str, dtype: torch.dtype) -> KeptMoment:
        """The moment of a weight (`prefix` empty) or of its projection (`"projection_"`)."""
        return KeptMoment(prefix + self.name, self.shape, self.signed, dtype)


class GradientCheck(NamedTuple):
    """What is known of one gradient, as 0-dim tensors on its device: nothing of it is read by the host.

    A parameter whose gradient is not finite is skipped: its weight, moments and step count stay what they were. So is
    an expert that had no tokens.
    """

    inv_norm2: Tensor  # 1 / max(||G||², eps); nothing to use where skip
    skip: Tensor  # bool: G is not finite, or zero and an expert's
    found_inf: Tensor  # float32: 1 where skip, as torch's fused kernels take it
    keep: Tensor  # 1 - found_inf, in the precision of the computation
    broken: Tensor  # float32: 1 where G is not finite


class RuleStep(NamedTuple):
    """A step as a rule sees it, but for the gradient.

    Attributes:
        moments (`dict[str, torch.Tensor]`): By name; updated in place, unchanged where `check.skip`.
        step (`torch.Tensor`): float32, 0-dim: number of this step, counted from 1; of a stack a list of them.
        check ([`GradientCheck`]): Of the gradient.
        lr (`float` or `torch.Tensor`): For `update_` only. With the default a weight of zero becomes the direction.
        weight_decay (`float`): Likewise.
    """

    moments: dict[str, Tensor]
    step: Tensor | list[Tensor]
    check: GradientCheck
    lr: float | Tensor = -1.0
    weight_decay: float = 0.0


class UpdateRule(Protocol):
    """A rule is a frozen dataclass of its settings; its state lives in the optimizer.

    A rule whose moments can be turned into another basis also has `carry(moments, turn, step)`, and one that can move
    a weight in the pass that computes its direction `update_(W, G, now)`.

    Attributes:
        elementwise (`bool`):
            Whether entry i of the direction depends on entry i of gradient and moments only, so that a large
            parameter can be worked through in slices with small temporaries, and a sharded one in its parts. Other
            rules are given DTensors where a parameter is sharded, and write nothing in place that is a mean of them.
        stackable (`bool`):
            Whether it also takes several parameters of one shape at once: stacks (k, ...), with `now.step` a list, and
            of `now.check` nothing but `skip` and `keep`, (k, 1, ...). W is zero then, and nobody looks at moments
            where it skips.
    """

    elementwise: ClassVar[bool]
    stackable: ClassVar[bool]

    def __hash__(self) -> int:
        """Rules are values: what is derived from one is cached."""

    def moments(self, shape: tuple[int, ...]) -> tuple[Moment, ...]:
        """The state tensors for a gradient of this shape; they start at zero."""

    def direction(
        self,
        G: Tensor,  # gradient, not modified; anything where now.check.skip
        now: RuleStep,
    ) -> Tensor:
        """The descent direction, in the shape of G, zero where now.check.skip: the weight moves by -lr times it."""
