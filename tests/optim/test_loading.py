"""Refusing a saved state that does not fit, loading the part that does, and the ways that others save it."""

import copy
import warnings

import pytest
import torch
from named_parameters import make, run
from torch import nn

from hf_osd import OSD


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rank": 5}, "rank 6 left .*rank 5 left"),
        ({"side": "right"}, "rank 6 left .*rank 6 right"),
        ({"weight_rule": "lion"}, "weight_rule: adamw.*weight_rule: lion"),
        ({"projection_rule": "sgd"}, "projection_rule: adamw.*projection_rule: sgd"),
        ({"subspace": "static"}, "subspace: online_pca.*subspace: static"),
        ({"moment_dtype": "bfloat16"}, "moment_dtype: float32.*moment_dtype: bfloat16"),
        ({"projection_dtype": "bfloat16"}, "projection_dtype: float32.*projection_dtype: bfloat16"),
        ({"projection_dtype": "int8"}, "projection_dtype: float32.*projection_dtype: int8"),
    ],
)
def test_another_setting_is_refused_with_a_table(changed: dict, told: str):
    params, optimizer = make()
    run(params, optimizer, range(2))
    other_params, other = make(**changed)
    run(other_params, other, range(1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=f"(?s)saved by another optimizer.*parameter +checkpoint +this run.*A .*{told}"
    ):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entries.items())


def test_a_state_of_adamw_is_called_that():
    params, optimizer = make()
    others = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match="This is not a state of hf_osd: begin with the weights alone"):
        optimizer.load_state_dict(others.state_dict())


def test_another_selection_is_refused():
    params, optimizer = make()
    run(params, optimizer, range(2))
    A, B, b = params
    other = OSD([{"params": [("A", A)], "rank": 6}, {"params": [("B", B), ("b", b)]}], lr=1e-2)
    with pytest.raises(ValueError, match=r"(?s)2 of 3 parameters differ.*B .*rank 6 right.*full size"):
        other.load_state_dict(optimizer.state_dict())
    more = OSD([{"params": [("A", A), ("B", B), ("C", nn.Parameter(torch.randn(9, 8)))], "rank": 6}], lr=1e-2)
    with pytest.raises(ValueError, match=r"(?s)1 of 3 parameters differ, 1 are in .*C +- +has it.*b +has it +-"):
        more.load_state_dict(optimizer.state_dict())


def test_parameters_of_other_names_are_counted_once():
    params, optimizer = make()
    run(params, optimizer, range(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [f"wrapped.{name}" for name in group["param_names"]]
    with pytest.raises(ValueError, match="another optimizer: 3 of 3 parameters differ, 3 are in the checkpoint alone"):
        make()[1].load_state_dict(state)


def test_partial_load_takes_what_fits_and_starts_the_rest_anew():
    params, optimizer = make()
    run(params, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.004
    A, B, b = (nn.Parameter(p.detach().clone()) for p in params)
    groups = [{"params": [("A", A)], "rank": 6}, {"params": [("B", B)], "rank": 4}, {"params": [("b", b)]}]
    other = OSD(groups, lr=1e-2, partial_load=True)
    with pytest.warns(UserWarning, match=r"(?s)1 of 3 parameters differ from the saved state and start anew.*rank 4"):
        other.load_state_dict(optimizer.state_dict())
    saved = optimizer.state[params[0]]
    assert all(torch.equal(value, other.state[A][name]) for name, value in saved.items())
    assert other.state[b].keys() == optimizer.state[params[2]].keys()  # in another group now, but the same
    assert B not in other.state and [group["lr"] for group in other.param_groups] == [0.004] * 3
    run([A, B, b], other, range(3, 5))
    run(params, optimizer, range(3, 5))
    assert torch.equal(A, params[0]) and torch.equal(b, params[2]) and other.state[B]["projection"].shape == (16, 4)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize(
    ("grown", "shape"),
    [("A", (24, 30)), ("A", (20, 34)), ("A", (32, 30)), ("A", (5, 20, 30)), ("A", (30,)), ("b", (33,)), ("b", (6, 5))],
)
def test_partial_load_starts_another_shape_anew(rule: str, grown: str, shape: tuple[int, ...]):
    params, optimizer = make(weight_rule=rule)
    run(params, optimizer, range(2))
    own = {"A": nn.Parameter(torch.randn(20, 30)), "B": nn.Parameter(torch.randn(40, 16)), "b": params[2]}
    own[grown] = nn.Parameter(torch.randn(shape))
    projected = {name: 6 if p.ndim > 1 and name != "b" else None for name, p in own.items()}
    groups = [
        {"params": [(name, own[name]) for name in own if projected[name] == rank], "rank": rank} for rank in (6, None)
    ]
    other = OSD(groups, lr=1e-2, weight_rule=rule)
    with pytest.raises(ValueError, match=rf"(?s)state of {grown} does not fit|differ.*\n  {grown} "):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    other = OSD(groups, lr=1e-2, weight_rule=rule, partial_load=True)
    with pytest.warns(UserWarning, match=rf"1 of 3 parameters differ .* start anew.\n.*\n  {grown} "):
        other.load_state_dict(optimizer.state_dict())
    assert own[grown] not in other.state
    for name, p in zip("ABb", params, strict=True):
        if name != grown:
            assert all(torch.equal(v, other.state[own[name]][key]) for key, v in optimizer.state[p].items())
    run(list(own.values()), other, range(2, 4))
    assert all(p.isfinite().all() for p in own.values())


def test_partial_load_takes_the_learning_rate_of_each_group():
    def groups(rank: int) -> list[dict]:
        torch.manual_seed(0)
        A, b = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(30))
        return [{"params": [("b", b)], "lr": 1e-4}, {"params": [("A", A)], "rank": rank, "lr": 1e-2}]

    saved = OSD(groups(6))
    run([p for group in saved.param_groups for p in group["params"]], saved, range(2))
    for group in saved.param_groups:
        group["lr"] /= 2
    other = OSD(groups(5)[::-1], partial_load=True)
    with pytest.warns(UserWarning, match="1 of 2 parameters differ"):
        other.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in other.param_groups] == [5e-3, 5e-5]


def test_partial_load_does_not_mind_another_place():
    params, optimizer = make()
    run(params, optimizer, range(3))
    A, B, b = (nn.Parameter(p.detach().clone()) for p in params)
    other = OSD([{"params": [("B", B)], "rank": 6}, {"params": [("b", b)]}], lr=1e-2, partial_load=True)
    with pytest.warns(UserWarning, match=r"(?s)0 of 2 parameters differ.*, 1 are in the checkpoint alone.*A +has it"):
        other.load_state_dict(optimizer.state_dict())
    for live, saved in ((B, params[1]), (b, params[2])):
        assert all(torch.equal(value, other.state[live][name]) for name, value in optimizer.state[saved].items())


@pytest.mark.parametrize("options", [{"weight_rule": "sgd"}, {"projection_rule": "sgd"}])
def test_partial_load_starts_anew_what_keeps_other_moments(options: dict):
    params, optimizer = make(momentum=0.0, **options)
    run(params, optimizer, range(2))
    A, B, b = (nn.Parameter(p.detach().clone()) for p in params)
    groups = [{"params": [("A", A)], "rank": 6}, {"params": [("B", B)], "rank": 4}, {"params": [("b", b)]}]
    other = OSD(groups, lr=1e-2, partial_load=True, **options)
    with pytest.warns(UserWarning, match=r"(?s)start anew.*\n  A +[^\n]* [^\n]*momentum_buffer"):
        other.load_state_dict(optimizer.state_dict())
    assert A not in other.state and (b in other.state) == ("weight_rule" not in options)
    run([A, B, b], other, range(2, 4))
    assert all(p.isfinite().all() for p in (A, B, b))


def test_partial_load_says_whose_options_what_continues_goes_by():
    params, optimizer = make(alpha=5.0, scale=1.0)
    run(params, optimizer, range(2))
    A, B, b = (nn.Parameter(p.detach().clone()) for p in params)
    groups = [{"params": [("A", A)], "rank": 6}, {"params": [("B", B)], "rank": 4}, {"params": [("b", b)]}]
    other = OSD(groups, lr=1e-2, alpha=1.0, scale=0.25, partial_load=True)
    said = r"options of this run: alpha=1.0 \(this run\) instead of 5.0; scale=0.25 .* 1.0\.$"
    with pytest.warns(UserWarning, match="start anew"), pytest.warns(UserWarning, match=said):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["alpha"] == 1.0 and A in other.state


def test_parameters_of_one_name_are_refused():
    a, b = nn.Linear(20, 30), nn.Linear(20, 30)
    with pytest.raises(ValueError, match=r"Two parameters are called weight.*named_parameters\(prefix"):
        OSD([{"params": list(module.named_parameters())} for module in (a, b)])
    OSD([{"params": list(module.named_parameters(prefix=name))} for name, module in (("a", a), ("b", b))])


def test_saved_options_are_restored_and_said():
    params, optimizer = make(alpha=2.0)
    run(params, optimizer, range(2))
    _, other = make(alpha=7.0)
    with pytest.warns(UserWarning, match=r"alpha=2.0 \(checkpoint\) instead of 7.0"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["alpha"] == 2.0


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, None), (plateau, plateau), (constant, constant), (constant, None), (constant, plateau)],
)
def test_a_restored_learning_rate_is_said(first, second):
    (params, optimizer), (_, other), (_, same) = make(lr=1e-3), make(lr=1e-5), make(lr=1e-3)
    run(params, optimizer, range(2))
    for each, schedule in ((optimizer, first), (other, second), (same, second)):
        if schedule is not None:
            schedule(each)
    with pytest.warns(UserWarning, match=r"restored: lr=0.001 \(checkpoint\) instead of 1e-05\.$"):
        other.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == same.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("between", [False, True])
def test_what_a_schedule_has_moved_is_no_other_option(between):
    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20)

    (params, optimizer), (_, same) = make(lr=1e-3), make(lr=1e-3)
    schedule = cycle(optimizer)
    for step in range(3):
        run(params, optimizer, [step])
        schedule.step()
    if between:  # a schedule that is made later finds all in the groups
        cycle(same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(optimizer.state_dict())
    assert same.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"] != (0.9, 0.999)


def test_a_difference_that_six_digits_do_not_show_is_none():
    (_, optimizer), (_, other) = make(lr=1e-3), make(lr=1e-3 * (1 + 3e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("scheduled", [False, True])
def test_partial_load_says_that_the_learning_rate_is_the_saved_one(scheduled):
    (params, optimizer), (_, other) = make(lr=1e-3), make(lr=1e-5, partial_load=True, rank=5)
    run(params, optimizer, range(2))
    for each in (optimizer, other) if scheduled else ():
        constant(each)
    with pytest.warns(
        UserWarning, match=r"saved learning rate is restored: lr=0.001 \(checkpoint\) instead of 1e-05\.$"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("rank", [5, 6])
def test_projection_lr_is_of_the_learning_rate_that_is_restored(scheduled, rank):
    """Where it was of the run's own, P went at `projection_lr` times the ratio of both: a hundred times it here."""
    options = {"projection_lr": 0.005, "partial_load": True}
    (params, optimizer), (_, other) = make(lr=1e-3, **options), make(lr=1e-5, rank=rank, **options)
    run(params, optimizer, range(2))
    for each in (optimizer, other) if scheduled else ():
        constant(each)
    with pytest.warns(UserWarning) as told:
        other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["lr"] * group["alpha"] == pytest.approx(0.005)
    assert not any("alpha=" in str(one.message) for one in told)  # which nobody has given


def test_a_schedule_begins_with_the_restored_learning_rate():
    (_, optimizer), (_, other), (_, same) = make(lr=1e-3), make(lr=1e-5), make(lr=1e-3)
    for each in (optimizer, other, same):
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.5**step)
    optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.warns(UserWarning, match=r"restored: lr=0.001 \(checkpoint\) instead of 1e-05\.$"):
        other.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == same.param_groups[0]["lr"] == 1e-4


def test_groups_without_names_are_matched_by_position():
    p, q = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(20, 30))
    a = OSD([{"params": [p], "rank": 4}], lr=1e-2)
    run([p], a, range(2))
    b = OSD([{"params": [q], "rank": 4}], lr=1e-2)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.state[p]["projection"], b.state[q]["projection"])
    with pytest.raises(ValueError, match="parameter 0"):
        OSD([{"params": [q], "rank": 5}], lr=1e-2).load_state_dict(a.state_dict())


def test_hooks_see_the_state_and_may_change_it():
    params, others = ([nn.Parameter(torch.ones(12, 20))] for _ in range(2))
    optimizer, other = (OSD([{"params": ps, "rank": 4}], lr=1e-2) for ps in (params, others))
    params[0].grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    seen = []

    def before(own: OSD, state_dict: dict) -> dict:
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(lambda own: seen.append(own.state[others[0]]["step"].item()))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [1.0] and other.param_groups[0]["lr"] == 0.5 and other.param_groups[0]["params"] == others


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_rule": "adamw8bit"}], ids=str)
def test_what_others_keep_in_a_state_is_loaded(options: dict, stepped: bool):
    """Users and libraries put anything there, as into that of torch's optimizers."""
    params, optimizer = make(**options)
    run(params, optimizer, range(2 if stepped else 0))
    own = {"z": torch.ones(3, 2, 4), "n": 3, "note": "abc", "nested": {"a": [torch.ones(1), 2]}, "none": None}
    optimizer.state[params[0]].update(own)
    saved = copy.deepcopy(optimizer.state_dict())
    others, other = make(**options)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(saved)
    loaded = other.state_dict()["state"]
    assert loaded[0].keys() == saved["state"][0].keys() == own.keys() | loaded[1].keys()
    assert torch.equal(loaded[0]["z"], own["z"]) and loaded[0]["nested"] == own["nested"]
    assert [loaded[0][name] for name in ("n", "note", "none")] == [3, "abc", None]
    assert loaded[0]["z"] is not saved["state"][0]["z"]
    run(params, optimizer, range(2, 4)), run(others, other, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
