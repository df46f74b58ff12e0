"""Training arguments of RSO: what is given reaches the optimizer, and every mistake is answered before training."""

from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_osd import OSDTrainingArguments
from hf_osd.rso import create_rso_model, outer_loop
from reference.tiny_models import tiny_llama


def make(tmp_path, cls: type = OSDTrainingArguments, **given: Any) -> TrainingArguments:
    return cls(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "optim": "rso_adamw", **given})


@pytest.mark.parametrize(
    "cls, given",
    [
        (TrainingArguments, {"optim_args": "rank=6,scale=0.5,interval=7,eta=3,sampling=orthonormal,seed=9"}),
        (OSDTrainingArguments, {"osd_rank": 6, "osd_scale": 0.5, "osd_seed": 9, "rso_interval": 7, "rso_eta": 3.0}),
    ],
)
def test_what_is_given_reaches_the_optimizer(tmp_path, cls: type, given: dict):
    if cls is OSDTrainingArguments:
        given = given | {"rso_sampling": "orthonormal"}
    adam = {"learning_rate": 0.25, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-5}
    args = make(tmp_path, cls, **given, **adam, optim_target_modules=["q_proj", "down_proj"])
    trainer = Trainer(tiny_llama(), args)
    optimizer, loop = trainer.create_optimizer(), outer_loop(trainer.model)
    options = loop.options
    assert (options.rank, options.interval, options.eta, options.sampling) == (6, 7, 3.0, "orthonormal")
    assert options.seed == 9 and len(loop.layers) == 4
    factors, matrices, vectors = optimizer.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert all(group["betas"] == (0.8, 0.7) and group["eps"] == 1e-5 for group in optimizer.param_groups)
    assert {p.ndim for p in vectors["params"]} == {1} and len(factors["params"]) == 4
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        p.requires_grad for p in trainer.model.parameters()
    )


def test_defaults_and_command_line(tmp_path):
    parser = HfArgumentParser(OSDTrainingArguments)
    flags = ["--output_dir", str(tmp_path), "--optim", "rso_adamw8bit", "--osd_rank", "8", "--rso_interval", "50"]
    (args,) = parser.parse_args_into_dataclasses([*flags, "--seed", "5", "--use_cpu", "true"])
    trainer = Trainer(tiny_llama(), args)
    trainer.create_optimizer()
    options = outer_loop(trainer.model).options
    assert (options.interval, options.eta, options.sampling, options.seed) == (50, None, "gaussian", 5)


MISTAKES = [
    ({"optim_args": "rnak=8"}, "Unknown option `rnak` in `optim_args`. Did you mean `rank`"),
    ({"optim_args": "alpha=5"}, "Unknown option `alpha`"),
    ({"optim_args": "interval=2.5"}, "'interval' in `optim_args` must be an integer"),
    ({"optim_args": "eta=-1"}, "`eta` of RSO must be a number above 0"),
    ({"optim_args": "lr=1"}, "Set `learning_rate`"),
    ({"optim_args": "rank=8", "osd_rank": 8}, "'rank' is given twice"),
    ({"optim_args": "eta=8", "rso_eta": 8.0}, "'eta' is given twice: in `optim_args` and as `rso_eta`"),
    ({"osd_scale": 0.0}, "`scale` of RSO"),
    ({"osd_alpha": 5.0}, "osd_alpha have no effect with optim='rso_adamw'"),
    ({"osd_lambda": 1.0, "osd_side": "left"}, "osd_lambda, osd_side have no effect"),
    ({"rso_sampling": "haar"}, "`sampling` of RSO must be one of"),
    ({"rso_interval": 0}, "`interval` of RSO must be an integer >= 1"),
    ({"optim_target_modules": "all-linear,q_proj"}, "'all-linear' stands alone"),
    ({"fsdp": "full_shard"}, "cannot be used with FSDP"),
    ({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, "cannot be used with FSDP2"),
    ({"optim": "osd_adamw", "rso_interval": 3}, "rso_interval need optim='rso_adamw' or 'rso_adamw8bit'"),
    ({"optim": "adamw_torch", "rso_eta": 3.0}, "rso_eta need optim="),
    ({"optim": "adamw_torch", "optim_args": "interval=3"}, "ignores optim_args"),
    ({"optim": "osd_adamw", "optim_args": "interval=3"}, "Unknown option `interval`"),
]


@pytest.mark.parametrize("given, message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_answered(tmp_path, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given)


def test_a_stock_trainer_checks_at_its_construction(tmp_path):
    with pytest.raises(ValueError, match="Unknown option `alpha`"):
        Trainer(tiny_llama(), make(tmp_path, TrainingArguments, optim_args="alpha=5"))


def test_a_model_is_prepared_once(tmp_path):
    trainer = Trainer(create_rso_model(tiny_llama(), 8), make(tmp_path, osd_rank=4))
    with pytest.raises(ValueError, match="already prepared for RSO"):
        trainer.create_optimizer()


def test_arguments_pickle_as_plain_strings(tmp_path):
    args = make(tmp_path, TrainingArguments, optim_args="rank=4")
    torch.save(args, tmp_path / "args.bin")
    assert b"rso_adamw" in (tmp_path / "args.bin").read_bytes()
    assert torch.load(tmp_path / "args.bin", weights_only=False).optim == "rso_adamw"
