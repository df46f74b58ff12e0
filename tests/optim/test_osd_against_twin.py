"""`OSD` against the readable twin, in float64, for 100 steps."""

import pytest
from twin_runs import SHAPES, run_both

from reference.twin import RULES


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
