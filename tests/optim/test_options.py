"""Wrong options are refused where they are given, with the reason and the way out."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.optim.options.presets import OPTIM_NAMES, PRESETS, resolve
from hf_osd.optim.options.table import CHECKS, DEFAULTS, RESIDUAL_OPTIONS, Options, validate
from hf_osd.subspace import SUBSPACES
from hf_osd.update_rules import RULES


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def complete(**given: Any) -> dict[str, Any]:
    return {**DEFAULTS, "rank": 4, **given}


GOOD: dict[str, list[Any]] = {
    "rank": [1, 4, 10**6, None],
    "weight_rule": list(RULES),
    "projection_rule": [*RULES, None],
    "subspace": list(SUBSPACES),
    "alpha": [0, 0.5, 5],
    "projection_lr": [0, 0.005, None],
    "lambda_": [0, 0.1, 3],
    "scale": [0.25, 1, 2],
    "weight_decay": [0, 0.1],
    "projection_weight_decay": [0.0, 0.1, None],
    "betas": [(0.9, 0.95), [0, 0], None],
    "eps": [0, 1e-8, None],
    "init": ["auto", "svd", "randomized_svd", "orthonormal"],
    "side": ["auto", "left", "right"],
    "projection_dtype": ["float32", "bfloat16", None],
    "moment_dtype": ["float32", "bfloat16", None],
    "projection_interval": [1, 4, None],
    "projection_schedule": ["lr", "constant", None],
    "carry_moments": [False, True],
    "residual": ["none", "scaled", "sign"],
    "stochastic_rounding": [False, True],
    "seed": [0, 7],
}

NOT_A_NUMBER: list[Any] = ["1", None, True, float("nan"), float("inf"), [1.0], -1, -1e-9]
BAD: dict[str, list[Any]] = {
    "rank": [0, -1, 4.0, "4", True],
    "weight_rule": ["adam", "", None, 3, ["adamw"], "osd_adamw", "AdamW"],
    "projection_rule": ["adam", "", 3],
    "subspace": ["pca", None, "online-pca"],
    "alpha": NOT_A_NUMBER,
    "projection_lr": [value for value in NOT_A_NUMBER if value is not None],
    "lambda_": NOT_A_NUMBER,
    "scale": [*NOT_A_NUMBER, 0, 0.0],
    "weight_decay": NOT_A_NUMBER,
    "projection_weight_decay": [value for value in NOT_A_NUMBER if value is not None],
    "betas": [0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.9), ("0.9", 0.9), "ab", (0.9, float("nan"))],
    "eps": [value for value in NOT_A_NUMBER if value is not None],
    "momentum": [-0.1, 1, 1.0, 1.5, "0.9", True, float("nan")],
    "init": ["pca", "", "SVD"],
    "side": ["both", None, 0, "Left"],
    "update_interval": [0, -5, 2.5, "200", True],
    "projection_interval": [0, -5, 2.5, "1", True],
    "projection_schedule": ["cosine", 1, ""],
    "distribution": ["normal", "", 3],
    "mixing": [-0.1, 1, 1.5, "0.9", True, float("nan")],
    "carry_moments": [0, "true", None],
    "residual": ["fira", None, "", True],
    "residual_scaling": ["row", "", 1],
    "residual_limit": [value for value in NOT_A_NUMBER if value is not None],
    "residual_scale": [*NOT_A_NUMBER, 0, 0.0],
    "projection_dtype": ["float16", "int8", torch.bfloat16, 32],
    "moment_dtype": ["float16", "uint8", torch.float32],
    "stochastic_rounding": [0, 1, "true", None],
    "seed": [-1, 1.0, None, "0", True],
}


def test_every_option_has_a_check_and_is_tested():
    names = {field.name for field in fields(Options)}
    assert CHECKS.keys() == names == BAD.keys()
    needing_others = {"momentum": {"weight_rule": "sgd"}, "update_interval": {"subspace": "svd"}}
    needing_others |= {"distribution": {"subspace": "random"}, "mixing": {"subspace": "power"}}
    needing_others |= {name: {"residual": "scaled"} for name in RESIDUAL_OPTIONS}
    values = {"momentum": 0.5, "update_interval": 7, "distribution": "gaussian", "mixing": 0.5}
    values |= {"residual_scaling": "matrix", "residual_limit": 0, "residual_scale": 0.5}
    assert names - GOOD.keys() == needing_others.keys() == values.keys()
    for name, others in needing_others.items():
        validate(complete(**{name: values[name]}, **others))
        with pytest.raises(ValueError, match=f"`{name}` of .* has no effect"):
            validate(complete(**{name: values[name]}))
    validate(DEFAULTS)
    validate(complete())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_good_values_pass(name, value):
    validate(complete(**{name: value}))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_name(name, value, rank):
    with pytest.raises(ValueError, match=f"`{name}` of somewhere must be ") as error:
        validate({**DEFAULTS, "rank": rank, name: value}, "somewhere")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("weight_rule", "adam", "adamw"),
        ("weight_rule", "lion8bits", "lion8bit"),
        ("projection_rule", "adafacter", "adafactor"),
        ("subspace", "online_pc", "online_pca"),
        ("init", "orthonorml", "orthonormal"),
        ("side", "rigth", "right"),
        ("projection_dtype", "bf16", None),
        ("moment_dtype", "bfloat", "bfloat16"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name, value, nearest):
    with pytest.raises(ValueError) as error:
        validate(complete(**{name: value}))
    assert (
        f"did you mean {nearest!r}" in str(error.value) if nearest else "one of float32, bfloat16" in str(error.value)
    )


WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"subspace": "svd", "alpha": 3.0}, "`alpha` .* no effect with subspace='svd'.*subspace='online_pca'"),
    ({"subspace": "static", "alpha": 3.0}, "`alpha` .* no effect with subspace='static'"),
    ({"subspace": "svd", "lambda_": 0.5}, "`lambda_` .* no effect with subspace='svd'"),
    ({"subspace": "svd", "projection_lr": 0.1}, "`projection_lr` .* no effect"),
    ({"subspace": "static", "projection_rule": "sgd"}, "`projection_rule` .* no effect"),
    ({"subspace": "svd", "projection_weight_decay": 0.1}, "`projection_weight_decay` .* no effect"),
    ({"update_interval": 10}, "`update_interval` .* no effect with subspace='online_pca'.*subspace='svd'"),
    ({"subspace": "static", "update_interval": 10}, "`update_interval` .* no effect"),
    ({"alpha": 3.0, "projection_lr": 0.1}, "`alpha` and `projection_lr` .* set the same thing"),
    ({"weight_rule": "adamw8bit", "moment_dtype": "bfloat16"}, "`moment_dtype` .* 8-bit rule .*weight_rule='adamw'"),
    ({"weight_rule": "lion8bit", "moment_dtype": "float32"}, "`moment_dtype` .* 8-bit rule .*weight_rule='lion'"),
    ({"weight_rule": "sgd", "betas": (0.9, 0.99)}, "`betas` .* no effect with the update rule sgd"),
    ({"weight_rule": "adafactor", "betas": (0.9, 0.99)}, "`betas` .* no effect with the update rule adafactor"),
    ({"weight_rule": "lion", "eps": 1e-6}, "`eps` .* no effect with the update rule lion"),
    ({"weight_rule": "adamw", "momentum": 0.5}, "`momentum` .* no effect with the update rule adamw"),
    ({"weight_rule": "lion", "projection_rule": "adafactor", "momentum": 0.5}, "rule adafactor and lion"),
]


@pytest.mark.parametrize(("given", "message"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        validate(complete(**given))
    with pytest.raises(ValueError, match=message):
        OSD([parameter(8, 12)], rank=4, **given)


def test_a_moment_dtype_for_8bit_moments_is_refused_without_a_rank_too():
    with pytest.raises(ValueError, match="`moment_dtype` .* 8-bit rule"):
        OSD([parameter(8, 12)], weight_rule="adamw8bit", moment_dtype="bfloat16")


@pytest.mark.parametrize(
    "given",
    [
        {"weight_rule": "sgd", "projection_rule": "adamw", "betas": (0.8, 0.9), "eps": 1e-6, "momentum": 0.5},
        {"weight_rule": "adamw8bit", "projection_rule": "adamw", "projection_dtype": "bfloat16"},
        {"subspace": "svd", "update_interval": 3, "init": "randomized_svd", "side": "right"},
        {"projection_lr": 0.1, "projection_weight_decay": 0.0, "lambda_": 0.0},
    ],
)
def test_options_with_an_effect_pass(given):
    validate(complete(**given))
    OSD([parameter(8, 12)], rank=4, **given)


@pytest.mark.parametrize("name", OPTIM_NAMES)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_resolve_is_complete_and_valid(name, preset):
    settings = resolve(name, {"rank": 4}, preset, "a test")
    assert settings.keys() == DEFAULTS.keys()
    assert settings["weight_rule"] == OPTIM_NAMES[name] and settings["rank"] == 4
    validate(settings)
    assert resolve(name, {}, None, "a test") == {**DEFAULTS, "weight_rule": settings["weight_rule"]}


def test_what_is_given_wins_over_the_preset():
    plain = resolve("osd_adamw", {}, "reference", "a test")
    assert (plain["scale"], plain["lambda_"], plain["projection_lr"]) == (0.25, 0.0, 0.005)
    assert (plain["projection_rule"], plain["projection_weight_decay"]) == ("adamw", 0.01)
    own = resolve("osd_adamw", {"scale": 2.0, "projection_rule": "lion"}, "reference", "a test")
    assert own == {**plain, "scale": 2.0, "projection_rule": "lion"}
    alpha = resolve("osd_adamw", {"alpha": 7.0}, "reference", "a test")
    assert alpha == {**plain, "alpha": 7.0, "projection_lr": None}


@pytest.mark.parametrize(
    ("name", "given", "preset", "message"),
    [
        ("osd_adam", {}, None, "'osd_adam'.*Did you mean 'osd_adamw'"),
        ("adamw", {}, None, "'adamw'.*Did you mean 'osd_adamw'"),
        ("osd_adamw", {"rnak": 4}, None, "`rnak` in a test. Did you mean `rank`"),
        ("osd_adamw", {"weight_rule": "lion"}, None, "`weight_rule` in a test"),
        ("osd_adamw", {}, "referense", "Unknown preset 'referense'. Known: reference"),
    ],
)
def test_resolve_refuses_what_it_does_not_know(name, given, preset, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, given, preset, "a test")


@pytest.mark.parametrize("lr", [-1e-3, "1e-3", None, float("nan"), torch.tensor(1e-3)])
def test_a_wrong_learning_rate_is_refused(lr):
    with pytest.raises(ValueError, match="`lr` of parameter group 0 must be a number >= 0"):
        OSD([parameter(8, 12)], lr=lr)
    with pytest.raises(ValueError, match="`lr` of parameter group 1"):
        OSD([{"params": [parameter(3)]}, {"params": [parameter(8, 12)], "lr": lr}], lr=1e-3)


def test_maximize_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="Negate the loss"):
        OSD([parameter(8, 12)], maximize=True)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="alhpa"):
        OSD([parameter(8, 12)], alhpa=3.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(8,), (2, 3, 4, 6), ()])
def test_only_matrices_are_projected(shape):
    with pytest.raises(ValueError, match=r"parameter 1 has shape .* only matrices can, and stacks of them"):
        OSD([parameter(8, 12), parameter(*shape)], rank=4)
    with pytest.raises(ValueError, match="layer.bias has shape"):
        OSD([("layer.weight", parameter(8, 12)), ("layer.bias", parameter(*shape))], rank=4)
    OSD([parameter(*shape)])  # at full size


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rnak": 4}, "`rnak` in a parameter group. Did you mean `rank`"),
        ({"lamda_": 4}, "Did you mean `lambda_`"),
        ({"maximize": True}, "`maximize` in a parameter group"),
        ({"sides": ["left"]}, "`sides` in a parameter group"),
        ({"rank": -4}, "`rank` of parameter group 1 must be an integer"),
        ({"rank": 4, "subspace": "svd", "alpha": 3.0}, "`alpha` of parameter group 1 has no effect"),
        ({"rank": 4, "projection_lr": 0.1, "lr": 0.0}, "`projection_lr` needs a positive initial `lr`"),
        ({"rank": 4, "init": [torch.zeros(8, 5)]}, r"must be a finite tensor of shape \(8, 4\), got shape \(8, 5\)"),
        ({"rank": 4, "init": [torch.full((8, 4), torch.nan)]}, r"must be a finite tensor of shape \(8, 4\)"),
        ({"rank": 4, "init": []}, "`init` has 0 tensors for 1 parameters"),
        ({"rank": 4, "init": {"other": torch.zeros(8, 4)}}, "`init` has no P for parameter 2"),
        ({"rank": 4, "init": ["svd"]}, "must be a finite tensor .* got str"),
        ({"rank": None, "init": [torch.zeros(8, 4)]}, "`init` of parameter group 1 has no effect without a `rank`"),
        ({"rank": 4, "init": 5}, "`init` "),
        ({"rank": 4, "init": None}, "`init` "),
    ],
)
def test_a_group_that_is_refused_leaves_the_optimizer_unchanged(group, message):
    first = parameter(6, 10)
    optimizer = OSD([first, parameter(5, 7)], lr=0.1, rank=3)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(8, 12)], **group})
    assert len(optimizer.param_groups) == 1
    assert optimizer.state_dict() == before
    p = parameter(8, 12)  # and it still takes good ones, and steps
    optimizer.add_param_group({"params": [p], "rank": 2})
    first.grad, p.grad = torch.randn_like(first), torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["projection"].shape == (8, 2) and optimizer.state[first]["projection"].shape == (6, 3)


def test_groups_override_the_optimizer():
    optimizer = OSD(
        [
            {"params": [parameter(8, 12)], "rank": 3, "weight_rule": "sgd", "momentum": 0.5, "lr": 0.5},
            {"params": [parameter(8, 12)], "side": "right", "weight_decay": 0.2},
        ],
        lr=0.1,
        rank=5,
        weight_decay=0.1,
    )
    first, second = optimizer.param_groups
    assert (first["rank"], first["lr"], first["weight_rule"], first["weight_decay"]) == (3, 0.5, "sgd", 0.1)
    assert (second["rank"], second["lr"], second["weight_rule"], second["weight_decay"]) == (5, 0.1, "adamw", 0.2)
    assert first["sides"] == ["left"] and second["sides"] == ["right"]


def sparse_gradient(p: Tensor) -> Tensor:
    return torch.randn_like(p).to_sparse()


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("named", [True, False])
def test_a_sparse_gradient_is_refused_by_name_and_nothing_moves(rank, named):
    first, second = parameter(8, 12), parameter(8, 12)
    params = [("a.weight", first), ("emb.weight", second)] if named else [first, second]
    optimizer = OSD(params, rank=rank)
    first.grad, second.grad = torch.randn_like(first), sparse_gradient(second)
    before = first.detach().clone()
    name = "emb.weight" if named else "parameter 1"
    with pytest.raises(ValueError, match=f"{name} has a sparse gradient.*dense embeddings"):
        optimizer.step()
    assert torch.equal(first, before) and not optimizer.state


def test_a_complex_gradient_is_refused_by_name():
    p = nn.Parameter(torch.randn(8, 12, dtype=torch.complex64))
    optimizer = OSD([("filter", p)])
    p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match="filter has a complex gradient"):
        optimizer.step()
