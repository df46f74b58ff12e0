"""`_osd_statistics.jsonl`: the PCA loss and the orthogonality of every projected weight, at each logged step of a run.

Each line is a JSON object. A header, `{"format_version": 1, "names": [...]}`, holds for the lines below it; these are
`{"step": 10, "time": 1.79e9, "pca_loss": [...], "orthogonality": [...]}`, with a number for each of the names, or
null where a step saw none: about 20 bytes for a weight and a logged step. A header also tells the bytes of the
optimizer's state and of what AdamW's would be. The name begins with an underscore because
Trainer uploads `output_dir` while it trains on, but for such files, and this one grows meanwhile.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..optim.statistics import OBSERVED
from ..text import write_text


logger = logging.getLogger("hf_osd")

STATISTICS_NAME = "_osd_statistics.jsonl"
FORMAT_VERSION = 1


class StatisticsFile:
    """What a training writes. It never raises, whatever is wrong with disk or file: that is said in the log, once.

    Args:
        folder (`Path`): The run's `output_dir`.
        step (`int`):
            The step that the training begins at. What an earlier training wrote up to it stays, later lines belong to
            steps that are about to be made again; from step 0 on nothing stays.
        memory (`dict[str, int]`): Bytes by name, for the headers.
    """

    def __init__(self, folder: Path, step: int, memory: Mapping[str, int]) -> None:
        self.path, self._memory = folder / STATISTICS_NAME, memory
        self._names: list[str] | None = None  # of the last header in the file
        self._broken = False
        self._start: int | None = step

    def append(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Add a line for a step, below a header if need be.

        Args:
            step (`int`): That has been logged.
            values (`dict[str, dict[str, float]]`): `pca_loss` and `orthogonality` by parameter name.
        """
        if values and self._start is not None:  # no earlier: a run may end before its first step
            with self._may_fail():
                self._keep_until(self._start)
            self._start = None
        if self._broken or not values:
            return
        lines: list[dict[str, Any]] = []
        if self._names != list(values):
            self._names = list(values)
            lines.append({"format_version": FORMAT_VERSION, **self._memory, "names": self._names})
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for key in OBSERVED:
            row[key] = [_rounded(seen[key]) for seen in values.values()]
        lines.append(row)
        with self._may_fail():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write("".join(_dump(line) for line in lines))

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in read_lines(self.path) if step else ():
            if "names" in line:
                self._names = line["names"]
            if "names" in line or line["step"] <= step:
                kept.append(line)
        write_text(self.path, "".join(map(_dump, kept)))

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._broken = True
            logger.warning("The values of each layer are not saved any more: %s", error)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The headers and rows of a file, without lines that a killed process left unfinished.

    Raises:
        ValueError: For a newer format.
    """
    names: list[str] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict):
                continue
            version = line.get("format_version", FORMAT_VERSION)
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise ValueError(
                    f"{path.name} has format_version {version}, newer than {FORMAT_VERSION}: update hf_osd."
                )
            if _is_header(line):
                names = line["names"]
                yield line
            elif names and _is_row(line, len(names)):
                yield line


def _is_header(line: Mapping[str, Any]) -> bool:
    names = line.get("names")
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _is_row(line: Mapping[str, Any], count: int) -> bool:
    return number(line.get("step")) is not None and all(
        isinstance(line.get(key), list)
        and len(line[key]) == count
        and all(value is None or number(value) is not None for value in line[key])
        for key in OBSERVED
    )


def number(value: Any) -> float | None:
    """A finite JSON number as a float, `None` for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # of an integer
        return None


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
