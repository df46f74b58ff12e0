"""Who shards, when and over which mesh: accelerate's order, HSDP, tensor parallelism, and what is refused."""

from pathlib import Path

import activations_divided
import activations_training
import processes
import pytest
import torch
import torch.distributed as dist
from sharded_models import (
    assert_same_state,
    assert_same_weights,
    loss_of,
    make_model,
    make_optimizer,
    shard,
    shard_as_accelerate,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_osd import OSD
from hf_osd.optim.step.sharding import local


pytestmark = pytest.mark.distributed

TOLERANCE = 1e-9  # float64, see test_fsdp2.py
WHOLE = {"projection_sample": 1}  # blocks would be of each process's own part


def accelerate_order(rank: int, world: int, folder: Path):
    single, sharded = make_model(), make_model()
    reference, optimizer = make_optimizer(single, side="right"), make_optimizer(sharded)
    assert "left" in optimizer.param_groups[0]["sides"]  # decided before anything is known of processes
    state = optimizer.state_dict()
    shard_as_accelerate(sharded, optimizer)
    with pytest.raises(ValueError, match=r"wide.*left.*right"):
        optimizer.load_state_dict(state)  # one without processes
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    train(single, reference, range(5))
    train(sharded, optimizer, range(5), rank, world)
    assert set(optimizer.param_groups[0]["sides"]) == {"right"}
    assert_same_weights(sharded, single, TOLERANCE)
    assert_same_state(optimizer, reference, 1e-7)


def given_p(rank: int, world: int, folder: Path):
    single = make_model()
    names = [name for name, p in single.named_parameters() if p.ndim == 2 and "embedding" not in name]
    given = {name: torch.randn(single.get_parameter(name).shape[1], 6).double() for name in names}
    given["gate.weight"] = given["gate.weight"][:, :1]
    sharded = make_model()
    reference = make_optimizer(single, side="right", init=given)
    optimizer = make_optimizer(sharded, side="right", init=given)
    shard_as_accelerate(sharded, optimizer)
    train(single, reference, range(3))
    train(sharded, optimizer, range(3), rank, world)
    assert_same_weights(sharded, single, TOLERANCE)

    left = {name: torch.randn(single.get_parameter(name).shape[0], 6).double() for name in names if "wide" in name}
    sharded = make_model()
    matrices = [(name, sharded.get_parameter(name)) for name in left]
    optimizer = OSD([{"params": matrices, "rank": 6, "init": left}], lr=0.1)
    del matrices
    shard_as_accelerate(sharded, optimizer)
    loss_of(sharded, 0).backward()
    with pytest.raises(ValueError, match="left side"):
        optimizer.step()


def tensor_parallel(rank: int, world: int, folder: Path):
    """Colwise layers have divided rows and are projected on the right, rowwise ones have divided columns: left."""
    mesh = init_device_mesh("cpu", (world,))
    single, parallel = make_model(inner=34), make_model(inner=34)
    for block in parallel.blocks:
        parallelize_module(block, mesh, {"tall": ColwiseParallel(), "wide": RowwiseParallel()})
    for rule in ("adamw", "adafactor"):
        # sides that are stated, where `auto` would see that nothing is divided
        groups = []
        for side in ("right", "left"):
            name = "tall" if side == "right" else "wide"
            groups.append([(n, p) for n, p in single.named_parameters() if f"{name}.weight" in n])
        reference = OSD(
            [{"params": groups[0], "rank": 6, "side": "right"}, {"params": groups[1], "rank": 6, "side": "left"}],
            lr=0.01,
            weight_rule=rule,
            **WHOLE,
        )
        named = dict(parallel.named_parameters())
        own = [{"params": [(name, named[name]) for name, _ in group], "rank": 6} for group in groups]
        optimizer = OSD(own, lr=0.01, weight_rule=rule, **WHOLE)
        train(single, reference, range(4))
        for step in range(4):
            loss_of(parallel, step).backward()
            with CommDebugMode() as counts:
                optimizer.step()
            parallel.zero_grad()
            single.zero_grad()
        assert rule != "adamw" or counts.get_total_counts() == 1 + 4
        assert_same_weights(parallel, single, TOLERANCE)
        assert_same_state(optimizer, reference, 1e-7)


def refused(rank: int, world: int, folder: Path):
    model = shard(make_model())
    make_optimizer(model, side="right")
    with pytest.raises(ValueError, match=r"(gate|tall|wide).*sharded in the dimension.*'left'"):
        make_optimizer(model, side="left")
    with pytest.raises(ValueError, match="these are sharded.*Leave it out; with source='activations'"):
        make_optimizer(model, layerwise=True)
    with pytest.raises(ValueError, match="source='activations'"):
        make_optimizer(make_model(), layerwise=True)


def hsdp(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    single, sharded = make_model(), shard(make_model(), mesh)
    assert len(sharded.gate.weight.placements) == 2
    reference, optimizer = make_optimizer(single, side="right"), make_optimizer(sharded)
    train(single, reference, range(5))
    train(sharded, optimizer, range(5), rank, world)
    assert_same_weights(sharded, single, TOLERANCE)
    assert_same_state(optimizer, reference, 1e-7)
    for state in optimizer.state.values():
        if "projection" in state:  # each row on one process, also where two have the same part of the weight
            rows = torch.tensor(len(local(state["projection"])))
            dist.all_reduce(rows)
            assert int(rows) == len(state["projection"])
    loss_of(sharded, 5, rank, world).backward()
    with CommDebugMode() as counts:
        optimizer.step()
    assert counts.get_total_counts() == 1 + 4


def part_of_the_world(rank: int, world: int, folder: Path):
    """Two pairs of processes that know nothing of each other."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pair", "replicate", "shard"))["replicate", "shard"]
    single, sharded = make_model(), shard(make_model(), mesh)
    reference, optimizer = make_optimizer(single, side="right"), make_optimizer(sharded)
    train(single, reference, range(3))
    train(sharded, optimizer, range(3), rank % 2, 2)
    assert_same_weights(sharded, single, TOLERANCE)


def fsdp_over_tensor_parallel(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    single, parallel = make_model(inner=34), make_model(inner=34)
    for block in parallel.blocks:
        parallelize_module(block, mesh["tensor"], {"tall": ColwiseParallel(), "wide": RowwiseParallel()})
    shard(parallel, mesh["data"])
    tall = [(name, p) for name, p in single.named_parameters() if "tall.weight" in name]
    wide = [(name, p) for name, p in parallel.named_parameters() if "wide" in name]
    with pytest.raises(ValueError, match="divided in one dimension"):
        OSD([{"params": wide, "rank": 6}])
    named = dict(parallel.named_parameters())
    reference = OSD([{"params": tall, "rank": 6, "side": "right"}], lr=0.01, **WHOLE)
    optimizer = OSD([{"params": [(name, named[name]) for name, _ in tall], "rank": 6}], lr=0.01, **WHOLE)
    for step in range(4):
        loss_of(single, step).backward()
        loss_of(parallel, step, rank // 2, 2).backward()
        reference.step()
        optimizer.step()
        single.zero_grad()
        parallel.zero_grad()
    assert_same_weights(parallel, single, TOLERANCE)


TWO = [accelerate_order, given_p, tensor_parallel, refused]


def hsdp_from_activations(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    activations_training.compare(rank, world, how={"mesh": mesh})
    # uneven rows, and processes without any; divided by two between the passes
    activations_training.compare(rank, world, how={"reshard_after_forward": 2})


FOUR = [hsdp, hsdp_from_activations, part_of_the_world, fsdp_over_tensor_parallel]
FOUR += [activations_divided.shared_and_tied]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    return processes.run(2, TWO, folder) | processes.run(4, FOUR, folder)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in TWO + FOUR])
def test_scenario(results, scenario: str):
    assert not results[scenario], results[scenario]
