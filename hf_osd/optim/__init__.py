"""The optimizer, its options, and how a model becomes parameter groups."""

from .factory import DEFAULT_RANK, create_osd_optimizer, osd_kwargs
from .memory import adamw_state_bytes, held_gradient_bytes, predicted_state_bytes, state_bytes
from .options.presets import OPTIM_NAMES, PRESETS, resolve
from .osd import OSD
from .selection.targets import ALL_LINEAR, Selection, select


__all__ = [
    "ALL_LINEAR",
    "DEFAULT_RANK",
    "OPTIM_NAMES",
    "OSD",
    "PRESETS",
    "Selection",
    "adamw_state_bytes",
    "create_osd_optimizer",
    "held_gradient_bytes",
    "osd_kwargs",
    "predicted_state_bytes",
    "resolve",
    "select",
    "state_bytes",
]
