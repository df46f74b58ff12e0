"""The names that users choose, and what each stands for."""

import difflib
from collections.abc import Mapping
from typing import Any

from ...subspace import is_rule, rule_class
from .mode import LAYERWISE_SUFFIX
from .table import DEFAULTS, RULES, refuse_unknown


# `optim` name -> rule of the weights. P moves by the same rule unless `projection_optim` names another
# (paper, Algorithm 1 and Table 6), in the subspace that `subspace` names.
OPTIM_NAMES: dict[str, str] = {f"osd_{rule}": rule for rule in RULES}
OPTIM_NAMES |= {name + LAYERWISE_SUFFIX: rule for name, rule in OPTIM_NAMES.items()}

# `preset` -> options that replace the defaults; options given beside it win over it.
PRESETS: dict[str, dict[str, Any]] = {
    # The settings of the paper's published code, which differ from its text: no orthogonality term, P stepped by
    # AdamW with its own decay and a learning rate that follows the schedule but not the learning rate, scale 1/4.
    "reference": {
        "projection_rule": "adamw",
        "projection_lr": 0.005,
        "lambda_": 0.0,
        "projection_weight_decay": 0.01,
        "scale": 0.25,
    },
}


def resolve(name: str, given: Mapping[str, Any], preset: str | None, where: str) -> dict[str, Any]:
    """All options for an `optim` name: defaults, then the preset, then what was given.

    Args:
        name (`str`): A key of `OPTIM_NAMES`.
        given (`dict`): Options by their names in `Options`, those that the user gave and no others.
        preset (`str`, *optional*): A key of `PRESETS`.
        where (`str`): What an error message calls the place where they were given.

    Returns:
        `dict`: Every option of `Options`.
    """
    if name not in OPTIM_NAMES:
        close = difflib.get_close_matches(name, OPTIM_NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown optimizer {name!r}.{hint} Known: {', '.join(OPTIM_NAMES)}.")
    refuse_unknown(given, DEFAULTS.keys() - {"weight_rule"}, where)
    settings = dict(PRESETS[_known_preset(preset)]) if preset else {}
    subspace = given.get("subspace", DEFAULTS["subspace"])
    if settings and is_rule(subspace) and not rule_class(subspace).learns:
        raise ValueError(
            f"preset={preset!r} is about how P is learned: it cannot be combined with subspace={subspace!r}."
        )
    if "alpha" in given:  # both set P's learning rate; the user's word counts
        settings.pop("projection_lr", None)
    return {**DEFAULTS, **settings, **given, "weight_rule": OPTIM_NAMES[name]}


def _known_preset(preset: str) -> str:
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}. Known: {', '.join(PRESETS)}.")
    return preset
