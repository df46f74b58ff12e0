"""P learns of a block of the gradient at a step, and of another one at the next."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from twin_runs import run_both

from hf_osd import OSD
from hf_osd.optim.step.movement import Movements


@contextmanager
def movements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What P is told of each gradient, instead of moving."""
    seen: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(Movements, "add", lambda self, moving: moving and seen.append(moving.A.clone()))
        yield seen


@pytest.mark.parametrize("k", [1, 3, 1000])  # of 14: blocks of unequal size; more than there are rows
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_twin(side: str, interval: int, k: int):
    options = {"projection_sample": k, "projection_interval": interval}
    run_both(side, options, options)


@pytest.mark.parametrize("k", [4, 5, 40])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("shape", [(9, 22), (22, 9)])
def test_in_the_mean_of_k_movements_it_is_the_whole(shape, interval, k, monkeypatch):
    """Also where P moves at every fourth step only: the blocks take turns by movements, not by steps."""
    W, G = nn.Parameter(torch.zeros(shape, dtype=torch.float64)), torch.randn(shape, dtype=torch.float64)
    optimizer = OSD(
        [W], lr=1e-9, rank=3, projection_sample=k, projection_interval=interval, init="orthonormal", weight_rule="sgd"
    )
    with movements(monkeypatch) as seen:
        for _ in range(min(k, 22) * interval):
            W.grad = G
            optimizer.step()
    P = optimizer.state[W]["projection"]
    whole = G @ G.T @ P if shape[0] < shape[1] else G.T @ G @ P
    assert len(seen) == min(k, 22)
    torch.testing.assert_close(torch.stack(seen).mean(0), whole, rtol=0, atol=1e-12)
    assert (seen[0] - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize(
    ("options", "default"),
    [({}, 4), ({"residual": "sign"}, 4), ({"subspace": "power", "mixing": 0.0}, 1)],
)
def test_the_default_is_1_where_a_whole_p_is_made_of_a(options, default):
    found = []
    for k in (None, default, 3):
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(12, 30))
        own = {} if k is None else {"projection_sample": k}
        optimizer = OSD([W], lr=1e-2, rank=4, **options, **own)
        for _ in range(6):
            W.grad = torch.randn(12, 30)
            optimizer.step()
        found.append(W.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_two_factors_learn_of_the_whole_gradient(monkeypatch):
    W, G = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)), torch.randn(6, 9, dtype=torch.float64)
    optimizer = OSD([W], lr=1e-9, rank=3, side="two_sided", init="orthonormal")
    with movements(monkeypatch) as seen:
        W.grad = G
        optimizer.step()
    P, Q = optimizer.state[W]["projection"].split([6, 9])
    torch.testing.assert_close(seen[0], torch.cat([G @ Q, G.T @ P]), rtol=0, atol=1e-12)


def test_power_iteration_mixes_momentum_of_the_same_block(monkeypatch):
    """A = rho M Zᵀ + (1 - rho) G Zᵀ, of the block."""
    W, rho = nn.Parameter(torch.zeros(6, 16, dtype=torch.float64)), 0.5
    optimizer = OSD([W], lr=1e-3, rank=3, subspace="power", mixing=rho, projection_sample=2)
    for _ in range(3):
        W.grad = torch.randn(6, 16, dtype=torch.float64)
        optimizer.step()
    state, b = optimizer.state[W], slice(8, 16)  # the fourth movement's
    P, m, G = state["projection"].clone(), state["exp_avg"].clone(), torch.randn(6, 16, dtype=torch.float64)
    W.grad = G
    with movements(monkeypatch) as seen:
        optimizer.step()
    Z = rho * m + (1 - rho) * P.T @ G
    expected = 2 * (rho * P @ m[:, b] + (1 - rho) * G[:, b]) @ Z[:, b].T
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)


def test_a_stack_of_experts_takes_turns_by_all_steps_and_resumes():
    """Also of an expert that had no tokens in some, which the host learns from the device only when it has to."""

    def run(stack: nn.Parameter, optimizer: OSD, steps: range) -> None:
        for step in steps:
            stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
            if step % 3 == 1:
                stack.grad[1] = 0
            optimizer.step()

    stack = nn.Parameter(torch.randn(2, 12, 30))
    optimizer = OSD([stack], lr=1e-2, rank=4)
    run(stack, optimizer, range(7))
    other = nn.Parameter(stack.detach().clone())
    resumed = OSD([other], lr=1e-2, rank=4)
    resumed.load_state_dict(optimizer.state_dict())
    run(stack, optimizer, range(7, 12))
    run(other, resumed, range(7, 12))
    assert torch.equal(stack, other)


@pytest.mark.parametrize(
    "options", [{"side": "two_sided"}, {"subspace": "svd"}, {"subspace": "static"}, {"rank": None}]
)
def test_refused_where_it_has_no_effect(options):
    with pytest.raises(ValueError, match="projection_sample.*no effect"):
        OSD([nn.Parameter(torch.zeros(6, 8))], **({"rank": 2, "projection_sample": 2} | options))
