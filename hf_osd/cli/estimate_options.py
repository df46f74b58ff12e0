"""Which optimizer of ours `hf-osd estimate` estimates, and with what options."""

import argparse
from typing import Any

import torch

from ..estimate import DTYPES
from ..optim import ALL_LINEAR, PRESETS, resolve
from ..optim.options.full_size import by_size
from ..optim.options.mode import LAYERWISE_SUFFIX, MODE_OPTIONS
from ..optim.options.presets import ARGUMENT_OF, KEYS, KEYWORDS, NAME_OPTIONS
from ..optim.options.table import OPTIONS
from ..optim.selection.targets import parse_modules
from ..trainer.optim_args import keys_of, parse_optim_args


DEFAULT_OPTIM = "osd_adamw8bit"
USUAL_PRESET = "finetune"  # README.md, docs/choosing.md
BFLOAT16 = {name for name, dtype in DTYPES.items() if dtype is torch.bfloat16}
# Of `optim_args`, what has an option of its own here, or nothing to do with memory.
NOT_HERE = {
    **{own.key: "it takes no memory" for own in (*MODE_OPTIONS.values(), OPTIONS["init"], OPTIONS["seed"])},
    **{key: f"use --{key}" for key in ("rank", "target_modules", "exclude_modules")},
    "divide_projection": "--processes tells both",
}


def estimated_optimizer(arguments: argparse.Namespace) -> tuple[str, bool, dict[str, Any]]:
    """Our optimizer's name without `_layerwise`, whether it is, and options of `create_osd_optimizer`.

    All options are in `--optim_args` afterwards.
    """
    for key in sorted(keys_of(arguments.optim_args) & NOT_HERE.keys()):
        raise ValueError(f"{key!r} has no effect in --optim_args of an estimate: {NOT_HERE[key]}.")
    optim = _take_preset(arguments)
    usual = _usual(optim, arguments)
    arguments.optim_args = ",".join(filter(None, [*usual, arguments.optim_args]))
    given = parse_optim_args(arguments.optim_args)
    settings = resolve(optim, _of_groups(given), given.get("preset"), "--optim_args")
    by_size(settings, given.get("full_size_optim"), "--optim_args", ARGUMENT_OF)  # which refuses
    keywords = {own.key: keyword for keyword, own in KEYWORDS.items()}
    options: dict[str, Any] = {keywords[key]: value for key, value in given.items()}
    options["target_modules"] = _modules(arguments.target_modules or [ALL_LINEAR])
    options["exclude_modules"] = _modules(arguments.exclude_modules) if arguments.exclude_modules else None
    layerwise = arguments.layerwise or optim.endswith(LAYERWISE_SUFFIX)
    return optim.removesuffix(LAYERWISE_SUFFIX), layerwise, options


def _modules(words: list[str]) -> Any:
    return parse_modules(words[0] if len(words) == 1 else words)


def _take_preset(arguments: argparse.Namespace) -> str:
    """Put `--preset` into `--optim_args`, and return the optimizer's name, which `--preset` also was once."""
    preset, optim = arguments.preset, arguments.optim
    if optim is None and preset is not None and preset.startswith(("osd", "rso")):
        preset, optim = None, preset
    if preset is not None:
        if complaint := NAME_OPTIONS["preset"].check.complaint(preset):
            raise ValueError(f"--preset must be {complaint}, got {preset!r}.")
        arguments.optim_args = ",".join(filter(None, [f"preset={preset}", arguments.optim_args]))
    return optim or DEFAULT_OPTIM


def _usual(optim: str, arguments: argparse.Namespace) -> list[str]:
    """What a run should have beside the options that were given, as README and docs have it.

    A preset, where the options neither have one nor set any of what it sets, and it goes with them; without its
    residual where weights are in 8 bits, to save memory. And steps that bfloat16 does not round away.
    """
    given, usual = parse_optim_args(arguments.optim_args), []
    if "adamw" in optim and not {"preset", *PRESETS[USUAL_PRESET].settings} & given.keys():
        lean = "weight_dtype" in given and "residual_sample" not in given
        residual = {"residual": "none"} if lean else {}
        if _goes_with(optim, {**given, **residual}):
            usual = [f"preset={USUAL_PRESET}", *(f"{key}={value}" for key, value in residual.items())]
    if arguments.dtype in BFLOAT16 and "stochastic_rounding" not in given:
        usual.append("stochastic_rounding=true")
    return usual


def _goes_with(optim: str, given: dict[str, Any]) -> bool:
    """Whether the usual preset does."""
    try:
        resolve(optim, _of_groups(given), USUAL_PRESET, "--optim_args")
    except ValueError:
        return False
    return True


def _of_groups(given: dict[str, Any]) -> dict[str, Any]:
    """Options by their names in groups, those that groups have."""
    return {KEYS[key].name: value for key, value in given.items() if key not in NAME_OPTIONS}
