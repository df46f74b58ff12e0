"""P beside the model in every checkpoint, through a stock Trainer."""

import os
from pathlib import Path

import pytest
import torch
from resumed_runs import SAVED_AT, STEPS, make_trainer
from transformers import Trainer, TrainerCallback

from hf_osd import OSD, OSDTrainingArguments, ProjectionState


def projections(trainer) -> dict[str, torch.Tensor]:
    group = trainer.optimizer.param_groups[0]
    state = trainer.optimizer.state
    return {n: state[p]["projection"] for n, p in zip(group["param_names"], group["params"], strict=True)}


def test_every_checkpoint_holds_the_p_of_its_step(tmp_path: Path):
    trainer = make_trainer(tmp_path, "osd_adamw8bit")
    trainer.train()
    for step in (SAVED_AT, STEPS):
        state = ProjectionState.from_pretrained(tmp_path / f"checkpoint-{step}")
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        names = saved["param_groups"][0]["param_names"]
        assert state.config["step"] == step and set(state) == set(names)
        for key, name in enumerate(names):
            assert torch.equal(state[name].projection, saved["state"][key]["projection"])


def test_a_second_training_replaces_the_p_of_the_first(tmp_path: Path):
    trainer = make_trainer(tmp_path, "osd_adamw", max_steps=SAVED_AT)
    trainer.train()
    first = ProjectionState.from_pretrained(tmp_path / f"checkpoint-{SAVED_AT}")
    trainer.train()  # Trainer goes on with the same optimizer and counts from 1
    second = ProjectionState.from_pretrained(tmp_path / f"checkpoint-{SAVED_AT}")
    now = projections(trainer)
    assert all(torch.equal(second[name].projection, now[name]) for name in now)
    assert any(not torch.equal(first[name].projection, second[name].projection) for name in now)


def test_a_model_only_checkpoint_holds_p_too(tmp_path: Path, caplog):
    make_trainer(tmp_path, "osd_lion", save_only_model=True).train()
    assert not (tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt").exists()
    assert ProjectionState.from_pretrained(tmp_path / f"checkpoint-{STEPS}").config["step"] == STEPS
    assert "start anew" not in caplog.text
    make_trainer(tmp_path, "osd_lion").train(resume_from_checkpoint=True)
    assert f"checkpoint-{STEPS} has no state of the optimizer: P, moments and the schedule start anew" in caplog.text


def test_another_optimizer_saves_none(tmp_path: Path):
    make_trainer(tmp_path, "adamw_torch", optim_args=None).train()
    assert not list(tmp_path.rglob("osd_*"))


def test_a_path_that_no_optim_args_can_hold_is_given_as_a_field(tmp_path: Path):
    folder = tmp_path / "a=1,b" / f"checkpoint-{STEPS}"
    trainer = make_trainer(folder.parent, "osd_adamw")
    trainer.train()
    args = OSDTrainingArguments(str(tmp_path / "c"), optim="osd_adamw", osd_init=str(folder), use_cpu=True)
    assert Trainer(trainer.model, args).create_optimizer().param_groups[0]["rank"] == 48


def test_a_saved_p_starts_another_run(tmp_path: Path):
    trainer = make_trainer(tmp_path / "a", "osd_adamw")
    trainer.train()
    folder = tmp_path / "a" / f"checkpoint-{STEPS}"
    other = make_trainer(tmp_path / "b", "osd_lion", optim_args=f"init={folder},subspace=static", max_steps=1)
    other.train()
    shared, start = ProjectionState.from_pretrained(folder), projections(other)
    assert other.optimizer.param_groups[0]["rank"] == 48  # the shared P's, where none is asked for
    assert all(torch.equal(shared[name].projection, start[name]) for name in start)


def no_space(source, target) -> None:
    raise OSError(28, "No space left on device")


def spoil(state) -> None:
    for entries in state.values():
        entries.get("projection", torch.zeros(())).fill_(torch.nan)


class EveryStep(TrainerCallback):
    """Calls something before each step."""

    def __init__(self, call) -> None:
        self.call = call

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.call()


@pytest.mark.parametrize(("name", "fault"), [(None, "have no names"), ("a\n{}", "control characters")])
def test_names_that_no_file_can_hold_are_told_before_the_first_step(tmp_path: Path, caplog, name, fault):
    trainer = make_trainer(tmp_path, "adamw_torch", optim_args=None)
    matrices = [p for p in trainer.model.parameters() if p.ndim == 2]
    params = matrices if name is None else [(name.format(i), p) for i, p in enumerate(matrices)]
    trainer.optimizer = OSD([{"params": params, "rank": 8}], lr=1e-3)
    told: list[list[str]] = []
    trainer.add_callback(EveryStep(lambda: told.append(list(caplog.messages))))
    trainer.train()
    assert any(message.startswith("P is not saved") and fault in message for message in told[0])
    assert (tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt").exists() and not list(tmp_path.rglob("osd_*"))


@pytest.mark.parametrize("fault", ["No space left", "not finite"])
def test_a_p_that_cannot_be_saved_costs_no_run(tmp_path: Path, caplog, monkeypatch, fault):
    trainer = make_trainer(tmp_path, "osd_sgd", max_steps=SAVED_AT)
    if fault == "not finite":
        trainer.add_callback(EveryStep(lambda: spoil(trainer.optimizer.state)))
    else:
        monkeypatch.setattr(os, "replace", no_space)
    trainer.train()
    assert any(message.startswith("P is not saved") and fault in message for message in caplog.messages)
    folder = tmp_path / f"checkpoint-{SAVED_AT}"
    assert (folder / "trainer_state.json").exists() and not list(folder.glob("*osd_*"))


def test_a_checkpoint_that_another_optimizer_writes_over_has_no_p(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw").train()
    assert (tmp_path / f"checkpoint-{STEPS}" / "osd_config.json").is_file()
    make_trainer(tmp_path, "adamw_torch", optim_args=None).train()
    names = {path.name for path in (tmp_path / f"checkpoint-{STEPS}").iterdir()}
    assert "model.safetensors" in names and not [name for name in names if name.startswith("osd_")]
