"""What each `preset` sets, and where that was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .table import DEFAULTS, OPTIONS


@dataclass(frozen=True)
class Preset:
    """Options that replace the defaults; options given beside it win over it.

    Attributes:
        help (`str`): What it is for.
        settings (`dict`):
            Option -> its value, and where that comes from: results of an experiment of `examples/benchmarks`, or a
            publication.
    """

    help: str
    settings: Mapping[str, tuple[Any, str]]

    @property
    def options(self) -> dict[str, Any]:
        """The values of a group's options."""
        return {name: value for name, (value, _) in self.settings.items() if name in OPTIONS}

    @property
    def of_name(self) -> dict[str, Any]:
        """The values of what groups do not have, but a run does."""
        return {name: value for name, (value, _) in self.settings.items() if name not in OPTIONS}


PUBLISHED = "the paper's code"
PRESETS: dict[str, Preset] = {
    "reference": Preset(
        "the settings of the paper's published code, which differ from its text",
        {
            # P is stepped by AdamW with its own decay, and a learning rate that follows the schedule but not the
            # learning rate; without an orthogonality term
            "projection_rule": ("adamw", PUBLISHED),
            "projection_lr": (0.005, PUBLISHED),
            "lambda_": (0.0, PUBLISHED),
            "projection_weight_decay": (0.01, PUBLISHED),
            "projection_sample": (1, PUBLISHED),
            "scale": (0.25, PUBLISHED),
        },
    ),
    "finetune": Preset(
        "fine-tuning at AdamW's learning rates",
        {
            "scale": ("auto", "glue_presets"),
            "residual": ("sign", "glue_presets"),
            "residual_scale": (1.0, "glue_presets"),
            "task_head_lr_ratio": (64.0, "glue_presets"),
        },
    ),
    "pretrain": Preset(
        "training from scratch at AdamW's learning rates",
        {
            "scale": ("auto", "pretrain_presets_text"),
            "residual": ("sign", "pretrain_presets_text"),
            "residual_scale": (1.0, "pretrain_presets_text"),
            "embedding_lr_ratio": (16.0, "pretrain_presets_text"),
        },
    ),
}


def options_of_preset(preset: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a preset sets beside the options that were given.

    Args:
        preset (`str`): A key of `PRESETS`.
        given (`dict`): Options by their names in groups, those that the user gave and the name's own.
        where (`str`): What an error message calls the place where they were given.

    Raises:
        ValueError: For one that has no effect with what was given.
    """
    whole = PRESETS[preset].options
    own = {name: value for name, value in whole.items() if name not in given}
    if own.get("scale") == "auto" and given["weight_rule"] == "sgd":
        raise ValueError(f"preset={preset!r} of {where} is for steps of AdamW's size, not for SGD's. Leave it out.")
    if own.get("scale") == "auto" and given.get("unbiased"):
        raise ValueError(
            f"preset={preset!r} of {where} sets `scale` to 'auto', for P with columns of length 1: `unbiased` "
            "makes them longer. Give another scale beside it."
        )
    if "alpha" in given:  # both set P's learning rate; the user's word counts
        own.pop("projection_lr", None)
    others = {**DEFAULTS, **whole, **{name: value for name, value in given.items() if name not in whole}}
    for name in own:
        need = OPTIONS[name].unmet(others)
        if need is not None:
            without = need.without if isinstance(need.without, str) else need.without(others)
            way_out = f", or give {OPTIONS[name].key}={DEFAULTS[name]} beside it"
            if DEFAULTS[name] is None:  # which is not to be given
                rest = (f"{OPTIONS[one].key}={own[one]}" for one in own if OPTIONS[one].unmet(others) is None)
                way_out = f" and give what else it sets: {','.join(rest) or 'nothing'}"
            raise ValueError(
                f"preset={preset!r} of {where} sets `{OPTIONS[name].key}`, which has no effect {without}. Leave the "
                f"preset out{way_out}."
            )
    # what needs an option of the preset that the user has given another value, such as the scale of no residual
    return {name: value for name, value in own.items() if OPTIONS[name].unmet({**others, **given}) is None}
