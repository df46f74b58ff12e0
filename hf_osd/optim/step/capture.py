"""What must be so before `OSD.step` is captured in a CUDA graph, which repeats one step's kernels and asks nobody."""

import warnings

from ..options.table import refuse_baked_lr
from .geometry import names_of
from .weights import Weights


def check_capture(weights: Weights) -> None:
    """Raise where the coming step, which is captured, is not what all steps after it are to be.

    Raises:
        RuntimeError: Without `capturable`, in a step that is observed, with parameters on a CPU as well, without any
            gradient, and before all that the first steps make is there: states, P of all matrices and experts,
            constants of its movement.
        ValueError: For a learning rate on another device.
    """
    if not weights.capturable:
        raise RuntimeError("A CUDA graph cannot hold these steps: make the optimizer with `capturable=True`.")
    if weights.observing:
        raise RuntimeError("A CUDA graph holds no observation: set `collect_statistics` for steps outside of it.")
    if len(weights.device_types) > 1:
        raise RuntimeError(f"A CUDA graph holds no step on another device: {', '.join(sorted(weights.device_types))}.")
    if all(p.grad is None for group in weights.groups for p in group["params"]):
        raise RuntimeError(
            "No parameter has a gradient for a CUDA graph to read: make some steps before the capture, and keep the "
            "gradients where they are."
        )
    position = 0
    for index, group in enumerate(weights.groups):
        refuse_baked_lr(group, f"parameter group {index}")
        for name, p in zip(names_of(group, position), group["params"], strict=True):
            position += 1
            if p.grad is not None and not weights.settled(p):
                raise RuntimeError(
                    f"{name} has not made two steps with its state: make some before the capture, with "
                    "a gradient for each parameter and expert."
                )
    if any(type(group["lr"]) is float for group in weights.groups):
        warnings.warn(
            "The CUDA graph keeps the learning rate that it is captured with: for a schedule, make the optimizer with "
            "a tensor on the parameters' device.",
            stacklevel=5,
        )
