"""A small model with an odd graph, and its training in either mode."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.options.mode import LAYERWISE_SUFFIX


LAYERS = {"source": "activations", "target_modules": "all-linear"}
INT8 = LAYERS | {"weight_dtype": "int8"}


class Net(nn.Module):
    """Two projected matrices, of which one is used twice and tied, and parameters at full size."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(24, 24, dtype=dtype) for _ in range(2))
        self.layers.append(nn.Linear(24, 40, dtype=dtype))
        self.layers[1].weight = self.layers[0].weight  # tied
        self.scale = nn.Parameter(torch.ones(24, dtype=dtype))
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layers[1](torch.tanh(self.layers[0](x))) * self.scale)

    def forward(self, x: torch.Tensor, reentrant: bool | None = None) -> torch.Tensor:
        for _ in range(2):  # every weight of the block twice more
            x = self.block(x) if reentrant is None else checkpoint(self.block, x, use_reentrant=reentrant)
        return self.layers[2](x).square().mean()


def inputs(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def optimizer_of(model: nn.Module, optim: str = "osd_adamw", layerwise: bool = False, **options) -> OSD:
    optim += LAYERWISE_SUFFIX * layerwise
    return create_osd_optimizer(model, optim, lr=1e-2, **({"rank": 6, "weight_decay": 0.1} | options))


def train(model: nn.Module, optimizer: OSD, steps: range, micro: int = 1, **given) -> None:
    for step in steps:
        for i in range(micro):
            (model(inputs(step * micro + i, next(model.parameters()).dtype), **given) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(steps: int = 5, dtype: torch.dtype = torch.float32, given: dict | None = None, **options):
    """The same training in both modes, with the same clipping to none."""
    models = Net(dtype), Net(dtype)
    for model, layerwise in zip(models, (False, True), strict=True):
        train(model, optimizer_of(model, layerwise=layerwise, **options), range(steps), **(given or {}))
    return models


def assert_equal(a: nn.Module, b: nn.Module, atol: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
