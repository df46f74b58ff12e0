"""Wrong options are refused where they are given, with the reason and the way out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_osd import OSD
from hf_osd.optim.options.table import DEFAULTS, OPTIONS, PROJECTED, validate


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def complete(**given: Any) -> dict[str, Any]:
    return {**DEFAULTS, "rank": 4, **given}


# A choice among the rules, and a value that goes with the defaults, for options that have no effect with these.
NEEDED: dict[str, dict[str, Any]] = {
    "update_interval": {"subspace": "svd"},
    "distribution": {"subspace": "random"},
    "unbiased": {"subspace": "random"},
    "restart_moments": {"subspace": "random"},
    "mixing": {"subspace": "power"},
    "momentum": {"weight_rule": "sgd"},
    "residual_scale": {"residual": "scaled"},
    "residual_sample": {"residual": "sign", "source": "activations"},
}
VALUES: dict[str, Any] = {"distribution": "gaussian", "mixing": 0.5, "momentum": 0.5, "update_interval": 7}
VALUES |= {"unbiased": True, "restart_moments": True, "residual_sample": 3}


def test_the_options_of_a_group_are_these():
    """As written: a name that is lost would make checkpoints unreadable."""
    general = "rank weight_rule alpha scale weight_decay projection_rule subspace init side projection_lr seed"
    further = "projection_weight_decay carry_moments residual residual_scale projection_dtype moment_dtype source"
    rules = "lambda_ projection_interval update_interval distribution mixing betas eps momentum"
    rules += " stochastic_rounding projection_sample residual_sample unbiased restart_moments weight_dtype"
    assert set(f"{general} {further} {rules}".split()) == OPTIONS.keys() == DEFAULTS.keys()
    given = {
        "weight_rule": "adamw",
        "source": "gradients",
        "subspace": "online_pca",
        "alpha": 5.0,
        "scale": 1.0,
        "weight_decay": 0.0,
    }
    given |= {"init": "auto", "side": "auto", "carry_moments": False, "residual": "none", "residual_scale": 1.0}
    given |= {"residual_sample": 4, "stochastic_rounding": False, "seed": 0, "restart_moments": False}
    assert {name: value for name, value in DEFAULTS.items() if value is not None} == given
    validate(DEFAULTS)
    validate(complete())


def test_who_declares_what():
    owners = {name: own.owners for name, own in OPTIONS.items() if own.owners}
    assert owners == {
        "lambda_": ("online_pca",),
        "projection_interval": ("online_pca", "power"),
        "update_interval": ("svd", "random", "cosine", "importance"),
        "distribution": ("random",),
        "unbiased": ("random",),
        "mixing": ("power",),
        "betas": ("adamw", "adamw8bit", "lion", "lion8bit"),
        "eps": ("adamw", "adamw8bit"),
        "momentum": ("sgd",),
    }


def test_what_only_projected_groups_use():
    projected = "subspace scale side init projection_dtype carry_moments residual residual_scale alpha projection_lr"
    projected += " projection_rule projection_weight_decay lambda_ update_interval projection_interval distribution"
    projected += " mixing source projection_sample residual_sample unbiased restart_moments weight_dtype"
    assert set(projected.split()) == PROJECTED


@pytest.mark.parametrize("name", NEEDED)
def test_an_option_needs_what_it_is_for(name: str):
    value = VALUES.get(name, 0.5)
    validate(complete(**{name: value}, **NEEDED[name]))
    with pytest.raises(ValueError, match=f"`{name}` of .* has no effect .*Leave it out"):
        validate(complete(**{name: value}))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_that_no_option_takes_is_refused_by_name(name: str, rank: int | None):
    with pytest.raises(ValueError, match=f"`{name}` of somewhere must be ") as error:
        validate({**DEFAULTS, "rank": rank, name: ...}, "somewhere")
    assert "got Ellipsis" in str(error.value)


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
    (
        {"weight_rule": "adamw8bit", "moment_dtype": "bfloat16"},
        "`moment_dtype` .* 8-bit rule 'adamw8bit'. Leave it out, or use a rule without",
    ),
    (
        {"weight_rule": "lion8bit", "moment_dtype": "float32"},
        "`moment_dtype` .* 8-bit rule 'lion8bit'. Leave it out, or use a rule without",
    ),
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


@pytest.mark.parametrize("lr", [-1e-3, "1e-3", None, float("nan"), torch.ones(2)])
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
        OSD([{"params": [parameter(8, 12), parameter(*shape)], "rank": 4}])
    with pytest.raises(ValueError, match="layer.bias has shape"):
        OSD([{"params": [("layer.weight", parameter(8, 12)), ("layer.bias", parameter(*shape))], "rank": 4}])
    OSD([parameter(*shape)])  # at full size
    with pytest.raises(ValueError, match="`rank` of OSD has no effect: no parameter that it is for is a matrix"):
        OSD([parameter(*shape)], rank=4)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rnak": 4}, "`rnak` in a parameter group has no effect. Did you mean `rank`"),
        ({"lamda_": 4}, "Did you mean `lambda_`"),
        ({"maximize": True}, "`maximize` in a parameter group"),
        ({"lambda": 0.1}, "`lambda` in a parameter group.* Did you mean `lambda_`"),
        ({"projection_optim": "lion"}, "`projection_optim` in a parameter group.* Did you mean `projection_rule`"),
        ({"layerwise_clipping": "parameter"}, "`layerwise_clipping` in a .* for the whole optimizer"),
        ({"sides": ["left"]}, "`sides` in a parameter group"),
        ({"rank": -4}, "`rank` of parameter group 1 must be an integer"),
        ({"rank": 4, "subspace": "svd", "alpha": 3.0}, "`alpha` of parameter group 1 has no effect"),
        ({"rank": 4, "projection_lr": 0.1, "lr": 0.0}, "`projection_lr` needs a positive initial `lr`"),
        (
            {"rank": 4, "init": [torch.zeros(8, 5)]},
            r"a finite tensor of shape \(8, 4\), got shape \(8, 5\): here it is for rank 4 and side left, give",
        ),
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


@pytest.mark.parametrize("optim", ["adamw", "lion"])
def test_a_parameter_of_another_shape_is_refused(optim: str):
    """As transformers resizes embeddings: in place."""
    embeddings = nn.Embedding(6, 4)
    optimizer = OSD(embeddings.parameters(), weight_rule=optim)
    for rows in (6, 9):
        embeddings.weight.data = torch.zeros(rows, 4)
        embeddings(torch.tensor([1])).sum().backward()
        if rows == 6:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(
        ValueError, match=r"has become \(9, 4\), and its state is of \(6, 4\), .*make the optimizer after"
    ):
        optimizer.step()
