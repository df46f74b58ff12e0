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
    assert added["rows"][1]["environment"] == {"cores": 8} and "environment" not in added["rows"][0]
    for before, after in zip(whole["rows"], added["rows"], strict=True):
        assert before["method"] == "a" or before == after
    assert added["tasks"] == compare_rates.chosen(EXPERIMENT, None, None)["tasks"]
    compare_rates.refuse_loss(path, added)
    longer = EXPERIMENT | {"tasks": {"rte": {"arguments": ["--epochs", "3"]}}}
    with pytest.raises(SystemExit, match="was measured with other tasks: leave --add out"):
        compare_rates.joined(path, other | {"rows": []}, longer)
