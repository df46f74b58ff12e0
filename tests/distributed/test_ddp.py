"""Two processes (gloo) train as one on the same global batches: Trainer, accelerate and loops of one's own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_training
import pytest
import torch
from ddp_training import OWN_LOOPS, RESUMED, SUBZERO, TRAINERS, accelerate_loop, own_loop, state_of, trainer


pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each process ended with: one start for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command += [ddp_training.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", [*OWN_LOOPS, *TRAINERS, "accelerate"])
def test_all_processes_hold_the_same(ranks: list[dict[str, Any]], name: str):
    """Weights, P and its states, bit for bit: also a P started at random, and after weights that differed."""
    a, b = (rank[name] for rank in ranks)
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    for key, state in a["states"].items():
        assert state.keys() == b["states"][key].keys() and state
        assert all(torch.equal(value, b["states"][key][entry]) for entry, value in state.items()), key
    projected = [state for state in a["states"].values() if any(entry.startswith("projection") for entry in state)]
    assert len(projected) >= 2


@pytest.mark.parametrize("name", OWN_LOOPS)
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], name: str):
    control = state_of(*own_loop(**OWN_LOOPS[name]))
    start = {key: p.detach() for key, p in ddp_training.Net(OWN_LOOPS[name].get("inner", 40)).named_parameters()}
    moved = difference(control["weights"], start)
    apart = difference(ranks[0][name]["weights"], control["weights"])
    assert moved > 0.05
    # float64: rounding of 1e-16 in the gradients, which Adam's first steps divide by themselves
    assert apart < 1e-9


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(ranks: list[dict[str, Any]], name: str):
    """Bit for bit the uninterrupted run of two processes: weights and states."""
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}_resumed"]
        for key, p in whole["weights"].items():
            assert torch.equal(p, resumed["weights"][key])
            state, other = whole["states"][key], resumed["states"][key]
            assert state.keys() == other.keys()
            assert all(value.dtype == other[entry].dtype for entry, value in state.items())
            assert all(torch.equal(value, other[entry]) for entry, value in state.items())


def test_moments_are_in_8_bits(ranks: list[dict[str, Any]]):
    assert ranks[0]["eight_bit"]["states"]["layers.2.weight"]["exp_avg"].dtype == torch.uint8


def test_accelerate_is_a_loop_in_ddp(ranks: list[dict[str, Any]]):
    weights = {key: p.detach() for key, p in accelerate_loop()[0].named_parameters()}
    assert difference(ranks[0]["accelerate"]["weights"], weights) < 1e-9


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_on_two_processes_is_trainer_on_one(ranks: list[dict[str, Any]], name: str, tmp_path: Path):
    model, _, log = trainer(str(tmp_path), **TRAINERS[name])
    weights = {key: p.detach() for key, p in model.named_parameters()}
    assert difference(ranks[0][name]["weights"], weights) < 1e-9
    seen, expected = ([row["grad_norm"] for row in own if "grad_norm" in row] for own in (ranks[0][name]["log"], log))
    assert len(seen) == 10 and seen == pytest.approx(expected, rel=1e-9)
    assert min(seen[1:]) > TRAINERS[name]["max_grad_norm"]
    losses = [[row["loss"] for row in own if "loss" in row] for own in (ranks[0][name]["log"], log)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_subzero_exchanges_rho_alone(ranks: list[dict[str, Any]], tmp_path: Path):
    """Two processes are one, clipped by the mean of rho; DDP holds the gradients of one small weight."""
    model, optimizer, log = trainer(str(tmp_path), **SUBZERO)
    weights, rho = {key: p.detach() for key, p in model.named_parameters()}, optimizer.history()[0]
    a, b = (rank["subzero"] for rank in ranks)
    assert all(torch.equal(p, b["weights"][key]) for key, p in a["weights"].items())
    torch.testing.assert_close(a["rho"], rho, rtol=0, atol=2e-3)  # the model computes its loss in float32
    assert difference(a["weights"], weights) < 1e-4
    assert a["rho"].abs().max() == pytest.approx(0.5, rel=1e-3) and 0 < a["gradient_bytes"] <= 32 * 8
    norms = [[row["grad_norm"] for row in own if "grad_norm" in row] for own in (a["log"], b["log"], log)]
    assert norms[0] == norms[1] == pytest.approx(norms[2], abs=2e-3) and max(norms[0]) > 0.5


def test_v_follows_the_first_process_on_all_and_resumes_exactly(ranks: list[dict[str, Any]]):
    runs = [rank[name] for rank in ranks for name in ("following", "following_resumed")]
    for key in ("weights", "basis"):
        assert all(torch.equal(value, run[key][name]) for run in runs for name, value in runs[0][key].items())
    assert len(runs[0]["basis"]) > 7
    for V in runs[0]["basis"].values():
        torch.testing.assert_close(V.T @ V, torch.eye(8, dtype=V.dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["layerwise", "accumulated"])
def test_layerwise_is_refused_and_told_what_takes_its_place(ranks: list[dict[str, Any]], name: str):
    for rank in ranks:
        assert "before gradients are averaged over the processes" in rank["refusals"][name]
        assert "source='activations'" in rank["refusals"][name]
