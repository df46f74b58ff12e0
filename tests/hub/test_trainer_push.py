"""What a Trainer pushes: P beside the model it belongs to, of the same step."""

import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from pushed_runs import (
    CARD_FILES,
    CHECKPOINT_FILES,
    REPO,
    ROOT_FILES,
    Record,
    WaitForPushes,
    check_set,
    folder_of,
    make_trainer,
    on_disk,
)
from transformers import Trainer, TrainerCallback

from hf_osd import OSDTrainer, OSDTrainingArguments
from hf_osd.hub import ProjectionState


STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_pushes_p_with_its_model(strategy, hub, client, tmp_path):
    record = Record()
    folder, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    trainer = make_trainer(folder, push_to_hub=True, hub_strategy=strategy, callbacks=[record])
    trainer.train()
    for step in (2, 4):
        assert check_set(on_disk(folder / f"checkpoint-{step}"), record, scratch, CHECKPOINT_FILES) == step

    pushed = [commit for commit in reversed(hub.commits(REPO)) if commit.title != "initial commit"]
    titles = [commit.title for commit in pushed]
    saves = [f"Training in progress, step {step}" for step in (2, 4)]
    with_checkpoints = [title for save in saves for title in (save, f"{save}, checkpoint")]
    assert titles == {"end": [], "every_save": saves}.get(strategy, with_checkpoints)
    for commit in pushed:
        step = int(re.search(r"step (\d+)", commit.title)[1])
        files = hub.files(REPO, commit.oid)
        assert check_set(folder_of(files), record, scratch, ROOT_FILES) == step
        if commit.title.endswith("checkpoint"):
            name = "last-checkpoint" if strategy == "checkpoint" else f"checkpoint-{step}"
            assert check_set(folder_of(files, name), record, scratch, CHECKPOINT_FILES) == step

    trainer.push_to_hub()
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, scratch, ROOT_FILES) == 4
    assert hub.commits(REPO)[0].title == "End of training"
    folders = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert {path.rpartition("/")[0] for path in files} == {""} | folders.get(strategy, set())
    assert any(request.startswith("PUT /lfs") for request in hub.requests)


def test_osd_trainer_with_typed_arguments(hub, client, tmp_path):
    record = Record()
    trainer = make_trainer(
        *(tmp_path / "out", OSDTrainer, OSDTrainingArguments, [record]),
        osd_rank=4,
        optim="osd_lion",
        push_to_hub=True,
        hub_strategy="all_checkpoints",
    )
    trainer.train()
    trainer.save_model()  # which pushes
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    for step in (2, 4):
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, CHECKPOINT_FILES) == step
    assert json.loads(files["osd_config.json"])["optim"] == "osd_lion"


@pytest.mark.parametrize("always", [False, True])
def test_saves_while_a_push_is_under_way(always, hub, client, tmp_path, monkeypatch):
    """No upload gets anywhere until training has ended."""
    ended, create_commit = threading.Event(), client.create_commit

    def wait_and_commit(*args, **options):
        assert ended.wait(60)
        return create_commit(*args, **options)

    class End(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            ended.set()

    monkeypatch.setattr(client, "create_commit", wait_and_commit)
    monkeypatch.setattr(WaitForPushes, "on_step_begin", TrainerCallback.on_step_begin)
    record, options = Record(), {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_steps": 1}
    trainer = make_trainer(tmp_path / "out", callbacks=[record, End()], hub_always_push=always, **options)
    trainer.train()
    files = hub.files(REPO)
    steps = (1, 2, 3, 4) if always else (1,)
    assert {path.rpartition("/")[0] for path in files} == {"", *(f"checkpoint-{step}" for step in steps)}
    for step in steps:
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, CHECKPOINT_FILES) == step
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == steps[-1]
    trainer.push_to_hub()
    assert check_set(folder_of(hub.files(REPO)), record, tmp_path, ROOT_FILES) == 4


def test_an_upload_during_a_save_takes_no_unfinished_file(hub, client, tmp_path, monkeypatch):
    """With `hub_always_push` an earlier push may list the folder at any moment of a later save."""
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, save_strategy="no")
    trainer.train()
    seen: list[set[str]] = []
    original = os.replace

    def upload_and_replace(source, target):
        folder = Path(target).parent
        if folder == tmp_path / "out":
            seen.append({path.name for path in folder.iterdir()})
            client.upload_folder(repo_id=REPO, folder_path=folder, ignore_patterns=["_*", "checkpoint-*"])
        original(source, target)

    monkeypatch.setattr("hf_osd.hub.files.os.replace", upload_and_replace)
    trainer.push_to_hub()
    assert seen and all(names - ROOT_FILES for names in seen)
    for commit in hub.commits(REPO):
        assert set(hub.files(REPO, commit.oid)) <= ROOT_FILES | CARD_FILES


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_are_removed_whole(limit, hub, client, tmp_path):
    record = Record()
    options = {"save_total_limit": limit, "save_steps": 1, "push_to_hub": True, "hub_strategy": "checkpoint"}
    make_trainer(tmp_path / "out", callbacks=[record], **options).train()
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [int(path.name.split("-")[1]) for path in kept] == list(range(5 - limit, 5))
    for path in kept:
        check_set(on_disk(path), record, tmp_path, CHECKPOINT_FILES)
    files = hub.files(REPO)
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    assert check_set(folder_of(files, "last-checkpoint"), record, tmp_path, CHECKPOINT_FILES) == 4


def test_checkpoints_with_the_model_only(hub, client, tmp_path):
    record = Record()
    options = {"save_only_model": True, "push_to_hub": True, "hub_strategy": "all_checkpoints"}
    make_trainer(tmp_path / "out", callbacks=[record], **options).train()
    files = hub.files(REPO)
    for step in (2, 4):
        names = ROOT_FILES | {"trainer_state.json"}
        assert check_set(on_disk(tmp_path / "out" / f"checkpoint-{step}"), record, tmp_path, names) == step
        assert check_set(folder_of(files, f"checkpoint-{step}"), record, tmp_path, names) == step


def test_a_push_without_checkpoints_into_a_private_repository(hub, client, tmp_path):
    record = Record()
    options = {"save_strategy": "no", "hub_private_repo": True}
    trainer = make_trainer(tmp_path / "out", callbacks=[record], **options)
    trainer.train()
    assert hub.repos == {}
    trainer.push_to_hub()
    assert hub.repos[REPO].private
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 4


def test_saves_by_epoch(hub, client, tmp_path):
    record = Record()
    options = {"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 16}
    make_trainer(tmp_path / "out", callbacks=[record], push_to_hub=True, **options).train()
    epochs = [commit for commit in hub.commits(REPO) if "epoch" in commit.title]
    assert [commit.title[-1] for commit in epochs] == ["2", "1"]
    steps = [check_set(hub.files(REPO, commit.oid), record, tmp_path, ROOT_FILES) for commit in epochs]
    assert steps == [4, 2]


def test_the_best_model_is_pushed_with_its_own_p(hub, client, tmp_path):
    class Worsens(Trainer):
        """Every evaluation is worse than the one before."""

        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    record = Record()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path / "out", Worsens, callbacks=[record], push_to_hub=True, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.push_to_hub()
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 2


def test_training_again_replaces_p(hub, client, tmp_path):
    """The second run of a Trainer reaches the same steps, in the same folders, with other P."""
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.push_to_hub()
    record = Record()
    trainer.add_callback(record)
    trainer.train()
    trainer.push_to_hub()
    for step in (2, 4):
        saved = ProjectionState.from_pretrained(tmp_path / "out" / f"checkpoint-{step}").initial_projections()
        assert all(torch.equal(saved[name], P) for name, P in record.projections[step].items())
    (tmp_path / "osd_config.json").write_bytes(hub.files(REPO)["osd_config.json"])
    (tmp_path / "osd_projection.safetensors").write_bytes(hub.files(REPO)["osd_projection.safetensors"])
    saved = ProjectionState.from_pretrained(tmp_path).initial_projections()
    assert all(torch.equal(saved[name], P) for name, P in record.projections[4].items())


def test_other_optimizers_push_none(hub, client, tmp_path):
    options = {"optim": "adamw_torch", "optim_args": None, "push_to_hub": True, "hub_strategy": "all_checkpoints"}
    trainer = make_trainer(tmp_path / "out", **options)
    trainer.train()
    trainer.push_to_hub()
    assert {"model.safetensors", "checkpoint-4/model.safetensors"} <= set(hub.files(REPO))
    assert not any("osd_" in path for path in hub.files(REPO)) and not list(tmp_path.rglob("osd_*"))
