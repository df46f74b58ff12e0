"""What a run left in its `output_dir`, read with distrust: whatever is missing or broken becomes a sentence."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..optim import OPTIM_NAMES
from ..text import shortened
from ..trainer.checkpoints import last_complete_checkpoint
from ..trainer.statistics_file import STATISTICS_NAME, number
from .files import read_object, reason, unreadable
from .layers import Layers, read_layers
from .memory import Memory, read_memory
from .settings import read_settings


RESULTS = ("all_results.json", "results.json")  # of `Trainer.save_metrics`, and of examples/pretrain_llama.py
# Of the metrics of evaluations, not what tells how long they took.
METRIC = re.compile(r"(eval|test|predict)_(?!(\w*_)?(runtime|samples|\w+_per_second|\w+_time|mem_\w+)$)\w.*")


class RunError(ValueError):
    """A folder from which nothing of a run can be read. The message says why, without its name."""


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        name (`str`): What it is called in the report: the end of its path, as much as tells it from the others.
        log (`list[dict[str, float]]`): Trainer's log history, finite numbers only; every row has a `step`.
        settings (`dict[str, dict[str, Any]]`): Values by section and name.
        memory (`Memory`): Bytes by part.
        layers (`Layers`, *optional*): PCA loss and orthogonality of each projected weight.
        results (`dict[str, float]`): The numbers of `all_results.json` and `results.json`.
        notes (`list[str]`): What is missing or broken.
    """

    name: str
    log: list[dict[str, float]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    layers: Layers | None = None
    results: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of all rows with `key`."""
        rows = [row for row in self.log if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def last(self, key: str) -> float | None:
        """The last value of `key` in the log, or else the one of the results."""
        return next((row[key] for row in reversed(self.log) if key in row), self.results.get(key))

    def metrics(self) -> dict[str, float]:
        """What evaluations found, by name: the last in the log, or what was saved after the training."""
        found = {key: value for row in (*self.log, self.results) for key, value in row.items()}
        return {key: value for key, value in found.items() if METRIC.fullmatch(key)}

    @property
    def steps(self) -> int:
        """The last step that is known."""
        of_layers = self.layers.steps if self.layers is not None else []
        return int(max([*(row["step"] for row in self.log), *of_layers], default=0))

    def throughput(self) -> dict[str, float | None]:
        """Steps, samples and tokens per second of the training, and its seconds, as far as they were recorded."""
        values = {name: self.last(f"train_{name}") for name in ("steps_per_second", "samples_per_second")}
        values["tokens_per_second"] = self.results.get("tokens_per_second", self.last("train_tokens_per_second"))
        values["seconds"] = self.results.get("training_seconds", self.last("train_runtime"))
        if values["steps_per_second"] is None and self.layers is not None:
            values["steps_per_second"] = _rate(self.layers.steps, self.layers.times)
        return values


def read_runs(folders: Sequence[str | os.PathLike]) -> tuple[list[Run], dict[str, str]]:
    """Read every run that can be read.

    Returns:
        `tuple[list[Run], dict[str, str]]`: The runs, and by folder why it could not be read.
    """
    paths = list(dict.fromkeys(Path(folder).absolute() for folder in folders))
    names, runs, errors = _names(paths), [], {}
    for path in paths:
        try:
            runs.append(read_run(path, names[path]))
        except Exception as error:  # whatever is odd about one run, the others are shown
            errors[names[path]] = f"{reason(error)}."
    return runs, errors


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """Read a run.

    Args:
        folder (`str`): Its `output_dir`, or one of its checkpoints.
        name (`str`, *optional*): What to call it; defaults to the folder's name.

    Raises:
        RunError: If there is no such folder, or nothing of a run in it.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise RunError("it is not a folder" if path.exists() else "there is no such folder")
    notes: list[str] = []
    latest = last_complete_checkpoint(path)
    folders = [path, *([Path(latest)] if latest else [])]  # where the files of a run may be
    results: dict[str, Any] = {}
    for file in RESULTS:
        results |= read_object(path / file, notes)
    logs = [_log(results), *(_log(read_object(place / TRAINER_STATE_NAME, notes)) for place in folders)]
    log = max(logs, key=lambda rows: (max((row["step"] for row in rows), default=-1), len(rows)))
    settings = read_settings(folders, results, notes)
    layers = None
    optim = settings.get("Training", {}).get("optim")
    if optim is None or str(optim) in OPTIM_NAMES:  # else it is of another run in this folder
        layers = _layers(path, notes)
    if not log and layers is None:
        raise RunError("; ".join(note.rstrip(".") for note in notes) or _nothing(path))
    if not log:
        notes.append(f"No {TRAINER_STATE_NAME} yet: Trainer writes it with the first checkpoint.")
    if layers is None:
        notes.append(f"No OSD statistics: {_why_no_layers(optim)}")
    memory = read_memory(folders, (layers.memory if layers is not None else {}) | results, notes)
    numbers = {key: value for key in results if (value := number(results[key])) is not None}
    return Run(name or path.name, log, settings, memory, layers, numbers, notes)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells it from the others."""
    names = {}
    for path in paths:
        length = 2 if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else 1
        while sum(other.parts[-length:] == path.parts[-length:] for other in paths) > 1:
            length += 1
        names[path] = os.sep.join(path.parts[-length:]) or str(path)
    return names


def _log(state: Mapping[str, Any]) -> list[dict[str, float]]:
    history = state.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    finite = [{key: kept for key in row if (kept := number(row[key])) is not None} for row in rows]
    return [row for row in finite if "step" in row]


def _layers(path: Path, notes: list[str]) -> Layers | None:
    of_checkpoint = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    until = int(of_checkpoint) if of_checkpoint != path.name and of_checkpoint.isdecimal() else None
    folder = path if until is None else path.parent
    try:
        return read_layers(folder / STATISTICS_NAME, until)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(unreadable(folder / STATISTICS_NAME, error))
        return None


def _why_no_layers(optim: Any) -> str:
    if optim is not None and str(optim) not in OPTIM_NAMES:
        return f"the optimizer was {optim}."
    return f"{STATISTICS_NAME} is not there; it is written at logged steps of an osd_ or rso_ optimizer."


def _nothing(path: Path) -> str:
    runs = sorted(own.name for own in path.iterdir() if own.is_dir() and last_complete_checkpoint(own) is not None)
    give = f"give the runs in it, {shortened(runs, 3)}" if runs else "give the output_dir of a Trainer that has saved"
    return f"it has neither {TRAINER_STATE_NAME} nor a complete checkpoint: {give}"


def _rate(steps: Sequence[float], times: Sequence[float]) -> float | None:
    """Median steps per second between logged steps: evaluations and saves are in few of them."""
    points = list(zip(steps, times, strict=True))
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in zip(points, points[1:], strict=False) if b > a and b[1] > a[1]]
    return median(rates) if rates else None
