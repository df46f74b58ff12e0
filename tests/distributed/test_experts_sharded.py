"""Stacks of experts that are divided among processes: those on each are stepped as on one process, bit for bit."""

import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from expert_models import make_moe, optimizer_of, shard_moe
from sharded_models import assert_same_state, assert_same_weights, loss_of, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from hf_osd import OSD, ProjectionState, create_osd_optimizer
from hf_osd.optim import predicted_state_bytes, state_bytes


pytestmark = pytest.mark.distributed

ADAFACTOR = {"weight_rule": "adafactor", "projection_sample": 1}
STEPS, RANK, SHAPE = 9, 8, (20, 36)
OF_TRANSFORMERS = {"rank": 4, "projection_sample": 1}
SAVED_EXPERTS, SAVED = 5, ("adamw", "eight_bit", "restart", "random", "power")
ROWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sample": {"projection_sample": 2},
    "adafactor": ADAFACTOR,
    "lion": {"weight_rule": "lion", "projection_rule": "adamw"},
    "svd": {"subspace": "svd", "update_interval": 2},
    "restart": {"subspace": "svd", "update_interval": 2, "restart_moments": True},
    "random": {"subspace": "random", "update_interval": 3},
    "cosine": {"subspace": "cosine", "update_interval": 3, "carry_moments": True},
    "power": {"subspace": "power", "residual": "scaled"},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "left": {"side": "left", "init": "orthonormal"},
    "right": {"side": "right", "init": "randomized_svd"},
    "two_sided": {"side": "two_sided", "residual": "scaled"},
    "rounding": {"stochastic_rounding": True, "dtype": torch.bfloat16},
    "eight_bit": {"weight_rule": "adamw8bit", "shape": (96, 160), "rank": 48},
}


def gradient(step: int, experts: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Experts have tokens in turn, the last one comes late, none has any at one step; one is broken at another."""
    G = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    for e in range(experts):
        if step == 4 or (e + step) % 4 == 0 or (e == experts - 1 and step < 2):
            G[e] = 0
    if step == 6:
        G[experts // 2, 3, 5] = float("nan")
    return G.to(dtype)


def make(p: Tensor, rank: int = RANK, **options: Any) -> OSD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return OSD([{"params": [("experts", p)], "rank": rank}], **{"lr": 1e-2, "weight_decay": 0.1, **options})


def seen(optimizer: OSD) -> dict[str, float]:
    return {name: value for name, value in optimizer.statistics().items() if not math.isnan(value)}


def sharded(X: Tensor, mesh: DeviceMesh, placements: list) -> Any:
    return distribute_tensor(X, mesh, placements, src_data_rank=None)


def assert_same(own: Any, optimizer: OSD, single: Tensor, reference: OSD, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(own.full_tensor(), single.detach(), rtol=0, atol=tolerance)
    for name, value in reference.state[single].items():
        torch.testing.assert_close(whole(optimizer.state[own][name]), value, rtol=1e-6, atol=1e-7)


def compare(experts: int, mesh: DeviceMesh, placements: list, exact: bool = True, **options: Any) -> None:
    """Train whole and divided experts with the same gradients."""
    shape, dtype = options.pop("shape", SHAPE), options.pop("dtype", torch.float32)
    W = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    single, own = nn.Parameter(W.clone()), nn.Parameter(sharded(W, mesh, placements))
    reference, optimizer = make(single, **options), make(own, **options)
    assert optimizer.param_groups[0]["sides"] == reference.param_groups[0]["sides"]
    alone = all(not other.is_replicate() and other.dim == 0 for other in placements)  # each expert, on one process
    for step in range(STEPS):
        optimizer.collect_statistics = reference.collect_statistics = step % 2 == 0
        single.grad = gradient(step, experts, shape, dtype)
        own.grad = sharded(single.grad, mesh, placements)
        with CommDebugMode() if step > 6 and alone else nullcontext() as counts:
            optimizer.step()
        reference.step()
        assert counts is None or counts.get_total_counts() == (step % 2 == 0), counts.get_comm_counts()
        if step % 2 == 0:
            assert seen(optimizer) == pytest.approx(seen(reference), rel=1e-4, abs=1e-6)
    assert predicted_state_bytes(optimizer) == state_bytes(optimizer)
    if not exact:  # A is summed
        assert_same(own, optimizer, single, reference)
        return
    assert torch.equal(own.full_tensor(), single)
    here = len(optimizer.weight_of(own).geometry.experts)
    assert state_bytes(optimizer) * experts == state_bytes(reference) * here
    for name, value in reference.state[single].items():
        if name != "projection_overdue":
            assert torch.equal(optimizer.state[own][name].full_tensor(), value), name


def bit_for_bit(rank: int, world: int, folder: Path):
    mesh = init_device_mesh("cpu", (world,))
    for experts in (1, world, world + 1, 2 * world + 1):
        compare(experts, mesh, [Shard(0)])
    for name, options in ROWS.items():
        try:
            compare(3, mesh, [Shard(0)], **options)
        except AssertionError as error:
            raise AssertionError(name) from error


class Stack(nn.Module):
    """A model that is a stack."""

    def __init__(self, mesh: DeviceMesh | None, dtype: torch.dtype = torch.float32, shape: tuple = SHAPE) -> None:
        super().__init__()
        W = torch.randn(SAVED_EXPERTS, *shape, generator=torch.Generator().manual_seed(99)).to(dtype)
        self.experts = nn.Parameter(W if mesh is None else sharded(W, mesh, [Shard(0)]))

    def train_on(self, optimizer: OSD, steps: range) -> None:
        p: Any = self.experts
        for step in steps:
            p.grad = gradient(step, *p.shape[:1], tuple(p.shape[1:]), p.dtype)
            if isinstance(p, DTensor):
                p.grad = sharded(p.grad, p.device_mesh, list(p.placements))
            optimizer.step()


def made(name: str, mesh: DeviceMesh | None) -> tuple[Stack, OSD]:
    options = dict(ROWS[name])
    model = Stack(mesh, **{key: options.pop(key) for key in ("dtype", "shape") if key in options})
    return model, make(model.experts, **options)


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
    for name in SAVED:
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


def fully_sharded(rank: int, world: int, folder: Path):
    """A mixture of experts under FSDP2 is what one process trains on the same batch: even, uneven, without experts."""
    for experts, clip, accumulate in ((4, 0.0, 1), (5, 0.1, 1), (3, 0.0, 2), (1, 0.0, 1)):
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


def tensor_parallel(rank: int, world: int, folder: Path):
    """Every process has a part of each expert's matrix, which is projected in the dimension that is whole."""
    mesh = init_device_mesh("cpu", (world,))
    fused = [_StridedShard(1, split_factor=2)]
    for placements, side in (([Shard(1)], "right"), ([Shard(2)], "left"), (fused, "right"), ([Replicate()], "left")):
        # blocks would be of each process's own part
        for options in ({"projection_sample": 1}, ADAFACTOR, ROWS["cosine"], ROWS["power"]):
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
SCENARIOS += [loaded_by_transformers]
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
