"""RSO on peft's layers is the algorithm of the paper, written by hand with explicit matrices, in float64."""

import pytest
import torch
from torch import nn

from hf_osd.rso import create_rso_model, outer_loop, rso_param_groups
from hf_osd.rso.sampling import sample


RANK, INTERVAL, STEPS, LR = 3, 4, 10, 0.02


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5, bias=False)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 7), (6, 5)]
    return [
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[misc]
        for _ in range(STEPS)
    ]


def twin(sampling: str, eta: float | None, weight_decay: float, scale: float) -> list[torch.Tensor]:
    """W1, bias, W2 after STEPS steps of: min over B of f(W + B Pᵀ) + ||B||² / (2 eta), W <- W + B Pᵀ."""
    net = make_net()
    W1, bias, W2 = (p.detach().clone() for p in net.parameters())
    bias.requires_grad_()
    full = torch.optim.AdamW([bias], lr=LR, weight_decay=0.0)
    for step, (x, y) in enumerate(batches()):
        if step % INTERVAL == 0:
            if step:
                W1, W2 = W1 + (B1 @ P1.mT).detach(), W2 + (B2 @ P2.mT).detach()  # noqa: F821
            k = step // INTERVAL
            P1 = sample((7, RANK), sampling, 5, k, 0, torch.float64, x.device)
            P2 = sample((11, RANK), sampling, 5, k, 1, torch.float64, x.device)
            B1, B2 = (torch.zeros(m, RANK, dtype=torch.float64, requires_grad=True) for m in (11, 5))
            inner = torch.optim.AdamW([B1, B2], lr=scale * LR, weight_decay=weight_decay)
        h = torch.tanh(x @ (W1 + B1 @ P1.mT).mT + bias)
        loss = ((h @ (W2 + B2 @ P2.mT).mT - y) ** 2).mean()
        if eta is not None:
            loss = loss + (B1.square().sum() + B2.square().sum()) / (2 * eta)
        for optimizer in (inner, full):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (inner, full):
            optimizer.step()
    return [(W1 + B1 @ P1.mT).detach(), bias.detach(), (W2 + B2 @ P2.mT).detach()]


@pytest.mark.parametrize(
    "sampling, eta, weight_decay, scale",
    [("gaussian", None, 0.0, 1.0), ("gaussian", 0.5, 0.0, 1.0), ("orthonormal", 2.0, 0.1, 0.25)],
)
def test_several_intervals_are_those_of_the_twin(sampling: str, eta: float | None, weight_decay: float, scale: float):
    net = create_rso_model(make_net(), RANK, interval=INTERVAL, eta=eta, sampling=sampling, seed=5)
    loop = outer_loop(net)
    assert loop is not None
    optimizer = torch.optim.AdamW(rso_param_groups(net, LR, weight_decay, scale=scale, decay_names=[]))
    for step, (x, y) in enumerate(batches()):
        loop.before_step(optimizer, step)
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()
    assert loop.index == 2
    expected = twin(sampling, eta, weight_decay, scale)
    found = net.state_dict()
    start = make_net().state_dict()
    for name, value in zip(("0.weight", "0.bias", "2.weight"), expected, strict=True):
        # x Wᵀ + (x P) Bᵀ against x (W + B Pᵀ)ᵀ: rounding only, which ten steps of Adam hardly amplify
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
        assert (found[name] - start[name]).abs().max() > 1e-3


def test_any_optimizer_is_an_inner_optimizer():
    net = create_rso_model(make_net(), RANK, interval=INTERVAL)
    loop = outer_loop(net)
    assert loop is not None
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    first = None
    for step, (x, y) in enumerate(batches()):
        loop.before_step(optimizer, step)
        optimizer.zero_grad()
        loss = ((net(x) - 0.1 * y) ** 2).mean()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        moments = [optimizer.state[B]["momentum_buffer"] for _, B in loop.factors()]
        if step % INTERVAL == 0:  # the first step of an interval: the moments are this gradient alone
            gradients = [B.grad for _, B in loop.factors()]
            assert all(torch.equal(m, g) for m, g in zip(moments, gradients, strict=True))
    assert loss.item() < first


def test_a_merge_changes_no_output():
    net = create_rso_model(make_net(), RANK, interval=1)
    loop = outer_loop(net)
    assert loop is not None
    optimizer = torch.optim.AdamW(rso_param_groups(net, LR, decay_names=[]))
    loop.begin(optimizer, 0)
    x, y = batches()[0]
    ((net(x) - y) ** 2).mean().backward()
    optimizer.step()
    before, saved = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    loop.before_step(optimizer, 1)
    assert loop.index == 1
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-14)
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    assert all(not B.any() and B not in optimizer.state for _, B in loop.factors())


def steps_of(nets: list[nn.Module], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for net in nets:
            outer_loop(net).before_step(optimizer, step)
            x, y = batches()[step]
            (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(**options) -> nn.Module:
    return create_rso_model(make_net(), rank=RANK, interval=INTERVAL, seed=5, target_modules=["0", "2"], **options)


def test_an_inner_optimizer_without_state_resumes_too():
    """W and B are in its `state_dict` also where it has nothing of its own there."""
    whole, half = prepared(eta=3.0), prepared(eta=3.0)
    optimizer = torch.optim.SGD(rso_param_groups(whole, lr=LR), lr=LR)
    steps_of([whole], optimizer, range(STEPS))
    first = torch.optim.SGD(rso_param_groups(half, lr=LR), lr=LR)
    steps_of([half], first, range(6))
    saved = first.state_dict()
    resumed = prepared(eta=3.0)
    second = torch.optim.SGD(rso_param_groups(resumed, lr=LR), lr=LR)
    second.load_state_dict(saved)
    for p, q in zip(resumed.parameters(), half.parameters(), strict=True):
        if p.requires_grad and p.ndim == 1:  # what RSO leaves to the checkpoint's model
            p.data.copy_(q)
    outer_loop(resumed).begin(second, 6)
    steps_of([resumed], second, range(6, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_two_models_share_an_optimizer():
    """The proximal term of each is added once a step, as where each has an optimizer of its own."""
    together, alone = [prepared(eta=3.0), prepared(eta=3.0)], prepared(eta=3.0)
    groups = [group for net in together for group in rso_param_groups(net, lr=LR)]
    steps_of(together, torch.optim.AdamW(groups), range(STEPS))
    steps_of([alone], torch.optim.AdamW(rso_param_groups(alone, lr=LR)), range(STEPS))
    for net in together:
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), alone.parameters(), strict=True))
