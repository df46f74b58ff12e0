"""Scenarios of `source="activations"` with P divided: shared and tied, gathered when and for how long, saved."""

import copy
from pathlib import Path

import pytest
import torch
from activations_training import TOLERANCE, make
from sharded_models import assert_same_state, assert_same_weights, single_process_mesh, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hf_osd import OSD, ProjectionState
from hf_osd.layers import wholes
from hf_osd.optim import predicted_state_bytes, state_bytes
from hf_osd.optim.step import algorithm, divided, moments
from hf_osd.optim.step.sharding import local


STEPS = 6
NAMES = ["q", "k", "v", "o", "head"]


class Attention(nn.Module):
    """q, k and v have one input, o is called twice; in some steps q, or all three, do not touch the loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=name != "q") for name in NAMES[:4])

    def forward(self, x: Tensor, step: int) -> Tensor:
        k, v = self.k(x).tanh(), self.v(x)
        q = torch.ones_like(k) if step == 2 else self.q(x)
        if step == 3:
            q, k, v = q.detach(), k.detach(), v.detach()
        return x + self.o(q * k + v) + self.o(x.square())

    def other(self, x: Tensor) -> Tensor:
        """A pass of another name."""
        return x + self.o(self.q(x)).tanh()


class Net(nn.Module):
    """Blocks, of which the first is called once more at the end, and a head that FSDP2's root has."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(3))
        self.head = nn.Linear(width, 6)
        self.how = "plain"

    def forward(self, x: Tensor, step: int) -> Tensor:
        once = self.how == "reentrant"  # of which FSDP2 loses gradients of biases where it is twice
        for block in [*self.blocks, *([] if once else self.blocks[:1])]:
            if self.how == "plain":
                x = block(x, step)
            else:
                x = checkpoint(block, x, step, use_reentrant=self.how == "reentrant")
        return self.head(x if once else self.blocks[1].other(x))


def make_net(dtype: torch.dtype = torch.float64, mesh=None, sharded: bool = True, **sizes: int) -> Net:
    torch.manual_seed(0)
    net = Net(**sizes).to(dtype)
    if sharded:
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "other")
        fully_shard(net, mesh=mesh)
    return net


def inputs(step: int, rank: int, world: int, width: int = 24) -> Tensor:
    x = torch.randn(8, 5, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    if step == 4:
        x[0, 0, 0] = float("inf")  # on one process
    return x.chunk(world)[rank]


def train(net: Net, optimizer: OSD, steps, rank: int = 0, world: int = 1, parts: int = 1, clip: float = 0.0) -> None:
    for step in steps:
        for part in range(parts):
            if parts > 1 and isinstance(net.head.weight, DTensor):
                net.set_requires_gradient_sync(part == parts - 1)
            x = inputs(step + 100 * part, rank, world, net.head.in_features).to(net.head.bias.dtype)
            (net(x.requires_grad_(net.how == "reentrant"), step).square().mean() / parts).backward()
        if clip and step != 4:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def make_optimizer(net: Net, **options) -> OSD:
    return make(net, **{"target_modules": NAMES, "rank": 4, **options})


class Watch:
    """How many units there are at once, of the root's and of others."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most = 0
        send_for = wholes.Unit.send_for

        def watched(unit: wholes.Unit) -> None:
            send_for(unit)
            self.most = max(self.most, sum(other.here for other in self.units))

        patch.setattr(wholes.Unit, "send_for", watched)
        self.units: list[wholes.Unit] = []

    def follow(self, optimizer: OSD) -> None:
        self.units = list(optimizer.layers.meeting.wholes._units.values())


def shared_and_tied(rank: int, world: int, folder: Path):
    """Equal to one process, whatever recomputes; two units are there at once, and the root's while it is called."""
    limits = divided.BUCKET_LIMIT, divided.STACK_LIMIT
    ways = [("plain", 3, 0.05), ("again", 1, 0.0), ("plain", 1, 0.0), ("reentrant", 1, 0.0)]
    for how, parts, clip in ways if world == 2 else ways[:2]:
        if parts > 1:
            divided.BUCKET_LIMIT = divided.STACK_LIMIT = 150
        single, sharded = make_net(sharded=False), make_net()
        single.how = sharded.how = how
        reference, optimizer = make_optimizer(single), make_optimizer(sharded)
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            for step in range(STEPS):
                train(single, reference, [step], parts=parts, clip=clip)
                train(sharded, optimizer, [step], rank, world, parts=parts, clip=clip)
                watch.follow(optimizer)
                assert not any(unit.here for unit in watch.units)
                before = watch.most
                with torch.no_grad():
                    sharded(inputs(0, rank, world), 0)  # in an evaluation nobody asks
                assert watch.most == before and not any(unit.here for unit in watch.units)
            # a reentrant checkpoint makes a backward pass of its own of each block, and nothing is sent for ahead
            assert len(watch.units) == 4 and watch.most == (1 if how == "reentrant" else 3), (how, watch.most)
        assert len(set(optimizer.layers.inputs())) == 7
        assert_same_weights(sharded, single, TOLERANCE)
        assert_same_state(optimizer, reference, 1e-7)
        for p, state in optimizer.state.items():
            for name in state.keys() & {"projection", "projection_exp_avg", "projection_exp_avg_sq"}:
                assert local(state[name]).nbytes * world == state[name].numel() * 8 == p.shape[1] * 4 * 8
        divided.BUCKET_LIMIT, divided.STACK_LIMIT = limits


def whole_by_option(rank: int, world: int, folder: Path):
    """The same weights; 1 / processes of the bytes of P and its moments; bfloat16, 8 bits, moments stacked or not."""
    # 20 tokens would leave columns of a P that starts as orth(A) to rounding
    eight_bit = {"optim": "osd_adamw8bit", "rank": 64, "init": "orthonormal"}
    launches = moments.launches
    for dtype, options in (
        (torch.float64, {"projection_interval": 2, "init": "orthonormal"}),
        (torch.float32, eight_bit),
        (torch.float32, dict(eight_bit)),
        (torch.float32, {"projection_dtype": "bfloat16"}),
        (torch.float32, {"projection_dtype": "int8"}),
        (torch.bfloat16, {"optim": "osd_sgd", "lr": 0.1}),
    ):
        # as on GPUs, where weights of one shape are stepped together, later than they are met
        algorithm.launches = moments.launches = lambda X, options=options: options is not eight_bit
        sizes = {"width": 128} if "osd_adamw8bit" in options.values() else {}
        nets = [make_net(dtype, **sizes) for _ in range(2)]
        ways = [
            make_optimizer(net, **options, divide_projection=way) for net, way in zip(nets, (True, False), strict=True)
        ]
        for net, optimizer in zip(nets, ways, strict=True):
            train(net, optimizer, range(4), rank, world)
            assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        states = [optimizer.state[net.blocks[0].k.weight] for net, optimizer in zip(nets, ways, strict=True)]
        names = {name for name in states[0] if name.startswith("projection") and states[0][name].ndim}
        assert {"projection"} <= names
        for name in names:
            own, all_ = states[0][name], states[1][name]
            assert isinstance(own, DTensor) and not isinstance(all_, DTensor), name
            assert own.to_local().nbytes * world == all_.nbytes, name
        start = make_net(dtype, **sizes, sharded=False)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            p, q, before = whole(p.detach()).double(), whole(q.detach()).double(), start.get_parameter(name).double()
            # a changed code of 8 bits is a part of a step, and bfloat16 has 8 bits
            most = 1e-7 if dtype == torch.float64 else 0.1 if dtype == torch.bfloat16 else 0.03
            assert (p - q).norm() <= most * (p - before).norm(), (options, name, (p - q).norm() / (p - before).norm())
    algorithm.launches = moments.launches = launches


def saved_and_given(rank: int, world: int, folder: Path):
    """Divided to whole and back; a P that was given, also after a save before any step; what is exported is whole."""
    for way in (True, False):
        net = make_net()
        optimizer = make_optimizer(net, divide_projection=way)
        train(net, optimizer, range(2), rank, world)
        weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, range(2, 4), rank, world)
        again = make_net()
        again.load_state_dict(weights)
        other = make_optimizer(again, divide_projection=not way)
        other.load_state_dict(state)
        train(again, other, range(2, 4), rank, world)
        assert_same_weights(again, net, TOLERANCE)
        assert isinstance(other.state[again.blocks[0].k.weight]["projection"], DTensor) != way
    exported = ProjectionState.from_optimizer(optimizer)
    given = exported.initial_projections()
    assert given["blocks.0.k.weight"].shape == (24, 4)
    single, again = make_net(sharded=False), make_net()
    reference, before = (make_optimizer(net, init=given) for net in (single, again))
    loaded = make_optimizer(again)
    loaded.load_state_dict(copy.deepcopy(before.state_dict()))
    train(single, reference, range(3))
    train(again, loaded, range(3), rank, world)
    assert_same_weights(again, single, TOLERANCE)
    loaded.remove()  # nobody asks for P any more
    assert not loaded.layers.meeting.wholes._hooks
    loaded.attach()
    train(single, reference, range(3, 6))
    train(again, loaded, range(3, 6), rank, world)
    assert_same_weights(again, single, TOLERANCE)
    for optimizer in (reference, loaded):  # P starts anew, from activations
        optimizer.state.clear()
    train(single, reference, range(6, 9))
    train(again, loaded, range(6, 9), rank, world)
    assert_same_weights(again, single, TOLERANCE)
    assert whole(again.head.weight).isfinite().all()
    net = make_net(mesh=single_process_mesh(world))  # of a mesh of one process there is nothing to gather
    train(net, make_optimizer(net), range(2))
