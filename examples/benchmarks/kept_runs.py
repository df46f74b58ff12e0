"""Folders of runs: each tells the command that it was made by and keeps what that gave; no other writes into it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any


NOTE = "command.json"


def claim(folder: Path, command: list[str], note: str = NOTE) -> None:
    """Makes the folder of a run, or leaves the one that it has.

    Args:
        folder (`Path`): Of the run.
        command (`list[str]`): All arguments of the script, or all but its output folder.
        note (`str`, *optional*, defaults to `"command.json"`): The file in the folder that tells them.

    Raises:
        SystemExit: If there is something of another command in it.
    """
    if _tells(folder, command, note):
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} does not tell which command it is of: delete it, or give another --work_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{note}.unfinished"
    unfinished.write_text(json.dumps(command))
    os.replace(unfinished, folder / note)  # whole, or not at all


def finished(folder: Path, command: list[str], note: str = NOTE) -> dict[str, Any] | None:
    """The results.json of a run, or `None` where it has not finished; arguments and refusal are those of `claim`."""
    results = folder / "results.json"
    return json.loads(results.read_text()) if _tells(folder, command, note) and results.is_file() else None


def _tells(folder: Path, command: list[str], note: str) -> bool:
    """Whether a folder tells this command; `False` where it tells none."""
    if not (folder / note).is_file() or not (folder / note).stat().st_size:  # or was broken off there
        return False
    there, asked = _from_work_dir(json.loads((folder / note).read_text())), _from_work_dir(command)
    if there == asked:
        return True
    theirs, ours = Counter(there) - Counter(asked), Counter(asked) - Counter(there)
    raise SystemExit(
        f"{folder} is of another command: delete it, or give another --work_dir. "
        f"Only it has: {' '.join(theirs.elements()) or '-'}; only this one: {' '.join(ours.elements()) or '-'}."
    )


def _from_work_dir(command: list[str]) -> list[str]:
    """With what lies in the folder of all runs told from there: that may have been moved, or be written otherwise."""
    if "--output_dir" not in command:
        return command
    work_dir = Path(command[command.index("--output_dir") + 1]).parent
    return [str(Path(word).relative_to(work_dir)) if work_dir in Path(word).parents else word for word in command]
