"""Which checkpoints of a run are complete, which one a training has just written, and whether one has been loaded.

A run that was killed while saving must not resume from a torn checkpoint; P must not go into one of another run.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..text import shortened


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


def load_converted(model: PreTrainedModel, checkpoint: str) -> Any:
    """Load weights that a checkpoint has in the Hub's layout: `from_pretrained` converts them back, Trainer does not.

    Returns:
        What `load_state_dict` gives.

    Raises:
        ValueError: If some of the model's weights are not there.
    """
    dtypes = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    read: Any = type(model).from_pretrained
    saved, told = read(checkpoint, dtype=dtype, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(f"{checkpoint} lacks {shortened(missing, 3)}: the run would go on with other weights.")
    return model.load_state_dict(saved.state_dict(), strict=False)


def _step(path: Path) -> int:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
    return int(match.group(1)) if match else -1
