"""Examples 4.1 to 4.3 of the paper (arXiv 2408.12857): continuous-time systems, their Lyapunov functions, and a loss.

    dW/dt = up(D),   (D, dS/dt) = velocity(R, S),   R = down(G),   G = grad L(W)

`down` and `up` are an adjoint pair that P defines, S is the low-rank state and R the paper's Ĝ. H(W, S) does not
contain P, and the adjoint cancels the terms that mix W with S, so that dH/dt <= 0 wherever P goes (Eq. 8); `rate` is
the formula that the paper gives for it. Shapes: W, G (m, n); R, D and the parts of S (r, n) on the left side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


State = tuple[Tensor, ...]


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Independent normal numbers in float64."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns."""
    return torch.linalg.qr(gaussian(rows, columns, generator)).Q


@dataclass(frozen=True)
class WavyBowl:
    """L(W) = sum u²/2 + c (1 - cos k u) over U = A (W - target) B, A and B orthogonal: Rastrigin's function, turned.

    With c k² = 3 its curvature lies between -2 and 4, and as c k² < 4.6 = -1 / min(sin x / x), the target is its only
    stationary point: inf L = 0, and what is left of H is a distance to convergence. L grows without bound, so that
    solutions are bounded, as Theorem 4.5 asks.
    """

    A: Tensor  # (m, m) orthogonal
    B: Tensor  # (n, n) orthogonal
    target: Tensor  # (m, n)
    c: float = 0.75
    k: float = 2.0

    @classmethod
    def random(cls, m: int, n: int, generator: torch.Generator) -> "WavyBowl":
        """Turned at random."""
        return cls(orthonormal(m, m, generator), orthonormal(n, n, generator), gaussian(m, n, generator))

    def value(self, W: Tensor) -> Tensor:
        """L(W), a 0-dim tensor."""
        U = self.A @ (W - self.target) @ self.B
        return (U.square() / 2 + 2 * self.c * torch.sin(self.k * U / 2).square()).sum()  # 1 - cos x = 2 sin²(x/2)

    def gradient(self, W: Tensor) -> Tensor:
        """G = Aᵀ (U + c k sin k U) Bᵀ, (m, n)."""
        U = self.A @ (W - self.target) @ self.B
        return self.A.mT @ (U + self.c * self.k * torch.sin(self.k * U)) @ self.B.mT


@dataclass(frozen=True)
class Momentum:
    """Example 4.1: dW = -up(M), dM = a (R - M), H = L + ||M||² / 2a."""

    a: float = 1.0

    def start(self, R: Tensor) -> State:
        """S at rest."""
        return (torch.zeros_like(R),)

    def velocity(self, R: Tensor, S: State) -> tuple[Tensor, State]:
        """D and dS/dt."""
        (M,) = S
        return -M, (self.a * (R - M),)

    def energy(self, loss: Tensor, S: State) -> Tensor:
        """H(W, S) from L(W) and S; its minimum over S is L."""
        (M,) = S
        return loss + M.square().sum() / (2 * self.a)

    def rate(self, R: Tensor, S: State) -> Tensor:
        """dH/dt = -||M||²."""
        (M,) = S
        return -M.square().sum()


@dataclass(frozen=True)
class Adam:
    """Example 4.2: dW = -up(M / (√V + e)), dM = a (R - M), dV = b (R² - V), H = L + <M / (√V + e), M> / 2a; a >= b/4.

    The paper prints dW without the minus sign here; with it its dH/dt follows.
    """

    a: float = 1.0
    b: float = 2.0
    e: float = 0.1

    def start(self, R: Tensor) -> State:
        """M at rest; V = 1, because √V is smooth where V > 0, and V stays there."""
        return torch.zeros_like(R), torch.ones_like(R)

    def velocity(self, R: Tensor, S: State) -> tuple[Tensor, State]:
        """D and dS/dt."""
        M, V = S
        return -M / (V.sqrt() + self.e), (self.a * (R - M), self.b * (R.square() - V))

    def energy(self, loss: Tensor, S: State) -> Tensor:
        """H(W, S) from L(W) and S."""
        M, V = S
        return loss + (M.square() / (V.sqrt() + self.e)).sum() / (2 * self.a)

    def rate(self, R: Tensor, S: State) -> Tensor:
        """dH/dt = -<1 - (b/4a) √V / (√V + e), M² / (√V + e)> - (b/4a) <M² / (√V (√V + e)²), R²>."""
        M, V = S
        q, root = self.b / (4 * self.a), V.sqrt()
        N = root + self.e
        return -((1 - q * root / N) * M.square() / N).sum() - q * (M.square() * R.square() / (root * N.square())).sum()


@dataclass(frozen=True)
class LionK:
    """Example 4.3: dW = up(∇K((1-b) M - b R)), dM = -a (R + M), H = a L + K((1-b) M) / (1-b).

    K(X) = sum of √(x² + δ²) - δ, convex and smooth, with its minimum 0 at X = 0. Lion itself is δ -> 0, ∇K -> sign,
    which has no derivative at 0, as Assumption 4.4 wants.
    """

    a: float = 1.0
    b: float = 0.5
    delta: float = 1.0

    def start(self, R: Tensor) -> State:
        """S at rest."""
        return (torch.zeros_like(R),)

    def K(self, X: Tensor) -> Tensor:  # noqa: N802 - its name in the paper
        """The convex function at X, a 0-dim tensor, written without the difference of large numbers."""
        return (X.square() / ((X.square() + self.delta**2).sqrt() + self.delta)).sum()

    def grad_K(self, X: Tensor) -> Tensor:  # noqa: N802
        """∇K(X), shaped like X."""
        return X / (X.square() + self.delta**2).sqrt()

    def velocity(self, R: Tensor, S: State) -> tuple[Tensor, State]:
        """D and dS/dt."""
        (M,) = S
        return self.grad_K((1 - self.b) * M - self.b * R), (-self.a * (R + M),)

    def energy(self, loss: Tensor, S: State) -> Tensor:
        """H(W, S) from L(W) and S; its minimum over S is a L."""
        (M,) = S
        return self.a * loss + self.K((1 - self.b) * M) / (1 - self.b)

    def rate(self, R: Tensor, S: State) -> Tensor:
        """dH/dt = -(a/b) [X; Y] - a/(1-b) [0; X], X = (1-b) M, Y = -b R, [X; Y] = <Y, ∇K(X+Y) - ∇K(X)> >= 0."""
        (M,) = S
        X, Y = (1 - self.b) * M, -self.b * R
        bracket = (Y * (self.grad_K(X + Y) - self.grad_K(X))).sum()
        return -(self.a / self.b) * bracket - self.a / (1 - self.b) * (X * self.grad_K(X)).sum()


SYSTEMS = {"momentum": Momentum(), "Adam": Adam(), "Lion-K": LionK()}
