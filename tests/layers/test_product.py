"""R is G P to the last digits of float64, however the backward pass is run, and G is never made."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reference.nets_in_layers import Net, Other, batch, loss_of, make, train


def gradients(net):
    """G by name of weight, of the plain net."""
    return {name: p.grad for name, p in net.named_parameters()}


def compare(net, optimizer, plain, backward):
    """Every R against G P, and what is not projected against its gradient."""
    backward(net)
    backward(plain)
    G = gradients(plain)
    for name, layer in optimizer._layers.layers.items():
        P, R = layer.input.P, layer.stand_in.grad
        expected = P.T @ G[name] if layer.side == "left" else G[name] @ P
        assert (R - expected).abs().max() < 1e-10
        assert layer.weight.grad is None
    for name, p in net.named_parameters():
        if name in G and name not in optimizer._layers.layers:
            assert (p.grad - G[name]).abs().max() < 1e-10


def once(net):
    loss_of(net(batch(0))).backward()


def in_parts(net):
    for x in batch(0).chunk(3):
        loss_of(net(x)).backward()


def checkpointed(reentrant):
    def backward(net):
        x = batch(0).requires_grad_()
        loss_of(checkpoint(net, x, use_reentrant=reentrant)).backward()

    return backward


@pytest.mark.parametrize("backward", [once, in_parts, checkpointed(True), checkpointed(False)])
def test_r_is_the_projected_gradient(backward):
    net = Net()
    plain = copy.deepcopy(net)
    compare(net, make(net), plain, backward)


def test_inputs_get_their_gradients():
    net = Net()
    plain, optimizer = copy.deepcopy(net), make(net)
    x, y = batch(0).requires_grad_(), batch(0).requires_grad_()
    loss_of(net(x)).backward()
    loss_of(plain(y)).backward()
    assert (x.grad - y.grad).abs().max() < 1e-12
    assert len(optimizer._layers.layers) == 3


def test_compiled():
    net = Net()
    plain, optimizer = copy.deepcopy(net), make(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, range(3))
    plain.load_state_dict(net.state_dict())
    compare(net, optimizer, plain, lambda module: once(compiled if module is net else plain))


def test_a_tied_weight_has_one_r():
    a = nn.Linear(20, 20)
    b = nn.Linear(20, 20)
    b.weight = a.weight
    net = Other(lambda layers, x: layers["b"](torch.tanh(layers["a"](x))), a=a, b=b)
    plain = copy.deepcopy(net)
    optimizer = make(net)
    assert len(optimizer._layers.layers) == 1
    compare(net, optimizer, plain, once)


def test_a_layer_that_is_called_twice():
    net = Other(lambda layers, x: layers["a"](torch.tanh(layers["a"](x))), a=nn.Linear(20, 20))
    plain = copy.deepcopy(net)
    compare(net, make(net), plain, once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_half_precision_computes(dtype):
    net = Net().float()
    plain, optimizer = copy.deepcopy(net), make(net)

    def backward(module):
        with torch.autocast("cpu", dtype):
            y = module(batch(0).float())
        loss_of(y.float()).backward()

    backward(net)
    backward(plain)
    for name, layer in optimizer._layers.layers.items():
        G, P = gradients(plain)[name], layer.input.P
        expected = P.T @ G if layer.side == "left" else G @ P
        assert layer.stand_in.grad.dtype == torch.float32
        assert (layer.stand_in.grad - expected).norm() < 2e-2 * expected.norm()


def test_nothing_of_a_weights_size_is_made_and_inputs_are_not_kept():
    """Between the forward and the backward pass x P is alive and x is not; in the backward pass no G."""
    net = Other(lambda layers, x: layers["a"](x * 1), a=nn.Linear(401, 300, bias=False)).float()
    optimizer = make(net, rank=4)
    net(torch.randn(64, 401)).sum().backward()  # meets its input
    y = net(torch.randn(64, 401))

    gc.collect()
    assert not any(type(o) is torch.Tensor and o.shape[-1:] == (401,) and len(o) == 64 for o in gc.get_objects())
    seen = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                seen.append(out.numel())
            return out

    with Largest():
        y.sum().backward()
    assert max(seen) < 300 * 401
    assert len(optimizer._layers.layers) == 1


def test_without_gradients_it_is_the_plain_layer():
    net = Net()
    plain, optimizer = copy.deepcopy(net), make(net)
    with torch.no_grad():
        assert torch.equal(net(batch(0)), plain(batch(0)))
    with torch.inference_mode():
        assert torch.equal(net(batch(0)), plain(batch(0)))
    assert not list(optimizer._layers.inputs())


def test_a_layer_frozen_later_is_left_alone():
    net = Net()
    optimizer = make(net)
    train(net, optimizer, range(2))
    frozen = net.layers[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    train(net, optimizer, range(2, 4))
    assert torch.equal(frozen, before)
    assert net.layers[1].weight.grad is None
