"""Which checkpoints of a run are complete, and which one a training has just written.

A run that was killed while saving must not resume from a torn checkpoint; P must not go into one of another run.
"""

import json
import os
import re
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in a run's `output_dir` that was written to its end, or `None`.

    Trainer writes `trainer_state.json` last, so a checkpoint in which it is missing or cut off is not complete.
    Nothing is deleted.

    Args:
        folder (`str`): The run's `output_dir`.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]
    for path in sorted(found, key=_step, reverse=True):
        if is_complete(path):
            return str(path)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether Trainer has written this checkpoint to its end."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def written_checkpoint(state: TrainerState) -> Path | None:
    """The checkpoint that this training has written at its current step, as `patches.py` notes it, or `None`."""
    folder: Path | None = getattr(state, "written_checkpoint", None)
    return folder if folder is not None and _step(folder) == state.global_step else None


def _step(path: Path) -> int:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
    return int(match.group(1)) if match else -1
