"""Two processes (gloo) train as one on the same global batches: Trainer, accelerate and loops of one's own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_training
import pytest
import torch
from ddp_training import OWN_LOOPS, RESUMED, STACKS, TRAINERS, accelerate_loop, own_loop, stack_loop, state_of, trainer


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


def uncompressed(given: dict[str, Any]) -> dict[str, Any]:
    """The same on one process in ordinary mode; layerwise where that decides how gradients are clipped."""
    modes = {"ddp_compression", "layerwise", "gradient_accumulation"}
    modes -= {"layerwise"} if "layerwise_clipping" in given else set()
    own = {k: v for k, v in given.items() if k not in modes}
    if "text" in own:
        own["text"] = own["text"].replace(",ddp_compression=subspace", "")
    if "optim" in own:
        own["optim"] = own["optim"].removesuffix("_layerwise")
    return own


@pytest.mark.parametrize("name", [*OWN_LOOPS, *TRAINERS, "accelerate", "accelerate_compressed", *STACKS])
def test_all_processes_hold_the_same(ranks: list[dict[str, Any]], name: str):
    """Weights, P and its states, bit for bit: also a P started at random, and after weights that differed."""
    a, b = (rank[name] for rank in ranks)
    assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    for key, state in a["states"].items():
        assert state.keys() == b["states"][key].keys() and state
        assert all(torch.equal(value, b["states"][key][entry]) for entry, value in state.items()), key
    projected = [state for state in a["states"].values() if any(entry.startswith("projection") for entry in state)]
    assert len(projected) >= (1 if name in STACKS else 2)


@pytest.mark.parametrize("name", OWN_LOOPS)
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], name: str):
    control = state_of(*own_loop(**uncompressed(OWN_LOOPS[name])))
    start = {key: p.detach() for key, p in ddp_training.Net(OWN_LOOPS[name].get("inner", 40)).named_parameters()}
    moved = difference(control["weights"], start)
    apart = difference(ranks[0][name]["weights"], control["weights"])
    assert moved > 0.05
    if "online_pca" in name:
        # P's steps go by the stand-in for ||G||, so P takes a slightly other way; the weights are trained as well
        assert 1e-9 < apart < 0.05 * moved
    elif "clipped" in name:
        # by norms that are estimated; without clipping the way would be several times as long
        assert 1e-9 < apart < 0.05 * moved
    else:
        # float64: rounding of 1e-16 in the gradients, which Adam's first steps divide by themselves
        assert apart < 1e-9


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(ranks: list[dict[str, Any]], name: str):
    """Bit for bit the uninterrupted run of two processes: weights, states, and the norm that is reported."""
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}_resumed"]
        assert torch.equal(whole["grad_norm"], resumed["grad_norm"])
        for key, p in whole["weights"].items():
            assert torch.equal(p, resumed["weights"][key])
            state, other = whole["states"][key], resumed["states"][key]
            assert state.keys() == other.keys()
            assert all(value.dtype == other[entry].dtype for entry, value in state.items())
            assert all(torch.equal(value, other[entry]) for entry, value in state.items())


@pytest.mark.parametrize("name", ["eight_bit", "layerwise_eight_bit"])
def test_moments_are_in_8_bits(ranks: list[dict[str, Any]], name: str):
    assert ranks[0][name]["states"]["layers.2.weight"]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_experts(ranks: list[dict[str, Any]], name: str):
    control = state_of(*stack_loop(**{**STACKS[name], "ddp_compression": None}))
    # whole until every expert has had tokens, then in the subspace; Adam divides rounding errors by themselves. P that
    # learns goes by the stand-in for ||G||; P from the first micro-batch is another one where that is averaged.
    if name in ("stack", "stack_random"):
        assert difference(ranks[0][name]["weights"], control["weights"]) < 1e-9
    expected, found = (result["states"]["W"] for result in (control, ranks[0][name]))
    assert all(torch.equal(expected[entry], found[entry]) for entry in ("step", "idle_steps", "skipped_steps"))
    assert expected["idle_steps"].sum() == 12
    if "projection_step" in expected:
        assert torch.equal(expected["projection_step"], found["projection_step"])


def test_accelerate_is_a_loop_in_ddp(ranks: list[dict[str, Any]]):
    for name, own in (("accelerate", {}), ("accelerate_compressed", {"ddp_compression": "subspace"})):
        alone, _ = accelerate_loop()
        weights = {key: p.detach() for key, p in alone.named_parameters()}
        assert difference(ranks[0][name]["weights"], weights) < (0.02 if own else 1e-9)  # steps of 1e-2, 20 of them


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_on_two_processes_is_trainer_on_one(ranks: list[dict[str, Any]], name: str, tmp_path: Path):
    model, _, log = trainer(str(tmp_path), **uncompressed(TRAINERS[name]))
    weights = {key: p.detach() for key, p in model.named_parameters()}
    # clipped by a norm that is estimated; else as above
    assert difference(ranks[0][name]["weights"], weights) < (1e-4 if name == "trainer_clipped" else 1e-9)
    seen, expected = ([row["grad_norm"] for row in own if "grad_norm" in row] for own in (ranks[0][name]["log"], log))
    assert len(seen) == 10 and seen == pytest.approx(expected, rel=0.02)
    if name == "trainer_plain":
        assert seen == pytest.approx(expected, rel=1e-9)
    losses = [[row["loss"] for row in own if "loss" in row] for own in (ranks[0][name]["log"], log)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_bytes_on_the_wire_are_the_predicted_ones(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert rank["bytes"]["second_step"] == rank["bytes"]["predicted"]
        # 24 x 24 and 40 x 24 at rank 6, 8 bytes a number and two norms each
        assert rank["bytes"]["predicted"] == 8 * (6 * (24 + 24) + 6 * (40 + 24) + 2 * 2)
        assert rank["bytes"]["whole"] == 8 * (24 * 24 + 40 * 24)


def test_what_cannot_work_is_refused(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert "before gradients are averaged over the processes" in rank["refusals"]["layerwise"]
        assert "ddp_compression='subspace'" in rank["refusals"]["layerwise"]
        assert "create the optimizer from the bare model" in rank["refusals"]["wrapped"]


def test_on_one_process_nothing_is_exchanged():
    plain, compressed = (own_loop(steps=3, **given)[0] for given in ({}, {"ddp_compression": "subspace"}))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), compressed.parameters(), strict=True))


def test_another_optimizer_gives_the_gradients_back_to_ddp():
    net = ddp_training.Net()
    net._ddp_params_and_buffers_to_ignore = ["scale"]
    for _ in range(2):
        ddp_training.create_osd_optimizer(net, rank=6, ddp_compression="subspace")
        tied = {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
        assert set(net._ddp_params_and_buffers_to_ignore) == {"scale"} | tied
        assert len(net._forward_pre_hooks) == 1
    ddp_training.create_osd_optimizer(net, rank=6)
    assert net._ddp_params_and_buffers_to_ignore == ["scale"] and not net._forward_pre_hooks


def test_another_clipping_in_the_loop_sees_what_all_processes_share():
    """`clip_grad_norm_` before a step must find no gradient that differs between processes."""
    net = ddp_training.Net()
    optimizer = ddp_training.create_osd_optimizer(net, rank=6, ddp_compression="subspace")
    net(ddp_training.batch(0)[0]).square().mean().backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"layers.0.weight", "layers.2.weight"}
    optimizer.zero_grad()
