"""`hf-osd run`: a script that knows nothing of us runs as Python itself would run it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hf_osd.cli.main import main


REPORT = """
import json, sys
report = {"argv": sys.argv, "name": __name__, "path0": sys.path[0], "file": __file__}
report["main"] = sys.modules["__main__"].__dict__ is globals()
report["registered"] = "hf_osd" in sys.modules
print("REPORT " + json.dumps(report))
"""


def read_report(output: str) -> dict:
    (line,) = [line for line in output.splitlines() if line.startswith("REPORT ")]
    return json.loads(line.removeprefix("REPORT "))


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script in a folder of its own below the current directory; what running it changes is set back."""
    path = tmp_path / "folder" / "script.py"
    path.parent.mkdir()
    path.write_text(REPORT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return path


def test_python_m_runs_a_script(script, tmp_path):
    done = python("-m", "hf_osd", "run", "folder/script.py", "a", "--b", "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = read_report(done.stdout)
    assert ours["argv"] == ["folder/script.py", "a", "--b", "c"]
    assert ours["name"] == "__main__" and ours["main"] and ours["registered"]
    assert Path(ours["path0"]).samefile(script.parent)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "--b", "c"],
        ["--help"],
        ["-m", "x", "--module"],
        ["a", "--", "b"],
        pytest.param(["--", "a"], id="leading dashes"),
    ],
)
def test_a_script_sees_what_python_shows_it(words, script, tmp_path, capsys):
    plain = read_report(python("folder/script.py", *words, cwd=tmp_path).stdout)
    main(["run", "folder/script.py", *words])
    ours = read_report(capsys.readouterr().out)
    assert ours["argv"] == plain["argv"] == ["folder/script.py", *words]
    for key in ("name", "path0", "main"):
        assert ours[key] == plain[key], key
    assert ours["registered"] and not plain["registered"]


def test_a_script_has_an_absolute_file(script, tmp_path, capsys):
    main(["run", "folder/script.py"])
    assert read_report(capsys.readouterr().out)["file"] == str(script)
    assert read_report(python("folder/script.py", cwd=tmp_path).stdout)["file"] == str(script)


@pytest.mark.parametrize("linked", ["script", "folder"])
def test_a_symbolic_link_runs_where_python_runs_it(linked, script, tmp_path, capsys):
    (script.parent / "neighbour_of_link.py").write_text("ANSWER = 42\n")
    script.write_text(f"import neighbour_of_link\n{REPORT}")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / linked
    link.symlink_to(script if linked == "script" else script.parent)
    path = str(link if linked == "script" else link / "script.py")
    plain = read_report(python(path, cwd=tmp_path).stdout)
    main(["run", path])
    ours = read_report(capsys.readouterr().out)
    for key in ("argv", "name", "path0", "file"):
        assert ours[key] == plain[key], key
    assert Path(ours["path0"]) == script.parent.resolve()


def test_a_script_imports_its_neighbours(script, capsys):
    (script.parent / "neighbour_of_script.py").write_text("ANSWER = 42\n")
    script.write_text("from neighbour_of_script import ANSWER\nprint(ANSWER)\n")
    main(["run", str(script)])
    assert capsys.readouterr().out.strip() == "42"


def test_a_module_runs_from_the_current_directory(script, tmp_path, capsys):
    package = tmp_path / "package_of_test_run"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text(REPORT)
    main(["run", "-m", "package_of_test_run.tool", "a", "--b", "-m"])
    ours = read_report(capsys.readouterr().out)
    plain = read_report(python("-m", "package_of_test_run.tool", "a", "--b", "-m", cwd=tmp_path).stdout)
    assert ours["argv"] == plain["argv"] == [str(package / "tool.py"), "a", "--b", "-m"]
    for key in ("name", "path0", "main", "file"):
        assert ours[key] == plain[key], key


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_passed_on(code, script):
    script.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(SystemExit) as stop:
        main(["run", str(script)])
    assert stop.value.code == code


def test_an_exception_is_passed_on(script):
    script.write_text("raise RuntimeError('from the script')\n")
    with pytest.raises(RuntimeError, match="from the script"):
        main(["run", str(script)])


def test_a_missing_script_is_named(script):
    with pytest.raises(SystemExit, match="there is no script 'nowhere.py'. Use -m for a module."):
        main(["run", "nowhere.py", "--b"])


def test_without_a_command_there_is_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "usage: hf-osd" in capsys.readouterr().err


def test_the_console_command_is_the_same():
    (entry,) = metadata.entry_points(group="console_scripts", name="hf-osd")
    assert entry.load() is main


TRAIN = """
import os, sys
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2, vocab_size=32))
optimizer = Trainer(model, args).create_optimizer()
with open(f"rank_{os.environ.get('RANK', 'none')}.txt", "w") as file:
    file.write(f"{args.optim.value} {type(optimizer).__name__} {optimizer.param_groups[0]['rank']}")
"""
OPTIONS = "--output_dir out --use_cpu --report_to none --optim osd_adamw --optim_args rank=4".split()


def test_a_script_that_knows_nothing_of_us_can_use_the_names(script, tmp_path, monkeypatch):
    # Without us the name is refused: tests/trainer/test_patches.py asks a fresh interpreter.
    monkeypatch.delenv("RANK", raising=False)
    script.write_text(TRAIN)
    main(["run", str(script), *OPTIONS])
    assert (tmp_path / "rank_none.txt").read_text() == "osd_adamw OSD 4"


@pytest.mark.distributed
def test_torchrun_starts_it(script, tmp_path):
    script.write_text(TRAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_osd"]
    done = python(*launcher, "run", str(script), *OPTIONS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in tmp_path.glob("rank_*.txt")}
    assert written == {f"rank_{rank}.txt": "osd_adamw OSD 4" for rank in range(2)}


SPAWN = """
import multiprocessing
import sys

def work(rank, text):
    from transformers import TrainingArguments
    args = TrainingArguments(output_dir="out", use_cpu=True, report_to="none", optim="osd_adamw")
    with open(f"{text}_{rank}.txt", "w") as file:
        file.write(f"{args.optim.value} {[path for path in sys.path if path.endswith('children')]}")

if __name__ == "__main__":
    # as torch's `spawn` does
    process = multiprocessing.get_context("spawn").Process(target=work, args=(0, sys.argv[1]))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["script", "module"])
def test_spawned_processes_know_the_names(form, script, tmp_path):
    (tmp_path / "spawning.py").write_text(SPAWN)
    words = ["spawning.py"] if form == "script" else ["-m", "spawning"]
    done = python("-m", "hf_osd", "run", *words, "said", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said_0.txt").read_text() == "osd_adamw []"


@pytest.mark.distributed
def test_a_command_that_starts_torchrun_itself(script, tmp_path):
    script.write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(script)]
    (tmp_path / "command.py").write_text(f"import subprocess\nsubprocess.run({torchrun + OPTIONS}, check=True)\n")
    done = python("-m", "hf_osd", "run", "command.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank_0.txt").read_text() == "osd_adamw OSD 4"


CHILD = "import sys; print('hf_osd' in sys.modules, getattr(sys.modules.get('sitecustomize'), 'MINE', None))"


@pytest.mark.parametrize("executable", [sys.executable, getattr(sys, "_base_executable", sys.executable)])
@pytest.mark.parametrize("mine", [True, False])
def test_a_sitecustomize_of_ones_own_runs_as_well(mine, executable, script, tmp_path, monkeypatch):
    if mine:
        (tmp_path / "sitecustomize.py").write_text("MINE = 'mine'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    script.write_text(f"import subprocess\nsubprocess.run([{executable!r}, '-c', {CHILD!r}], check=True)\n")
    done = python("-m", "hf_osd", "run", str(script), cwd=tmp_path)
    knows, own = done.stdout.split()
    assert done.returncode == 0 and not done.stderr
    assert own == str("mine" if mine else None) and (knows == "True" or executable != sys.executable)
