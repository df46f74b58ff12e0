"""Two matrices and a vector with names, and steps by gradients of noise."""

import torch
from torch import nn

from hf_osd import OSD


def make(rank: int = 6, **options) -> tuple[list[nn.Parameter], OSD]:
    torch.manual_seed(0)
    A, B, b = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(40, 16)), nn.Parameter(torch.randn(30))
    groups = [{"params": [("A", A), ("B", B)], "rank": rank}, {"params": [("b", b)]}]
    return [A, B, b], OSD(groups, **{"lr": 1e-2} | options)


def run(params: list[nn.Parameter], optimizer: OSD, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
