"""`source="activations"`: V is the top right singular space of a layer's inputs, with an unbiased gradient in it."""

import copy

import pytest
import torch
from nets import Net, directions, ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_osd.subzero import SubZero, SubZeroLog
from hf_osd.subzero.activations import SHIFT


LAYERS = {"Linear": lambda: nn.Linear(20, 12), "Conv1D": lambda: Conv1D(12, 20)}


def inputs(tokens: int = 40, rank: int = 20, seed: int = 3) -> Tensor:
    """(4 tokens, 20) of a falling spectrum, of which every fourth one is all."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(k, 20, generator=generator).double()).Q for k in (tokens, 20))
    spectrum = 0.7 ** torch.arange(20) * (torch.arange(20) < rank)
    return (left * spectrum @ right.T).repeat_interleave(4, 0)


def basis(optimizer: SubZero, name: str = "weight") -> Tensor:
    """What follows: V, of `Conv1D` U."""
    weight = optimizer.weights.weights[name]
    return weight.V if weight.side == "right" else weight.U


def apart(Q: Tensor, V: Tensor) -> float:
    """Sine of the largest angle between the spaces of orthonormal columns."""
    return torch.linalg.matrix_norm(V - Q @ (Q.T @ V), 2).item()


@pytest.mark.parametrize("made", [True, False], ids=["weights are made", "products are added"])
@pytest.mark.parametrize("layer", LAYERS)
def test_v_converges_to_the_top_singular_space_of_the_inputs(layer: str, made: bool):
    net, x = LAYERS[layer]().double(), inputs()
    optimizer = SubZero(net, lr=0.0, rank=4, update_interval=1, source="activations")
    optimizer.weights.weights["weight"].may_be_made = made
    top = torch.linalg.svd(x).Vh[:4].T
    found = []
    for _ in range(30):
        optimizer.step(lambda: net(x).square().mean())
        found.append(apart(top, basis(optimizer)))
        torch.testing.assert_close(basis(optimizer).T @ basis(optimizer), torch.eye(4).double(), atol=1e-14, rtol=0)
    assert found[0] > 0.1 and found[-1] < 1e-8  # times 0.49 each
    assert optimizer.weights.weights["weight"].mu == (12 / 4) ** 0.5


def test_v_moves_by_the_rule_after_1_2_4_steps_and_every_interval():
    """Of tokens of its own turn at each step, and of one pass."""
    net, batches = nn.Linear(20, 12).double(), [inputs(seed=seed)[: 23 + seed] for seed in range(13)]
    optimizer = SubZero(net, lr=1e-3, rank=4, update_interval=6, queries=2, source="activations")
    A, before, moved, drawn = 0, None, [], []
    for step, x in enumerate(batches):
        optimizer.weights.begin(step)
        V, U = basis(optimizer), optimizer.weights.weights["weight"].U
        for part in (x, 2 * x):  # micro-batches
            optimizer.forward(lambda part=part: net(part).square().mean()).backward()
            assert basis(optimizer) is V
            A = A + part[step % 4 :: 4].T @ part[step % 4 :: 4] @ V
        optimizer.step()
        drawn += [step] if before is not None and not torch.equal(U, before) else []
        before = U
        if basis(optimizer) is not V:
            moved.append(step + 1)
            expected = torch.linalg.qr(SHIFT * V + A / A.norm()).Q
            torch.testing.assert_close(basis(optimizer).abs(), expected.abs(), atol=1e-8, rtol=0)
            A = 0
    assert moved == [1, 2, 4, 6, 12] and drawn == [6, 12]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_is_the_gradient_within_v(layer: str):
    """All of it, where V has all that inputs have; E[Ztᵀ Zt] is MeZO's."""
    net, x, dY = LAYERS[layer]().double(), inputs(rank=4), torch.randn(160, 12).double()
    net.bias.requires_grad_(False)
    optimizer = SubZero(net, lr=0.0, rank=4, update_interval=1, source="activations")
    for _ in range(5):  # of rank 4, and without a gradient: V only turns in x's space
        optimizer.step(lambda: (net(x) * dY).sum())
    (G,) = torch.autograd.grad((net(x) * dY).sum(), net.weight)
    V = basis(optimizer)
    optimizer.forward(lambda: (net(x) * dY).sum()).backward()
    rho, Zt, before = optimizer.direction.grad.clone(), directions(optimizer)["weight"], net.weight.detach().clone()
    assert rho.item() == pytest.approx((G * Zt).sum().item(), rel=1e-8)  # differences of a linear loss
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before - 1e-2 * rho * Zt, rtol=1e-9, atol=1e-9)
    Zt = []
    for step in range(4000):
        optimizer.weights.begin(step)
        Zt.append(directions(optimizer)["weight"])
    Zt = torch.stack(Zt)
    found = (Zt * G).sum((1, 2), keepdim=True) * Zt
    error = (found.mean(0) - G) / (found.std(0) / len(found) ** 0.5)
    assert error.abs().max() < 4.5 and error.square().mean() == pytest.approx(1, abs=0.35)
    X = Zt if layer == "Linear" else Zt.mT
    torch.testing.assert_close((X.mT @ X).mean(0), 12 * V @ V.T, atol=0.5, rtol=0)  # sqrt(2 / 4000) of 12 and more


def test_only_plain_layers_follow():
    """Not embeddings, layers tied to them, and subclasses: there V stays random."""
    net = Net()
    optimizer = SubZero(net, rank=5, update_interval=2, source="activations")
    assert [weight.name for weight in optimizer.weights.following] == ["up.weight", "down.weight", "gpt.weight"]
    random = SubZero(Net(), rank=5, update_interval=2)
    for own, other in ((optimizer, net), (random, random.model)):
        own.step(lambda other=other: other.loss(ids()))
    for name, weight in random.weights.weights.items():
        if hasattr(weight, "U"):
            own = optimizer.weights.weights[name]
            follows = own in optimizer.weights.following
            assert torch.equal(own.U, weight.U) == (name != "gpt.weight") and (own.mu != weight.mu) == follows
            assert torch.equal(own.V, weight.V) == (not follows or name == "gpt.weight")


def test_resume_is_exact_within_an_interval_too():
    options = {"lr": 1e-2, "rank": 4, "update_interval": 6, "queries": 2, "source": "activations"}
    for dtype in (torch.float64, torch.bfloat16):
        whole, net = Net().to(dtype), Net().to(dtype)
        for other, steps in ((whole, 9), (net, 7)):
            optimizer = SubZero(other, **options)
            for step in range(steps):
                optimizer.step(lambda other=other, step=step: other.loss(ids(step)).float())
        saved = copy.deepcopy(optimizer.state_dict())
        assert all(isinstance(value, Tensor) for state in saved["state"].values() for value in state.values())
        again = SubZero(net, **options | {"lr": 1.0})
        again.load_state_dict(saved)
        for step in range(7, 9):
            again.step(lambda net=net, step=step: net.loss(ids(step)).float())
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), net.parameters(), strict=True))
        with pytest.raises(ValueError, match="saved with source=activations"):
            SubZero(net, **options | {"source": "random"}).load_state_dict(saved)
    at_first = SubZero(Net(), **options).state_dict()
    again.load_state_dict(at_first)
    again.weights.begin(0)
    assert {weight.mu for weight in again.weights.following} == {(16 * 24) ** 0.5 / 4, (12 * 16) ** 0.5 / 4}
    few = SubZero(Net(), target_modules=["up"], **options)
    few.step(lambda: few.model.loss(ids()))
    with pytest.raises(ValueError, match=r"saved with other matrices in subspaces \(`target_modules`\)"):
        SubZero(Net(), **options).load_state_dict(few.state_dict())


def test_broken_and_missing_inputs_leave_v_alone():
    net = nn.ModuleList([nn.Linear(20, 12), nn.Linear(20, 12)])
    optimizer = SubZero(net, lr=0.0, rank=4, source="activations")
    with pytest.warns(UserWarning, match="No forward pass used 2 parameters"):
        optimizer.step(lambda: net[0](inputs().float() * float("nan")).sum())
    for name in ("0.weight", "1.weight"):
        V = basis(optimizer, name)
        torch.testing.assert_close(V.T @ V, torch.eye(4), atol=1e-6, rtol=0)
        random = SubZero(net, rank=4)
        random.weights.begin(0)
        assert apart(random.weights.weights[name].V, V) < 1e-6
    optimizer.step(lambda: net[0](inputs().float()).sum())
    assert apart(V, basis(optimizer, "0.weight")) > 0.1 and optimizer.weights.weights["0.weight"].A is None


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`source` of SubZero has no effect with perturbation='dense'"):
        SubZero(nn.Linear(20, 12), perturbation="dense", source="activations")
    with pytest.raises(ValueError, match="source='activations' needs linear layers"):
        SubZero(nn.Embedding(20, 12), rank=4, source="activations")
    net = nn.Linear(20, 12)
    optimizer = SubZero(net, rank=4, source="activations")
    optimizer.step(lambda: net(torch.ones(1, 20)).sum())
    with pytest.raises(ValueError, match="no SubZeroLog, which cannot tell V: save the model"):
        SubZeroLog.from_optimizer(optimizer)
