"""Every option of the optimizer: its type, default and check, in one table that all entrances share.

The entrances are the constructor and groups of `OSD`, `create_osd_optimizer`, `optim_args` and
`OSDTrainingArguments`. Whoever misspells a name, or gives an option that would have no effect, gets a `ValueError`.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...subspace import (
    LEARNING_OPTIONS,
    RULE_OPTIONS,
    SIDES,
    SUBSPACES,
    SubspaceRule,
    build_subspace,
    is_rule,
    rule_class,
    subspace_options,
)
from ...subspace.initialization import INITS
from ...subspace.random import DISTRIBUTIONS
from ...update_rules import RULES, build_rule, has_carry, rule_options


FLOAT_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("lr", "constant")
RESIDUALS = ("none", "scaled", "sign")
RESIDUAL_SCALINGS = ("column", "matrix")
RESIDUAL_OPTIONS = {"residual_scaling": "scaled", "residual_limit": "scaled", "residual_scale": "scaled or sign"}


@dataclass(frozen=True)
class Options:
    """The options of one parameter group, with their defaults. `OSD` documents them."""

    rank: int | None = None
    weight_rule: str = "adamw"
    projection_rule: str | None = None
    subspace: Any = "online_pca"
    alpha: float = 5.0
    projection_lr: float | None = None
    projection_schedule: str | None = None
    lambda_: float = 0.1
    scale: float = 1.0
    weight_decay: float = 0.0
    projection_weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    init: Any = "auto"
    side: str = "auto"
    update_interval: int | None = None
    projection_interval: int | None = None
    distribution: str | None = None
    mixing: float | None = None
    carry_moments: bool = False
    residual: str = "none"
    residual_scaling: str | None = None
    residual_limit: float | None = None
    residual_scale: float = 1.0
    projection_dtype: str | None = None
    moment_dtype: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Options)}
# What only projected groups use
PROJECTED_OPTIONS = sorted(
    {"subspace", "scale", "side", "init", "projection_dtype", "carry_moments", "residual", *RESIDUAL_OPTIONS}
    | LEARNING_OPTIONS
    | RULE_OPTIONS
)


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first name that is not allowed, with the nearest one and all of them."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"Unknown option `{name}` in {where}.{hint} Allowed: {', '.join(allowed)}.")


def validate(options: Mapping[str, Any], where: str = "OSD") -> None:
    """Raise `ValueError` unless every value has the right type and range and has an effect.

    Args:
        options (`dict`): All options of `Options`, complete.
        where (`str`, *optional*): What the message calls the place where they were given.
    """
    for name, check in CHECKS.items():
        value = options[name]
        if value is None and DEFAULTS[name] is None:
            continue
        complaint = check(value)
        if complaint:
            raise ValueError(f"`{name}` of {where} must be {complaint}, got {value!r}.")
    if options["rank"] is not None:
        _refuse_without_effect(options, where)
    _refuse_unused_rule_options(options, where)


def refuse_without_rank(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that only projected groups use, where no group has a `rank`."""
    for name in PROJECTED_OPTIONS:
        if not _same(options[name], DEFAULTS[name]):
            raise ValueError(
                f"`{name}` of OSD has no effect: no parameter group has a `rank`, so nothing is projected."
            )


def refuse_own_without_rank(
    group: Mapping[str, Any], own: Collection[str], shared: Mapping[str, Any], where: str
) -> None:
    """Raise `ValueError` for what a group without `rank` gives of its own that only projected groups use.

    Args:
        group (`dict`): The group, complete.
        own (`Collection[str]`): Names of the options that it gave itself.
        shared (`dict`): The optimizer's options: a group may repeat them.
        where (`str`): What the message calls the group.
    """
    for name in PROJECTED_OPTIONS if group["rank"] is None else ():
        if name in own and not _same(group[name], DEFAULTS[name]) and not _same(group[name], shared[name]):
            raise ValueError(f"`{name}` of {where} has no effect without a `rank`. Leave it out.")


def _same(a: Any, b: Any) -> bool:
    plain = (str, int, float)  # not tensors, which `init` may be
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)


def _refuse_without_effect(options: Mapping[str, Any], where: str) -> None:
    for name in sorted((LEARNING_OPTIONS | RULE_OPTIONS) - subspace_options(options["subspace"])):
        if options[name] != DEFAULTS[name]:
            others = ", ".join(repr(other) for other in SUBSPACES if name in subspace_options(other))
            raise ValueError(
                f"`{name}` of {where} has no effect with subspace={options['subspace']!r}. Leave it out, or use "
                f"subspace={others}."
            )
    for name, values in RESIDUAL_OPTIONS.items():
        if options[name] != DEFAULTS[name] and options["residual"] not in values.split(" or "):
            raise ValueError(f"`{name}` of {where} has no effect without residual={values}. Leave it out.")
    _refuse_impossible_rule(options, where)
    if options["projection_lr"] is not None and options["alpha"] != DEFAULTS["alpha"]:
        raise ValueError(
            f"`alpha` and `projection_lr` of {where} set the same thing, P's learning rate: give one of them."
        )


def _refuse_impossible_rule(options: Mapping[str, Any], where: str) -> None:
    """What a subspace rule cannot do with the other options."""
    name, weight = options["subspace"], options["weight_rule"]
    rule = rule_class(name)
    if rule.code is not None and options["projection_dtype"] is not None:
        raise ValueError(f"`projection_dtype` of {where} has no effect with subspace={name!r}, which keeps no P.")
    if not rule.uses_init and options["init"] != "auto":
        raise ValueError(f"`init` of {where} has no effect with subspace={name!r}, which makes its own P.")
    if options["side"] == "two_sided":
        if not rule.two_sided:
            raise ValueError(f"subspace={name!r} of {where} is not for side='two_sided'.")
        if options["residual_scaling"] == "column":
            raise ValueError(
                f"`residual_scaling` of {where} must be 'matrix' with side='two_sided', whose R has no columns of G."
            )
    if build_subspace(name, options).mixes and "exp_avg" not in {m.name for m in build_rule(weight).moments((2, 2))}:
        raise ValueError(
            f"subspace={name!r} of {where} mixes in the momentum, which weight_rule={weight!r} does not keep as an "
            "average: set `mixing` to 0."
        )
    if not options["carry_moments"]:
        return
    if name == "static":
        raise ValueError(f"`carry_moments` of {where} has no effect with subspace='static', whose P never moves.")
    if not has_carry(weight):
        raise ValueError(
            f"`carry_moments` of {where} is not for weight_rule={weight!r}, whose moments are means over rows and "
            "columns. Leave it out."
        )


def _refuse_unused_rule_options(options: Mapping[str, Any], where: str) -> None:
    if options["moment_dtype"] is not None and RULES[options["weight_rule"]].eight_bit:
        raise ValueError(
            f"`moment_dtype` of {where} has no effect with the 8-bit rule {options['weight_rule']!r}. Leave it out, "
            f"or use weight_rule={options['weight_rule'].removesuffix('8bit')!r}."
        )
    # Groups without a rank share the options of those with one, whose P may need them.
    rules = {options["weight_rule"], projection_rule({**options, "rank": 1})} - {None}
    used = set().union(*(rule_options(rule) for rule in rules))
    for name in ("betas", "eps", "momentum"):
        if options[name] is not None and name not in used:
            raise ValueError(f"`{name}` of {where} has no effect with the update rule {' and '.join(sorted(rules))}.")


def projection_rule(options: Mapping[str, Any]) -> str | None:
    """The rule that P moves by: the one given, or the weights' own (Algorithm 1); `None` where P is not learned."""
    if options["rank"] is None or not rule_class(options["subspace"]).learns:
        return None
    return options["projection_rule"] or options["weight_rule"]


def projection_weight_decay(options: Mapping[str, Any]) -> float:
    """P's decoupled decay: the one asked for, or the weights' own (the remark of Algorithm 1)."""
    decay = options["projection_weight_decay"]
    return options["weight_decay"] if decay is None else decay


def projection_step_size(group: Mapping[str, Any]) -> float:
    """P's learning rate at this step: alpha lr, or a constant one."""
    return group["projection_lr"] if group["projection_schedule"] == "constant" else group["alpha"] * group["lr"]


def projection_alpha(options: Mapping[str, Any], lr: float) -> float:
    """Alpha, P's learning rate over the weights'. `projection_lr` is P's at the group's first `lr`."""
    if options["projection_lr"] is None:
        return options["alpha"]
    if not lr > 0:
        raise ValueError(f"`projection_lr` needs a positive initial `lr` to follow the schedule of, got lr={lr!r}.")
    return options["projection_lr"] / lr


def _number(low: float, *, open_below: bool = False, below: float = float("inf")) -> Callable[[Any], str | None]:
    limits = f"a number {'>' if open_below else '>='} {low}" + (f" and < {below}" if below < float("inf") else "")

    def check(value: Any) -> str | None:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and value < below
        return None if fine and (value > low if open_below else value >= low) else limits

    return check


def _integer(low: int, below: int | None = None) -> Callable[[Any], str | None]:
    limits = f"an integer >= {low}" + (f" and < {below}" if below is not None else "")

    def check(value: Any) -> str | None:
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return None if fine and (below is None or value < below) else limits

    return check


def _one_of(names: Iterable[str]) -> Callable[[Any], str | None]:
    names = tuple(names)

    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in names:
            return None
        close = difflib.get_close_matches(str(value), names, n=1)
        return f"one of {', '.join(names)}" + (f" (did you mean {close[0]!r}?)" if close else "")

    return check


def _subspace(value: Any) -> str | None:
    if isinstance(value, SubspaceRule) or is_rule(value):
        return None
    complaint = _one_of(SUBSPACES)(value)
    return f"{complaint}, or an instance of a SubspaceRule" if complaint else None


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _betas(value: Any) -> str | None:
    fine = isinstance(value, (tuple, list)) and len(value) == 2
    fine = fine and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in value)
    return None if fine else "two numbers >= 0 and < 1"


def _init(value: Any) -> str | None:
    if isinstance(value, (Mapping, list, tuple)):  # of tensors, which the optimizer checks against its parameters
        return None
    return _one_of(INITS)(value) if isinstance(value, str) else f"one of {', '.join(INITS)}, or tensors"


def check_lr(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a finite number >= 0."""
    complaint = _number(0, below=float("inf"))(value) or (None if value < float("inf") else "finite")
    if complaint:
        raise ValueError(f"`lr` of {where} must be {complaint}, got {value!r}.")


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "rank": _integer(1),
    "weight_rule": _one_of(RULES),
    "projection_rule": _one_of(RULES),
    "subspace": _subspace,
    "alpha": _number(0),
    "projection_lr": _number(0),
    "projection_schedule": _one_of(SCHEDULES),
    "lambda_": _number(0),
    "scale": _number(0, open_below=True),
    "weight_decay": _number(0),
    "projection_weight_decay": _number(0),
    "betas": _betas,
    "eps": _number(0),
    "momentum": _number(0, below=1),
    "init": _init,
    "side": _one_of(("auto", *SIDES)),
    "update_interval": _integer(1),
    "projection_interval": _integer(1),
    "distribution": _one_of(DISTRIBUTIONS),
    "mixing": _number(0, below=1),
    "carry_moments": _boolean,
    "residual": _one_of(RESIDUALS),
    "residual_scaling": _one_of(RESIDUAL_SCALINGS),
    "residual_limit": _number(0),
    "residual_scale": _number(0, open_below=True),
    "projection_dtype": _one_of(FLOAT_DTYPES),
    "moment_dtype": _one_of(FLOAT_DTYPES),
    "stochastic_rounding": _boolean,
    "seed": _integer(0, below=2**32),
}
