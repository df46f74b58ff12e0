"""A parameter with what it is stepped by: the part that projected and full-size parameters share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...update_rules import GradientCheck
from ..options.rules import Rules
from .geometry import Geometry
from .moments import Moments
from .rounding import Rounding, noise_of


State = dict[str, Tensor]


class Weight:
    """A parameter with what it is stepped by. Derived from group and state, and never saved.

    Args:
        p (`torch.Tensor`): The parameter, or this process's part of it.
        geometry ([`Geometry`]): Its facts.
        group (`dict`): Its group, live: schedulers change it between steps.

    Attributes:
        state (`dict[str, torch.Tensor]`): Its state; of a sharded one this process's parts. Set by `bind`.
        count (`int`): Steps so far, skipped ones included; what the host knows without asking the device.
    """

    def __init__(self, p: Tensor, geometry: Geometry, group: Mapping[str, Any]):
        self.p, self.geometry, self.group = p, geometry, group
        self.state: State = {}
        self.count = 0
        self.seen: State | None = None  # the state in the optimizer that `state` is made of
        self.mark: Tensor | None = None  # its `step`; `None` without a state

    def follow(self, rules: Rules) -> None:
        """Go by these rules from now on; `bind` comes next."""
        geometry = self.geometry
        self.rules = rules
        self.moments = Moments(
            rules.weight,
            rules.weight_storage,
            geometry.update_shape,
            geometry.compute_dtype,
            sharding=geometry.sharding,
        )

    def bind(self, state: State) -> None:
        """Work on this state, which belongs to the same training as the last one."""
        self.state = self.moments.state = state

    def begin(self) -> None:
        """Forget all steps: the state is empty."""
        self.count = 0

    def resume(self) -> None:
        """Go on from a state that has been loaded. Reads the device."""
        self.count = sum(int(self.state[name]) for name in ("step", "skipped_steps"))

    def _decay(self, check: GradientCheck) -> Tensor | None:
        """Factor on W, 1 where the step is skipped; `None` without weight decay."""
        lr, weight_decay = self.group["lr"], self.group["weight_decay"]
        return 1 - lr * weight_decay * check.keep if weight_decay else None

    def _rounding(self, check: GradientCheck) -> Rounding:
        """How to round the update at random."""
        return Rounding(noise_of(self.p.device, self.geometry.seed, self.count), self._decay(check))
