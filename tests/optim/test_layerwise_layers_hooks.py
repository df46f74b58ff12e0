"""Layerwise with `source="activations"`: hooks and layers that are taken off and put on, and passes without a step."""

import copy

import pytest
import torch
from layerwise_nets import INT8, LAYERS, optimizer_of
from torch import nn

import hf_osd
from hf_osd.layers.int8 import Int8Weight
from reference import nets_in_layers as plain_nets
from reference.nets_in_layers import N, batch, distance, loss_of


def test_a_second_backward_pass_is_refused_and_can_be_forgotten():
    net = plain_nets.Net()
    optimizer = optimizer_of(net, layerwise=True, **LAYERS)
    plain_nets.train(net, optimizer, range(3))
    loss_of(net(batch(3))).backward()
    with pytest.raises(ValueError, match=r"arrived twice before `step\(\)`"):
        loss_of(net(batch(4))).backward()
    with pytest.warns(UserWarning, match="ended without"):
        optimizer.zero_grad()
    assert all(shared.A is None and shared.energy is None for shared in optimizer.layers.inputs())
    plain_nets.train(net, optimizer, range(2))


def test_a_product_that_fails_teaches_nothing(monkeypatch):
    """Whose R is not made, so that nothing tells `zero_grad` of a backward pass."""
    net = nn.Sequential(nn.Linear(N, 24), nn.Linear(24, N)).double()
    optimizer = optimizer_of(net, layerwise=True, **LAYERS)
    plain_nets.train(net, optimizer, range(2))
    loss = loss_of(net(batch(2)))

    def out_of_memory(W):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr("hf_osd.layers.product.plain", out_of_memory)
        loss.backward()
    assert all(shared.A is None and shared.energy is None for shared in optimizer.layers.inputs())


def test_plain_layers_copies_and_other_optimizers():
    net, twin = plain_nets.Net(), plain_nets.Net()
    optimizer = optimizer_of(net, layerwise=True, **INT8)
    plain_nets.train(net, optimizer, range(3))
    copied = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="is a copy"):
        copied.weights  # noqa: B018
    optimizer.remove()
    loss_of(net(batch(9))).backward()  # steps nothing
    net.zero_grad()
    optimizer.attach()
    plain_nets.train(net, optimizer, range(3, 6))
    plain_nets.train(twin, optimizer_of(twin, **INT8), range(6))
    assert distance(net, twin) == 0 and isinstance(net.layers[0].weight, Int8Weight)
    second = optimizer_of(net, layerwise=True, **LAYERS)
    assert len(second.layers.layers) == 3  # hooks of the first are no hindrance
    plain_nets.train(net, second, range(2))
    with pytest.raises(ValueError, match="plain again"):
        optimizer.step()


def test_unload_takes_the_hooks_off_and_attach_puts_them_on_again():
    net, twin = plain_nets.Net(), plain_nets.Net()
    optimizer, own = (optimizer_of(model, layerwise=True, **LAYERS) for model in (net, twin))
    plain_nets.train(net, optimizer, range(3))
    plain_nets.train(twin, own, range(3))
    hf_osd.unload(net)
    loss_of(net(batch(9))).backward()  # steps nothing: no bias either
    assert distance(net, twin) == 0 and all(p.grad is not None for p in net.layers[0].parameters())
    net.zero_grad()
    optimizer.attach()
    plain_nets.train(net, optimizer, range(3, 6))
    plain_nets.train(twin, own, range(3, 6))
    assert distance(net, twin) == 0


@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, LAYERS], ids=str)
def test_an_optimizer_of_the_ordinary_mode_takes_the_hooks_off(options):
    net, twin = plain_nets.Net(), plain_nets.Net()
    before = optimizer_of(net, layerwise=True, **options)
    own, other = (optimizer_of(model, target_modules="all-linear") for model in (net, twin))
    plain_nets.train(net, own, range(3))
    plain_nets.train(twin, other, range(3))
    assert distance(net, twin) == 0
    with pytest.raises(ValueError, match=r"call `attach\(\)`"):
        before.step()
