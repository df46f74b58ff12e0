"""Small float64 nets and their steps, for tests of `source="activations"`."""

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_osd


N, TOKENS = 20, 12


class Net(nn.Module):
    """Two layers with one input, with and without bias, then GPT-2's layer; the middle is not square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(N, 28), nn.Linear(N, 28, bias=False), Conv1D(16, 28)])
        self.norm = nn.LayerNorm(16)
        nn.init.normal_(self.layers[2].weight, std=0.2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layers
        return self.norm(c(torch.tanh(a(x)) * b(x)))


class Other(nn.Module):
    """A net around given modules, which `forward` uses as it is told."""

    def __init__(self, forward: Any, **modules: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(modules)
        self._forward = forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layers, x)


def batch(step: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(3, tokens, N, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def loss_of(y: Tensor) -> Tensor:
    return (y - torch.sin(3 * y.detach())).square().sum(-1).mean()


def make(net: nn.Module, optim: str = "osd_adamw", **options: Any) -> hf_osd.OSD:
    defaults = {"lr": 1e-2, "rank": 4, "source": "activations", "target_modules": "all-linear"}
    return hf_osd.create_osd_optimizer(net, optim, **{**defaults, **options})


def int8_net(**options: Any) -> tuple[Net, hf_osd.OSD]:
    """A net with weights in 8 bits, and its optimizer."""
    net = Net()
    return net, make(net, weight_dtype="int8", **options)


def train(net: Any, optimizer: Any, steps: Any, batches: int = 1) -> None:
    for step in steps:
        for x in batch(step).chunk(batches):
            (loss_of(net(x)) * len(x) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()


def distance(net: nn.Module, other: nn.Module) -> float:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def copies(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return [copy.deepcopy(net), torch.load(buffer, weights_only=False)]
