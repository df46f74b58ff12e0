"""From training arguments to an optimizer, strictly: one reading of `optim_args`, `osd_*` fields and Trainer's own."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainingArguments

from ..declare import ELSEWHERE, check_values, refuse_unknown
from ..hub import ProjectionState
from ..optim import ALL_LINEAR, OPTIM_NAMES, OSD, osd_kwargs, resolve
from ..optim.factory import learned_rank, warn_compiled
from ..optim.options.asked import Asked
from ..optim.options.full_size import by_size
from ..optim.options.mode import MODE_DEFAULTS, Mode, mode_of
from ..optim.options.presets import ARGUMENT_OF, KEYS, Ratio, lr_ratios
from ..optim.options.table import OPTIONS, used_rules
from ..optim.selection.patterns import RANKS, RATES
from ..optim.selection.targets import parse_modules
from ..optim.step.sharding import INT8_NOT_SHARDED
from ..subspace.initialization import INITS
from ..update_rules import rule_options
from .engines import forget_engine, refuse_flat_engines, told_by_launcher
from .optim_args import keys_of, optim_name, parse_optim_args, typed


# Optimizers of transformers that never look at `optim_args`.
WITHOUT_OPTIM_ARGS = frozenset(
    {"adamw_torch", "adamw_torch_fused", "adafactor", "adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit"}
    | {"paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"}
)


class OSDSettings(NamedTuple):
    """What a run's arguments ask of the optimizer."""

    options: dict[str, Any]
    rank_given: bool  # else the P that a run starts from may say it
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    rank_pattern: dict[str, int]
    lr_pattern: dict[str, float]
    full_size: dict[str, Any]  # what groups at full size have instead of the options
    lr_ratios: dict[str, Ratio]
    mode: dict[str, Any]
    preset: str | None


def uses_osd(args: TrainingArguments) -> bool:
    """Whether the run's optimizer is one of ours."""
    return optim_name(args) in OPTIM_NAMES


def read_settings(args: TrainingArguments) -> OSDSettings:
    """All options of a run with an `osd_` optimizer, complete and validated.

    Raises:
        ValueError: For unknown keys, wrong types and ranges, options given twice, and options without effect.
    """
    given, fields = parse_optim_args(args.optim_args), _fields(args)
    refuse_unknown(fields, KEYS, "the training arguments")
    for key in given.keys() & fields.keys():
        raise ValueError(f"{key!r} is given twice: in `optim_args` and as `osd_{key}`.")
    own = {KEYS[key].name: value for key, value in (given | fields).items()}
    preset, full_size_optim = own.pop("preset", None), own.pop("full_size_optim", None)
    rank_pattern, lr_pattern = (pattern.parse(own.pop(pattern.option, None)) for pattern in (RANKS, RATES))
    mode = _mode(args, {name: own.pop(name) for name in MODE_DEFAULTS if name in own})
    where = "the training arguments"
    ratios = lr_ratios(own, preset, where)
    options = resolve(optim_name(args), {"seed": args.seed, **own, "weight_decay": args.weight_decay}, preset, where)
    init = {"init": options["init"]}
    options |= {"init": "auto"} if _is_repository(options["init"]) else {}
    by_size(options, full_size_optim, where, ARGUMENT_OF)  # which refuses
    options |= _adam_fields(args, {*used_rules(options), full_size_optim} - {None}, where)
    options, full_size = by_size(options, full_size_optim, where, ARGUMENT_OF)
    chosen = *target_modules_of(args), rank_pattern, lr_pattern, full_size, ratios, mode, preset
    return OSDSettings(options | init, "rank" in own, *chosen)


def constructor_arguments(args: TrainingArguments, model: nn.Module | None) -> dict[str, Any]:
    """Keyword arguments of [`OSD`], for Trainer's groups of parameters or one's own.

    Args:
        args (`TrainingArguments`): With an `osd_` name as `optim`.
        model (`nn.Module`, *optional*): The model. Without it every matrix of the groups is projected.
    """
    settings = read_settings(args)
    options, start = settings.options, settings.options["init"]
    if start not in INITS:
        options["init"] = ProjectionState.from_pretrained(start)
        if not settings.rank_given:
            options["rank"] = learned_rank(options["init"]) or options["rank"]
    if model is None:
        _refuse_without_model(args, settings)
        return {"lr": args.learning_rate, **settings.mode, **options, "asked": Asked(preset=settings.preset)}
    if settings.mode["layerwise"]:  # accelerate's regions are the blocks
        warn_compiled(model, args.torch_compile and not told_by_launcher("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"))
    kwargs = osd_kwargs(
        model,
        options,
        settings.target_modules,
        settings.exclude_modules,
        rank_pattern=settings.rank_pattern,
        rank_given=settings.rank_given,
        lr_pattern=settings.lr_pattern,
        full_size=settings.full_size,
        ratios=settings.lr_ratios,
        preset=settings.preset,
    )
    kwargs["asked"] = replace(kwargs["asked"], init=start)  # by name, which what was loaded no longer tells
    return {"lr": args.learning_rate, **settings.mode, **kwargs}


def _refuse_without_model(args: TrainingArguments, settings: OSDSettings) -> None:
    by_names = settings.exclude_modules, settings.rank_pattern, settings.lr_pattern, settings.full_size
    if args.optim_target_modules or any(by_names) or any(ratio.required for ratio in settings.lr_ratios.values()):
        raise ValueError(
            f"{optim_name(args)} needs the model for its choice of layers: get_optimizer_cls_and_kwargs(args, model)."
        )
    warnings.warn(
        "Without the model every matrix is projected, embeddings and heads as well. Pass it to "
        "`get_optimizer_cls_and_kwargs`, or give groups a `rank` of their own.",
        stacklevel=2,
    )


def check_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` as early as possible for arguments that are wrong or would be ignored."""
    if uses_osd(args):
        refuse_flat_engines(args)
        options = read_settings(args).options
        if options["weight_dtype"] is not None and (args.fsdp or told_by_launcher("ACCELERATE_USE_FSDP")):
            forget_engine(args)
            raise ValueError(INT8_NOT_SHARDED)
        return
    stray = sorted(f"osd_{key}" for key in _fields(args))
    stray += ["osd_exclude_modules"] if getattr(args, "osd_exclude_modules", None) is not None else []
    if stray:
        need = "needs" if len(stray) == 1 else "need"
        raise ValueError(
            f"{', '.join(stray)} {need} an OSD optimizer, but optim is {optim_name(args)!r}. Choose one of "
            f"{', '.join(OPTIM_NAMES)}."
        )
    if optim_name(args) in WITHOUT_OPTIM_ARGS and keys_of(args.optim_args) & KEYS.keys():
        raise ValueError(
            f"optim={optim_name(args)!r} ignores optim_args={args.optim_args!r}. For Online Subspace Descent choose "
            f"one of {', '.join(OPTIM_NAMES)}; else leave `optim_args` out."
        )


def refuse_ignored_by_mode(optimizer: OSD, args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that an optimizer of the user's own, which takes gradients, would not hear of.

    One that Trainer builds has been told.
    """
    mode = optimizer.mode
    if mode.layerwise and (args.max_grad_norm or None) != mode.max_grad_norm:
        raise ValueError(
            f"Trainer would clip by max_grad_norm={args.max_grad_norm}, but this optimizer takes the gradients before "
            f"it, and clips by max_grad_norm={mode.max_grad_norm}. Give both the same (TrainingArguments: 0 for none)."
        )
    if mode.layerwise and args.gradient_accumulation_steps > 1 and not mode.gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} needs an optimizer with "
            "`gradient_accumulation=True`: this one steps with the first of them."
        )


def _is_repository(init: str) -> bool:
    """Whether `init` names a saved P, on the Hub (`user/name`) or in a folder, and not a way to start one."""
    return "/" in init or os.path.isdir(init)


def _fields(args: TrainingArguments) -> dict[str, Any]:
    # arguments that an earlier version has saved may have more
    found = {key: getattr(args, f"osd_{key}", None) for key in (*KEYS, *ELSEWHERE)}
    given = {key: value for key, value in found.items() if value is not None}
    checks = {key: own.check for key, own in KEYS.items()}
    return {key: typed(value, checks.get(key), f"`osd_{key}`") for key, value in given.items()}


def _mode(args: TrainingArguments, given: dict[str, Any]) -> dict[str, Any]:
    """The mode, with Trainer's own clipping and accumulation where the optimizer has to do them."""
    mode = Mode(**mode_of(optim_name(args), given | {"layerwise_clipping": None}))
    if not mode.layerwise:
        return asdict(Mode(**given))
    if args.fp16:
        raise ValueError(
            "fp16 scales the loss, and `layerwise` uses gradients before a GradScaler could unscale them. "
            "Use bf16=True, or leave `layerwise` out."
        )
    own = {"max_grad_norm": args.max_grad_norm or None}
    own["gradient_accumulation"] = args.gradient_accumulation_steps > 1
    return mode_of(optim_name(args), given | own)


def target_modules_of(args: TrainingArguments) -> tuple[str | list[str], str | list[str] | None]:
    """What is projected and what is not, as `parse_modules` reads it."""
    wanted, unwanted = args.optim_target_modules, getattr(args, "osd_exclude_modules", None)
    return (
        parse_modules(ALL_LINEAR if wanted is None else wanted),
        None if unwanted is None else parse_modules(unwanted),
    )


def _adam_fields(args: TrainingArguments, rules: Iterable[str], where: str) -> dict[str, Any]:
    """Trainer's betas and eps for the rules that use them; a value that was changed and has no user is refused."""
    used: frozenset[str] = frozenset().union(*map(rule_options, rules))
    values: dict[str, Any] = {}
    for option, names in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        if option in used:
            value = tuple(getattr(args, name) for name in names)
            values[option] = value if option == "betas" else value[0]
            continue
        for name in names:
            if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` has no effect with the update rule {' and '.join(sorted(rules))}.")
    check_values({name: OPTIONS[name] for name in values}, values, where, ARGUMENT_OF)
    return values
