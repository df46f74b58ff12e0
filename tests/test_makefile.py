"""What `make` installs, with a Python that only writes down how it is called."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
    "-c import torch") exit {code} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp {here} "$3/bin/python" ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path: Path):
    """Runs make with such a Python, which has torch or not, and gives its calls."""

    def run(target: str, venv: Path, has_torch: bool) -> list[str]:
        python, log = tmp_path / "python", tmp_path / "log"
        log.write_text("")
        python.write_text(PYTHON.format(log=log, here=python, code=0 if has_torch else 1))
        python.chmod(0o755)
        if (venv / "bin").is_dir():
            shutil.copy(python, venv / "bin" / "python")
        subprocess.run(["make", "-C", str(ROOT), target, f"PYTHON={python}", f"VENV={venv}"], check=True)
        return log.read_text().splitlines()

    return run


def test_a_new_environment_gets_the_tested_torch(make, tmp_path: Path):
    venv = tmp_path / "venv"
    calls = make("install", venv, has_torch=False)
    assert calls[0].startswith("-c import sys") and calls[1] == f"-m venv {venv}"
    assert "-m pip install --quiet --constraint constraints.txt torch" in calls
    assert make("install", venv, has_torch=True) == []  # once


def test_an_environment_with_a_torch_keeps_it(make, tmp_path: Path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    calls = make("gpu", venv, has_torch=True)
    assert not any("venv" in call.split() or call.endswith(" torch") for call in calls if "pip" in call)
    assert calls[-2].startswith(f"-m pip install --quiet --constraint {venv}/constraints.txt --editable")
    assert calls[-1] == "examples/benchmarks/run.py gpu"
    constraints = (venv / "constraints.txt").read_text()
    assert "\ntorch==" not in f"\n{constraints}" and "\ntransformers==" in constraints


@pytest.mark.parametrize(
    "version, taken", [((3, 9, 18), False), ((3, 10, 13), False), ((3, 11, 0), True), ((4, 0), True)]
)
def test_a_python_that_is_too_old_is_told_before_anything_is_fetched(tmp_path: Path, version: tuple, taken: bool):
    python, venv = tmp_path / "python", tmp_path / "venv"
    # A python of that version as far as `-c CODE` can see; it makes no environment.
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python.write_text(
        f'#!/bin/sh\ntest "$1" = -c && exec {sys.executable} -c "{code}" "$2"\necho "asked for $*"; exit 1\n'
    )
    python.chmod(0o755)
    command = ["make", "-C", str(ROOT), "quickstart", f"PYTHON={python}", f"VENV={venv}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and not venv.exists() and (f"asked for -m venv {venv}" in done.stdout) == taken
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert ("make PYTHON=python" + needs + " quickstart" in done.stderr) != taken
    assert f"\nPython {needs}, " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_help_lists_the_gpu_command():
    told = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert "make gpu  " in told
