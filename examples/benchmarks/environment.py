"""What every benchmark needs: its experiment, where it was made (device, versions, commit), and where results go."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "bitsandbytes", "galore-torch", "apollo-torch", "torchao", "peft", "hf_osd")
OPTIONAL = ("bitsandbytes", "datasets", "peft", "galore_torch", "apollo_torch", "torchao")  # by the names of modules
EIGHT_BIT = re.compile(r"(?<=^osd_)([a-z]+)8bit")
EXPERIMENTS = Path(__file__).parent / "experiments"
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def describe(device: str | None = None) -> dict[str, object]:
    """Device, cores, versions of the libraries compared, and the commit (with `+` where files are changed)."""
    return {
        "device": device_name(device),
        **(_card() if pick_device(device) == "cuda" else {}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def pick_device(asked: str | None = None) -> str:
    """`cuda` where there is a GPU, `cpu` elsewhere, or what was asked for."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} sees no GPU here.")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: str | None = None) -> str:
    """A name that makes a folder: the GPU's, or `cpu_2_cores`."""
    if pick_device(device) == "cuda":
        return re.sub(r"[^a-z0-9.-]+", "_", torch.cuda.get_device_name().lower())
    return f"cpu_{os.cpu_count()}_cores"


def results_folder(device: str | None = None) -> Path:
    """`results/<device>/` beside this file, made if missing."""
    folder = RESULTS / device_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(
    path: Path, result: dict[str, Any], render: Callable[[dict[str, Any], Path], object], quiet: bool = False
) -> None:
    """Writes `<path>.json`, and what `render` makes of it beside that: tables and pictures need nothing else.

    Where README or a page of docs/ shows a table that was there before, it shows the new one afterwards.

    Args:
        path (`Path`): Folder and name, without an ending.
        result (`dict`): All that was measured, with the environment.
        render (`Callable`): Writes `<path>.md` and, for most, `<path>.png` from the result.
        quiet (`bool`, *optional*, defaults to `False`): Do not tell the names of the files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = named(path, ".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(named(path, ".json"))  # at once: what is cut off here leaves the one before
    table = named(path, ".md")
    before = table.read_text(encoding="utf-8") if table.is_file() else ""
    render(result, path)
    if before and path.parent.parent == RESULTS:
        _show_again(before, table.read_text(encoding="utf-8"))
    if quiet:
        return
    print(f"Written: {', '.join(sorted(str(file) for file in path.parent.glob(path.name + '.*')))}")


def _show_again(before: str, after: str) -> None:
    """Every table of a result, by itself, in the pages that show it."""
    tables = [re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) for text in (before, after)]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for old, new in zip(*tables, strict=False):
            text = text.replace(old, new)
        page.write_text(text, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The result that there is at a path as of `save`; without one, a result without rows."""
    file = named(path, ".json")
    return json.loads(file.read_text()) if file.is_file() else {"rows": []}


def save_new(path: Path, result: dict[str, Any], render: Callable[[dict[str, Any], Path], object]) -> None:
    """`save`, unless the result that there is tells the same, however long ago and wherever it was written."""
    there = read(path)
    told = json.loads(json.dumps(result)) | {"environment": there.get("environment")}
    if json.dumps(told, sort_keys=True) == json.dumps(there, sort_keys=True):
        print(f"Nothing new: {named(path, '.json')} stays as it is.")
    else:
        save(path, result, render)


def refuse_gone(path: Path, rows: list[dict[str, Any]], experiment: dict[str, Any]) -> None:
    """Of a result whose rows are of methods or tasks that the experiment does not have any more nothing is written."""
    kinds = [key for key in ("task", "method") if key + "s" in experiment]
    gone = [row[key] for key in kinds for row in rows if row[key] not in experiment[key + "s"]]
    if gone:
        raise SystemExit(
            f"{named(path, '.json')} has rows of {', '.join(dict.fromkeys(gone))}, which the experiment does not have "
            "any more: put that back, or move the result away to measure all again."
        )


def added(path: Path, result: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The result that there is, with these rows in the place of its own or after them; they say where they were made.

    Args:
        path (`Path`): As of `save`.
        result (`dict`): What was measured, with the environment. A row with an `environment` of its own keeps that.
        keys (`tuple[str, ...]`): The entries by which rows are told apart.
    """
    there = read(path)
    if not there["rows"]:
        return result
    untold = {key for key in ("data", "weights") if key not in there}  # by results of before these were noted
    result = {key: value for key, value in result.items() if key not in untold}
    told = {"environment", "rows", "title", "curves"}
    differing = [key for key in (there.keys() | result.keys()) - told if there.get(key) != result.get(key)]
    if differing:
        raise SystemExit(
            f"{named(path, '.json')} was measured with another {', '.join(sorted(differing))}: take that, or measure "
            "all again without adding."
        )
    rows = {tuple(row[key] for key in keys): row for row in there["rows"]}
    for row in result["rows"]:
        key, found = tuple(row[key] for key in keys), {"environment": result["environment"]} | row
        if found["environment"] == there["environment"]:
            del found["environment"]
        if key not in rows or _measured(rows[key]) != _measured(row):
            rows[key] = found
    return result | {"environment": there["environment"], "rows": list(rows.values())}


def _measured(row: dict[str, Any]) -> str:
    """What a row tells but for where it was made: what was found again was not made again."""
    return json.dumps({key: value for key, value in row.items() if key != "environment"}, sort_keys=True)


def named(path: Path, ending: str) -> Path:
    """The path with this at its end; unlike `with_suffix`, whatever dots the name has."""
    return path.with_name(path.name + ending)


def without_8bit(name: str) -> str:
    """An optimizer of ours in float32 where bitsandbytes is missing, and its name says so; else as it is."""
    return name if find_spec("bitsandbytes") else EIGHT_BIT.sub(r"\1", name)


def missing(error: ImportError) -> str:
    """What is not installed, as the reason why something is left out."""
    return f"{error.name} is not installed" if error.name else str(error)


def _card() -> dict[str, object]:
    card = torch.cuda.get_device_properties(0)
    return {"card": card.name, "card_bytes": card.total_memory, "cuda": torch.version.cuda}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/hf_osd")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load_experiment(name: str) -> dict[str, Any]:
    """experiments/<name>.json."""
    file = EXPERIMENTS / f"{name}.json"
    if not file.is_file():
        raise SystemExit(
            f"There is no {file}; known: {', '.join(sorted(f.stem for f in file.parent.glob('*.json')))}."
        )
    return json.loads(file.read_text())
