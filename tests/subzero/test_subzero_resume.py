"""`optim="subzero"` in a stock Trainer: resume, runs broken off, a second training, and their logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from subzero_runs import Tokens, logged, make, same
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_osd.subzero import SubZeroLog, replay, subzero_of
from hf_osd.trainer.forward_only import save_log
from hf_osd.trainer.ignored_by_ddp import MARK
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(tmp_path: Path, dtype: torch.dtype):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    whole = make(tmp_path, dtype, **options)
    whole.train()
    resumed = make(tmp_path, dtype, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole, resumed)
    assert logged(whole, "loss") == logged(resumed, "loss")
    for trainer in (whole, resumed):
        again = tiny_llama(attention_dropout=0.1).to(dtype)
        replay(again, SubZeroLog.from_optimizer(trainer.optimizer))
        assert same(whole, again)
    half = tiny_llama(attention_dropout=0.1).to(dtype)
    replay(half, tmp_path / "checkpoint-3")
    saved = type(half).from_pretrained(tmp_path / "checkpoint-3", dtype=dtype)
    assert same(half, saved)


def test_v_that_follows_inputs_resumes_exactly_and_leaves_no_log(tmp_path: Path, caplog):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "max_steps": 8}
    options["optim_args"] = "rank=8,update_interval=6,source=activations"
    whole, resumed, random = (make(tmp_path / str(i), torch.bfloat16, **options) for i in range(3))
    random.args.optim_args = "rank=8,update_interval=6"
    with caplog.at_level("INFO", "hf_osd"):
        whole.train()
    assert "V of 15 matrices follows their inputs, which no log can tell" in caplog.text
    resumed.train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-3"))  # moved after 1 and 2, goes on after 4
    random.train()
    assert same(whole, resumed)
    assert logged(whole, "loss") == logged(resumed, "loss") != logged(random, "loss")
    logs = [sorted(path.parent.name for path in folder.rglob("subzero_log*")) for folder in sorted(tmp_path.iterdir())]
    assert logs == [[], [], ["checkpoint-3", "checkpoint-6", "checkpoint-8"]]


class BrokenOff(Exception):
    """What ends a run between two micro-batches."""


class Break(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise BrokenOff


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
def test_a_run_that_was_broken_off_leaves_no_rho(tmp_path: Path, resume: bool):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["max_grad_norm"] = 0  # clipped, two rho of one sign would be the same
    broken, whole = make(tmp_path / "0", **options), make(tmp_path / "1", **options)
    broken.add_callback(Break(2 if resume else 0))
    with pytest.raises(BrokenOff):
        broken.train()
    broken.pop_callback(Break)
    broken.train(resume_from_checkpoint=resume)
    whole.train()
    assert same(broken, whole)


def test_a_log_is_of_the_weights_that_it_says(tmp_path: Path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"learning_rate": 0.3, "max_grad_norm": 0, "load_best_model_at_end": True}
    trainer = make(tmp_path, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("-3")
    with pytest.raises(ValueError, match=r"use SubZeroLog.from_pretrained\(trainer.state.best_model_checkpoint\)"):
        SubZeroLog.from_optimizer(trainer.optimizer)
    save_log(subzero_of(trainer.optimizer), tmp_path / "checkpoint-3", trainer.args)  # as a push does
    replay(tiny_llama(attention_dropout=0.1), tmp_path / "checkpoint-3")  # which is of its own weights still
    again = tiny_llama(attention_dropout=0.1)
    replay(again, best)
    assert same(trainer, again)
    trainer.args.load_best_model_at_end = False
    with caplog.at_level("WARNING", "hf_osd"):
        trainer.train()  # from the best ones
    assert "SubZero and its log start anew" in caplog.text
    replay(again, SubZeroLog.from_optimizer(trainer.optimizer))
    assert same(trainer, again)


def test_a_resume_without_a_state_is_told(tmp_path: Path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 4}
    make(tmp_path, **options).train()
    resumed = make(tmp_path, **options)
    with caplog.at_level("WARNING", "hf_osd"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "checkpoint-2 has no state of the optimizer: directions, schedule and the log start anew" in caplog.text
    log, again = SubZeroLog.from_optimizer(resumed.optimizer), tiny_llama(attention_dropout=0.1)
    with pytest.raises(ValueError, match="or the checkpoint that it went on from without the optimizer's state"):
        replay(again, log)
    half = type(again).from_pretrained(tmp_path / "checkpoint-2")
    replay(half, log)
    assert same(resumed, half)


def test_a_resume_that_is_refused_leaves_no_mark(tmp_path: Path):
    trainer = make(tmp_path, save_steps=1, save_strategy="steps", max_steps=1)
    trainer.train()
    other = make(tmp_path, optim_args="rank=3")
    with pytest.raises(ValueError, match="saved with rank"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(other.model, args, train_dataset=Tokens()).train()
    assert not hasattr(other.model, MARK)


def test_weights_that_change_between_two_trainings_begin_a_log(tmp_path: Path, caplog):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert "start anew" not in caplog.text and len(SubZeroLog.from_optimizer(trainer.optimizer).rho) == 4
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1e-3)
    trainer.train()
    assert "start anew" in caplog.text and len(SubZeroLog.from_optimizer(trainer.optimizer).rho) == 2
    next(trainer.model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="has been frozen since this optimizer was made"):
        trainer.train()
