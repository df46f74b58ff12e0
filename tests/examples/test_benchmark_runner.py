import importlib
import json
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import environment  # noqa: E402
import run  # noqa: E402


RESULTS = sorted((EXAMPLES / "benchmarks" / "results").glob("*/*.json"))
README = (EXAMPLES / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_tables_and_pictures_are_made_of_the_committed_results_alone(file: Path, tmp_path: Path):
    script = run.script_of_result(file.stem)
    result = json.loads(file.read_text())
    assert result["environment"]
    if script is None:
        assert file.stem in ("make_quickstart", "sft_smollm2")  # results.json of examples
        return
    written = run.redraw(file, importlib.import_module(script), tmp_path)
    assert written
    for again in written:
        committed = file.parent / again.name
        assert committed.is_file()
        if again.suffix == ".md":
            assert committed.read_text() == again.read_text()


@pytest.mark.parametrize("name", ["family_long", "family_long_text"])
def test_results_are_drawn_by_their_name_or_that_of_their_experiment(name: str, monkeypatch, capsys):
    drawn: list[Path] = []
    monkeypatch.setattr(run, "redraw", lambda file, script: drawn.append(file) or [])
    assert run.main(["--draw", name]) == 0
    assert [file.stem for file in drawn] == ["family_long_text"]
    with pytest.raises(SystemExit, match="There is no result of family_lonk; known: .*family_long_text"):
        run.main(["--draw", name, "family_lonk"])
    assert len(drawn) == 1


def test_every_experiment_is_listed_and_described(capsys):
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("family ")] == ["cpu_2_cores/family_text"]
    listed = {line.split()[0]: line.split()[1] for line in lines}
    for file in environment.EXPERIMENTS.glob("*.json"):
        assert file.stem in listed
    for name, script in listed.items():
        assert (EXAMPLES / "benchmarks" / script).is_file()
        assert f"`{name}`" in README, f"{name} is not described in examples/benchmarks/README.md"


def test_arguments_go_to_the_experiments_script(monkeypatch):
    commands = []

    class Done:
        returncode = 3

    monkeypatch.setattr(run.subprocess, "run", lambda command, check: commands.append(command) or Done)
    assert run.main(["step_time_gpu", "--device", "cuda"]) == 3
    assert run.main(["step_time"]) == 3 and run.main(["ddp_exchange", "--ranks", "4"]) == 3
    assert run.main(["glue_minilm"]) == 3
    tails = [[Path(command[1]).name, *command[2:]] for command in commands]
    assert tails == [
        ["step_time.py", "step_time_gpu", "--device", "cuda"],
        ["step_time.py", "step_time"],
        ["ddp_exchange.py", "--ranks", "4"],
        ["compare_finetuning.py", "glue_minilm"],
    ]
    with pytest.raises(SystemExit, match="no experiment step_tim;"):
        run.main(["step_tim"])


def test_results_of_other_forms_find_their_script():
    assert run.script_of_result("paper_table1_reduced") == "paper_tables"
    assert run.script_of_result("step_time_400") == "step_time"
    assert run.script_of_result("quickstart_code") == "compare_pretraining"
    assert run.script_of_result("make_quickstart") is None


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        environment.pick_device("cuda")
    assert environment.device_name("cpu").startswith("cpu_")


def test_a_new_result_replaces_its_tables_on_the_pages(tmp_path: Path, monkeypatch):
    def render(result: dict, path: Path) -> None:
        environment.named(path, ".md").write_text(f"Title\n\n| {result['value']} |\n\n| other |\n")

    readme = tmp_path / "README.md"
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(environment, "PAGES", [readme])
    readme.write_text("before\n\n| 1 |\n\nafter\n")
    path = tmp_path / "results" / "device" / "name"
    for value in (1, 2):
        environment.save(path, {"value": value}, render)
        assert json.loads(environment.named(path, ".json").read_text()) == {"value": value}
    assert readme.read_text() == "before\n\n| 2 |\n\nafter\n"
    environment.save(tmp_path / "elsewhere" / "a" / "name", {"value": 3}, render)
    assert readme.read_text() == "before\n\n| 2 |\n\nafter\n"


def test_rows_are_added_to_a_result_of_the_same_settings(tmp_path: Path):
    path = tmp_path / "name"
    new = {
        "environment": {"commit": "b"},
        "title": "new",
        "seeds": [1],
        "rows": [{"m": "x", "v": 2}, {"m": "z", "v": 3}],
    }
    assert environment.added(path, new, ("m",)) == new  # there is none
    old = {
        "environment": {"commit": "a"},
        "title": "old",
        "seeds": [1],
        "rows": [{"m": "x", "v": 1}, {"m": "y", "v": 0}],
    }
    environment.named(path, ".json").write_text(json.dumps(old))
    found = environment.added(path, new, ("m",))
    assert (found["environment"], found["title"]) == ({"commit": "a"}, "new")
    made = {"environment": {"commit": "b"}}
    assert found["rows"] == [{"m": "x", "v": 2, **made}, {"m": "y", "v": 0}, {"m": "z", "v": 3, **made}]
    with pytest.raises(SystemExit, match="was measured with another seeds"):
        environment.added(path, new | {"seeds": [2]}, ("m",))
    again = environment.added(path, new | {"rows": [{"m": "x", "v": 1}]}, ("m",))
    assert again["rows"] == old["rows"]  # found again, not made again
    assert "data" not in environment.added(path, new | {"data": "b"}, ("m",))  # the rows of before may be of another
    environment.named(path, ".json").write_text(json.dumps(old | {"data": "a"}))
    with pytest.raises(SystemExit, match="was measured with another data"):
        environment.added(path, new | {"data": "b"}, ("m",))
