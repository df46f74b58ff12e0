"""Operators, paths of P, and the integration of a system of `lyapunov_systems` along them. Letters as there.

Each of the matrices that define an operator is called P here: it moves by dP/dt = path(t, P, G), where the one that
acts on the columns of W (Q in the paper's section 4.3) is given the transposed gradient. So by online PCA each follows
an Eq. 6 of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from hf_osd.subspace import Left, Right, TwoSided, pca_gradient
from lyapunov_additive import Additive
from lyapunov_systems import Adam, LionK, Momentum, State, WavyBowl, gaussian, orthonormal


Path = Callable[[float, Tensor, Tensor], Tensor]

CONVERGED = 1e-3  # ||G|| at which an integration ends: much further down, G / ||G|| is the integrator's noise


@dataclass(frozen=True)
class Operator:
    """An adjoint pair and the matrices that define it."""

    down: Callable[..., Tensor]
    up: Callable[..., Tensor]
    acts_on: tuple[str, ...]  # the dimension of W that each matrix acts on
    square: bool = False  # whether the matrices are (m, m) and (n, n)

    def start(self, m: int, n: int, r: int, generator: torch.Generator) -> State:
        """The matrices at t = 0: orthonormal columns; Gaussian where square."""
        sizes = [m if dimension == "rows" else n for dimension in self.acts_on]
        if self.square:
            return tuple(gaussian(size, size, generator) / math.sqrt(size) for size in sizes)
        return tuple(orthonormal(size, r, generator) for size in sizes)

    def views(self, G: Tensor) -> State:
        """The gradient as each matrix sees it."""
        return tuple(G if dimension == "rows" else G.mT for dimension in self.acts_on)


def _two_sided_down(G: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return TwoSided(len(P)).down(G, torch.cat([P, Q]))  # PᵀG Q, (r, r)


def _two_sided_up(D: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return TwoSided(len(P)).up(D, torch.cat([P, Q]))  # P D Qᵀ


OPERATORS = {
    "left": Operator(Left.down, Left.up, ("rows",)),
    "right": Operator(Right.down, Right.up, ("columns",)),
    "two-sided": Operator(_two_sided_down, _two_sided_up, ("rows", "columns")),
    "additive": Operator(Additive.down, Additive.up, ("rows", "columns"), square=True),
}


def online_pca(t: float, P: Tensor, G: Tensor, alpha: float = 10.0, lambda_: float = 0.1) -> Tensor:
    """dP/dt = -alpha * gradient of Eq. 6 at P: the gradient flow of the online PCA loss.

    Orthonormal P with PᵀG = 0 are stationary: a saddle, which P leaves at the rate 2 alpha * (a squared singular value
    of Ĝ) as long as G stands still. But W moves too, and where it takes PᵀG to zero faster than that, W and P come to
    rest together although G is not zero. Assumption 4.4 ii excludes it; a large enough alpha prevents it.
    """
    inv_norm2 = 1 / G.square().sum()
    return -alpha * pca_gradient(P, G @ (G.mT @ P), inv_norm2, lambda_)


def random_path(t: float, P: Tensor, G: Tensor) -> Tensor:
    """P(t) = P(0) + sum over k of Z_k (sin(k t + k) - sin k), Z_k Gaussian: smooth, and blind to the gradient."""
    return torch.stack([k * math.cos(k * t + k) * Z for k, Z in enumerate(_waves(P.shape), 1)]).sum(0)


@lru_cache
def _waves(shape: torch.Size) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(gaussian(*shape, generator) / math.sqrt(shape[0]) for _ in range(3))


def adversary(t: float, P: Tensor, G: Tensor, alpha: float = 10.0) -> Tensor:
    """dP/dt = -alpha (Ĝ Ĝᵀ P Pᵀ - P Pᵀ Ĝ Ĝᵀ) P, Ĝ = G / ||G||: away from the gradient.

    The bracket is antisymmetric, so this is a rotation: PᵀP never changes. For PᵀP = I it is gradient *ascent* on the
    PCA loss, and it rests where PᵀG = 0.
    """
    T = G @ (G.mT @ P) / G.square().sum()  # Ĝ Ĝᵀ P
    return -alpha * (T @ (P.mT @ P) - P @ (P.mT @ T))


PATHS: dict[str, Path] = {"online PCA": online_pca, "random path": random_path, "adversary": adversary}


def at_rest(t: float, P: Tensor, G: Tensor) -> Tensor:
    """P never moves."""
    return torch.zeros_like(P)


@dataclass(frozen=True)
class Trajectory:
    """What an integration saw, at its own steps."""

    t: Tensor  # (steps,)
    W: Tensor  # (steps, m, n)
    H: Tensor  # (steps,) H(W, S)
    integral: Tensor  # (steps,) of the formula of dH/dt from 0 to t, integrated beside the states
    rate: Tensor  # (steps,) the formula of dH/dt
    gradient_norm: Tensor  # (steps,) ||G||

    @property
    def error(self) -> float:
        """Largest |H(t) - H(0) - integral of the formula|: the integrator's error, if the formula is right."""
        return float((self.H - self.H[0] - self.integral).abs().max())

    @property
    def increase(self) -> float:
        """Largest H(t) - H(s) over all s < t; at most 0 where H never increases."""
        return float((self.H[1:] - self.H.cummin(0).values[:-1]).max())


def integrate(
    loss: WavyBowl,
    system: Momentum | Adam | LionK,
    operator: Operator,
    path: Path,
    W: Tensor,  # (m, n) at t = 0
    P: State,  # the operator's matrices at t = 0
    t_end: float,
    rtol: float = 1e-9,
    S: State | None = None,  # at t = 0, the system's start if not given
) -> Trajectory:
    """Integrates W, S, P and the formula of dH/dt with an adaptive Runge-Kutta method of order 8, in float64."""
    S = system.start(operator.down(loss.gradient(W), *P)) if S is None else S
    start = [W, *S, *P, torch.zeros((), dtype=W.dtype)]
    shapes, sizes = [x.shape for x in start], [x.numel() for x in start]

    def unpack(y: Any) -> tuple[Tensor, State, State, Tensor]:
        parts = torch.as_tensor(y, dtype=W.dtype).split(sizes)
        W_t, *rest, integral = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return W_t, tuple(rest[: len(S)]), tuple(rest[len(S) :]), integral

    def velocity(t: float, y: Any) -> Any:
        W_t, S_t, P_t, _ = unpack(y)
        G = loss.gradient(W_t)
        R = operator.down(G, *P_t)
        D, dS = system.velocity(R, S_t)
        dP = (path(t, P_i, G_i) for P_i, G_i in zip(P_t, operator.views(G), strict=True))
        parts = (operator.up(D, *P_t), *dS, *dP, system.rate(R, S_t))
        return torch.cat([part.flatten() for part in parts]).numpy()

    def until_converged(t: float, y: Any) -> float:
        return float(loss.gradient(unpack(y)[0]).norm()) - CONVERGED

    until_converged.terminal = True  # how solve_ivp learns that the event ends it
    y = torch.cat([x.flatten() for x in start]).numpy()
    done = solve_ivp(velocity, (0, t_end), y, "DOP853", rtol=rtol, atol=1e-3 * rtol, events=until_converged)
    assert done.success, done.message

    rows = []
    for y in done.y.T.copy():
        W_t, S_t, P_t, integral = unpack(y)
        G = loss.gradient(W_t)
        rate = system.rate(operator.down(G, *P_t), S_t)
        rows.append((W_t, system.energy(loss.value(W_t), S_t), integral, rate, G.norm()))
    return Trajectory(torch.as_tensor(done.t), *(torch.stack(column) for column in zip(*rows, strict=True)))
