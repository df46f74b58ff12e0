"""`rank_pattern`: the ranks that peft would give, at every entrance, and what is refused."""

from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_osd
from hf_osd import OSD, OSDTrainingArguments, create_osd_optimizer
from hf_osd.optim.selection.patterns import RANKS as RANK_PATTERN
from hf_osd.optim.step.geometry import ProjectedGeometry
from reference.tiny_models import tiny_llama


PATTERNS: list[dict[str, int]] = [
    {"q_proj": 2},
    {"layers.0.*": 2, "q_proj": 5},  # the first that matches counts
    {"layers.0.self_attn.q_proj": 3, "q_proj": 2},
    {"layers.0.mlp.*": 6, "mlp.up_proj|v_proj": 5},
    {r"layers\.\d\.self_attn\.[kv]_proj": 7, "model.layers.1.mlp.down_proj": 1},
]
TEXT, RANKS = "layers.0.mlp.*:6;q_proj:2", {"layers.0.mlp.*": 6, "q_proj": 2}


def ranks_by_module(optimizer: OSD) -> dict[str, int]:
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            geometry = optimizer.weight_of(p).geometry
            if isinstance(geometry, ProjectedGeometry):
                found[geometry.name.removesuffix(".weight")] = geometry.rank
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranks_are_pefts(pattern: dict[str, int]):
    config = LoraConfig(r=4, rank_pattern=pattern, target_modules="all-linear")
    lora = get_peft_model(tiny_llama(), config).base_model.model
    theirs = {name: module.r["default"] for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    ours = ranks_by_module(create_osd_optimizer(tiny_llama(), rank=4, rank_pattern=pattern))
    assert ours == theirs and len(set(ours.values())) > 1
    text = ";".join(f"{key}:{rank}" for key, rank in pattern.items())
    assert ranks_by_module(create_osd_optimizer(tiny_llama(), rank=4, rank_pattern=text)) == ours


@pytest.mark.parametrize(
    "key", ["q_proj.weight", r"self_attn\.q_proj\.weight", "model.layers.[01].self_attn.q_proj.weight"]
)
def test_a_parameters_name_gives_its_rank(key: str):
    ranks = ranks_by_module(create_osd_optimizer(tiny_llama(), rank=4, rank_pattern={key: 2}))
    assert {name.rpartition(".")[2] for name, rank in ranks.items() if rank == 2} == {"q_proj"}
    with pytest.raises(ValueError, match="matches no projected module or matrix"):  # no module's name ends in t
        create_osd_optimizer(tiny_llama(), rank=4, rank_pattern={r"\w*t": 2})


def test_every_entrance_of_a_trainer(tmp_path):
    given: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "optim": "osd_adamw"}
    line = [f"--{key}={value}" for key, value in given.items()] + ["--osd_rank=4", f"--osd_rank_pattern={TEXT}"]
    found = [
        TrainingArguments(**given, optim_args=f"rank=4,rank_pattern={TEXT}"),
        OSDTrainingArguments(**given, osd_rank=4, osd_rank_pattern=TEXT),
        HfArgumentParser(OSDTrainingArguments).parse_args_into_dataclasses(line)[0],
    ]
    expected = ranks_by_module(create_osd_optimizer(tiny_llama(), rank=4, rank_pattern=RANKS))
    for args in found:
        optimizer = Trainer(tiny_llama(), args).create_optimizer()
        assert ranks_by_module(optimizer) == expected and set(expected.values()) == {2, 4, 6}
        for group in optimizer.param_groups:  # decay is decided by name as ever
            assert len({group["weight_decay"]}) == 1 and group["rank"] in (2, 4, 6, None)
    with pytest.raises(ValueError, match="`rank_pattern` must name modules and their ranks"):
        OSDTrainingArguments(**given, osd_rank_pattern="q_proj=2")
    with pytest.raises(ValueError, match="'rank_pattern' is given twice"):
        OSDTrainingArguments(**given, osd_rank_pattern=TEXT, optim_args=f"rank_pattern={TEXT}")


def test_names_pass_through_pefts_wrappers():
    model = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])
    peft_model = get_peft_model(model, config)
    optimizer = create_osd_optimizer(peft_model, rank=4, rank_pattern={"layers.0.mlp.up_proj": 3, "lm_head": 5})
    assert sorted(ranks_by_module(optimizer).values()) == [3, 4, 5]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "q_proj",
        "q_proj:0",
        "q_proj:-2",
        "q_proj:2.5",
        "q_proj:2;",
        ":4",
        {"q_proj": True},
        {"q_proj": "4"},
        {"": 4},
        {4: 4},
        ["q_proj:4"],
        [("q_proj", 4)],
    ],
)
def test_another_form_is_refused(pattern):
    with pytest.raises(ValueError, match="`rank_pattern` must name modules and their ranks"):
        RANK_PATTERN.parse(pattern)


def test_patterns_that_are_wrong_or_match_nothing_are_refused():
    assert RANK_PATTERN.parse(None) == {} and RANK_PATTERN.parse(TEXT) == RANKS
    assert RANK_PATTERN.parse({"q_proj": np.int64(4)}) == {"q_proj": 4}
    with pytest.raises(ValueError, match=r"'\(\?i\)Q_PROJ' in `rank_pattern` is no regular expression: global flags"):
        RANK_PATTERN.parse("(?i)Q_PROJ:4")
    with pytest.raises(ValueError, match="'q_proj' stands twice in `rank_pattern`"):
        create_osd_optimizer(tiny_llama(), rank=4, rank_pattern="q_proj:4;k_proj:3;q_proj:2")
    with pytest.raises(ValueError, match=r"'q_proj\(' in `rank_pattern` is no regular expression"):
        RANK_PATTERN.parse("q_proj(:4")
    for pattern, unused in (({"query": 4}, "'query'"), ({"q_proj": 4, "layers.0.self_attn.q_proj": 2}, "'layers.0")):
        with pytest.raises(ValueError, match=f"{unused}.* in `rank_pattern` matches no projected module"):
            create_osd_optimizer(
                tiny_llama(), rank=3, rank_pattern=pattern
            ) if "query" in pattern else RANK_PATTERN.values({"layers.0.self_attn.q_proj.weight": 3}, pattern)


def test_a_rank_pattern_resumes_with_the_same_ranks_only():
    first = create_osd_optimizer(tiny_llama(), rank=4, rank_pattern=RANKS)
    create_osd_optimizer(tiny_llama(), rank=4, rank_pattern=TEXT).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="(?s)projected: rank 2 right.*projected: rank 4 right"):
        hf_osd.create_osd_optimizer(tiny_llama(), rank=4).load_state_dict(first.state_dict())
