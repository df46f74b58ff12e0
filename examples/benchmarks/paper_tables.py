r"""The tables of the paper (arXiv 2408.12857), run again and put beside its numbers.

Reads experiments/paper_*.json: arguments common to all runs, the columns of the table (model sizes or ranks), and for
each method its arguments and the paper's numbers. Every run is one call of examples/pretrain_llama.py; finished runs
are kept in `--work_dir` and not repeated, so the table fills up cell by cell, on whatever machines. Of several rates
the one with the lowest validation loss counts. Writes results/<device>/<name>.json and .md.

Needs: the `examples` extra; at full size GPUs and C4, which is streamed from the Hub. `--reduced` runs the same
table with a tiny model on the docstrings of installed packages: its numbers do not compare with the paper's.

    python examples/benchmarks/paper_tables.py paper_table1 --dry_run              # the commands, and nothing else
    python examples/benchmarks/paper_tables.py paper_table1 --reduced              # ten minutes on one core
    python examples/benchmarks/paper_tables.py paper_table1 --columns 60M          # one GPU
    python examples/benchmarks/paper_tables.py paper_table1 --columns 1B --launcher "torchrun --nproc_per_node 8" \
        --gradient_accumulation_steps 4                                            # further arguments are the script's
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import describe, load_experiment, named, results_folder, save
from kept_runs import claim, finished


SCRIPT = Path(__file__).parents[1] / "pretrain_llama.py"
NOTE = "arguments.json"  # in the folder of every run
METRICS = {  # what the paper may report of a run -> how it is called, and where our results.json has it
    "training_perplexity": ("training perplexity, last 10 steps", lambda run: math.exp(last_training_loss(run))),
    "perplexity": ("validation perplexity", lambda run: run["perplexity"]),
    "hours": ("hours", lambda run: run["training_seconds"] / 3600),
}


@dataclass(frozen=True)
class Cell:
    """One number of a table: a method in a column."""

    method: str
    column: str
    runs: dict[float, list[str]]  # learning rate -> arguments of the pretraining script


def last_training_loss(run: dict[str, Any]) -> float:
    """Mean training loss of the last `logging_steps` steps, 10 in the experiments here."""
    return next(entry["loss"] for entry in reversed(run["log_history"]) if "loss" in entry)


def cells(experiment: dict[str, Any], reduced: bool, extra: list[str]) -> list[Cell]:
    """All cells of a table, or of its reduced form."""
    small = experiment["reduced"] if reduced else {}
    columns = small.get("columns", experiment["columns"])
    found = []
    for name in small.get("methods", experiment["methods"]):
        method = experiment["methods"][name]
        for column, settings in columns.items():
            arguments = [*experiment["common"], *settings["arguments"], *method["arguments"], *small.get("common", ())]
            filled = [argument.format_map(settings.get("values", {})) for argument in arguments]
            rates = settings.get("learning_rates") or experiment["learning_rates"]
            runs = {rate: [*filled, "--learning_rate", f"{rate:g}", *extra] for rate in rates}
            found.append(Cell(name, column, runs))
    return found


def command(arguments: list[str], folder: Path, launcher: list[str]) -> list[str]:
    """The command line of a run."""
    return [*launcher, str(SCRIPT), *arguments, "--output_dir", str(folder), "--save_strategy", "no"]


def execute(arguments: list[str], folder: Path, launcher: list[str] | None) -> dict[str, Any] | None:
    """The run's results.json, from disk where the same run has finished before.

    Args:
        arguments (`list[str]`): Of the pretraining script.
        folder (`Path`): Of the run.
        launcher (`list[str]`, *optional*): What starts the script; without one nothing is run.

    Returns:
        `dict[str, Any]`: The results, *optional*: `None` where there are none and nothing is to be run.

    Raises:
        SystemExit: If the run fails, or its folder holds what other arguments have made.
    """
    if launcher is None:
        try:
            found = finished(folder, arguments, NOTE)
        except SystemExit as other:  # such as further arguments, which only some columns are run with
            print(other)
            return None
        if found is None:
            return None
    else:
        claim(folder, arguments, NOTE)
        found = finished(folder, arguments, NOTE) or _run(arguments, folder, launcher)
    print(f"{folder}: validation perplexity {found['perplexity']:.2f}", flush=True)
    return found


def _run(arguments: list[str], folder: Path, launcher: list[str]) -> dict[str, Any]:
    with open(folder / "log.txt", "w") as log:
        line = command(arguments, folder, launcher)
        code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{folder} failed; see {folder / 'log.txt'}")
    return json.loads((folder / "results.json").read_text())


def row(cell: Cell, found: dict[float, dict[str, Any]], experiment: dict[str, Any], reduced: bool) -> dict[str, Any]:
    """What a cell's finished runs say, beside the paper's numbers."""
    method = experiment["methods"][cell.method]
    result: dict[str, Any] = {
        "method": method["label"],
        "column": cell.column,
        "paper": {} if reduced else method.get("paper", {}).get(cell.column, {}),
        "ours": None,
    }
    if found:
        losses = {
            rate: run["eval_loss"] if math.isfinite(run["eval_loss"]) else math.inf for rate, run in found.items()
        }
        best = min(losses, key=lambda rate: losses[rate])
        run = found[best]
        result["ours"] = {metric: take(run) for metric, (_, take) in METRICS.items()} | {
            "learning_rate": best,
            "eval_loss": {f"{rate:g}": run["eval_loss"] for rate, run in found.items()},
            "arguments": cell.runs[best],
            **{key: run[key] for key in ("steps", "tokens_seen", "optimizer_state_bytes", "peak_memory_bytes")},
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    reduced, metrics = result["reduced"], result["metrics"]
    heads = ["method", result["column"]]
    for metric in metrics:
        heads += [METRICS[metric][0]] if reduced else [f"paper: {METRICS[metric][0]}", "ours"]
    heads += ["learning rate", "tokens", "optimizer state"]
    lines = [f"{result['title']}.", ""]
    if reduced:
        lines += [f"**Reduced: {reduced}. Not comparable with the paper's numbers.**", ""]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for entry in result["rows"]:
        ours, cells = entry["ours"], [entry["method"], entry["column"]]
        for metric in metrics:
            paper = entry["paper"].get(metric)
            cells += [] if reduced else ["-" if paper is None else f"{paper:g}"]
            cells.append(
                f"{ours[metric]:.3g}" if ours and metric == "hours" else f"{ours[metric]:.2f}" if ours else "-"
            )
        if ours:
            cells += [f"{ours['learning_rate']:g}", f"{ours['tokens_seen'] / 1e6:,.2f}M"]
            cells.append(f"{ours['optimizer_state_bytes'] / 2**20:,.1f} MiB")
        else:
            cells += ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {note}" for note in result["notes"])]) + "\n"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes `<path>.md`."""
    named(path, ".md").write_text(table(result), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, gather, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", help="a paper_*.json of experiments/")
    parser.add_argument("--columns", nargs="+", help="run only these; others count where they have been run before")
    parser.add_argument("--methods", nargs="+", help="run only these, likewise")
    parser.add_argument("--reduced", action="store_true", help="the tiny form, on any machine")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--launcher", default=sys.executable, help='default: this Python; or "torchrun ..."')
    parser.add_argument("--work_dir", type=Path, default=Path("runs/paper"), help="default: runs/paper")
    parser.add_argument("--output_dir", type=Path, help="default: results/<device>/")
    arguments, extra = parser.parse_known_args(argv)
    experiment, reduced = load_experiment(arguments.experiment), arguments.reduced
    name = arguments.experiment + "_reduced" * reduced
    wanted = cells(experiment, reduced, extra)
    for asked, there in (
        (arguments.columns, {cell.column for cell in wanted}),
        (arguments.methods, {cell.method for cell in wanted}),
    ):
        if set(asked or ()) - there:
            raise SystemExit(f"Unknown: {', '.join(set(asked) - there)}; there are {', '.join(sorted(there))}.")
    launcher, rows = shlex.split(arguments.launcher), []
    for cell in wanted:
        chosen = cell.column in (arguments.columns or [cell.column]) and cell.method in (
            arguments.methods or [cell.method]
        )
        found = {}
        for rate, options in cell.runs.items():
            folder = arguments.work_dir / name / f"{cell.column}-{cell.method}-lr{rate:g}".replace(" ", "_")
            if arguments.dry_run:
                if chosen:
                    print(shlex.join(command(options, folder, launcher)))
                continue
            result = execute(options, folder, launcher if chosen else None)
            if result is not None:
                found[rate] = result
        rows.append(row(cell, found, experiment, reduced))
    if arguments.dry_run:
        return
    result = {
        "environment": describe(),
        "title": experiment["title"],
        "reduced": experiment["reduced"]["note"] if reduced else None,
        "notes": [] if reduced else experiment["notes"],
        **{key: experiment[key] for key in ("source", "metrics", "column")},
        "rows": rows,
    }
    print("\n" + table(result))
    save((arguments.output_dir or results_folder()) / name, result, render)


if __name__ == "__main__":
    main()
