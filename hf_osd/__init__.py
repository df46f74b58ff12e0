"""Online Subspace Descent for the Hugging Face ecosystem.

Importing this package makes `osd_adamw`, `osd_adamw8bit`, `osd_lion`, `osd_lion8bit`, `osd_adafactor` and `osd_sgd`
known to transformers as values of `TrainingArguments(optim=...)`, and `rso_adamw` and `rso_adamw8bit` (`hf_osd.rso`).
"""

from .hub import ProjectionState
from .interop import extract_lora, init_lora_from_projection
from .optim import OSD, create_osd_optimizer
from .subspace import Movement, Start, SubspaceRule
from .trainer import OSDCallback, OSDTrainer, OSDTrainingArguments, last_complete_checkpoint, register
from .version import __version__


__all__ = [
    "OSD",
    "Movement",
    "OSDCallback",
    "OSDTrainer",
    "OSDTrainingArguments",
    "ProjectionState",
    "Start",
    "SubspaceRule",
    "__version__",
    "create_osd_optimizer",
    "extract_lora",
    "init_lora_from_projection",
    "last_complete_checkpoint",
]

register()
