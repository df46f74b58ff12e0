"""The optimizer's name in a run's arguments, and `optim_args`: its options in one text, `rank=128,alpha=5`."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..declare import Check, Option, refuse_unknown
from ..optim.options.mode import MODE_OPTIONS
from ..optim.options.presets import KEYS
from ..optim.options.table import OPTIONS


# What users may look for in `optim_args` and an argument of Trainer's sets: that is the one place.
TRAINER_FIELDS: dict[str, str] = {
    own.key: own.argument for own in (OPTIONS | MODE_OPTIONS).values() if own.argument is not None
}
TRAINER_FIELDS |= {"lr": "learning_rate", "learning_rate": "learning_rate", "target_modules": "optim_target_modules"}
TRAINER_FIELDS |= {"beta1": "adam_beta1", "beta2": "adam_beta2", "exclude_modules": "osd_exclude_modules"}


def optim_name(args: TrainingArguments) -> str:
    """`args.optim` as a plain string: it is an enum member, a string after unpickling, or in other classes absent."""
    optim = getattr(args, "optim", "")
    return str(getattr(optim, "value", optim))


def parse_optim_args(
    text: str | None, keys: Mapping[str, Option] = KEYS, where: str = "`optim_args`"
) -> dict[str, Any]:
    """`"rank=128,alpha=5"` as typed values by key; `ValueError` for anything else than these options."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where} must be a text, key=value,key=value, got {type(text).__name__}.")
    values: dict[str, Any] = {}
    for entry in text.split(",") if text else ():
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key or not value or "=" in value:
            raise ValueError(
                f"{where} must read key=value,key=value, got {entry.strip()!r} in {text!r}. {_remedy(entry, keys)}"
            )
        if key in TRAINER_FIELDS and key not in keys:  # SubZero's `eps` is its own
            raise ValueError(f"Set `{TRAINER_FIELDS[key]}` of the training arguments instead of {key!r} in {where}.")
        refuse_unknown([key], keys, where)
        if key in values:
            raise ValueError(f"{key!r} is given twice in {where}: {text!r}.")
        values[key] = typed(value, keys[key].check, f"{key!r} in {where}")
    return values


def _remedy(entry: str, keys: Mapping[str, Option]) -> str:
    """What to do about an entry that is no key=value."""
    key, _, value = (part.strip() for part in entry.partition("="))
    if not entry.strip():
        return "Leave out the comma that has nothing beside it."
    if key in keys and not value:
        return f"Give it a value{f': {key}=true' if keys[key].check.kind is bool else ''}, or leave it out."
    if entry.lstrip().startswith("{"):
        return "It is not JSON."
    return "A value with `,` or `=` goes into a field of OSDTrainingArguments, such as `osd_init`."


def keys_of(text: object) -> set[str]:
    """The keys of another optimizer's `optim_args`, whatever else is in there."""
    return {entry.partition("=")[0].strip() for entry in text.split(",")} if isinstance(text, str) else set()


def typed(value: Any, check: Check | None, where: str) -> Any:
    """What a text stands for, as YAML gives `1e-3`; anything else as it is, and of retired options."""
    if not isinstance(value, str) or check is None or value in check.names:
        return value
    wanted = check.kind
    kind = {int: "an integer", float: "a number", bool: "true or false"}.get(wanted, "")
    try:
        if wanted is bool:
            return {"true": True, "false": False}[value.lower()]
        return wanted(value)
    except (ValueError, KeyError):
        names = "".join(f", or {name}" for name in check.names)
        raise ValueError(f"{where} must be {kind}{names}, got {value!r}.") from None
