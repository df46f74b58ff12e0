"""Pretrains one model for long with several optimizers, at settings that were searched over a tenth of the length.

Reads experiments/<name>.json, as compare_pretraining.py does, with two stages: `search` and `long`, each with its
arguments and seeds. A method walks its grid in short runs with the first seed of `search`; its best setting is then
trained at full length with the first seed of `long`. After all methods come the other seeds of `long`, then those of
`search`, which tell how far apart short runs at one setting are.

One run at a time, on `--threads` cores (default: 1). A run that is killed goes on from its last checkpoint; one that
has finished is not repeated. Both hold for the same command whatever the commit: the commits are kept with every run
and in the result, and a run that should be made again is deleted by hand, with its folder in `--work_dir`.

What has finished is in `<work_dir>/<name>.json`, .md and .png, written after every run, and with the last one, or by
`--finished` before, in results/<device>: rows tell how many seeds they have. Times are those of the processor, so a
machine that does other things disturbs them little.

Needs: the `examples` extra, text, and for its GaLore and APOLLO galore-torch and apollo-torch. Days on one core:

    python examples/benchmarks/run.py family_long --data folder/of/text
    python examples/benchmarks/run.py family_long --data folder/of/text --status       # what there is, without running
    python examples/benchmarks/run.py family_long --data folder/of/text --finished     # the same, into results/
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compare_pretraining import Method, Setting, read_methods, row_of, tried, walk
from environment import describe, load_experiment, named, results_folder, save
from long_plot import draw
from pretraining_runs import PRELOADED, PROCESSES, Run, execute, finished, started


class Missing(Exception):
    """A run that `--status` would have to make."""


@dataclass
class Contender:
    """A method, and what has been found of it so far."""

    search: Method
    long: Method
    losses: dict[Setting, float] = field(default_factory=dict)
    best: Setting | None = None
    short: list[dict[str, Any]] = field(default_factory=list)  # at the best setting, by seed
    results: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)  # commits and packages of all of its runs

    @property
    def row(self) -> dict[str, Any]:
        """What the result keeps of it, once a long run has finished."""
        row = row_of(self.search, self.losses, self.best, self.results)
        return row | {
            "short_seeds": [result["perplexity"] for result in self.short],
            "parameters": self.results[0]["parameters"],
            "curves": [curve(result) for result in self.results],
            "seconds_per_step": statistics.median(second for r in self.results for second in step_seconds(r)),
            "commits": sorted({str(start.get("commit")) for start in self.starts}),
        }


def curve(result: dict[str, Any]) -> list[tuple[int, float]]:
    """Step and validation loss of every evaluation of a run."""
    return [(entry["step"], entry["eval_loss"]) for entry in result["log_history"] if "eval_loss" in entry]


def step_seconds(result: dict[str, Any]) -> list[float]:
    """Seconds of the processor that a step took, one figure between any two evaluations of a run."""
    entries = [entry for entry in result["log_history"] if "train_cpu_seconds" in entry]
    before = [0, *(entry["step"] for entry in entries)]
    return [entry["train_cpu_seconds"] / (entry["step"] - step) for entry, step in zip(entries, before, strict=False)]


def read_contenders(experiment: dict[str, Any], names: list[str] | None, extra: list[str]) -> list[Contender]:
    """The methods of an experiment, or some of them, with their two stages."""
    stages = (
        read_methods(experiment | {"seeds": stage["seeds"]}, names, [*stage["arguments"], *extra])
        for stage in (experiment["search"], experiment["long"])
    )
    return [Contender(search, long) for search, long in zip(*stages, strict=True)]


def contend(
    contenders: list[Contender], short: Callable[[Run], dict[str, Any]], long: Callable[[Run], dict[str, Any]]
) -> Iterator[Contender]:
    """Makes all runs, the most telling first, and yields the contender after each that its row needs.

    A method whose run fails, or is missing, is left as it is, and the others go on.
    """
    lost: set[str] = set()

    def attempt(contender: Contender, work: Callable[[], None]) -> Iterator[Contender]:
        if contender.search.name in lost:
            return
        try:
            work()
        except (Missing, SystemExit) as reason:
            lost.add(contender.search.name)
            print(f"{contender.search.label}: {reason}", flush=True)
        else:
            yield contender

    def train(contender: Contender, seed: int) -> None:
        contender.results.append(long(contender.long.run(contender.best, seed)))

    def choose_and_train(contender: Contender, seed: int) -> None:
        contender.losses, contender.best = walk(contender.search, short)
        repeat(contender, contender.search.seeds[0])  # which the walk has made
        train(contender, seed)

    def repeat(contender: Contender, seed: int) -> None:
        contender.short.append(short(contender.search.run(contender.best, seed)))

    for work, place, stage in (
        (choose_and_train, slice(0, 1), "long"),
        (train, slice(1, None), "long"),
        (repeat, slice(1, None), "search"),
    ):
        for index in range(max(len(getattr(contender, stage).seeds[place]) for contender in contenders)):
            for contender in contenders:
                seed = getattr(contender, stage).seeds[place][index]
                yield from attempt(contender, partial(work, contender, seed))


def table(result: dict[str, Any]) -> str:
    """Markdown: perplexities, settings, bytes and time of every method that has a long run."""
    rows = result["rows"]
    lines = [
        "| method | perplexity | short runs | at the setting | the grid | optimizer state | of AdamW's | ms a step |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        best = ", ".join(f"{option.replace('_', ' ')} {value:g}" for option, value in row["best"].items())
        size = row["optimizer_state_bytes"]
        lines.append(
            f"| {row['label']} | {_mean(row['seeds'])} | {_mean(row['short_seeds'])} | {best} | {tried(row)} | "
            f"{size / 2**20:.1f} MiB | {size / row['adamw_state_bytes']:.0%} | {1000 * row['seconds_per_step']:.0f} |"
        )
    if rows:
        tokens, parameters = rows[0]["tokens_seen"], rows[0]["parameters"]
        lines += ["", f"{tokens:,} tokens, {tokens / parameters:.1f} for each of {parameters:,} parameters."]
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.2f} (one seed)" if values else "-"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def render(result: dict[str, Any], path: Path) -> None:
    """Writes table and picture of a result."""
    named(path, ".md").write_text(table(result), encoding="utf-8")
    draw(result["rows"], result["title"], named(path, ".png"))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a second comparison in the same folder while one is running."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"A comparison is running in {folder}: wait for it, or look at it with --status."
            ) from None
        yield


def main() -> None:
    """Run, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of a file in experiments/")
    parser.add_argument("--data", help="data set for --dataset; results are written under its name")
    parser.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    parser.add_argument("--status", action="store_true", help="run nothing: what has finished, and its table")
    parser.add_argument("--finished", action="store_true", help="run nothing: write what has finished to results/")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    arguments = parser.parse_args()
    if arguments.finished and arguments.methods:
        parser.error("--finished writes the rows of all methods: leave --methods out")
    experiment = load_experiment(arguments.experiment)
    extra = ["--dataset", arguments.data] if arguments.data else []
    name = arguments.experiment + (f"_{Path(arguments.data).name}" if arguments.data else "")
    folder = arguments.work_dir / name
    contenders = read_contenders(experiment, arguments.methods, extra)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    result = {"environment": describe() | {"threads": arguments.threads}}
    result |= {key: experiment[key] for key in ("title", "common", "search", "long")} | {"rows": []}
    if arguments.status or arguments.finished:
        for _ in contend(contenders, partial(_look, folder=folder / "search"), partial(_look, folder=folder / "long")):
            pass
        result["rows"] = _rows(contenders, folder)
        if arguments.finished:
            _refuse_loss(results_folder() / name, result["rows"], folder)
            return save(results_folder() / name, result, render)
        return print("\n" + table(result))
    short = partial(execute, work_dir=folder / "search", made=result["environment"])
    long = partial(short, work_dir=folder / "long", save_steps=experiment["long"]["save_steps"])
    with alone(folder):
        for _ in contend(contenders, short, long):
            result["rows"] = _rows(contenders, folder)
            save(folder / name, result, render, quiet=True)
    print("\n" + table(result))
    whole = [len(c.results) == len(c.long.seeds) and len(c.short) == len(c.search.seeds) for c in contenders]
    if all(whole) and not arguments.methods:
        save(results_folder() / name, result, render)


def _rows(contenders: list[Contender], folder: Path) -> list[dict[str, Any]]:
    for contender in contenders:
        contender.starts = [
            start for stage in ("search", "long") for start in started(folder / stage, contender.search.name)
        ]
    return [contender.row for contender in contenders if contender.results]


def _refuse_loss(path: Path, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write no result that lacks a method, or a seed of one, which the one that there is has."""
    file, found = named(path, ".json"), {row["method"]: len(row["seeds"]) for row in rows}
    there = json.loads(file.read_text())["rows"] if file.is_file() else []
    lost = [row["method"] for row in there if found.get(row["method"], 0) < len(row["seeds"])]
    if lost := lost or (["any method"] if not found else []):
        raise SystemExit(f"{folder} has no finished runs of {', '.join(lost)}: give another --work_dir.")


def _look(run: Run, folder: Path) -> dict[str, Any]:
    if (found := finished(run, folder)) is None:
        raise Missing(f"{run.name} has not finished")
    print(f"{folder.name} {run.name}: perplexity {found['perplexity']:.2f}")
    return found


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
