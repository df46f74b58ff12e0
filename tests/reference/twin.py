"""A readable twin of `OSD`: the paper's Algorithm 1 with autograd and textbook rules, one weight at a time.

Never optimised, and independent of the package: nothing of hf_osd is imported. Left side only; for the right side
the twin is run on the transposed problem. The two-sided operator has a twin of its own.
"""

from dataclasses import dataclass, field

import torch


def pca_loss(P, G, lambda_, norm=None):
    """Eq. 6; with the norm of another gradient, of which G is a part."""
    G_hat = G / (G.norm() if norm is None else norm)
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


def carried(state, Q, beta1=0.9, beta2=0.999):
    """Moments of AdamW (m, v), Lion (m) or SGD (b) in another basis, Q = P_newᵀ P_old (LDAdam, arXiv 2410.16103)."""
    new = dict(state)
    for name in ("m", "b"):
        if name in state:
            new[name] = Q @ state[name]
    if "v" in state:
        t = state["t"]
        mean, second = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        new["v"] = (1 - beta2**t) * (Q**2 @ (second - mean**2) + (Q @ mean) ** 2).abs()
    return new


def residual_step(G, inside, R, D, kind, scaling, scale):
    """What is added to the lifted direction, of full size; `inside` is R lifted."""
    if kind == "none":
        return torch.zeros_like(G)
    if kind == "sign":
        return scale * torch.sign(G - inside)
    phi = D.norm(dim=0) / R.norm(dim=0) if scaling == "column" else D.norm() / R.norm()
    return scale * phi * (G - inside)


def limited(S, before, limit=1.01):
    """The norm-growth limiter of Fira (arXiv 2410.01673): the new S."""
    if before is not None and S.norm() > limit * before:
        return S * limit * before / S.norm()
    return S


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
    projection_interval: int = 1
    projection_sample: int = 4
    carry: bool = False
    residual: str = "none"
    residual_scale: float = 1.0
    residual_norm: float | None = None
    steps: int = 0
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
        S = residual_step(G, self.P @ R, R, D, self.residual, "column", self.residual_scale)
        if self.residual == "scaled":
            S = limited(S, self.residual_norm)
            self.residual_norm = S.norm()
        self.W = (1 - lr * self.weight_decay) * self.W - lr * self.scale * (self.P @ D + S)
        self.steps += 1
        if fresh or (self.steps - 1) % self.projection_interval:  # P minimises the loss at its first gradient
            return
        decay = self.weight_decay if self.projection_weight_decay is None else self.projection_weight_decay
        lr_P = self.alpha * lr if self.projection_lr is None else self.projection_lr * schedule
        k = min(self.projection_sample, G.shape[1])
        turn = (self.steps - 1) // self.projection_interval % k
        block = range(G.shape[1] * turn // k, G.shape[1] * (turn + 1) // k)
        gP = autograd(pca_loss, self.P, k**0.5 * G[:, block], self.lambda_, G.norm())
        D_P = RULES[self.projection_rule or self.rule](self.projection_state, gP)
        old, self.P = self.P, (1 - lr_P * decay) * self.P - lr_P * D_P
        if self.carry:
            self.weight_state = carried(self.weight_state, self.P.T @ torch.linalg.pinv(old.T))


@dataclass
class TwoSidedTwin:
    """The operator of section 4.3, R = Pᵀ G Q, with AdamW in both roles. P and Q are given."""

    W: torch.Tensor
    P: torch.Tensor
    Q: torch.Tensor
    alpha: float = 5.0
    lambda_: float = 0.1
    carry: bool = False
    residual: str = "none"
    residual_norm: float | None = None
    weight_state: dict = field(default_factory=dict)
    P_state: dict = field(default_factory=dict)
    Q_state: dict = field(default_factory=dict)

    def step(self, G, lr):
        P, Q = self.P, self.Q
        R = P.T @ G @ Q
        D = adamw(self.weight_state, R)
        S = residual_step(G, P @ R @ Q.T, R, D, self.residual, "matrix", 1.0)
        if self.residual == "scaled":
            S = limited(S, self.residual_norm)
            self.residual_norm = S.norm()
        self.W = self.W - lr * (P @ D @ Q.T + S)
        gP = autograd(lambda X: two_sided_loss(X, Q, G, self.lambda_), P)
        gQ = autograd(lambda X: two_sided_loss(P, X, G, self.lambda_), Q)
        self.P = P - self.alpha * lr * adamw(self.P_state, gP)
        self.Q = Q - self.alpha * lr * adamw(self.Q_state, gQ)
        if self.carry:
            self._carry(self.P.T @ torch.linalg.pinv(P.T), self.Q.T @ torch.linalg.pinv(Q.T))

    def _carry(self, left, right):
        state = carried(self.weight_state, left)
        turned = carried({name: value.T if name != "t" else value for name, value in state.items()}, right)
        self.weight_state = {name: value.T if name != "t" else value for name, value in turned.items()}


def two_sided_loss(P, Q, G, lambda_):
    """Eq. 6 for both factors."""
    G_hat, identity = G / G.norm(), torch.eye(P.shape[1], dtype=P.dtype)
    orthogonality = (P.T @ P - identity).square().sum() + (Q.T @ Q - identity).square().sum()
    return (P @ P.T @ G_hat @ Q @ Q.T - G_hat).square().sum() + lambda_ * orthogonality
