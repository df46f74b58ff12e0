"""Options of parameter groups that would do nothing, and what groups share with torch's own optimizers."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import hf_osd
from hf_osd import OSD


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


@pytest.mark.parametrize(
    "own",
    [
        {"scale": 0.1},
        {"subspace": "svd"},
        {"residual": "scaled"},
        {"init": "svd"},
        {"side": "left"},
        {"alpha": 2.0},
        {"projection_lr": 0.1},
        {"carry_moments": True},
        {"update_interval": 10},
        {"projection_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_what_only_projected_groups_use_is_refused_in_others(own: dict):
    groups = [{"params": [parameter(8, 12)], "rank": 2}, {"params": [parameter(12)], **own}]
    with pytest.raises(ValueError, match=f"`{next(iter(own))}` of parameter group 1 has no effect without a `rank`"):
        OSD(groups)


def test_other_groups_may_repeat_what_the_optimizer_has():
    OSD([{"params": [parameter(8, 12)], "rank": 2}, {"params": [parameter(12)], "scale": 0.25}], scale=0.25)
    OSD([{"params": [parameter(8, 12)], "rank": 2}, {"params": [parameter(12)], "scale": 1.0}], scale=0.25)
    OSD([{"params": [parameter(8, 12)], "rank": 2}, {"params": [parameter(12)], "scale": 1, "alpha": 5}])  # integers
    OSD([parameter(8, 12)], scale=1, alpha=5)


@pytest.mark.parametrize("given", [{"init": "svd"}, {"scale": 0.5}], ids=str)
def test_what_needs_a_rank_is_refused_where_no_group_has_one(given: dict):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}`.* has no effect: no parameter group has a `rank`"):
        OSD([parameter(8, 12)], **given)


def test_float16_weights_are_refused_where_they_are_projected():
    half = nn.Parameter(torch.randn(8, 12).half())
    with pytest.raises(ValueError, match=r"parameter 0 is float16.*dtype=torch\.bfloat16"):
        OSD([half], rank=2)
    OSD([half])


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ValueError, match="`seed` .* must be an integer >= 0 and < 4294967296"):
        OSD([parameter(8, 12)], rank=2, seed=2**32)


def test_groups_can_make_another_optimizer():
    groups = [{"params": [parameter(8, 12)], "rank": 2}]
    first, second = OSD(groups), OSD(groups)
    assert groups[0].keys() == {"params", "rank"}
    assert first.param_groups[0] is not second.param_groups[0]
    assert first.param_groups[0]["sides"] == second.param_groups[0]["sides"] == ["left"]


def test_one_cycle_says_that_there_is_no_momentum_to_cycle_unless_there_is():
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        OneCycleLR(OSD([parameter(8, 12)], rank=2), 0.1, total_steps=10)
    OneCycleLR(OSD([parameter(8, 12)], rank=2), 0.1, total_steps=10, cycle_momentum=False)
    p = parameter(8, 12)
    optimizer = OSD([p], rank=2, betas=(0.9, 0.99))
    schedule = OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9


def test_a_compiled_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    plain, compiled = (hf_osd.create_osd_optimizer(own, rank=2) for own in (model, torch.compile(model)))
    assert [group["param_names"] for group in compiled.param_groups] == [
        group["param_names"] for group in plain.param_groups
    ]
