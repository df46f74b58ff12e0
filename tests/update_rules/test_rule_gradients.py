"""An update rule reads a gradient of any memory layout and leaves it alone."""

import pytest
import torch
from rule_runs import LR, SHAPES, osd, train
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.optim.step.gradients import check_gradients
from hf_osd.update_rules import RULES, RuleStep, build_rule


def mixed_layout(step: int, G: Tensor) -> Tensor:
    return G.t().contiguous().t() if step % 2 else G


@pytest.mark.parametrize("rule", list(RULES))
def test_the_memory_layout_of_a_gradient_does_not_matter(rule):
    # AdamW's fused kernel walks through memory, whatever the strides are.
    shape = (67, 71)
    mixed, plain = train(osd(rule), shape, steps=10, change=mixed_layout)[0], train(osd(rule), shape, steps=10)[0]
    # The same numbers; sums for Adafactor's means may run in another order, a few 1e-7 of entries about 1, times lr.
    torch.testing.assert_close(mixed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("transposed", ["gradient", "parameter"])
def test_a_transposed_parameter_moves_like_a_contiguous_one(rule, transposed):
    generator = torch.Generator().manual_seed(0)
    W, plain = torch.randn(67, 71, generator=generator), []
    for layout in (False, True):
        p = nn.Parameter(W.t().contiguous().t() if layout and transposed == "parameter" else W.clone())
        optimizer, draw = OSD([p], LR, weight_rule=rule), torch.Generator().manual_seed(1)
        for _ in range(5):
            G = torch.randn(67, 71, generator=draw)
            p.grad = G.t().contiguous().t() if layout else G
            optimizer.step()
        plain.append((p.detach(), optimizer.state[p]))
    (a, state_a), (b, state_b) = plain
    # As above: order of sums only.
    torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    for name, value in state_a.items():  # a checkpoint means the same for both
        if value.dtype != torch.uint8:
            torch.testing.assert_close(state_b[name], value, rtol=1e-5, atol=1e-7)  # order of sums
        else:
            assert torch.equal(state_b[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(RULES))
def test_a_direction_has_the_shape_and_dtype_of_the_gradient_and_leaves_it_alone(name, shape, dtype):
    torch.manual_seed(0)
    rule = build_rule(name)
    moments = {moment.name: torch.zeros(moment.shape, dtype=dtype) for moment in rule.moments(shape)}
    G = torch.randn(shape, dtype=dtype)
    kept = G.clone()
    D = rule.direction(G, RuleStep(moments, torch.tensor(1.0), check_gradients([G])[0]))
    assert D.shape == G.shape and D.dtype == dtype
    assert (D * G).sum() > 0  # its negative descends
    assert torch.equal(G, kept)
    assert all(value.dtype == dtype for value in moments.values())


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_step_leaves_the_gradient_alone(rule, rank):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(67, 71))
    start, optimizer = p.detach().clone(), OSD([p], LR, weight_rule=rule, rank=rank, weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        G, kept = p.grad, p.grad.clone()
        optimizer.step()
        assert p.grad is G and torch.equal(G, kept)
    assert not torch.equal(p, start)
