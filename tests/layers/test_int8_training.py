"""Training weights in 8 bits: memory, that the model stays the model, and what is saved."""

import copy
import gc
import weakref
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from test_model_stays import copies
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import hf_osd
from hf_osd.layers import int8
from hf_osd.layers.int8 import Int8Weight
from reference.nets_in_layers import Net, batch, distance, loss_of, make, train


def int8_net(**options):
    net = Net()
    return net, make(net, weight_dtype="int8", **options)


def test_a_step_is_that_of_a_float_weight_up_to_one_rounding():
    net, optimizer = int8_net(weight_decay=0.1)
    train(net, optimizer, range(3))
    plain = copy.deepcopy(net)
    twin = make(plain, weight_decay=0.1)
    twin.load_state_dict(copy.deepcopy({**optimizer.state_dict(), "param_groups": as_floats(optimizer)}))
    scales = {name: p.scale.clone() for name, p in net.named_parameters() if isinstance(p, Int8Weight)}
    assert len(scales) == 3
    train(net, optimizer, [3])
    train(plain, twin, [3])
    for name, p in plain.named_parameters():
        own = net.get_parameter(name)
        if isinstance(own, Int8Weight):
            off = (own - p).abs() / torch.maximum(scales[name], own.scale)[:, None]
            assert 0.05 < off.max() <= 1.0001, name
        else:
            assert torch.equal(own, p), name


def as_floats(optimizer):
    return [{**group, "weight_dtype": None} for group in optimizer.state_dict()["param_groups"]]


@pytest.mark.parametrize("optim", ["osd_adamw", "osd_lion", "osd_sgd"])
def test_a_broken_gradient_changes_no_bit(optim):
    net, optimizer = int8_net(optim=optim)
    train(net, optimizer, range(3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loss_of(net(batch(3))).backward()
    for p in net.osd_stand_ins.parameters():
        p.grad.fill_(float("nan"))
    for p in (net.norm.weight, net.norm.bias, net.layers[0].bias, net.layers[2].bias):
        p.grad = None
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Floats(TorchDispatchMode):
    """How many float tensors of given sizes are alive after each operation, at most."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.alive, self.most = sizes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() in self.sizes:
            if type(out) is torch.Tensor and out._base is None:
                self.alive.append(weakref.ref(out))
        self.most = max(self.most, self.count())
        return out

    def count(self) -> int:
        return len({ref().untyped_storage().data_ptr() for ref in self.alive if ref() is not None})


def test_no_float_copy_of_a_weight_is_left_alive(monkeypatch):
    """One at a time, read in pieces, which are of less rows than it has as those of a real weight are."""
    monkeypatch.setattr(int8, "PIECE", 400)
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4))).bfloat16()
    optimizer = make(net, weight_dtype="int8")
    x = torch.randn(7, 40, dtype=torch.bfloat16)
    for _ in range(3):
        with Floats({40 * 40}) as forward:
            loss = net(x).square().mean()
            assert forward.count() == 0 and forward.most == 1
        with Floats({40 * 40}) as backward:
            loss.backward()
            assert backward.count() == 0 and backward.most == 1
        with Floats({40 * 40}) as step:
            optimizer.step()
        assert step.count() == 0
        optimizer.zero_grad()


def test_quantised_layer_by_layer():
    """Beside the model there is one layer: its copy in float32, as much again for its largest, and its integers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))).bfloat16()
        with record_function("quantised"):
            optimizer = make(net, weight_dtype="int8")
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (during,) = (event for event in events if event.name() == "quantised")
    sizes = [(event.start_ns() > during.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    model, live = 8 * 2 * 256 * 256, list(accumulate(size for _, size in sizes))
    before = [there for there, (later, _) in zip(live, sizes, strict=True) if not later][-1]
    assert abs(before - model) < 1000
    assert max(there for there, (later, _) in zip(live, sizes, strict=True) if later) < model + 9.5 * 256 * 256
    assert live[-1] < model / 2 + 8 * 4 * 256 + 1000 and optimizer.layers is not None


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


def test_moved_and_converted():
    net, optimizer = int8_net()
    train(net, optimizer, range(2))
    held = net.layers[0].weight
    net.to("cpu")
    net.float()
    assert net.layers[0].weight is held and held.dtype == torch.float32 and type(held) is Int8Weight
    assert held.scale.dtype == torch.float32 and net.layers[0].bias.dtype == torch.float32
    optimizer.zero_grad()
    net(batch(2).float()).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert net(batch(2).float()).isfinite().all()


def test_compiled():
    """The same as eager, with no more graphs."""

    def run(compiled):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12))
        optimizer = make(net, weight_dtype="int8")
        call = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        for step in range(4):
            call(batch(step).float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p + 0 for p in net.parameters()]

    for a, b in zip(run(False), run(True), strict=False):
        assert torch.allclose(a, b, atol=1e-6)


def test_gradients_refuse_it():
    with pytest.raises(ValueError, match="use source='activations'"):
        make(Net(), source="gradients", weight_dtype="int8")
    net, _optimizer = int8_net()
    held = make(net, weight_dtype="int8")  # the first gives its weights back
    train(net, held, range(2))


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_refuse_it(alone):
    sharded, parallel, later = (nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(3))
    fully_shard(sharded, mesh=alone)
    parallelize_module(parallel, alone, {"0": ColwiseParallel()})
    for net in (sharded, parallel):
        with pytest.raises(ValueError, match="weight_dtype='int8' is not for FSDP2 and tensor parallelism.*use DDP"):
            make(net, weight_dtype="int8")
    optimizer = make(later, weight_dtype="int8")
    optimizer.param_groups[0]["params"] = list(sharded.parameters())  # as accelerate exchanges them
    with pytest.raises(ValueError, match="weight_dtype='int8' is not for FSDP2"):
        optimizer.weights.meet()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_steps_of_a_narrow_p_add_up(dtype):
    """Each is a thousandth of an entry, which rounding to nearest would lose."""
    net = Net().float()
    optimizer = make(net, projection_dtype=dtype, init="orthonormal")
    net(batch(0).float()).square().mean().backward()
    optimizer.step()
    P = optimizer.weight_of(net.layers[0].weight).P
    start = P.read().clone()
    rest = torch.where(start.abs() < start.abs().amax(1, keepdim=True), start, 0)  # a row as a whole moves its scale
    for count in range(500):
        P.count = count
        P.write(P.read() + rest * 1e-3)
    assert abs((P.read() * rest).sum() / rest.square().sum() - 1.5) < 0.05
