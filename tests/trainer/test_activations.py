"""`source=activations` in stock Trainers: resume, accumulation, checkpointing, half precision, what comes after."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from resumed_runs import Tokens
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_osd.layers.int8 import Int8Weight
from hf_osd.layers.linear import SubspaceLinear
from reference.tiny_models import tiny_llama


class FullGradients(TrainerCallback):
    """Counts the gradients of projected weights that there are before each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.int8: set[int] = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.seen.append(sum(module.weight.grad is not None for module in layers if module is not model.lm_head))
        assert sum(type(module) is SubspaceLinear for module in layers) == 14
        self.int8.add(sum(isinstance(module.weight, Int8Weight) for module in layers))


def make(
    folder: Path, optim: str = "osd_adamw", optim_args: str = "rank=4,source=activations", data=None, **options
) -> Trainer:
    set_seed(0)
    defaults = {"learning_rate": 2e-3, "max_steps": 6, "save_steps": 3, "report_to": "none", "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True, "weight_decay": 0.1}
    arguments = TrainingArguments(str(folder), optim=optim, optim_args=optim_args, **{**defaults, **options})
    return Trainer(tiny_llama(attention_dropout=0.1), arguments, train_dataset=Tokens(), eval_dataset=data)


def logged(trainer: Trainer) -> list[dict]:
    names = ("loss", "grad_norm", "step")
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]


def test_stand_ins_are_no_parameters_of_the_model(tmp_path, caplog):
    """Trainer says how many it trains, and counts operations by them."""
    operations = {}
    for source in ("gradients", "activations"):
        caplog.clear()
        trainer = make(tmp_path, optim_args=f"rank=4,source={source}", max_steps=3, save_strategy="no")
        count = trainer.model.num_parameters()
        with caplog.at_level("INFO", logger="transformers.trainer"):
            monitored = logging.getLogger("transformers")
            propagates, monitored.propagate = monitored.propagate, True
            trainer.train()
            monitored.propagate = propagates
        assert f"Number of trainable parameters = {count:,}" in caplog.text
        operations[source] = trainer.state.total_flos
    assert operations["activations"] == operations["gradients"] > 0


INT8 = {"optim_args": "rank=4,source=activations,weight_dtype=int8"}


@pytest.mark.parametrize("optim", ["osd_adamw", "osd_adamw8bit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, INT8, INT8 | {"bf16": True}],
    ids=str,
)
def test_resume_is_exact(optim, options, tmp_path):
    whole = make(tmp_path / "whole", optim, **options)
    gradients = FullGradients()
    whole.add_callback(gradients)
    whole.train()
    assert gradients.seen == [0] * 6
    assert gradients.int8 == {14 if "int8" in options.get("optim_args", "") else 0}
    again = make(tmp_path / "again", optim, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(again)[:6] == logged(whole)[:6]
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(entry["grad_norm"] > 0 for entry in logged(whole)[:6])


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_layerwise_is_the_ordinary_mode_and_resumes(options, tmp_path):
    names = ("osd_adamw8bit", "osd_adamw8bit_layerwise")
    trainers = []
    for i, resumed in enumerate((None, None, str(tmp_path / "1" / "checkpoint-3"))):
        trainers.append(make(tmp_path / f"{i}", names[i > 0], **INT8 | {"max_grad_norm": 0.0} | options))
        trainers[-1].train(resume_from_checkpoint=resumed)
    _, layerwise, again = map(logged, trainers)
    assert again[:6] == layerwise[:6]
    for a, b, c in zip(*(trainer.model.state_dict().values() for trainer in trainers), strict=True):
        assert torch.equal(b, c) and (a - b).abs().max() < 1e-5


def test_accumulation_is_one_large_batch(tmp_path):
    parts = make(tmp_path / "a", gradient_accumulation_steps=4, per_device_train_batch_size=1)
    whole = make(tmp_path / "b", per_device_train_batch_size=4)
    for trainer in (parts, whole):
        trainer.model.config.attention_dropout = 0.0
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        trainer.args.optim_args += ",projection_sample=1"
        trainer.train()
    for a, b in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert (a - b).abs().max() < 5e-5


def test_bfloat16_autocast(tmp_path):
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


def test_the_model_is_plain_after_training_and_trains_on(tmp_path):
    trainer = make(tmp_path / "a")
    trainer.train()
    model = trainer.model
    assert not any(isinstance(module, SubspaceLinear) for module in model.modules())
    before = copy.deepcopy(model.state_dict())
    trainer.train()  # once more: the layers are prepared again
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_int8_weights_are_trained_a_second_time(tmp_path):
    """A second training goes on from the integers of the first: as one loop with the same batches does."""
    trainer = make(tmp_path / "a", "osd_adamw_layerwise", **INT8, max_steps=3)
    counted = FullGradients()
    trainer.add_callback(counted)
    trainer.train()
    held = [p for p in trainer.optimizer.optimizer.param_groups[0]["params"] if isinstance(p, Int8Weight)]
    before = [p.int_data.clone() for p in held]
    trainer.train()
    assert counted.int8 == {14} and len(held) == 14
    assert not any(torch.equal(p.int_data, K) for p, K in zip(held, before, strict=True))
    layers = [module.weight for module in trainer.model.modules() if isinstance(module, nn.Linear)][:-1]
    assert all(torch.equal(W, p.plain()) for W, p in zip(layers, held, strict=False))


def test_the_best_model_is_that_of_its_checkpoint_to_the_bit(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make(tmp_path, **INT8, load_best_model_at_end=True, data=Tokens(), bf16=True, **options)
    trainer.model.bfloat16()
    trainer.train()
    saved = load_file(Path(trainer.state.best_model_checkpoint, "model.safetensors"))
    own = trainer.model.state_dict()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, own[name]) for name, value in saved.items())


def test_a_trainer_with_another_optimizer_gets_its_gradients(tmp_path):
    trainer = make(tmp_path / "a")
    optimizer = trainer.create_optimizer()  # and is never used
    assert optimizer.layers is not None
    model = trainer.model
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(str(tmp_path / "b"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=Tokens()).train()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_saved_models_are_plain(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    names = set(tiny_llama().state_dict())
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-3" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    pairs = zip(loaded.state_dict().values(), trainer.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("compile_mode", [{"torch_compile": True, "torch_compile_backend": "aot_eager"}])
def test_a_compiled_model(compile_mode, tmp_path):
    compiled = make(tmp_path / "a", **compile_mode)
    compiled.train()
    plain = make(tmp_path / "b")
    plain.train()
    for a, b in zip(compiled.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("osd_adamw", "source=activations,residual=scaled", "residual"),
        ("osd_adamw", "source=activation", "activations"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(optim, optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, optim, optim_args).train()


def test_reference_models_that_follow(tmp_path):
    """trl's pair the parameters of two models, strictly."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    trainer, reference = make(tmp_path), tiny_llama()

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            callbacks.SyncRefModelCallback._sync_target_model(model, reference, alpha=0.5)
            followed.append(state.global_step)

    followed: list[int] = []
    trainer.add_callback(Follow())
    trainer.train()
    assert followed == [1, 2, 3, 4, 5, 6]
    start, end = tiny_llama().state_dict(), trainer.model.state_dict()
    for name, value in reference.state_dict().items():
        assert (value - end[name]).norm() < (start[name] - end[name]).norm()
