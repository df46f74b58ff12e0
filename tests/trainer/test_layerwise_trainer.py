"""Layerwise mode in a Trainer: the same weights, learning rates, norms and resume as the ordinary mode."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from resumed_runs import assert_identical, make_trainer, run_twice
from transformers import Trainer, TrainerCallback

from hf_osd import OSD, OSDTrainingArguments
from hf_osd.optim import OPTIM_NAMES
from hf_osd.optim.arrival.stream import GradientStream
from hf_osd.optim.options.mode import Mode


PLAIN = [name for name in OPTIM_NAMES if f"{name}_layerwise" in OPTIM_NAMES]


def train(folder: Path, optim: str, steps: int, **options) -> Trainer:
    trainer = make_trainer(folder, optim, **({"max_steps": steps, "save_strategy": "no"} | options))
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def largest_difference(a: Trainer, b: Trainer) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("optim", PLAIN)
def test_fifty_steps_are_bit_for_bit_the_ordinary_modes(tmp_path: Path, optim: str):
    options = {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine"}
    ordinary, layerwise = (train(tmp_path, name, 50, **options) for name in (optim, f"{optim}_layerwise"))
    assert all(torch.equal(p, q) for p, q in zip(weights(ordinary), weights(layerwise), strict=True))
    for row, other in zip(ordinary.state.log_history[:-1], layerwise.state.log_history[:-1], strict=True):
        # the two sum the squares in another order
        assert other.pop("grad_norm") == pytest.approx(row.pop("grad_norm"), rel=1e-5)
        assert row == other
    assert all(p.grad is None for p in layerwise.model.parameters())


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [("linear", {}), ("cosine", {}), ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 0.1})],
)
def test_the_applied_learning_rate_is_the_logged_one(tmp_path: Path, schedule: str, kwargs: dict, monkeypatch):
    applied: list[float] = []
    original = GradientStream.on_gradient

    def on_gradient(self: GradientStream, p: torch.Tensor) -> None:
        before = p.detach().clone()
        original(self, p)
        if p is watched[0]:  # sign(m) moves every entry by the learning rate
            applied.append(float((p - before).abs().max()))

    monkeypatch.setattr(GradientStream, "on_gradient", on_gradient)
    options = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs, "warmup_steps": 2, "weight_decay": 0.0}
    trainer = make_trainer(tmp_path, "osd_lion_layerwise", max_steps=8, save_strategy="no", **options)
    watched = [trainer.model.model.norm.weight]
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    # a norm's weight is 1: adding 2e-3 rounds by 6e-8
    assert applied == pytest.approx(logged, rel=0, abs=1.2e-7) and len(set(logged)) >= 3


@pytest.mark.parametrize("options", [{}, {"layerwise_clipping": "parameter"}, {"max_grad_norm": 0.0}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_exact_with_every_clipping(tmp_path: Path, options: dict, accumulation: int):
    text = ",".join(["rank=48", *(f"{key}={value}" for key, value in options.items() if key != "max_grad_norm")])
    own = {"max_grad_norm": options.get("max_grad_norm", 0.5), "gradient_accumulation_steps": accumulation}
    assert_identical(*run_twice(tmp_path, "osd_adamw8bit_layerwise", optim_args=text, **own))


def test_a_checkpoint_of_one_mode_continues_in_the_other(tmp_path: Path):
    whole = make_trainer(tmp_path, "osd_adamw", max_grad_norm=0.0)
    whole.train()
    layerwise = make_trainer(tmp_path, "osd_adamw_layerwise", max_grad_norm=0.0)
    layerwise.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(whole, layerwise) == 0
    back = make_trainer(tmp_path, "osd_adamw", max_grad_norm=0.0)
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(whole, back) == 0


@pytest.mark.parametrize("samples", [64, 20])  # 20: each epoch ends with a window of one micro-batch
def test_accumulation_equals_the_ordinary_modes(tmp_path: Path, samples: int):
    """With a P that micro-batches cannot move, only the order of additions differs."""

    def run(optim: str) -> Trainer:
        options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "max_steps": 10, "save_strategy": "no"}
        # SGD is linear in the gradients: Adam's first steps would divide rounding errors by themselves
        trainer = make_trainer(tmp_path, optim, optim_args="rank=8,subspace=static,init=orthonormal", **options)
        trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, range(samples))
        trainer.train()
        return trainer

    ordinary, layerwise = run("osd_sgd"), run("osd_sgd_layerwise")
    assert largest_difference(ordinary, layerwise) < 1e-6  # weights of order 0.02 to 1 after steps of 2e-3
    assert largest_difference(ordinary, make_trainer(tmp_path, "osd_sgd")) > 5e-4
    a, b = ([row["loss"] for row in t.state.log_history if "loss" in row] for t in (ordinary, layerwise))
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("text", ["residual=scaled", "residual=sign,residual_scale=0.1", "side=two_sided"])
def test_the_family_is_bit_for_bit_the_ordinary_modes(tmp_path: Path, text: str):
    options = {"max_grad_norm": 0.0, "optim_args": f"rank=8,{text}"}
    ordinary, layerwise = (train(tmp_path, name, 4, **options) for name in ("osd_adamw", "osd_adamw_layerwise"))
    assert largest_difference(ordinary, layerwise) == 0
    rows, others = ([row for row in t.state.log_history if "loss" in row] for t in (ordinary, layerwise))
    for row, other in zip(rows, others, strict=True):
        assert all(row[name] == other[name] for name in row if name.startswith("osd/"))
        assert 0 < row["osd/pca_loss"] < 1 and row["osd/orthogonality"] < 0.1
    with pytest.raises(ValueError, match="`layerwise` with `gradient_accumulation` is not for"):
        train(tmp_path, "osd_adamw_layerwise", 1, gradient_accumulation_steps=2, **options)


@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
def test_resume_is_exact_with_a_residual_and_clipping(tmp_path: Path, clipping: str):
    text = f"rank=48,residual=scaled,subspace=random,update_interval=2,layerwise_clipping={clipping}"
    assert_identical(*run_twice(tmp_path, "osd_adamw_layerwise", optim_args=text, max_grad_norm=0.5))


def test_p_learns_from_micro_batches(tmp_path: Path):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "optim_args": "rank=8"}
    layerwise = train(tmp_path, "osd_adamw_layerwise", 6, **options)
    first = train(tmp_path, "osd_adamw_layerwise", 1, **options)
    for p, q in zip(layerwise.model.parameters(), first.model.parameters(), strict=True):
        a, b = (t.optimizer.optimizer.state[x] for t, x in ((layerwise, p), (first, q)))
        if "projection" in a:
            assert a["projection_step"] == 5 and a["step"] == 6 and not torch.equal(a["projection"], b["projection"])
            C = a["projection"].T @ a["projection"]
            assert torch.linalg.matrix_norm(C - torch.eye(8)) < 0.3


def test_max_grad_norm_alone_clips_by_the_previous_norm_and_says_so_once(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        trainer = train(tmp_path, "osd_sgd_layerwise", 4, max_grad_norm=0.5)
    assert [r for r in caplog.messages if "by the gradient norm of the step before" in r] == caplog.messages[:1]
    assert trainer.optimizer.optimizer.mode.clipping == "previous_norm"
    caplog.clear()
    chosen = {"max_grad_norm": 0.5, "optim_args": "rank=8,layerwise_clipping=previous_norm"}
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        train(tmp_path, "osd_sgd_layerwise", 1, **chosen)
    assert not caplog.messages


class Norms(TrainerCallback):
    """The norm that is logged, as the callbacks after ours see it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "grad_norm" in logs:
            self.seen.append(logs["grad_norm"])


def test_the_true_gradient_norm_is_logged(tmp_path: Path):
    seen = {}
    for optim in ("osd_sgd", "osd_sgd_layerwise"):
        # so small a learning rate that clipping cannot move the weights apart
        options = {"learning_rate": 1e-7, "max_grad_norm": 0.1, "max_steps": 4, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, optim, **options)
        norms = Norms()
        trainer.add_callback(norms)
        trainer.train()
        seen[optim] = norms.seen
        assert norms.seen == [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert seen["osd_sgd"] == pytest.approx(seen["osd_sgd_layerwise"], rel=1e-5) and seen["osd_sgd"][0] > 0.5


def test_fp16_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="fp16 scales the loss.*Use bf16=True"):
        make_trainer(tmp_path, "osd_adamw_layerwise", fp16=True)


@pytest.mark.parametrize(
    ("optim", "regions"), [("osd_sgd_layerwise", False), ("osd_sgd_layerwise", True), ("osd_sgd", False)]
)
def test_torch_compile_of_the_whole_model_is_told(tmp_path: Path, optim: str, regions: bool, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments set for the whole process
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regions))
    trainer = make_trainer(tmp_path, optim, torch_compile=True, torch_compile_backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.create_optimizer()
    told = [warning for warning in caught if "Compile its blocks" in str(warning.message)]
    assert len(told) == (optim == "osd_sgd_layerwise" and not regions)


def test_the_name_says_it_and_no_option(tmp_path: Path):
    optimizer = make_trainer(tmp_path, "osd_adamw_layerwise", optim_args="rank=4").create_optimizer()
    assert isinstance(optimizer, OSD) and optimizer.mode.layerwise and optimizer.mode.max_grad_norm == 1.0
    with pytest.raises(
        ValueError, match=r"Set `optim='osd_\*_layerwise'` of the training arguments instead of 'layer"
    ):
        make_trainer(tmp_path, "osd_adamw", optim_args="layerwise=true")
    with pytest.raises(ValueError, match="`layerwise_clipping` of OSD has no effect without `layerwise`"):
        make_trainer(tmp_path, "osd_adamw", optim_args="layerwise_clipping=parameter")


def test_every_mode_reaches_the_optimizer_from_fields_and_text(tmp_path: Path):
    optim = "osd_adamw_layerwise"
    common = {"output_dir": str(tmp_path), "use_cpu": True, "optim": optim, "gradient_accumulation_steps": 2}
    mode = {"layerwise_clipping": "parameter", "partial_load": True}
    text = "rank=4," + ",".join(f"{key}={value}" for key, value in mode.items())
    fields = {f"osd_{key}": value for key, value in mode.items()}
    for given in ({"optim_args": text}, {"osd_rank": 4, **fields}):
        args = OSDTrainingArguments(**common, **given, max_grad_norm=0.25)
        optimizer = Trainer(make_trainer(tmp_path, "osd_adamw").model, args).create_optimizer()
        assert optimizer.mode == Mode(layerwise=True, max_grad_norm=0.25, gradient_accumulation=True, **mode)
        assert optimizer.partial_load


def test_nothing_trains_after_the_training_and_a_second_one_does(tmp_path: Path):
    trainer = train(tmp_path, "osd_sgd_layerwise", 2)
    before = [p.clone() for p in weights(trainer)]
    batch = {name: value[None] for name, value in trainer.train_dataset[0].items()}
    trainer.model(**batch).loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(weights(trainer), before, strict=True))
    trainer.model.zero_grad()
    trainer.train()
    assert not all(torch.equal(p, q) for p, q in zip(weights(trainer), before, strict=True))


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_bf16_and_gradient_checkpointing_change_nothing(tmp_path: Path, options: dict):
    own = {"max_grad_norm": 0.0, **options}
    ordinary, layerwise = (train(tmp_path, name, 4, **own) for name in ("osd_adamw", "osd_adamw_layerwise"))
    assert largest_difference(ordinary, layerwise) == 0
