"""Pretrains one model for long with several optimizers, at settings that were searched over a tenth of the length.

Reads experiments/<name>.json, as compare_pretraining.py does, with two stages: `search` and `long`, each with its
arguments and seeds. A method walks its grid in short runs with the first seed of `search`; its best setting is then
trained at full length with the first seed of `long`. After all methods come the other seeds of `long`, then those of
`search`, which tell how far apart short runs at one setting are.

One run at a time, on `--threads` cores (default: 1). A run that is killed goes on from its last checkpoint; one that
has finished is not repeated. Both hold for the same command whatever the commit: the commits are kept with every run
and in the result, and a run that should be made again is deleted by hand, with its folder in `--work_dir`.

What has finished is in `<work_dir>/<name>.json`, .md and .png, written after every run, and with the last one, or by
`--finished` before, in results/<device>: rows tell how many seeds they have. With `--add` the runs that the result in
results/<device> was made of count as finished, wherever they were made; only what it lacks is run.

`--times` measures a step of every method of the result, one after the other on this machine, at the settings of the
rows: seconds of the processor. The runs above, made beside other work and perhaps on several machines, tell no time.

Needs: the `examples` extra, text, and for its GaLore and APOLLO galore-torch and apollo-torch. Days on one core:

    python examples/benchmarks/run.py family_long --data folder/of/text
    python examples/benchmarks/run.py family_long --data folder/of/text --status       # what there is, without running
    python examples/benchmarks/run.py family_long --data folder/of/text --finished     # the same, into results/
    python examples/benchmarks/run.py family_long --data folder/of/text --add --finished  # beside what is there
    python examples/benchmarks/run.py family_long --data folder/of/text --times        # a minute and a half a method
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compare_pretraining import read_methods, walk
from environment import describe, load_experiment, named, results_folder, save
from long_rows import Contender, recalled, render, table
from pretraining_runs import PRELOADED, PROCESSES, Run, execute, finished, started


TIMED_STEPS = 400  # a multiple of every interval of an SVD
TIMED = ("--max_steps", str(TIMED_STEPS), "--eval_steps", str(TIMED_STEPS), "--max_eval_tokens", "8192")
Get = Callable[[Run], dict[str, Any]]  # makes a run, or finds it


class Missing(Exception):
    """A run that `--status` would have to make."""


def read_contenders(experiment: dict[str, Any], names: list[str] | None, extra: list[str]) -> list[Contender]:
    """The methods of an experiment, or some of them, with their two stages."""
    stages = (
        read_methods(experiment | {"seeds": stage["seeds"]}, names, [*stage["arguments"], *extra])
        for stage in (experiment["search"], experiment["long"])
    )
    return [Contender(search, long) for search, long in zip(*stages, strict=True)]


def contend(contenders: list[Contender], short: Get, long: Get) -> Iterator[Contender]:
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


def measure(contenders: list[Contender], rows: list[dict[str, Any]], run: Get) -> dict[str, Any]:
    """Seconds of the processor for a step of every row's method at its setting, one run after the other."""
    settings = {row["method"]: tuple(row["best"].values()) for row in rows}
    seconds = {}
    for contender in contenders:
        if contender.long.name in settings:
            made = contender.long.run(settings[contender.long.name], contender.long.seeds[0])
            found = run(replace(made, arguments=(*made.arguments, *TIMED)))
            (entry,) = (entry for entry in found["log_history"] if "train_cpu_seconds" in entry)
            seconds[contender.long.name] = entry["train_cpu_seconds"] / entry["step"]
    return {"environment": describe(), "steps": TIMED_STEPS, "seconds_per_step": seconds}


def main() -> None:
    """Run, summarise, write."""
    arguments = parser().parse_args()
    if arguments.methods and (arguments.finished or arguments.times):
        raise SystemExit("--finished and --times write the rows of all methods: leave --methods out.")
    if arguments.times and arguments.add:
        raise SystemExit("--times measures the result as it is: leave --add out, or call it with --finished before.")
    experiment = load_experiment(arguments.experiment)
    extra = ["--dataset", arguments.data] if arguments.data else []
    name = arguments.experiment + (f"_{Path(arguments.data).name}" if arguments.data else "")
    folder, path = arguments.work_dir / name, results_folder() / name
    contenders = read_contenders(experiment, arguments.methods, extra)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    there = json.loads(named(path, ".json").read_text()) if named(path, ".json").is_file() else {"rows": []}
    if arguments.times:
        if not there["rows"]:
            raise SystemExit(
                f"There is no {named(path, '.json')}, whose rows are to be timed: run some, or --finished."
            )
        with alone(folder):
            shutil.rmtree(folder / "times", ignore_errors=True)  # of before: they are compared with each other
            times = measure(contenders, there["rows"], partial(execute, work_dir=folder / "times"))
            return save(path, there | {"times": times}, render)
    result = {"environment": describe() | {"threads": arguments.threads}}
    result |= {key: experiment[key] for key in ("title", "common", "search", "long")} | {"rows": []}
    known = _known(contenders, there, result, name) if arguments.add else {"search": {}, "long": {}}
    if arguments.status or arguments.finished:
        looks = (partial(_look, folder=folder / stage, known=known[stage]) for stage in ("search", "long"))
        for _ in contend(contenders, *looks):
            pass
        result |= _rows(contenders, there, folder)
        if arguments.finished:
            _refuse_loss(there["rows"], result["rows"], folder)
            return save(path, result, render)
        return print("\n" + table(result))
    short = partial(_make, known=known["search"], work_dir=folder / "search", made=result["environment"])
    long = partial(short, known=known["long"], work_dir=folder / "long", save_steps=experiment["long"]["save_steps"])
    with alone(folder):
        for _ in contend(contenders, short, long):
            result |= _rows(contenders, there, folder)
            save(folder / name, result, render, quiet=True)
    print("\n" + table(result))
    whole = [len(c.results) == len(c.long.seeds) and len(c.short) == len(c.search.seeds) for c in contenders]
    if all(whole) and not arguments.methods:
        save(path, result, render)


def parser() -> argparse.ArgumentParser:
    """What it is asked on its command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("experiment", help="name of a file in experiments/")
    found.add_argument("--data", help="data set for --dataset; results are written under its name")
    found.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    found.add_argument("--add", action="store_true", help="take the runs of the result in results/ as finished")
    instead = found.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="run nothing: what has finished, and its table")
    instead.add_argument("--finished", action="store_true", help="run nothing: write what has finished to results/")
    instead.add_argument("--times", action="store_true", help="only measure a step of each method of that result")
    found.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    found.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    return found


def _known(
    contenders: list[Contender], there: dict[str, Any], result: dict[str, Any], name: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """The runs that the result in results/ was made of, by stage and name; contenders get their commits."""
    for key in ("common", "search", "long"):
        if there["rows"] and there[key] != result[key]:
            raise SystemExit(f"The result of {name} was measured with another {key}: leave --add out.")
    rows = {row["method"]: row for row in there["rows"]}
    known: dict[str, dict[str, dict[str, Any]]] = {"search": {}, "long": {}}
    for contender in contenders:
        if row := rows.get(contender.search.name):
            for stage, runs in recalled(contender, row).items():
                known[stage] |= runs
            contender.earlier = [{"commit": commit} for commit in row["commits"]]
            processors = row.get("processors", [there["environment"]["processor"]])
            contender.earlier += [{"processor": found} for found in processors]
    return known


def _rows(contenders: list[Contender], there: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rows, and of the times that the result in results/ has those of settings that are still the best."""
    for contender in contenders:
        own = [start for stage in ("search", "long") for start in started(folder / stage, contender.search.name)]
        contender.starts = contender.earlier + own
    rows = [contender.row for contender in contenders if contender.results]
    if "times" not in there:
        return {"rows": rows}
    timed = {row["method"]: row["best"] for row in there["rows"]}
    same = {row["method"] for row in rows if row["best"] == timed.get(row["method"])}
    seconds = {name: second for name, second in there["times"]["seconds_per_step"].items() if name in same}
    return {"rows": rows, "times": there["times"] | {"seconds_per_step": seconds}}


def _refuse_loss(there: list[dict[str, Any]], rows: list[dict[str, Any]], folder: Path) -> None:
    """Write no result that lacks a method, or a seed of one, which the one that there is has."""
    found = {row["method"]: row for row in rows}
    lost = [
        row["method"]
        for row in there
        if any(
            len(found.get(row["method"], {}).get(seeds, ())) < len(row[seeds]) for seeds in ("seeds", "short_seeds")
        )
    ]
    if lost := lost or (["any method"] if not found else []):
        raise SystemExit(
            f"{folder} has no finished runs of {', '.join(lost)}: give another --work_dir, or keep them by --add."
        )


def _make(run: Run, known: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    return known[run.name] if run.name in known else execute(run, **options)


def _look(run: Run, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if (found := known.get(run.name) or finished(run, folder)) is None:
        raise Missing(f"{run.name} has not finished")
    print(f"{folder.name} {run.name}: perplexity {found['perplexity']:.2f}")
    return found


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
