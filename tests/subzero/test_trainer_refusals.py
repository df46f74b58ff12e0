"""`optim="subzero"` in a stock Trainer: what would not work is refused at once."""

from pathlib import Path

import pytest
from subzero_runs import Tokens, make
from transformers import Trainer, TrainingArguments

from hf_osd import OSDTrainingArguments, SubZero
from hf_osd.subzero import subzero_of
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16's GradScaler: use bf16=True"),
        ({"optim_args": "rank=8,layerwise=true"}, "instead of 'layerwise' in `optim_args`"),
        ({"optim_args": "residual=scaled"}, "Unknown option `residual`"),
        ({"optim_args": "side=two_sided"}, "Unknown option `side`"),
        ({"optim_args": "subspace=power"}, "Unknown option `subspace`"),
        ({"optim_args": "rnak=8"}, "Did you mean `rank`"),
        ({"optim_args": "rank=8,perturbation=dense"}, "`rank` of SubZero has no effect with perturbation='dense'"),
        ({"optim_args": "queries=0"}, "`queries` of SubZero must be an integer >= 1"),
        ({"adam_beta1": 0.8}, "`adam_beta1` has no effect"),
        ({"torch_compile": True}, "leave `torch_compile` out"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` has no effect"),
        (
            {"optim_args": "perturbation=dense", "optim_target_modules": ["q_proj"]},
            "`optim_target_modules` of SubZero has no effect with perturbation='dense'",
        ),
    ],
)
def test_what_would_not_work_is_refused_at_once(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"fp16": True}, {"neftune_noise_alpha": 5.0}, {}])
def test_what_would_not_work_is_refused_for_an_optimizer_of_ones_own(tmp_path: Path, options: dict, monkeypatch):
    if not options:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as `accelerate launch --dynamo_backend` does
    model = tiny_llama()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError, match="use bf16=True" if "fp16" in options else "leave `torch_comp|has no effect"):
        Trainer(model, args, train_dataset=Tokens(), optimizers=(SubZero(model, rank=8), None))
    if options.get("neftune_noise_alpha"):
        trainer = Trainer(model, args, train_dataset=Tokens())
        trainer.create_optimizer = lambda: setattr(trainer, "optimizer", SubZero(model, rank=8))
        with pytest.raises(ValueError, match="has no effect"):
            trainer.train()


@pytest.mark.parametrize("version", [1, 2])
def test_engines_that_divide_the_weights_are_refused(tmp_path: Path, version: int, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", str(version))
    with pytest.raises(ValueError, match="cannot be used with FSDP.*use DDP"):
        OSDTrainingArguments(str(tmp_path), optim="subzero", use_cpu=True)


def test_typed_options_of_osd_are_refused_and_others_work(tmp_path: Path):
    with pytest.raises(ValueError, match="osd_rank needs an OSD optimizer"):
        OSDTrainingArguments(str(tmp_path), optim="subzero", osd_rank=8, use_cpu=True)
    trainer = make(tmp_path, optim_target_modules=["q_proj"])
    low_rank = [name for name, w in subzero_of(trainer.create_optimizer()).weights.weights.items() if hasattr(w, "U")]
    assert len(low_rank) == 2 and all("q_proj" in name for name in low_rank)


def test_further_parameters_are_refused():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    optimizer = SubZero(model, lr=1e-3, rank=4)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="directions are of the parameters that it was made with: make a new one"):
        optimizer.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)]})
    assert len(optimizer.param_groups) == groups
