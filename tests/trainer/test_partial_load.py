"""Resuming with `partial_load` under other multiples of the learning rate: the schedule goes on with those of now."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from resumed_runs import SAVED_AT, STEPS, make_trainer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LambdaLR, LRScheduler, SequentialLR
from transformers import TrainerCallback

from hf_osd import create_osd_optimizer
from reference.tiny_models import tiny_llama


MULTIPLES = {
    "another ratio": "embedding_lr_ratio=4",
    "as many groups of other parameters": "embedding_lr_ratio=1",
    "more groups": r"lr_pattern=.*mlp\..*:0.5;lm_head:2",
}


class Rates(TrainerCallback):
    """Learning rates by parameter at every step."""

    def __init__(self):
        self.seen: dict[int, dict[str, float]] = {}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.seen[state.global_step] = rates_of(optimizer)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    named = ((name, group) for group in optimizer.param_groups for name in group["param_names"])
    return {name: pytest.approx(float(group["lr"])) for name, group in named}


@pytest.mark.parametrize("case", MULTIPLES)
def test_trainers_schedule_goes_on_with_other_multiples(tmp_path: Path, case: str):
    options = f"rank=48,preset=pretrain,{MULTIPLES[case]},partial_load=true"
    whole, resumed = Rates(), Rates()
    fresh = make_trainer(tmp_path / "fresh", "osd_adamw", optim_args=options)
    fresh.add_callback(whole)
    fresh.train()
    make_trainer(tmp_path / "before", "osd_adamw", optim_args="rank=48,preset=pretrain").train()
    later = make_trainer(tmp_path / "later", "osd_adamw", optim_args=options)
    later.add_callback(resumed)
    with pytest.warns(UserWarning, match="other learning rates than the saved ones"):
        later.train(resume_from_checkpoint=str(tmp_path / "before" / f"checkpoint-{SAVED_AT}"))
    assert resumed.seen == {step: whole.seen[step] for step in range(SAVED_AT, STEPS)}


def halving(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.5**step)


SCHEDULES = {
    "lambda": halving,
    "sequential": lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer, 0.5), halving(optimizer)], [3]),
    "chained": lambda optimizer: ChainedScheduler([ConstantLR(optimizer, 0.5), halving(optimizer)], optimizer),
}


@pytest.mark.parametrize(
    "now", ["lm_head:4", "lm_head:4;embed_tokens:2;q_proj:3"], ids=["as many groups", "more groups"]
)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_that_a_user_passes(tmp_path: Path, kind: str, now: str):
    """States of some hold those of others."""

    def trained(folder: str, lr_pattern: str, checkpoint: str | None = None) -> dict[int, dict[str, float]]:
        trainer, rates = make_trainer(tmp_path / folder, "adamw_torch", optim_args=None), Rates()
        optimizer = create_osd_optimizer(trainer.model, rank=48, lr_pattern=lr_pattern, partial_load=True)
        trainer.optimizer, trainer.lr_scheduler = optimizer, SCHEDULES[kind](optimizer)
        trainer.add_callback(rates)
        trainer.train(resume_from_checkpoint=checkpoint)
        return rates.seen

    whole = trained("fresh", now)
    trained("before", "embed_tokens:16")
    with pytest.warns(UserWarning, match="other learning rates than the saved ones"):
        resumed = trained("later", now, str(tmp_path / "before" / f"checkpoint-{SAVED_AT}"))
    assert resumed == {step: whole[step] for step in range(SAVED_AT, STEPS)}


@pytest.mark.parametrize("ratio", [1, 4, 16])
def test_a_loop_is_told_what_its_schedule_brings_back(ratio: int):
    def made(ratio: float, **options):
        optimizer = create_osd_optimizer(tiny_llama(), lr=1e-3, rank=4, embedding_lr_ratio=ratio, **options)
        return optimizer, halving(optimizer)

    first, schedule = made(16)
    schedule.step()
    second, own = made(ratio, partial_load=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.load_state_dict(first.state_dict())
    own.load_state_dict(copy.deepcopy(schedule.state_dict()))
    told = [str(warning.message) for warning in caught]
    assert [("schedule.base_lrs =" in text) for text in told] == ([True] if ratio != 16 else [])
    own.base_lrs = [group["initial_lr"] for group in second.param_groups]  # as the warning says
    own.step()
    third, expected = made(ratio)
    expected.step()
    expected.step()
    assert rates_of(second) == rates_of(third)
