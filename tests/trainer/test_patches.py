"""What we change in transformers: names that any script can use, and functions that are replaced once."""

import ast
import copy
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_osd
from hf_osd import OSD, OSDCallback, register
from hf_osd.layers import CHILD
from hf_osd.optim import OPTIM_NAMES
from hf_osd.optim.step.geometry import ProjectedGeometry
from hf_osd.trainer.patches import PATCHES
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("name", OPTIM_NAMES)
def test_every_name_builds_its_optimizer_in_a_stock_trainer(name, stock):
    model = tiny_llama()
    optimizer = Trainer(model, stock(optim=name, optim_args="rank=4", learning_rate=2e-3)).create_optimizer()
    assert type(optimizer) is OSD
    assert {group["weight_rule"] for group in optimizer.param_groups} == {OPTIM_NAMES[name]}
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    found = {id(p): optimizer.weight_of(p).geometry for group in optimizer.trained_groups for p in group["params"]}
    assert found.keys() == {id(p) for name, p in model.named_parameters() if not name.startswith(CHILD)}
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


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("osd_adamw_8bit", "osd_adamw8bit"),
        ("OSD_adamw", "osd_adamw"),
        ("rso_adamw_8bit", "rso_adamw8bit"),
        ("sub_zero", "subzero"),
    ],
)
def test_a_misspelt_name_of_ours_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"please select one of .*Did you mean '{nearest}'"):
        TrainingArguments("out", optim=name, use_cpu=True)


@pytest.mark.parametrize("name", ["adamw8bit", "galore_adamw_8", "adamw_torch_fuse", "nothing like it"])
def test_nothing_of_ours_is_suggested_for_other_names(name):
    with pytest.raises(ValueError, match="please select one of") as caught:
        TrainingArguments("out", optim=name, use_cpu=True)
    assert "Did you mean" not in str(caught.value)


def test_registering_twice_changes_nothing():
    def snapshot() -> tuple:
        members = [id(member) for member in OptimizerNames]
        functions = [getattr(patch.owner, patch.name) for patch in PATCHES]
        return members, dict(_OPTIMIZER_HANDLERS), list(transformers_trainer.DEFAULT_CALLBACKS), functions

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


# Functions that are replaced


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_function_is_replaced_once_and_looks_as_before(patch):
    replaced = getattr(patch.owner, patch.name)
    original = replaced.__wrapped__
    assert original.__module__.startswith("transformers.") and not hasattr(original, "__wrapped__")
    assert replaced.__name__ == patch.name and replaced.__doc__ == original.__doc__ and patch.why
    assert inspect.signature(replaced) == inspect.signature(original)


def test_the_class_that_makes_a_model_card_is_covered_with_its_first_trainer(stock):
    class Own(Trainer):
        def create_model_card(self, model_name=None):
            """Its own."""

    class Heir(Own):
        pass

    own = Own.create_model_card
    for _ in range(2):
        Heir(tiny_llama(), stock())
        assert Own.create_model_card.__wrapped__ is own and Own.create_model_card.__doc__ == "Its own."
    assert "create_model_card" not in vars(Heir)


MUTATORS = {"append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "sort", "update"}
SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__"}


def root(node: ast.AST) -> str | None:
    """The name that `name.a[0].b` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changes(tree: ast.AST) -> Iterator[int]:
    """Lines that change what was imported from transformers, or set an attribute of an argument of its types."""
    nodes = list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or "transformers" for alias in node.names if alias.name.startswith("transformers")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            names |= {alias.asname or alias.name for alias in node.names}
    arguments = {
        node.arg for node in nodes if isinstance(node, ast.arg) and node.annotation and root(node.annotation) in names
    }
    for node in nodes:  # `callbacks = trainer.DEFAULT_CALLBACKS` is the same object
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Attribute | ast.Name):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if root(node.value) in names:
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in nodes:
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [one for target in node.targets for one in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        inner = [target for target in targets if not isinstance(target, ast.Name)]
        if any(root(target) in names | arguments for target in inner):
            yield node.lineno
        if isinstance(node, ast.AugAssign) and root(node.target) in names:
            yield node.lineno
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else root(node.func)
            if called in SETTERS and node.args and root(node.args[0]) in names | arguments:
                yield node.lineno
            if called in MUTATORS and isinstance(node.func, ast.Attribute) and root(node.func.value) in names:
                yield node.lineno


PLANTED = """
import transformers
from transformers import Trainer, trainer as module
from transformers import TrainerState
def f(state: TrainerState, mine: dict): mine["a"] = state.step; state.log.append(1)
Trainer.a = 1
module.b, x = 1, 2
setattr(Trainer, "c", 1)
type.__setattr__(Trainer, "d", 1)
module.TABLE["e"] = 1
module.TABLE.update(f=1)
callbacks: list = module.CALLBACKS
callbacks += [1]
del transformers.g
def f(state: TrainerState): state.h = 1
def f(trainer: Trainer): trainer.state.i = 1
"""


def test_transformers_is_changed_in_one_file():
    assert sorted(set(changes(ast.parse(PLANTED)))) == [6, 7, 8, 9, 10, 11, 13, 14, 15, 16]
    package = Path(hf_osd.__file__).parent
    found = {
        str(file.relative_to(package)): lines
        for file in package.rglob("*.py")
        if (lines := list(changes(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert found.keys() == {"trainer/patches.py"}, found
