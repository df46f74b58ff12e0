"""Online Subspace Descent for the Hugging Face ecosystem.

Importing this package makes `osd_adamw`, `osd_adamw8bit`, `osd_lion`, `osd_lion8bit`, `osd_adafactor`, `osd_sgd`,
`rso_adamw`, `rso_adamw8bit` and `subzero` known to transformers as values of `TrainingArguments(optim=...)`: at once
where transformers' Trainer is imported already, else together with it (`startup.py`). Nothing else is imported before
it is used, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .startup import register_in_time
from .version import __version__


if TYPE_CHECKING:
    from .hub import ProjectionState
    from .interop import extract_lora, init_lora_from_projection
    from .layers import unload
    from .optim import OSD, create_osd_optimizer
    from .subspace import Movement, Start, SubspaceRule
    from .subzero import SubZero
    from .trainer import OSDCallback, OSDTrainer, OSDTrainingArguments, last_complete_checkpoint, register

__all__ = [
    "OSD",
    "Movement",
    "OSDCallback",
    "OSDTrainer",
    "OSDTrainingArguments",
    "ProjectionState",
    "Start",
    "SubZero",
    "SubspaceRule",
    "__version__",
    "create_osd_optimizer",
    "extract_lora",
    "init_lora_from_projection",
    "last_complete_checkpoint",
    "register",
    "unload",
]

# Name -> the package that has it, as above for type checkers.
_HOMES = {
    "ProjectionState": "hub",
    **dict.fromkeys(("extract_lora", "init_lora_from_projection"), "interop"),
    "unload": "layers",
    **dict.fromkeys(("OSD", "create_osd_optimizer"), "optim"),
    **dict.fromkeys(("Movement", "Start", "SubspaceRule"), "subspace"),
    "SubZero": "subzero",
    **dict.fromkeys(("OSDCallback", "OSDTrainer", "OSDTrainingArguments"), "trainer"),
    **dict.fromkeys(("last_complete_checkpoint", "register"), "trainer"),
}
_PACKAGES = (
    "estimate",
    "hub",
    "interop",
    "layers",
    "optim",
    "report",
    "subspace",
    "subzero",
    "trainer",
    "update_rules",
)

if not TYPE_CHECKING:  # a type checker that saw it would take any name for ours

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES, *_PACKAGES})


register_in_time()
