"""The command answers at once: what is only asked for its help, or in a wrong way, imports no library."""

import subprocess
import sys

import pytest

import hf_osd
from hf_osd import estimate, optim
from hf_osd.cli import estimate as estimate_command
from hf_osd.cli import extract_lora as extract_command
from hf_osd.interop.changes import CARRY


ASK = """
import sys
before = set(sys.modules)
from hf_osd.cli.main import main
try:
    main()
except SystemExit as stop:
    loaded = {name.split(".")[0] for name in set(sys.modules) - before}
    print("LOADED", *loaded - set(sys.stdlib_module_names))
    raise
"""
COMMANDS = ("run", "show", "estimate", "extract-lora", "report")


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ASK, *words], capture_output=True, text=True)


def test_the_version_is_told():
    told = ask("--version").stdout
    assert told.startswith(f"hf_osd {hf_osd.__version__}\n") and told.splitlines()[-1].strip() == "LOADED hf_osd"


def test_help_names_the_commands():
    done = ask("--help")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "LOADED hf_osd"
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    done = ask(command, "--help")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "LOADED hf_osd"
    assert done.stdout.startswith(f"usage: hf-osd {command} ")


def test_show_needs_no_trainer():
    """Which with all that it takes along is three quarters of the time that a look at some tables takes."""
    code = "import sys; import hf_osd.cli.show_report; print([name for name in sys.modules if 'transformers' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "transformers.trainer" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: command"),
        ("nothing", "invalid choice: 'nothing'"),
        ("show", "the following arguments are required: PATH_OR_ID"),
        ("show a b", "unrecognized arguments: b"),
        ("estimate model --rank many", "argument --rank: invalid int value: 'many'"),
        ("estimate model --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("extract-lora tuned", "the following arguments are required: --base"),
        ("extract-lora tuned --base b --carry some", "argument --carry: invalid choice: 'some'"),
        ("report", "the following arguments are required: RUN_DIR"),
        ("run nowhere.py", "there is no script 'nowhere.py'"),
        ("run -m", "-m needs the name of a module"),
    ],
)
def test_wrong_words(words, message):
    done = ask(*words.split())
    assert done.returncode != 0 and message in done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED hf_osd"


def test_what_is_told_without_a_library_is_what_the_library_says():
    assert estimate_command.DEFAULT_RANK == optim.DEFAULT_RANK
    assert estimate_command.DTYPES == tuple(estimate.DTYPES)
    assert extract_command.CARRY == tuple(CARRY)
