"""A readable twin of `OSD`: the paper's Algorithm 1 with autograd and textbook rules, one weight at a time.

Never optimised, and independent of the package: nothing of hf_osd is imported. Left side only; for the right side
the twin is run on the transposed problem.
"""

from dataclasses import dataclass, field

import torch


def pca_loss(P, G, lambda_):
    """Eq. 6."""
    G_hat = G / G.norm()
    identity = torch.eye(P.shape[1], dtype=P.dtype)
    return (P @ P.T @ G_hat - G_hat).square().sum() + lambda_ * (P.T @ P - identity).square().sum()


def autograd(loss, P, *arguments):
    P = P.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(P, *arguments), P)[0]


def top_singular_vectors(G, r, transposed=False):
    """Of G; singular vectors have no sign of their own, so the transposed problem must decompose the same matrix."""
    U, _, Vh = torch.linalg.svd(G.T if transposed else G, full_matrices=False)
    return Vh[:r].T if transposed else U[:, :r]


def adamw(state, g, betas=(0.9, 0.999), eps=1e-8):
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


def lion(state, g, betas=(0.9, 0.99)):
    m = state.get("m", torch.zeros_like(g))
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return torch.sign(betas[0] * m + (1 - betas[0]) * g)


def sgd(state, g, momentum=0.9):
    state["b"] = momentum * state.get("b", 0) + g
    return state["b"]


def adafactor(state, g, eps1=1e-30, clip=1.0, decay_rate=-0.8):
    t = state["t"] = state.get("t", 0) + 1
    beta2 = 1 - t**decay_rate
    square = g**2 + eps1
    row = state["row"] = beta2 * state.get("row", 0) + (1 - beta2) * square.mean(1)
    col = state["col"] = beta2 * state.get("col", 0) + (1 - beta2) * square.mean(0)
    d = g / torch.sqrt(torch.outer(row, col) / row.mean())
    return d / max(1.0, float(d.square().mean().sqrt()) / clip)


RULES = {"adamw": adamw, "lion": lion, "sgd": sgd, "adafactor": adafactor}


@dataclass
class Twin:
    """Algorithm 1 for one weight (m, n) projected on its rows."""

    W: torch.Tensor
    rank: int
    transposed: bool = False
    rule: str = "adamw"
    projection_rule: str | None = None
    alpha: float = 5.0
    lambda_: float = 0.1
    scale: float = 1.0
    weight_decay: float = 0.0
    projection_weight_decay: float | None = None
    projection_lr: float | None = None  # P's learning rate as a fixed number times the schedule, as the paper's code
    P: torch.Tensor | None = None
    weight_state: dict = field(default_factory=dict)
    projection_state: dict = field(default_factory=dict)

    def step(self, G, lr, schedule=1.0):
        lr = lr * schedule
        fresh = self.P is None
        if fresh:
            self.P = top_singular_vectors(G, self.rank, self.transposed)
        R = self.P.T @ G
        D = RULES[self.rule](self.weight_state, R)
        self.W = (1 - lr * self.weight_decay) * self.W - lr * self.scale * self.P @ D
        if fresh:  # P minimises the loss at this gradient
            return
        decay = self.weight_decay if self.projection_weight_decay is None else self.projection_weight_decay
        lr_P = self.alpha * lr if self.projection_lr is None else self.projection_lr * schedule
        gP = autograd(pca_loss, self.P, G, self.lambda_)
        D_P = RULES[self.projection_rule or self.rule](self.projection_state, gP)
        self.P = (1 - lr_P * decay) * self.P - lr_P * D_P
