"""Keys of `optim_args` and our fields of the same names: what each sets, and which mistakes are told."""

import re
from dataclasses import fields
from typing import Any

import pytest
from made_optimizers import optimizer_of
from transformers import Trainer, TrainingArguments

from hf_osd import OSDTrainer, OSDTrainingArguments
from hf_osd.optim.options.presets import KEYS
from hf_osd.subzero.options import KEYS as SUBZERO_KEYS
from hf_osd.trainer.optim_args import TRAINER_FIELDS, parse_optim_args
from reference.tiny_models import tiny_llama


MISTAKES = [
    ("rnak=8", "`rnak` in `optim_args`. Did you mean `rank`"),
    ("lambda_=0.1", "`lambda_` in `optim_args`. Did you mean `lambda`"),
    ("projection_rule=lion", "`projection_rule` in `optim_args`. Did you mean `projection_"),
    ("osd_rank=8", "`osd_rank` in `optim_args`. Did you mean `rank`"),
    ("rank", "must read key=value,key=value, got 'rank' in 'rank'. Give it a value, or leave it out"),
    ("rank=", "must read key=value,key=value, got 'rank='.* Give it a value, or leave it out"),
    ("rank=8,stochastic_rounding", "got 'stochastic_rounding' .* Give it a value: stochastic_rounding=true, or leave"),
    ("rank=8,", "got '' in 'rank=8,'. Leave out the comma that has nothing beside it"),
    ('{"rank": 8}', "must read key=value,key=value, got .* It is not JSON"),
    ("=8", "must read key=value,key=value, got '=8'"),
    ("rank=8=9", "must read key=value,key=value, got 'rank=8=9'"),
    ("rank=8;alpha=2", "must read key=value,key=value"),
    ("rank=8,rank=9", "'rank' is given twice"),
    ("rank=8.5", "'rank' in `optim_args` must be an integer, got '8.5'"),
    ("rank=many", "'rank' in `optim_args` must be an integer, got 'many'"),
    ("alpha=large", "'alpha' in `optim_args` must be a number, got 'large'"),
    ("scale=large", "'scale' in `optim_args` must be a number, or auto, got 'large'"),
    ("scale=0", "`scale` of the training arguments must be a number > 0, or 'auto', got 0"),
    ("scale=auto,subspace=random,unbiased=true", "scale='auto' of the training arguments is for P with columns of"),
    ("rank=0", "`rank` of the training arguments must be an integer >= 1, got 0"),
    ("alpha=-1", "`alpha` of the training arguments must be a number >= 0"),
    ("alpha=nan", "`alpha` of the training arguments must be a number >= 0"),
    ("projection_optim=adam", "`projection_optim` .* must be one of .*did you mean 'adamw'"),
    ("lambda=-1", "`lambda` of the training arguments must be a number >= 0, got -1"),
    ("subspace=svd,lambda=1", "`lambda` of the training arguments has no effect with subspace='svd'"),
    ("subspace=svd,projection_optim=sgd", "`projection_optim` of the training arguments has no effect"),
    ("init=runs/a,b", "got 'b' in 'init=runs/a,b'. A value with `,` or `=` goes into .*, such as `osd_init`"),
    ("init=runs/a=b", "got 'init=runs/a=b' .* such as `osd_init`"),
    ("subspace=online_pc", "must be one of .*did you mean 'online_pca'"),
    ("init=svdd", "`init` .* must be one of .*did you mean 'svd'"),
    ("source=activations,residual=scaled", "`residual` .* no effect with source='activations'.*use residual='sign'"),
    (
        "subspace=random,unbiased=true,residual=sign",
        "`residual` .* no effect with `unbiased` or .*, whose P is no projection",
    ),
    ("subspace=random,distribution=gaussian,residual=sign", "`residual` .* or distribution='gaussian', whose P is no"),
    ("residual=sign,residual_sample=3", "`residual_sample` .* no effect with source='gradients'"),
    ("source=activations,residual_sample=3", "`residual_sample` .* no effect without residual='sign'"),
    ("source=activations,residual=sign,residual_sample=0", "`residual_sample` .* must be an integer >= 1, got 0"),
    ("preset=finetune,subspace=svd,embedding_lr_ratio=0", "`embedding_lr_ratio` .* must be a number > 0, got 0"),
    ("preset=referense", "`preset` of the training arguments must be one of reference"),
    ("subspace=svd,alpha=3", "`alpha` .* no effect with subspace='svd'"),
    ("update_interval=10", "`update_interval` .* no effect with subspace='online_pca'"),
    ("alpha=3,projection_lr=0.1", "set the same thing"),
    ("momentum=0.5", "`momentum` .* no effect with the update rule adamw"),
    ("ddp_compression=subspace", "`ddp_compression` in `optim_args`: it is no more. Use source='activations'"),
    (
        "rank=4,update_proj_gap=200,scale=0.25",
        "`update_proj_gap` in `optim_args`: it is GaLore's. Leave it out: P moves",
    ),
    ("proj_type=std", "`proj_type` in `optim_args`: it is GaLore's. Leave it out, or choose `side`"),
    ("r=4", "`r` in `optim_args`: it is `rank` here"),
    ("lora_alpha=32", "`lora_alpha` in `optim_args`: it is LoRA's. The factor on the update is `scale`"),
    ("scale_type=channel", "`scale_type` in `optim_args`: it is APOLLO's"),
    ("proj=random", "`proj` in `optim_args`: it is APOLLO's. P at random is subspace='random'"),
    *(
        (f"{key}=2", f"`{key}` in `optim_args`: it is for optim='subzero'")
        for key in sorted(SUBZERO_KEYS.keys() - KEYS.keys() - TRAINER_FIELDS.keys())
    ),
    ("residual_limit=0", "Unknown option `residual_limit` in `optim_args`. Did you mean `residual`"),
    *((f"{key}=0.1", re.escape(f"Set `{name}` of the training arguments")) for key, name in TRAINER_FIELDS.items()),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_optim_args_is_refused_at_construction(text, message, stock, typed):
    with pytest.raises(ValueError, match=message):  # a stock Trainer refuses before any data is read
        Trainer(tiny_llama(), stock(optim="osd_adamw", optim_args=text))
    with pytest.raises(ValueError, match=message):  # our arguments refuse without a model
        typed(optim_args=text)


def test_optim_args_are_typed_by_key():
    text = "rank=8, alpha = 2,lambda=0,seed=3,side=left,subspace=online_pca"
    values = parse_optim_args(text)
    assert values == {"rank": 8, "alpha": 2.0, "lambda": 0.0, "seed": 3, "side": "left", "subspace": "online_pca"}
    assert {type(values[key]) for key in ("alpha", "lambda")} == {float}
    assert parse_optim_args(None) == parse_optim_args("") == {}


# transformers' own parser would stop with "not enough values to unpack".
@pytest.mark.parametrize("text", ["rank=8,", ",rank=8", "rank=8,,alpha=3"])
def test_an_empty_entry_in_optim_args_is_refused_or_works(text, stock):
    try:
        trainer = Trainer(tiny_llama(), stock(optim="osd_adamw", optim_args=text))
    except ValueError as error:
        assert "key=value" in str(error)
        return
    assert trainer.create_optimizer().param_groups[0]["rank"] == 8


def test_the_keys_are_these():
    keys = "rank rank_pattern alpha lambda scale projection_optim subspace init side projection_lr partial_load preset"
    keys += " projection_weight_decay projection_dtype moment_dtype update_interval projection_interval distribution"
    keys += " mixing carry_moments residual residual_scale momentum stochastic_rounding seed layerwise_clipping"
    keys += " source projection_sample unbiased restart_moments weight_dtype lr_pattern full_size_optim capturable"
    keys += " divide_projection embedding_lr_ratio task_head_lr_ratio"
    keys += " projection_stream residual_sample"
    assert set(keys.split()) == KEYS.keys()
    own = {field.name for field in fields(OSDTrainingArguments)} - {field.name for field in fields(TrainingArguments)}
    assert own == {f"osd_{key}" for key in KEYS} | {"osd_exclude_modules"}
    assert all(OSDTrainingArguments.__dataclass_fields__[name].default is None for name in own)


def test_what_a_key_sets_and_its_type():
    renamed = {key: own.name for key, own in KEYS.items() if own.name != key}
    assert renamed == {"lambda": "lambda_", "projection_optim": "projection_rule"}
    whole = {"rank", "update_interval", "projection_interval", "projection_sample", "residual_sample", "seed"}
    texts = {"subspace", "init", "preset", "source", "scale"}  # which may be a number, and is one then
    kinds = {key: own.check.flag for key, own in KEYS.items()}
    assert {key for key, kind in kinds.items() if kind is int} == whole
    assert {key for key, kind in kinds.items() if kind is bool} == {
        "carry_moments",
        "restart_moments",
        "unbiased",
        "stochastic_rounding",
        "partial_load",
        "capturable",
        "projection_stream",
        "divide_projection",
    }
    assert {kinds[key] for key in texts} == {str} and kinds["alpha"] is kinds["mixing"] is float
    for key, kind in kinds.items():
        assert OSDTrainingArguments.__annotations__[f"osd_{key}"] == kind | None, key


def test_what_arguments_of_transformers_set_has_no_key():
    expected = {"weight_decay": "weight_decay", "eps": "adam_epsilon", "max_grad_norm": "max_grad_norm"}
    expected |= {"weight_rule": "optim='osd_*'", "layerwise": "optim='osd_*_layerwise'"}
    expected |= {"lr": "learning_rate", "target_modules": "optim_target_modules"}
    assert expected.items() <= TRAINER_FIELDS.items() and not TRAINER_FIELDS.keys() & KEYS.keys()


EVERY: dict[str, Any] = {
    "rank": 6,
    "alpha": 2.5,
    "lambda": 0.2,
    "scale": 0.5,
    "projection_optim": "lion",
    "subspace": "online_pca",
    "init": "orthonormal",
    "side": "right",
    "projection_interval": 3,
    "carry_moments": True,
    "residual": "scaled",
    "residual_scale": 0.25,
    "projection_weight_decay": 0.05,
    "projection_dtype": "bfloat16",
    "moment_dtype": "bfloat16",
    "seed": 9,
}


def test_every_key_reaches_the_optimizer_from_both_entrances(stock, typed):
    text = ",".join(f"{key}={value}" for key, value in EVERY.items())
    by_text = optimizer_of(stock(optim="osd_adamw", optim_args=text))
    by_field = optimizer_of(typed(**{f"osd_{key}": value for key, value in EVERY.items()}))
    ours = optimizer_of(typed(**{f"osd_{key}": value for key, value in EVERY.items()}), OSDTrainer)
    for group, other, third in zip(by_text.param_groups, by_field.param_groups, ours.param_groups, strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        assert settings == {key: value for key, value in other.items() if key != "params"}
        assert settings == {key: value for key, value in third.items() if key != "params"}
    group = by_text.param_groups[0]
    assert {key: group[KEYS[key].name] for key in EVERY} == EVERY


@pytest.mark.parametrize(
    ("optim", "key", "value", "more"),
    [
        ("osd_adamw", "projection_lr", 0.02, ""),
        ("osd_adamw", "update_interval", 7, ",subspace=svd"),
        ("osd_sgd", "momentum", 0.5, ""),
    ],
)
def test_the_keys_that_exclude_others(optim, key, value, more, stock):
    optimizer = optimizer_of(stock(optim=optim, optim_args=f"rank=4,{key}={value}{more}", learning_rate=0.01))
    assert optimizer.param_groups[0][key] == value
    if key == "projection_lr":
        assert optimizer.param_groups[0]["alpha"] == pytest.approx(2.0, rel=1e-12)  # 0.02 / 0.01, one division


@pytest.mark.parametrize("key", EVERY)
def test_the_same_option_twice_is_refused(key, typed):
    with pytest.raises(ValueError, match=f"'{key}' is given twice: in `optim_args` and as `osd_{key}`"):
        typed(optim_args=f"{key}={EVERY[key]}", **{f"osd_{key}": EVERY[key]})


def test_our_optim_args_with_an_optimizer_that_ignores_them_are_refused(stock):
    with pytest.raises(ValueError, match="optim='adamw_torch' ignores optim_args='rank=8'.*osd_adamw"):
        Trainer(tiny_llama(), stock(optim="adamw_torch", optim_args="rank=8"))
    # Those of other optimizers are none of our business.
    args = stock(optim="galore_adamw", optim_args="rank=8,update_proj_gap=3", optim_target_modules=["q_proj"])
    assert Trainer(tiny_llama(), args).args is args
