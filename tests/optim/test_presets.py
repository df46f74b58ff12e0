"""What the names of `optim` and the presets set, and what wins over them."""

import json
from pathlib import Path

import pytest

from hf_osd.optim.options.presets import NAME_OPTIONS, OPTIM_NAMES, PRESETS, RSO_NAMES, resolve
from hf_osd.optim.options.table import DEFAULTS, OPTIONS, validate


@pytest.mark.parametrize("name", [name for name in OPTIM_NAMES if name not in RSO_NAMES])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_resolve_is_complete_and_valid(name, preset):
    if preset in ("finetune", "pretrain") and OPTIM_NAMES[name] == "sgd":
        with pytest.raises(ValueError, match=f"preset='{preset}' of a test is for steps of AdamW's size"):
            resolve(name, {"rank": 4}, preset, "a test")
        return
    settings = resolve(name, {"rank": 4}, preset, "a test")
    assert settings.keys() == DEFAULTS.keys()
    assert settings["weight_rule"] == OPTIM_NAMES[name] and settings["rank"] == 4
    validate(settings)
    expected = {**DEFAULTS, "rank": 128, "weight_rule": settings["weight_rule"]}
    assert resolve(name, {}, None, "a test") == expected


def test_what_is_given_wins_over_the_preset():
    plain = resolve("osd_adamw", {}, "reference", "a test")
    assert (plain["scale"], plain["lambda_"], plain["projection_lr"]) == (0.25, 0.0, 0.005)
    assert (plain["projection_rule"], plain["projection_weight_decay"]) == ("adamw", 0.01)
    own = resolve("osd_adamw", {"scale": 2.0, "projection_rule": "lion"}, "reference", "a test")
    assert own == {**plain, "scale": 2.0, "projection_rule": "lion"}
    alpha = resolve("osd_adamw", {"alpha": 7.0}, "reference", "a test")
    assert alpha == {**plain, "alpha": 7.0, "projection_lr": None}


def test_a_preset_beside_other_choices():
    tuned = resolve("osd_adamw", {}, "finetune", "a test")
    assert (tuned["scale"], tuned["residual"], tuned["residual_scale"]) == ("auto", "sign", 1.0)
    plain = resolve("osd_adamw", {"residual": "none"}, "finetune", "a test")  # whose scale goes with it
    assert plain == {**resolve("osd_adamw", {}, None, "a test"), "scale": "auto"}
    resolve("osd_adamw", {"residual": "none", "source": "activations"}, "finetune", "a test")
    assert resolve("osd_adamw", {"source": "activations"}, "finetune", "a test")["residual"] == "sign"
    drawn = {"subspace": "random", "unbiased": True}
    with pytest.raises(
        ValueError, match="preset='finetune' of a test sets `scale` to 'auto'.*`unbiased` makes them lon"
    ):
        resolve("osd_adamw", drawn, "finetune", "a test")
    with pytest.raises(ValueError, match="sets `residual`, which has no effect with `unbiased`.*residual=none"):
        resolve("osd_adamw", {**drawn, "scale": 2.0}, "finetune", "a test")
    with pytest.raises(
        ValueError,
        match="sets `projection_optim`, which has no effect with subspace='svd'. .* give what else it sets: s",
    ) as refused:
        resolve("osd_adamw", {"subspace": "svd"}, "reference", "a test")
    rest = dict(one.split("=") for one in str(refused.value).rsplit(": ", 1)[1].rstrip(".").split(","))
    assert rest == {"scale": "0.25"}  # None, projection_optim's default, is not to be given
    with pytest.raises(ValueError, match="preset='finetune' is for the `osd_` names"):
        resolve("rso_adamw", {}, "finetune", "a test")


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"reference"}))
def test_what_a_preset_sets_was_measured(preset: str):
    """Every value is in arguments of the experiment that it is said to come from, whose result is committed."""
    benchmarks = Path(__file__).parents[2] / "examples" / "benchmarks"
    for name, (value, source) in PRESETS[preset].settings.items():
        result = json.loads((benchmarks / "results" / "cpu_2_cores" / f"{source}.json").read_text())
        value = f"{value:g}" if isinstance(value, float) else value
        flag = f"--osd_{(OPTIONS | NAME_OPTIONS)[name].key} {value} "
        told = [" ".join([*map(str, row["arguments"]), ""]) for row in result["rows"]]
        assert any(flag in text or f"--osd_preset {preset} " in text for text in told), (name, source)


@pytest.mark.parametrize(
    ("name", "given", "preset", "message"),
    [
        ("osd_adam", {}, None, "'osd_adam'.*Did you mean 'osd_adamw'"),
        ("adamw", {}, None, "'adamw'.*Did you mean 'osd_adamw'"),
        ("osd_adamw", {"rnak": 4}, None, "`rnak` in a test. Did you mean `rank`"),
        ("osd_adamw", {"weight_rule": "lion"}, None, "`weight_rule` in a test"),
        (
            "osd_adamw",
            {},
            "referense",
            "`preset` of a test must be one of reference, .* .did you mean 'reference'.*got 'referense'",
        ),
    ],
)
def test_resolve_refuses_what_it_does_not_know(name, given, preset, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, given, preset, "a test")
