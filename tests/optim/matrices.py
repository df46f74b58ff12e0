"""A matrix, and steps by gradients of noise of a given size."""

import torch
from torch import nn

from hf_osd import OSD


RANK = 4


def matrix(rows: int = 24, columns: int = 40) -> nn.Parameter:
    generator = torch.Generator().manual_seed(rows * columns)
    return nn.Parameter(torch.randn(rows, columns, generator=generator))


def give(p: nn.Parameter, seed: int, scale: float = 1.0) -> None:
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype) * scale


def step(optimizer: OSD, *params: nn.Parameter, seed: int = 0, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        give(p, 100 * seed + i, scale)
    optimizer.step()
