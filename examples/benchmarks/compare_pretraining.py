"""Trains the same model on the same text with several optimizers, each at its best setting of a stated grid.

Reads experiments/<name>.json: arguments common to all runs, and for each method its arguments, where `{scale}` stands
for the value of an option called scale, and its grid: the learning rates and the values of those options. With
`starts`, a method walks its grid: from the best of them to a neighbour (one option one value up or down) that is
better, until there is none. Without, all of the grid is run. This is done with the first of the experiment's seeds,
or of the method's own; the best setting is then run with the others.

Every run is one call of examples/pretrain_llama.py, or of the experiment's `program`, in its own process. Finished
runs are kept in `--work_dir` and not repeated, so an interrupted comparison continues. Writes
results/<device>/<name>.json, .md, .png.

Needs: the `examples` extra. The small command takes a minute, the others one and two hours on two cores; without
`--data` the last one streams C4 from the Hub.

    python examples/benchmarks/compare_pretraining.py quickstart --methods osd_adamw galore_adamw --max_steps 20
    python examples/benchmarks/compare_pretraining.py quickstart --jobs 2
    python examples/benchmarks/compare_pretraining.py family --data folder/of/text --jobs 2
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from comparison_plot import draw
from environment import added, describe, load_experiment, named, results_folder, save
from identity import text_of
from pretraining_runs import PRELOADED, PROCESSES, Run, execute


Setting = tuple[float, ...]  # a value of each option of a grid, in the grid's order
Grid = dict[str, list[float]]  # option -> its values in ascending order


@dataclass(frozen=True)
class Method:
    """One entry of an experiment: what to run, and where to look for its best setting."""

    name: str
    label: str
    arguments: tuple[str, ...]
    common: tuple[str, ...]
    grid: Grid
    starts: tuple[Setting, ...]
    seeds: tuple[int, ...]
    program: str

    def run(self, setting: Setting, seed: int) -> Run:
        """The run of a setting."""
        options = tuple(zip(self.grid, setting, strict=True))
        return Run(self.name, options, seed, (*self.common, *self.arguments), self.program)


def read_methods(experiment: dict[str, Any], names: list[str] | None, extra: list[str]) -> list[Method]:
    """The methods of an experiment, or some of them, with further arguments for each run."""
    unknown = set(names or ()) - experiment["methods"].keys()
    if unknown:
        raise SystemExit(
            f"Unknown methods {', '.join(sorted(unknown))}; there are {', '.join(experiment['methods'])}."
        )
    return [_read(name, experiment["methods"][name], experiment, extra) for name in names or experiment["methods"]]


def _read(name: str, method: dict[str, Any], experiment: dict[str, Any], extra: list[str]) -> Method:
    grid = {"learning_rate": method["learning_rates"], **method.get("options", {})}
    return Method(
        name=name,
        label=method.get("label", name),
        arguments=tuple(method["arguments"]),
        common=(*experiment["common"], *extra),
        grid=grid,
        starts=tuple(tuple(start[option] for option in grid) for start in method.get("starts", [])),
        seeds=tuple(method.get("seeds", experiment["seeds"])),
        program=experiment.get("program", Run.program),
    )


def neighbours(setting: Setting, grid: Grid) -> list[Setting]:
    """The settings that differ in one option by one value of the grid."""
    found = []
    for place, values in enumerate(grid.values()):
        index = values.index(setting[place])
        for near in values[max(index - 1, 0) : index] + values[index + 1 : index + 2]:
            found.append((*setting[:place], near, *setting[place + 1 :]))
    return found


def search(grid: Grid, starts: tuple[Setting, ...], loss: Callable[[Setting], float]) -> dict[Setting, float]:
    """The loss of every setting of the grid, or of those met from the best start to one that no neighbour beats."""
    losses = {setting: loss(setting) for setting in starts or product(*grid.values())}
    best, last = min(losses, key=lambda setting: losses[setting]), None
    while starts and best != last:
        last = best
        for setting in neighbours(best, grid):
            if setting not in losses:
                losses[setting] = loss(setting)
            if losses[setting] < losses[best]:
                best = setting
                break
    return losses


def walk(method: Method, run: Callable[[Run], dict[str, Any]]) -> tuple[dict[Setting, float], Setting]:
    """The perplexities of the settings that were walked with a method's first seed, and the best setting."""

    def perplexity(setting: Setting) -> float:
        found = run(method.run(setting, method.seeds[0]))["perplexity"]
        return found if math.isfinite(found) else math.inf

    walked = search(method.grid, method.starts, perplexity)
    return walked, min(walked, key=lambda setting: walked[setting])


def compare(method: Method, run: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """Finds a method's best setting with the first seed and runs it with the others: one row of the results."""
    walked, best = walk(method, run)
    return row_of(method, walked, best, [run(method.run(best, seed)) for seed in method.seeds])


def row_of(
    method: Method, walked: dict[Setting, float], best: Setting, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is kept of a method: the settings walked, and what the best one gave with each seed."""
    perplexities = [result["perplexity"] for result in results]
    finite = all(math.isfinite(perplexity) for perplexity in perplexities)
    return {
        "method": method.name,
        "label": method.label,
        "arguments": method.arguments,
        "grid": method.grid,
        "walked": bool(method.starts),
        "perplexity": {setting_text(setting): value for setting, value in sorted(walked.items())},
        "best": dict(zip(method.grid, best, strict=True)),
        "seeds": perplexities,
        "best_perplexity": statistics.fmean(perplexities) if finite else math.inf,
        "spread": statistics.stdev(perplexities) if len(perplexities) > 1 and finite else None,
        "optimizer_state_bytes": results[0]["optimizer_state_bytes"],
        "adamw_state_bytes": results[0]["adamw_state_bytes"],
        "steps": results[0]["steps"],
        "tokens_seen": results[0]["tokens_seen"],
        "curve": [(entry["step"], entry["eval_loss"]) for entry in results[0]["log_history"] if "eval_loss" in entry],
    }


def setting_text(setting: Setting) -> str:
    """`0.01 × 0.25`: how rows name it."""
    return " × ".join(f"{value:g}" for value in setting)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    options = [option for row in rows for option in row["best"]]
    own = len(set(options)) > 1  # then each setting is written with the names of its options
    at = "the setting" if own else "learning rate"
    lines = [
        f"| method | perplexity | at {at} | the grid | optimizer state | of AdamW's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f" ± {row['spread']:.2f}" if row["spread"] is not None else ""
        best = ", ".join(f"{option.replace('_', ' ')} " * own + f"{value:g}" for option, value in row["best"].items())
        size = row["optimizer_state_bytes"]
        lines.append(
            f"| {row['label']} | {row['best_perplexity']:.2f}{spread} | {best} | {tried(row)} | "
            f"{size / 2**20:.1f} MiB | {size / row['adamw_state_bytes']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def tried(row: dict[str, Any]) -> str:
    """All perplexities of a grid; of a walk, how far it came."""
    if not row["walked"]:
        return ", ".join(f"{setting}: {value:.1f}" for setting, value in row["perplexity"].items())
    edge = [
        option
        for option, value in row["best"].items()
        if value in (row["grid"][option][0], row["grid"][option][-1]) and len(row["grid"][option]) > 1
    ]
    size = math.prod(len(values) for values in row["grid"].values())
    return f"{len(row['perplexity'])} of {size}" + (f"; at the edge: {', '.join(edge)}" if edge else "")


def render(result: dict[str, Any], path: Path) -> None:
    """Writes table and picture of a result."""
    named(path, ".md").write_text(table(result["rows"]), encoding="utf-8")
    draw(result["rows"], result["title"], named(path, ".png"), result.get("curves"), result.get("against"))


def main() -> None:
    """Run, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of a file in experiments/")
    parser.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    parser.add_argument("--add", action="store_true", help="put the rows of --methods into the result that there is")
    parser.add_argument("--max_steps", type=int, help="another length; nothing is written to results/ then")
    parser.add_argument("--data", help="another data set for --dataset; written to results/ under its own name")
    parser.add_argument("--jobs", type=int, default=1, help="methods at a time, which run side by side (default: 1)")
    parser.add_argument("--threads", type=int, help="of each run (default: the cores, divided by --jobs)")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    extra = ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else []
    name = arguments.experiment
    if arguments.data:
        extra += ["--dataset", arguments.data]
        name += "_" + Path(arguments.data).name
    methods = read_methods(experiment, arguments.methods, extra)
    work_dir = arguments.work_dir / name
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda method: compare(method, lambda run: execute(run, work_dir)), methods))
    print("\n" + table(rows))
    if (arguments.methods and not arguments.add) or arguments.max_steps:
        return
    result = {
        "environment": describe(),
        **{key: experiment[key] for key in ("title", "common", "seeds", "curves", "against") if key in experiment},
        **({"data": text_of(arguments.data)} if arguments.data else {}),
        "rows": rows,
    }
    path = results_folder() / name
    save(path, added(path, result, ("method",)) if arguments.add else result, render)


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
