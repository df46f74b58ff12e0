"""Continuing from a checkpoint is bit for bit the uninterrupted run: weights, states and logged losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from resumed_runs import CONFIG, SAVED_AT, STEPS, Tokens, assert_identical, make_trainer, run_twice
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

import hf_osd
from hf_osd.optim import OPTIM_NAMES


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 10.0},  # every evaluation counts as no better
    "warmup_stable_decay": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
    "greedy": {},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", OPTIM_NAMES)
def test_trainer_resumes_exactly(tmp_path: Path, optim: str, dtype: torch.dtype, accumulation: int):
    options = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "cosine"}
    assert_identical(*run_twice(tmp_path, optim, dtype, **options))


@pytest.mark.parametrize("optim", ["osd_adamw", "osd_lion8bit"])
def test_stochastic_rounding_resumes_exactly(tmp_path: Path, optim: str):
    options = {"learning_rate": 1e-5, "optim_args": "rank=48,stochastic_rounding=true"}
    whole, resumed = run_twice(tmp_path, optim, torch.bfloat16, **options)
    assert_identical(whole, resumed)
    plain = make_trainer(tmp_path, optim, torch.bfloat16, learning_rate=1e-5)
    start = [p.detach().clone() for p in plain.model.parameters()]
    plain.train()

    def moved(trainer: Trainer) -> int:
        return sum(int((p != q).sum()) for p, q in zip(trainer.model.parameters(), start, strict=True))

    assert moved(whole) > 2 * moved(plain)  # most weights are too large for steps of 1e-5


def test_stochastic_rounding_needs_a_bfloat16_model(tmp_path: Path):
    options = {"output_dir": str(tmp_path), "optim": "osd_adamw", "report_to": "none", "use_cpu": True}
    args = hf_osd.OSDTrainingArguments(**options, osd_rank=48, osd_stochastic_rounding=True)
    optimizer = Trainer(LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16(), args).create_optimizer()
    assert all(group["stochastic_rounding"] for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="no parameter is bfloat16"):
        Trainer(LlamaForCausalLM(LlamaConfig(**CONFIG)), args).create_optimizer()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_resumes_exactly(tmp_path: Path, schedule: str):
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": SCHEDULES[schedule]}
    if schedule in ("reduce_lr_on_plateau", "greedy"):  # they follow the evaluation
        options |= {"eval_strategy": "steps", "eval_steps": 1}
    assert_identical(*run_twice(tmp_path, "osd_adamw8bit", **options))


@pytest.mark.parametrize(
    "optim_args",
    [
        "subspace=svd,update_interval=2",
        "subspace=static",
        "preset=reference",
        "residual=scaled,carry_moments=true",
        "preset=pretrain,projection_interval=2,residual_scale=0.1",
        "side=two_sided,residual=scaled",
        "subspace=random,update_interval=2,carry_moments=true",
        "subspace=random,distribution=gaussian,update_interval=5,side=two_sided",
        "subspace=cosine,update_interval=2,residual=scaled",
        "subspace=importance,update_interval=2,rank_pattern=q_proj:24",
        "subspace=power,carry_moments=true,projection_interval=2",
    ],
)
def test_other_subspaces_resume_exactly(tmp_path: Path, optim_args: str):
    assert_identical(*run_twice(tmp_path, "osd_adamw", optim_args=f"rank=48,{optim_args}"))
    saved = hf_osd.ProjectionState.from_pretrained(tmp_path / f"checkpoint-{SAVED_AT}")
    assert len(saved) == 7 and saved.config["step"] == SAVED_AT


def test_a_rule_of_the_users_own_resumes_exactly(tmp_path: Path):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from own_subspace_rule import Oja

    def trainer() -> Trainer:
        made = make_trainer(tmp_path, "osd_adamw")
        made.optimizer = hf_osd.create_osd_optimizer(made.model, lr=2e-3, rank=48, subspace=Oja(every=2))
        return made

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED_AT}"))
    assert_identical(whole, resumed)


def test_another_rank_is_refused_by_the_trainer(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw", max_steps=SAVED_AT).train()
    other = make_trainer(tmp_path, "osd_adamw", optim_args="rank=24")
    with pytest.raises(ValueError, match="(?s)saved by another optimizer.*rank 48 left.*rank 24 left"):
        other.train(resume_from_checkpoint=True)
    partial = make_trainer(tmp_path, "osd_adamw", optim_args="rank=24,partial_load=true")
    with pytest.warns(UserWarning, match="7 of 12 parameters differ from the saved state and start anew"):
        partial.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("optim", "optim_args"), [("osd_adamw", "rank=48"), ("subzero", "rank=4")])
def test_a_learning_rate_that_a_resume_does_not_follow_is_said(tmp_path: Path, optim: str, optim_args: str):
    """transformers 5.24: the schedule's saved rates go on, whatever `learning_rate` says."""
    make_trainer(
        tmp_path, optim, optim_args=optim_args, learning_rate=1e-3, weight_decay=0.1, max_steps=SAVED_AT
    ).train()
    other = make_trainer(tmp_path, optim, optim_args=optim_args, learning_rate=1e-5, weight_decay=0.2)
    with pytest.warns(
        UserWarning, match="lr=0.001 .checkpoint. instead of 1e-05; .*weight_decay=0.1 .* instead of 0.2"
    ):
        other.train(resume_from_checkpoint=True)
    assert other.lr_scheduler.base_lrs[0] == 1e-3


CHILD = """
import sys, torch
sys.path[:0] = {path!r}
from pathlib import Path
from resumed_runs import make_trainer
trainer = make_trainer(Path({folder!r}), "osd_lion8bit", torch.bfloat16)
trainer.train(resume_from_checkpoint=True)
torch.save(trainer.model.state_dict(), {out!r})
"""


def test_a_new_process_resumes_exactly(tmp_path: Path):
    whole = make_trainer(tmp_path / "a", "osd_lion8bit", torch.bfloat16)
    whole.train()
    os.rename(tmp_path / "a" / f"checkpoint-{STEPS}", tmp_path / "done")  # so that the newest is the one in the middle
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = CHILD.format(path=path, folder=str(tmp_path / "a"), out=str(tmp_path / "weights.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("optim", OPTIM_NAMES)
def test_accelerate_save_and_load_state(tmp_path: Path, optim: str):
    def prepare():
        set_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
        optimizer = hf_osd.create_osd_optimizer(model, optim, lr=2e-3, rank=48)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    def train(accelerator, model, optimizer, schedule, steps: range) -> None:
        for step in steps:
            batch = {name: value[None] for name, value in Tokens()[step].items()}
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    whole = prepare()
    train(*whole, range(3))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(3, 6))
    resumed = prepare()
    resumed[0].load_state(str(tmp_path))
    train(*resumed, range(3, 6))
    for p, q in zip(whole[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(p, q)
