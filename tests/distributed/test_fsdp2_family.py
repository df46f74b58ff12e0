"""FSDP2 with every subspace rule, residual and carried moments: two processes train what one process trains."""

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from sharded_models import assert_same_state, assert_same_weights, make_model, make_optimizer, shard, train


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
    "projection_interval": {"projection_interval": 2, "projection_schedule": "constant"},
    "scaled_column": SCALED,
    "scaled_matrix": {**SCALED, "residual_scaling": "matrix"},
    "scaled_without_limit": {**SCALED, "residual_limit": 0.0, "residual_scale": 0.5, "subspace": "svd", **INTERVAL},
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


SCENARIOS = [family]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    results = processes.run(2, SCENARIOS, folder)
    assert not results["family"], results["family"]
    return results | torch.load(folder / "family_0.bin")


@pytest.mark.parametrize("row", ROWS)
def test_two_processes(results, row: str):
    assert not results.get(row), results[row]
