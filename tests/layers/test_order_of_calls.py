"""What loops do in other orders, with tensors that they keep, and with parameters that they freeze and thaw."""

import copy
import logging
from collections import defaultdict

import pytest
import torch
from torch import nn

from hf_osd.layers import unload
from reference.nets_in_layers import N, Net, Other, batch, distance, loss_of, make, train


@pytest.mark.parametrize(
    "options", [{}, {"subspace": "power"}, {"subspace": "static"}, {"init": "orthonormal"}], ids=str
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_cleared_between_the_passes(options, set_to_none):
    """As in PyTorch's tutorials and in Lightning."""
    net, other = Net(), Net()
    optimizer, second = make(net, **options), make(other, **options)
    for step in range(5):
        loss = loss_of(net(batch(step)))
        optimizer.zero_grad(set_to_none)
        loss.backward()
        optimizer.step()
    train(other, second, range(5))
    assert distance(net, other) == 0
    assert distance(net, Net()) > 1e-3


def test_an_input_and_its_outputs_that_are_kept():
    net = Net()
    optimizer = make(net)
    x = batch(0)
    kept = []
    for _ in range(4):
        kept.append(net(x))
        plain = copy.deepcopy(net)
        loss_of(kept[-1]).backward()
        loss_of(plain(x)).backward()
        for name, layer in optimizer._layers.layers.items():
            G, P = plain.get_parameter(name).grad, layer.input.P
            expected = P.T @ G if layer.side == "left" else G @ P
            assert (layer.stand_in.grad - expected).abs().max() < 1e-12
        optimizer.step()
        optimizer.zero_grad()


def test_all_is_frozen_and_some_thawed():
    net, other = Net(), Net()
    optimizer, second = make(net), make(other)
    net.requires_grad_(False)
    net.requires_grad_(True)
    train(net, optimizer, range(3))
    loss_of(net(batch(3))).backward()
    net.requires_grad_(False)
    optimizer.step()
    optimizer.zero_grad()
    net.requires_grad_(True)
    train(net, optimizer, range(4, 6))
    train(other, second, range(6))
    assert distance(net, other) == 0


@pytest.mark.parametrize("options", [{}, {"subspace": "random", "update_interval": 3}], ids=str)
def test_going_back_to_a_state_without_steps_is_exact(options):
    net, other = Net(), Net()
    optimizer, second = make(net, **options), make(other, **options)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(5))
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(5))
    train(other, second, range(5))
    assert distance(net, other) == 0


def test_a_compiled_model_goes_back():
    net = Net()
    optimizer = make(net)
    state, model = copy.deepcopy(optimizer.state_dict()), torch.compile(net, backend="aot_eager")
    train(model, optimizer, range(3))
    before = copy.deepcopy(net.state_dict())
    optimizer.load_state_dict(state)
    train(model, optimizer, range(3))
    assert all(not torch.equal(before[name], value) for name, value in net.state_dict().items())


RESETS = {
    "clear": lambda optimizer: optimizer.state.clear(),
    "defaultdict": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "pop": lambda optimizer: [optimizer.state.pop(p) for p in list(optimizer.state)],
    "inner": lambda optimizer: [entries.clear() for entries in optimizer.state.values()],
}


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"subspace": "random", "update_interval": 3}, {"init": "orthonormal"}, {"subspace": "static"}],
    ids=str,
)
def test_without_its_state_it_goes_on_as_a_new_one_after_a_step_that_moves_nothing(options, reset):
    """R of that step is in the coordinates of the P that is gone."""
    net = Net()
    optimizer = make(net, **options)
    train(net, optimizer, range(5))
    kept = optimizer.state_dict()  # whose P is alive
    RESETS[reset](optimizer)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, [5])
    layers = optimizer.layers.layers
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in layers)
    other = Net()
    other.load_state_dict(net.state_dict())
    second = make(other, **options)
    for name in net.state_dict().keys() - layers.keys():  # which have been stepped
        second.state[other.get_parameter(name)] = copy.deepcopy(optimizer.state[net.get_parameter(name)])
    train(net, optimizer, range(6, 12))
    train(other, second, range(6, 12))
    assert distance(net, other) == 0 and kept["state"] and len(layers) == 3
    for name in layers:
        state, expected = optimizer.state[net.get_parameter(name)], second.state[other.get_parameter(name)]
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_a_given_p_is_used_once():
    net = Net()
    P = torch.linalg.qr(torch.randn(N, 4, dtype=torch.float64)).Q
    optimizer = make(net, target_modules=["layers.0", "layers.1"], init=[P, P])
    train(net, optimizer, range(2))
    optimizer.state.clear()
    train(net, optimizer, [2])
    met = optimizer.layers.layers["layers.1.weight"].input
    assert not met.started and not torch.equal(met.P, P)
    train(net, optimizer, range(3, 5))
    assert optimizer.state[net.layers[0].weight]["step"] == 1


def test_p_stays_while_one_that_shares_it_has_its_state():
    net, other = Net(), Net()
    optimizer, second = make(net), make(other)
    train(net, optimizer, range(4)), train(other, second, range(4))
    P = optimizer.state[net.layers[0].weight]["projection"].clone()
    optimizer.state.pop(net.layers[0].weight), optimizer.state.pop(net.layers[2].weight)
    train(net, optimizer, [4]), train(other, second, [4])
    assert torch.equal(net.layers[1].weight, other.layers[1].weight)
    assert optimizer.state[net.layers[0].weight]["step"] == 1
    assert (optimizer.state[net.layers[0].weight]["projection"] - P).abs().max() < 0.1
    assert net.layers[2].weight not in optimizer.state
    train(net, optimizer, range(5, 7))
    assert optimizer.state[net.layers[2].weight]["step"] == 1


def test_a_state_with_an_empty_p_starts_it():
    """As of a layer that had not been called when the state was saved."""
    net, other = Net(), Net()
    optimizer, second = make(net), make(other)
    train(net, optimizer, range(3)), train(other, second, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in saved["state"]:
        if "projection" in saved["state"][name]:
            saved["state"][name]["projection"].zero_()
    optimizer.load_state_dict(saved)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, [3])
    assert torch.equal(net.layers[0].weight, before["layers.0.weight"])
    P = optimizer.state[net.layers[0].weight]["projection"]
    assert (P.T @ P - torch.eye(4)).abs().max() < 1e-6
    train(net, optimizer, [4])
    assert not torch.equal(net.layers[0].weight, before["layers.0.weight"])


def test_a_group_that_is_added_later_is_saved_and_loaded():
    net = Net()
    optimizer = make(net, target_modules=["layers.2"])
    extra = nn.Linear(3, 3).double()
    optimizer.add_param_group({"params": list(extra.parameters()), "rank": None})
    extra(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    assert indices == list(range(len(indices)))
    optimizer.load_state_dict(saved)


def test_schedules_that_cycle_momentum():
    net = Net()
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
    for step in range(3):
        train(net, optimizer, [step])
        schedule.step()


def test_a_model_that_is_a_sequential_is_copied():
    net = nn.Sequential(nn.Linear(N, 24), nn.Linear(24, 16)).double()
    optimizer = make(net)
    train(net, optimizer, range(2))
    other = copy.deepcopy(net)
    assert torch.equal(other(batch(0)), net(batch(0)))


def test_one_input_inside_and_outside_of_autocast():
    def forward(layers, x):
        with torch.autocast("cpu", torch.bfloat16):
            a = layers["a"](x)
            with torch.autocast("cpu", enabled=False):
                b = layers["b"](x)
        return a.float() + b

    net = Other(forward, a=nn.Linear(N, 24), b=nn.Linear(N, 24)).float()
    optimizer = make(net)
    net(batch(0).float()).square().sum().backward()
    plain = copy.deepcopy(net)
    plain(batch(0).float()).square().sum().backward()
    layer = optimizer._layers.layers["layers.b.weight"]
    assert (layer.stand_in.grad - plain.layers["b"].weight.grad @ layer.input.P).abs().max() < 1e-2


def test_another_optimizer_of_the_same_weights_is_told(caplog):
    net = Net()
    optimizer = make(net)
    train(net, optimizer, range(2))
    others = [p for name, p in net.named_parameters() if not name.endswith("weight") or "norm" in name]
    weights = [layer.weight for layer in net.layers]
    with caplog.at_level(logging.WARNING, "hf_osd"):
        train(net, torch.optim.SGD(others, lr=1e-3), [2])  # of what is not prepared
        train(net, optimizer, [3])
        assert not any("unload" in record.message for record in caplog.records)
        for step in (4, 5):
            train(net, torch.optim.AdamW(weights) if step == 4 else optimizer, [step])
    assert [record.message for record in caplog.records if "unload" in record.message]
    unload(net)
    caplog.clear()
    train(net, torch.optim.AdamW(weights), [6])
    assert not any("unload" in record.message for record in caplog.records)


def test_a_model_that_is_converted_to_a_wider_type():
    net = Net().float()
    optimizer = make(net)
    loss_of(net(batch(0).float())).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.double()
    train(net, optimizer, range(3))
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_few_tokens_are_seen_at_every_step():
    net = Net()
    optimizer = make(net, projection_sample=64)
    train(net, optimizer, range(3))
    before = optimizer.state[net.layers[0].weight]["projection"].clone()
    train(net, optimizer, [3])
    assert not torch.equal(before, optimizer.state[net.layers[0].weight]["projection"])
