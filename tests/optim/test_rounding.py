"""Updates of bfloat16 weights: they vanish when rounded to nearest, and add up when rounded at random."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.step import full_weight, rounding, weights
from hf_osd.optim.step.gradients import check_gradients
from hf_osd.optim.step.rounding import round_into_
from hf_osd.update_rules import RULES


BF16 = torch.bfloat16
SHAPES = [(64, 96), (96, 64)]


def noise_of(count: int, seed: int = 0) -> torch.Generator:
    return rounding.noise_of(torch.device("cpu"), seed, count)


def rounded(X: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    W = torch.empty(X.shape, dtype=BF16)
    round_into_(W, X, noise)
    return W


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int16), b.detach().view(torch.int16))


def test_rounding_is_unbiased_between_neighbours():
    X = torch.cat([torch.randn(2000), 1e-39 * torch.randn(100), torch.tensor([1 - 2.0**-9, -(2 - 2.0**-10)])])
    down = (X.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((X.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)  # away from zero
    steps = 2000
    total = torch.zeros(X.shape, dtype=torch.float64)
    for count in range(steps):  # the noise of following steps, as training draws it
        Y = rounded(X, noise_of(count)).float()
        assert ((Y == down) | (Y == up)).all()
        total += Y
    f = ((X - down) / (up - down)).double()
    fraction = (total / steps - down) / (up - down)
    z = (fraction - f) / (f * (1 - f) / steps).sqrt().clamp(min=1 / steps)
    assert z.abs().max() < 6  # 2102 deviates: P < 1e-5
    assert abs(z.mean()) < 5 / math.sqrt(len(z)) and abs(z.square().mean() - 1) < 5 * math.sqrt(2 / len(z)) + 0.05


def test_exact_values_infinities_and_nan_are_kept():
    exact = torch.cat([torch.randn(1000).to(BF16), torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.3e38], dtype=BF16)])
    for count in range(50):
        assert same_bits(rounded(exact.float(), noise_of(count)), exact)
    # NaN with every bit set: a carry would make it -0.0
    nan = torch.tensor([2**31 - 1, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(100)
    assert rounded(nan, noise_of(0)).isnan().all()


def test_noise_differs_between_steps_parameters_and_seeds_and_repeats():
    def draw(count: int, seed: int) -> tuple[int, ...]:
        return tuple(torch.empty(8, dtype=torch.int32).random_(0, 1 << 16, generator=noise_of(count, seed)).tolist())

    pairs = [(count, seed) for count in range(20) for seed in [*range(20), 42 * 1_000_003, 2**32, 2**32 + 1, 2**70]]
    drawn = [draw(*pair) for pair in pairs]
    assert len(set(drawn)) == len(pairs)
    assert drawn == [draw(*pair) for pair in pairs]


def long_run(W0: torch.Tensor, rank: int | None, steps: int, **options) -> torch.Tensor:
    """`steps` steps of relative size 2^-12 towards larger weights."""
    W = nn.Parameter(W0.clone())
    optimizer = OSD([W], lr=2.0**-12, rank=rank, weight_rule="sgd", momentum=0.0, **options)
    W.grad = -W0.clone()
    for _ in range(steps):
        optimizer.step()
    return W.detach().double()


@pytest.mark.parametrize(("rank", "shape"), [(None, (64, 96)), (1, (64, 96)), (1, (96, 64))])
def test_tiny_steps_vanish_without_it_and_add_up_with_it(rank: int | None, shape: tuple[int, int]):
    # Rank one with the projected side of equal entries: W0, P and every product are exact in bfloat16.
    signs, values = torch.randint(2, (64,)) * 2.0 - 1, torch.randint(8, 16, (96,)) / 8
    W0 = torch.outer(signs, values) if shape == (64, 96) else torch.outer(values, signs)
    steps, W = 1000, W0.double()

    def displacement(end: torch.Tensor) -> float:
        return float(((end - W) * W).sum() / W.square().sum())

    assert torch.equal(long_run(W0.to(BF16), rank, steps), W)
    twin = displacement(long_run(W0, rank, steps))
    assert twin == pytest.approx(steps * 2.0**-12, rel=1e-3)  # 1000 float32 roundings of 6e-8, P among them
    # A step s on a grid of spacing u has variance s (u - s) < s u; here s = 2^-12 |w|, u <= 2^-7 * 1.5 |w|.
    sigma = math.sqrt(steps * 2.0**-12 * 2.0**-7 * 1.5 * float(W.pow(4).sum())) / float(W.square().sum())
    assert sigma < 2e-3 < twin / 100
    end = long_run(W0.to(BF16), rank, steps, stochastic_rounding=True)
    assert abs(displacement(end) - twin) < 5 * sigma


@pytest.mark.parametrize("rank", [None, 1])
def test_decay_and_step_are_rounded_once(rank: int | None):
    W = nn.Parameter(torch.full((256, 256), 1.5, dtype=BF16))
    options = {"weight_rule": "sgd", "momentum": 0.0, "weight_decay": 0.5, "stochastic_rounding": True}
    optimizer = OSD([W], lr=2.0**-10, rank=rank, **options)
    W.grad = torch.full_like(W, -1.0)
    optimizer.step()
    # 1.5 - 0.75 / 1024 + 1 / 1024 = 1.5 + 2^-12, a 32nd of the way to 1.5 + 2^-7
    ups = float((W == 1.5 + 2.0**-7).float().mean())
    assert ((W == 1.5) | (W == 1.5 + 2.0**-7)).all()
    assert abs(ups - 1 / 32) < 5 * math.sqrt(1 / 32 * 31 / 32 / W.numel())


def make(rule: str = "adamw", shape: tuple[int, int] = (96, 160), **options):
    generator = torch.Generator().manual_seed(5)
    W, b, s = (nn.Parameter(torch.randn(size, generator=generator).to(BF16)) for size in (shape, (160,), ()))
    groups = [{"params": [W], "rank": 48}, {"params": [b, s]}]
    optimizer = OSD(groups, lr=1e-4, weight_rule=rule, weight_decay=0.1, stochastic_rounding=True, **options)
    return [W, b, s], optimizer


def run(params: list[nn.Parameter], optimizer: OSD, steps: range, broken: tuple[int, ...] = ()) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(BF16)
            if step in broken:
                p.grad.view(-1)[0] = math.nan
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_resumes_bit_for_bit_after_skipped_steps_and_keeps_float32_state(rule: str, shape: tuple[int, int]):
    params, optimizer = make(rule, shape)
    run(params, optimizer, range(4), broken=(0, 2))
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in params]))
    dtypes = {v.dtype for entries in saved[0]["state"].values() for v in entries.values()}
    assert dtypes <= {torch.float32, torch.uint8} and saved[0]["state"][0]["projection"].dtype == torch.float32
    global_state = torch.get_rng_state()
    run(params, optimizer, range(4, 8), broken=(5,))
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(99)  # must not matter
    others, other = make(rule, shape, seed=3)
    with torch.no_grad():
        [q.copy_(p) for q, p in zip(others, saved[1], strict=True)]
    other.load_state_dict(saved[0])
    run(others, other, range(4, 8), broken=(5,))
    assert all(same_bits(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_skipped_step_changes_no_bit(rule: str):
    params, optimizer = make(rule)
    run(params, optimizer, range(2))
    before = [p.detach().clone() for p in params]
    run(params, optimizer, range(2, 5), broken=(2, 3, 4))
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    run(params, optimizer, range(5, 6))
    assert not any(same_bits(p, q) for p, q in zip(params[:2], before, strict=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    def train() -> list[torch.Tensor]:
        torch.manual_seed(1)
        W, b = nn.Parameter(torch.randn(shape).to(BF16)), nn.Parameter(torch.randn(1000).to(BF16))
        # columns of the identity and gradients of few bits: no product depends on the order of its sum
        group = {"params": [W], "rank": 16, "init": [torch.eye(64, 16)]}
        optimizer = OSD(
            [group, {"params": [b]}], 2.0**-9, weight_rule="sgd", subspace="static", stochastic_rounding=True
        )
        for _ in range(3):
            W.grad, b.grad = (torch.randint(-4, 5, p.shape).to(BF16) for p in (W, b))
            optimizer.step()
        return [W.detach(), b.detach()]

    whole = train()
    for piece in (1000, 7 * 64):  # neither divides the rows
        monkeypatch.setattr(rounding, "PIECE", piece)
        monkeypatch.setattr(full_weight, "PIECE", piece)
        assert all(same_bits(a, b) for a, b in zip(whole, train(), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_of_the_size_of_the_weight_is_allocated(side: str, monkeypatch: pytest.MonkeyPatch):
    from torch.profiler import ProfilerActivity, profile

    (m, n), r = (256, 512), 8
    monkeypatch.setattr(rounding, "PIECE", 4 * n)
    W = nn.Parameter(torch.randn(m, n).to(BF16))
    G = torch.randn(m, n).to(BF16)
    optimizer = OSD([W], rank=r, side=side, weight_decay=0.1, stochastic_rounding=True)
    W.grad = G
    optimizer.step()
    # (check_gradients is left out: the norm of a bfloat16 tensor on the CPU is taken of a float32 copy)
    check = check_gradients([G])[0]
    monkeypatch.setattr(weights, "check_gradients", lambda *_: [check])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 0 < largest <= 4 * 2 * r * n  # two of R's size at once; W itself has 2 m n bytes, 8 times as many


def test_refused_where_no_parameter_is_bfloat16():
    message = "`stochastic_rounding` has no effect: no parameter is bfloat16. Load the model with dtype=torch.bfloat16"
    W, b = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12).to(BF16))
    with pytest.raises(ValueError, match=message):
        OSD([W], stochastic_rounding=True)
    with pytest.raises(ValueError, match=message):
        OSD([{"params": [W], "rank": 4, "stochastic_rounding": True}])
    with pytest.raises(ValueError, match=message):
        create_osd_optimizer(nn.Sequential(nn.Linear(8, 8)), rank=4, target_modules=["0"], stochastic_rounding=True)
    optimizer = OSD([W])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))], "stochastic_rounding": True})
    assert len(optimizer.param_groups) == 1
    # float32 norms beside bfloat16 matrices: in either order
    OSD([{"params": [W], "stochastic_rounding": True}, {"params": [b], "stochastic_rounding": True}])
    optimizer.add_param_group({"params": [b], "stochastic_rounding": True})


def test_other_dtypes_are_stepped_as_without_it():
    def train(rounding: bool) -> torch.Tensor:
        torch.manual_seed(2)
        W, b = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12).to(BF16))
        optimizer = OSD([{"params": [W], "rank": 4}, {"params": [b]}], stochastic_rounding=rounding)
        for _ in range(3):
            W.grad, b.grad = torch.randn_like(W), torch.randn_like(b)
            optimizer.step()
        return W.detach()

    assert torch.equal(train(True), train(False))


def test_a_state_saved_before_the_option_existed_loads():
    W = nn.Parameter(torch.randn(8, 12))
    optimizer = OSD([W], rank=4)
    W.grad = torch.randn_like(W)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["stochastic_rounding"]
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
