"""Bytes of a run by part: what its newest checkpoint holds, and what was measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optim.step.state import P_ENTRIES
from ..trainer.statistics_file import number


WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)")
OPTIMIZER_NAME = "optimizer.pt"
PARTS = ("weights", "moments", "projections P", "moments of P", "optimizer state")  # in the order of the bars


@dataclass
class Memory:
    """What is known.

    Attributes:
        parts (`dict[str, int]`): Bytes by part, in the order of `PARTS`.
        adamw_state (`int`, *optional*): What AdamW's state would take.
        peak (`int`, *optional*): The peak that `results.json` tells.
    """

    parts: dict[str, int] = field(default_factory=dict)
    adamw_state: int | None = None
    peak: int | None = None

    @property
    def state(self) -> int | None:
        """The optimizer's state."""
        sizes = [size for part, size in self.parts.items() if part != "weights"]
        return sum(sizes) if sizes else None

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def read_memory(folders: Sequence[Path], recorded: Mapping[str, Any], notes: list[str]) -> Memory:
    """Weights and optimizer state as the newest of `folders` holds them, the state by its tensors' names.

    `recorded` are bytes that the run itself has written down, under names that end in `_bytes`.
    """
    parts: dict[str, int] = {}
    for folder in reversed(folders):
        files = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.is_file()]
        weights = sum(path.stat().st_size for path in files)
        if weights and "weights" not in parts:
            parts["weights"] = weights
        if (folder / OPTIMIZER_NAME).is_file() and len(parts) <= ("weights" in parts):
            parts |= _state_parts(folder / OPTIMIZER_NAME)
    values = {key: number(recorded.get(f"{key}_bytes")) for key in ("optimizer_state", "adamw_state", "peak_memory")}
    known = {key: int(value) for key, value in values.items() if value is not None and value > 0}
    if len(parts) <= ("weights" in parts):
        if "optimizer_state" in known:
            parts["optimizer state"] = known["optimizer_state"]
        else:
            notes.append(f"The optimizer's memory is not known: no checkpoint with {OPTIMIZER_NAME}.")
    ordered = {part: parts[part] for part in PARTS if parts.get(part)}
    return Memory(ordered, known.get("adamw_state"), known.get("peak_memory"))


def _state_parts(path: Path) -> dict[str, int]:
    """Bytes of the tensors in a saved optimizer; of the whole file where it holds more than tensors (GaLore's)."""
    import torch

    try:
        # neither unpickles classes nor reads the tensors
        saved = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        parts: dict[str, int] = {}
        for state in saved["state"].values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    part = _part(name)
                    parts[part] = parts.get(part, 0) + value.nbytes
        return parts
    except Exception:  # of the many kinds that a damaged or foreign file raises
        return {"optimizer state": path.stat().st_size}


def _part(name: str) -> str:
    if name in P_ENTRIES:
        return "projections P"
    return "moments of P" if str(name).startswith("projection_") else "moments"
