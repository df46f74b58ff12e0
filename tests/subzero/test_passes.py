"""The passes only read the weights, draw the same random numbers, and nobody sees a perturbed model."""

import copy
import math
import pickle

import pytest
import torch
from nets import Net, ids
from torch import nn

from hf_osd import OSD, create_osd_optimizer, unload
from hf_osd.hub import ProjectionState
from hf_osd.subzero import SubZero
from reference.tiny_models import tiny_llama


def steps(optimizer: SubZero, loss, count: int) -> list[float]:
    return [optimizer.step(loss).item() for _ in range(count)]


def test_dropout_is_off_and_other_random_numbers_are_the_same_in_all_passes():
    net, seen = Net(dropout=0.5), []
    net.norm.eval()  # a module that somebody has left in this mode stays in it
    optimizer = SubZero(net, rank=5, eps=1e-9)

    def loss() -> torch.Tensor:
        seen.append((torch.rand(()).item(), [module.training for module in net.modules()]))
        return net.loss(ids()) + 1e6 * torch.rand(())

    torch.manual_seed(5)
    optimizer.forward(loss).backward()
    assert seen[0] == seen[1] and not any(seen[0][1])
    assert optimizer.direction.grad.abs().item() < 1e5  # 1e6 / 2e-9, were the numbers others
    torch.manual_seed(5)
    torch.rand(2)
    after = torch.rand(())
    torch.manual_seed(5)
    optimizer.forward(loss)
    assert torch.rand(()) == after and net.dropout.training and not net.norm.training


def test_an_interrupted_pass_leaves_all_as_it_was():
    net = Net().train()
    before = [p.clone() for p in net.parameters()]
    optimizer = SubZero(net, rank=5)

    def loss() -> torch.Tensor:
        net.loss(ids())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.forward(loss)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(module.training for module in net.modules())
    assert net.loss(ids()).requires_grad


def test_weights_of_bfloat16_do_not_drift_without_a_learning_rate():
    """A thousand steps, bit for bit: in place, + eps Zt - 2 eps Zt + eps Zt would lose bits at the first."""
    net = nn.Linear(20, 12).bfloat16()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer, x = SubZero(net, lr=0.0, rank=4), torch.randn(4, 20, dtype=torch.bfloat16)
    losses = steps(optimizer, lambda: net(x).float().square().mean(), 1000)
    assert len(set(losses)) > 300
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_small_updates_of_bfloat16_add_up_on_average():
    net = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)  # its neighbours are 1/128 above and 1/256 below
    optimizer = SubZero(net, lr=1.0, rank=4, update_interval=10**6)
    optimizer.weights.begin(0)
    weight = optimizer.weights.weights["weight"]
    Zt = (48 * 64) ** 0.5 / 4 * weight.U.float() @ weight.Z[0] @ weight.V.float().T
    assert 1e-4 * Zt.abs().max() < 1 / 512  # below what rounding to the nearest would keep
    for step in range(200):
        optimizer.weights.step = step  # whose rounding is another
        optimizer.weights.update_(torch.tensor([1e-4]), {"weight": 1.0}, {"weight": 0.0})
    moved = 1.0 - net.weight.detach().float()
    slope = (moved * Zt).sum() / Zt.square().sum()
    # a standard error of about sqrt(200 x 1e-4 / 200) / sqrt(48 x 64), in units of 0.02
    assert slope == pytest.approx(200 * 1e-4, rel=0.05)


def test_a_rho_that_is_not_finite_moves_nothing():
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SubZero(net, rank=5, lr=1.0)
    optimizer.step(lambda: net.loss(ids()) * float("nan"))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)) and optimizer.steps == 1


def test_a_query_that_is_not_finite_costs_the_others_nothing():
    net, calls = Net(), []
    optimizer = SubZero(net, rank=5, queries=3)

    def loss() -> torch.Tensor:
        calls.append(None)
        return net.loss(ids()) * (float("nan") if len(calls) == 3 else 1)

    optimizer.forward(loss).backward()
    first, second, third = optimizer.direction.grad.tolist()
    assert second == 0 and math.isfinite(nn.utils.clip_grad_norm_([optimizer.direction], 1.0))
    assert first != 0 != third


def test_a_compiled_loss_runs_as_it_is_written():
    rho = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 16)), torch.ones(4, 20)
        model = torch.compile(net, backend="eager") if compiled else net
        optimizer = SubZero(net, rank=4, lr=1e-2)
        steps(optimizer, lambda model=model, x=x: model(x).square().mean(), 3)
        rho.append(optimizer.history()[0])
    assert torch.equal(*rho)


def test_u_or_v_are_drawn_in_a_saved_p():
    linear = nn.Linear(20, 12, bias=False)
    osd = OSD([{"params": [("weight", linear.weight)], "rank": 6}], lr=0.0)
    linear(torch.randn(4, 20)).square().mean().backward()
    osd.step()
    linear.weight.grad = None
    state = ProjectionState.from_optimizer(osd)
    P, side = state["weight"].projection, state["weight"].side
    optimizer = SubZero(linear, rank=4, init=state, update_interval=5)
    weight = optimizer.weights.weights["weight"]
    bases = []
    for step in (0, 5):
        optimizer.weights.begin(step)
        Q, inside = weight.U if side == "left" else weight.V, torch.linalg.qr(P).Q
        torch.testing.assert_close(inside @ (inside.T @ Q), Q)
        bases.append(Q)
    assert (bases[0].T @ bases[1]).square().sum() < 3.99  # others of the same space
    with pytest.raises(ValueError, match="rank 6: give `rank` at most that"):
        SubZero(linear, rank=7, init=state)
    osd.step()  # another P
    torch.nn.init.orthogonal_(P)
    with pytest.raises(ValueError, match="saved with another `init`"):
        SubZero(linear, rank=4, init=state, update_interval=5).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="no P for any matrix"):
        SubZero(nn.Sequential(linear), rank=4, init=state)


def test_the_p_of_activations_is_v():
    """Without a step of the weights: P of what goes into the layers, one for those that share it."""
    model = tiny_llama()
    tokens = torch.randint(64, (2, 8))
    osd = create_osd_optimizer(model, lr=0.0, rank=6, source="activations")
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        osd.step()
        osd.zero_grad()
    state = ProjectionState.from_optimizer(osd)
    unload(model)
    optimizer = SubZero(model, rank=4, init=state)
    optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    given = {name: weight for name, weight in optimizer.weights.weights.items() if getattr(weight, "given", {})}
    assert len(given) == 14 and all(weight.given.keys() == {"right"} for weight in given.values())
    for name, weight in given.items():
        inside = torch.linalg.qr(state[name].projection).Q
        torch.testing.assert_close(inside @ (inside.T @ weight.V), weight.V, atol=1e-5, rtol=0)


def compiled() -> nn.Module:
    net = nn.Sequential(nn.Linear(20, 12))
    net[0].compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (nn.Linear(20, 12), {"ranks": 4}, "Unknown option `ranks` in SubZero. Did you mean `rank`"),
        (nn.Linear(20, 12), {"eps": 0}, "`eps` of SubZero must be a number > 0"),
        (nn.Linear(20, 12), {"rank": 4, "perturbation": "dense"}, "`rank` of SubZero has no effect"),
        (
            nn.Linear(20, 12),
            {"perturbation": "dense", "target_modules": ["0"]},
            "`target_modules` of SubZero has no ef",
        ),
        (nn.Linear(20, 12).half(), {}, "float16, whose steps would be lost"),
        (nn.Linear(20, 12).requires_grad_(False), {}, "all are frozen"),
        (compiled(), {}, "compiled, and SubZero has to see"),
    ],
)
def test_what_cannot_be_is_refused(net: nn.Module, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SubZero(net, **options)


def test_gradients_and_addresses_are_refused_and_idle_parameters_told():
    net = Net()
    optimizer = SubZero(net, rank=5)
    net.loss(ids()).backward()
    with pytest.raises(ValueError, match="SubZero takes no gradients"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"asks for the address of up.weight"):
        optimizer.forward(lambda: net.up.weight.data_ptr())
    idle = nn.ModuleList([nn.Linear(20, 12), nn.Linear(20, 12)])
    optimizer = SubZero(idle, rank=4)
    with pytest.warns(UserWarning, match="No forward pass used 2 parameters"):
        optimizer.step(lambda: idle[0](torch.ones(1, 20)).sum())


def test_a_step_that_nothing_was_measured_for_is_refused():
    net = Net()
    optimizer = SubZero(net, rank=5, lr=1.0)
    net.loss(ids())
    with pytest.raises(ValueError, match=r"no rho to step by: call `optimizer.step\(lambda: loss\)`"):
        optimizer.step()
    for _ in range(2):
        optimizer.forward(lambda: net.loss(ids()) / 2).backward()
    optimizer.step()
    for again in (lambda: None, lambda: optimizer.forward(lambda: net.loss(ids())).backward()):
        again()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="no rho to step by"):
            optimizer.step()
    assert optimizer.steps == 1


def test_what_is_in_no_subspace_is_told_and_empty_parameters_are_left_out():
    net = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 12))
    net.empty = nn.Parameter(torch.empty(0, 12))
    with pytest.warns(UserWarning, match=r"No matrix is in a subspace: none has min\(m, n\) > rank=24"):
        SubZero(net, update_interval=5)
    optimizer = SubZero(net, rank=4, weight_decay=0.1)
    optimizer.step(lambda: net(torch.ones(1, 20)).sum())
    assert len(optimizer.weights.weights) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(copied):
    with pytest.raises(TypeError, match="make one for the model's copy, and load `state_dict"):
        copied(SubZero(nn.Linear(20, 12), rank=4))
