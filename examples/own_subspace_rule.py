"""A subspace rule of one's own: Oja's, against online PCA, on a tiny LLaMA.

`Oja` below is all that a rule takes: a frozen dataclass of its settings that inherits from `hf_osd.SubspaceRule` and
says when P moves (`moves_at`) and how (`advance_`). An instance of it is what `subspace` takes; the optimizer does
the rest: moments in the subspace, 8-bit states, layerwise steps, resume, experts, sharded weights. A rule can make
P anew from a gradient now and then as well (`refresh_due` and `make`), or use an optimizer for P (`learns = True` and
`move.descend`): see `SubspaceRule`.

Needs the package alone; the data are counting sequences made here. Takes seconds, then a minute:

    python examples/own_subspace_rule.py --steps 60
    python examples/own_subspace_rule.py --steps 600 --rank 16 --hidden_size 128
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_osd


@dataclass(frozen=True)
class Oja(hf_osd.SubspaceRule):
    """Oja's rule (1982) with columns kept orthonormal by a QR decomposition.

        P <- orth(P + rate Ĝ Ĝᵀ P),    Ĝ = G / ||G||        on the left side; Ĝᵀ for Ĝ on the right

    Args:
        rate (`float`, *optional*, defaults to 0.5): Step of P.
        every (`int`, *optional*, defaults to 1): P moves at steps 0, every, 2 every, ...
    """

    two_sided: ClassVar[bool] = False  # `advance_` is told of one P, not of two factors below each other

    rate: float = 0.5
    every: int = 1

    def moves_at(self, count: int) -> bool:
        """Whether P moves after step `count`; the product A = G Rᵀ is computed for such steps only."""
        return count % self.every == 0

    def advance_(self, P: Tensor, move: hf_osd.Movement) -> None:
        """Change P in place, without reading anything back to the host."""
        # G Gᵀ P = A, and 1 / ||G||² = inv_norm2
        Q, T = torch.linalg.qr(P + self.rate * move.inv_norm2 * move.A)
        Q.mul_(torch.where(T.diagonal() < 0, -1.0, 1.0).to(Q.dtype))  # a decomposition that turns smoothly with P
        P.copy_(torch.where(move.usable(), Q, P))  # not from a gradient that is zero or not finite


def train(subspace: str | hf_osd.SubspaceRule, steps: int, rank: int, hidden_size: int, lr: float) -> list[float]:
    """Losses of a run on sequences that count upwards, by a step of 1 to 4."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))
    optimizer = hf_osd.create_osd_optimizer(model, "osd_adamw", lr=lr, rank=rank, subspace=subspace)
    losses = []
    for _ in range(steps):
        first, stride = torch.randint(64, (16, 1)), torch.randint(1, 5, (16, 1))
        ids = (first + stride * torch.arange(24)) % 64
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with each rule and print the losses."""
    parser = argparse.ArgumentParser(description="A subspace rule of one's own.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--rate", type=float, default=0.5, help="Oja's")
    arguments = parser.parse_args()
    for rule in (Oja(rate=arguments.rate), "online_pca", "static"):
        losses = train(rule, arguments.steps, arguments.rank, arguments.hidden_size, arguments.learning_rate)
        shown = [losses[round(i * (len(losses) - 1) / 4)] for i in range(5)]
        print(f"{rule!s:<24} {'  '.join(f'{loss:.3f}' for loss in shown)}")


if __name__ == "__main__":
    main()
