"""Runs of one update rule on random gradients, the same ones for every optimizer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_osd import OSD


LR = 1e-2
STEPS = 100
SHAPES = [(24, 40), (40, 24), (33,)]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def train(
    make: Make,
    shape: tuple[int, ...],
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    change: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter after `steps` random gradients, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    optimizer = make([p])
    for step in range(steps):
        G = torch.randn(shape, generator=generator, dtype=dtype)
        p.grad = G if change is None else change(step, G)
        optimizer.step()
    return p, optimizer


def osd(rule: str, **options) -> Make:
    return lambda params: OSD(params, LR, weight_rule=rule, **options)
