"""Scenarios of `source="activations"` on several processes: what is exchanged, tensor parallelism, what is refused."""

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from activations_training import STEPS, TOLERANCE, make
from sharded_models import (
    Model,
    assert_same_state,
    assert_same_weights,
    loss_of,
    make_model,
    shard,
    shard_as_accelerate,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from reference.nets_in_layers import Other


sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))  # for `ddp_exchange`


class Allocations(TorchDispatchMode):
    """Shapes of all that operations give in plain tensors, but for views and what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for made in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(made, torch.Tensor) and not isinstance(made, DTensor) and made.device.type != "meta":
                if made.untyped_storage().data_ptr() not in given:
                    self.shapes.add(tuple(made.shape))
        return result


def no_gradient_of_w(rank: int, world: int, folder: Path):
    """Nothing of W's size is made in the backward pass, where FSDP2 gathers W in front of it, nor in the step."""
    for source, expected in (("activations", False), ("gradients", True)):
        model = shard(make_model(), reshard_after_forward=False)
        optimizer = make(model, source=source)
        train(model, optimizer, range(2), rank, world)
        loss = loss_of(model, 2, rank, world)
        with Allocations() as seen:
            loss.backward()
        assert ((33, 20) in seen.shapes) == ((20, 33) in seen.shapes) == expected, seen.shapes
        assert (37, 20) in seen.shapes  # of the embedding
        if not expected:
            assert all(p.grad is None for p in optimizer.param_groups[0]["params"])
            with Allocations() as seen:
                optimizer.step()
            assert not {(33, 20), (20, 33)} & seen.shapes


def used_otherwise_too(rank: int, world: int, folder: Path):
    """What comes to W beside its layer is reduced by FSDP2, and projected like a gradient."""

    class Twice(Model):
        def forward(self, tokens):
            return super().forward(tokens) + self.blocks[0](self.embedding(tokens)) @ self.gate.weight.t()

    torch.manual_seed(0)
    single = Twice().double()
    sharded = Twice().double()
    sharded.load_state_dict(single.state_dict())
    shard(sharded)
    reference, optimizer = (make(model, residual="sign") for model in (single, sharded))
    train(single, reference, range(STEPS))
    train(sharded, optimizer, range(STEPS), rank, world)
    assert sharded.gate.weight.grad is None and len(optimizer.layers.layers) == 5
    assert_same_weights(sharded, single, TOLERANCE)


class Choice(nn.Module):
    """Each process calls a layer of its own beside a common one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)]).double()

    def forward(self, x, index: int):
        return self.layers[2](x) + self.layers[index](x + 1)


def called_on_some_processes(rank: int, world: int, folder: Path):
    model = Choice()
    fully_shard(model)
    optimizer = make(model, target_modules="all-linear", rank=4)
    with pytest.raises(ValueError, match="set_reduce_scatter_unused_params"):
        model(torch.randn(4, 8).double(), rank).square().sum().backward()
    optimizer.zero_grad()

    model, single = Choice(), Choice()
    single.load_state_dict(model.state_dict())
    fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    optimizer, reference = (make(m, target_modules="all-linear", rank=4) for m in (model, single))
    for step in range(6):
        if step == 4:  # a resume, after which each calls layers of its own from the first pass on
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            model = Choice()
            fully_shard(model)
            model.load_state_dict(weights)
            model.set_reduce_scatter_unused_params(True)
            optimizer = make(model, target_modules="all-linear", rank=4)
            optimizer.load_state_dict(state)
            assert optimizer.layers.meeting.wholes._hooks
        x = torch.randn(world, 4, 8, generator=torch.Generator().manual_seed(step)).double()
        model(x[rank], rank).square().sum().backward()
        (sum(single(x[i], i).square().sum() for i in range(world)) / world).backward()
        for own in (optimizer, reference):
            own.step()
            own.zero_grad()
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=0, atol=TOLERANCE)


class Exchanged(TorchDispatchMode):
    """Bytes that this process gives to each kind of collective, and how many there are of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._opname.strip("_")
            given = args[1] if "scatter" in name or "gather" in name else args[0][0]
            self.bytes[name] += given.nbytes
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def bytes_on_the_wire(rank: int, world: int, folder: Path):
    """A step exchanges what the benchmark counts, P whole and divided, and as many weights as with gradients."""
    from ddp_exchange import exchanged_bytes, gathered_bytes, input_bytes

    gathered, calls = {}, {}
    for way in ("gradients", "whole", "divided"):
        model = shard(make_model(inner=34), mp_policy=MixedPrecisionPolicy())
        model.gate.requires_grad_(False)  # whose row would be padded
        model.embedding.requires_grad_(False)  # 37 rows likewise
        options = {"source": "gradients"} if way == "gradients" else {}
        # steps of P that cannot be too long, whose lengths would be added up
        options |= {"target_modules": ["tall", "wide"], "divide_projection": way == "divided", "lr": 1e-4}
        optimizer = make(model, **options)
        train(model, optimizer, range(2), rank, world)
        with Exchanged() as seen, CommDebugMode() as counts:
            loss_of(model, 2, rank, world).backward()
            optimizer.step()
        gathered[way] = seen.bytes["allgather_base"]
        calls[way] = seen.calls
        assert counts.get_total_counts() == seen.calls.total()
        if way == "gradients":
            continue
        total, _, whole_bytes, _ = exchanged_bytes(optimizer, model)
        checks = 8 * len(optimizer.trained_groups[0]["params"] + optimizer.trained_groups[1]["params"])
        rest = total - input_bytes(model)  # R and the vectors: in three calls, for each block's are apart
        gathers, scattered, energies = gathered_bytes(model) if way == "divided" else (0, 0, input_bytes(model))
        assert seen.bytes["allreduce"] == energies + checks and seen.calls["allreduce"] == 2
        assert seen.bytes["reduce_scatter_base"] == rest + scattered and rest < whole_bytes / 2
        assert world * (gathered[way] - gathered["gradients"]) == gathers
    assert gathered["gradients"] > 0
    more = {name: calls["divided"][name] - calls["whole"][name] for name in calls["divided"]}
    # one for each block in the forward pass and one bucket in the step; one of gP
    assert more == {"allgather_base": 3, "reduce_scatter_base": 1, "allreduce": 0}


def what_does_not_fit(rank: int, world: int, folder: Path):
    """GPT-2's layer stores its weight transposed, and its rows, which are divided, are the inputs."""
    from transformers.pytorch_utils import Conv1D

    def chain(layers, x):
        return layers["b"](layers["a"](x))

    for order in (fully_shard, shard_as_accelerate):
        model = Other(chain, a=nn.Linear(8, 12), b=Conv1D(6, 12))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            patch.setattr("sharded_models.shard", fully_shard)
            if order is fully_shard:
                fully_shard(model)
            optimizer = make(model, target_modules="all-linear", rank=4)
            if order is shard_as_accelerate:
                shard_as_accelerate(model, optimizer)
        assert list(optimizer.layers.layers) == ["layers.a.weight"]
        assert optimizer.layers.left == {"layers.b.weight": "the dimension of its inputs is divided"}
        before = whole(model.layers["b"].weight).clone()
        for _ in range(3):
            model(torch.randn(5, 8).double()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(whole(model.layers["b"].weight), before)
        assert set(optimizer.param_groups[0]["sides"]) == {"right"}


def refused(rank: int, world: int, folder: Path):
    model = make_model()
    optimizer = make(model)
    shard(model)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="make the optimizer after"):
        optimizer.step()
    with pytest.raises(ValueError, match="Leave it out; with source='activations'"):
        make(shard(make_model()), "osd_adamw_layerwise", source="gradients")
    meshes = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    model = make_model()
    for block, mesh in zip(model.blocks, meshes, strict=True):
        fully_shard(block, mesh=mesh)
    with pytest.raises(ValueError, match="another mesh"):
        make(fully_shard(model))


def tensor_parallel(rank: int, world: int, folder: Path):
    """Colwise layers make their rows of R themselves; rowwise ones, whose inputs are divided, go by gradients."""
    mesh = init_device_mesh("cpu", (world,))
    single, parallel = make_model(inner=34), make_model(inner=34)
    for block, other in zip(single.blocks, parallel.blocks, strict=True):
        parallelize_module(other, mesh, {"tall": ColwiseParallel(), "wide": RowwiseParallel()})
        block.wide.weight.register_hook(lambda G: G)  # for which it goes by its gradients, too
    chosen = {"target_modules": ["tall", "wide"], "residual": "sign", "residual_sample": 3}
    reference, optimizer = (make(model, **chosen) for model in (single, parallel))
    assert set(optimizer.layers.layers) == {"blocks.0.tall.weight", "blocks.1.tall.weight"}
    assert set(optimizer.layers.left.values()) == {"the dimension of its inputs is divided"}
    for step in range(STEPS):
        losses = []
        for model in (single, parallel):
            loss = loss_of(model, step)
            with CommDebugMode() as counts:
                loss.backward()
            losses.append(loss.detach())
        assert counts.get_total_counts() == 2  # dx of each block
        assert torch.allclose(*losses, rtol=1e-9)
        for own in (reference, optimizer):
            own.step()
            own.zero_grad()
    assert optimizer.state[parallel.blocks[0].tall.weight]["exp_avg"].placements == (Shard(0),)
    assert_same_weights(parallel, single, TOLERANCE)
    assert_same_state(optimizer, reference, 1e-7)

    pair = Other(lambda layers, x: layers["q"](x) * layers["k"](x), q=nn.Linear(8, 6), k=nn.Linear(8, 6))
    parallelize_module(pair, mesh, {"layers.q": ColwiseParallel(), "layers.k": ColwiseParallel()})
    optimizer = make(pair, target_modules="all-linear", rank=2)
    pair(DTensor.from_local(torch.randn(3, 8).double(), mesh, [Replicate()]))
    assert len(set(optimizer.layers.inputs())) == 1  # where both are given one DTensor

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    both = make_model(inner=34)
    for block in both.blocks:
        parallelize_module(block, mesh["tensor"], {"tall": ColwiseParallel()})
    with pytest.raises(ValueError, match="not with both at once"):
        make(shard(both, mesh["data"]), target_modules=["tall"])
