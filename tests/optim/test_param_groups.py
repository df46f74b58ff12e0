"""What `create_osd_optimizer` makes of a model: its groups, their decay and ranks, and the options it takes."""

import warnings

import pytest
import torch
from target_models import MODELS
from torch import nn
from transformers import Trainer

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.step.geometry import ProjectedGeometry
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("model", MODELS)
def test_weight_decay_goes_to_the_parameters_that_trainer_gives_it_to(model):
    model = MODELS[model]()
    optimizer = create_osd_optimizer(model, lr=1e-3, rank=4, weight_decay=0.1)
    decays = set(Trainer.get_decay_parameter_names(None, model))
    seen = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p
            seen[name] = group["weight_decay"]
    assert seen == {name: 0.1 if name in decays else 0.0 for name, _ in model.named_parameters()}
    assert set(seen.values()) == {0.0, 0.1}


def test_groups_of_a_llama():
    model = tiny_llama()
    model.model.layers[1].mlp.requires_grad_(False)
    optimizer = create_osd_optimizer(model, "osd_lion", lr=2e-3, rank=6, weight_decay=0.1)
    assert [(g["rank"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (6, 0.1, 14 - 3),
        (None, 0.1, 2),  # embedding and head
        (None, 0.0, 5),  # norms
    ]
    assert all(group["weight_rule"] == "lion" and group["lr"] == 2e-3 for group in optimizer.param_groups)
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters() if p.requires_grad}
    found = [optimizer.weight_of(p).geometry for p in optimizer.param_groups[0]["params"]]
    assert all(isinstance(geometry, ProjectedGeometry) and geometry.rank == 6 for geometry in found)


def test_a_projected_group_without_decay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(12, 20)
            self.my_norm = nn.Linear(20, 12)  # matches Trainer's pattern for norms

    optimizer = create_osd_optimizer(Odd(), rank=4, weight_decay=0.1)
    assert [(g["rank"], g["weight_decay"], g["param_names"]) for g in optimizer.param_groups] == [
        (4, 0.1, ["plain.weight"]),
        (4, 0.0, ["my_norm.weight"]),
        (None, 0.0, ["plain.bias", "my_norm.bias"]),
    ]


def test_the_default_rank_and_the_clipped_one_warn_once():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="is not below min.* for 14 matrices") as caught:
        optimizer = create_osd_optimizer(model)
    assert sum("is not below" in str(one.message) for one in caught) == 1  # not per layer
    assert optimizer.param_groups[0]["rank"] == 128
    ranks = {optimizer.weight_of(p).geometry.rank for p in optimizer.param_groups[0]["params"]}
    assert ranks == {16, 32}  # min(m, n) of the key and value layers, and of the others


def test_a_rank_that_fits_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_osd_optimizer(tiny_llama(), rank=8)


def test_a_second_group_does_not_warn_again():
    with pytest.warns(UserWarning, match="is not below min.* for 3 matrices") as caught:
        OSD([{"params": [nn.Parameter(torch.randn(8, 12))], "rank": 8} for _ in range(3)])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"alhpa": 3.0}, "`alhpa` in create_osd_optimizer. Did you mean `alpha`"),
        ({"lambda": 3.0}, "`lambda` in create_osd_optimizer. Did you mean `lambda_`"),
        ({"weight_rule": "lion"}, "instead of `weight_rule` of create_osd_optimizer"),
        ({"maximize": True}, "`maximize` in create_osd_optimizer"),
        ({"optim": "adamw"}, "'adamw'.*Did you mean 'osd_adamw'"),
        ({"optim": "osd_adam8bit"}, "Did you mean 'osd_adamw8bit'"),
        ({"preset": "refrence"}, "`preset` of create_osd_optimizer must be one of reference"),
        ({"projection_optim": "adam"}, "must be one of .*did you mean 'adamw'"),
        ({"rank": 0}, "`rank` .* must be an integer >= 1, got 0"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        create_osd_optimizer(tiny_llama(), **{"rank": 4, **call})


def test_the_projection_has_a_rule_of_its_own():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, "osd_adamw", rank=4, projection_optim="sgd", momentum=0.5)
    assert optimizer.param_groups[0]["projection_rule"] == "sgd"
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert {"exp_avg", "exp_avg_sq", "projection_momentum_buffer"} <= optimizer.state[p].keys()


def test_init_by_name_reaches_the_parameters():
    model = nn.Sequential(nn.Linear(20, 12, bias=False), nn.Linear(12, 30, bias=False))
    given = {"0.weight": torch.eye(12)[:, :4], "1.weight": torch.eye(12)[:, 4:8]}
    optimizer = create_osd_optimizer(model, rank=4, init=given, alpha=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["projection"], given[name])
    with pytest.raises(ValueError, match="`init` has no P for 1.weight"):
        create_osd_optimizer(model, rank=4, init={"0.weight": given["0.weight"]})
