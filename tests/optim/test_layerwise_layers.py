"""Layerwise with `source="activations"`: the ordinary mode's steps, of which each is made as soon as R is complete."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layerwise_nets import INT8, LAYERS, Net, optimizer_of, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_osd
from hf_osd.layers.shared_input import SharedInput
from hf_osd.optim.arrival import hooks
from reference import nets_in_layers as plain_nets
from reference.nets_in_layers import N, Other, batch, distance, loss_of


def pair(make, steps: int = 6, micro: int = 1, run=train, **options):
    """The same training in both modes."""
    nets = make(), make()
    for net, layerwise in zip(nets, (False, True), strict=True):
        run(net, optimizer_of(net, layerwise=layerwise, **LAYERS | options), range(steps), micro)
    return nets


def run_plain(net, optimizer, steps, micro=1):
    plain_nets.train(net, optimizer, steps, micro)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_dtype": "int8", "projection_dtype": "int8"},
        {"init": "orthonormal", "projection_sample": 1},
        {"subspace": "power", "projection_interval": 2},
        {"subspace": "random", "update_interval": 3, "restart_moments": True},
        {"optim": "osd_adafactor", "projection_dtype": "bfloat16"},
        {"residual": "sign", "residual_sample": 3},
        {"residual": "sign", "weight_dtype": "int8", "scale": "auto"},
    ],
    ids=str,
)
def test_steps_are_the_ordinary_modes(options):
    optim = {"optim": options.get("optim", "osd_adamw")}
    assert distance(*pair(plain_nets.Net, 8, run=run_plain, **options | optim)) == 0


@pytest.mark.parametrize("options", [{}, {"weight_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("reentrant", [None, False])
def test_tied_weights_and_weights_used_twice_are_stepped_once(reentrant, options):
    def run(net, optimizer, steps, micro):
        train(net, optimizer, steps, micro, reentrant=reentrant)

    assert distance(*pair(lambda: Net(torch.float64), run=run, **options)) < 1e-14


class Blocks(nn.Module):
    """Two blocks, each with two layers of one input and one of another, and a module without a call in odd steps."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(24, 24) for _ in range(4)) for _ in range(2))
        self.double()
        self.reentrant, self.calls = reentrant, 0

    def forward(self, x):
        self.calls += 1

        def block(a, b, c, d, x):
            y = c(torch.tanh(a(x)) * b(x))
            return x + (d(y) if self.calls % 2 else y)

        for layers in self.blocks:
            given = (*layers, x)
            x = block(*given) if self.reentrant is None else checkpoint(block, *given, use_reentrant=self.reentrant)
        return x.square().mean()


@pytest.mark.parametrize("options", [{}, {"weight_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_is_left_for_the_step(reentrant, options):
    """Of a weight neither R nor what P learns of; P has moved, and all is as in the ordinary mode."""
    ordinary, layerwise = Blocks(reentrant), Blocks(reentrant)
    train(ordinary, optimizer_of(ordinary, **LAYERS | options), range(6))
    optimizer = optimizer_of(layerwise, layerwise=True, **LAYERS | options)
    for step in range(6):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        layerwise(x.requires_grad_()).backward()
        assert all(p.grad is None for p in layerwise.parameters())
        assert all(shared.A is None and shared.energy is None for shared in optimizer.layers.inputs())
        optimizer.step()
        optimizer.zero_grad()
    assert distance(ordinary, layerwise) < 1e-14


def test_a_torch_that_tells_of_no_weight_without_gradient_is_refused(monkeypatch):
    """torch 2.6 calls a hook after accumulation only where there was something to accumulate."""
    assert hooks.called_without_gradient()
    monkeypatch.setattr(hooks, "called_without_gradient", lambda: False)
    with pytest.raises(ValueError, match="needs a torch that calls the hooks of weights without a gradient, and "):
        optimizer_of(Blocks(None), layerwise=True, **LAYERS)
    optimizer_of(Blocks(None), layerwise=True)  # weights have their gradients
    optimizer_of(Blocks(None), **LAYERS)


def test_each_is_stepped_before_the_layer_below_it():
    """The gradient of a hidden state finds the weight above it moved, its R gone, and its P moved."""
    net = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 16)).double()
    optimizer = optimizer_of(net, layerwise=True, **LAYERS)
    plain_nets.train(net, optimizer, range(2))
    layer = optimizer.layers.layers["1.weight"]
    W, P, seen = layer.weight.detach().clone(), layer.input.P.clone(), []

    def arrived(_):
        seen.append((torch.equal(W, layer.weight), torch.equal(P, layer.input.P), layer.stand_in.grad is None))

    hidden = net[0](batch(2))
    hidden.register_hook(arrived)
    loss_of(net[1](hidden)).backward()
    assert seen == [(False, False, True)]


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("alone", [False, True])
def test_p_learns_of_all_inputs_whichever_layer_the_loss_uses(alone, reentrant):
    """The layer that is called first, whose name P has, has no backward pass, or not of each input."""

    def block(a, b, x):
        aside, y = a(x), b(x)
        return b(torch.cos(y)) + aside if alone else y

    def use(layers, x):
        given = layers["a"], layers["b"], torch.tanh(layers["body"](x))
        return block(*given) if reentrant is None else checkpoint(block, *given, use_reentrant=reentrant)

    def make():
        return Other(use, body=nn.Linear(N, N), a=nn.Linear(N, N), b=nn.Linear(N, N))

    nets = pair(make, 8, run=run_plain)
    assert distance(*nets) < 1e-13
    assert distance(nets[1], make()) > 0.05


@pytest.mark.parametrize("reentrant", [None, False])
def test_layers_of_one_input_make_what_p_learns_of_once(reentrant, monkeypatch):
    """In a checkpoint once more, when that computes again; so these layers keep one A then, and not one each."""
    made, product_of = [], SharedInput._product_of

    def counted(shared, x, xP):
        made.append(product_of(shared, x, xP))
        return made[-1]

    monkeypatch.setattr(SharedInput, "_product_of", counted)
    net = Blocks(reentrant)
    optimizer = optimizer_of(net, layerwise=True, **LAYERS)
    for step in range(3):
        made.clear()
        x = torch.randn(200, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        net(x.requires_grad_()).backward()
        optimizer.step()
        optimizer.zero_grad()
        inputs = 6 if net.calls % 2 else 4  # of two blocks
        assert len(made) == inputs * (1 if reentrant is None else 2)


def test_a_model_makes_what_p_learns_of_once_whatever_another_does_meanwhile(monkeypatch):
    """Both with checkpoints: a layer of the other is called between the layers of one input."""
    net, other, made, kept_of = Blocks(False), Blocks(False), [], SharedInput._kept_of

    def counted(shared, x, xP):
        made.append(shared)
        return kept_of(shared, x, xP)

    monkeypatch.setattr(SharedInput, "_kept_of", counted)
    optimizers = [optimizer_of(one, layerwise=True, **LAYERS) for one in (net, other)]

    def meanwhile(*call):
        other.blocks[0][0](call[-1])

    net.blocks[0][0].register_forward_hook(meanwhile)
    net(torch.randn(5, 24, dtype=torch.float64, requires_grad=True)).backward()
    assert sum(shared in made for shared in optimizers[1].layers.inputs()) == 1
    mine = [made.count(shared) for shared in optimizers[0].layers.inputs()]
    assert mine == [2] * 6  # computed, and computed again
    optimizers[0].step()


@pytest.mark.parametrize("options", [{}, {"residual": "sign", "residual_sample": 3}], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_what_else_is_done_with_a_weight_is_in_its_step(first, options):
    """The other use comes before, or after the layer's, in the backward pass."""

    def use(layers, x):
        a, b = layers["a"], layers["b"]
        if first:
            return b(torch.tanh(F.linear(x, a.weight) + a(x)))
        return b(torch.tanh(a(x))) + F.linear(torch.tanh(F.linear(x, a.weight)), b.weight)

    def make():
        return Other(use, a=nn.Linear(N, 24), b=nn.Linear(24, N))

    assert distance(*pair(make, run=run_plain, **options)) < 1e-13


def test_a_weight_whose_layer_is_not_called_goes_by_its_gradient():
    def make():
        modules = {"a": nn.Linear(N, 24), "b": nn.Linear(N, N)}
        return Other(lambda layers, x: F.linear(layers["b"](x), layers["a"].weight), **modules)

    assert distance(*pair(make, run=run_plain)) < 1e-13


@pytest.mark.parametrize("options", [LAYERS, INT8, LAYERS | {"residual": "sign"}], ids=str)
def test_a_broken_gradient_skips_one_weight_exactly(options):
    nets = plain_nets.Net(), plain_nets.Net()
    for net, layerwise in zip(nets, (False, True), strict=True):
        optimizer = optimizer_of(net, layerwise=layerwise, **options)
        B = net.osd_stand_ins.get_parameter("layers/0/weight")
        plain_nets.train(net, optimizer, range(3))
        broken = B.register_hook(lambda R: R.index_fill(0, torch.tensor([1]), float("nan")))  # of a row alone
        before = net.layers[0].weight + 0
        plain_nets.train(net, optimizer, [3])
        assert torch.equal(net.layers[0].weight + 0, before)
        broken.remove()
        plain_nets.train(net, optimizer, range(4, 7))
        assert optimizer.statistics()["skipped_steps"] == 1
    assert distance(*nets) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subspace": "power", "projection_interval": 2},
        {"residual": "sign", "residual_sample": 3},
        {"residual": "sign", "scale": "auto", "weight_dtype": "int8"},
    ],
    ids=str,
)
def test_micro_batches_add_up_r(options):
    nets = plain_nets.Net(), plain_nets.Net()
    for net, more in zip(nets, ({}, {"layerwise": True, "gradient_accumulation": True}), strict=True):
        plain_nets.train(net, optimizer_of(net, **LAYERS | options, **more), range(6), 3)
    assert distance(*nets) < 1e-14


def test_signs_of_weights_without_prepared_layers_are_refused_where_r_adds_up():
    """They go by gradients, of which R is kept."""
    net = Other(lambda layers, x: layers["b"](layers["a"](x)), a=nn.Linear(N, N), b=nn.Linear(N, 24))
    net.layers["a"].weight.register_hook(lambda G: G)  # so it is not prepared
    said = "residual='sign' needs the whole gradient of layers.a.weight, without prepared layers.*residual=none, also"
    with pytest.raises(ValueError, match=said):
        optimizer_of(net, **LAYERS, layerwise=True, gradient_accumulation=True, residual="sign")


@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
def test_clipping_is_that_of_r(clipping):
    ordinary, layerwise = plain_nets.Net(), plain_nets.Net()
    own = optimizer_of(layerwise, layerwise=True, max_grad_norm=0.05, layerwise_clipping=clipping, **LAYERS)
    optimizer, before = optimizer_of(ordinary, **LAYERS), None
    for step in range(5):
        plain_nets.train(layerwise, own, [step])
        loss_of(ordinary(batch(step))).backward()
        grads = [p.grad for p in ordinary.parameters() if p.grad is not None]
        total = torch.stack([g.norm() for g in grads]).norm()
        for g in grads:
            norm = g.norm() if clipping == "parameter" or before is None else before
            g.mul_((0.05 / (norm + 1e-6)).clamp(max=1))
        before = total
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(own.grad_norm, total)
    assert distance(ordinary, layerwise) < 1e-12


@pytest.mark.parametrize("options", [LAYERS | {"max_grad_norm": 0.05}, INT8, LAYERS | {"residual": "sign"}], ids=str)
def test_resume_is_exact(options):
    whole, again = plain_nets.Net(), plain_nets.Net()
    optimizer = optimizer_of(whole, layerwise=True, **options)
    plain_nets.train(whole, optimizer, range(4))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    plain_nets.train(whole, optimizer, range(4, 8))
    again.load_state_dict(saved[0])
    other = optimizer_of(again, layerwise=True, **options)
    other.load_state_dict(saved[1])
    loss_of(again(batch(4))).backward()
    assert all(B.grad is None for B in other.layers.parameters())  # at once, from the first step on
    other.step()
    other.zero_grad()
    plain_nets.train(again, other, range(5, 8))
    assert distance(whole, again) == 0


def test_compiled():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))

    def run(net, optimizer, steps, micro):
        call = torch.compile(net, backend="aot_eager", fullgraph=True)
        for step in steps:
            call(torch.randn(6, 24, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert distance(*pair(make, 4, run=run)) == 0


def test_power_with_clipping_is_refused():
    with pytest.raises(ValueError, match="mixes the momentum"):
        hf_osd.create_osd_optimizer(
            plain_nets.Net(), "osd_adamw_layerwise", rank=4, subspace="power", max_grad_norm=1.0, source="activations"
        )
