"""Options of parameter groups that would do nothing, and what groups share with torch's own optimizers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

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


SCHEDULES = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("given", [{}, {"betas": (0.9, 0.98)}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "lion", "lion8bit", "sgd"])
def test_schedules_cycle_the_momentum(rule: str, schedule: str, given: dict):
    given = {"momentum": 0.8} if given and rule == "sgd" else given
    params = [parameter(8, 12), parameter(12)]
    optimizer = OSD([{"params": params[:1], "rank": 2}, {"params": params[1:]}], weight_rule=rule, **given)
    betas = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}.get(rule.removesuffix("8bit"))
    name, expected = ("momentum", 0.9) if rule == "sgd" else ("betas", betas)
    expected = given.get(name, expected)
    assert [group[name] for group in optimizer.param_groups] == [expected] * 2
    cycle = SCHEDULES[schedule](optimizer)
    saved = optimizer.state_dict()
    if not given:  # as it was saved once
        saved["param_groups"] = [own | {name: None} for own in saved["param_groups"]]
    optimizer.load_state_dict(saved)
    seen = []
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        cycle.step()
        seen += [group[name] if rule == "sgd" else group[name][0] for group in optimizer.param_groups]
        assert rule == "sgd" or all(group[name][1] == expected[1] for group in optimizer.param_groups)
    assert len(set(seen)) > 2
    if not given:
        optimizer.add_param_group({"params": parameter(3), "weight_rule": "adafactor"})  # which has neither


@pytest.mark.parametrize(
    "own", [{"weight_rule": "adafactor"}, {"weight_rule": "adamw", "projection_rule": "lion"}], ids=str
)
def test_one_cycle_says_that_there_is_no_momentum_to_cycle(own: dict):
    """Of AdamW and Lion each has betas of its own, which a schedule would make one."""
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        OneCycleLR(OSD([parameter(8, 12)], rank=2, **own), 0.1, total_steps=10)
    OneCycleLR(OSD([parameter(8, 12)], rank=2, **own), 0.1, total_steps=10, cycle_momentum=False)
    OneCycleLR(OSD([parameter(8, 12)], rank=2, weight_rule="adamw", betas=(0.9, 0.99)), 0.1, total_steps=10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_cycle_the_momentum_of_the_weights(schedule: str):
    """And not, instead, that of a P that moves by another rule."""
    options = {"rank": 2, "weight_rule": "sgd", "projection_rule": "adamw", "betas": (0.8, 0.99)}
    p = parameter(8, 12)
    optimizer = OSD([p], **options)
    cycle = SCHEDULES[schedule](optimizer)
    seen = []
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step()
        cycle.step()
        seen.append(optimizer.weight_of(p).rules.weight.momentum)
        assert optimizer.weight_of(p).rules.projection.betas == (0.8, 0.99)
    assert len(set(seen)) > 2
    optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": parameter(12, 8)})
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.99)
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        OneCycleLR(OSD([p], **options | {"weight_rule": "adafactor"}), 0.1, total_steps=10)


def test_a_compiled_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    plain, compiled = (hf_osd.create_osd_optimizer(own, rank=2) for own in (model, torch.compile(model)))
    assert [group["param_names"] for group in compiled.param_groups] == [
        group["param_names"] for group in plain.param_groups
    ]


def test_pruned_weights_stay_at_zero_with_a_hook():
    """With masked gradients alone they move: P is dense."""
    W = parameter(16, 24)
    mask = torch.rand(16, 24) > 0.5
    optimizer = OSD([W], rank=4, lr=1e-2)
    moved = {}
    for hooked in (False, True):
        W.data *= mask
        if hooked:
            optimizer.register_step_post_hook(lambda *_: W.data.mul_(mask))
        for _ in range(2):
            W.grad = torch.randn(16, 24) * mask
            optimizer.step()
        moved[hooked] = W[~mask].abs().max().item()
    assert moved[False] > 1e-3 and moved[True] == 0


def test_a_tensor_as_learning_rate():
    lr = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = OSD([{"params": [parameter(8, 12)], "rank": 2, "lr": lr}, {"params": [parameter(12)]}], lr=lr)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="`lr` of parameter group 0 must be a number"):
        OSD([parameter(8, 12)], lr=torch.ones(2))


def test_keys_of_ones_own_stay_in_a_group():
    own = {
        "lr_mult": 0.1,
        "layer_id": 3,
        "weight_decay_mult": 0.0,
        "maximize": False,
        "max_lr": 1.0,
        "size": 3,
        "unit": "a",
    }
    optimizer = OSD([{"params": [parameter(8, 12)], "rank": 2, **own}, {"params": [parameter(12)]}])
    assert optimizer.param_groups[0].items() >= own.items()
    other = OSD([{"params": [parameter(8, 12)], "rank": 2}, {"params": [parameter(12)]}])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0].items() >= own.items()


def test_a_group_added_later_needs_no_names():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    model[0].requires_grad_(False)

    def unfrozen() -> OSD:
        optimizer = hf_osd.create_osd_optimizer(model, rank=2)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-4})
        optimizer.add_param_group({"params": parameter(3), "name": "loss"})
        return optimizer

    optimizer, resumed = unfrozen(), unfrozen()
    model[0].requires_grad_(True)
    for _ in range(2):
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == ["1.weight", "1.bias", "parameter 2", "parameter 3", "parameter 4"]
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.state[model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_a_group_that_takes_the_place_of_another_has_a_name_of_its_own():
    optimizer = OSD([{"params": [("a", parameter(8, 12))], "rank": 2}])
    for _ in range(2):
        optimizer.add_param_group({"params": [parameter(12)]})
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": [parameter(12), parameter(4)]})
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["a"],
        ["parameter 2"],
        ["parameter 3", "parameter 4"],
    ]


def test_a_group_that_comes_later_is_warned_of_as_the_first_are():
    W, V = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(4, 64))
    optimizer = OSD([{"params": [W], "rank": 8}], lr=1e-3)
    with pytest.warns(UserWarning, match="projected at full rank"), pytest.warns(UserWarning, match="P turns far"):
        optimizer.add_param_group({"params": [V], "rank": 8, "lr": 1.0})
