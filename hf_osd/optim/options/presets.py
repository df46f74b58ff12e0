"""The names that users choose, what each stands for, and the keys that go with them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, NamedTuple

from ...declare import Check, Option, check_values, number, one_of, option, options_of, refuse_unknown
from .general import DEFAULT_RANK, names_in_code
from .mode import LAYERWISE_SUFFIX, MODE_OPTIONS
from .preset_table import PRESETS, options_of_preset
from .table import DEFAULTS, OPTIONS, RULES


# `optim` name -> rule of the weights. P moves by the same rule unless `projection_optim` names another
# (paper, Algorithm 1 and Table 6), in the subspace that `subspace` names.
OPTIM_NAMES: dict[str, str] = {f"osd_{rule}": rule for rule in RULES}
OPTIM_NAMES |= {name + LAYERWISE_SUFFIX: rule for name, rule in OPTIM_NAMES.items()}
RSO_NAMES = {"rso_adamw": "adamw", "rso_adamw8bit": "adamw8bit"}
OPTIM_NAMES |= RSO_NAMES

# Randomized Subspace Optimization (arXiv 2502.07222) trains B of W + B Pᵀ from B = 0 on, and makes W + B Pᵀ the next W
# before it draws the next P. With one P it is the same to do so at every step.
RSO: dict[str, Any] = {"source": "activations", "subspace": "random", "unbiased": True, "restart_moments": True}
RSO_DEFAULTS = {"distribution": "gaussian"}


@dataclass(frozen=True)
class NameOptions:
    """What the names take beside the options of groups and of the mode."""

    rank_pattern: str | Mapping[str, int] | None = option(
        None,
        "Other ranks for some modules, as peft's, by regular expressions for the end of their names, or of their "
        "parameters', of which the first that matches counts: `q_proj:64;layers.0.mlp.*:32`.",
        check=Check("modules and their ranks", lambda value: isinstance(value, (str, Mapping)), str),
    )
    lr_pattern: str | Mapping[str, float] | None = option(
        None,
        "Multiples of the learning rate for some modules, projected or not, in the same form: "
        "`embed_tokens|lm_head:4;layers.0.*:0.5`.",
        check=Check(
            "modules and multiples of the learning rate", lambda value: isinstance(value, (str, Mapping)), str
        ),
    )
    full_size_optim: str | None = option(
        None,
        f"Update rule of what is not projected: {names_in_code(RULES)}.",
        check=one_of(RULES),
        unset="the weights' own",
    )
    embedding_lr_ratio: float | None = option(
        None,
        "Learning rate of embeddings and output heads over that of the rest, where `lr_pattern` names no other. Not "
        "of those that are projected.",
        check=number(0, open_below=True),
        unset="1",
    )
    task_head_lr_ratio: float | None = option(
        None,
        "The same of the layer that gives out a task's classes or values (`classifier`, `score`, `qa_outputs`), which "
        "a pretrained model does not have yet.",
        check=number(0, open_below=True),
        unset="1",
    )
    preset: str | None = option(
        None,
        "; ".join(f"`{name}`: {preset.help}" for name, preset in PRESETS.items())
        + ". What is given beside it wins over it.",
        check=one_of(PRESETS),
    )


NAME_OPTIONS: dict[str, Option] = options_of(NameOptions)
# Public name -> option: keys of `optim_args`, and with the prefix `osd_` fields of `OSDTrainingArguments`.
KEYS: dict[str, Option] = {
    own.key: own for own in (OPTIONS | MODE_OPTIONS | NAME_OPTIONS).values() if own.argument is None
}


# What the names themselves say.
BY_NAME: dict[str, Option] = {
    own.key: own for own in (OPTIONS | MODE_OPTIONS).values() if (own.argument or "").startswith("optim=")
}
# Keyword arguments of `create_osd_optimizer`: the keys, and what a Trainer's own arguments would say.
KEYWORDS: dict[str, Option] = {
    f"{own.key}_" if iskeyword(own.key) else own.key: own
    for own in (OPTIONS | MODE_OPTIONS | NAME_OPTIONS).values()
    if own not in BY_NAME.values()
}
# Option -> what it is called in `create_osd_optimizer`, and in a Trainer's arguments.
KEYWORD_OF = {own.name: keyword for keyword, own in KEYWORDS.items()}
ARGUMENT_OF = {own.name: own.argument or own.key for own in OPTIONS.values()}


class Ratio(NamedTuple):
    """The learning rate of a kind of parameters over that of the rest."""

    value: float
    required: bool  # whether a model must have such parameters
    preset: str | None = None  # which has set it, if nobody else has


LR_RATIOS = ("embedding_lr_ratio", "task_head_lr_ratio")
# Those that a preset sets for the models that have such parameters, and for no others.
WHERE_THERE_IS_ONE = frozenset({"task_head_lr_ratio"})


def lr_ratios(given: dict[str, Any], preset: str | None, where: str) -> dict[str, Ratio]:
    """Take the `LR_RATIOS` out of what was given; what is not is the preset's. Those that are 1 are left out.

    Args:
        given (`dict`): Options by name, those that the user gave. Changed in place.
        preset (`str`, *optional*): As of `resolve`, which refuses others.
        where (`str`): What an error message calls the place where they were given.
    """
    own = {name: value for name in LR_RATIOS if (value := given.pop(name, None)) is not None}
    check_values({name: NAME_OPTIONS[name] for name in own}, own, where)
    usual = PRESETS[preset].of_name if preset in PRESETS else {}
    values = {name: float(own.get(name, usual.get(name, 1))) for name in LR_RATIOS}
    return {
        name: Ratio(value, name in own or name not in WHERE_THERE_IS_ONE, None if name in own else preset)
        for name, value in values.items()
        if value != 1
    }


def resolve(name: str, given: Mapping[str, Any], preset: str | None, where: str) -> dict[str, Any]:
    """All options for an `optim` name: defaults, then the preset, then what was given.

    Args:
        name (`str`): A key of `OPTIM_NAMES`.
        given (`dict`): Options by their names in groups, those that the user gave and no others.
        preset (`str`, *optional*): A key of [`~optim.options.preset_table.PRESETS`].
        where (`str`): What an error message calls the place where they were given.

    Returns:
        `dict`: Every option of a group.
    """
    if name not in OPTIM_NAMES:
        known = [other for other in OPTIM_NAMES if (other in RSO_NAMES) == name.startswith("rso")]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if name == "subzero":
            hint = " In a loop of your own it is hf_osd.SubZero(model, lr=1e-6)."
        raise ValueError(f"Unknown optimizer {name!r}.{hint} Known: {', '.join(OPTIM_NAMES)}.")
    refuse_unknown(given, DEFAULTS.keys() - {"weight_rule"}, where)
    check_values({"preset": NAME_OPTIONS["preset"]}, {"preset": preset}, where)
    if preset and name in RSO_NAMES:
        raise ValueError(f"preset={preset!r} is for the `osd_` names, not for optim={name!r}: leave it out.")
    if name in RSO_NAMES:
        for key in RSO.keys() & given.keys():
            if given[key] != RSO[key]:
                raise ValueError(
                    f"{key}={given[key]!r} of {where} contradicts optim={name!r}, whose {key} is {RSO[key]!r}. Leave "
                    f"it out, or choose optim={name.replace('rso', 'osd')!r}."
                )
        given = RSO_DEFAULTS | RSO | dict(given)
    complete = {"rank": DEFAULT_RANK, **given, "weight_rule": OPTIM_NAMES[name]}
    settings = options_of_preset(preset, complete, where) if preset else {}
    return {**DEFAULTS, **settings, **complete}
