"""Residuals, carried moments, intervals and the two-sided operator against the readable twin, in float64."""

import pytest
import torch
from twin_runs import RANK, SHAPES, gradients, run_both

from hf_osd import OSD
from reference.twin import RULES, TwoSidedTwin


both_sides = pytest.mark.parametrize("side", SHAPES)
STEPS = 30


@both_sides
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"residual_scale": 0.3, "scale": 0.5}],
    ids=["default", "scales"],
)
def test_the_scaled_residual_is_the_explicit_one(rule: str, side: str, options: dict):
    given = {"residual": "scaled", **options}
    run_both(side, {"weight_rule": rule, **given}, {"rule": rule, **given}, steps=STEPS)


@both_sides
def test_the_sign_of_the_residual_is_the_explicit_one(side: str):
    given = {"residual": "sign", "residual_scale": 0.2}
    run_both(side, given, given, steps=STEPS)


@both_sides
def test_the_limiter_binds_and_lets_go(side: str):
    """Growing gradients are held to 1.01 a step; the state is the norm that was applied."""
    shape = SHAPES[side]
    W = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = OSD([{"params": [W], "rank": RANK, "side": side}], weight_rule="sgd", momentum=0.0, residual="scaled")
    norms, G = [], torch.randn(shape, dtype=torch.float64)
    for t in range(20):
        W.grad = G * (2.0**t if t < 10 else 2.0 ** (9 - t))
        optimizer.step()
        norms.append(float(optimizer.state[W]["residual_norm"]))
    growth = [b / a for a, b in zip(norms[:-1], norms[1:], strict=True)]
    assert growth[:9] == pytest.approx([1.01] * 9, rel=1e-6)
    assert max(growth) == pytest.approx(1.01, rel=1e-6) and min(growth) == pytest.approx(0.5, rel=0.2)


@both_sides
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_carried_moments_are_ldadams(rule: str, side: str):
    run_both(side, {"weight_rule": rule, "carry_moments": True}, {"rule": rule, "carry": True}, steps=STEPS)


@both_sides
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd", "adafactor"])
def test_restarted_moments_are_those_of_a_new_optimizer(rule: str, side: str):
    W = torch.nn.Parameter(torch.randn(SHAPES[side], dtype=torch.float64))
    expected, state = W.detach().clone(), {}
    group = {"params": [W], "rank": RANK, "side": side, "subspace": "svd", "update_interval": 4}
    optimizer = OSD([group], lr=0.01, weight_rule=rule, restart_moments=True)
    for step, G in enumerate(gradients(SHAPES[side], 10)):
        if step == 6:
            G[0, 0] = float("nan")  # a skipped step is none of the moments'
        W.grad = G
        optimizer.step()
        if step % 4 == 0:
            state = {}
        if step != 6:
            P = optimizer.weight_of(W).projection
            D = RULES[rule](state, P.T @ G if side == "left" else G @ P)
            expected = expected - 0.01 * (P @ D if side == "left" else D @ P.T)
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-12)


@both_sides
@pytest.mark.parametrize("interval", [2, 5])
def test_p_moves_at_multiples_of_the_interval(interval: int, side: str):
    given = {"projection_interval": interval}
    run_both(side, given, given, steps=STEPS)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("residual", ["none", "scaled", "sign"])
@pytest.mark.parametrize("carry", [False, True])
def test_two_sided_is_the_explicit_one(carry: bool, residual: str, shape: tuple[int, int]):
    m, n = shape
    P, Q = (torch.linalg.qr(torch.randn(size, RANK, dtype=torch.float64)).Q for size in shape)
    W0 = torch.randn(shape, dtype=torch.float64)
    W = torch.nn.Parameter(W0.clone())
    group = {"params": [W], "rank": RANK, "init": [torch.cat([P, Q])]}
    optimizer = OSD([group], lr=2e-3, side="two_sided", residual=residual, carry_moments=carry)
    twin = TwoSidedTwin(W0, P, Q, residual=residual, carry=carry)
    for G in gradients(shape, STEPS):
        W.grad = G
        optimizer.step()
        twin.step(G, 2e-3)
    torch.testing.assert_close(optimizer.state[W]["projection"], torch.cat([twin.P, twin.Q]), rtol=0, atol=1e-9)
    torch.testing.assert_close(W.detach(), twin.W, rtol=0, atol=1e-9)
    assert optimizer.state[W]["exp_avg"].shape == (RANK, RANK)


@pytest.mark.parametrize(("interval", "products"), [(1, 8), (4, 2), (100, 1)])
def test_a_is_computed_at_these_steps_only(interval: int, products: int, monkeypatch: pytest.MonkeyPatch):
    from hf_osd.subspace import Left

    seen, correlate = [], Left.correlate
    monkeypatch.setattr(Left, "correlate", staticmethod(lambda *given: seen.append(1) or correlate(*given)))
    W = torch.nn.Parameter(torch.zeros(9, 14))
    P = torch.linalg.qr(torch.randn(9, RANK)).Q
    optimizer = OSD([{"params": [W], "rank": RANK, "init": [P]}], projection_interval=interval)
    for _ in range(8):
        W.grad = torch.randn(9, 14)
        optimizer.step()
    assert len(seen) == products
