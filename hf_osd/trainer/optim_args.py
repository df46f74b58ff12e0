"""From training arguments to options, strictly: one reading of `optim_args`, `osd_*` fields and Trainer's own."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from transformers import TrainingArguments

from ..names import RSO_NAMES
from ..optim import ALL_LINEAR, OPTIM_NAMES, resolve
from ..optim.options.mode import MODE_DEFAULTS, Mode, mode_of
from ..optim.options.table import projection_rule, refuse_unknown, validate
from ..optim.selection.rank_pattern import parse_rank_pattern
from ..update_rules import rule_options
from .engines import refuse_flat_engines
from .gradient_norm import CAN_LEAVE_CLIPPING


class Setting(NamedTuple):
    """One key of `optim_args`: the option that it sets and its type."""

    option: str
    type: type[int] | type[float] | type[str] | type[bool]


# Keys of `optim_args`. With the prefix `osd_` they are the fields of `OSDTrainingArguments`.
SETTINGS: dict[str, Setting] = {
    "rank": Setting("rank", int),
    "rank_pattern": Setting("rank_pattern", str),
    "alpha": Setting("alpha", float),
    "lambda": Setting("lambda_", float),
    "scale": Setting("scale", float),
    "projection_optim": Setting("projection_rule", str),
    "subspace": Setting("subspace", str),
    "init": Setting("init", str),
    "side": Setting("side", str),
    "projection_lr": Setting("projection_lr", float),
    "projection_schedule": Setting("projection_schedule", str),
    "projection_weight_decay": Setting("projection_weight_decay", float),
    "projection_dtype": Setting("projection_dtype", str),
    "moment_dtype": Setting("moment_dtype", str),
    "update_interval": Setting("update_interval", int),
    "projection_interval": Setting("projection_interval", int),
    "distribution": Setting("distribution", str),
    "mixing": Setting("mixing", float),
    "carry_moments": Setting("carry_moments", bool),
    "residual": Setting("residual", str),
    "residual_scaling": Setting("residual_scaling", str),
    "residual_limit": Setting("residual_limit", float),
    "residual_scale": Setting("residual_scale", float),
    "momentum": Setting("momentum", float),
    "stochastic_rounding": Setting("stochastic_rounding", bool),
    "seed": Setting("seed", int),
    "preset": Setting("preset", str),
    "partial_load": Setting("partial_load", bool),
    "layerwise": Setting("layerwise", bool),
    "layerwise_clipping": Setting("layerwise_clipping", str),
    "ddp_compression": Setting("ddp_compression", str),
}

# Options with a field of their own in TrainingArguments: that is the one place to set them.
TRAINER_FIELDS = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "target_modules": "optim_target_modules",
}

# Optimizers of transformers that never look at `optim_args`.
WITHOUT_OPTIM_ARGS = frozenset(
    {"adamw_torch", "adamw_torch_fused", "adafactor", "adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit"}
    | {"paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"}
)


class OSDSettings(NamedTuple):
    """What a run's arguments ask of the optimizer."""

    options: dict[str, Any]
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    partial_load: bool
    rank_pattern: dict[str, int]
    mode: dict[str, Any]


def optim_name(args: TrainingArguments) -> str:
    """`args.optim` as a plain string: it is an enum member, or a string after unpickling."""
    return str(getattr(args.optim, "value", args.optim))


def uses_osd(args: TrainingArguments) -> bool:
    """Whether the run's optimizer is one of ours."""
    return optim_name(args) in OPTIM_NAMES


def parse_optim_args(text: str | None, settings: Mapping[str, Setting] = SETTINGS) -> dict[str, Any]:
    """`"rank=128,alpha=5"` as typed values by key; `ValueError` for anything else than these `settings`."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`optim_args` must be a text, key=value,key=value, got {type(text).__name__}.")
    values: dict[str, Any] = {}
    for entry in text.split(",") if text else ():
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key or not value or "=" in value:
            raise ValueError(f"`optim_args` must read key=value,key=value, got {entry.strip()!r} in {text!r}.")
        if key in TRAINER_FIELDS:
            raise ValueError(
                f"Set `{TRAINER_FIELDS[key]}` of the training arguments instead of {key!r} in `optim_args`."
            )
        refuse_unknown([key], settings, "`optim_args`")
        if key in values:
            raise ValueError(f"{key!r} is given twice in `optim_args`: {text!r}.")
        values[key] = _convert(key, value, settings[key].type)
    return values


def read_settings(args: TrainingArguments) -> OSDSettings:
    """All options of a run with an `osd_` optimizer, complete and validated.

    Raises:
        ValueError: For unknown keys, wrong types and ranges, options given twice, and options without effect.
    """
    given = parse_optim_args(args.optim_args)
    for key, value in _fields(args).items():
        if key in given:
            raise ValueError(f"{key!r} is given twice: in `optim_args` and as `osd_{key}`.")
        given[key] = value
    preset, partial_load = given.pop("preset", None), given.pop("partial_load", False)
    rank_pattern = parse_rank_pattern(given.pop("rank_pattern", None))
    mode = _mode(args, {name: given.pop(name) for name in MODE_DEFAULTS if name in given})
    given.setdefault("seed", args.seed)
    where = "the training arguments"
    options = {SETTINGS[key].option: value for key, value in given.items()} | {"weight_decay": args.weight_decay}
    resolved = resolve(optim_name(args), options, preset, where)
    rank = 1 if resolved["rank"] is None else resolved["rank"]  # the default comes with the model
    init = "auto" if _is_repository(resolved["init"]) else resolved["init"]
    validate(resolved | {"rank": rank, "init": init}, where)
    resolved |= _adam_fields(args, resolved)
    validate(resolved | {"rank": rank, "init": init}, where)
    return OSDSettings(resolved, *target_modules_of(args), partial_load, rank_pattern, mode)


def check_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` as early as possible for arguments that are wrong or would be ignored."""
    if uses_osd(args):
        refuse_flat_engines(args)
        read_settings(args)
        return
    if optim_name(args) in RSO_NAMES:  # `check_rso_arguments` reads these
        return
    stray = sorted(f"osd_{key}" for key in _fields(args))
    stray += [name for name in ("osd_target_modules", "osd_exclude_modules") if getattr(args, name, None) is not None]
    if stray:
        raise ValueError(
            f"{', '.join(stray)} need an OSD optimizer, but optim is {optim_name(args)!r}. Choose one of "
            f"{', '.join(OPTIM_NAMES)}."
        )
    if optim_name(args) in WITHOUT_OPTIM_ARGS and keys_of(args.optim_args) & SETTINGS.keys():
        raise ValueError(
            f"optim={optim_name(args)!r} ignores optim_args={args.optim_args!r}. For Online Subspace Descent choose "
            f"one of {', '.join(OPTIM_NAMES)}; else leave `optim_args` out."
        )


def keys_of(text: object) -> set[str]:
    """The keys of another optimizer's `optim_args`, whatever else is in there."""
    return {entry.partition("=")[0].strip() for entry in text.split(",")} if isinstance(text, str) else set()


def _convert(key: str, value: str, wanted: type) -> Any:
    kind = {int: "an integer", float: "a number", bool: "true or false"}.get(wanted, "")
    try:
        if wanted is bool:
            return {"true": True, "false": False}[value.lower()]
        return wanted(value)
    except (ValueError, KeyError):
        raise ValueError(f"{key!r} in `optim_args` must be {kind}, got {value!r}.") from None


def _is_repository(init: str) -> bool:
    """Whether `init` names a saved P, on the Hub (`user/name`) or in a folder, and not a way to start one."""
    return "/" in init or os.path.isdir(init)


def _fields(args: TrainingArguments) -> dict[str, Any]:
    return {key: value for key in SETTINGS if (value := getattr(args, f"osd_{key}", None)) is not None}


def _mode(args: TrainingArguments, given: dict[str, Any]) -> dict[str, Any]:
    """The mode, with Trainer's own clipping and accumulation where the optimizer has to do them."""
    mode = Mode(**mode_of(optim_name(args), given | {"layerwise_clipping": None}))
    if not mode.takes_gradients:
        return asdict(Mode(**given))
    if args.fp16:
        raise ValueError(
            "fp16 scales the loss, and `layerwise` and `ddp_compression` use gradients before a GradScaler could "
            "unscale them. Use bf16=True, or leave these options out."
        )
    if mode.ddp_compression is not None and args.max_grad_norm and not CAN_LEAVE_CLIPPING:
        raise ValueError(
            "This version of transformers clips gradients by itself, and `ddp_compression` leaves it only some of "
            "them. Set max_grad_norm=0, or install a newer one."
        )
    own = {"max_grad_norm": args.max_grad_norm or None}
    if mode.layerwise:
        own["gradient_accumulation"] = args.gradient_accumulation_steps > 1
    return mode_of(optim_name(args), given | own)


def target_modules_of(args: TrainingArguments) -> tuple[str | list[str], str | list[str] | None]:
    """`target_modules` and `exclude_modules`, from Trainer's own field or ours."""
    stock, own = args.optim_target_modules, getattr(args, "osd_target_modules", None)
    if stock is not None and own is not None:
        raise ValueError("Target modules are given twice: as `optim_target_modules` and as `osd_target_modules`.")
    target_modules = own if own is not None else stock
    return (ALL_LINEAR if target_modules is None else target_modules), getattr(args, "osd_exclude_modules", None)


def _adam_fields(args: TrainingArguments, options: dict[str, Any]) -> dict[str, Any]:
    """Trainer's betas and eps for the rules that use them; a value that was changed and has no user is refused."""
    rules = {options["weight_rule"], projection_rule(options | {"rank": 1})} - {None}
    used = set().union(*(rule_options(rule) for rule in rules))
    values: dict[str, Any] = {}
    for option, names in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        if option in used:
            value = tuple(getattr(args, name) for name in names)
            values[option] = value if option == "betas" else value[0]
            continue
        for name in names:
            if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` has no effect with the update rule {' and '.join(sorted(rules))}.")
    return values
