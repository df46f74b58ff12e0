"""Models with weights in 8 bits are plain ones where they are saved, and go on exactly from there, or after floats."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp

import hf_osd
from hf_osd.layers.int8 import Int8Weight
from reference.nets_in_layers import Net, batch, copies, distance, int8_net, make, train


def test_what_is_saved_is_a_plain_model():
    net, optimizer = int8_net()
    train(net, optimizer, range(3))
    state = net.state_dict()
    assert list(state) == list(Net().state_dict()) and {type(value) for value in state.values()} == {torch.Tensor}
    plain = Net()
    plain.load_state_dict(state)
    assert (plain(batch(5)) - net(batch(5))).abs().max() < 1e-12
    for other in copies(net):
        assert type(other.layers[0].weight) is nn.Parameter and distance(net, other) == 0


@pytest.mark.parametrize(
    ("dtype", "subspace"), [(torch.bfloat16, "online_pca"), (torch.float32, "online_pca"), (torch.float32, "power")]
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_goes_on_exactly_from_what_is_saved(dtype, subspace, accumulation):
    options = {"weight_dtype": "int8", "stochastic_rounding": dtype == torch.bfloat16, "subspace": subspace}

    def build():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 12)).to(dtype)
        return net, make(net, "osd_adamw", **options)

    def run(net, optimizer, steps):
        for step in steps:
            for x in batch(step).to(dtype).chunk(accumulation):
                net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, own = build()
    run(whole, own, range(4))
    saved = copy.deepcopy((whole.state_dict(), own.state_dict()))
    run(whole, own, range(4, 8))
    torch.manual_seed(1)
    again = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 12)).to(dtype)
    again.load_state_dict(saved[0])
    other = make(again, "osd_adamw", **options)
    other.load_state_dict(saved[1])
    run(again, other, range(4, 8))
    for a, b in zip(whole.parameters(), again.parameters(), strict=False):
        if isinstance(a, Int8Weight):
            assert torch.equal(a.int_data, b.int_data) and torch.equal(a.scale, b.scale)
        assert torch.equal(a + 0, b + 0)
    assert all(name not in state for state in other.state.values() for name in ("weight_int8", "weight_scale"))


def in_dtype(dtype, seed=1):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 12)).to(dtype)
    return net, make(net, "osd_adamw", weight_dtype="int8", stochastic_rounding=dtype == torch.bfloat16)


def steps(net, optimizer, numbers):
    for step in numbers:
        net(batch(step).to(net[0].bias.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def set_optimizer_first(net, optimizer, *, model_state_dict, optim_state_dict):
    dcp.set_optimizer_state_dict(net, optimizer, optim_state_dict)
    dcp.set_model_state_dict(net, model_state_dict)


def set_model_first(net, optimizer, *, model_state_dict, optim_state_dict):
    dcp.set_model_state_dict(net, model_state_dict)
    dcp.set_optimizer_state_dict(net, optimizer, optim_state_dict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("load", [dcp.set_state_dict, set_model_first, set_optimizer_first])
def test_distributed_checkpoints_go_on_to_the_bit(dtype, load, tmp_path, caplog):
    """`set_state_dict` loads the optimizer before the model, and `load` reads into the tensors that it is given."""
    whole, own = in_dtype(dtype)
    steps(whole, own, range(3))
    checkpoint.save(dict(zip(("model", "optim"), dcp.get_state_dict(whole, own), strict=True)), checkpoint_id=tmp_path)
    again, other = in_dtype(dtype, seed=2)
    state = dict(zip(("model", "optim"), dcp.get_state_dict(again, other), strict=True))
    checkpoint.load(state, checkpoint_id=tmp_path)
    load(again, other, model_state_dict=state["model"], optim_state_dict=state["optim"])
    for numbers in (range(0), range(3, 6)):
        steps(whole, own, numbers)
        steps(again, other, numbers)
        for a, b in zip(whole.parameters(), again.parameters(), strict=False):
            if isinstance(a, Int8Weight):
                assert torch.equal(a.int_data, b.int_data) and torch.equal(a.scale, b.scale)
            assert torch.equal(a + 0, b + 0)
    assert "is not the weight" not in caplog.text and all(
        p.expected is None for p in again.parameters() if isinstance(p, Int8Weight)
    )
    assert not other._optimizer_step_pre_hooks


def test_a_distributed_checkpoint_without_its_model_is_told_of_at_the_next_step(tmp_path, caplog):
    whole, own = in_dtype(torch.float32)
    steps(whole, own, range(3))
    checkpoint.save({"optim": dcp.get_optimizer_state_dict(whole, own)}, checkpoint_id=tmp_path)
    again, other = in_dtype(torch.float32, seed=2)
    state = {"optim": dcp.get_optimizer_state_dict(again, other)}
    before = again[0].weight + 0
    checkpoint.load(state, checkpoint_id=tmp_path)
    dcp.set_optimizer_state_dict(again, other, state["optim"])
    assert torch.equal(again[0].weight + 0, before) and "is not the weight" not in caplog.text
    steps(again, other, range(3, 5))
    assert caplog.text.count("is not the weight that was saved") == 2  # once for each


def test_a_state_of_other_weights_leaves_them(caplog):
    net, optimizer = int8_net()
    train(net, optimizer, range(3))
    torch.manual_seed(5)
    other = nn.ModuleList([Net()])[0]
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    own = make(other, weight_dtype="int8")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    own.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert "is not the weight that was saved" in caplog.text


def test_floats_again():
    net, optimizer = int8_net()
    train(net, optimizer, range(3))
    y = net(batch(9)).detach()
    hf_osd.unload(net)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in net.parameters())
    assert (net(batch(9)) - y).abs().max() < 1e-12
    train(net, make(net), range(2))


def test_after_floats_training_goes_on_to_the_bit():
    """As in a Trainer's second training; what was changed in between is rounded to nearest."""
    (net, optimizer), (whole, own) = int8_net(), int8_net()
    train(whole, own, range(5))
    train(net, optimizer, range(3))
    hf_osd.unload(net)
    assert optimizer.state_dict()["state"]
    optimizer.attach()
    train(net, optimizer, range(3, 5))
    for p, q in zip(net.parameters(), whole.parameters(), strict=False):
        assert type(p) is type(q) and torch.equal(p + 0, q + 0)
    hf_osd.unload(net)
    with torch.no_grad():
        net.layers[0].weight.fill_(3.0)
    optimizer.attach()
    W = net.layers[0].weight
    assert type(W) is Int8Weight and (W == 3.0).all() and any(W is p for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_of_less_than_a_unit_of_the_integers_stay(dtype, caplog):
    """Of floats that are made int8 again, and of weights that are loaded with a state of later ones."""

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 33)).to(dtype)
        return net, make(net, weight_dtype="int8")

    (net, optimizer), (other, own) = build(), build()
    net(batch(0).to(dtype)).square().mean().backward()
    optimizer.step()
    early = net.state_dict()
    hf_osd.unload(net)
    with torch.no_grad():
        W = net[0].weight
        W.mul_(torch.where(W.abs() < W.abs().amax(1, keepdim=True) / 2, 1.01, 1.0).to(dtype))  # by half a unit at most
    later = Int8Weight.from_float(net[0].weight.detach())
    optimizer.attach()
    assert torch.equal(net[0].weight + 0, later + 0)
    other.load_state_dict(early)
    own.load_state_dict(optimizer.state_dict())
    assert torch.equal(other[0].weight + 0, Int8Weight.from_float(early["0.weight"]) + 0)
    assert "is not the weight that was saved" in caplog.text
    net.load_state_dict(early)
    before = net[0].weight.int_data.clone(), net[0].weight.scale.clone()
    caplog.clear()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # of the very weights
    assert torch.equal(net[0].weight.int_data, before[0]) and torch.equal(net[0].weight.scale, before[1])
    assert not caplog.text


def test_put_into_the_model_again_they_stay():
    """As a Trainer does when it begins."""
    net, optimizer = int8_net()
    held = net.layers[0].weight
    optimizer.attach()
    train(net, optimizer, range(2))
    assert net.layers[0].weight is held and type(held) is Int8Weight and optimizer.state[held]


def test_the_end_of_an_optimizer_leaves_those_of_the_next():
    net, optimizer = int8_net()
    hf_osd.unload(net)
    optimizer = make(net, weight_dtype="int8")
    gc.collect()
    train(net, optimizer, range(2))
    assert type(net.layers[0].weight) is Int8Weight and optimizer.state[net.layers[0].weight]
