"""`OSD` against the readable twin, in float64, for 100 steps."""

import pytest
import torch

from hf_osd import OSD
from reference.twin import RULES, Twin


SHAPES = {"left": (9, 14), "right": (14, 9)}
RANK = 4


def gradients(shape: tuple[int, int], steps: int) -> list[torch.Tensor]:
    """Gradients of changing size with a slowly turning dominant subspace."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(base + 0.02 * t * drift + 0.5 * noise[t]) * (1 + t % 7) for t in range(steps)]


def run_both(side: str, osd_options: dict, twin_options: dict, lr: float = 2e-3, steps: int = 100) -> None:
    shape = SHAPES[side]
    W0 = torch.randn(shape, dtype=torch.float64)
    W = torch.nn.Parameter(W0.clone())
    optimizer = OSD([{"params": [W], "rank": RANK, "side": side}], lr=lr, **osd_options)
    twin = Twin(W0 if side == "left" else W0.T, RANK, transposed=side == "right", **twin_options)
    for t, G in enumerate(gradients(shape, steps)):
        schedule = 1 - t / (2 * steps)
        optimizer.param_groups[0]["lr"] = lr * schedule
        W.grad = G
        optimizer.step()
        twin.step(G if side == "left" else G.T, lr, schedule)
    P = optimizer.state[W]["projection"]
    # The required 1e-9: rounding of 1e-16 grows by the length of the run and Adam's division by small roots.
    torch.testing.assert_close(P, twin.P, rtol=0, atol=1e-9)
    torch.testing.assert_close(W.detach(), twin.W if side == "left" else twin.W.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_both_roles(rule: str, side: str):
    run_both(side, {"weight_rule": rule}, {"rule": rule})


@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize(("weight", "projection"), [("adamw", "sgd"), ("lion", "adamw"), ("adafactor", "lion")])
def test_pairs_of_rules(weight: str, projection: str, side: str):
    run_both(
        side,
        {"weight_rule": weight, "projection_rule": projection},
        {"rule": weight, "projection_rule": projection},
    )


@pytest.mark.parametrize("side", SHAPES)
def test_scale_alpha_lambda_and_both_decays(side: str):
    options = {"alpha": 2.0, "lambda_": 0.3, "scale": 0.25, "weight_decay": 0.1, "projection_weight_decay": 0.02}
    run_both(side, options, options)


@pytest.mark.parametrize("side", SHAPES)
def test_projections_decay_like_the_weights_by_default(side: str):
    run_both(side, {"weight_decay": 0.1}, {"weight_decay": 0.1})


@pytest.mark.parametrize("lr", [2e-3, 7e-4])
@pytest.mark.parametrize("side", SHAPES)
def test_reference_preset_is_the_papers_code(side: str, lr: float):
    """No lambda, P by AdamW with decay 0.01 and learning rate 0.005 x schedule whatever the weights', scale 1/4."""
    from hf_osd.optim import resolve

    options = resolve("osd_adamw", {}, "reference", "test")
    del options["rank"]
    run_both(
        side,
        options,
        {
            "lambda_": 0.0,
            "scale": 0.25,
            "projection_lr": 0.005,
            "projection_weight_decay": 0.01,
            "projection_sample": 1,
        },
        lr=lr,
    )
