"""Training arguments: what Trainer's own fields, command lines, YAML and JSON give reaches the optimizer."""

import json
from pathlib import Path

import pytest
from made_optimizers import optimizer_of
from transformers import HfArgumentParser, Trainer

from hf_osd import OSDTrainingArguments
from hf_osd.optim.options.presets import OPTIM_NAMES, RSO_NAMES
from hf_osd.trainer.settings import read_settings
from reference.tiny_models import tiny_llama


LEARNING = [name for name in OPTIM_NAMES if name not in RSO_NAMES]  # names whose P has an update rule


@pytest.mark.parametrize("optim", ["osd_adamw", "adamw_torch"])
def test_arguments_that_an_earlier_version_has_saved_are_not_ignored(typed, optim):
    args = typed(optim=optim)
    args.osd_ddp_compression = "subspace"
    with pytest.raises(ValueError, match="ddp_compression"):
        Trainer(tiny_llama(), args)


def test_numbers_from_yaml_are_numbers(typed, tmp_path):
    path = tmp_path / "run.yaml"
    text = "output_dir: out\noptim: osd_adamw\nlearning_rate: 1e-3\nosd_projection_lr: 1e-3\nosd_rank: '4'\n"
    path.write_text(text + "osd_carry_moments: 'true'\nosd_subspace: online_pca\n")
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_yaml_file(str(path))
    options = read_settings(args).options
    assert (options["projection_lr"], options["rank"], options["carry_moments"]) == (1e-3, 4, True)
    with pytest.raises(ValueError, match="`osd_alpha` must be a number, got 'large'"):
        typed(osd_alpha="large")


@pytest.mark.parametrize("optim", ["adamw_torch", "galore_adamw"])
@pytest.mark.parametrize("given", [{"osd_rank": 4}, {"osd_exclude_modules": ["q_proj"]}])
def test_our_fields_with_another_optimizer_are_refused(optim, given, typed):
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"{name} needs an OSD optimizer, but optim is '{optim}'. .*osd_adamw"):
        typed(optim=optim, **given)


def test_trainers_own_fields_reach_the_groups(stock):
    args = stock(
        optim="osd_adamw",
        optim_args="rank=4",
        learning_rate=3e-4,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        seed=11,
        optim_target_modules=["q_proj", "up_proj"],
    )
    optimizer = optimizer_of(args)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["seed"]) == (3e-4, (0.8, 0.95), 1e-6, 11)
    names = optimizer.param_groups[0]["param_names"]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "up_proj"} and len(names) == 4


def test_lion_takes_the_betas_and_refuses_a_changed_epsilon(stock):
    optimizer = optimizer_of(stock(optim="osd_lion", optim_args="rank=4", adam_beta2=0.98))
    assert all(tuple(group["betas"]) == (0.9, 0.98) for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="`adam_epsilon` has no effect with the update rule lion"):
        Trainer(tiny_llama(), stock(optim="osd_lion", adam_epsilon=1e-6))


@pytest.mark.parametrize("optim", ["osd_sgd", "osd_adafactor"])
@pytest.mark.parametrize("changed", [{"adam_beta1": 0.8}, {"adam_beta2": 0.98}, {"adam_epsilon": 1e-6}])
def test_adam_fields_without_a_user_are_refused(optim, changed, stock):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` has no effect with the update rule"):
        Trainer(tiny_llama(), stock(optim=optim, **changed))


@pytest.mark.parametrize("projection", ["adamw", "lion", "sgd", "adafactor"])
@pytest.mark.parametrize("optim", LEARNING)
def test_every_rule_combines_with_every_rule_of_the_projection(optim, projection, stock):
    optimizer = optimizer_of(stock(optim=optim, optim_args=f"rank=4,projection_optim={projection}"))
    assert optimizer.param_groups[0]["projection_rule"] == projection
    assert {group["weight_rule"] for group in optimizer.param_groups} == {OPTIM_NAMES[optim]}


@pytest.mark.parametrize("optim", LEARNING)
def test_the_reference_preset_works_with_every_name(optim, stock, typed):
    by_text = optimizer_of(stock(optim=optim, optim_args="rank=4,preset=reference"))
    by_field = optimizer_of(typed(optim=optim, osd_rank=4, osd_preset="reference"))
    for optimizer in (by_text, by_field):
        group = optimizer.param_groups[0]
        assert (group["scale"], group["lambda_"], group["projection_rule"]) == (0.25, 0.0, "adamw")


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"], 4),
        ("q_proj", ["q_proj"], 2),
        ("layers.0.mlp.up_proj", ["layers.0.mlp.up_proj"], 1),
        (r".*\.0\..*_proj", r".*\.0\..*_proj", 7),
        ("all-linear", "all-linear", 14),
        ("all_linear", "all-linear", 14),
    ],
)
def test_target_modules_on_a_command_line(text, expected, count, tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --optim osd_adamw --osd_rank 4 --osd_lambda 0.2"
    line += f" --optim_target_modules {text}"
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_args_into_dataclasses(line.split())
    assert (args.osd_rank, args.osd_lambda, args.osd_alpha) == (4, 0.2, None)
    settings = read_settings(args)
    assert settings.options["lambda_"] == 0.2 and settings.target_modules == expected
    optimizer = optimizer_of(args)
    assert len(optimizer.param_groups[0]["params"]) == count


@pytest.mark.parametrize(("text", "count"), [("q_proj,mlp.up_proj", 4), (r".*\.(q|k)_proj", 4), ("down_proj", 2)])
def test_exclude_modules_on_a_command_line(text, count, tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --optim osd_adamw --osd_rank 4"
    line += f" --osd_exclude_modules {text}"
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_args_into_dataclasses(line.split())
    assert len(optimizer_of(args).param_groups[0]["params"]) == 14 - count


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "q_proj,v_proj", r".*q_proj", "all-linear", None])
def test_json_round_trip(modules, typed, tmp_path):
    args = typed(osd_rank=4, optim_target_modules=modules, osd_exclude_modules=["k_proj"], osd_seed=5, osd_alpha=2.0)
    path = Path(tmp_path) / "args.json"
    path.write_text(args.to_json_string())
    (again,) = HfArgumentParser(OSDTrainingArguments).parse_json_file(str(path))
    assert again.optim == "osd_adamw" and again.optim_target_modules == modules
    assert read_settings(again) == read_settings(args)


def test_a_json_file_written_by_hand(tmp_path):
    path = Path(tmp_path) / "args.json"
    written = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "osd_lion", "osd_rank": 4}
    path.write_text(json.dumps(written | {"optim_target_modules": r".*q_proj"}))
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_json_file(str(path))
    assert read_settings(args).target_modules == ".*q_proj" and args.osd_rank == 4
    path.write_text(json.dumps(written | {"osd_rnak": 4}))
    with pytest.raises(ValueError, match="osd_rnak"):
        HfArgumentParser(OSDTrainingArguments).parse_json_file(str(path))
