"""P goes into the checkpoint that a training writes, and into no other of the same number."""

from pathlib import Path

import pytest
from resumed_runs import make_trainer

from hf_osd import ProjectionState, last_complete_checkpoint


def ranks(folder: Path) -> set[int]:
    return {entry.rank for entry in ProjectionState.from_pretrained(folder).values()}


def test_a_trial_of_a_search_has_its_own_folder(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw", optim_args="rank=8").train()
    trial = make_trainer(tmp_path, "osd_adamw", optim_args="rank=4")
    trial._get_output_dir = lambda trial=None: str(tmp_path / "run-0")  # as in `hyperparameter_search`
    trial.train()
    assert ranks(tmp_path / "run-0" / "checkpoint-3") == {4}
    assert ranks(tmp_path / "checkpoint-3") == {8}


def test_a_push_leaves_the_checkpoint_of_another_run_alone(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw", optim_args="rank=8").train()
    trainer = make_trainer(tmp_path, "osd_adamw", optim_args="rank=4", save_strategy="no", max_steps=3)
    trainer.train()
    trainer.callback_handler.call_event("on_push_begin", trainer.args, trainer.state, trainer.control)
    assert ranks(tmp_path / "checkpoint-3") == {8} and ranks(tmp_path) == {4}


def test_a_checkpoint_that_is_written_over_is_not_complete_before_its_end(tmp_path: Path, monkeypatch):
    make_trainer(tmp_path, "osd_adamw").train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-3" / "optimizer_dcp").mkdir()  # of a run with a model that was sharded
    (tmp_path / "checkpoint-3" / "optimizer_dcp" / ".metadata").touch()
    trainer = make_trainer(tmp_path, "osd_adamw")

    def killed(folder: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):  # the weights are those of this run, and the state of the one before
        trainer.train()
    assert not (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-3" / "optimizer_dcp").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "reduce_lr_on_plateau"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("adamw_torch", None), "rank=8"),
        (("osd_adamw", "rank=8"), "rank=8,rank_pattern=q_proj:4"),
        (("osd_adamw", "rank=8,rank_pattern=q_proj:4"), "rank=8"),
    ],
)
def test_a_partial_load_goes_on_with_the_schedule(tmp_path: Path, first: tuple, then: str, schedule: str):
    options = {"lr_scheduler_type": schedule}
    if schedule == "reduce_lr_on_plateau":
        options["eval_strategy"] = "steps"
    whole = make_trainer(tmp_path, first[0], optim_args=first[1], **options)
    whole.train()
    resumed = make_trainer(tmp_path, "osd_adamw", optim_args=f"{then},partial_load=true", **options)
    with pytest.warns(UserWarning, match="differ from the saved state and start anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    logged, expected = (
        [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
        for trainer in (resumed, whole)
    )
    assert logged == expected and len(logged) == 6
    assert len({group["lr"] for group in resumed.optimizer.param_groups}) == 1


def test_a_run_that_ends_before_its_first_step_leaves_the_layers_history(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw").train()
    path = tmp_path / "_osd_statistics.jsonl"
    before = path.read_text()
    trainer = make_trainer(tmp_path, "osd_adamw")
    trainer.callback_handler.train_dataloader = None
    trainer.create_optimizer()
    trainer.callback_handler.optimizer = trainer.optimizer
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert before and path.read_text() == before


def test_optim_args_that_are_no_text(tmp_path: Path):
    with pytest.raises(ValueError, match="`optim_args` must be a text, key=value,key=value, got dict"):
        make_trainer(tmp_path, "osd_adamw", optim_args={"rank": 8})
    make_trainer(tmp_path, "adamw_torch", optim_args={"rank": 8})
