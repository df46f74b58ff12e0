"""What users and frameworks change on an optimizer or a model between steps, and gradients at the edges."""

import copy

import pytest
import torch
from matrices import RANK, give, matrix, step
from torch import nn

from hf_osd import OSD
from hf_osd.subspace import precision


@pytest.mark.parametrize("bad", [torch.nan, 0.0])
@pytest.mark.parametrize("shape", [(24, 40), (2, 24, 40)])
@pytest.mark.parametrize("resumed_at", [0, 6, 7])
def test_a_new_p_that_a_gradient_could_not_make_is_made_at_the_next_step(
    resumed_at: int, shape: tuple[int, ...], bad: float
):
    if len(shape) == 3 and bad == 0:
        pytest.skip("an expert without tokens counts no step")
    p, made = nn.Parameter(torch.zeros(shape)), []
    options = {"subspace": "svd", "update_interval": 5}
    optimizer = OSD([{"params": [p], "rank": RANK}], **options)
    before = torch.empty(0)
    for i in range(12):
        give(p, i)
        if i == 5:
            p.grad.mul_(bad)
        if i == resumed_at:
            saved, optimizer = optimizer.state_dict(), OSD([{"params": [p], "rank": RANK}], **options)
            optimizer.load_state_dict(saved)
        optimizer.step()
        P = optimizer.state[p]["projection"].clone()
        if not torch.equal(P, before):
            made.append(i)
        before = P
    assert made == [0, 6, 10]


@pytest.mark.parametrize("init", ["svd", "randomized_svd"])
def test_small_gradients_start_p_as_others_do(init: str, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)  # a sketch rounded to bfloat16 is another one

    def trained(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        p = nn.Parameter(torch.zeros(24, 80))
        optimizer = OSD([{"params": [p], "rank": RANK}], weight_rule="lion", projection_rule="adamw", init=init)
        for i in range(3):
            step(optimizer, p, seed=i, scale=scale)
        return p, optimizer.state[p]["projection"]

    for small, other in zip(trained(1e-19), trained(1.0), strict=True):
        torch.testing.assert_close(small, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-21, 1e-30, 1e-37])
def test_gradients_whose_squares_are_zero_start_p(scale: float, dtype: torch.dtype):
    """Lion moves weights as far by them as by others; P, which they cannot teach, stays where it starts."""

    def first(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        p = nn.Parameter(torch.zeros(24, 80, dtype=dtype))
        optimizer = OSD([{"params": [p], "rank": RANK}], weight_rule="lion")
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert not optimizer.weight_of(p).started
        step(optimizer, p, seed=0, scale=scale)
        return p, optimizer.state[p]["projection"]

    for small, other in zip(first(scale), first(1.0), strict=True):
        torch.testing.assert_close(small, other, rtol=1e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_small_gradients_of_experts_start_p():
    p = nn.Parameter(torch.zeros(3, 24, 80))
    optimizer = OSD([{"params": [p], "rank": RANK}], weight_rule="lion")
    give(p, 0, scale=1e-22)
    p.grad[1] = 0
    optimizer.step()
    assert [bool(P.any()) for P in optimizer.state[p]["projection"]] == [True, False, True]
    assert [bool(W.any()) for W in p] == [True, False, True]


@pytest.mark.parametrize("layerwise", [False, True])
def test_nothing_to_step(layerwise: bool):
    none, p = nn.Parameter(torch.zeros(0, 24, 40)), matrix()
    optimizer = OSD([{"params": []}, {"params": [none, p], "rank": RANK}], layerwise=layerwise)
    for _ in range(2):
        (none.sum() + p.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.statistics()["skipped_steps"] == 0 and optimizer.state[p]["step"] == 2


def accumulating(p: nn.Parameter) -> OSD:
    optimizer = OSD([{"params": [p], "rank": RANK}], layerwise=True, gradient_accumulation=True)
    p.square().sum().backward()
    optimizer.step()
    p.square().sum().backward()  # of the next step
    return optimizer


def test_a_group_that_is_added_leaves_what_has_arrived():
    p, other, new = matrix(), matrix(), matrix(40, 24)
    optimizer, plain = accumulating(p), accumulating(other)
    optimizer.add_param_group({"params": [new], "rank": RANK})
    new.square().sum().backward()
    before = new.detach().clone()
    optimizer.step(), plain.step()
    assert torch.equal(p, other) and not torch.equal(new, before)


def test_a_state_that_is_loaded_drops_what_came_to_another_subspace():
    p = matrix()
    optimizer = accumulating(p)
    before = p.detach().clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stream.held_bytes() == 0
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_converted_trains_on(steps: int, rule: str, layerwise: bool):
    def net(dtype: torch.dtype) -> tuple[nn.Linear, OSD]:
        torch.manual_seed(0)
        linear = nn.Linear(96, 80).to(dtype)
        groups = [{"params": [linear.weight], "rank": RANK}, {"params": [linear.bias]}]
        return linear, OSD(groups, lr=1e-3, weight_rule=rule, layerwise=layerwise)

    def train(linear: nn.Linear, optimizer: OSD, steps: range) -> None:
        for i in steps:
            x = torch.randn(8, 96, generator=torch.Generator().manual_seed(i))
            linear(x.to(linear.weight.dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    linear, optimizer = net(torch.float32)
    train(linear, optimizer, range(steps))
    linear.double()
    train(linear, optimizer, range(steps, 4))
    wide, of_wide = net(torch.float64)
    train(wide, of_wide, range(4))
    torch.testing.assert_close(linear.weight, wide.weight, rtol=0, atol=2e-5)
    state, expected = (own.state[p.weight] for own, p in ((optimizer, linear), (of_wide, wide)))
    assert {name: value.dtype for name, value in state.items()} == {name: v.dtype for name, v in expected.items()}
    optimizer.load_state_dict(optimizer.state_dict())
    linear.half()
    with pytest.raises(ValueError, match="is float16"):
        train(linear, optimizer, range(1))


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_momentum_that_is_scheduled_from_zero_and_back(layerwise: bool):
    p, v = matrix(), nn.Parameter(torch.ones(5))
    theirs = nn.Parameter(torch.ones(5))
    groups = [{"params": [p], "rank": RANK}, {"params": [v]}]
    optimizer = OSD(groups, lr=0.1, weight_rule="sgd", momentum=0.0, layerwise=layerwise)
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.0)
    for momentum in (0.0, 0.0, 0.5, 0.9, 0.9):
        for group in (*optimizer.param_groups, *torchs.param_groups):
            group["momentum"] = momentum
        (p.square().sum() + v.square().sum() + theirs.square().sum()).backward()
        optimizer.step(), torchs.step()
        optimizer.zero_grad(), torchs.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(v, theirs)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    (p.square().sum() + v.square().sum()).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not [name for entries in optimizer.state.values() for name in entries if "momentum" in name]


@pytest.mark.parametrize("subspace", ["online_pca", "svd", "static"])
def test_the_state_before_the_first_step_has_the_p_that_was_given(subspace: str):
    P = torch.linalg.qr(torch.randn(24, RANK, generator=torch.Generator().manual_seed(1))).Q
    p, other = matrix(), matrix()
    optimizer = OSD([{"params": [p], "rank": RANK, "init": [P]}], lr=1e-3, subspace=subspace)
    start, weight = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    for _ in range(2):
        optimizer.load_state_dict(start)
        p.data.copy_(weight)
        assert torch.equal(optimizer.weight_of(p).projection, P)
        step(optimizer, p, seed=3), step(optimizer, p, seed=4)
    plain = OSD([{"params": [other], "rank": RANK, "init": [P]}], lr=1e-3, subspace=subspace)
    step(plain, other, seed=3), step(plain, other, seed=4)
    assert torch.equal(p, other)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_parameter_that_is_taken_out_of_its_group(steps: int, named: bool):
    """As torch takes it, whose `state_dict` wants its state gone, too."""
    p, kept, bias = matrix(), matrix(40, 24), nn.Parameter(torch.ones(3))
    params = [("p", p), ("kept", kept), ("bias", bias)] if named else [p, kept, bias]
    optimizer = OSD([{"params": params[:2], "rank": RANK}, {"params": params[2:]}])
    for i in range(steps):
        step(optimizer, p, kept, bias, seed=i)
    optimizer.param_groups[0]["params"].remove(optimizer.param_groups[0]["params"][0])
    optimizer.state.pop(p, None)
    step(optimizer, kept, bias, seed=5)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = p.detach().clone(), kept.detach().clone()
    step(optimizer, kept, bias, seed=6)
    assert torch.equal(p, before[0]) and not torch.equal(kept, before[1])
    assert optimizer.weight_of(kept).geometry.side == "right"
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["kept"] and optimizer.state_dict()["state"].keys() == {
            0,
            1,
        }
    optimizer.param_groups[0]["params"].append(p)
    with pytest.raises(ValueError, match="add_param_group"):
        optimizer.state_dict()


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.9), (0.9, 0.0)])
def test_a_state_with_a_scheduled_momentum_is_resumed(first: float, then: float):
    p, q = (nn.Parameter(torch.ones(8, 12)) for _ in range(2))
    optimizer, second = (OSD([{"params": [x], "rank": 2}], lr=0.1, weight_rule="sgd", momentum=first) for x in (p, q))
    for momentum in (first, then):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    q.data.copy_(p.data)
    for x, own in ((p, optimizer), (q, second)):
        x.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
        own.step()
    assert torch.equal(p, q)
