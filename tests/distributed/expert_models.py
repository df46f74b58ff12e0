"""A small mixture of experts, and the same training on one process and on several."""

import torch
from sharded_models import RANK
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_osd import OSD


WIDTH, INNER = 12, 20


class TopExperts(nn.Module):
    """Stacks (E, m, n), of which every one is used in each pass: without tokens for nothing."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, INNER) / INNER**0.5)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up.unbind(), self.down.unbind(), strict=True)):
            tokens, place = (chosen == e).nonzero(as_tuple=True)
            out = (x[tokens] @ up.mT).relu() @ down.mT
            y = y.index_add(0, tokens, out * weights[tokens, place, None])
        return y


class Block(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = TopExperts(experts)
        self.frozen = TopExperts(experts).requires_grad_(False)

    def forward(self, x: Tensor, resting: int) -> Tensor:
        shape, x = x.shape, self.mix(self.norm(x)).flatten(0, 1)
        logits = self.gate(x)
        if logits.shape[1] > 2:  # one expert without tokens
            logits = logits.index_fill(1, torch.tensor([resting % logits.shape[1]]), float("-inf"))
        weights, chosen = logits.softmax(dim=1).topk(min(2, logits.shape[1]), dim=1)
        return (x + self.experts(x, chosen, weights) + self.frozen(x, chosen, weights)).view(shape)


class MoE(nn.Module):
    resting = 0

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, WIDTH)
        self.blocks = nn.ModuleList([Block(experts) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 37, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x, self.resting)
        return self.head(x)


def make_moe(experts: int) -> MoE:
    torch.manual_seed(0)
    return MoE(experts).double()


def shard_moe(model: MoE, mesh=None) -> MoE:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule) and isinstance(model.blocks[0].experts.up, DTensor)
    return model


def optimizer_of(model: nn.Module, **options) -> OSD:
    """Dense matrices are projected on the right, as where they are sharded; experts as always."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    stacks = [(name, p) for name, p in named if p.ndim == 3]
    dense = [(name, p) for name, p in named if "mix.weight" in name]
    known = {name for name, _ in stacks + dense}
    return OSD(
        [
            {"params": stacks, "rank": RANK},
            {"params": dense, "rank": RANK, "side": "right", "projection_sample": 1},
            {"params": [(name, p) for name, p in named if name not in known]},
        ],
        **{"lr": 1e-2, "weight_decay": 0.01, **options},
    )
