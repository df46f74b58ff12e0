"""Training weights in 8 bits: steps, memory, and what it cannot be combined with."""

import copy
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from live_floats import Floats
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile, record_function

from hf_osd.layers import int8
from hf_osd.layers.int8 import Int8Weight
from reference.nets_in_layers import Net, batch, int8_net, loss_of, make, train


@pytest.mark.parametrize("options", [{}, {"residual": "sign", "residual_sample": 3}], ids=str)
def test_a_step_is_that_of_a_float_weight_up_to_one_rounding(options, monkeypatch):
    if options:  # whose rows are not those of the pieces
        monkeypatch.setattr(int8, "PIECE", 2 * 16)
    net, optimizer = int8_net(weight_decay=0.1, **options)
    train(net, optimizer, range(3))
    plain = copy.deepcopy(net)
    twin = make(plain, weight_decay=0.1, **options)
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
