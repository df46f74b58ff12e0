"""The names in transformers: any script can use them, and nothing that it writes needs us to be read."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from hf_osd import OSD, OSDCallback, OSDTrainer, OSDTrainingArguments, register
from hf_osd.optim import OPTIM_NAMES
from hf_osd.optim.step.geometry import ProjectedGeometry
from reference.tiny_models import tiny_llama


@pytest.fixture
def stock(tmp_path):
    """Stock training arguments."""

    def make(**given: Any) -> TrainingArguments:
        return TrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **given})

    return make


@pytest.mark.parametrize("name", OPTIM_NAMES)
def test_every_name_builds_its_optimizer_in_a_stock_trainer(name, stock):
    model = tiny_llama()
    optimizer = Trainer(model, stock(optim=name, optim_args="rank=4", learning_rate=2e-3)).create_optimizer()
    assert type(optimizer) is OSD
    assert {group["weight_rule"] for group in optimizer.param_groups} == {OPTIM_NAMES[name]}
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    found = {id(p): optimizer.weight_of(p).geometry for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {id(p) for p in model.parameters()}
    assert sum(isinstance(geometry, ProjectedGeometry) and geometry.rank == 4 for geometry in found.values()) == 14


@pytest.mark.parametrize("name", OPTIM_NAMES)
def test_a_member_behaves_like_transformers_own(name):
    member = OptimizerNames(name)
    assert isinstance(member, OptimizerNames) and isinstance(member, str)
    assert member == name and member.value == name and hash(member) == hash(name)
    assert member.name == name.upper()
    assert OptimizerNames[name.upper()] is member and getattr(OptimizerNames, name.upper()) is member
    assert OptimizerNames(member) is member
    assert list(OptimizerNames).count(member) == 1 and member in OptimizerNames
    assert name in {one.value for one in OptimizerNames}
    own = OptimizerNames.ADAMW_TORCH
    assert repr(member) == repr(own).replace("ADAMW_TORCH", name.upper()).replace("adamw_torch", name)
    assert str(member) == str(own).replace("ADAMW_TORCH", name.upper())


def test_transformers_own_members_are_untouched():
    assert OptimizerNames("adamw_torch") is OptimizerNames.ADAMW_TORCH
    assert pickle.loads(pickle.dumps(OptimizerNames.ADAMW_TORCH)) is OptimizerNames.ADAMW_TORCH
    with pytest.raises(ValueError, match="osd_adam .*please select one of .*osd_adamw8bit"):
        OptimizerNames("osd_adam")


def test_registering_twice_changes_nothing():
    def snapshot() -> tuple:
        members = [id(member) for member in OptimizerNames]
        return members, dict(_OPTIMIZER_HANDLERS), list(transformers_trainer.DEFAULT_CALLBACKS)

    before = snapshot()
    register()
    register()
    assert snapshot() == before
    assert transformers_trainer.DEFAULT_CALLBACKS.count(OSDCallback) == 1
    assert {str(getattr(key, "value", key)) for key in _OPTIMIZER_HANDLERS} >= OPTIM_NAMES.keys()


def test_every_trainer_has_the_callback_once(stock):
    for optim in ("osd_adamw", "adamw_torch"):
        callbacks = Trainer(tiny_llama(), stock(optim=optim)).callback_handler.callbacks
        assert sum(isinstance(callback, OSDCallback) for callback in callbacks) == 1


def test_arguments_survive_copies_and_pickles_here(stock):
    args = stock(optim="osd_adamw8bit", optim_args="rank=4")
    member = OptimizerNames("osd_adamw8bit")
    assert args.optim is member
    for copied in (copy.deepcopy(args), copy.copy(args), pickle.loads(pickle.dumps(args))):
        assert copied.optim == "osd_adamw8bit" and copied.optim_args == "rank=4"
        assert copied.to_dict()["optim"] == "osd_adamw8bit"
        assert isinstance(Trainer(tiny_llama(), copied).create_optimizer(), OSD)
    assert copy.deepcopy(args).optim is member
    assert json.loads(args.to_json_string())["optim"] == "osd_adamw8bit"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) == "osd_adamw8bit"


LOAD = """
import sys
import torch, transformers
from transformers.training_args import OptimizerNames
args = torch.load(sys.argv[1], weights_only=False)
assert type(args) is transformers.TrainingArguments, type(args)
assert args.optim == "osd_adamw8bit" and args.optim_args == "rank=4"
assert args.to_dict()["optim"] == "osd_adamw8bit"
assert not any(name.split(".")[0] == "hf_osd" for name in sys.modules)
assert "osd_adamw8bit" not in {one.value for one in OptimizerNames}
print("loaded")
"""


def test_training_args_bin_loads_where_we_are_not_installed(stock, tmp_path):
    # The file that Trainer itself writes beside a model.
    trainer = Trainer(tiny_llama(), stock(optim="osd_adamw8bit", optim_args="rank=4"))
    trainer.save_model(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "training_args.bin"
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("loaded")


def test_osd_trainer_refuses_other_optimizers(stock):
    with pytest.raises(ValueError, match="OSDTrainer needs one of optim=osd_adamw, .*got 'adamw_torch'. Use Trainer"):
        OSDTrainer(tiny_llama(), stock(optim="adamw_torch")).create_optimizer()


def test_osd_trainer_builds_what_a_stock_trainer_builds(stock):
    model = tiny_llama()
    args = stock(optim="osd_adamw", optim_args="rank=4,alpha=2", weight_decay=0.1, adam_beta2=0.95, seed=3)
    stock_groups, groups = (cls(model, args).create_optimizer().param_groups for cls in (Trainer, OSDTrainer))
    for group, other in zip(stock_groups, groups, strict=True):
        assert group.keys() == other.keys()
        assert all(a is b for a, b in zip(group["params"], other["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_osd_trainer_keeps_the_optimizer_it_is_given(stock):
    model = tiny_llama()
    own = torch.optim.SGD(model.parameters(), 0.1)
    trainer = OSDTrainer(model, stock(optim="osd_adamw"), optimizers=(own, None))
    assert trainer.create_optimizer() is own


def test_osd_trainer_hears_an_overridden_choice_of_decay(stock):
    class OnlyHead(OSDTrainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return ["lm_head.weight"]

    args = stock(optim="osd_adamw", optim_args="rank=4", weight_decay=0.1)
    decays = {
        name: group["weight_decay"]
        for group in OnlyHead(tiny_llama(), args).create_optimizer().param_groups
        for name in group["param_names"]
    }
    assert {name for name, decay in decays.items() if decay} == {"lm_head.weight"}
    assert decays["lm_head.weight"] == 0.1 and len(decays) == len(list(tiny_llama().named_parameters()))


def test_osd_arguments_work_in_a_stock_trainer(tmp_path: Path):
    args = OSDTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", optim="osd_lion", osd_rank=4, osd_side="right"
    )
    group = Trainer(tiny_llama(), args).create_optimizer().param_groups[0]
    assert group["weight_rule"] == "lion" and set(group["sides"]) == {"right"}
