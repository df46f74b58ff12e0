"""The options of a run whose parameters at full size have an update rule of their own."""

from collections.abc import Mapping
from typing import Any

from ...declare import check_values
from .presets import NAME_OPTIONS
from .table import OPTIONS, PROJECTED, validate


RULE = "full_size_optim"


def by_size(
    options: Mapping[str, Any], rule: str | None, where: str, names: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run, and what its groups at full size have instead: each what its rules use.

    Args:
        options (`dict`): All options of the run, complete.
        rule (`str`, *optional*): Update rule at full size; defaults to that of the projected weights.
        where, names: As of [`~optim.options.table.validate`].

    Raises:
        ValueError: For an option that is wrong, or that neither of them uses.
    """
    check_values({RULE: NAME_OPTIONS[RULE]}, {RULE: rule}, where)
    if rule is None:
        validate(options, where, names)
        return dict(options), {}
    whole = {**options, "weight_rule": rule, "projection_rule": None, "rank": None}
    shared = {name: own for name, own in OPTIONS.items() if name not in PROJECTED}
    unused = [{name for name, own in shared.items() if own.unmet(group) is not None} for group in (options, whole)]
    ours = {**options, **{name: shared[name].default for name in unused[0] - unused[1]}}
    validate(ours, where, names)
    own = {name: shared[name].default if name in unused[1] else options[name] for name in shared}
    return ours, {"weight_rule": rule} | {name: value for name, value in own.items() if value != ours[name]}
