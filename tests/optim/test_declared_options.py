"""What follows from the declarations of options: lists as they are written, texts in files, and an option added."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_osd
from hf_osd import OSD, SubspaceRule, create_osd_optimizer
from hf_osd.hub.config import FURTHER_OPTIONS, OPTION_TYPES
from hf_osd.optim.differences import MATCHED
from hf_osd.optim.loading import RESTORED
from hf_osd.optim.options.general import Options
from hf_osd.optim.options.mode import Mode
from hf_osd.optim.options.presets import KEYWORDS
from hf_osd.optim.options.rules import rules_of
from hf_osd.optim.options.table import in_effect
from hf_osd.optim.options.texts import make_texts
from hf_osd.subspace import OnlinePCA, PowerIteration
from hf_osd.update_rules.adamw import AdamW


PACKAGE = Path(hf_osd.__file__).parent


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 12))


def test_a_checkpoint_must_match_or_is_restored():
    matched = "weight_rule source moment_dtype subspace projection_rule projection_dtype residual restart_moments"
    assert {*matched.split(), "weight_dtype", "residual_sample"} == set(MATCHED)
    restored = "alpha lambda_ scale weight_decay projection_lr projection_weight_decay betas eps momentum init seed"
    restored += (
        " update_interval projection_interval distribution mixing carry_moments residual_scale projection_sample"
    )
    assert {*restored.split(), "stochastic_rounding", "unbiased"} == set(RESTORED)


def test_the_config_of_a_saved_p():
    assert OPTION_TYPES == {
        **dict.fromkeys(("optim", "weight_rule", "projection_rule", "subspace", "side", "init"), str),
        **dict.fromkeys(("rank", "step", "seed", "update_interval"), int),
        **dict.fromkeys(("alpha", "lambda", "scale", "weight_decay", "projection_weight_decay"), float),
        **{"eps": float, "momentum": float, "betas": list},
    }
    assert FURTHER_OPTIONS == {
        **dict.fromkeys(("projection_lr", "mixing", "residual_scale"), float),
        **dict.fromkeys(
            ("source", "distribution", "residual", "projection_dtype", "moment_dtype", "weight_dtype"), str
        ),
        **dict.fromkeys(("projection_interval", "projection_sample", "residual_sample"), int),
        **dict.fromkeys(("carry_moments", "restart_moments", "stochastic_rounding", "unbiased"), bool),
    }


def test_keyword_arguments_of_the_factory():
    assert {"lambda_", "projection_optim", "betas", "weight_decay", "max_grad_norm", "preset"} < KEYWORDS.keys()
    assert not {"lambda", "projection_rule", "weight_rule", "layerwise"} & KEYWORDS.keys()
    assert KEYWORDS["projection_optim"].name == "projection_rule"


def test_what_the_name_says_is_refused_elsewhere():
    with pytest.raises(ValueError, match=r"Give optim='osd_\*_layerwise' instead of `layerwise` of create_osd_opti"):
        create_osd_optimizer(nn.Linear(8, 8), layerwise=True)
    with pytest.raises(ValueError, match=r"Give optim='osd_\*' instead of `weight_rule`"):
        create_osd_optimizer(nn.Linear(8, 8), weight_rule="lion")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"lambda_": 0.1, "mixing": None, "update_interval": None, "betas": (0.9, 0.999), "momentum": None}),
        ({"subspace": "svd"}, {"lambda_": None, "alpha": None, "update_interval": 200, "projection_rule": None}),
        ({"subspace": "power", "mixing": 0.5}, {"mixing": 0.5, "projection_interval": 1}),
        ({"weight_rule": "sgd", "projection_rule": "lion"}, {"momentum": 0.9, "betas": (0.9, 0.99), "eps": None}),
        ({"weight_decay": 0.2}, {"projection_weight_decay": 0.2, "projection_rule": "adamw"}),
        ({"weight_rule": "adamw8bit"}, {"moment_dtype": None, "projection_dtype": "float32"}),
    ],
    ids=str,
)
def test_the_value_in_effect(given: dict[str, Any], expected: dict[str, Any]):
    group = OSD([parameter()], rank=4, **given).param_groups[0]
    assert {name: in_effect(group, name) for name in expected} == expected


# Rules


def test_rules_follow_the_group():
    optimizer = OSD([parameter()], rank=4, lambda_=0.3, moment_dtype="bfloat16", projection_rule="sgd", momentum=0.5)
    group = optimizer.param_groups[0]
    rules = rules_of(group)
    assert rules.subspace == OnlinePCA(lambda_=0.3) and rules.weight == AdamW()
    assert rules.projection is not None and rules.projection.momentum == 0.5
    assert rules.weight_storage.dtype == torch.bfloat16 and rules.projection_storage.dtype is None
    group["betas"] = [0.5, 0.6]  # as a state that JSON has held
    assert rules_of(group).weight == AdamW(betas=(0.5, 0.6))
    group["subspace"] = "power"
    assert rules_of(group).subspace == PowerIteration() and rules_of(group).projection is None
    group["rank"] = None
    assert rules_of(group).projection is None


def test_the_latest_of_a_users_rules_counts():
    def define(due: bool) -> type[SubspaceRule]:
        @dataclass(frozen=True)
        class Own(SubspaceRule):
            def refresh_due(self, count: int) -> bool:
                return due

        return Own

    groups = [OSD([parameter()], rank=4, subspace=define(due)()).param_groups[0] for due in (False, True)]
    assert groups[0]["subspace"] == groups[1]["subspace"]
    assert rules_of(groups[0]).subspace.refresh_due(1) is True
    with pytest.raises(ValueError, match="The subspace rule Unknown.. is not known"):
        rules_of(groups[0] | {"subspace": "Unknown()"})


def test_rules_that_are_known_cost_one_call():
    group, calls = OSD([parameter()], rank=4).param_groups[0], []
    rules_of(group)
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        rules_of(group)
    finally:
        sys.setprofile(None)
    assert calls == ["rules_of"]


# Texts


def test_written_texts_are_what_the_declarations_make():
    """`make options` writes them."""
    texts = make_texts()
    assert {path.name for path in texts} >= {"osd.py", "arguments.py"}
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"run `make options`: {path} is out of date"


def test_the_signature_is_complete():
    defaults = {**OSD.__init__.__kwdefaults__}
    assert defaults.pop("maximize") is False
    assert [defaults.pop(name) for name in ("layers", "selection", "asked")] == [None] * 3
    assert all(defaults[name] == getattr(cls, name) for cls in (Options, Mode) for name in cls.__dataclass_fields__)
    rules = {"lambda_", "projection_interval", "update_interval", "distribution", "unbiased", "mixing"}
    rules |= {"betas", "eps", "momentum"}
    assert defaults.keys() - Options.__dataclass_fields__.keys() - Mode.__dataclass_fields__.keys() == rules


ADDED = """
import torch
from torch import nn
import hf_osd
from hf_osd.hub.config import check_config, group_options
from hf_osd.optim.loading import restored_options
from hf_osd.optim.options import rules, texts
from hf_osd.trainer.optim_args import parse_optim_args

def make(**given):
    return hf_osd.OSD([nn.Parameter(torch.zeros(8, 12))], rank=2, weight_rule="sgd", **given)

assert all(path.read_text() == text for path, text in hf_osd.optim.options.texts.make_texts().items())
group = make(damping=0.25).param_groups[0]
assert group["damping"] == 0.25 and make().param_groups[0]["damping"] is None
assert hf_osd.optim.options.rules.rules_of(group).weight.damping == 0.25
for given, message in (({"damping": 2}, "must be a number >= 0 and < 1"), ({"weight_rule": "lion"}, "no effect with")):
    try:
        hf_osd.OSD([nn.Parameter(torch.zeros(8, 12))], rank=2, **{"weight_rule": "sgd", "damping": 0.5} | given)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(given)
assert parse_optim_args("damping=0.5") == {"damping": 0.5}
args = hf_osd.OSDTrainingArguments("out", optim="osd_sgd", osd_damping=0.5, use_cpu=True)
assert hf_osd.trainer.settings.read_settings(args).options["damping"] == 0.5
assert group_options(group)["damping"] == 0.25 and "damping" not in group_options(make().param_groups[0])
assert restored_options([group], make().param_groups) == ["damping=0.25 (checkpoint) instead of 0.0"]
assert "`damping` | 0 | Share that is lost. For `sgd`. |" in open("docs/options.md").read()
assert "damping (`float`, *optional*): Share that is lost. For `sgd`. Defaults to 0." in hf_osd.OSD.__doc__
from hf_osd.hub.card.section import _rows
from types import SimpleNamespace
options = {name: (value,) for name, value in group_options(group).items()}
facts = dict.fromkeys("optim preset init targets exclude eval_loss train_loss perplexity".split())
facts |= dict(lr_pattern=None, full_size_optim=None, lr_ratios={})
facts |= dict(options=options, matrices=1, from_activations=0, projections=1, learning_rate=1.0, lr_scheduler="linear")
facts |= dict(full_size_parameters=0, projected_parameters=1, datasets=(), steps=1)
assert ("damping", "`0.25`") in _rows(SimpleNamespace(**facts))
print("complete")
"""


def test_an_option_is_one_line_and_one_command(tmp_path: Path):
    """An option of SGD, in a copy of the package: checked, a key, a field, in files, on the card, in every text."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "hf_osd", ignore=ignored)
    (tmp_path / "docs").mkdir()
    shutil.copy(PACKAGE.parent / "docs" / "options.md", tmp_path / "docs")
    path = tmp_path / "hf_osd" / "update_rules" / "sgd.py"
    text, line = path.read_text(), "    momentum: float = option("
    assert text.count(line) == 1
    own = '    damping: float = option(0.0, "Share that is lost.", check=number(0, below=1), card="damping")\n'
    path.write_text(text.replace(line, own + line))

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    wrote = run("-m", "hf_osd.optim.options.texts").splitlines()
    assert len(wrote) == 3 and all(line.startswith(f"wrote {tmp_path}") for line in wrote)
    assert run("-c", ADDED) == "complete\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rnk": 4}, "`rnk` in create_osd_optimizer. Did you mean `rank`"),
        ({"target_module": "q"}, "Did you mean `target_modules`"),
        ({"exclude": "q"}, "Did you mean `exclude_modules`"),
        ({"lambda_": -1}, "`lambda_` of create_osd_optimizer must be a number >= 0, got -1"),
        ({"projection_optim": "adma"}, "`projection_optim` of create_osd_optimizer must be one of .*'adamw'"),
    ],
)
def test_messages_name_what_the_factory_takes(given, message):
    with pytest.raises(ValueError, match=message):
        create_osd_optimizer(nn.Linear(8, 8), **given)
