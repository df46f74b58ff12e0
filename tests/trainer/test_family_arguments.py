"""Options of the other subspaces, residuals and operators through `optim_args`, fields and flags."""

from typing import Any

import pytest
from made_optimizers import optimizer_of
from transformers import HfArgumentParser, TrainingArguments

from hf_osd import OSDTrainingArguments


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("update_interval", 7, {"subspace": "random"}),
        ("update_interval", 7, {"subspace": "cosine"}),
        ("update_interval", 7, {"subspace": "importance"}),
        ("distribution", "gaussian", {"subspace": "random"}),
        ("mixing", 0.5, {"subspace": "power"}),
        ("projection_interval", 3, {"subspace": "power"}),
        ("residual_scale", 0.1, {"residual": "sign"}),
        ("carry_moments", True, {"subspace": "svd"}),
    ],
)
def test_reaches_the_optimizer_and_is_refused_alone(key: str, value: Any, others: dict[str, str], tmp_path):
    given: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "optim": "osd_adamw"}
    text = ",".join(f"{name}={entry}" for name, entry in {"rank": 4, key: value, **others}.items())
    fields = {f"osd_{name}": entry for name, entry in {"rank": 4, key: value, **others}.items()}
    for args in (TrainingArguments(**given, optim_args=text), OSDTrainingArguments(**given, **fields)):
        group = optimizer_of(args).param_groups[0]
        assert {name: group[name] for name in {key: value, **others}} == {key: value, **others}
    if key not in ("projection_interval", "carry_moments"):  # which work with the defaults
        with pytest.raises(ValueError, match=f"`{key}` of .* has no effect"):
            OSDTrainingArguments(**given, osd_rank=4, **{f"osd_{key}": value})


def test_the_family_on_a_command_line(tmp_path):
    flags = {
        "osd_subspace": "random",
        "osd_distribution": "orthonormal",
        "osd_update_interval": "9",
        "osd_carry_moments": "True",
    }
    flags |= {
        "osd_side": "two_sided",
        "osd_residual": "scaled",
        "osd_residual_scale": "0.5",
    }
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --optim osd_lion --osd_rank 4".split()
    line += [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    (args,) = HfArgumentParser(OSDTrainingArguments).parse_args_into_dataclasses(line)
    group = optimizer_of(args).param_groups[0]
    assert {flag: str(group[flag.removeprefix("osd_")]) for flag in flags} == flags
    assert group["carry_moments"] is True and (group["weight_rule"], group["rank"]) == ("lion", 4)
    assert group["sides"] == ["two_sided"] * 14
