"""A step with a gradient that is not finite is skipped: nothing changes but the count of skipped steps."""

import pytest
import torch
from rule_runs import LR
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.optim.step.gradients import check_gradients
from hf_osd.update_rules import RULES, RuleStep, build_rule


@pytest.mark.parametrize("shape", [(67, 71), (24, 40), (33,)])
@pytest.mark.parametrize("name", list(RULES))
def test_a_skipped_direction_is_zero_and_keeps_the_moments(name, shape):
    torch.manual_seed(0)
    rule, step = build_rule(name), torch.tensor(3.0)
    moments = {moment.name: torch.randn(moment.shape).abs_() for moment in rule.moments(shape)}
    kept = {key: value.clone() for key, value in moments.items()}
    bad = torch.randn(shape)
    bad.view(-1)[1] = float("nan")
    check = check_gradients([bad])[0]
    D = rule.direction(torch.zeros(shape), RuleStep(moments, step, check))
    assert torch.equal(D, torch.zeros(shape))
    assert step == 3
    assert all(torch.equal(moments[key], kept[key]) for key in kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("moment_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_skipped_step_changes_no_bit(rule, moment_dtype, value):
    if moment_dtype and (RULES[rule].eight_bit or rule == "adafactor"):
        moment_dtype = None
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in [(67, 71), (24, 40), (33,)]]
    optimizer = OSD(params, LR, weight_rule=rule, weight_decay=0.1, moment_dtype=moment_dtype)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
        p.grad.view(-1)[5] = value
    optimizer.step()
    for p, (W, state) in zip(params, before, strict=True):
        assert torch.equal(p, W)
        assert optimizer.state[p].keys() == state.keys()
        for name, entry in state.items():
            expected = entry + 1 if name == "skipped_steps" else entry
            assert torch.equal(optimizer.state[p][name], expected), name


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_run_with_broken_gradients_equals_the_run_without_them(rule, first):
    torch.manual_seed(0)
    shapes, grads = [(67, 71), (24, 40), (33,)], []
    for _ in range(6):
        grads.append([torch.randn(shape) for shape in shapes])
    broken = {0 if first else 2: float("nan"), 4: float("inf")}

    def run(insert: bool) -> tuple[list[Tensor], list[dict]]:
        generator = torch.Generator().manual_seed(3)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = OSD(params, LR, weight_rule=rule, weight_decay=0.1)
        for step, row in enumerate(grads):
            if insert and step in broken:
                for p, G in zip(params, row, strict=True):
                    p.grad = G.clone()
                    p.grad.view(-1)[-1] = broken[step]
                optimizer.step()
            for p, G in zip(params, row, strict=True):
                p.grad = G
            optimizer.step()
        return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]

    (weights, states), (plain, plain_states) = run(True), run(False)
    for W, V in zip(weights, plain, strict=True):
        assert torch.equal(W, V)
    for state, other in zip(states, plain_states, strict=True):
        assert state.pop("skipped_steps") == 2 and other.pop("skipped_steps") == 0
        assert all(torch.equal(state[name], other[name]) for name in other)
