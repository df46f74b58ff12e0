"""`source="activations"` where FSDP2 or tensor parallelism divides the weights: as one process on the global batch."""

import warnings
from pathlib import Path

import processes
import pytest
import torch
from sharded_models import LR, RANK, Model, assert_same_weights, loss_of, make_model, shard, train

from hf_osd import OSD, create_osd_optimizer


pytestmark = pytest.mark.distributed

STEPS = 5
TOLERANCE = 1e-9  # float64, see test_fsdp2.py


def make(model: Model, optim: str = "osd_adamw", **options) -> OSD:
    """The gate, of one row, has an empty part on most processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its rank is clipped, which the optimizer says
        defaults = {"lr": LR, "rank": RANK, "source": "activations", "weight_decay": 0.01, "projection_sample": 1}
        defaults["target_modules"] = ["tall", "wide", "gate"]
        return create_osd_optimizer(model, optim, **{**defaults, **options})


def compare(rank: int, world: int, clip: float = 0.0, **options):
    single, sharded = make_model(), shard(make_model())
    reference, optimizer = make(single, **options), make(sharded, **options)
    assert len(optimizer.layers.layers) == len(reference.layers.layers) == 5
    train(single, reference, range(STEPS), clip=clip)
    train(sharded, optimizer, range(STEPS), rank, world, clip=clip)
    assert_same_weights(sharded, single, TOLERANCE)


def dense(rank: int, world: int, folder: Path):
    compare(rank, world)


SCENARIOS = [dense]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(2, SCENARIOS, tmp_path_factory.mktemp("activations"))


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(results, scenario: str):
    assert not results[scenario], results[scenario]
