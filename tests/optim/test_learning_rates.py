"""Numbers that are learning rates, whatever type they have, and those that are none."""

import numpy as np
import pytest
import torch
from matrices import RANK, give, matrix
from torch import nn

import hf_osd
from hf_osd import OSD, create_osd_optimizer
from reference.tiny_models import tiny_llama


def test_numbers_of_numpy():
    p = matrix()
    optimizer = OSD(
        [{"params": [p], "rank": np.int64(4)}], lr=np.float32(0.25), betas=(np.float64(0.5), np.float32(0.5))
    )
    group = optimizer.param_groups[0]
    assert type(group["lr"]) is float and type(group["rank"]) is int and group["lr"] == 0.25
    assert [type(beta) for beta in group["betas"]] == [float, float]
    with pytest.raises(ValueError, match="must be a number"):
        OSD([p], lr=np.float32("nan"))


def test_arrays_and_tensors_of_one_number_and_truth_values_of_numpy():
    p = matrix().bfloat16()
    given = {"lr": np.array(0.25), "rank": np.array(4), "alpha": torch.tensor(2.0), "betas": (0.5, np.array(0.75))}
    optimizer = OSD([nn.Parameter(p)], **given, stochastic_rounding=np.True_, layerwise=np.True_)
    group = optimizer.param_groups[0]
    expected = {"lr": 0.25, "rank": 4, "alpha": 2.0, "betas": (0.5, 0.75), "stochastic_rounding": True}
    assert {name: group[name] for name in expected} == expected and optimizer.mode.layerwise is True
    assert [type(group[name]) for name in expected] == [float, int, float, tuple, bool]
    own = {"rank": np.array(4), "carry_moments": np.True_, "subspace": "svd", "target_modules": "all-linear"}
    group = hf_osd.create_osd_optimizer(nn.Sequential(nn.Linear(8, 12)), **own).param_groups[0]
    assert group["rank"] == 4 and group["carry_moments"] is True


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize(
    "lr", [torch.tensor([0.125]), torch.tensor([[0.125]]), np.array(0.125), np.array([0.125])], ids=repr
)
def test_a_learning_rate_of_one_number_is_put_into_a_group(lr, rule: str, layerwise: bool):
    def trained(lr) -> list[nn.Parameter]:
        params = [matrix(), nn.Parameter(torch.ones(5))]
        groups = [{"params": params[:1], "rank": RANK}, {"params": params[1:]}]
        optimizer = OSD(groups, weight_rule=rule, weight_decay=0.1, layerwise=layerwise)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(2):
            sum(p.square().sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(lr, torch.Tensor):  # which is still the user's to change
            lr.fill_(0.25)
            assert optimizer.param_groups[0]["lr"] == 0.25
            lr.fill_(0.125)
        return params

    for p, q in zip(trained(lr), trained(0.125), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "lr", [torch.tensor([0.25]), np.array([[0.25]]), np.array([0.25], dtype=np.float32)], ids=repr
)
def test_a_learning_rate_of_one_number_is_given(lr):
    for optimizer in (
        OSD([matrix()], lr=lr, rank=RANK),
        OSD([{"params": [matrix()], "lr": lr, "rank": RANK}]),
        hf_osd.create_osd_optimizer(nn.Sequential(nn.Linear(8, 12)), lr=lr, rank=RANK),
    ):
        assert all(type(group["lr"]) is float and group["lr"] == 0.25 for group in optimizer.param_groups)


@pytest.mark.parametrize("lr", [torch.ones(2), np.ones(2), np.ones(0), np.array(["0.1"]), "0.1", None], ids=repr)
def test_a_learning_rate_that_is_no_number_is_told(lr):
    p = matrix()
    optimizer = OSD([p], rank=RANK)
    optimizer.param_groups[0]["lr"] = lr
    give(p, 0)
    with pytest.raises(ValueError, match="`lr` of parameter group 0 must be a number"):
        optimizer.step()


def test_another_projection_lr_in_a_group_is_followed():
    moved = []
    for rate in (0.005, 0.05):
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(20, 30))
        optimizer = OSD([W], lr=1e-2, rank=4, projection_lr=0.005)
        for step in range(3):
            if step == 2:
                optimizer.param_groups[0]["projection_lr"] = rate
                before = optimizer.state[W]["projection"].clone()
            W.grad = torch.randn(20, 30)
            optimizer.step()
        assert optimizer.param_groups[0]["alpha"] == pytest.approx(rate / 1e-2)
        moved.append(float((optimizer.state[W]["projection"] - before).norm()))
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def test_projection_lr_has_the_multiples_of_lr_pattern():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, lr=1e-3, rank=4, projection_lr=5e-3, lr_pattern={"q_proj": 0.1})
    found = {
        (group["lr"], round(group["lr"] * group["alpha"], 9)) for group in optimizer.param_groups if group["rank"]
    }
    assert found == {(1e-3, 5e-3), (1e-4, 5e-4)}
