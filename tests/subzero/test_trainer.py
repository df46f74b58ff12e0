"""`optim="subzero"` in a stock Trainer: accumulation, clipping, all kinds of losses, evaluation."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from subzero_runs import Tokens, logged, make, same, weights
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_osd import ProjectionState, SubZero
from hf_osd.subzero import SubZeroLog, replay, subzero_of
from hf_osd.trainer.ignored_by_ddp import MARK, ignore_all_but_one, unmark
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["by the model", "label smoothing"])
def test_accumulation_is_one_large_batch_and_a_schedule_is_followed(tmp_path: Path, smoothing: float):
    options = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "label_smoothing_factor": smoothing}
    one = make(tmp_path, torch.float64, **options)
    two = make(tmp_path, torch.float64, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    for trainer in (one, two):
        trainer.train()
    for p, q in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # the model computes its loss in float32
    start = tiny_llama(attention_dropout=0.1).double()
    assert max((p - q).abs().max() for p, q in zip(weights(one), start.parameters(), strict=True)) > 5e-3
    log = SubZeroLog.from_optimizer(one.optimizer)
    assert log.lr[:, 0].tolist() == pytest.approx(logged(one, "learning_rate"))
    replay(start, log)
    assert same(one, start)


def test_rho_is_what_is_clipped_and_logged(tmp_path: Path):
    free, clipped = make(tmp_path, max_grad_norm=0), make(tmp_path, max_grad_norm=0.01)
    for trainer in (free, clipped):
        trainer.train()
    norms, rho = logged(free, "grad_norm"), SubZeroLog.from_optimizer(free.optimizer).rho.abs().flatten()
    assert norms == pytest.approx(rho.tolist())
    norms, rho = logged(clipped, "grad_norm"), SubZeroLog.from_optimizer(clipped.optimizer).rho.abs().flatten()
    assert max(norms) > 1
    assert rho.tolist() == pytest.approx([min(norm, 0.01) for norm in norms], rel=1e-3)


class Watch(TrainerCallback):
    """Evaluates within a step, before it and after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        batch = {name: value[None] for name, value in Tokens()[0].items()}
        training = model.training
        with torch.no_grad():
            self.losses.append(model.eval()(**batch).loss.item())
        model.train(training)


def test_nobody_sees_a_perturbed_model(tmp_path: Path):
    watch = Watch()
    trainer = make(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=2, trainer={"callbacks": [watch]})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert watch.losses == [watch.losses[0]] * 6
    assert logged(trainer, "eval_loss") == [before] * 3
    assert len(set(logged(trainer, "loss"))) == 6 and trainer.model.training is False


def test_a_loss_outside_of_the_model_gives_the_same(tmp_path: Path):
    def outside(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    own, inside = make(tmp_path, trainer={"compute_loss_func": outside}), make(tmp_path)
    for trainer in (own, inside):
        trainer.train()
    # Trainer counts all labels of a batch, the model leaves each sequence's first one out of its sum alone
    assert logged(own, "loss") == pytest.approx(logged(inside, "loss"), rel=1e-4)


def test_subspaces_of_another_run(tmp_path: Path):
    osd = make(tmp_path, optim_args="rank=8")
    osd.args.optim, osd.args.optim_args = "osd_adamw", "rank=8"
    osd.train()
    ProjectionState.from_optimizer(osd.optimizer).save_pretrained(tmp_path / "P")
    trainer = make(tmp_path, optim_args=f"rank=4,init={tmp_path / 'P'}")
    trainer.train()
    own = subzero_of(trainer.optimizer)
    assert isinstance(own, SubZero) and sum(bool(getattr(w, "given", {})) for w in own.weights.weights.values()) == 14
    again = tiny_llama(attention_dropout=0.1)
    log = SubZeroLog.from_optimizer(own)
    with pytest.raises(ValueError, match="The run had an `init`: give it"):
        replay(again, log)
    replay(again, log, init=str(tmp_path / "P"))
    assert same(trainer, again)


class Modes(Trainer):
    """Asks which mode it is in, as trl's do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked = self.model.training
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_on_the_object_stays_and_no_forward_pass_is_in_training_mode(tmp_path: Path):
    trainer = make(tmp_path, max_steps=3)
    trainer.__class__ = Modes
    model, seen, calls = trainer.model, [], []
    forward, compute_loss = model.forward, trainer.compute_loss

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(any(module.training for module in model.modules()))
        return forward(*args, **kwargs)

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.model.training)
        return compute_loss(*args, **kwargs)

    model.forward, trainer.compute_loss = watched, mine
    trainer.train()
    assert trainer.compute_loss is mine and calls == [True] * 6 and trainer.asked
    assert seen == [False] * 6 and all(module.training for module in model.modules())
    trainer.evaluate()
    assert not hasattr(model, MARK)  # which would leave another optimizer's gradients alone


def test_ddp_is_told_of_every_name_and_what_a_user_has_told_it_stays():
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False))
    net[2].weight = net[0].weight
    net.own = nn.Parameter(torch.zeros(5))
    for users in (None, ["mask"]):
        if users is not None:
            setattr(net, MARK, users)
        for _ in range(2):  # the second as after a training that never began
            ignore_all_but_one(net)
        told = set(getattr(net, MARK))
        assert told == {"0.weight", "2.weight", ".own", "own", "1.bias", *(users or ())}
        unmark(net)
        unmark(net)
        assert getattr(net, MARK, None) == users
