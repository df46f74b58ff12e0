"""What an optimizer was asked for by whoever made it for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """What summaries and model cards tell beside the options that groups have. Nothing is trained by it."""

    preset: str | None = None  # its name
    init: str = "auto"  # where P starts from: a way, a repository or a folder
    target_modules: str | list[str] | None = None  # what to project
    exclude_modules: str | list[str] | None = None  # what not to
    lr_pattern: Mapping[str, float] = field(default_factory=dict)
    full_size_optim: str | None = None
    lr_ratios: Mapping[str, float] = field(default_factory=dict)  # by option, those that are not 1
