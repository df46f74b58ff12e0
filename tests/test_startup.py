"""The promise of `import hf_osd`: whoever imports transformers' Trainer, and when, finds it prepared."""

import importlib
import inspect
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments
from transformers import __version__ as version
from transformers.training_args import OptimizerNames

import hf_osd
from hf_osd import startup
from hf_osd.names import add_names
from hf_osd.optim import OPTIM_NAMES


def python(code: str, *words: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


STATE = """
import json
from transformers import HfArgumentParser, TrainingArguments
from transformers import trainer
from transformers.training_args import OptimizerNames
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from hf_osd.trainer.patches import PATCHES

(optim,) = [action for action in HfArgumentParser(TrainingArguments)._actions if action.dest == "optim"]
print("STATE " + json.dumps({
    "names": [member.value for member in OptimizerNames if member.value.startswith(("osd_", "rso_"))],
    "listed": "rso_adamw8bit" in optim.choices,
    "handled": all(member in _OPTIMIZER_HANDLERS for member in OptimizerNames if member.value.startswith("osd_")),
    "callbacks": [callback.__name__ for callback in trainer.DEFAULT_CALLBACKS],
    "patched": [getattr(getattr(patch.owner, patch.name), "replaced_by_hf_osd", False) for patch in PATCHES],
}))
"""
ORDERS = {
    "ours first": "import hf_osd, transformers",
    "ours last": "import transformers.trainer, hf_osd",
    "between arguments and trainer": "import transformers.training_args, hf_osd, transformers.trainer",
    "a module of ours that imports the trainer": "import hf_osd.trainer.callback",
    "again and again": "import hf_osd, importlib, transformers.trainer; hf_osd.register(); importlib.reload(hf_osd); "
    "importlib.reload(transformers.training_args)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_everything_is_there_once_in_any_order(order):
    (line,) = [line for line in python(ORDERS[order] + STATE).splitlines() if line.startswith("STATE ")]
    state = json.loads(line.removeprefix("STATE "))
    assert state.pop("names") == [*OPTIM_NAMES]
    assert state.pop("callbacks") == ["DefaultFlowCallback", "OSDCallback"]
    assert len(state["patched"]) > 4 and all(state.pop("patched"))
    assert state == {"listed": True, "handled": True}


def test_each_act_happens_once_and_a_fault_of_ours_is_told():
    code = """
import hf_osd.startup as startup

calls = []
def counted(name, act):
    return lambda module: (calls.append(name), act(module))
def fail(module):
    raise KeyError("handlers")
acts = {name: counted(name, act) for name, act in startup.ACTS.items()}
startup.ACTS.update(acts, **{"transformers.trainer": fail})
try:
    from transformers import Trainer
except ImportError as error:
    print("FAULT", type(error).__name__, error)
startup.ACTS.update(acts)
from transformers import Trainer, TrainingArguments
from hf_osd import OSDTrainer
import transformers.trainer, transformers.training_args
print("CALLS", *calls)
"""
    output = python(code)
    assert f"FAULT ImportError hf_osd cannot register with transformers {version}: KeyError('handlers')\n" in output
    assert "CALLS transformers.training_args transformers.trainer\n" in output


def test_arguments_alone_know_the_names_without_the_trainer():
    code = """
import sys
import hf_osd
from transformers import TrainingArguments
assert TrainingArguments(output_dir="out", optim="osd_adamw", report_to="none", use_cpu=True).optim.name == "OSD_ADAMW"
print("trainer" if "transformers.trainer" in sys.modules else "arguments only")
"""
    assert "arguments only" in python(code)


def test_arguments_of_a_run_are_unpickled_and_trained_with(tmp_path):
    given = {"output_dir": str(tmp_path), "optim": "osd_adamw8bit", "use_cpu": True, "report_to": "none"}
    ours = hf_osd.OSDTrainingArguments(**given, osd_rank=3)
    stock = TrainingArguments(**given, optim_args="rank=3")
    for name, args in (("ours", ours), ("stock", stock)):
        torch.save(args, tmp_path / f"{name}.bin")
    code = """
import sys
import torch
{first}
args = torch.load(sys.argv[1], weights_only=False)
from transformers import Trainer
optimizer = Trainer(torch.nn.Sequential(torch.nn.Linear(4, 4)), args).create_optimizer()
print(type(args).__name__, type(optimizer).__name__, optimizer.param_groups[0]["rank"])
"""
    assert "OSDTrainingArguments OSD 3" in python(code.format(first=""), str(tmp_path / "ours.bin"))
    assert "TrainingArguments OSD 3" in python(code.format(first="import hf_osd"), str(tmp_path / "stock.bin"))


@pytest.mark.parametrize("ours", ["from hf_osd import OSDCallback", "import hf_osd.trainer.arguments"])
def test_threads_that_import_at_the_same_time(ours):
    code = f"""
import sys, threading, time
import hf_osd

failures = []
def second():
    while "transformers.trainer" not in sys.modules:
        time.sleep(0.001)
    try:  # while the first thread is in the middle of it; the module is what unpickling arguments imports
        exec({ours!r}, {{"hf_osd": hf_osd}})
    except BaseException as error:
        failures.append(error)
thread = threading.Thread(target=second)
thread.start()
import transformers.trainer
thread.join(60)
names = [callback.__name__ for callback in transformers.trainer.DEFAULT_CALLBACKS]
print("DONE", thread.is_alive(), failures, *names)
"""
    assert "DONE False [] DefaultFlowCallback OSDCallback\n" in python(code)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module of this name on the path, which nobody has imported; its acts, in order."""
    name = "stand_in_of_test_startup"
    (tmp_path / f"{name}.py").write_text("STATE = ['executed']\n\n\ndef function():\n    return 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(startup.ACTS, name, lambda module: module.STATE.append("ours"))
    yield name
    sys.modules.pop(name, None)


def test_we_act_right_after_a_module_and_after_each_reload(stand_in):
    module = importlib.import_module(stand_in)
    assert module.STATE == ["executed", "ours"]
    assert importlib.import_module(stand_in).STATE == ["executed", "ours"]
    assert importlib.reload(module).STATE == ["executed", "ours"]


def test_a_module_is_left_as_if_we_had_not_been_there(stand_in):
    module = importlib.import_module(stand_in)
    assert type(module.__loader__) is type(json.__loader__) and module.__spec__.loader is module.__loader__
    assert inspect.getsource(module.function).startswith("def function")
    assert pickle.loads(pickle.dumps(module.function)) is module.function
    assert importlib.util.find_spec(stand_in).origin == module.__file__


def test_what_a_spec_is_asked_for_is_answered(stand_in):
    spec = importlib.util.find_spec(stand_in)
    assert spec.loader.get_code(stand_in).co_names and spec.loader.is_package(stand_in) is False
    with pytest.raises(AttributeError):
        spec.loader.no_such_thing  # noqa: B018


def test_a_fault_of_ours_fails_the_import_and_says_whose_it_is(stand_in, monkeypatch):
    def fail(module):
        raise KeyError("handlers")

    with monkeypatch.context() as patch:
        patch.setitem(startup.ACTS, stand_in, fail)
        with pytest.raises(ImportError, match="hf_osd cannot register with transformers .*: KeyError\\('handlers'\\)"):
            importlib.import_module(stand_in)
    assert importlib.import_module(stand_in).STATE == ["executed", "ours"]


def test_a_module_that_is_not_there_is_missed_as_ever(monkeypatch):
    monkeypatch.setitem(startup.ACTS, "missing_of_test_startup", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'missing_of_test_startup'"):
        importlib.import_module("missing_of_test_startup")


def test_asking_again_changes_nothing():
    before = list(sys.meta_path), list(OptimizerNames)
    startup.register_in_time()
    add_names(OptimizerNames)
    assert (list(sys.meta_path), list(OptimizerNames)) == before and sys.meta_path.count(startup.FINDER) == 1
