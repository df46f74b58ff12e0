"""P beside the model in every checkpoint, through a stock Trainer."""

from pathlib import Path

import torch
from test_resume import SAVED_AT, STEPS, make_trainer
from transformers import Trainer

from hf_osd import OSDTrainingArguments, ProjectionState


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


def test_a_model_only_checkpoint_holds_p_too(tmp_path: Path):
    make_trainer(tmp_path, "osd_lion", save_only_model=True).train()
    assert not (tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt").exists()
    assert ProjectionState.from_pretrained(tmp_path / f"checkpoint-{STEPS}").config["step"] == STEPS


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
