"""Optimizers that trainers and users' own loops over groups make by the arguments of a Trainer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_osd import OSDTrainer, OSDTrainingArguments
from reference.tiny_models import tiny_llama


def test_osd_trainer_refuses_other_optimizers(stock):
    with pytest.raises(ValueError, match="OSDTrainer needs one of optim=osd_adamw, .*got 'adamw_torch'. Use Trainer"):
        OSDTrainer(tiny_llama(), stock(optim="adamw_torch")).create_optimizer()


def test_osd_trainer_builds_what_a_stock_trainer_builds(stock):
    model = tiny_llama()
    args = stock(optim="osd_adamw", optim_args="rank=4,alpha=2", weight_decay=0.1, adam_beta2=0.95, seed=3)
    stock_groups, groups = (cls(model, args).create_optimizer().param_groups for cls in (Trainer, OSDTrainer))
    for group, other in zip(stock_groups, groups, strict=True):
        assert group.keys() == other.keys()
        assert all(a is b for a, b in zip(group["params"], other["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_osd_trainer_keeps_the_optimizer_it_is_given(stock):
    model = tiny_llama()
    own = torch.optim.SGD(model.parameters(), 0.1)
    trainer = OSDTrainer(model, stock(optim="osd_adamw"), optimizers=(own, None))
    assert trainer.create_optimizer() is own


def test_osd_trainer_hears_an_overridden_choice_of_decay(stock):
    class OnlyHead(OSDTrainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return ["lm_head.weight"]

    args = stock(optim="osd_adamw", optim_args="rank=4", weight_decay=0.1)
    decays = {
        name: group["weight_decay"]
        for group in OnlyHead(tiny_llama(), args).create_optimizer().param_groups
        for name in group["param_names"]
    }
    assert {name for name, decay in decays.items() if decay} == {"lm_head.weight"}
    assert decays["lm_head.weight"] == 0.1 and len(decays) == len(list(tiny_llama().named_parameters()))


def test_groups_of_ones_own_are_divided_as_the_arguments_say(stock):
    model = tiny_llama()
    args = stock(optim="osd_adamw", optim_args="rank=4,rank_pattern=q_proj:2")
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    loss = nn.Linear(3, 2)
    first = [p for name, p in model.named_parameters() if "layers.0" in name]
    groups = [
        {"params": first, "lr": 1e-4, "layer_id": 0},
        {"params": [p for name, p in model.named_parameters() if "layers.1" in name], "weight_decay": 0.1},
        {"params": loss.parameters(), "lr": 1e-2},
    ]
    optimizer = optimizer_class(groups, **kwargs)
    assert [(g["rank"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (2, 1e-4, 0.0, 1),
        (2, args.learning_rate, 0.1, 1),
        (4, 1e-4, 0.0, 6),
        (4, args.learning_rate, 0.1, 6),
        (None, 1e-4, 0.0, 2),
        (None, args.learning_rate, 0.1, 2),
        (None, 1e-2, 0.0, 2),
    ]
    for group in optimizer.param_groups[:-1]:
        assert all(model.get_parameter(n) is p for n, p in zip(group["param_names"], group["params"], strict=True))
    assert [g.get("layer_id") for g in optimizer.param_groups[:3]] == [0, None, 0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer_class([{"params": first}, {"params": first[:1]}], **kwargs)
    whole = optimizer_class([{"params": first, "rank": None}], **kwargs)
    assert all(group["rank"] is None for group in whole.param_groups)
    assert len(optimizer_class(model.parameters(), **kwargs).param_groups) == 3
    assert optimizer_class(model.named_parameters(), **kwargs).param_groups[0]["rank"] == 2


def test_class_and_arguments_without_a_model(stock):
    with pytest.warns(UserWarning, match="Without the model every matrix is projected, embeddings"):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(stock(optim="osd_lion", optim_args="rank=4"))
    model = tiny_llama()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = optimizer_class([{"params": matrices}, {"params": vectors, "rank": None}], **kwargs)
    assert [(g["rank"], g["weight_rule"]) for g in optimizer.param_groups] == [(4, "lion"), (None, "lion")]
    args = stock(optim="osd_lion", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match="osd_lion needs the model for its choice of layers"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_a_trainer_may_add_a_group(stock):
    class WithLoss(Trainer):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            optimizer = super().create_optimizer(model)
            optimizer.add_param_group({"params": nn.Linear(3, 2).parameters(), "lr": 1e-2})
            return optimizer

    optimizer = WithLoss(tiny_llama(), stock(optim="osd_adamw", optim_args="rank=4")).create_optimizer()
    assert optimizer.param_groups[-1]["rank"] is None and optimizer.param_groups[-1]["lr"] == 1e-2


def test_osd_arguments_work_in_a_stock_trainer(tmp_path: Path):
    args = OSDTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", optim="osd_lion", osd_rank=4, osd_side="right"
    )
    group = Trainer(tiny_llama(), args).create_optimizer().param_groups[0]
    assert group["weight_rule"] == "lion" and set(group["sides"]) == {"right"}
