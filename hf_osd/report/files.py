"""Reading what a run left with distrust: what cannot be read is `None` and a sentence, without a place on the disk."""

import json
import os
from pathlib import Path
from typing import Any


MAX_BYTES = 500_000_000


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file with Trainer's NaN and infinities; an empty one for none or a broken one."""
    try:
        if not os.path.lexists(path):
            return {}
        if path.stat().st_size > MAX_BYTES or not path.is_file():
            raise ValueError(f"it is no file of at most {MAX_BYTES // 10**6} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(unreadable(path, error))
        return {}
    return value


def unreadable(path: Path, error: Exception) -> str:
    """The sentence about a file that cannot be read."""
    return f"{path.parent.name}/{path.name} cannot be read: {reason(error)}."


def reason(error: Exception) -> str:
    """What an exception says, without the path that the system's have."""
    text = error.strerror if isinstance(error, OSError) else None
    return (text or str(error) or type(error).__name__).rstrip(".")
