"""Fine-tunes the same model on GLUE tasks with several methods, each at the same learning rates: AdamW's usual ones.

For someone who changes the optimizer and keeps the rate. Reads experiments/<name>.json, as compare_finetuning.py does:
`learning_rates` are those of every method that has none of its own, and a task's `methods`, if it has any, are the
ones that run on it. Every method runs at every rate with every seed, each run one call of examples/finetune_glue.py
in a process of its own. Finished runs are kept in `--work_dir` and not repeated. Writes results/<device>/<name>.json,
.md and .png; with `--finished` of what has finished, without running anything: cells tell where seeds are missing.
With `--add` what was found goes into the result that there is, which keeps all else that it has: other rows, rates and
seeds, wherever they were measured.

Needs: the `examples` extra. Model and data come from the Hub, or from `--model` and `--data_dir`.

    python examples/benchmarks/compare_rates.py glue_presets --tasks sst2 --methods full finetune-r8 --use_cpu
    python examples/benchmarks/compare_rates.py glue_presets --tasks sst2 --methods full finetune-r8 --use_cpu --add
"""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from compare_finetuning import PRELOADED, PROCESSES, parser_of, runner_of, told
from environment import added, describe, load_experiment, named, read, refuse_gone, results_folder, save, save_new
from identity import weights_of


BASELINE = "full"  # whose best rate the others are held against
Get = Callable[[str, list[str]], dict[str, Any] | None]  # a run's results by its name and arguments, if it has any


def planned(experiment: dict[str, Any]) -> Iterator[tuple[str, str, float, int, str, list[str]]]:
    """Task, method, rate, seed, name and arguments of every run, the first seeds first."""
    for seed in experiment["seeds"]:
        for task, own in experiment["tasks"].items():
            for method in own.get("methods", experiment["methods"]):
                entry = experiment["methods"][method]
                for rate in entry.get("learning_rates", experiment["learning_rates"]):
                    extra = ["--task", task, "--learning_rate", str(rate), "--seed", str(seed)]
                    arguments = [*entry["arguments"], *own["arguments"], *extra]
                    yield task, method, rate, seed, f"{task}-{method}-lr{rate:g}-seed{seed}", arguments


def chosen(experiment: dict[str, Any], tasks: list[str] | None, methods: list[str] | None) -> dict[str, Any]:
    """The experiment with these tasks and methods alone."""
    found = {task: own for task, own in experiment["tasks"].items() if not tasks or task in tasks}
    for task, own in found.items():
        kept = [name for name in own.get("methods", experiment["methods"]) if not methods or name in methods]
        found[task] = own | {"methods": kept}
    return experiment | {"tasks": found}


def compare(experiment: dict[str, Any], get: Get) -> list[dict[str, Any]]:
    """One row a task and method, with the scores and validation losses of each rate, by seed."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for task, method, rate, seed, name, arguments in planned(experiment):
        found = get(name, arguments)
        if found is None:
            continue
        (run,) = found["runs"]
        row = told(task, method, experiment["methods"][method], run) | {"scores": {}, "losses": {}}
        row = rows.setdefault((task, method), row)
        row["scores"].setdefault(f"{rate:g}", {})[str(seed)] = run["score"]
        row["losses"].setdefault(f"{rate:g}", {})[str(seed)] = run["metrics"]["eval_loss"]
    return in_order(experiment, list(rows.values()))


def in_order(experiment: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by task and method, as the experiment has them."""
    tasks, methods = (list(experiment[key]) for key in ("tasks", "methods"))
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), methods.index(row["method"])))


def joined(path: Path, result: dict[str, Any], experiment: dict[str, Any]) -> dict[str, Any]:
    """The result that there is, with what was found in it: runs that were made again take the place of their own."""
    before = read(path)
    there = {(row["task"], row["method"]): row for row in before["rows"]}
    rows = []
    for row in result["rows"]:
        old = there.get((row["task"], row["method"]))
        if old is not None:
            refuse_other(path, old, row)
            row = merged({"environment": before["environment"]} | old, row, result["environment"])
        rows.append(row)
    tasks = chosen(experiment, None, None)["tasks"]
    measured = before.get("tasks", tasks)  # which methods run on a task may have changed since, what it is may not
    if any(own["arguments"] != tasks[task]["arguments"] for task, own in measured.items() if task in tasks):
        raise SystemExit(
            f"{named(path, '.json')} was measured with other tasks: leave --add out to measure all again."
        )
    result = added(path, result | {"tasks": measured, "rows": rows}, ("task", "method"))
    return result | {"tasks": tasks, "rows": in_order(experiment, result["rows"])}


def refuse_other(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Put no runs of another model or of other arguments into a row: not every result tells its weights."""
    if other := [key for key in ("arguments", "steps", "trained_parameters") if old[key] != new[key]]:
        raise SystemExit(
            f"{named(path, '.json')} has {new['method']} on {new['task']} with other {', '.join(other)} "
            f"({old[other[0]]}; the runs here: {new[other[0]]}): take the model and the experiment that it was "
            "measured with, or leave --add out to measure all again."
        )


def merged(old: dict[str, Any], new: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """A row with the runs of two; its environment is a list where they were made in several."""
    row = dict(new)
    for key in ("scores", "losses"):
        rates = sorted(old[key].keys() | new[key].keys(), key=float)
        row[key] = {rate: old[key].get(rate, {}) | new[key].get(rate, {}) for rate in rates}
    cells, earlier = _cells(row), _cells(old)
    environments = old["environment"] if isinstance(old["environment"], list) else [old["environment"]]
    environments = [*environments] if cells.items() & earlier.items() else []
    if cells != earlier and made not in environments:
        environments.append(made)
    return row | {"environment": environments[0] if len(environments) == 1 else environments}


def _cells(row: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """Score and loss of every run of a row, by rate and seed."""
    losses = row["losses"]
    return {
        (rate, seed): (score, losses[rate][seed])
        for rate, scores in row["scores"].items()
        for seed, score in scores.items()
    }


def refuse_loss(path: Path, result: dict[str, Any]) -> None:
    """Write no result that lacks a run which the one that there is has."""
    found = {(row["task"], row["method"]): row["scores"] for row in result["rows"]}
    for row in read(path)["rows"]:
        own = found.get((row["task"], row["method"]), {})
        if any(seeds.keys() - own.get(rate, {}).keys() for rate, seeds in row["scores"].items()):
            raise SystemExit(
                f"{named(path, '.json')} has runs of {row['method']} on {row['task']} that are not in --work_dir: "
                "give another one, or keep them by --add."
            )


def best(row: dict[str, Any]) -> str:
    """The rate at which a method has its best mean score, of those that all seeds have run at if there are such."""
    most = max(map(len, row["scores"].values()))
    return max(
        (rate for rate, scores in row["scores"].items() if len(scores) == most), key=lambda rate: mean(row, rate)
    )


def mean(row: dict[str, Any], rate: str) -> float:
    """Over seeds."""
    return statistics.fmean(row["scores"][rate].values())


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each task, with how far each rate is from the baseline at its best."""
    seeds = len(result["seeds"])
    parts = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["task"] == task]
        rates = sorted({rate for row in own for rate in row["scores"]}, key=float)
        baseline = next((row for row in own if row["method"] == BASELINE), None)
        level = None if baseline is None else mean(baseline, best(baseline))
        lines = [
            f"| {task}, {own[0]['steps']} steps | {' | '.join(rates)} | optimizer state |",
            "| --- |" + " --- |" * (len(rates) + 1),
        ]
        for row in own:
            cells = [_cell(row["scores"].get(rate), seeds, None if row is baseline else level) for rate in rates]
            size = f"{row['optimizer_state_bytes'] / 2**20:.1f} MiB"
            lines.append(f"| {row['label']} | {' | '.join(cells)} | {size} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(scores: dict[str, float] | None, seeds: int, level: float | None) -> str:
    """`80.5 ± 0.5 (-0.2)`: mean and deviation over seeds, and the distance to the baseline's best."""
    if not scores:
        return "-"
    values = list(scores.values())
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    away = "" if level is None else f" ({statistics.fmean(values) - level:+.1f})"
    told = "" if len(values) == seeds else f", {len(values)} seed{'s' * (len(values) > 1)}"
    return f"{statistics.fmean(values):.1f}{spread}{away}{told}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Scores against learning rates, a panel for each task: a dot for each seed, a line through their means."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    figure = Figure(figsize=(4.6 * len(tasks) + 2.2, 4.4), dpi=130, layout="constrained")
    figure.suptitle(result["title"], x=0.01, ha="left", fontsize=11)
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    colors = {name: f"C{place % 10}" for place, name in enumerate(methods)}
    marks = {name: "o-" if place < 10 else "s--" for place, name in enumerate(methods)}  # where colors begin again
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in result["rows"] if row["task"] == task]
        for row in own:
            rates = sorted(row["scores"], key=float)
            points = [(float(rate), score) for rate in rates for score in row["scores"][rate].values()]
            axes.plot(*zip(*points, strict=True), "o", color=colors[row["method"]], markersize=3, alpha=0.4)
            means = [mean(row, rate) for rate in rates]
            style = {"linewidth": 2.2 if row["method"] == BASELINE else 1.2, "label": row["label"]}
            (lines[row["label"]],) = axes.plot(
                list(map(float, rates)),
                means,
                marks[row["method"]],
                color=colors[row["method"]],
                markersize=5,
                **style,
            )
        every = sorted({float(rate) for row in own for rate in row["scores"]})
        axes.set_xscale("log")
        axes.set_xticks(every, [f"{rate:g}" for rate in every], fontsize=8)
        axes.minorticks_off()
        axes.set_title(f"{task}, {own[0]['steps']} steps", fontsize=10)
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score")
    figure.legend(list(lines.values()), list(lines), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path)


def render(result: dict[str, Any], path: Path) -> None:
    """Writes tables and picture of a result."""
    named(path, ".md").write_text(table(result), encoding="utf-8")
    draw(result, named(path, ".png"))


def main() -> None:
    """Run, summarise, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--finished", action="store_true", help="run nothing: write what has finished")
    parser.add_argument("--add", action="store_true", help="put what was found into the result that there is")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    run = runner_of(arguments, experiment)
    some = chosen(experiment, arguments.tasks, arguments.methods)
    result = {"environment": describe(), **{key: experiment[key] for key in ("title", "model", "common", "seeds")}}
    result |= {"tasks": some["tasks"], "rows": compare(some, run.finished if arguments.finished else run)}
    print("\n" + table(result))
    path = results_folder() / arguments.experiment
    if (arguments.tasks or arguments.methods) and not arguments.add:
        return
    if not result["rows"]:
        raise SystemExit(f"{run.work_dir} has no finished runs of these: nothing is written.")
    refuse_gone(path, read(path)["rows"], experiment)
    result["weights"] = weights_of(arguments.model or experiment["model"])
    if arguments.add:
        return save_new(path, joined(path, result, experiment), render)
    refuse_loss(path, result)
    save(path, result, render)


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
