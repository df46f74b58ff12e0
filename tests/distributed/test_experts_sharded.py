"""Stacks of experts that are divided among processes: those on each are stepped as on one process, bit for bit."""

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from expert_models import make_moe, optimizer_of, shard_moe
from expert_stacks import ADAFACTOR, RANK, ROWS, SAVED, SAVED_EXPERTS, SHAPE, STEPS, compare, made, make, sharded
from sharded_models import assert_same_state, assert_same_weights, loss_of, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from hf_osd import OSD, ProjectionState, create_osd_optimizer


pytestmark = pytest.mark.distributed

OF_TRANSFORMERS = {"rank": 4, "projection_sample": 1}


def bit_for_bit(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (world,))
    for experts in (1, world, world + 1, 2 * world + 1):
        compare(experts, mesh, [Shard(0)], exchanges=0)
    for name, options in ROWS.items():
        try:
            compare(3, mesh, [Shard(0)], exchanges=0, **options)
        except AssertionError as error:
            raise AssertionError(name) from error


def save_and_go_on(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (world,))
    for name in SAVED:
        model, optimizer = made(name, mesh)
        model.train_on(optimizer, range(4))
        saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(saved, checkpoint_id=folder / name)
        model.train_on(optimizer, range(4, STEPS))
        weights, P = model.experts.full_tensor(), ProjectionState.from_optimizer(optimizer)
        if rank == 0:
            torch.save(weights, folder / f"{name}.bin")
            P.save_pretrained(folder / f"{name}_P")


def load_and_go_on(folder: Path, mesh: DeviceMesh | None) -> None:
    for name in SAVED if mesh is None else SAVED[:3]:
        model, optimizer = made(name, mesh)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / name, no_dist=mesh is None)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        model.train_on(optimizer, range(4, STEPS))
        assert torch.equal(whole(model.experts), torch.load(folder / f"{name}.bin")), name
        P, saved = ProjectionState.from_optimizer(optimizer), ProjectionState.from_pretrained(folder / f"{name}_P")
        assert P.config == saved.config and torch.equal(P["experts"].projection, saved["experts"].projection), name


def resharded(rank: int, world: int, folder: Path):
    load_and_go_on(folder.parent / "experts", init_device_mesh("cpu", (world,)))


def given_p(rank: int, world: int, folder: Path):
    """Every process gets the P of its own experts; one that is zero starts with the expert's first tokens."""
    P = torch.linalg.qr(torch.randn(SAVED_EXPERTS, SHAPE[0], RANK)).Q
    P[-1] = 0
    (model, _), (single, _) = made("adamw", init_device_mesh("cpu", (world,))), made("adamw", None)
    pair = [make(m.experts, init={"experts": P}, side="left") for m in (model, single)]
    for m, optimizer in zip((model, single), pair, strict=True):
        m.train_on(optimizer, range(3))
    assert torch.equal(whole(model.experts), single.experts)


def one_expert_without_gradients_anywhere_else(rank: int, world: int, folder: Path):
    """Only the last process has tokens in a first step with lr 0: none may take it for the making of states."""
    p = nn.Parameter(sharded(torch.randn(world, *SHAPE), init_device_mesh("cpu", (world,)), [Shard(0)]))
    optimizer = make(p, lr=0.0)
    G = torch.zeros(world, *SHAPE)
    G[-1] = torch.randn(SHAPE)
    p.grad = sharded(G, p.device_mesh, [Shard(0)])
    optimizer.step()
    assert optimizer.state[p]["idle_steps"].full_tensor().tolist() == [1] * (world - 1) + [0]
    P = ProjectionState.from_optimizer(optimizer)["experts"].projection  # all others have none
    assert P[-1].any() and not P[:-1].any()


def no_gradients_of_the_experts_here(rank: int, world: int, folder: Path):
    """One process's experts have no gradients at a step with lr 0, beside a matrix that all have, or alone."""
    mesh = init_device_mesh("cpu", (world,))
    for alone in (True, False):
        stack, W = (
            nn.Parameter(sharded(torch.randn(shape), mesh, [Shard(0)])) for shape in ((2 * world, 12, 8), (12, 8))
        )
        params = [("stack", stack)] if alone else [("stack", stack), ("W", W)]
        optimizer = OSD([{"params": params, "rank": 4}], lr=0.0)
        for step, lr in enumerate((0.0, 0.01, 0.0, 0.01)):
            optimizer.param_groups[0]["lr"] = lr
            own = torch.randn(stack.to_local().shape)
            if rank == 0 or step == 2:
                stack.grad = DTensor.from_local(own, mesh, [Shard(0)], shape=stack.shape, stride=stack.stride())
            W.grad = None if alone else sharded(torch.randn(12, 8), mesh, [Shard(0)])
            optimizer.step()
            optimizer.zero_grad()
        assert float(optimizer.state[stack]["step"].to_local()[0]) == (4 if rank == 0 else 1)


def fully_sharded(rank: int, world: int, folder: Path):
    """A mixture of experts under FSDP2 is what one process trains on the same batch: even, uneven, without experts."""
    ways = [(4, 0.0, 1), (5, 0.1, 1), (1, 0.0, 1), (3, 0.0, 2)]
    for experts, clip, accumulate in ways if world == 2 else ways[-1:]:
        single, model = make_moe(experts), shard_moe(make_moe(experts))
        reference, optimizer = optimizer_of(single), optimizer_of(model)
        for step in range(5):
            single.resting = model.resting = step
            for i in range(accumulate):
                (loss_of(single, 2 * step + i) / accumulate).backward()
                (loss_of(model, 2 * step + i, rank, world) / accumulate).backward()
            for own, parameters in ((reference, single.parameters()), (optimizer, model.parameters())):
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                own.step()
                own.zero_grad()
        assert_same_weights(model, single, 1e-9)
        assert_same_state(optimizer, reference, 1e-7)


def on_two_dimensions(rank: int, world: int, folder: Path):
    """Copies of experts (HSDP), and FSDP2 over expert parallelism, of which torch says that shards are strided."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [_StridedShard(0, split_factor=2), Shard(0)]):
        for options in (ROWS["adamw"], ROWS["right"], ROWS["cosine"]):
            compare(5, mesh, placements, **options)
    compare(3, mesh, [_StridedShard(0, split_factor=2), Shard(0)])  # one process has none
    unnamed = sharded(torch.zeros(4, *SHAPE), init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)])
    with pytest.raises(ValueError, match="mesh_dim_names"):
        make(nn.Parameter(unnamed))


def tensor_parallel(rank: int, world: int, folder: Path):
    """Every process has a part of each expert's matrix, which is projected in the dimension that is whole."""
    mesh = init_device_mesh("cpu", (world,))
    # blocks would be of each process's own part; one exchange for all norms, one for the A of all experts
    fused, whole = [_StridedShard(1, split_factor=2)], {"projection_sample": 1, "exchanges": 2}
    ways = [
        ([Shard(1)], "right", whole),
        ([Shard(2)], "left", ADAFACTOR),
        ([Replicate()], "left", whole | {"exchanges": 0}),
    ]
    ways += [(fused, "right", own) for own in (ADAFACTOR, ROWS["cosine"], ROWS["power"])]
    for placements, side, options in ways:
        compare(3, mesh, placements, side=side, exact=False, dtype=torch.float64, **options)
    p = nn.Parameter(sharded(torch.zeros(3, 8, 12), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="sharded in the dimension that side='left' projects"):
        make(p, side="left")


def on_its_sides(optimizer: OSD, model: nn.Module) -> OSD:
    """An optimizer of a whole model that projects what `optimizer` does, on the same sides."""
    named, groups = dict(model.named_parameters()), []
    for group in optimizer.param_groups:
        sides = group.get("sides") or [None] * len(group["params"])
        for side in dict.fromkeys(sides):
            params = [
                (name, named[name]) for name, own in zip(group["param_names"], sides, strict=True) if own == side
            ]
            groups.append({"params": params} if side is None else {"params": params, "side": side, **OF_TRANSFORMERS})
    return OSD(groups, lr=1e-2)


def loaded_by_transformers(rank: int, world: int, folder: Path):
    """Experts on one mesh and all else on another (expert parallelism), clipped as by Trainer; tensor parallelism."""
    from transformers import MixtralForCausalLM, Trainer
    from transformers.distributed import DistributedConfig

    for sizes, parts in (({"fsdp_size": world, "ep_size": world}, world), ({"tp_size": world}, 1)):
        single = MixtralForCausalLM.from_pretrained(folder.parent / "mixtral")
        config = DistributedConfig(**sizes)
        model = MixtralForCausalLM.from_pretrained(folder.parent / "mixtral", distributed_config=config)
        optimizer = create_osd_optimizer(model, lr=1e-2, **OF_TRANSFORMERS)
        reference = on_its_sides(optimizer, single)
        stack: Any = model.model.layers[0].mlp.experts.down_proj
        assert len(optimizer.weight_of(stack).geometry.experts) == 4 // parts
        optimizer.collect_statistics = reference.collect_statistics = True
        for step in range(4):
            tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step))
            norms = []
            for own, part, its in ((single, tokens, reference), (model, tokens.chunk(parts)[rank % parts], optimizer)):
                own(input_ids=part, labels=part).loss.backward()
                norms.append(float(Trainer._mixed_mesh_grad_norm(None, own, 0.5)))
                its.step()
                its.zero_grad()
            assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0.5
            assert optimizer.statistics() == pytest.approx(reference.statistics(), abs=1e-3)
        # float32, and Adam divides by gradients near zero: a tenth of a step
        assert_same_weights(model, single, 1e-3)
        P, expected = map(ProjectionState.from_optimizer, (optimizer, reference))
        assert {name: P[name].shape for name in P} == {name: expected[name].shape for name in expected}


SCENARIOS = [bit_for_bit, save_and_go_on, given_p, one_expert_without_gradients_anywhere_else, fully_sharded]
SCENARIOS += [no_gradients_of_the_experts_here, loaded_by_transformers]
ON_FOUR = [on_two_dimensions, tensor_parallel, resharded, fully_sharded]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).save_pretrained(folder / "mixtral")
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    return processes.run(2, SCENARIOS, folder / "experts")


@pytest.fixture(scope="module")
def on_four(on_two, folder):
    return processes.run(4, ON_FOUR, folder / "meshes")


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(on_two, scenario: str):
    assert not on_two[scenario], on_two[scenario]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in ON_FOUR])
def test_four_processes(on_four, scenario: str):
    assert not on_four[scenario], on_four[scenario]


def test_one_process_goes_on_from_two(on_two, folder):
    load_and_go_on(folder / "experts", None)
