"""A parameter with what it is stepped by: the part that projected and full-size parameters share."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...update_rules import GradientCheck
from ..options.rules import Rules
from .geometry import Geometry, ProjectedGeometry
from .moments import Moments
from .rounding import Rounding, noise_of
from .slot import Slot


class Weight:
    """A parameter with what it is stepped by. Derived from group and state, and never saved.

    Args:
        p (`torch.Tensor`): The parameter, or this process's part of it.
        geometry ([`Geometry`]): Its facts.
        group (`dict`): Its group, live: schedulers change it between steps.

    Attributes:
        dtype (`torch.dtype`): Of the parameter when this was made.
        slot ([`Slot`]): Holds its state.
        slots (`list[Slot]`): All that hold any of it.
        count (`int`): Steps so far, skipped ones included; what the host knows without asking the device.
        capturable (`bool`): Whether a CUDA graph may hold its steps, of which the host then counts none.
    """

    capturable = False

    def __init__(self, p: Tensor, geometry: Geometry, group: Mapping[str, Any]):
        self.p, self.geometry, self.group, self.dtype = p, geometry, group, p.dtype
        self.slot = Slot()
        self.slots = [self.slot]
        self.count = 0
        self.mark: Callable[[], Tensor | None] | None = None  # reference to the state's `step`, if there is a state

    def follow(self, rules: Rules) -> None:
        """Go by these rules from now on."""
        geometry = self.geometry
        self.rules = rules
        self.moments = Moments(
            rules.weight,
            rules.weight_storage,
            geometry.update_shape,
            geometry.compute_dtype,
            self.slot,
            sharding=geometry.sharding,
            step="moment_step" if rules.restarts and isinstance(geometry, ProjectedGeometry) else "step",
        )

    @property
    def settled(self) -> bool:
        """Whether all is there that first steps make: P moves at the second."""
        return self.count > 1

    def refuse_other_shape(self, G: Tensor) -> None:
        """Raise `ValueError` for a gradient of another shape than the state is for, but for part of a sharded one."""
        if self.geometry.sharding is None:
            raise ValueError(
                f"{self.geometry.name} has become {tuple(G.shape)}, and its state is of {tuple(self.geometry.shape)}, "
                "as when embeddings are resized: make the optimizer after that."
            )

    def release(self) -> None:
        """Let go of the state at the end of a step."""
        for slot in self.slots:
            slot.state = {}

    def begin(self) -> None:
        """Forget all steps: the state is empty."""
        self.count = 0

    def resume(self) -> None:
        """Go on from a state that has been loaded. Reads the device."""
        self.count = sum(int(self.slot.state[name]) for name in ("step", "skipped_steps"))

    def _decay(self, check: GradientCheck) -> Tensor | None:
        """Factor on W, 1 where the step is skipped; `None` without weight decay."""
        lr, weight_decay = self.group["lr"], self.group["weight_decay"]
        return 1 - lr * weight_decay * check.keep if weight_decay else None

    def _rounding(self, check: GradientCheck) -> Rounding:
        """How to round the update at random."""
        return Rounding(noise_of(self.p.device, self.geometry.seed, self.count), self._decay(check))
