"""Runs of a script of examples/, each in a process of its own and a folder that keeps what it gave."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import kept_runs
from hf_osd import last_complete_checkpoint
from q_galore_weights import obeyed


sys.path.append(str(Path(__file__).parents[1]))  # of the scripts
PROCESSES = multiprocessing.get_context("forkserver")  # imports PRELOADED once, then forks for each run
PRELOADED = ["hf_osd", "datasets"]  # what is installed: before Python 3.13 the server lacks our sys.path
# What these libraries keep in their state is a class of theirs, which torch.load refuses unless it is told.
KEPT_CLASSES = (
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("apollo_torch.svd_projector", "GaLoreProjector"),
    ("apollo_torch.random_projector", "GradientProjector"),
)


@dataclass(frozen=True)
class Run:
    """One call of a script."""

    method: str
    options: tuple[tuple[str, float], ...]
    seed: int
    arguments: tuple[str, ...]
    program: str = "pretrain_llama"

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join([self.method, *(f"{name}{value:g}" for name, value in self.options), f"seed{self.seed}"])

    @property
    def command(self) -> list[str]:
        """All arguments of the script but its output folder."""
        options = {name: f"{value:g}" for name, value in self.options}
        filled = [argument.format_map(options) for argument in self.arguments]
        return [*filled, "--learning_rate", options["learning_rate"], "--seed", str(self.seed)]


def execute(
    run: Run, work_dir: Path, save_steps: int | None = None, made: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The run's results.json, from disk where the same run has finished before.

    Args:
        run (`Run`): What to run.
        work_dir (`Path`): Its folder is in there.
        save_steps (`int`, *optional*):
            Steps between checkpoints, from the last of which an interrupted run goes on; defaults to none.
        made (`dict`, *optional*): Kept in the folder, in a list of the times that the run was started.

    Raises:
        SystemExit: If the run fails, or its folder holds what another command has made.
    """
    folder = work_dir / run.name
    kept_runs.claim(folder, run.command)
    if finished(run, work_dir) is None:
        process = _start(run, folder, save_steps, made)
        process.join()
        if process.exitcode:
            raise SystemExit(f"{run.name} failed; see {folder / 'log.txt'}")
        for left in folder.glob("checkpoint-*"):
            shutil.rmtree(left)
    found = finished(run, work_dir)
    print(f"{run.name}: perplexity {found['perplexity']:.2f}", flush=True)
    return found


def in_turns(runs: Iterable[Run], work_dir: Path, seconds: float = 10.0) -> None:
    """Makes runs beside each other, of which one works at a time: what slows the machine for minutes slows them alike.

    So their seconds of the processor can be compared. One that has finished is not repeated; one that fails is left to
    `execute`, which tells it.

    Args:
        runs (`Iterable[Run]`): What to run. All are in memory together.
        work_dir (`Path`): Their folders are in there.
        seconds (`float`, *optional*, defaults to 10): Of one turn.
    """
    waiting: list[Any] = []
    try:
        for run in runs:
            kept_runs.claim(work_dir / run.name, run.command)
            if finished(run, work_dir) is None:
                waiting.append(_start(run, work_dir / run.name))
                _signal(waiting[-1], signal.SIGSTOP)
        while waiting:
            process = waiting[0]
            _signal(process, signal.SIGCONT)
            process.join(seconds)
            if process.exitcode is None:
                _signal(process, signal.SIGSTOP)
                waiting.append(process)
            del waiting[0]
    finally:
        for process in waiting:
            process.kill()


def _signal(process: Any, number: int) -> None:
    with suppress(ProcessLookupError):  # it may just have finished
        os.kill(process.pid, number)


def _start(run: Run, folder: Path, save_steps: int | None = None, made: dict[str, Any] | None = None) -> Any:
    """The process of a run that has not finished, which goes on from its last checkpoint."""
    checkpoint = last_complete_checkpoint(folder)
    resumed = ["--resume_from_checkpoint", checkpoint] if checkpoint else []
    saving = ["--save_steps", str(save_steps), "--save_total_limit", "1"] if save_steps else ["--save_strategy", "no"]
    with open(folder / "made.jsonl", "a") as file:
        file.write(json.dumps({"from": Path(checkpoint).name if checkpoint else None, **(made or {})}) + "\n")
    command = [*run.command, "--output_dir", str(folder), *saving, *resumed]
    process = PROCESSES.Process(target=_train, args=(run.program, command, folder / "log.txt"))
    process.start()
    return process


def finished(run: Run, work_dir: Path) -> dict[str, Any] | None:
    """The results.json of a run that has finished, or `None`.

    Raises:
        SystemExit: If its folder holds what another command has made.
    """
    return kept_runs.finished(work_dir / run.name, run.command)


def started(run: Run, work_dir: Path) -> list[dict[str, Any]]:
    """What was noted of every start of a run."""
    note = work_dir / run.name / "made.jsonl"
    return [json.loads(line) for line in note.read_text().splitlines()] if note.is_file() else []


def _train(program: str, command: list[str], log: Path) -> None:
    """One call of a script, in a process of its own."""
    script = importlib.import_module(program)
    for module, name in KEPT_CLASSES:
        if find_spec(module.partition(".")[0]):
            torch.serialization.add_safe_globals([getattr(importlib.import_module(module), name)])
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script.main(obeyed(command))
