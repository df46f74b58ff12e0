"""Nets that use their weights in many ways, and what a step of SubZero is by definition."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_osd.subzero import SubZero


class Net(nn.Module):
    """Embedding, linear layers either way, a tied one, GPT-2's, norm, convolution, attention and LSTM; in float64."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.gpt = Conv1D(12, 16)
        self.norm, self.dropout = nn.LayerNorm(12), nn.Dropout(dropout)
        self.convolution = nn.Conv1d(12, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(self.embedding(ids))))
        x = self.dropout(self.norm(self.gpt(x)))
        x = self.convolution(x.mT).mT
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.lstm(x)[0])

    def loss(self, ids: Tensor) -> Tensor:
        return functional.cross_entropy(self(ids).flatten(0, 1), ids.flatten())


def ids(seed: int = 1, batch: int = 3) -> Tensor:
    return torch.randint(30, (batch, 7), generator=torch.Generator().manual_seed(seed))


def directions(optimizer: SubZero, query: int = 0) -> dict[str, Tensor]:
    """Zt of the step that is drawn, by the formulas."""
    found = {}
    for name, weight in optimizer.weights.weights.items():
        if hasattr(weight, "U"):
            (m, n), r = weight.W.shape, weight.rank
            mu = (m * n) ** 0.5 / r
            if getattr(weight, "basis", None) is not None:  # V follows the inputs, or U
                mu = ((m if weight.side == "right" else n) / r) ** 0.5
            found[name] = mu * weight.U @ weight.Z[query].to(weight.U.dtype) @ weight.V.T
        else:
            found[name] = torch.cat(list(weight._drawn(query))).reshape(weight.W.shape).to(weight.W.dtype)
    return found


def slope(model: nn.Module, loss: Callable[[], Tensor], Zt: dict[str, Tensor]) -> Tensor:
    """<gradient, Zt>, by autograd."""
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss(), params)
    return sum((G * Zt[name]).sum() for name, G in zip(names, grads, strict=True))
