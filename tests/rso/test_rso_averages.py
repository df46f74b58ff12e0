"""Averages and copies of a model in training are those of its weights: whoever goes through parameters finds them."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rso_runs import make_trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

import hf_osd
from reference.tiny_models import tiny_llama


IDS = torch.arange(24).view(2, 12)


def trained(steps: int, after: Callable[[nn.Module], None], clears: str = "optimizer") -> nn.Module:
    """A model after steps of which each is followed by `after`."""
    model = tiny_llama()
    optimizer = hf_osd.create_osd_optimizer(model, "rso_adamw", lr=0.01, rank=4, update_interval=2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        after(model)
        (optimizer if clears == "optimizer" else model).zero_grad()
    return model


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_averages_are_those_of_the_weights(use_buffers: bool):
    average = get_ema_multi_avg_fn(0.5)
    ema: list[AveragedModel] = []
    seen: list[dict[str, torch.Tensor]] = []

    def after(model: nn.Module) -> None:
        if not ema:
            ema.append(AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers))
        ema[0].update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))

    model = trained(4, after)
    found = ema[0].module.state_dict()
    assert found.keys() == tiny_llama().state_dict().keys()
    for name, value in found.items():
        a, b, c, d = (state[name] for state in seen)
        torch.testing.assert_close(value, a / 8 + b / 8 + c / 4 + d / 2)
        assert not torch.equal(value, d) or "norm" in name
    assert {name for name, _ in ema[0].module.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_parameters_zip_with_a_copys():
    plain = dict(tiny_llama().named_parameters())

    def after(model: nn.Module) -> None:
        assert [name for name, _ in model.named_parameters()] == list(plain)
        for p, q in zip(model.parameters(), copy.deepcopy(model).parameters(), strict=True):
            assert torch.equal(p, q)

    by_optimizer, by_model = (trained(4, after, clears) for clears in ("optimizer", "model"))
    for p, q in itertools.zip_longest(by_optimizer.parameters(), by_model.parameters()):
        assert torch.equal(p, q)


def test_clipping_sees_r_and_the_state_dict_is_exact_under_autocast():
    """Autocast changes nothing of a state dict: the weights are in the model, no W + P B is computed."""
    model = tiny_llama()
    hf_osd.create_osd_optimizer(model, "rso_adamw", rank=4)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
        saved = model.state_dict()
    parameters = dict(tiny_llama().named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in saved.items() if name in parameters)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(parameters) and total > 1e-3  # R stands for each matrix's gradient
    assert torch.cat([G.flatten() for G in grads]).norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_a_callbacks_average_in_a_trainer(tmp_path: Path):
    class Ema(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.shadow = [p.detach().clone() for p in model.parameters()]
            self.expected = copy.deepcopy(model.state_dict())

        def on_step_end(self, args, state, control, model=None, **kwargs):
            for average, p in zip(self.shadow, model.parameters(), strict=True):
                average.lerp_(p.detach(), 0.5)
            for name, value in model.state_dict().items():
                self.expected[name].lerp_(value, 0.5)

    trainer, ema = make_trainer(tmp_path, max_steps=6, save_strategy="no"), Ema()
    trainer.add_callback(ema)
    trainer.train()
    names = [name for name, _ in tiny_llama().named_parameters()]
    assert all(torch.equal(ema.expected[name], p) for name, p in zip(names, ema.shadow, strict=True))
