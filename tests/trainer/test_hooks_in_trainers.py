"""A layerwise optimizer's hooks in Trainers: on all parameters while it trains, and on none afterwards."""

from pathlib import Path

import pytest
import torch
from resumed_runs import make_trainer
from transformers import Trainer, TrainerCallback, set_seed

import hf_osd
from hf_osd.optim.arrival.stream import GradientStream


class Alive(TrainerCallback):
    """How many gradients are there before each step."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.numbers.append(sum(p.grad is not None for p in model.parameters()))


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_gradient_is_left_on_the_parameters(tmp_path: Path, accumulation: int, monkeypatch):
    arrived, original = [], GradientStream.on_gradient
    monkeypatch.setattr(
        GradientStream, "on_gradient", lambda self, p: (arrived.append(p.grad.numel()), original(self, p))
    )
    trainer = make_trainer(tmp_path, "osd_adamw_layerwise", max_steps=3, gradient_accumulation_steps=accumulation)
    seen = Alive()
    trainer.add_callback(seen)
    trainer.train()
    assert seen.numbers == [0] * 3
    number = sum(p.requires_grad for p in trainer.model.parameters())
    assert len(arrived) == 3 * accumulation * number


def test_attaching_again_leaves_every_hook_on():
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 4))
    optimizer = hf_osd.create_osd_optimizer(model, "osd_adamw_layerwise", rank=2)
    for _ in range(2):
        optimizer.attach()
        model(torch.randn(3, 8)).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    optimizer.remove()
    model(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_torch", "osd_adamw", "osd_adamw_layerwise"])
def test_after_an_interrupted_training_another_one_has_the_gradients(tmp_path: Path, optim: str, accumulation: int):
    first = make_trainer(tmp_path, "osd_adamw_layerwise", gradient_accumulation_steps=accumulation)
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    given = None if optim == "adamw_torch" else "rank=48"
    second = make_trainer(tmp_path, optim, optim_args=given, max_steps=2, save_strategy="no")
    second.model.load_state_dict(first.model.state_dict())
    other = make_trainer(tmp_path, optim, optim_args=given, max_steps=2, save_strategy="no")
    other.model = other.model_wrapped = first.model  # whose parameters carry the hooks
    for trainer in (second, other):
        set_seed(0)  # of dropout
        trainer.train()
    pairs = zip(second.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "Trainer would clip by max_grad_norm=1.0.* clips by max_grad_norm=None"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 needs"),
    ],
)
def test_an_optimizer_of_ones_own_that_trainer_cannot_reach_is_refused(tmp_path: Path, given: dict, told: str):
    built = make_trainer(tmp_path, "osd_adamw", **given)
    optimizer = hf_osd.create_osd_optimizer(built.model, "osd_adamw_layerwise", rank=8)
    trainer = Trainer(built.model, built.args, train_dataset=built.train_dataset, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=told):
        trainer.train()


class Cached(Trainer):
    """As a cached contrastive loss: a backward pass of its own for the first half of a batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        first, second = ({name: value.chunk(2)[half] for name, value in inputs.items()} for half in (0, 1))
        self.accelerator.backward(model(**first).loss / 2)
        return model(**second).loss / 2


def test_several_backward_passes_a_step_and_the_way_that_the_message_shows(tmp_path: Path):
    def trainer(optim: str, **mode) -> Trainer:
        built = make_trainer(tmp_path, "osd_adamw", max_steps=3, max_grad_norm=0.0, save_strategy="no")
        built.model.config.attention_dropout = 0.0
        for layer in built.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        fixed = {"rank": 8, "subspace": "static", "init": "orthonormal", "lr": built.args.learning_rate}
        optimizer = hf_osd.create_osd_optimizer(built.model, optim, **fixed, **mode)
        set_seed(0)
        return Cached(built.model, built.args, train_dataset=built.train_dataset, optimizers=(optimizer, None))

    with pytest.raises(ValueError, match="arrived twice.*`gradient_accumulation=True` .*pass it in `optimizers`"):
        trainer("osd_sgd_layerwise").train()
    trainers = trainer("osd_sgd"), trainer("osd_sgd_layerwise", gradient_accumulation=True)
    for own in trainers:
        own.train()
    for p, q in zip(*(own.model.parameters() for own in trainers), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_failed_backward_pass_says_what_it_has_stepped(tmp_path: Path):
    """As with `auto_find_batch_size`, which begins anew with a smaller batch and the weights as they are."""
    trainer = make_trainer(tmp_path, "osd_adamw_layerwise", auto_find_batch_size=True, save_strategy="no")
    sizes: list[int] = []

    def fail(module, grad_input, grad_output) -> None:
        sizes.append(len(grad_output[0]))
        if sizes == [2]:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.model.layers[0].register_full_backward_hook(fail)
    with pytest.warns(UserWarning, match=r"without `step\(\)`: it has stepped 11 parameters"):
        trainer.train()
    assert sizes == [2, *[1] * trainer.state.global_step]


def test_an_optimizer_of_ones_own_with_the_same_clipping_trains_as_trainers(tmp_path: Path):
    trainers = make_trainer(tmp_path, "osd_adamw_layerwise", optim_args="rank=8", max_grad_norm=0.5, weight_decay=0.0)
    own = make_trainer(tmp_path, "osd_adamw", max_grad_norm=0.5, weight_decay=0.0)
    optimizer = hf_osd.create_osd_optimizer(
        own.model, "osd_adamw_layerwise", lr=own.args.learning_rate, rank=8, max_grad_norm=0.5, eps=1e-8
    )
    own = Trainer(own.model, own.args, train_dataset=own.train_dataset, optimizers=(optimizer, None))
    for trainer in (trainers, own):
        set_seed(0)  # of dropout
        trainer.train()
    pairs = zip(trainers.model.parameters(), own.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
