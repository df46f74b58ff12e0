import json
import statistics
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import compare_finetuning  # noqa: E402
from q_galore_weights import FLAG  # noqa: E402


EXPERIMENT = {
    "seeds": [1, 2, 3],
    "tasks": {"rte": ["--num_train_epochs", "2"]},
    "methods": {
        "a": {"label": "A", "learning_rates": [0.1, 0.2], "arguments": ["--method", "osd"]},
        "b": {"label": "B", "learning_rates": "a", "arguments": ["--rank", "4"]},
    },
}


def fake_run(calls):
    """A runner that scores 10 * rate + seed and notes its calls."""

    def run(name, arguments):
        calls.append((name, arguments))
        rate, seed = (float(arguments[arguments.index(key) + 1]) for key in ("--learning_rate", "--seed"))
        return {
            "peak_memory_bytes": int(seed) << 30,
            "runs": [
                {
                    "score": 10 * rate + seed,
                    "metrics": {},
                    "metrics_from": "scikit-learn",
                    "steps": 5,
                    "seconds": seed,
                    "trained_parameters": 1000,
                    "optimizer_state_bytes": 2**20,
                    "extracted": [],
                }
            ],
        }

    return run


def test_a_task_may_have_rates_of_its_own():
    method = EXPERIMENT["methods"]["a"] | {"learning_rates": {"rte": [0.3], "sst2": [0.1]}}
    calls = []
    compare_finetuning.compare_task("rte", EXPERIMENT | {"methods": {"a": method}}, ["a"], fake_run(calls))
    assert [name for name, _ in calls] == [f"rte-a-lr0.3-seed{seed}" for seed in (1, 2, 3)]


def test_the_grid_runs_with_one_seed_and_the_best_rate_with_all():
    calls = []
    a, b = compare_finetuning.compare_task("rte", EXPERIMENT, ["a", "b"], fake_run(calls))
    names = [name for name, _ in calls]
    assert names[:4] == ["rte-a-lr0.1-seed1", "rte-a-lr0.2-seed1", "rte-a-lr0.2-seed2", "rte-a-lr0.2-seed3"]
    assert names[4:] == [f"rte-b-lr0.2-seed{seed}" for seed in (1, 2, 3)]  # a's best rate
    assert calls[0][1] == [
        *("--method", "osd", "--num_train_epochs", "2", "--task", "rte"),
        *("--learning_rate", "0.1", "--seed", "1"),
    ]
    assert (a["best_learning_rate"], a["scores"], a["grid"]) == (0.2, [3, 4, 5], {"0.1": 2, "0.2": 3})
    assert (b["seconds"], b["peak_memory_bytes"]) == (2, 3 << 30)


def test_methods_begin_with_the_model_of_the_start_and_are_chosen_by_training_loss(tmp_path):
    calls, losses = [], {"0.1": [2.0, 0.5, 0.7], "0.2": [0.1, 0.7, 0.7]}
    run = compare_finetuning.Runner(tmp_path, ["--bf16", "true"])

    def finetune(argv, log):
        (folder := Path(argv[-1])).mkdir(exist_ok=True)
        calls.append(argv)
        rate = argv[argv.index("--learning_rate") + 1]
        found = fake_run([])("", argv)
        found["runs"][0]["log_history"] = [{"loss": loss} for loss in losses.get(rate, [1.0])] + [{"eval_loss": 0.1}]
        (folder / "results.json").write_text(json.dumps(found))

    run.pool.submit = lambda _, argv, log: type("Done", (), {"result": lambda self: finetune(argv, log)})()
    start = {"label": "the start", "arguments": ["--method", "head"], "learning_rate": 0.01}
    experiment = EXPERIMENT | {"start": start, "best": "loss"}
    first, a = compare_finetuning.compare_task("rte", experiment, ["a"], run)
    assert (first["method"], first["label"], first["scores"]) == ("start", "the start", [1.1, 2.1, 3.1])
    assert (a["best_learning_rate"], a["scores"]) == (0.1, [2.0, 3.0, 4.0]) and len(calls) == 3 + 4
    for argv in calls[3:]:
        seed = argv[argv.index("--seed") + 1]
        folder = Path(argv[argv.index("--model_name_or_path") + 1])
        own = next(call for call in calls if folder == Path(call[-1], "rte", f"seed-{seed}"))
        assert own[:4] == ["--bf16", "true", "--method", "head"] and own[-8:-2] == ["--seed", seed, *own[-6:-2]]
    compare_finetuning.compare_task("rte", experiment, ["a"], run)
    assert len(calls) == 7  # all had finished
    experiment["start"] = start | {"learning_rate": 0.02}
    with pytest.raises(SystemExit, match="lr0.1-seed1 is of another command"):
        compare_finetuning.compare_task("rte", experiment, ["a"], run)
    assert len(calls) == 10  # another start, but no runs in the place of those that began with the first


def test_rates_of_a_method_that_has_not_run_are_refused():
    with pytest.raises(SystemExit, match="b takes the learning rates of a, which must run before it"):
        compare_finetuning.compare_task("rte", EXPERIMENT, ["b"], fake_run([]))


def test_the_average_is_over_tasks_and_its_spread_over_seeds():
    rows = [{"scores": [1.0, 2.0, 3.0]}, {"scores": [5.0, 6.0, 10.0]}]
    mean, spread = compare_finetuning.average(rows)
    assert mean == statistics.fmean([3.0, 4.0, 6.5]) and spread == statistics.stdev([3.0, 4.0, 6.5])


def test_the_table_has_a_row_for_each_method():
    rows = compare_finetuning.compare_task("rte", EXPERIMENT, ["a", "b"], fake_run([]))
    head, _, a, b = compare_finetuning.table(rows).splitlines()
    assert head == "| method | rte | average | trained parameters | optimizer state | peak memory |"
    assert a == "| A | 4.0 ± 1.0 (0.2) | 4.0 ± 1.0 | 1,000 | 1.0 MiB | 3.00 GiB |" and b.startswith("| B |")
    assert compare_finetuning.adapters(rows) == ""
    task = {"arguments": [], "methods": ["b", "c"]}
    experiment = {**EXPERIMENT, "tasks": {"mrpc": task}}
    experiment["methods"] = {"b": EXPERIMENT["methods"]["a"], "c": EXPERIMENT["methods"]["a"]}
    rows += compare_finetuning.compare_task("mrpc", experiment, ["a", "b", "c"], fake_run([]))
    *_, a, b, c = compare_finetuning.table(rows).splitlines()
    assert [line.split(" | ")[2] for line in (a, b)] == ["-", "4.0 ± 1.0 (0.2)"]  # a does not run on this task
    assert [line.split(" | ")[3] for line in (a, b, c)] == ["-", "4.0 ± 1.0", "-"]


def test_finished_runs_are_not_repeated_nor_overwritten_by_another_command(tmp_path):
    run = compare_finetuning.Runner(tmp_path, ["--bf16", "true"])
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"runs": [{"score": 1.0}]}))
    argv = ["--bf16", "true", "--seed", "1", "--output_dir", str(folder)]
    (folder / "command.json").write_text(json.dumps(argv))
    run.pool.submit = lambda *args: (_ for _ in ()).throw(RuntimeError("it runs"))
    assert run("name", ["--seed", "1"])["runs"][0]["score"] == 1.0
    for call in (run, run.finished):  # what only looks tells it, too
        with pytest.raises(SystemExit, match="name is of another command: .* Only it has: 1; only this one: 2"):
            call("name", ["--seed", "2"])
    with pytest.raises(SystemExit, match="Only it has: --bf16 true; only this one: -"):
        compare_finetuning.Runner(tmp_path, [])("name", ["--seed", "1"])
    assert json.loads((folder / "command.json").read_text()) == argv
    assert run.finished("other", []) is None and not (tmp_path / "other").exists()
    with pytest.raises(RuntimeError, match="it runs"):
        run("other", [])
    (tmp_path / "other" / "command.json").rename(tmp_path / "other" / "results.json")
    with pytest.raises(SystemExit, match="other does not tell which command it is of"):
        run("other", [])


def test_runs_are_found_in_a_work_dir_that_has_moved(tmp_path):
    """Those, too, that began with a model in it."""
    argv = ["--model_name_or_path", "/before/start/rte/seed-1", "--data_dir", "/data", "--output_dir", "/before/name"]
    (tmp_path / "now" / "name").mkdir(parents=True)
    (tmp_path / "now" / "name" / "command.json").write_text(json.dumps(argv))
    (tmp_path / "now" / "name" / "results.json").write_text("{}")
    run = compare_finetuning.Runner(tmp_path / "now", [])
    start = str(tmp_path / "now" / "start" / "rte" / "seed-1")
    assert run.finished("name", ["--model_name_or_path", start, "--data_dir", "/data"]) == {}
    for model, data in (("/before/start/rte/seed-1", "/data"), (start, "/atad")):
        with pytest.raises(SystemExit, match="is of another command"):
            run.finished("name", ["--model_name_or_path", model, "--data_dir", data])


@pytest.mark.parametrize("file", sorted((EXAMPLES / "benchmarks" / "experiments").glob("glue_*.json")), ids=str)
def test_committed_experiments_are_commands_of_the_script(file, tmp_path):
    from finetune_glue import parse_arguments

    experiment = json.loads(file.read_text())
    for task, of_task in experiment["tasks"].items():
        of_task = of_task["arguments"] if isinstance(of_task, dict) else of_task
        for method in experiment["methods"].values():
            rates = method.get("learning_rates", experiment.get("learning_rates"))
            rates = experiment["methods"][rates]["learning_rates"] if isinstance(rates, str) else rates
            assert isinstance(rates[task] if isinstance(rates, dict) else rates, list)
            given = ["--model_name_or_path", "x", "--task", task, "--output_dir", str(tmp_path), "--use_cpu", "true"]
            own = [argument for argument in method["arguments"] if argument != FLAG]  # the benchmark's
            parse_arguments([*given, *experiment["common"], *own, *of_task])
