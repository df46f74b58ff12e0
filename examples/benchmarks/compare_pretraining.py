"""Pretrains the same model on the same text with several optimizers, each at its best learning rate.

Reads experiments/<name>.json: arguments common to all runs, and for each method its arguments and learning rates (and
seeds). Every run is one call of examples/pretrain_llama.py in a process of its own. Finished runs are kept in
`--work_dir` and not repeated, so an interrupted comparison continues. Writes results/<device>/<name>.json, .md, .png.

Needs: the `examples` extra. The small command takes a minute, the committed one an hour on two cores.

    python examples/benchmarks/compare_pretraining.py quickstart --methods osd_adamw galore_adamw --max_steps 20
    python examples/benchmarks/compare_pretraining.py quickstart --jobs 2
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from environment import describe, load_experiment, results_folder


HERE = Path(__file__).parent
SCRIPT = HERE.parent / "pretrain_llama.py"


@dataclass(frozen=True)
class Run:
    """One call of the pretraining script."""

    method: str
    learning_rate: float
    seed: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def plan(experiment: dict[str, Any], methods: list[str] | None, extra: list[str]) -> list[Run]:
    """All runs of an experiment, or of some of its methods."""
    unknown = set(methods or ()) - experiment["methods"].keys()
    if unknown:
        raise SystemExit(
            f"Unknown methods {', '.join(sorted(unknown))}; there are {', '.join(experiment['methods'])}."
        )
    return [
        Run(name, rate, seed, (*experiment["common"], *method["arguments"], *extra))
        for name, method in experiment["methods"].items()
        if not methods or name in methods
        for rate in method["learning_rates"]
        for seed in experiment["seeds"]
    ]


def execute(run: Run, work_dir: Path, threads: int) -> dict[str, Any]:
    """The run's results.json, from disk where the same run has finished before."""
    folder = work_dir / run.name
    results, command_file = folder / "results.json", folder / "command.json"
    arguments = [*run.arguments, "--learning_rate", str(run.learning_rate), "--seed", str(run.seed)]
    if not (results.is_file() and command_file.is_file() and json.loads(command_file.read_text()) == arguments):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPT), *arguments, "--output_dir", str(folder), "--save_strategy", "no"]
        with open(folder / "log.txt", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        if code:
            raise SystemExit(f"{run.name} failed; see {folder / 'log.txt'}")
        command_file.write_text(json.dumps(arguments))
    found = json.loads(results.read_text())
    print(f"{run.name}: perplexity {found['perplexity']:.2f}", flush=True)
    return found


def summarise(experiment: dict[str, Any], runs: list[Run], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: mean perplexity over seeds at each learning rate, and the best."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run, result in zip(runs, found, strict=True):
            if run.method == method:
                by_rate.setdefault(run.learning_rate, []).append(result)
        means = {rate: _mean([result["eval_loss"] for result in results]) for rate, results in by_rate.items()}
        best = min(means, key=lambda rate: means[rate])
        results = by_rate[best]
        rows.append(
            {
                "method": method,
                "label": experiment["methods"][method].get("label", method),
                "arguments": experiment["methods"][method]["arguments"],
                "eval_loss": {f"{rate:g}": mean for rate, mean in means.items()},
                "perplexity": {f"{rate:g}": math.exp(mean) for rate, mean in means.items()},
                "best_learning_rate": best,
                "best_perplexity": math.exp(means[best]),
                "seeds": [result["perplexity"] for result in results],
                "spread": _spread([result["perplexity"] for result in results]),
                "optimizer_state_bytes": results[0]["optimizer_state_bytes"],
                "adamw_state_bytes": results[0]["adamw_state_bytes"],
                "steps": results[0]["steps"],
                "tokens_seen": results[0]["tokens_seen"],
                "curve": [
                    (entry["step"], entry["eval_loss"]) for entry in results[0]["log_history"] if "eval_loss" in entry
                ],
            }
        )
    return rows


def _mean(losses: list[float]) -> float:
    return statistics.fmean(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def _spread(perplexities: list[float]) -> float | None:
    """Standard deviation over seeds, where there are several and none has diverged."""
    finite = all(math.isfinite(value) for value in perplexities)
    return statistics.stdev(perplexities) if len(perplexities) > 1 and finite else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | perplexity | at learning rate | the grid | optimizer state | of AdamW's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f" ± {row['spread']:.2f}" if row["spread"] is not None else ""
        grid = ", ".join(f"{rate}: {value:.1f}" for rate, value in row["perplexity"].items())
        size = row["optimizer_state_bytes"]
        lines.append(
            f"| {row['label']} | {row['best_perplexity']:.2f}{spread} | {row['best_learning_rate']:g} | {grid} | "
            f"{size / 2**20:.1f} MiB | {size / row['adamw_state_bytes']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Validation loss against steps, each method at its best learning rate."""
    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        label = f"{row['label']}: {row['best_perplexity']:.1f} (learning rate {row['best_learning_rate']:g})"
        axes.plot(steps, losses, "o-", markersize=3.5, linewidth=1.3, label=label)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="final perplexity", alignment="left", fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Run, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of a file in experiments/")
    parser.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    parser.add_argument("--max_steps", type=int, help="another length; nothing is written to results/ then")
    parser.add_argument("--data", help="another data set for --dataset; written to results/ under its own name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment)
    extra = ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else []
    name = arguments.experiment
    if arguments.data:
        extra += ["--dataset", arguments.data]
        name += "_" + Path(arguments.data).name
    runs = plan(experiment, arguments.methods, extra)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda run: execute(run, arguments.work_dir / name, threads), runs))
    rows = summarise(experiment, runs, found)
    print("\n" + table(rows))
    if arguments.methods or arguments.max_steps:
        return
    folder = results_folder()
    result = {"environment": describe(), "common": experiment["common"], "seeds": experiment["seeds"], "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(rows))
    draw(rows, experiment["title"], folder / f"{name}.png")
    print(f"Written: {folder / name}.json, .md and .png")


if __name__ == "__main__":
    main()
