"""The way of one step through the package: short, so that whoever reads it has it in mind at once."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import hf_osd
from hf_osd import OSD


PACKAGE = Path(hf_osd.__file__).parent


class Calls:
    """Python functions of the package that run inside `watched`."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, str, int]] = []  # file, function, arguments but for self
        self.depth = self.deepest = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or event not in ("call", "return"):
            return
        self.depth += 1 if event == "call" else -1
        self.deepest = max(self.deepest, self.depth)
        if event == "call":
            arguments = inspect.getargs(code).args
            file = str(Path(code.co_filename).relative_to(PACKAGE))
            self.frames.append((file, code.co_name, len([name for name in arguments if name not in ("self", "cls")])))

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(before)


def fourth_step(**options: Any) -> Calls:
    """The calls of a later step of one matrix: the first ones make the state and P."""
    torch.manual_seed(0)
    W, calls = nn.Parameter(torch.randn(96, 64)), Calls()
    optimizer = OSD([{"params": [W], "rank": 8}], lr=1e-3, **options)
    for _ in range(3):
        W.grad = torch.randn(96, 64)
        optimizer.step()
    W.grad = torch.randn(96, 64)
    with calls.watched():
        optimizer.step()
    return calls


def test_a_step_is_short():
    calls = fourth_step()
    assert 30 < len(calls.frames) <= 45, calls.frames  # or nothing was watched
    assert len({file for file, _, _ in calls.frames}) <= 13
    assert calls.deepest <= 9


@pytest.mark.parametrize(
    "options",
    [{}, {"residual": "scaled", "weight_decay": 0.1}, {"weight_rule": "adamw8bit"}, {"side": "two_sided"}],
    ids=["plain", "scaled", "8bit", "two_sided"],
)
def test_nothing_is_carried_along(options: dict[str, Any]):
    """Three arguments at most, but for equations, which have as many as they have letters."""
    for file, function, arguments in fourth_step(**options).frames:
        assert arguments <= 3 or file.startswith("subspace"), (file, function)
