"""P's movement on a CUDA stream of its own, beside the steps of the weights that follow.

The paper's "executed in parallel with weight updates": what moves P is r wide, and once its own weight has been
stepped nothing in the step reads P. The second stream waits for what the first one has been given so far, and the
first one, at the end of the step, for the second: P between steps is what it ever was. A CUDA graph can hold it.
"""

from collections import deque
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch


AT_ONCE = 4  # pieces of work whose tensors are kept for the second stream


class SideStreams:
    """The second stream of each device, for one step.

    Args:
        device_types (`Collection[str]`): Of the parameters.

    Raises:
        ValueError: Where they are not on CUDA devices alone.
    """

    def __init__(self, device_types: Collection[str]):
        if set(device_types) - {"cuda"}:
            raise ValueError(
                f"`projection_stream` is for CUDA devices, and parameters are on {', '.join(sorted(device_types))}: "
                "leave it out."
            )
        self._running: dict[torch.device, deque[tuple[Any, list]]] = {}

    def run(self, work: Callable[[list], object], given: list, device: torch.device) -> None:
        """Do `work` on tensors that the current stream has made or will have."""
        running = self._running.setdefault(device, deque())
        main, side = torch.cuda.current_stream(device), second_stream(device)
        if len(running) == AT_ONCE:  # what it was given was allocated for the current stream, which may use it again
            main.wait_event(running.popleft()[0])
        side.wait_event(main.record_event())
        held = list(given)  # `work` may drop its own
        with torch.cuda.stream(side):
            try:
                work(given)
            finally:
                running.append((side.record_event(), held))

    def join(self) -> None:
        """Let the current streams wait for all that was done beside them."""
        for device, running in self._running.items():
            torch.cuda.current_stream(device).wait_event(running[-1][0])  # the events of a stream come in order
        self._running.clear()


@cache
def second_stream(device: torch.device) -> Any:
    """One for all steps: a stream has memory and workspaces of its own."""
    return torch.cuda.Stream(device)
