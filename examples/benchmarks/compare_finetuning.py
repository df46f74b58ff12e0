"""Fine-tunes the same model on GLUE tasks with several methods, each at its best learning rate of a grid.

Reads experiments/<name>.json: arguments common to all runs, those of each task, perhaps with the `methods` that run on
it, and for each method its arguments and learning rates, which may differ by task, or the name of a method whose best
rates it takes over. For each task and method, every rate of the grid runs with the first seed; the best one runs with
the other seeds too. The best has the highest score or, with `"best": "loss"`, the lowest training loss in the second
half, whatever the validation says. Where there is a `start`, a run, all methods begin with the model that it has made
of the same task and seed. Every run is one call of examples/finetune_glue.py in a process of its own. Finished runs
are kept in `--work_dir` and not repeated, so an interrupted comparison continues. Writes results/<device>/<name>.json
and .md.

Needs: the `examples` extra. The small command takes minutes, the committed one two hours on one core. Both take model
and data from the Hub, or from `--model` and `--data_dir`.

    python examples/benchmarks/compare_finetuning.py glue_minilm --tasks rte --methods osd-r8 lora-r8 --use_cpu
    python examples/benchmarks/compare_finetuning.py glue_minilm
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from environment import added, describe, load_experiment, named, results_folder, save
from identity import weights_of
from kept_runs import claim, finished
from q_galore_weights import obeyed


HERE = Path(__file__).parent
PROCESSES = multiprocessing.get_context("forkserver")  # imports PRELOADED once, then forks for each run
SAVED = ["--save_strategy", "steps", "--save_only_model", "true"]  # at the end too
PRELOADED = ["hf_osd", "datasets"]  # what is installed: before Python 3.13 the server lacks our sys.path


def finetune(argv: list[str], log: Path) -> None:
    """Runs the script in this process, printing to a file."""
    sys.path.insert(0, str(HERE.parent))
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import finetune_glue

    finetune_glue.main(obeyed(argv))


class Runner:
    """Runs the script once for each set of arguments, each time in a new process that shares only the imports.

    Args:
        work_dir (`Path`): Keeps the results of finished runs.
        common (`list[str]`): Arguments of all runs.
    """

    def __init__(self, work_dir: Path, common: list[str]):
        self.work_dir, self.common = work_dir, common
        self.pool = ProcessPoolExecutor(1, mp_context=PROCESSES, max_tasks_per_child=1)

    def __call__(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """The run's results.json, from disk where the same run has finished before."""
        folder, command = self.work_dir / name, self._command(name, arguments)
        claim(folder, command)
        found = finished(folder, command)
        if found is None:
            self.pool.submit(finetune, command, folder / "log.txt").result()
            found = finished(folder, command)
        print(f"{name}: {found['runs'][0]['score']:.2f}", flush=True)
        return found

    def finished(self, name: str, arguments: list[str]) -> dict[str, Any] | None:
        """The same from disk alone; `None` where it has not finished."""
        return finished(self.work_dir / name, self._command(name, arguments))

    def start(self, task: str, arguments: list[str], seed: int) -> tuple[dict[str, Any], Path]:
        """A run whose model others begin with, and the model's folder; with other arguments it is another folder."""
        digest = blake2b(json.dumps([self.common, arguments]).encode(), digest_size=4).hexdigest()
        name = f"{task}-start-{digest}-seed{seed}"
        found = self(name, [*arguments, "--task", task, "--seed", str(seed), *SAVED])
        return found, self.work_dir / name / task / f"seed-{seed}"

    def _command(self, name: str, arguments: list[str]) -> list[str]:
        return [*self.common, *arguments, "--output_dir", str(self.work_dir / name)]


def goodness(found: dict[str, Any], by: str) -> float:
    """What is highest at the best rate: the score, or by `"loss"` minus the training loss of the second half."""
    (run,) = found["runs"]
    if by == "score":
        return run["score"]
    losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
    return -statistics.fmean(losses[len(losses) // 2 :])


def compare_task(
    task: str, experiment: dict[str, Any], methods: list[str], run: Callable[[str, list[str]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row a method of the task: its grid with the first seed, and all seeds at the best rate."""
    rows: dict[str, dict[str, Any]] = {}
    first, *others = experiment["seeds"]
    of_task, start = experiment["tasks"][task], experiment.get("start")
    if isinstance(of_task, dict):
        methods = [name for name in methods if name in of_task.get("methods", methods)]
        of_task = of_task["arguments"]
    models: dict[int, list[str]] = {}
    if start is not None:
        rate = start["learning_rate"]
        arguments = [*start["arguments"], *of_task, "--learning_rate", str(rate)]
        made = {seed: run.start(task, arguments, seed) for seed in experiment["seeds"]}
        models = {seed: ["--model_name_or_path", str(folder)] for seed, (_, folder) in made.items()}
        found = [entry for entry, _ in made.values()]
        rows["start"] = row_of(task, "start", start, {rate: found[0]}, rate, found)
    for name in methods:
        method = experiment["methods"][name]
        rates = method["learning_rates"]
        if isinstance(rates, str):
            if rates not in rows:
                raise SystemExit(f"{name} takes the learning rates of {rates}, which must run before it.")
            rates = [rows[rates]["best_learning_rate"]]
        if isinstance(rates, dict):
            rates = rates[task]

        def result(rate: float, seed: int, name: str = name, arguments: list[str] = method["arguments"]) -> dict:
            extra = ["--task", task, "--learning_rate", str(rate), "--seed", str(seed), *models.get(seed, [])]
            return run(f"{task}-{name}-lr{rate:g}-seed{seed}", [*arguments, *of_task, *extra])

        grid = {rate: result(rate, first) for rate in rates}
        best = max(rates, key=lambda rate: goodness(grid[rate], experiment.get("best", "score")))
        rows[name] = row_of(task, name, method, grid, best, [grid[best], *(result(best, seed) for seed in others)])
    return list(rows.values())


def row_of(
    task: str, name: str, method: dict[str, Any], grid: dict[float, dict], best: float, found: list[dict]
) -> dict[str, Any]:
    """What is kept of a method's runs: `found` at the best rate, one of each seed, and `grid` with the first."""
    runs = [entry["runs"][0] for entry in found]
    return {
        **told(task, name, method, runs[0]),
        "grid": {f"{rate:g}": entry["runs"][0]["score"] for rate, entry in grid.items()},
        "best_learning_rate": best,
        "scores": [entry["score"] for entry in runs],
        "extracted": [entry["extracted"] for entry in runs],
        "metrics": [entry["metrics"] for entry in runs],
        "metrics_from": runs[0]["metrics_from"],
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in found),
        "seconds": statistics.fmean(entry["seconds"] for entry in runs),
    }


def told(task: str, name: str, method: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What the rows of every comparison say of a method, by one of its runs."""
    own = {"task": task, "method": name, "label": method["label"], "arguments": method["arguments"]}
    return own | {key: run[key] for key in ("steps", "trained_parameters", "optimizer_state_bytes")}


def average(rows: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Mean over tasks of the mean over seeds, and the standard deviation over seeds of the mean over tasks."""
    by_seed = [statistics.fmean(scores) for scores in zip(*(row["scores"] for row in rows), strict=True)]
    return statistics.fmean(by_seed), statistics.stdev(by_seed) if len(by_seed) > 1 else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a method, one column a task."""
    tasks, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "method"))
    lines = [
        f"| method | {' | '.join(tasks)} | average | trained parameters | optimizer state | peak memory |",
        "| --- |" + " --- |" * (len(tasks) + 4),
    ]
    for method in methods:
        own = {row["task"]: row for row in rows if row["method"] == method}
        cells = [_cell(own[task]) if task in own else "-" for task in tasks]
        own = list(own.values())
        mean = _score(*average(own)) if len(own) == len(tasks) else "-"
        cells = [own[0]["label"], *cells, mean, f"{own[0]['trained_parameters']:,}"]
        cells.append(f"{own[0]['optimizer_state_bytes'] / 2**20:.1f} MiB")
        cells.append(f"{max(row['peak_memory_bytes'] for row in own) / 2**30:.2f} GiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: all tables that there are."""
    return "\n".join(filter(None, (table(rows), adapters(rows))))


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(report(result["rows"]), encoding="utf-8")


def adapters(rows: list[dict[str, Any]]) -> str:
    """Markdown: the adapters made of the first method's models, where there are any."""
    sys.path.insert(0, str(HERE.parent))
    from glue_report import adapter_table

    own = [row for row in rows if row["method"] == rows[0]["method"]]
    return adapter_table({row["task"]: (row["scores"], row["extracted"]) for row in own})


def _cell(row: dict[str, Any]) -> str:
    return f"{_score(statistics.fmean(row['scores']), _spread(row['scores']))} ({row['best_learning_rate']:g})"


def _score(mean: float, spread: float | None) -> str:
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What a comparison is asked on its command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of a file in experiments/")
    parser.add_argument("--tasks", nargs="+", help="only these; nothing is written to results/ then")
    parser.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    parser.add_argument("--model", help="folder of the model, where there is no Hub")
    parser.add_argument("--data_dir", help="folder of the data, where there is no Hub")
    parser.add_argument("--use_cpu", action="store_true", help="needed for bf16 without a GPU")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    return parser


def runner_of(arguments: argparse.Namespace, experiment: dict[str, Any]) -> Runner:
    """What makes the runs that were asked for."""
    for asked, known in ((arguments.tasks, experiment["tasks"]), (arguments.methods, experiment["methods"])):
        unknown = set(asked or ()) - set(known)
        if unknown:
            raise SystemExit(f"Unknown: {', '.join(unknown)}; there are {', '.join(known)}.")
    common = ["--model_name_or_path", arguments.model or experiment["model"], *experiment["common"]]
    common += ["--data_dir", arguments.data_dir] if arguments.data_dir else []
    common += ["--use_cpu", "true"] if arguments.use_cpu else []
    return Runner(arguments.work_dir / arguments.experiment, common)


def main() -> None:
    """Run, summarise, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--add", action="store_true", help="put the rows of --methods into the result that there is")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    run = runner_of(arguments, experiment)
    tasks, methods = arguments.tasks or list(experiment["tasks"]), arguments.methods or list(experiment["methods"])
    rows = [row for task in tasks for row in compare_task(task, experiment, methods, run)]
    print("\n" + report(rows))
    if arguments.tasks or (arguments.methods and not arguments.add):
        return
    result = {"environment": describe(), **{key: experiment[key] for key in ("model", "common", "tasks", "seeds")}}
    result |= {"weights": weights_of(arguments.model or experiment["model"]), "rows": rows}
    path = results_folder() / arguments.experiment
    save(path, added(path, result, ("task", "method")) if arguments.add else result, render)


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
