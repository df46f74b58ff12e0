"""Every update rule against an implementation of somebody else, through the optimizer and by itself."""

import bitsandbytes
import pytest
import torch
from rule_runs import LR, SHAPES, Make, osd, train
from torch import Tensor, nn
from transformers.optimization import Adafactor

from hf_osd.optim.step.gradients import check_gradients
from hf_osd.update_rules import RuleStep, build_rule


# From 4096 elements on moments have 8 bits; 67 * 71 and 17 * 300 are no multiples of the block of 256. The last one
# stays in float32.
SHAPES_8BIT = [(67, 71), (17, 300), (40, 24)]


def largest_difference(make: Make, reference: Make, shape: tuple[int, ...], **how) -> float:
    a, b = train(make, shape, **how)[0], train(reference, shape, **how)[0]
    start = train(reference, shape, **{**how, "steps": 0})[0]
    assert (b - start).abs().mean() > LR  # the run has moved far beyond the tolerances below
    return (a - b).abs().max().item()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_equals_torch(shape, weight_decay):
    options = {"betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": weight_decay}

    def reference(params):
        return torch.optim.AdamW(params, LR, **options)

    # Entries stay below 4: float32 rounds at 2.4e-7, twice a step at most, which adds up like a random walk of 100.
    assert largest_difference(osd("adamw", **options), reference, shape) < 5e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_equals_torch_in_float64(shape, weight_decay):
    def reference(params):
        return torch.optim.AdamW(params, LR, weight_decay=weight_decay)

    # 100 steps of rounding at 4e-16.
    difference = largest_difference(osd("adamw", weight_decay=weight_decay), reference, shape, dtype=torch.float64)
    assert difference < 1e-12


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_lion_equals_bitsandbytes(shape, weight_decay):
    options = {"betas": (0.8, 0.95), "weight_decay": weight_decay}

    def reference(params):
        return bitsandbytes.optim.Lion(params, LR, optim_bits=32, **options)

    # Both move by the sign times lr: as long as no sign differs, which no random gradient brings about, only the
    # rounding of the weights (2.4e-7 a step) can.
    assert largest_difference(osd("lion", **options), reference, shape) < 5e-6


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_sgd_equals_torch(shape, momentum):
    def reference(params):
        return torch.optim.SGD(params, LR, momentum=momentum)

    # float32 rounding as for AdamW.
    assert largest_difference(osd("sgd", momentum=momentum), reference, shape) < 5e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 6, 10)])
def test_adafactor_equals_transformers(shape, weight_decay):
    def reference(params):
        return Adafactor(params, LR, scale_parameter=False, relative_step=False, weight_decay=weight_decay)

    # Without decay the rounding of the direction (a few 1e-7 of entries about 1) times lr. The reference subtracts
    # lr * decay * W, we multiply by 1 - lr * decay, whose rounding (3e-8) is the same at each of the 100 steps.
    tolerance = 2e-5 if weight_decay else 5e-6
    assert largest_difference(osd("adafactor", weight_decay=weight_decay), reference, shape) < tolerance


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES_8BIT)
def test_adamw8bit_equals_bitsandbytes(shape, weight_decay):
    def reference(params):
        return bitsandbytes.optim.AdamW8bit(params, LR, weight_decay=weight_decay)

    (a, optimizer), (b, other) = train(osd("adamw8bit", weight_decay=weight_decay), shape), train(reference, shape)
    small = a.numel() < 4096
    assert optimizer.state[a]["exp_avg"].dtype == (torch.float32 if small else torch.uint8)
    assert other.state[b]["state1"].dtype == (torch.float32 if small else torch.uint8)
    difference = (a - b).abs()
    # float32 rounding as above; where it makes a moment cross the border between two codes, once in thousands of
    # elements, that element's path goes apart by the width of a code, a small part of one step.
    assert (difference > 5e-6).float().mean() < 5e-3
    assert difference.max() < LR
    # A trajectory check: 5e-6 and the few that left it.
    assert difference.mean() < 1e-5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES_8BIT)
def test_lion8bit_equals_bitsandbytes(shape, weight_decay):
    def reference(params):
        return bitsandbytes.optim.Lion8bit(params, LR, weight_decay=weight_decay)

    (a, optimizer), (b, _) = train(osd("lion8bit", weight_decay=weight_decay), shape), train(reference, shape)
    assert optimizer.state[a]["exp_avg"].dtype == (torch.float32 if a.numel() < 4096 else torch.uint8)
    difference = (a - b).abs()
    # As for adamw8bit; a sign that differs moves an element by 2 lr.
    assert (difference > 5e-6).float().mean() < 5e-3
    assert difference.mean() < 1e-4


def reference_for(rule: str, params: list[Tensor]) -> torch.optim.Optimizer:
    return {
        "adamw": lambda: torch.optim.AdamW(params, 1.0, weight_decay=0.0),
        "lion": lambda: bitsandbytes.optim.Lion(params, 1.0),
        "sgd": lambda: torch.optim.SGD(params, 1.0, momentum=0.9),
        "adafactor": lambda: Adafactor(params, 1.0, scale_parameter=False, relative_step=False),
    }[rule]()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_a_direction_is_what_the_reference_moves_by_at_lr_1(name, shape):
    torch.manual_seed(0)
    rule = build_rule(name)
    moments = {moment.name: torch.zeros(moment.shape) for moment in rule.moments(shape)}
    p = nn.Parameter(torch.zeros(shape))
    reference = reference_for(name, [p])
    for step in range(1, 11):
        G = torch.randn(shape)
        D = rule.direction(G, RuleStep(moments, torch.tensor(float(step)), check_gradients([G])[0]))
        with torch.no_grad():
            p.zero_()
        p.grad = G.clone()
        reference.step()
        # A few float32 roundings of numbers about 1.
        torch.testing.assert_close(D, -p.detach(), rtol=1e-5, atol=1e-6)
