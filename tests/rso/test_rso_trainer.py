"""RSO in a stock Trainer: what is given reaches it, it learns, resumes bit for bit, and leaves plain checkpoints."""

from pathlib import Path

import pytest
import torch
from rso_runs import Tokens, losses, make_trainer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_osd import OSD, OSDTrainingArguments, create_osd_optimizer
from reference.tiny_models import tiny_llama


def assert_identical(a: Trainer, b: Trainer) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    left, right = (trainer.optimizer.optimizer.state_dict()["state"] for trainer in (a, b))
    assert left.keys() == right.keys()
    for key, entries in left.items():
        assert entries.keys() == right[key].keys()
        assert all(torch.equal(value, right[key][name]) for name, value in entries.items())
    assert losses(b) == losses(a)


@pytest.mark.parametrize(
    "optim, dtype, saved_at",  # in the first interval, at its end, in the second
    [("rso_adamw", torch.float32, step) for step in (2, 4, 6)]
    + [("rso_adamw", torch.bfloat16, 6), ("rso_adamw8bit", torch.float32, 4), ("rso_adamw8bit", torch.bfloat16, 6)],
)
def test_resumes_exactly(tmp_path: Path, optim: str, dtype: torch.dtype, saved_at: int):
    # 128 x 40: large enough to be kept in 8 bits
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "attention_dropout": 0.1}
    options = {"optim_args": "rank=40,update_interval=4", "gradient_accumulation_steps": 2, "max_steps": 7}
    whole = make_trainer(tmp_path, optim, model=tiny_llama(**config).to(dtype), **options)
    whole.train()
    resumed = make_trainer(tmp_path, optim, model=tiny_llama(**config).to(dtype), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert_identical(whole, resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))  # into a model that was trained on
    assert_identical(whole, resumed)


@pytest.mark.parametrize("optim", ["rso_adamw", "rso_adamw8bit"])
def test_learns_and_saves_plain_models(tmp_path: Path, optim: str):
    options = {"optim_args": "rank=8,update_interval=10,seed=1", "max_steps": 40, "save_steps": 15}
    trainer = make_trainer(tmp_path, optim, learning_rate=2e-2, per_device_train_batch_size=8, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 4 and trainer.evaluate()["eval_loss"] < 2
    trainer.save_model()
    assert trainer.model.state_dict().keys() == tiny_llama().state_dict().keys()
    saved, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = Tokens()[0]["input_ids"][None]
    assert torch.equal(saved.eval()(ids).logits, trainer.model.eval()(ids).logits)
    state = torch.load(tmp_path / "checkpoint-15" / "optimizer.pt", weights_only=True)["state"]
    kept = {name for entries in state.values() for name in entries if "absmax" not in name}
    assert kept == {"step", "skipped_steps", "moment_step", "exp_avg", "exp_avg_sq", "projection_seed"}


def test_what_is_given_reaches_the_optimizer(tmp_path: Path):
    given = {"osd_rank": 6, "osd_update_interval": 7, "osd_distribution": "orthonormal", "osd_scale": 0.5, "seed": 9}
    args = OSDTrainingArguments(str(tmp_path), optim="rso_adamw", use_cpu=True, report_to="none", **given)
    optimizer = Trainer(tiny_llama(), args).create_optimizer()
    assert type(optimizer) is OSD
    group = optimizer.param_groups[0]
    asked = {"rank": 6, "update_interval": 7, "distribution": "orthonormal", "scale": 0.5, "seed": 9}
    fixed = {"source": "activations", "subspace": "random", "unbiased": True, "restart_moments": True}
    assert {name: group[name] for name in asked | fixed} == asked | fixed
    assert create_osd_optimizer(tiny_llama(), "rso_adamw8bit").param_groups[0]["distribution"] == "gaussian"


MISTAKES = [
    ({"osd_subspace": "svd"}, "subspace='svd' of the training arguments contradicts optim='rso_adamw'"),
    ({"optim_args": "source=gradients"}, "source='gradients' .* leave it out, or choose optim='osd_adamw'"),
    ({"optim_args": "unbiased=false"}, "unbiased=False .* contradicts"),
    ({"osd_restart_moments": False}, "restart_moments=False .* contradicts"),
    ({"osd_alpha": 3.0}, "`alpha` of the training arguments has no effect with subspace='random'"),
    ({"osd_preset": "reference"}, "is for the `osd_` names"),
    ({"optim_args": "interval=3"}, "Unknown option `interval`.*Did you mean `update_interval`"),
    ({"optim_args": "eta=3"}, "Unknown option `eta`"),
    ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, "cannot be used with FSDP1"),
    ({"optim": "rso_lion"}, "not a valid OptimizerNames"),
]


@pytest.mark.parametrize("given, message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_answered(tmp_path: Path, given: dict, message: str):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        OSDTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "optim": "rso_adamw", **given})


def test_what_cannot_be_trained_so_is_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="adapters' factors are small and never projected"):
        create_osd_optimizer(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), "rso_adamw")
    quantised = torch.nn.Sequential(torch.nn.Linear(8, 8))
    quantised[0].weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="1 layers are quantised"):
        create_osd_optimizer(quantised, "rso_adamw", rank=3)


def test_another_optimizers_checkpoint_is_refused(tmp_path: Path):
    make_trainer(tmp_path, "osd_adamw", optim_args="rank=8", max_steps=2).train()
    with pytest.raises(ValueError, match="saved by another optimizer"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_arguments_pickle_as_plain_strings(tmp_path: Path):
    args = TrainingArguments(str(tmp_path), optim="rso_adamw", optim_args="rank=4", report_to="none")
    torch.save(args, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).optim == "rso_adamw"
