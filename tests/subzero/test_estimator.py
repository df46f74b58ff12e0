"""rho is the directional derivative, rho Zt the gradient in expectation, with the variance of the formula."""

import pytest
import torch
from nets import Net, directions, ids, slope
from torch import nn

from hf_osd.subzero import SubZero
from hf_osd.subzero.weight import DRAWN_ON_CPU, DenseWeight, LowRankWeight


@pytest.mark.parametrize("perturbation", ["subspace", "dense"])
@pytest.mark.parametrize("made", [True, False], ids=["weights are made", "products are added"])
def test_rho_is_the_directional_derivative(perturbation: str, made: bool):
    net = Net().eval()
    options = {"rank": 5} if perturbation == "subspace" else {}
    optimizer = SubZero(net, eps=1e-4, queries=2, perturbation=perturbation, **options)
    low_rank = [weight for weight in optimizer.weights.weights.values() if isinstance(weight, LowRankWeight)]
    assert len(low_rank) == (8 if perturbation == "subspace" else 0)
    for weight in low_rank:
        weight.may_be_made = made
    before = [p.clone() for p in net.parameters()]
    loss = optimizer.forward(lambda: net.loss(ids()))
    loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    for query, rho in enumerate(optimizer.direction.grad):
        expected = slope(net, lambda: net.loss(ids()), directions(optimizer, query))
        # central differences are off by eps² / 6 of the third derivative along Zt, whose norm is 60 here
        assert 2 * rho == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
    assert loss.item() == pytest.approx(net.loss(ids()).item(), abs=1e-3)
    assert expected.abs() > 0.1


def test_an_update_is_lr_rho_zt():
    net = Net().eval()
    optimizer = SubZero(net, lr=1e-2, rank=5, queries=2, weight_decay=0.1, eps=1e-4)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.forward(lambda: net.loss(ids())).backward()
    rho, Zt = optimizer.direction.grad.clone(), [directions(optimizer, query) for query in range(2)]
    optimizer.step()
    decayed = 0
    for name, p in net.named_parameters():
        factor = 1.0 if "bias" in name or "norm" in name else 1 - 1e-2 * 0.1
        expected = factor * before[name] - 1e-2 * (rho[0] * Zt[0][name] + rho[1] * Zt[1][name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)
        decayed += factor < 1
    assert 0 < decayed < len(before)


class Linear(nn.Module):
    """The loss <G, W> + <g, w>, whose gradient is G and g everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.w = nn.Parameter(torch.zeros(12, 20).double()), nn.Parameter(torch.zeros(7).double())
        self.G, self.g = torch.randn(12, 20).double(), 2 * torch.randn(7).double()

    def loss(self) -> torch.Tensor:
        return (self.G * self.W).sum() + (self.g * self.w).sum()


def samples(steps: int, **options) -> tuple[Linear, SubZero, torch.Tensor]:
    """rho Zt of many steps: (steps, 247). The loss is linear, so that rho = <G, Zt>, as a real step must have it."""
    net = Linear()
    optimizer = SubZero(net, lr=1.0, rank=4, **options)
    Zt = torch.empty(steps, 247).double()
    for step in range(steps):
        optimizer.weights.begin(step)
        Zt[step] = torch.cat([Z.flatten() for Z in directions(optimizer).values()])
    found = Zt @ torch.cat([net.G.flatten(), net.g])[:, None] * Zt
    optimizer.step(net.loss)
    moved = -torch.cat([net.W.detach().flatten(), net.w.detach()])
    torch.testing.assert_close(moved, found[0], rtol=1e-9, atol=1e-9)
    return net, optimizer, found


def test_the_mean_is_the_gradient_in_the_subspaces_and_the_variance_that_of_the_formula():
    net, optimizer, found = samples(6000, update_interval=10**6)
    weight = optimizer.weights.weights["W"]
    U, V = weight.U.double(), weight.V.double()
    inside = 12 * 20 / 4**2 * U @ (U.T @ net.G @ V) @ V.T  # mu² U Uᵀ G V Vᵀ
    expected = torch.cat([inside.flatten(), net.g])
    error = (found.mean(0) - expected) / (found.std(0) / 6000**0.5)
    assert error.abs().max() < 4.5 and error.square().mean() == pytest.approx(1, abs=0.35)  # 247 correlated entries
    # of rho = <a, z>, z ~ N(0, 1): E||rho Zt||² = sum over parts of size_i ||a||² + 2 mu_i² ||a_i||²
    mu = (12 * 20) ** 0.5 / 4
    aW, aw = mu * U.T @ net.G @ V, net.g
    a2 = aW.square().sum() + aw.square().sum()
    formula = (12 * 20 + 7) * a2 + 2 * (mu**2 * aW.square().sum() + aw.square().sum())
    assert found.square().sum(1).mean() == pytest.approx(formula.item(), rel=0.05)  # ± 1.9%


def test_over_all_subspaces_the_mean_is_the_gradient():
    net, _, found = samples(4000, update_interval=1)
    G = torch.cat([net.G.flatten(), net.g])
    along = found @ G / G.square().sum()
    assert along.mean() == pytest.approx(1, abs=4 * along.std().item() / 4000**0.5) and along.std() < 2
    error = (found.mean(0) - G) / (found.std(0) / 4000**0.5)
    assert error.abs().max() < 4.5


def test_directions_have_the_second_moments_of_mezo_in_their_subspaces():
    net = nn.Linear(20, 12, bias=False).double()
    optimizer = SubZero(net, rank=4)
    weight, total = optimizer.weights.weights["weight"], torch.zeros(12, 12).double()
    for step in range(800):
        optimizer.weights.begin(step)
        Zt = directions(optimizer)["weight"]
        total += Zt @ Zt.T / 800
    for Q in (weight.U, weight.V):
        torch.testing.assert_close(Q.T @ Q, torch.eye(4).double(), atol=1e-6, rtol=0)  # drawn in float32
    expected = 12 * 20 / 4 * weight.U @ weight.U.T
    assert (total - expected).norm() < 0.06 * expected.norm()  # about sqrt(r (r + 1) / (r steps)) of it
    assert total.trace() == pytest.approx(12 * 20, rel=0.03)


def test_subspaces_stay_for_an_interval_and_draws_need_no_order():
    net = Net()
    optimizer, other = (SubZero(net, rank=5, update_interval=3, seed=7) for _ in range(2))
    seen = []
    for step in range(6):
        optimizer.weights.begin(step)
        seen.append({name: Zt.clone() for name, Zt in directions(optimizer).items()})
    U = optimizer.weights.weights["up.weight"].U
    for step in (4, 1, 5, 0):
        other.weights.begin(step)
        assert all(torch.equal(Zt, seen[step][name]) for name, Zt in directions(other).items())
        assert torch.equal(other.weights.weights["up.weight"].U, U) == (step >= 3)
    assert not torch.equal(seen[0]["up.weight"], seen[1]["up.weight"])


def test_large_dense_directions_are_drawn_in_pieces(monkeypatch):
    monkeypatch.setattr("hf_osd.optim.step.rounding.PIECE", 1000)
    net = nn.Conv2d(64, 64, 5, bias=False)
    optimizer = SubZero(net, lr=0.5, queries=2, perturbation="dense")
    (weight,) = optimizer.weights.weights.values()
    assert isinstance(weight, DenseWeight) and weight.W.numel() > DRAWN_ON_CPU and not weight.kept
    optimizer.weights.begin(0)
    before, Zt = net.weight.detach().clone(), [directions(optimizer, query)["weight"] for query in range(2)]
    assert abs(Zt[0].std() - 1) < 0.02 and not torch.equal(Zt[0], Zt[1])
    torch.testing.assert_close(weight.perturbed(1, 0.1), before + 0.1 * Zt[1])
    optimizer.weights.update_(torch.tensor([0.25, 0.5]), {"weight": 0.5}, {"weight": 0.0})
    torch.testing.assert_close(net.weight.detach(), before - 0.125 * Zt[0] - 0.25 * Zt[1])
