"""Every update rule against an implementation of somebody else, through the optimizer and by itself."""

import sys
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from hf_osd import OSD
from hf_osd.optim import param_step, state_bytes
from hf_osd.optim.gradients import check_gradients
from hf_osd.update_rules import RULES, build_rule, build_storage, require_bitsandbytes


LR = 1e-2
STEPS = 100
SHAPES = [(24, 40), (40, 24), (33,)]
# From 4096 elements on moments have 8 bits; 67 * 71 and 17 * 300 are no multiples of the block of 256. The last one
# stays in float32.
SHAPES_8BIT = [(67, 71), (17, 300), (40, 24)]
ELEMENTWISE = ["adamw", "adamw8bit", "lion", "lion8bit", "sgd"]

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def train(
    make: Make,
    shape: tuple[int, ...],
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    change: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter after `steps` random gradients, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    optimizer = make([p])
    for step in range(steps):
        G = torch.randn(shape, generator=generator, dtype=dtype)
        p.grad = G if change is None else change(step, G)
        optimizer.step()
    return p, optimizer


def osd(rule: str, **options) -> Make:
    return lambda params: OSD(params, LR, weight_rule=rule, **options)


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
        D = rule.direction(G, moments, torch.tensor(float(step)), check_gradients([G])[0])
        with torch.no_grad():
            p.zero_()
        p.grad = G.clone()
        reference.step()
        # A few float32 roundings of numbers about 1.
        torch.testing.assert_close(D, -p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(RULES))
def test_a_direction_has_the_shape_and_dtype_of_the_gradient_and_leaves_it_alone(name, shape, dtype):
    torch.manual_seed(0)
    rule = build_rule(name)
    moments = {moment.name: torch.zeros(moment.shape, dtype=dtype) for moment in rule.moments(shape)}
    G = torch.randn(shape, dtype=dtype)
    kept = G.clone()
    D = rule.direction(G, moments, torch.tensor(1.0), check_gradients([G])[0])
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
    D = rule.direction(torch.zeros(shape), moments, step, check)
    assert torch.equal(D, torch.zeros(shape))
    assert step == 3
    assert all(torch.equal(moments[key], kept[key]) for key in kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("moment_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_skipped_step_changes_no_bit(rule, moment_dtype, value):
    if moment_dtype and RULES[rule].eight_bit:
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


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_pieces_change_nothing(rule, monkeypatch):
    # 8-bit codes do not show that they were decoded in pieces only where a piece starts at a block.
    shape, options = (67, 71), {"weight_decay": 0.1}
    whole, optimizer = train(osd(rule, **options), shape, steps=20)
    monkeypatch.setattr(param_step, "PIECE", 512)
    pieces, other = train(osd(rule, **options), shape, steps=20)
    slices = list(param_step._pieces(pieces, pieces, build_rule(rule)))
    assert len(slices) == 10 and slices[-1] == slice(4608, 4757)
    # The kernels are elementwise and pieces start at multiples of the vector length.
    assert torch.equal(whole, pieces)
    for name, value in optimizer.state[whole].items():
        assert torch.equal(value, other.state[pieces][name]), name


def test_adafactor_is_never_cut_into_pieces(monkeypatch):
    monkeypatch.setattr(param_step, "PIECE", 512)
    p = torch.zeros(67, 71)
    assert list(param_step._pieces(p, p, build_rule("adafactor"))) == [None]


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd", "adafactor"])
def test_bfloat16_moments_take_half_the_bytes_and_stay_close(rule):
    shape = (24, 40)
    p, optimizer = train(osd(rule), shape)
    q, half = train(osd(rule, moment_dtype="bfloat16"), shape)
    counters = 2 * 4  # step and skipped_steps
    moments = state_bytes(optimizer) - counters
    assert moments > 0 and (state_bytes(half) - counters) * 2 == moments
    assert all(value.dtype == torch.bfloat16 for value in half.state[q].values() if value.ndim)
    start = train(osd(rule), shape, steps=0)[0]
    relative = ((q - p).norm() / (p - start).norm()).item()
    # bfloat16 keeps 8 bits: a moment is off by up to 2^-9 after each step, and remembers the last 10 or so, with
    # random signs: about 2^-9 sqrt(10) < 2^-7. Lion moves by signs: one that flips, which only entries within that
    # 2^-7 of zero can, costs 2 lr: once in 100 steps for an element is 0.02 of the largest movement, and elements
    # have moved a few times less.
    assert 0 < relative < (2**-4 if rule == "lion" else 2**-6)


def test_storages_of_the_table():
    assert {name for name, entry in RULES.items() if entry.eight_bit} == {"adamw8bit", "lion8bit"}
    for name, entry in RULES.items():
        assert isinstance(build_rule(name), entry.rule)
        moment = build_rule(name).moments((64, 80))[0]
        dtypes = [spec.dtype for spec in build_storage(name).spec(moment, "", torch.float32).values()]
        assert dtypes == ([torch.uint8, torch.float32] if entry.eight_bit else [torch.float32])


@pytest.mark.parametrize(
    "options", [{"weight_rule": "adamw8bit"}, {"weight_rule": "adamw", "projection_rule": "lion8bit", "rank": 4}]
)
def test_without_bitsandbytes_the_message_names_the_way_out(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*without `8bit`"):
        require_bitsandbytes()
    p = nn.Parameter(torch.randn(8, 12))
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        OSD([p], **options)
    optimizer = OSD([nn.Parameter(torch.randn(8, 12))])  # the rules in float32 do without it
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1
