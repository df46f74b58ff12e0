import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import compare_rates  # noqa: E402
from compare_finetuning import parser_of, runner_of  # noqa: E402


EXPERIMENT = {
    "title": "A title",
    "seeds": [1, 2],
    "learning_rates": [2e-5, 5e-5],
    "tasks": {"rte": {"arguments": ["--epochs", "2"]}, "sst2": {"arguments": [], "methods": ["full"]}},
    "methods": {
        "full": {"label": "AdamW", "arguments": ["--method", "full"]},
        "a": {"label": "A", "learning_rates": [5e-5], "arguments": ["--method", "osd"]},
    },
}


def get(name: str, arguments: list[str]):
    """Scores of 50 or 80, 1 more at the higher rate and 1 more with seed 2, which `a` has not run with."""
    seed = int(name[-1])
    if "-a-" in name and seed == 2:
        return None
    score = (50 if name.startswith("rte") else 80) + ("5e-05" in name) + seed - 1
    metrics = {"eval_loss": 0.5}
    return {
        "runs": [
            {"score": score, "metrics": metrics, "steps": 9, "optimizer_state_bytes": 2**20, "trained_parameters": 7}
        ]
    }


def test_every_rate_and_seed_and_how_far_from_the_baseline_at_its_best(tmp_path: Path):
    runs = list(compare_rates.planned(EXPERIMENT))
    assert [name for *_, name, _ in runs] == [
        *("rte-full-lr2e-05-seed1", "rte-full-lr5e-05-seed1", "rte-a-lr5e-05-seed1"),
        *("sst2-full-lr2e-05-seed1", "sst2-full-lr5e-05-seed1", "rte-full-lr2e-05-seed2", "rte-full-lr5e-05-seed2"),
        *("rte-a-lr5e-05-seed2", "sst2-full-lr2e-05-seed2", "sst2-full-lr5e-05-seed2"),
    ]
    arguments = ["--method", "osd", "--epochs", "2", "--task", "rte", "--learning_rate", "5e-05", "--seed", "1"]
    assert runs[2][-1] == arguments
    result = {"title": "A title", "seeds": [1, 2], "rows": compare_rates.compare(EXPERIMENT, get)}
    assert compare_rates.table(result) == (
        "| rte, 9 steps | 2e-05 | 5e-05 | optimizer state |\n"
        "| --- | --- | --- | --- |\n"
        "| AdamW | 50.5 ± 0.7 | 51.5 ± 0.7 | 1.0 MiB |\n"
        "| A | - | 51.0 (-0.5), 1 seed | 1.0 MiB |\n"
        "\n"
        "| sst2, 9 steps | 2e-05 | 5e-05 | optimizer state |\n"
        "| --- | --- | --- | --- |\n"
        "| AdamW | 80.5 ± 0.7 | 81.5 ± 0.7 | 1.0 MiB |\n"
    )
    compare_rates.render(json.loads(json.dumps(result)), tmp_path / "result")
    assert (tmp_path / "result.png").stat().st_size > 5000


def test_some_tasks_and_methods():
    some = compare_rates.chosen(EXPERIMENT, None, ["a"])
    assert [name for *_, name, _ in compare_rates.planned(some)] == ["rte-a-lr5e-05-seed1", "rte-a-lr5e-05-seed2"]
    arguments = parser_of(None).parse_args(["presets", "--methods", "b"])
    with pytest.raises(SystemExit, match="Unknown: b; there are full, a"):
        runner_of(arguments, EXPERIMENT)


def test_what_was_found_elsewhere_goes_beside_the_result_that_there_is(tmp_path: Path):
    path = tmp_path / "presets"
    everything = {"environment": {"cores": 1}, "tasks": compare_rates.chosen(EXPERIMENT, None, ["full"])["tasks"]}
    whole = everything | {"rows": compare_rates.compare(EXPERIMENT, get)}
    compare_rates.save(path, whole, lambda result, path: None)
    some = compare_rates.chosen(EXPERIMENT, ["rte"], None)
    other = {"environment": {"cores": 8}, "tasks": some["tasks"]}
    found = compare_rates.compare(some, lambda name, _: get("-a-1", []) if name == "rte-a-lr5e-05-seed2" else None)
    with pytest.raises(
        SystemExit, match="has runs of full on rte that are not in --work_dir: .* or keep them by --add"
    ):
        compare_rates.refuse_loss(path, other | {"rows": found})
    added = compare_rates.joined(path, other | {"rows": found}, EXPERIMENT)
    assert [(row["task"], row["method"]) for row in added["rows"]] == [("rte", "full"), ("rte", "a"), ("sst2", "full")]
    assert added["rows"][1]["scores"] == {"5e-05": {"1": 51, "2": 80}}  # its own first seed, the other's second one
    assert added["rows"][1]["environment"] == [{"cores": 1}, {"cores": 8}]  # of both seeds
    assert "environment" not in added["rows"][0]
    compare_rates.save(path, added, lambda result, path: None)
    again = other | {"environment": {"cores": 9}, "rows": found}
    assert compare_rates.joined(path, again, EXPERIMENT) == added  # found again, not made again
    (renamed,) = ({**row, "label": "B"} for row in found)
    relabelled = compare_rates.joined(path, again | {"rows": [renamed]}, EXPERIMENT)["rows"][1]
    assert relabelled == added["rows"][1] | {"label": "B"}
    for row in again["rows"]:
        row["losses"] = {rate: dict.fromkeys(seeds, 0.4) for rate, seeds in row["losses"].items()}
    remade = compare_rates.joined(path, again, EXPERIMENT)["rows"]
    assert remade[1]["environment"] == [{"cores": 1}, {"cores": 8}, {"cores": 9}]  # the first seed is that of before
    both = found[0] | {"scores": {"5e-05": {"1": 70, "2": 71}}, "losses": {"5e-05": {"1": 0.1, "2": 0.1}}}
    remade = compare_rates.joined(path, again | {"rows": [both]}, EXPERIMENT)["rows"]
    assert remade[1]["environment"] == {"cores": 9}
    for before, after in zip(whole["rows"], added["rows"], strict=True):
        assert before["method"] == "a" or before == after
    assert added["tasks"] == compare_rates.chosen(EXPERIMENT, None, None)["tasks"]
    compare_rates.refuse_loss(path, added)
    longer = EXPERIMENT | {"tasks": {"rte": {"arguments": ["--epochs", "3"]}}}
    with pytest.raises(SystemExit, match="was measured with other tasks: leave --add out"):
        compare_rates.joined(path, other | {"rows": []}, longer)


@pytest.mark.parametrize(("key", "value"), [("arguments", ["--rank", "4"]), ("steps", 8), ("trained_parameters", 6)])
def test_a_row_holds_runs_of_one_model_and_its_arguments(key: str, value: object, tmp_path: Path):
    path = tmp_path / "presets"
    whole = {"environment": {}, "rows": compare_rates.compare(EXPERIMENT, get)}
    compare_rates.save(path, whole, lambda result, path: None)
    rows = [row | {key: value} if row["method"] == "a" else row for row in whole["rows"]]
    with pytest.raises(SystemExit, match=f"has a on rte with other {key} "):
        compare_rates.joined(path, whole | {"rows": rows}, EXPERIMENT)


def test_finished_runs_are_added_to_a_result_of_the_same_model(tmp_path: Path, monkeypatch, capsys):
    """And where there is nothing new the file stays as it is."""
    experiment = EXPERIMENT | {"model": str(tmp_path / "model"), "common": []}
    monkeypatch.setattr(compare_rates, "load_experiment", lambda name: experiment)
    monkeypatch.setattr(compare_rates, "results_folder", lambda: tmp_path / "results" / "here")
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    words = ["compare_rates.py", "few", "--finished", "--work_dir", str(tmp_path / "work")]

    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        compare_rates.main()
        return capsys.readouterr().out

    for more in ([], ["--add"]):
        with pytest.raises(SystemExit, match="work/few has no finished runs of these: nothing is written"):
            call(*more)
    assert not (tmp_path / "results").exists()
    for *_, name, arguments in compare_rates.planned(experiment):
        if found := get(name, arguments):
            folder = tmp_path / "work" / "few" / name
            folder.mkdir(parents=True)
            command = ["--model_name_or_path", experiment["model"], *arguments, "--output_dir", str(folder)]
            (folder / "command.json").write_text(json.dumps(command))
            (folder / "results.json").write_text(json.dumps(found))
    assert "Written: " in call()
    file = tmp_path / "results" / "here" / "few.json"
    there = json.loads(file.read_text())
    assert there["weights"]["files"] == ["model.safetensors"] and there["weights"]["bytes"] == 5
    file.write_text(json.dumps(there | {"environment": {"cores": 99}}))
    before = file.read_bytes()
    assert f"Nothing new: {file} stays as it is." in call("--add") and file.read_bytes() == before
    with pytest.raises(SystemExit, match="Only it has: .*model; only this one: .*other"):
        call("--add", "--model", str(tmp_path / "other"))
    experiment["model"] = "the same name"
    file.write_text(json.dumps(there | {"model": "the same name"}))
    (tmp_path / "model" / "model.safetensors").write_text("changed")
    with pytest.raises(SystemExit, match="was measured with another weights"):
        call("--add", "--model", str(tmp_path / "model"))
    experiment["methods"] = {"full": EXPERIMENT["methods"]["full"]}
    for more in ([], ["--add"]):
        with pytest.raises(SystemExit, match="few.json has rows of a, which the experiment does not have any more"):
            call("--model", str(tmp_path / "model"), *more)
