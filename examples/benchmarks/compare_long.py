"""Pretrains one model for long with several optimizers, at settings that were searched over a tenth of the length.

Reads experiments/<name>.json, as compare_pretraining.py does, with two stages: `search` and `long`, each with its
arguments and seeds. A method walks its grid in short runs with the first seed of `search`; its best setting is then
trained at full length with the first seed of `long`. After all methods come the other seeds of `long`, then those of
`search`, which tell how far apart short runs at one setting are.

One run at a time, on `--threads` cores (default: 1). A run that is killed goes on from its last checkpoint; one that
has finished is not repeated. Both hold for the same command whatever the commit: the commits are kept with every run
and in the result, and a run that should be made again is deleted by hand, with its folder in `--work_dir`.

What has finished is in `<work_dir>/<name>.json`, .md and .png, written after every run, and with the last one, or by
`--finished` before, in results/<device>: rows tell how many seeds they have and all that their runs were made with
(commits, processors, packages). With `--add` the runs that the result in results/<device> was made of count as
finished, wherever they were made; only what it lacks is run. That result tells the text by its contents (`data`), and
nothing of another text is put into it, whatever the folder is called.

`--times` measures a step of every method of the result on this machine, at the settings of the rows: seconds of the
processor. The methods take turns of ten seconds, so that what slows a machine for minutes does not pass for one of
them; all are in memory together, a gigabyte each. The runs above, made beside other work and perhaps on several
machines, tell no time. A method that fails is tried once more, alone, and else has none; where the result has one, its
times stay until all are there, and the next call goes on.

Needs: the `examples` extra, text, and for its GaLore and APOLLO galore-torch and apollo-torch. Days on one core:

    python examples/benchmarks/run.py family_long --data folder/of/text
    python examples/benchmarks/run.py family_long --data folder/of/text --status       # what there is, without running
    python examples/benchmarks/run.py family_long --data folder/of/text --finished     # the same, into results/
    python examples/benchmarks/run.py family_long --data folder/of/text --add --finished  # beside what is there
    python examples/benchmarks/run.py family_long --data folder/of/text --times        # a minute and a half a method
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compare_pretraining import read_methods, walk
from environment import describe, load_experiment, named, read, refuse_gone, results_folder, save
from identity import text_of
from long_result import known_runs, refuse_changed, refuse_other_text, rows_of, write
from long_rows import Contender, render, table
from pretraining_runs import PRELOADED, PROCESSES, Run, execute, finished, in_turns, started


TIMED_STEPS = 400  # a multiple of every interval of an SVD
TIMED = ("--max_steps", str(TIMED_STEPS), "--eval_steps", str(TIMED_STEPS), "--max_eval_tokens", "8192")
Get = Callable[[Run], dict[str, Any]]  # makes a run, or finds it
Runs = dict[str, dict[str, Any]]  # results by name
Starts = dict[str, list[dict[str, Any]]]  # what the runs of a method were made with, by its name


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
        contender.walked, contender.best = walk(contender.search, short)
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


def timed(contenders: list[Contender], rows: list[dict[str, Any]]) -> dict[str, Run]:
    """The short run that measures a step of every row's method at its setting, by the method's name."""
    settings = {row["method"]: tuple(row["best"].values()) for row in rows}
    found = {}
    for contender in contenders:
        if contender.long.name in settings:
            run = contender.long.run(settings[contender.long.name], contender.long.seeds[0])
            found[contender.long.name] = replace(run, arguments=(*run.arguments, *TIMED))
    return found


def measure(runs: dict[str, Run], make: Get) -> dict[str, Any]:
    """Seconds of the processor for a step of these runs, as `timed` gives them.

    A method whose run fails has none, and the others go on.
    """
    seconds = {}
    for name, run in runs.items():
        try:
            found = make(run)
        except SystemExit as reason:
            print(f"{name}: {reason}", flush=True)
            continue
        (entry,) = (entry for entry in found["log_history"] if "train_cpu_seconds" in entry)
        seconds[name] = entry["train_cpu_seconds"] / entry["step"]
    return {"environment": describe(), "steps": TIMED_STEPS, "seconds_per_step": seconds}


def write_times(contenders: list[Contender], there: dict[str, Any], path: Path, folder: Path) -> None:
    """Measures all rows of the result and puts the times into it: all at once, they are compared with each other."""
    file = named(path, ".json")
    if not there["rows"]:
        raise SystemExit(f"There is no {file}, whose rows are to be timed: run some, or --finished.")
    here = folder / "times" / str(describe()["commit"])  # what was broken off goes on, but with no other code
    with alone(folder):
        runs = timed(contenders, there["rows"])
        in_turns(runs.values(), here)
        times = measure(runs, partial(execute, work_dir=here))
        before, now = (found.get("seconds_per_step", {}) for found in (there.get("times", {}), times))
        if lost := [name for name in before if name not in now] or (["any method"] if not now else []):
            raise SystemExit(
                f"{file} stays as it is, for there is no time of {', '.join(lost)}. The others are kept in {here}: "
                "once that runs, --times goes on with it."
            )
        refuse_changed(path, there)
        save(path, there | {"times": times}, render)
        shutil.rmtree(folder / "times", ignore_errors=True)


def main() -> None:
    """Run, summarise, write."""
    arguments = parse()
    experiment = load_experiment(arguments.experiment)
    extra = ["--dataset", arguments.data] if arguments.data else []
    name = arguments.experiment + (f"_{Path(arguments.data).name}" if arguments.data else "")
    folder, path = arguments.work_dir / name, results_folder() / name
    contenders = read_contenders(experiment, arguments.methods, extra)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    there, data = read(path), text_of(arguments.data)
    refuse_other_text(path, there, data)
    if not (arguments.status or arguments.methods):
        refuse_gone(path, there["rows"], experiment)
    if arguments.times:
        return write_times(contenders, there, path, folder)
    made = describe() | {"threads": arguments.threads}
    result = {"environment": made} | {key: experiment[key] for key in ("title", "common", "search", "long")}
    result |= ({"data": data} if data else {}) | {"rows": []}
    known = known_runs(contenders, there, result, path) if arguments.add else {"search": {}, "long": {}}
    starts = {contender.search.name: contender.starts for contender in contenders}
    if arguments.status or arguments.finished:
        looks = (
            partial(_look, folder=folder / stage, known=known[stage], starts=starts, data=data) for stage in known
        )
        for _ in contend(contenders, *looks):
            pass
        result |= rows_of(contenders, there, result)
        if arguments.finished:
            return write(path, there, result, folder, arguments.add)
        return print("\n" + table(result))
    noted = made | ({"data": data} if data else {})
    short = partial(_make, known=known["search"], work_dir=folder / "search", starts=starts, made=noted)
    long = partial(short, known=known["long"], work_dir=folder / "long", save_steps=experiment["long"]["save_steps"])
    with alone(folder):
        for _ in contend(contenders, short, long):
            result |= rows_of(contenders, there, result)
            save(folder / name, result, render, quiet=True)
    print("\n" + table(result))
    whole = [len(c.results) == len(c.long.seeds) and len(c.short) == len(c.search.seeds) for c in contenders]
    if all(whole) and not arguments.methods:
        write(path, there, result, folder, arguments.add)


def parse() -> argparse.Namespace:
    """What it is asked on its command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("experiment", help="name of a file in experiments/")
    found.add_argument("--data", help="file or folder of text, for --dataset; results are written under its name")
    found.add_argument("--methods", nargs="+", help="only these; nothing is written to results/ then")
    found.add_argument("--add", action="store_true", help="take the runs of the result in results/ as finished")
    instead = found.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="run nothing: what has finished, and its table")
    instead.add_argument("--finished", action="store_true", help="run nothing: write what has finished to results/")
    instead.add_argument("--times", action="store_true", help="only measure a step of each method of that result")
    found.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    found.add_argument("--work_dir", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    arguments = found.parse_args()
    if arguments.methods and (arguments.finished or arguments.times):
        raise SystemExit("--finished and --times write the rows of all methods: leave --methods out.")
    if arguments.times and arguments.add:
        raise SystemExit("--times measures the result as it is: leave --add out, or call it with --finished before.")
    if arguments.data and not Path(arguments.data).expanduser().exists():
        raise SystemExit(f"--data {arguments.data}: there is no such file or folder.")
    return arguments


def _make(
    run: Run, known: Runs, starts: Starts, work_dir: Path, made: dict[str, Any], **options: Any
) -> dict[str, Any]:
    if run.name in known:
        return known[run.name]
    _refuse_other_text(run, work_dir, made.get("data"))
    found = execute(run, work_dir, made=made, **options)
    starts[run.method] += started(run, work_dir)
    return found


def _look(run: Run, folder: Path, known: Runs, starts: Starts, data: dict[str, Any] | None) -> dict[str, Any]:
    found = known.get(run.name)
    if found is None:
        if (found := finished(run, folder)) is None:
            raise Missing(f"{run.name} has not finished")
        _refuse_other_text(run, folder, data)
        starts[run.method] += started(run, folder)
    print(f"{folder.name} {run.name}: perplexity {found['perplexity']:.2f}")
    return found


def _refuse_other_text(run: Run, work_dir: Path, data: dict[str, Any] | None) -> None:
    """Raise `SystemExit` for a run that has been started on another text of the same name."""
    if any(start.get("data", data) != data for start in started(run, work_dir)):
        raise SystemExit(f"{work_dir / run.name} is of another text: delete it, or give another --work_dir.")


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOADED)
    main()
