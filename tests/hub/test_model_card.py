"""Our section of a model card tells what the run was."""

import copy
import dataclasses
import importlib.util
import math
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from card_reading import HEADED, LOG, code, head, rows
from huggingface_hub import ModelCard
from transformers import TrainerState, TrainingArguments

import hf_osd
from hf_osd import OSDTrainingArguments
from hf_osd.hub import ProjectionState
from hf_osd.hub.card import picture
from hf_osd.hub.card.model_card import PICTURE_NAME, CardFacts, update_card
from hf_osd.hub.card.section import render_section
from hf_osd.optim import adamw_state_bytes, state_bytes
from hf_osd.optim.options.table import OPTIONS, in_effect


ROOT = Path(hf_osd.__file__).parents[1]


def test_the_facts_are_the_runs(run, llama, tmp_path):
    made = run(alpha=2.0, lambda_=0.5, scale=0.25, lr=3e-3, facts={"dataset": "some/data"})
    facts = made.facts
    linear = [p for name, p in llama.named_parameters() if "proj" in name]
    assert facts.matrices == len(linear) == 14 and facts.ranks == (4,)
    assert facts.projected_parameters == sum(p.numel() for p in linear)
    assert facts.full_size_parameters == sum(p.numel() for p in llama.parameters()) - facts.projected_parameters
    assert facts.state_bytes == state_bytes(made.optimizer)
    assert facts.adamw_bytes == adamw_state_bytes(made.optimizer)
    assert facts.eval_loss == 2.5 and facts.train_loss == 3.0 and facts.perplexity == math.exp(2.5)
    shown = rows(update_card(tmp_path, facts).read_text())
    assert shown["optimizer"] == "`osd_adamw`" and shown["rank"] == "4" and shown["subspace"] == "`online_pca`"
    assert shown["alpha (learning rate of P over the weights')"] == "2" and shown["lambda (orthogonality)"] == "0.5"
    assert shown["scale"] == "0.25" and shown["rule of P"] == "`adamw`" and shown["steps"] == "1,234"
    assert shown["learning rate"] == "0.003, linear schedule" and shown["data"] == "`some/data`"
    assert shown["projected layers"] == "`all-linear`" and shown["projected"].startswith("14 matrices, ")
    assert shown["last training loss"] == "3.0000" and shown["perplexity (per token)"] == "12.18"
    assert shown["share of AdamW's"] == f"{facts.state_bytes / facts.adamw_bytes:.0%}"
    assert dataclasses.is_dataclass(facts)
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts.steps = 0


@pytest.mark.parametrize("subspace", ["svd", "static"])
def test_a_subspace_that_does_not_learn_has_no_alpha(subspace, run, tmp_path):
    text = update_card(tmp_path, run(subspace=subspace).facts).read_text()
    shown = rows(text)
    assert not any(word in shown for word in ("rule of P", "lambda (orthogonality)", "learning rate of P"))
    assert not any(name.startswith("alpha") for name in shown)
    assert shown["subspace"] == ("`svd`, every 200 steps" if subspace == "svd" else "`static`")
    assert ("recomputes by SVD" if subspace == "svd" else "which do not change") in text
    assert "online PCA" not in text


def test_nothing_projected_and_an_optimizer_of_ones_own(run, llama, tmp_path):
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)  # optim is adamw_torch
    facts = CardFacts.from_run(hf_osd.OSD(llama.parameters()), args, TrainerState(), llama)
    text = update_card(tmp_path, facts).read_text()
    assert "no matrix was projected" in text and rows(text)["projected"] == "0 matrices, 0 parameters"
    assert "projected layers" not in rows(text) and "### Loss" not in text
    assert facts.repo_id == "user/out"
    with pytest.raises(ValueError, match="needs an OSD optimizer, got SGD"):
        CardFacts.from_run(torch.optim.SGD(llama.parameters()), args, TrainerState(), llama)


@pytest.mark.parametrize(
    ("optim", "projection_rule", "line"),
    [
        ("osd_adamw", None, "pip install ."),
        ("osd_lion", "adamw8bit", 'pip install ".[8bit]"'),
        ("osd_adamw8bit", "adamw", 'pip install ".[8bit]"'),
    ],
)
def test_how_to_install_is_what_the_readme_says(optim, projection_rule, line, run, tmp_path):
    text = update_card(tmp_path, run(optim, projection_optim=projection_rule).facts).read_text()
    assert f"`{line}` in a clone" in text
    facts = dataclasses.replace(run(optim, projection_optim=projection_rule).facts, library_name="peft")
    extras = ".[8bit,peft]" if "8bit" in line else ".[peft]"
    assert f'`pip install "{extras}"` in a clone' in update_card(tmp_path, facts).read_text()
    install = (ROOT / "README.md").read_text().partition("## Install")[2].partition("```\n")[0]
    assert 'pip install ".[8bit]" ' in install and "in a clone" in install


def test_a_base_model_in_a_folder_is_no_link(run, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "runs/base"):  # both could be names on the Hub
        llama.save_pretrained(folder)
        for name, given in ((str(tmp_path / folder), None), (folder, None), ("", folder), ("", f"./{folder}")):
            llama.config._name_or_path = name
            text = update_card(tmp_path / "out", run(facts={"base_model": given}).facts).read_text()
            assert "base_model" not in head(text) and folder not in text and "\nTrained with [Online" in text
    llama.config._name_or_path = "gpt2"
    facts = run().facts
    assert facts.base_model == "gpt2" and "(https://huggingface.co/gpt2)" in update_card(tmp_path, facts).read_text()


def test_targets_are_shown_as_given(run, tmp_path):
    pattern = r".*\.(q_proj|up_proj)"
    args = OSDTrainingArguments(
        str(tmp_path / "out"), optim="osd_adamw", optim_target_modules=pattern, report_to="none", use_cpu=True
    )
    text = update_card(tmp_path, run(args=args, target_modules=pattern).facts).read_text()
    assert "| projected layers | `" + pattern.replace("|", "\\|") + "` |" in text  # a bare bar would end the cell


def test_an_optimizer_that_was_passed_is_told_by_itself_whatever_the_arguments_say(run, tmp_path):
    others = "rank=64,preset=finetune,lr_pattern=lm_head:3,full_size_optim=sgd"
    args = TrainingArguments(str(tmp_path / "out"), optim="osd_adamw8bit", optim_args=others, report_to="none")
    asked = {
        "preset": "pretrain",
        "lr_pattern": {"q_proj": 2.0},
        "full_size_optim": "lion",
        "exclude_modules": "up_proj",
    }
    facts = run(args=args, init="orthonormal", **asked).facts
    shown, text = rows(update_card(tmp_path, facts).read_text()), render_section(facts, picture=None, projections=True)
    assert shown["optimizer"] == "`osd_adamw`" and shown["preset"] == "`pretrain`" and shown["rank"] == "4"
    assert shown["rule at full size"] == "`lion`" and shown["multiples of it"] == "`q_proj:2`"
    assert shown["embeddings' over it"] == "16" and "task head's over it" not in shown
    assert shown["start of P"] == "`orthonormal`" and shown["except"] == "`up_proj`"
    assert 'lr_pattern="q_proj:2"' in text and "embedding_lr_ratio=16" in text

    bare = rows(update_card(tmp_path / "bare", run(args=args).facts).read_text())
    told = {"preset", "multiples of it", "rule at full size", "embeddings' over it", "start of P"}
    assert not told & bare.keys() and bare["rank"] == "4"


def test_a_copy_of_an_optimizer_tells_the_same(llama):
    made = hf_osd.create_osd_optimizer(llama, rank=4, preset="pretrain", lr_pattern="q_proj:2")
    assert copy.deepcopy(made).asked == pickle.loads(pickle.dumps(made)).asked == made.asked
    assert made.asked.preset == "pretrain" and made.asked.lr_pattern == {"q_proj": 2}
    state = made.__getstate__()
    del state["asked"]  # as it was pickled before there was any
    made.__setstate__(state)
    del made.asked
    made.__setstate__(state)
    assert made.asked.preset is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "side": "right", "lambda_": 0.2},
        {"target_modules": r".*\.(q_proj|up_proj)", "projection_lr": 0.01, "lr": 2e-3},
        {"subspace": "svd", "update_interval": 7},
        {"preset": "reference"},
        {"projection_optim": "sgd", "momentum": 0.0, "scale": 0.123456789, "lr": 1.2345678e-4},
        {"weight_decay": 0.1, "projection_weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-6},
        {"weight_decay": 0.1, "preset": "pretrain", "residual_scale": 0.7},
    ],
)
def test_the_code_in_the_card_runs(options, run, llama, tmp_path):
    args = OSDTrainingArguments(
        str(tmp_path / "out"),
        optim="osd_adamw",
        optim_target_modules=options.get("target_modules"),
        report_to="none",
        use_cpu=True,
    )
    folder = tmp_path / "model"
    made = run(args=args, facts={"repo_id": str(folder)}, **options)
    llama.save_pretrained(folder)
    assert "ProjectionState" not in update_card(folder, made.facts).read_text()  # there is no P yet
    ProjectionState.from_optimizer(made.optimizer).save_pretrained(folder)
    found: dict = {}
    exec(code(update_card(folder, made.facts).read_text()), found)
    old, new = made.optimizer, found["optimizer"]
    for group, other in zip(old.param_groups, new.param_groups, strict=True):
        assert group["param_names"] == other["param_names"]
        assert group.keys() == other.keys()
        same = group.keys() - {"params", "init", "seed"}
        given = {
            name: [in_effect(own, name) if name in OPTIONS else own[name] for own in (group, other)] for name in same
        }
        if group["subspace"] == "svd" and group["rank"]:
            assert other["update_interval"] == 7
        assert not {name: values for name, values in given.items() if values[0] != values[1]}
    shown = rows(update_card(folder, made.facts).read_text())
    told = {"weight decay of P": "projection_weight_decay", "momentum": "momentum", "betas": "betas", "epsilon": "eps"}
    assert [words for words in told if words in shown] == [
        words for words, name in told.items() if name in options
    ] or (options == {"preset": "reference"} and shown["weight decay of P"] == "0.01")
    ids = torch.randint(0, 32, (2, 8))
    found["model"](input_ids=ids, labels=ids).loss.backward()
    new.step()


# Losses


@pytest.mark.parametrize(
    ("log", "perplexity"),
    [([], None), ([{"step": 1, "eval_loss": math.nan}], None), ([{"step": 1, "eval_loss": 1e4}], None), (LOG, 12.18)],
)
def test_perplexity_is_given_where_it_can_be(log, perplexity, run, tmp_path):
    facts = run(log=log, facts={"dataset": "a/b"}).facts
    assert facts.perplexity == (None if perplexity is None else pytest.approx(perplexity, abs=0.01))
    assert ("metrics" in head(update_card(tmp_path, facts).read_text())) == (perplexity is not None)


def test_a_loss_that_is_no_likelihood_has_no_perplexity(run, tmp_path):
    args = TrainingArguments(str(tmp_path), optim="osd_adamw", report_to="none", label_smoothing_factor=0.1)
    assert run(args=args).facts.perplexity is None
    trl_like = type("DPOConfig", (TrainingArguments,), {"__module__": "trl.trainer.dpo_config"})
    assert run(args=trl_like(str(tmp_path), optim="osd_adamw", report_to="none")).facts.perplexity is None
    supervised = type("SFTConfig", (TrainingArguments,), {"__module__": "trl.trainer.sft_config", "loss_type": "nll"})
    assert run(args=supervised(str(tmp_path), optim="osd_adamw", report_to="none")).facts.perplexity is not None


def test_the_picture_is_a_png_and_optional(run, tmp_path, monkeypatch, caplog):
    facts = run().facts
    text = update_card(tmp_path / "with", facts).read_text()
    assert f"({PICTURE_NAME})" in text
    assert (tmp_path / "with" / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture._say_no_picture.cache_clear()
    caplog.clear()
    for _ in range(2):
        assert "### Loss" not in update_card(tmp_path / "without", facts).read_text()
    assert [record.getMessage() for record in caplog.records] == [
        "The model card has no picture of the loss: matplotlib is not installed."
    ]
    assert [file.name for file in (tmp_path / "without").iterdir()] == ["README.md"]


def test_the_hub_takes_the_card(run, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    for name, before in (
        ("new", None),
        ("headed", HEADED.replace("language: no", "language: nb")),
        ("plain", "no head\n"),
    ):
        (tmp_path / name).mkdir()
        if before is not None:
            (tmp_path / name / "README.md").write_text(before)
        path = update_card(tmp_path / name, run(facts={"dataset": "a/b"}).facts)
        ModelCard.load(path).validate()
        assert ModelCard.load(path).data.eval_results[0].metric_value == round(math.exp(2.5), 4)
    with pytest.raises(ValueError, match="must be one of the identifiers"):
        ModelCard("---\nlicense: None!\n---\n").validate()


def test_the_example_is_what_its_script_renders(tmp_path):
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    render.main(["--output", str(tmp_path), "--max_steps", "5"])
    made, committed = ((folder / "llama-quickstart.md").read_text() for folder in (tmp_path, ROOT / "model_cards"))
    assert rows(made).keys() == rows(committed).keys()
    assert code(made) == code(committed) and head(made) == head(committed)
    assert rows(made)["steps"] == "5" and float(rows(committed)["perplexity (per token)"]) < 64  # of 256 bytes
    headings = re.compile("^#+ .*", re.MULTILINE)
    assert headings.findall(made) == headings.findall(committed)
    for folder in (tmp_path, ROOT / "model_cards"):
        assert (folder / "llama-quickstart-loss.png").read_bytes().startswith(b"\x89PNG")
    assert "](llama-quickstart-loss.png)" in committed and "/tmp" not in committed
