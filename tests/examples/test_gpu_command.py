"""`make gpu`: one command, parts that do not stop each other, results that stay."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import environment  # noqa: E402
import gpu  # noqa: E402
import run  # noqa: E402
from environment import named  # noqa: E402


HERE = [part for part in gpu.PARTS if part.name not in ("gpu_tests", "layerwise_memory_gpu")]  # those start processes

# What parts of these names do here instead.
SCRIPTS = {
    "good": "import sys; open(sys.argv[1] + '/good.json', 'w').write('{}')",
    "long": """
import subprocess, sys, time
open(sys.argv[1] + '/long.json', 'w').write('{}')
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open(sys.argv[1] + '/child', 'w').write(str(child.pid))
time.sleep(60)
""",
    "bad": "raise ValueError('no | such thing')",
    "last": "pass",
}


def test_the_parts_are_experiments_that_fit_in_eight_minutes():
    assert sum(part.seconds for part in gpu.PARTS) <= gpu.SECONDS == 480
    assert {part.name for part in gpu.PARTS} <= run.experiments().keys()


@pytest.mark.parametrize("part", HERE, ids=lambda part: part.name)
def test_every_part_runs_reduced(part: gpu.Part, tmp_path: Path):
    script = importlib.import_module(run.experiments()[part.name])
    script.main([part.name, "--device", "cpu", *part.reduced, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / f"{part.name}.json").read_text())
    assert result["rows"] and result["environment"]["commit"]
    again = run.redraw(tmp_path / f"{part.name}.json", script, tmp_path)
    assert tmp_path / f"{part.name}.md" in again


def test_the_command_of_a_part(tmp_path: Path, monkeypatch, capsys):
    """In processes of their own, as they run on a GPU: tests that are skipped for want of one."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # of runs/
    monkeypatch.setattr(gpu, "surroundings", lambda: {**os.environ, "PYTHONPATH": str(ROOT)})
    asked = gpu.command

    def command(part, arguments):
        return [str(ROOT / word) if word.startswith("tests/") else word for word in asked(part, arguments)]

    monkeypatch.setattr(gpu, "command", command)
    assert gpu.main(["--device", "cpu", "--reduced", "--only", "gpu_tests"]) == 0
    folder = tmp_path / "runs" / "gpu_reduced"
    rows = json.loads((folder / "gpu_tests.json").read_text())["rows"]
    assert len(rows) > 10 and {(row["outcome"], row["reason"]) for row in rows} == {("skipped", "needs a CUDA device")}
    assert "| [gpu_tests](gpu_tests.md) | done |" in (folder / "gpu.md").read_text()
    assert "skipped" in (folder / "logs" / "gpu_tests.log").read_text()
    assert "[1/1] gpu_tests ... done after" in capsys.readouterr().out


def test_parts_that_fail_or_take_too_long_are_named_and_stop_no_other(tmp_path: Path, monkeypatch, capsys):
    parts = [gpu.Part(name, 60, (), needs="json") for name in SCRIPTS]
    monkeypatch.setattr(gpu, "PARTS", (*parts, gpu.Part("lacking", 60, (), needs="no_such_library")))
    monkeypatch.setattr(gpu, "command", lambda part, _: [sys.executable, "-c", SCRIPTS[part.name], str(tmp_path)])
    began = time.monotonic()
    assert gpu.main(["--device", "cpu", "--reduced", "--limit", "4", "--output_dir", str(tmp_path)]) == 1
    assert time.monotonic() - began < 40
    rows = {row["part"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    told = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert told == {
        "good": ("done", ""),
        "long": ("out of time", "stopped after 4 s; what it had measured is in long.json"),
        "bad": ("failed", "ValueError: no | such thing"),
        "last": ("done", ""),
        "lacking": ("left out", "no_such_library is not installed"),
    }
    assert (tmp_path / "good.json").is_file() and rows["long"]["seconds"] < 20
    assert not _runs(int((tmp_path / "child").read_text()))
    summary = (tmp_path / "gpu.md").read_text()
    assert "| bad | failed |" in summary and "no \\| such thing |" in summary and summary in capsys.readouterr().out

    # one of them again: the others stay in the summary
    monkeypatch.setitem(SCRIPTS, "bad", "pass")
    assert gpu.main(["--device", "cpu", "--reduced", "--only", "bad", "--output_dir", str(tmp_path)]) == 0
    again = {row["part"]: row["status"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert again == {name: status for name, (status, _) in told.items()} | {"bad": "done"}


def test_what_a_part_leaves_of_its_time_is_for_those_after_it(tmp_path: Path, monkeypatch):
    """At full size: on a GPU that is not there."""
    limits = []

    def outcome(part, limit, arguments, folder, logs):
        limits.append(limit)
        return {"part": part.name, "status": "done", "seconds": part.seconds / 2, "limit": limit, "reason": ""}

    monkeypatch.setattr(gpu, "pick_device", lambda device: device)
    monkeypatch.setattr(gpu, "describe", lambda device: {"device": device, "commit": "a"})
    monkeypatch.setattr(gpu, "outcome", outcome)
    assert gpu.main(["--output_dir", str(tmp_path)]) == 0
    halves = [part.seconds / 2 for part in gpu.PARTS]
    assert limits == [part.seconds + sum(halves[:i]) for i, part in enumerate(gpu.PARTS)]


def _runs(pid: int) -> bool:
    """Whether a process is there, and not as a zombie that nobody has collected."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_is_missing_is_told(monkeypatch):
    found = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    names = ["osd_adamw8bit_layerwise:rank=4", "osd_lion8bit", "adamw_bnb_8bit", "osd_adamw"]
    assert [environment.without_8bit(name) for name in names] == [
        "osd_adamw_layerwise:rank=4",
        "osd_lion",
        "adamw_bnb_8bit",
        "osd_adamw",
    ]
    assert environment.missing(ModuleNotFoundError("No module", name="peft")) == "peft is not installed"
    assert environment.missing(ImportError("8-bit moments need bitsandbytes")) == "8-bit moments need bitsandbytes"


def test_a_cpu_at_full_size_and_a_gpu_that_is_not_there_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "add --reduced" in capsys.readouterr().err
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU here"):
        gpu.main([])


def test_results_are_named_by_the_card(monkeypatch):
    class Card:
        name, total_memory = "Quadro RTX 6000/8000", 24 << 30

    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda: Card.name)
    monkeypatch.setattr(environment.torch.cuda, "get_device_properties", lambda _: Card)
    told = environment.describe("cuda")
    assert (told["device"], told["card"]) == ("quadro_rtx_6000_8000", Card.name)
    assert told["card_bytes"] == 24 << 30 and "cuda" in told
    shown = gpu.table({"environment": told | {"missing": ["peft"]}, "rows": []})
    assert f"On {Card.name}, commit" in shown and "Not installed: peft." in shown


def test_tests_without_an_optional_library_are_skipped_and_each_is_kept(tmp_path: Path):
    file = tmp_path / "test_some.py"
    file.write_text("""
import pytest

pytestmark = pytest.mark.gpu

def test_good(): pass

def test_bad(): assert 1 == 2

def test_lacking():
    raise ImportError("8-bit moments need bitsandbytes") from ModuleNotFoundError("No module", name="bitsandbytes")

def test_other(): import no_such_library
""")
    command = [sys.executable, str(BENCHMARKS / "gpu_tests.py"), "--device", "cpu", "--tests", str(file)]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], capture_output=True, text=True, env=surroundings, check=False
    )
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "gpu_tests.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["passed", "failed", "skipped", "failed"]
    assert rows[2]["reason"] == "bitsandbytes is not installed"
    assert done.stdout.splitlines()[-1].startswith("1 passed, 2 failed, 1 skipped, in ")
    assert named(tmp_path / "gpu_tests", ".md").read_text().startswith("1 passed, 2 failed, 1 skipped")
