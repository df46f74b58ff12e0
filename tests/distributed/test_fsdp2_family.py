"""FSDP2 with every subspace rule, residual and carried moments: two processes train what one process trains."""

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from sharded_models import assert_same_state, assert_same_weights, loss_of, make_model, make_optimizer, shard, train
from torch.distributed.tensor.debug import CommDebugMode

from hf_osd.optim.step.movement import Movements
from hf_osd.optim.step.sharding import local


pytestmark = pytest.mark.distributed

STEPS = 6
# float64: only the order in which the processes' sums are added differs, and Adam divides by gradients near zero
TOLERANCE = 1e-9

SCALED, INTERVAL = {"residual": "scaled"}, {"update_interval": 2}
ROWS: dict[str, dict[str, Any]] = {
    "random": {"subspace": "random", **INTERVAL},
    "gaussian": {"subspace": "random", "distribution": "gaussian", **INTERVAL},
    "cosine": {"subspace": "cosine", **INTERVAL},
    "importance": {"subspace": "importance", **INTERVAL},
    "power": {"subspace": "power"},
    "power_without_momentum": {"subspace": "power", "mixing": 0.0, "weight_rule": "sgd", "lr": 0.1},
    "static": {"subspace": "static"},
    "projection_interval": {"projection_interval": 2},
    "scaled_column": SCALED,
    "scaled_svd": {**SCALED, "residual_scale": 0.5, "subspace": "svd", **INTERVAL},
    "scaled_adafactor": {**SCALED, "weight_rule": "adafactor"},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "carried_adamw": {"carry_moments": True, "alpha": 0.5},
    "carried_lion": {"carry_moments": True, "weight_rule": "lion", "projection_rule": "adamw"},
    "carried_sgd": {"carry_moments": True, "weight_rule": "sgd", "lr": 0.1, "subspace": "svd", **INTERVAL},
    "carried_cosine": {"carry_moments": True, "subspace": "cosine", **INTERVAL, **SCALED},
    "carried_power": {"carry_moments": True, "subspace": "power", **SCALED},
}


def compare(rank: int, world: int, **options: Any) -> None:
    single, sharded = make_model(), shard(make_model())
    reference, optimizer = make_optimizer(single, side="right", **options), make_optimizer(sharded, **options)
    train(single, reference, range(STEPS))
    train(sharded, optimizer, range(STEPS), rank, world)
    assert_same_weights(sharded, single, TOLERANCE)
    assert_same_state(optimizer, reference, 1e-7)
    assert not torch.equal(single.blocks[0].tall.weight, make_model().blocks[0].tall.weight)


def family(rank: int, world: int, folder: Path):
    said = {}
    for name, options in ROWS.items():
        try:
            compare(rank, world, **options)
        except AssertionError as error:  # of both processes: they stay in step
            said[name] = str(error)
    torch.save(said, folder / f"family_{rank}.bin")


def p_is_the_same_everywhere(rank: int, world: int, folder: Path):
    """Bit for bit, and what is observed of it is what one process sees."""
    for options in (ROWS["random"], ROWS["cosine"], ROWS["importance"], ROWS["power"]):
        single, sharded = make_model(torch.float32), shard(make_model(torch.float32))
        reference, optimizer = make_optimizer(single, side="right", **options), make_optimizer(sharded, **options)
        optimizer.collect_statistics = reference.collect_statistics = True
        train(sharded, optimizer, range(4), rank, world)
        train(single, reference, range(1))
        for p in optimizer.param_groups[0]["params"]:
            P = optimizer.weight_of(p).P.read()
            shared = [P, *(value for value in optimizer.state[p].values() if value is local(value))]
            for value in shared:
                everyone = [torch.empty_like(value) for _ in range(world)]
                dist.all_gather(everyone, value)
                assert torch.equal(everyone[0], everyone[1])
            assert P.shape[0] == p.shape[1]
        again = shard(make_model(torch.float32))
        own = make_optimizer(again, **options)
        own.collect_statistics = True
        train(again, own, range(1), rank, world)
        assert own.statistics() == pytest.approx(reference.statistics(), abs=1e-5)


def collectives(rank: int, world: int, folder: Path):
    """One sum for all norms. P divided: four for all weights. Then for each A of a whole P, and a residual's norm."""
    expected = {
        "random": (0, 0),  # drawn by each process
        "power": (0, 1),
        "scaled_column": (4, 1),  # ||S||²
        "sign": (4, 0),
        "carried_adamw": (0, 1),
    }
    for name, (divided, count) in expected.items():
        model = shard(make_model())
        optimizer = make_optimizer(model, **(ROWS[name] | ({"update_interval": 9} if name == "random" else {})))
        train(model, optimizer, range(1), rank, world)
        loss_of(model, 1, rank, world).backward()
        with CommDebugMode() as counts:
            optimizer.step()
        projected = len(optimizer.param_groups[0]["params"])
        assert counts.get_total_counts() == 1 + divided + count * projected, (name, counts.get_comm_counts())


def blocks_are_of_each_part(rank: int, world: int, folder: Path):
    """In the mean over blocks, of any number of rows, A is that of the whole gradient, and P the same everywhere."""
    k = 3
    model, single = shard(make_model()), make_model()
    # P whole, else A is of each part
    optimizer = make_optimizer(model, projection_sample=k, lr=1e-12, init="orthonormal", divide_projection=False)
    train(model, optimizer, range(1), rank, world)
    named = dict(model.named_parameters())
    loss_of(single, 1).backward()
    seen: dict[str, list] = {}
    add = Movements.add
    Movements.add = lambda self, moving: seen.setdefault(moving.projection.geometry.name, []).append(moving.A.clone())
    try:
        for _ in range(k):
            train(model, optimizer, range(1, 2), rank, world)
    finally:
        Movements.add = add
    for name, parts in seen.items():
        p, G = named[name], dict(single.named_parameters())[name].grad
        P = local(optimizer.state[p]["projection"])
        assert len(parts) == k and optimizer.weight_of(p).geometry.side == "right"
        if p.shape[0] >= k * world:  # of fewer rows a block is all of them
            torch.testing.assert_close(torch.stack(parts).mean(0), G.T @ G @ P, rtol=0, atol=1e-9)
        other = parts[0].clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, parts[0])


def two_sided_is_refused(rank: int, world: int, folder: Path):
    with pytest.raises(ValueError, match=r"is sharded, which side='two_sided' does not support.*use DDP"):
        make_optimizer(shard(make_model()), side="two_sided")


SCENARIOS = [family, p_is_the_same_everywhere, collectives, blocks_are_of_each_part, two_sided_is_refused]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    results = processes.run(2, SCENARIOS, folder)
    return results | (torch.load(folder / "family_0.bin") if not results["family"] else {})


@pytest.mark.parametrize("row", ROWS)
def test_two_processes(results, row: str):
    assert not results["family"] and not results.get(row), results["family"] or results[row]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario(results, scenario: str):
    assert not results[scenario], results[scenario]
