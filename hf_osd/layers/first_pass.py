"""No compilation before layers have met their inputs: which share one is seen in an ordinary forward pass only."""

from typing import Any
from weakref import WeakSet

import torch


_waiting: WeakSet = WeakSet()
_stances: list[Any] = []  # the one that was set, whose end restores the user's


def wait_for_first_pass(layers: Any) -> None:
    """Let `torch.compile` wait until `end_first_pass`: compiled functions run as they are written."""
    if not _waiting:
        _stances.append(torch.compiler.set_stance("force_eager"))
    _waiting.add(layers)


def end_first_pass(layers: Any) -> None:
    """Compile again, unless the layers of another model wait."""
    _waiting.discard(layers)
    if _stances and not _waiting:
        _stances.pop().__exit__(None, None, None)
