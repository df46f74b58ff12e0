"""Every update rule against an implementation of somebody else, through the optimizer and by itself."""

import bitsandbytes
import pytest
import torch
from exact_8bit import assert_rounded
from rule_runs import LR, SHAPES, Make, osd, train
from torch import Tensor, nn
from transformers.optimization import Adafactor

from hf_osd import OSD
from hf_osd.optim.step.gradients import check_gradients
from hf_osd.update_rules import RuleStep, build_rule
from hf_osd.update_rules.blockwise import decode, encode


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
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_8_bit_rules_are_the_others_between_two_roundings(rule, shape, weight_decay):
    """At each step: from the same moments the same weights, and the moments at the nearest code.

    Not bitsandbytes' own on the CPU: in 0.50.2 its encoder there often chooses another code than the nearest.
    """
    torch.manual_seed(0)
    W, V = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizer = OSD([W], LR, weight_rule=rule + "8bit", weight_decay=weight_decay)
    if rule == "adamw":
        reference: torch.optim.Optimizer = torch.optim.AdamW([V], LR, weight_decay=weight_decay)
    else:
        reference = bitsandbytes.optim.Lion([V], LR, betas=(0.9, 0.99), weight_decay=weight_decay, optim_bits=32)
    names = {"exp_avg": "state1"} if rule == "lion" else {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    W.grad = V.grad = torch.randn(shape)
    optimizer.step(), reference.step()
    for _ in range(20):
        moments = optimizer.weight_of(W).moments
        optimizer.weight_of(W).slot.state = optimizer.state[W]
        for name, value in moments.load()[0].items():
            reference.state[V][names[name]].copy_(value)
        V.data.copy_(W.data)
        W.grad = V.grad = torch.randn(shape) * torch.rand(shape) ** 4
        optimizer.step(), reference.step()
        torch.testing.assert_close(W.data, V.data, rtol=0, atol=5e-6)
        optimizer.weight_of(W).slot.state = optimizer.state[W]
        for name, value in moments.load()[0].items():
            exact = reference.state[V][names[name]]
            if W.numel() < 4096:
                torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-7)
            else:
                assert_rounded(value, exact.double(), signed=name == "exp_avg")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [256, 5000, 300])
def test_codes_are_nearest(size, signed):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-8, 0, size)  # of all sizes in a block
    x = x if signed else x.abs()
    assert_rounded(decode(*encode(x, signed, 256), signed, 256), x.double(), signed)


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
