"""What `hf-osd estimate` suggests: it parses, and selects what was estimated.

tests/cli/test_run_hugging_face.py runs the command of a model with weights.
"""

import shlex

import pytest
from estimates import SMALL, estimate, refused, report_of
from transformers import AutoConfig, BertConfig, HfArgumentParser, LlamaConfig, MixtralConfig, TrainingArguments

from hf_osd import OSDTrainingArguments
from hf_osd.estimate.models import DTYPES, meta_model
from hf_osd.optim import select


GENERATES = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
CLASSIFIES = BertConfig(**SMALL, architectures=["BertForSequenceClassification"])
DEFAULT_LR, UNBIASED = TrainingArguments.learning_rate, "subspace=random,unbiased=true"
ROUNDED = "stochastic_rounding=true"
USUAL, LEAN = f"preset=finetune,{ROUNDED}", f"preset=finetune,residual=none,{ROUNDED}"
INT8 = "source=activations,weight_dtype=int8"
NAMES = [["q_proj"], ["q_proj", "v_proj"], ["layers.1.mlp.up_proj"], ["model.layers.0.self_attn.q_proj", "o_proj"]]


@pytest.fixture
def suggested(capsys, tmp_path):
    """A config's matrices as estimated with some words, and the command parsed."""

    def run(config, *words: str):
        path = tmp_path / "a model"
        config.save_pretrained(path)
        report = report_of(capsys, str(path), "--rank", "8", "--seq", "32", "--gpu", "1GB", "--reserve", "0KB", *words)
        assert report["suggestion"]["command"] is None  # of a config alone
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
            [*shlex.split(report["suggestion"]["options"]), "--output_dir", str(tmp_path / "out")]
        )
        return report, args, meta_model(AutoConfig.from_pretrained(path), DTYPES[report["dtype"]])

    return run


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_names(names, suggested):
    _, args, model = suggested(LlamaConfig(**SMALL), "--target_modules", *names)
    assert isinstance(args.optim_target_modules, str)
    assert list(select(model, args.optim_target_modules).projected) == list(select(model, names).projected)


@pytest.mark.parametrize("names", [["gate_up_proj"], ["experts", "q_proj"]], ids=" ".join)
def test_names_of_experts(names, suggested):
    config = MixtralConfig(**SMALL, num_local_experts=3, num_key_value_heads=2)
    _, args, model = suggested(config, "--target_modules", *names)
    assert list(select(model, args.optim_target_modules).projected) == list(select(model, names).projected)


def test_one_regular_expression(suggested):
    report, args, model = suggested(LlamaConfig(**SMALL), "--target_modules", ".*(q|v)_proj")
    assert report["matrices"] == 4 and args.optim_target_modules == ".*(q|v)_proj"
    assert len(select(model, args.optim_target_modules).projected) == 4


@pytest.mark.parametrize("words", [(), ("--target_modules", "all-linear"), ("--target_modules", "all_linear")])
def test_all_linear(words, suggested):
    report, args, _ = suggested(LlamaConfig(**SMALL), *words)
    assert report["matrices"] == 14 and args.optim_target_modules == "all-linear"


def test_other_options_are_one_word_each(suggested):
    given = "alpha=2, projection_dtype=bfloat16"
    _, args, _ = suggested(LlamaConfig(**SMALL), "--optim_args", given)
    assert args.optim_args == f"rank=8,{USUAL},{given}" and args.optim == "osd_adamw8bit"
    assert not args.gradient_checkpointing and args.per_device_train_batch_size == 1


def test_what_is_excluded(capsys, tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    words = (str(tmp_path), "--rank", "8", "--seq", "32", "--gpu", "1GB", "--reserve", "0KB")
    whole, part = (report_of(capsys, *words, *own) for own in ((), ("--exclude_modules", "q_proj", "up_proj")))
    assert part["matrices"] == whole["matrices"] - 4
    for method in ("osd_adamw8bit", "galore_adamw"):
        rows = [next(row for row in report["rows"] if row["method"] == method) for report in (whole, part)]
        assert rows[1]["bytes"]["state"] > rows[0]["bytes"]["state"]
    options = part["suggestion"]["options"]
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_args_into_dataclasses(
        [*shlex.split(options), "--output_dir", str(tmp_path / "out")]
    )
    assert args.osd_exclude_modules == "q_proj,up_proj"
    for key in ("exclude_modules", "target_modules"):
        assert f"'{key}' has no effect in --optim_args of an estimate: use --{key}." in refused(
            capsys, *words, "--optim_args", f"{key}=q_proj"
        )


def test_a_regular_expression_that_matches_nothing(capsys, tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    said = refused(capsys, str(tmp_path), "--rank", "8", "--target_modules", "(q|v)_proj")
    assert "this string is a regular expression for the whole name of a module" in said


@pytest.mark.parametrize(
    ("config", "words", "rate", "optim_args"),
    [
        (GENERATES, ("--dtype", "fp32"), 1e-4, "rank=8,preset=finetune"),
        (GENERATES, (), 1e-4, f"rank=8,{USUAL}"),
        (CLASSIFIES, (), 5e-5, f"rank=8,{USUAL}"),
        (GENERATES, ("--preset", "osd_adamw"), 1e-4, f"rank=8,{USUAL}"),
        (GENERATES, ("--preset", "pretrain"), 1e-3, f"rank=8,{ROUNDED},preset=pretrain"),
        (GENERATES, ("--preset", "reference"), DEFAULT_LR, f"rank=8,{ROUNDED},preset=reference"),
        (GENERATES, ("--optim_args", "preset=pretrain"), 1e-3, f"rank=8,{ROUNDED},preset=pretrain"),
        (GENERATES, ("--optim_args", "scale=0.25"), 2e-4, f"rank=8,{ROUNDED},scale=0.25"),
        (GENERATES, ("--optim_args", "residual=scaled"), 2e-4, f"rank=8,scale=1,{ROUNDED},residual=scaled"),
        (CLASSIFIES, ("--optim_args", "source=activations"), 5e-5, f"rank=8,{USUAL},source=activations"),
        (CLASSIFIES, ("--optim_args", INT8), 5e-5, f"rank=8,{LEAN},{INT8}"),
        (CLASSIFIES, ("--optim_args", f"{INT8},residual_sample=2"), 5e-5, f"rank=8,{USUAL},{INT8},residual_sample=2"),
        (GENERATES, ("--optim_args", UNBIASED), 2e-4, f"rank=8,scale=1,{ROUNDED},{UNBIASED}"),
        (GENERATES, ("--optim", "osd_lion"), DEFAULT_LR, f"rank=8,{ROUNDED}"),
        (GENERATES, ("--optim", "rso_adamw"), DEFAULT_LR, f"rank=8,{ROUNDED}"),
    ],
)
def test_what_to_start_from(config, words, rate, optim_args, suggested):
    """`preset=finetune` where it goes with what is asked for, at AdamW's learning rates; see docs/choosing.md.

    And of bfloat16 weights steps that are not rounded away.
    """
    _, args, _ = suggested(config, *words)
    assert args.learning_rate == rate and args.optim_args == optim_args


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("100MB", {"rank": 8, "batch": 4, "gradient_checkpointing": False}),
        ("1.8MB", {"rank": 8, "batch": 4, "gradient_checkpointing": True}),
        ("1.2MB", {"rank": 8, "batch": 1, "gradient_checkpointing": True}),
        ("0.8MB", {"rank": 8, "batch": 1, "gradient_checkpointing": True}),  # layerwise
        ("0.6MB", {"rank": None, "batch": 1, "gradient_checkpointing": False}),
        ("0.1MB", None),
    ],
)
def test_the_suggestion_is_the_least_change_that_fits(gpu, expected, tmp_path, capsys):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    folder = str(tmp_path)
    words = (folder, "--rank", "8", "--seq", "64", "--batch", "4", "--gpu", gpu, "--reserve", "0KB")
    found = report_of(capsys, *words)["suggestion"]
    if expected is None:
        assert found is None and f"nothing fits {gpu}" in estimate(capsys, *words)
        return
    if expected["batch"] == 1:
        expected["batch"] = found["batch"]
        assert 1 <= found["batch"] < 4
    assert {key: found[key] for key in expected} == expected
    assert f"--per_device_train_batch_size {found['batch']}" in found["options"]
    if expected["rank"] is None:  # forward passes alone
        assert "--optim subzero" in found["options"] and "osd_" not in found["options"]
        more = ("--subzero_args", "rank=8,source=activations")
        followed = report_of(capsys, *words[:-4], "--gpu", gpu, "--reserve", "0KB", *more)
        assert (
            "--optim subzero --optim_args rank=8,source=activations --learning_rate 1e-6 --max_grad_norm 0"
            in followed["suggestion"]["options"]
        )
        hint = "estimate again with --layerwise --optim_args source=activations,weight_dtype=int8."
        assert hint in estimate(capsys, *words)
        said = estimate(capsys, *words, "--optim", "rso_adamw8bit")
        assert hint.replace("--layerwise", "--optim osd_adamw8bit --layerwise") in said
        asked = ("--optim_args", "source=activations,weight_dtype=int8")
        assert "estimate again" not in estimate(capsys, *words, *asked)
        assert "\nMeZO, forward only" in estimate(
            capsys, *words[:-4], "--subzero_args", "queries=4,perturbation=dense"
        )
        assert "Unknown option `rnak` in `--subzero_args`" in refused(capsys, *words[:-4], "--subzero_args", "rnak=8")
        return
    assert found["options"].endswith(" --gradient_checkpointing True") == found["gradient_checkpointing"]
    layerwise = "_layerwise" * (gpu == "0.8MB")
    assert ("It goes with gradient accumulation if you add residual=none." in estimate(capsys, *words)) == bool(
        layerwise
    )
    usual = "rank=8,preset=finetune,stochastic_rounding=true"
    options = f"--optim osd_adamw8bit{layerwise} --learning_rate 0.0001 --optim_args {usual}"
    assert options in found["options"]
