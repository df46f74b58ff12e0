"""Section 4 of the paper (arXiv 2408.12857): H falls by its formula wherever P goes; when the gradient vanishes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lyapunov
from lyapunov_flow import (
    CONVERGED,
    OPERATORS,
    PATHS,
    Operator,
    adversary,
    at_rest,
    integrate,
    online_pca,
)
from lyapunov_systems import SYSTEMS, Adam, LionK, Momentum, WavyBowl, gaussian


M, N, RANK = 12, 6, 3
RESULT = Path(lyapunov.__file__).parent / "benchmarks" / "results" / "lyapunov.json"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def loss() -> WavyBowl:
    return WavyBowl.random(M, N, generator())


@pytest.fixture
def W() -> Tensor:
    return torch.zeros(M, N, dtype=torch.float64)


def start(operator: str, seed: int = 1) -> tuple[Tensor, ...]:
    return OPERATORS[operator].start(M, N, RANK, generator(seed))


def orthogonal_to(G: Tensor) -> Tensor:
    """An orthonormal P (m, r) with PᵀG = 0; m >= n + r leaves room for it."""
    return torch.linalg.svd(G).U[:, -RANK:].contiguous()


def random_state(system, R: Tensor) -> tuple[Tensor, ...]:
    """S with a moving M, and V > 0 where there is one."""
    M_0 = torch.randn(R.shape, generator=generator(3), dtype=R.dtype)
    return (M_0, torch.rand(R.shape, generator=generator(4), dtype=R.dtype) + 0.1)[: len(system.start(R))]


def test_the_loss_is_not_convex_and_its_gradient_is_right(loss):
    W = gaussian(M, N, generator(2)).requires_grad_()
    (expected,) = torch.autograd.grad(loss.value(W), W)
    torch.testing.assert_close(loss.gradient(W.detach()), expected)
    curvature = torch.autograd.functional.hessian(loss.value, W.detach()).reshape(M * N, M * N)
    assert torch.linalg.eigvalsh(curvature)[0] < -1
    assert loss.value(loss.target) == 0 and loss.gradient(loss.target).abs().max() == 0


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_formula_is_the_derivative_of_h(loss, system, operator):
    """dH/dt = <dH/dW, dW/dt> + <dH/dS, dS/dt>, by autograd, at states that no trajectory has to visit."""
    rule, op = SYSTEMS[system], OPERATORS[operator]
    for seed in range(5):
        W, P = gaussian(M, N, generator(seed)), start(operator, seed)
        R = op.down(loss.gradient(W), *P)
        S = random_state(rule, R)
        variables = [x.clone().requires_grad_() for x in (W, *S)]
        slopes = torch.autograd.grad(rule.energy(loss.value(variables[0]), tuple(variables[1:])), variables)
        D, dS = rule.velocity(R, S)
        derivative = sum((slope * dx).sum() for slope, dx in zip(slopes, (op.up(D, *P), *dS), strict=True))
        # sums of a hundred float64 terms of size 100 that cancel in part
        torch.testing.assert_close(rule.rate(R, S), derivative, rtol=1e-10, atol=1e-10)
        assert derivative < 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_h_falls_by_its_formula_wherever_p_goes(loss, W, system, operator, path):
    found = [
        integrate(loss, SYSTEMS[system], OPERATORS[operator], PATHS[path], W, start(operator), 5.0, rtol)
        for rtol in (1e-5, 1e-8)
    ]
    for trajectory in found:
        assert trajectory.rate.max() <= 1e-14  # a sum of terms <= 0; in Lion-K's brackets up to rounding
        # H is H(0) plus a decreasing integral plus the error, so it can rise by twice the error, and by the rounding
        # of H itself, a few units in the last place of 100
        assert trajectory.increase <= 2 * trajectory.error + 1e-12
        assert trajectory.H[-1] < trajectory.H[0] - 1
    coarse, fine = (trajectory.error for trajectory in found)
    # It is the integrator's error: a thousandth of the tolerance makes it smaller by about that, 30 at the very least
    # (the tolerance is met with a margin that varies). A wrong formula would leave an error that does not shrink.
    assert fine < coarse / 30
    assert fine < 1e-6 * found[0].H[0]


def test_paths_do_what_they_say(loss, W):
    G, P = loss.gradient(W), start("left")[0]
    # the adversary rotates: d(PᵀP)/dt = 0, and turns away: d||PᵀG||²/dt < 0
    dP = adversary(0.0, P, G)
    assert (dP.T @ P + P.T @ dP).abs().max() < 1e-13
    assert ((P.T @ G) * (dP.T @ G)).sum() < -1
    # the random path comes back to where its formula says, by the trapezoidal rule over one period: no drift
    times = torch.linspace(0, 2 * torch.pi, 41, dtype=torch.float64)[:-1]
    assert torch.stack([PATHS["random path"](float(t), P, G) for t in times]).mean(0).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("system", "operator"), [*((system, "left") for system in SYSTEMS), ("momentum", "two-sided")]
)
def test_the_gradient_vanishes_with_online_pca(loss, W, system, operator):
    """Theorem 4.5; the target is the loss's only stationary point."""
    found = integrate(loss, SYSTEMS[system], OPERATORS[operator], online_pca, W, start(operator), 60.0, rtol=1e-5)
    assert found.gradient_norm[-1] < 1.01 * CONVERGED < 1e-3 * found.gradient_norm[0]
    assert (found.W[-1] - loss.target).norm() < CONVERGED  # the curvature at the target is 4


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_weights_stop_where_p_is_orthogonal_to_the_gradient(loss, W, system):
    """What Assumption 4.4 ii excludes."""
    rule, left = SYSTEMS[system], OPERATORS["left"]
    P = orthogonal_to(loss.gradient(W))
    for path in (at_rest, adversary):
        found = integrate(loss, rule, left, path, W, (P,), 5.0)
        # PᵀG is rounding, 1e-14; the negative curvature (-2 at most) may multiply it by exp(2 * 5)
        assert (found.W - W).abs().max() < 1e-9 and found.gradient_norm.min() > 10
    # from anywhere, the adversary gets there
    found = integrate(loss, rule, left, adversary, W, start("left"), 40.0, rtol=1e-6)
    late = found.W[found.t > 30]  # PᵀG decays at the rate of the smallest singular value of Ĝ: slowly
    assert (late - late[-1]).abs().max() < 1e-4 and found.gradient_norm[-1] > 10
    assert (found.W[-1] - W).norm() > 0.1


@pytest.mark.parametrize("system", SYSTEMS)
def test_online_pca_leaves_its_saddle(loss, W, system):
    """Orthonormal P with PᵀG = 0 are stationary for Eq. 6 too, but not stable: a millionth beside one, P finds G."""
    G = loss.gradient(W)
    P = orthogonal_to(G)
    assert online_pca(0.0, P, G).abs().max() < 1e-12
    beside = torch.linalg.qr(P + 1e-6 * gaussian(M, RANK, generator(5))).Q
    found = integrate(loss, SYSTEMS[system], OPERATORS["left"], online_pca, W, (beside,), 80.0, rtol=1e-5)
    assert found.gradient_norm[-1] < 1.01 * CONVERGED


@pytest.mark.parametrize("system", SYSTEMS)
def test_online_pca_that_turns_too_slowly_stays_there(loss, W, system):
    """The weights reach PᵀG = 0 before P has turned: the set attracts, and everything rests with a large gradient."""
    slow = partial(online_pca, alpha=0.2)
    found = integrate(loss, SYSTEMS[system], OPERATORS["left"], slow, W, start("left"), 60.0)
    late = found.W[found.t > 50]
    assert (late - late[-1]).abs().max() < 1e-6 and found.gradient_norm[-1] > 10


def test_control_adam_with_a_small_a_climbs(loss):
    """a >= b/4 is needed: at the minimum, with R = 0 and √V >> e, a moving M makes H grow. By the same formula."""
    rule, left, P = Adam(a=0.1, b=4.0), OPERATORS["left"], start("left")
    R = left.down(loss.gradient(loss.target), *P)
    S = (torch.ones_like(R), torch.full_like(R, 4.0))
    found = integrate(loss, rule, left, at_rest, loss.target + 1e-2, P, 1.0, S=S)
    assert found.rate[0] > 0.1
    assert found.increase > 0.01 > 1e4 * found.error
    allowed = integrate(loss, Adam(a=1.0, b=4.0), left, at_rest, loss.target + 1e-2, P, 1.0, S=S)
    assert allowed.increase <= 2 * allowed.error + 1e-12


@pytest.mark.parametrize("rule", [Momentum(), Adam(), LionK()], ids=SYSTEMS)
def test_control_up_must_be_the_adjoint_of_down(loss, W, rule):
    """With another P in `up`, H rises and the formula is wrong: both checks above would have noticed."""
    other = start("left", seed=9)[0]
    left = OPERATORS["left"]
    broken = Operator(left.down, lambda D, P: other @ D, left.acts_on)
    found = integrate(loss, rule, broken, online_pca, W, start("left"), 3.0, rtol=1e-6)
    assert found.increase > 1 and found.error > 1


def test_the_example_runs(tmp_path, capsys):
    lyapunov.main(["--t_end", "1", "--output_dir", str(tmp_path)])
    assert (tmp_path / "lyapunov.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "lyapunov.json").read_text())
    assert found["systems"].keys() == SYSTEMS.keys() and "online PCA, two-sided" in capsys.readouterr().out


def test_the_committed_result_says_so_too():
    result = json.loads(RESULT.read_text())
    for runs in result["systems"].values():
        assert runs.keys() == lyapunov.RUNS.keys()
        for name, run in runs.items():
            H, norms = run["curve"]["H"], run["curve"]["gradient_norm"]
            assert run["increase"] <= 2 * run["error"] + 1e-12 and run["error"] < 1e-7
            assert run["decrease"] == pytest.approx(run["decrease_by_the_formula"], rel=1e-8)
            assert all(later <= earlier for earlier, later in zip(H, H[1:], strict=False))
            converges = name in ("online PCA", "online PCA, two-sided")
            assert norms[-1] < 1.01 * CONVERGED if converges else norms[-1] > 1
