"""Layerwise mode with every subspace rule and residual: the ordinary mode's steps, refusals, and what stays alive."""

import weakref

import pytest
import torch
from layerwise_nets import Net, assert_equal, inputs, optimizer_of, pair
from torch import nn

from hf_osd.optim.step.algorithm import ProjectedWeight


INTERVAL = {"update_interval": 2}
FAMILY = {
    "random": {"subspace": "random", **INTERVAL},
    "restart": {"subspace": "random", **INTERVAL, "restart_moments": True, "unbiased": True},
    "cosine": {"subspace": "cosine", **INTERVAL, "carry_moments": True},
    "importance": {"subspace": "importance", **INTERVAL},
    "power": {"subspace": "power", "residual": "scaled"},
    "interval": {"projection_interval": 2, "carry_moments": True},
    "scaled": {"residual": "scaled"},
    "scaled_svd": {"residual": "scaled", "subspace": "svd", **INTERVAL},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "two_sided": {"side": "two_sided", "residual": "scaled"},
    "two_sided_sign": {"side": "two_sided", "residual": "sign", "residual_scale": 0.1, "subspace": "random"},
    "rounded": {"residual": "scaled", "stochastic_rounding": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", FAMILY)
def test_steps_are_bit_for_bit_the_ordinary_modes(name: str):
    assert_equal(*pair(**FAMILY[name]))


CLIPPED = ["random", "interval", "scaled", "scaled_svd", "sign", "two_sided"]


@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_against_torch(name: str, clipping: str, monkeypatch: pytest.MonkeyPatch):
    """The residual is that of the clipped gradient; SGD sees how large it is, the limiter does not decide."""
    monkeypatch.setattr("hf_osd.optim.step.residual.GROWTH_LIMIT", float("inf"))
    max_norm, ordinary, layerwise = 0.02, Net(torch.float64), Net(torch.float64)
    given = {"rank": 4, **FAMILY[name]}
    a = optimizer_of(ordinary, "osd_sgd", **given)
    b = optimizer_of(layerwise, "osd_sgd_layerwise", max_grad_norm=max_norm, layerwise_clipping=clipping, **given)
    previous = None
    for step in range(5):
        ordinary(inputs(step, torch.float64)).backward()
        total = nn.utils.get_total_norm([p.grad for p in ordinary.parameters()])
        assert total > max_norm
        for p in ordinary.parameters():
            if clipping == "parameter" or previous is None:
                nn.utils.clip_grad_norm_([p], max_norm)
            else:
                nn.utils.clip_grads_with_norm_([p], max_norm, previous)
        previous = total
        layerwise(inputs(step, torch.float64)).backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(ordinary, layerwise, atol=1e-11)  # float64: P's gradient is that of G / ||G||, whose norm rounds


@pytest.mark.parametrize("name", ["scaled", "sign", "two_sided", "random"])
def test_no_gradient_outlives_its_hook(name: str, monkeypatch):
    """Of a residual G is there while its own parameter is stepped, and of no other."""
    model = Net()
    optimizer = optimizer_of(model, layerwise=True, **FAMILY[name])
    seen: list[weakref.ref] = []
    alive: list[int] = []
    original = type(optimizer.stream).on_gradient

    def on_gradient(self, p):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(p.grad))
        original(self, p)
        alive.append(sum(reference() is not None for reference in seen))

    monkeypatch.setattr(type(optimizer.stream), "on_gradient", on_gradient)
    for step in range(2):  # P is made in the first, and moved in the second
        model(inputs(step)).backward()
        assert optimizer.stream.held_bytes() == 0
        optimizer.step()
    assert len(seen) == 2 * len(list(model.parameters())) and not any(alive)


@pytest.mark.parametrize(("given", "held"), [({}, False), ({"residual": "scaled"}, True)])
def test_only_a_residual_holds_the_gradient_during_the_update(given: dict, held: bool, monkeypatch):
    model, seen, during = Net(), [], []
    optimizer = optimizer_of(model, layerwise=True, **given)
    stream = type(optimizer.stream)
    on_gradient, update = stream.on_gradient, ProjectedWeight.move
    monkeypatch.setattr(
        stream, "on_gradient", lambda self, p: (seen.append(weakref.ref(p.grad)), on_gradient(self, p))
    )

    def updating(*args):
        during.append(seen[-1]() is not None)
        return update(*args)

    monkeypatch.setattr(ProjectedWeight, "move", updating)
    model(inputs(0)).backward()
    # what autograd holds of the gradient that it hands over counts as well: of this graph, nothing
    assert during == [held] * 2


REFUSED = [
    ({"residual": "scaled"}, "residual='scaled' needs the whole gradient"),
    ({"residual": "sign"}, "residual='sign' needs the whole gradient"),
    ({"side": "two_sided"}, "side='two_sided' needs the norm of the whole gradient"),
    ({"subspace": "power"}, "subspace='power' mixes the momentum"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_would_not_be_exact_is_refused(options: dict, reason: str):
    with pytest.raises(ValueError) as caught:
        optimizer_of(Net(), **options, layerwise=True, gradient_accumulation=True)
    assert "`layerwise` with `gradient_accumulation` is not for" in str(caught.value) and reason in str(caught.value)
    told = "accumulate without `layerwise` (a name without _layerwise)."
    assert str(caught.value).endswith(told if "residual" in options else "Leave one of them out.")
    assert ("take source=activations, whose" in str(caught.value)) == (options.get("residual") == "sign")


def test_power_is_refused_with_clipping_and_works_without_momentum():
    clipped = {"layerwise": True, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match=r"`layerwise` with `max_grad_norm` is not for .*subspace='power' mixes"):
        optimizer_of(Net(), subspace="power", **clipped)
    optimizer_of(Net(), subspace="power", mixing=0.0, **clipped)


def test_a_group_that_comes_later_is_asked_too():
    group = {"params": [("new", nn.Parameter(torch.zeros(8, 8)))], "rank": 2, "residual": "sign"}
    with pytest.raises(ValueError, match="`gradient_accumulation` is not for parameter group"):
        optimizer_of(Net(), layerwise=True, gradient_accumulation=True).add_param_group(dict(group))
    optimizer_of(Net(), layerwise=True).add_param_group(dict(group))


@pytest.mark.parametrize("residual", ["scaled", "sign"])
@pytest.mark.parametrize("given", [{}, {"side": "two_sided"}, {"subspace": "static"}])
def test_a_gradient_inside_the_subspace_has_no_residual(residual: str, given: dict):
    """What is left of it is rounding: it moves no weight, and is no measure for the limiter."""
    weights = []
    for own in ({}, {"residual": residual}):
        model = nn.Linear(12, 8, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 96).view(8, 12))
        optimizer = optimizer_of(nn.Sequential(model), rank=3, target_modules=["0"], **given, **own)
        generator = torch.Generator().manual_seed(0)
        model.weight.grad = torch.randn(8, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
        optimizer.step()  # P spans the gradient
        weights.append(model.weight.detach().clone())
        assert float(optimizer.state[model.weight].get("residual_norm", 0)) == 0
        model.weight.grad = torch.zeros(8, 12)
        optimizer.step()
        assert all(value.isfinite().all() for value in optimizer.state[model.weight].values())
        if residual == "scaled" and own:  # the first real one is not limited by what came before
            model.weight.grad = torch.randn(8, 12, generator=generator)
            optimizer.step()
            assert float(optimizer.state[model.weight]["residual_norm"]) > 0.1
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)
