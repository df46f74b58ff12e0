"""8-bit moments with each element at the nearest code, found by comparing it with all: independent of kernels."""

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor


BLOCK = 256


def rounded(x: Tensor, signed: bool) -> Tensor:
    """What comes back of x, any shape, in float64."""
    code = create_dynamic_map(signed=signed).double()
    flat = torch.nn.functional.pad(x.double().view(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(1, keepdim=True).clamp(min=1e-300)
    nearest = ((flat / absmax).unsqueeze(2) - code).abs().argmin(2)
    return (code[nearest] * absmax).view(-1)[: x.numel()].view_as(x)


def assert_rounded(found: Tensor, x: Tensor, signed: bool) -> None:
    """Whether `found` is x at the nearest code; beside the middle between two, by 1/2048 of x, at either."""
    error, least = (found.double() - x).abs(), (rounded(x, signed) - x).abs()
    assert (error <= least + x.abs() / 2000 + 1e-7 * x.abs().max()).all()
    assert (error > 1.001 * least + 1e-6 * x.abs()).double().mean() < 5e-3
