"""The state of two processes, saved sharded and full, goes on with one, two and three, and P is exported."""

import copy
from pathlib import Path

import activations_training
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_models import LR, assert_same_weights, make_model, make_optimizer, shard, train, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_osd import ProjectionState
from hf_osd.optim.step.sharding import local


pytestmark = pytest.mark.distributed

RULES = {
    "adamw": {},
    "adafactor": {"weight_rule": "adafactor"},
    "adamw8bit": {"weight_rule": "adamw8bit", "rank": 64},
    # a seed instead of P, of which the next comes after the resume; the limiter's norm
    "random": {"subspace": "random", "update_interval": 4, "residual": "scaled"},
    # indices instead of P; moments are carried after the resume
    "cosine": {"subspace": "cosine", "update_interval": 4, "residual": "sign", "carry_moments": True},
    "activations": {},
}
SAVED, END = 3, 5
FULL = StateDictOptions(full_state_dict=True)


def make(rule: str, plain: bool = False):
    options = {"weight_decay": 0.0, **RULES[rule]}
    sizes = {"width": 128, "inner": 130} if rule == "adamw8bit" else {}
    model = make_model(torch.float32 if sizes else torch.float64, **sizes)
    if not plain:
        shard(model)
    if rule == "activations":
        return model, activations_training.make(model, **options)
    return model, make_optimizer(model, **options)


def save_and_go_on(rank: int, world: int, folder: Path):
    for rule in RULES:
        model, optimizer = make(rule)
        train(model, optimizer, range(SAVED), rank, world)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / rule)
        full = get_optimizer_state_dict(model, optimizer, options=FULL)
        weights = get_model_state_dict(model, options=FULL)
        if rank == 0:
            torch.save({"model": weights, "optimizer": full}, folder / f"{rule}.bin")
        train(model, optimizer, range(SAVED, END), rank, world)
        end = {name: whole(p.detach()) for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(end, folder / f"{rule}_end.bin")
        weight = model.blocks[0].tall.weight
        torch.save(local(weight.detach()).clone(), folder / f"{rule}_{rank}.bin")


def goes_on(rule: str, model, optimizer, rank: int, world: int, folder: Path):
    train(model, optimizer, range(SAVED, END), rank, world)
    end = torch.load(folder / f"{rule}_end.bin", weights_only=True)
    # of 8-bit moments sums in another order change codes: a fifth of one step. Else rounding.
    tolerance = LR / 5 if rule == "adamw8bit" else 1e-9
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole(p.detach()), end[name], rtol=0, atol=tolerance)
    if world == 2:
        own = torch.load(folder / f"{rule}_{rank}.bin", weights_only=True)
        assert torch.equal(local(model.blocks[0].tall.weight.detach()), own)  # bit for bit


def load_sharded(rank: int, world: int, folder: Path):
    for rule in RULES:
        model, optimizer = make(rule)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / rule)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        goes_on(rule, model, optimizer, rank, world, folder)


def load_full(rank: int, world: int, folder: Path):
    for rule in RULES:
        for plain in (False, True):
            if plain and world > 1:
                continue
            model, optimizer = make(rule, plain)
            state = torch.load(folder / f"{rule}.bin", weights_only=True)
            set_model_state_dict(model, state["model"], options=FULL)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FULL)
            goes_on(rule, model, optimizer, rank, world, folder)


def load_from_first_process(rank: int, world: int, folder: Path):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model, optimizer = make("adamw")
    state = torch.load(folder / "adamw.bin", weights_only=True) if rank == 0 else {"model": {}, "optimizer": {}}
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    goes_on("adamw", model, optimizer, rank, world, folder)


def own_state_dict(rank: int, world: int, folder: Path):
    """`optimizer.state_dict()` on each process, as accelerate saves it without DCP."""
    model, optimizer = make("adamw8bit")
    train(model, optimizer, range(SAVED), rank, world)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(SAVED, END), rank, world)
    resumed, other = make("adamw8bit")
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, range(SAVED, END), rank, world)
    assert_same_weights(resumed, model, 0.0)

    plain, single = make("adamw8bit", plain=True)
    with pytest.raises(ValueError, match="is sharded, the parameter whole"):
        single.load_state_dict(state)
    _, sharded = make("adamw")
    plain = make_model()
    single = make_optimizer(plain, side="right", weight_decay=0.0)
    train(plain, single, range(1))
    with pytest.raises(ValueError, match="set_optimizer_state_dict"):
        sharded.load_state_dict(single.state_dict())


def export(rank: int, world: int, folder: Path):
    model, optimizer = make("adamw")
    train(model, optimizer, range(2), rank, world)
    state = ProjectionState.from_optimizer(optimizer)  # on every process, each of which has some rows of P
    if rank == 0:
        state.save_pretrained(folder / "p")
    with pytest.raises(ValueError, match="include_moments"):
        ProjectionState.from_optimizer(optimizer, include_moments=True)


SCENARIOS = [save_and_go_on, load_sharded, load_full, load_from_first_process, own_state_dict, export]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def saved(folder):
    return processes.run(2, SCENARIOS, folder)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(saved, scenario):
    assert not saved[scenario.__name__], saved[scenario.__name__]


@pytest.mark.parametrize("world", [1, 3, 4])
def test_other_numbers_of_processes(saved, folder, world: int):
    for name, text in processes.run(world, [load_sharded] + [load_full] * (world < 4), folder).items():
        assert not text, f"{name}: {text}"


def test_exported_p_starts_a_run_on_one_process(saved, folder):
    state = ProjectionState.from_pretrained(folder / "p")
    model = make_model()
    optimizer = make_optimizer(model, side="right", init=state.initial_projections())
    train(model, optimizer, range(1))
    entry = state["blocks.0.wide.weight"]
    assert entry.side == "right" and entry.shape == (20, 33) and entry.projection.shape == (33, 6)
