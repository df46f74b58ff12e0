"""Every option of a parameter group: the general ones, and those that the rules declare.

All entrances share them: the constructor and groups of `OSD`, `create_osd_optimizer`, `optim_args` and
`OSDTrainingArguments`. A group is a flat dictionary of primitives in which `None` leaves an option to its rule.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...declare import Need, Option, check_values, number, options_of, plain, refuse_without_effect, same
from ...subspace import SUBSPACES, SubspaceRule, build_subspace, is_rule, rule_class
from ...update_rules import RULES, build_rule
from .general import RANK, Options, in_subspace, projection_sample_of


def used_rules(group: Mapping[str, Any]) -> list[str]:
    """The update rules of a group; of one without a rank those of the groups that share its options, too."""
    return sorted({group["weight_rule"], projection_rule({**group, "rank": 1})} - {None})


def _declared_by_rules() -> dict[str, Option]:
    """The options of all rules; several may declare one, whose first declaration counts but for the default."""
    subspaces = {name: options_of(rule) for name, rule in SUBSPACES.items()}
    updates = {name: options_of(entry.rule) for name, entry in RULES.items()}
    found: dict[str, Option] = {}
    for rules, needs in ((subspaces, _owned_by_subspaces), (updates, _owned_by_updates)):
        for name in dict.fromkeys(name for own in rules.values() for name in own):
            owners = tuple(rule for rule, own in rules.items() if name in own)
            first = rules[owners[0]][name]
            assert name not in found and all(rules[rule][name].check.text == first.check.text for rule in owners)
            found[name] = replace(
                first, type=first.type | None, default=None, owners=owners, needs=(*needs(owners), *first.needs)
            )
    return found


def _owned_by_subspaces(owners: tuple[str, ...]) -> tuple[Need, ...]:
    others = ", ".join(map(repr, owners))
    return RANK, Need(lambda group: group["subspace"] in owners, in_subspace(), f", or use subspace={others}")


def _owned_by_updates(owners: tuple[str, ...]) -> tuple[Need, ...]:
    return (
        Need(
            lambda group: not set(owners).isdisjoint(used_rules(group)),
            lambda group: f"with the update rule {' and '.join(used_rules(group))}",
        ),
    )


# name in a group -> its option
OPTIONS: dict[str, Option] = options_of(Options) | _declared_by_rules()
DEFAULTS: dict[str, Any] = {name: own.default for name, own in OPTIONS.items()}
LR_MULTIPLE = "lr_multiple"  # key of a group that has so many times the learning rate, by `lr_pattern`
CYCLED = ("betas", "momentum")  # what torch's schedules change in a group, beside the learning rate
PROJECTED = frozenset(name for name, own in OPTIONS.items() if RANK in own.needs)  # what only projected groups use


def validate(options: Mapping[str, Any], where: str = "OSD", names: Mapping[str, str] | None = None) -> None:
    """Raise `ValueError` unless every value has the right type and range and has an effect.

    Args:
        options (`dict`): All options, complete.
        where (`str`, *optional*): What the message calls the place where they were given.
        names (`dict[str, str]`, *optional*): What options are called there, if otherwise than in a group.
    """
    check_values(OPTIONS, options, where, names)
    # a group without a rank may share the options of those with one
    projects = options["rank"] is not None
    used = {name: own for name, own in OPTIONS.items() if projects or name not in PROJECTED}
    refuse_without_effect(used, options, where, names)
    if projects:
        _refuse_impossible_rule(options, where)


def refuse_without_rank(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that only projected groups use, where no group has a `rank`."""
    if options["rank"] is not None:
        raise ValueError("`rank` of OSD has no effect: no parameter that it is for is a matrix. Leave it out.")
    for name in sorted(PROJECTED):
        if not OPTIONS[name].has_default(options[name]):
            raise ValueError(
                f"`{name}` of OSD has no effect: no parameter group has a `rank`, so nothing is projected."
            )


def changed_by(group: Mapping[str, Any], own: Collection[str], shared: Mapping[str, Any]) -> set[str]:
    """Names of the options that a complete group, which gave those in `own`, has otherwise than its optimizer."""
    return {name for name in OPTIONS.keys() & own if not same(group[name], shared[name])}


def refuse_own_without_rank(group: Mapping[str, Any], changed: set[str], where: str) -> None:
    """Raise `ValueError` for what only projected groups use, `changed_by` a group without `rank`."""
    if group["rank"] is None:
        refuse_without_effect({name: OPTIONS[name] for name in PROJECTED & changed}, group, where)


def _refuse_impossible_rule(options: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for options that cannot be together."""
    name, weight = options["subspace"], options["weight_rule"]
    if options["source"] == "activations":
        _refuse_without_gradients(options, where)
    if options["side"] == "two_sided" and not rule_class(name).two_sided:
        raise ValueError(f"subspace={name!r} of {where} is not for side='two_sided'. Leave one of them out.")
    if build_subspace(name, options).mixes and "exp_avg" not in {m.name for m in build_rule(weight).moments((2, 2))}:
        raise ValueError(
            f"subspace={name!r} of {where} mixes in the momentum, which weight_rule={weight!r} does not keep as an "
            "average: set `mixing` to 0."
        )
    if options["scale"] == "auto" and options["unbiased"]:
        raise ValueError(
            f"scale='auto' of {where} is for P with columns of length 1: `unbiased` makes them as much longer."
        )
    if options["projection_lr"] is not None and not OPTIONS["alpha"].has_default(options["alpha"]):
        raise ValueError(
            f"`alpha` and `projection_lr` of {where} set the same thing, P's learning rate: give one of them."
        )


def _refuse_without_gradients(options: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for ways to make P that need a gradient."""
    if _renewed_from_gradients(rule_class(options["subspace"])):
        others = ", ".join(name for name, rule in SUBSPACES.items() if not _renewed_from_gradients(rule))
        raise ValueError(
            f"subspace={options['subspace']!r} of {where} is made from gradients, of which source='activations' has "
            f"none. Choose one of {others}."
        )
    if options["init"] in ("svd", "randomized_svd"):
        raise ValueError(
            f"init={options['init']!r} of {where} decomposes a gradient, of which source='activations' has none: "
            "leave it out, and P starts from the first step's activations."
        )


def _renewed_from_gradients(rule: type[SubspaceRule]) -> bool:
    return rule.reads_gradient and rule.refresh_due is not SubspaceRule.refresh_due


def projection_rule(options: Mapping[str, Any]) -> str | None:
    """The rule that P moves by: the one given, or the weights' own (Algorithm 1); `None` where P is not learned."""
    if options["rank"] is None or not rule_class(options["subspace"]).learns:
        return None
    return options["projection_rule"] or options["weight_rule"]


def decay_of_projection(options: Mapping[str, Any]) -> str:
    """The option that is P's decoupled decay: its own, or the weights' (the remark of Algorithm 1)."""
    return "weight_decay" if options["projection_weight_decay"] is None else "projection_weight_decay"


def projection_alpha(options: Mapping[str, Any], lr: float) -> float:
    """Alpha, P's learning rate over the weights'. `projection_lr` is P's at the first `lr`, and so many times it."""
    if options["projection_lr"] is None:
        return options["alpha"]
    if not lr > 0:
        raise ValueError(f"`projection_lr` needs a positive initial `lr` to follow the schedule of, got lr={lr!r}.")
    return options["projection_lr"] * options.get(LR_MULTIPLE, 1) / lr


def in_effect(group: Mapping[str, Any], name: str) -> Any:
    """The value that an option has in a group's steps, whoever set it; `None` where it has no effect."""
    own, value = OPTIONS[name], group[name]
    if own.unmet(group) is not None:
        return None
    if name == "projection_rule":
        return projection_rule(group)
    if name == "projection_weight_decay":
        return group[decay_of_projection(group)]
    if name == "projection_sample":
        return projection_sample_of(group)
    if value is not None or not own.owners:
        return own.unset if value is None else value
    return rule_default(next(rule for rule in (group["subspace"], *used_rules(group)) if rule in own.owners), name)


def rule_default(rule: str, name: str) -> Any:
    """The default that a rule has declared for an option."""
    return options_of(SUBSPACES.get(rule) or RULES[rule].rule)[name].default


def spell_out(group: dict[str, Any]) -> None:
    """Put what schedules cycle into a group in place of `None`, where all of its rules have one default of it."""
    for name in CYCLED if is_rule(group["subspace"]) else ():  # else a state that will not be loaded
        rules = [rule for rule in used_rules(group) if rule in OPTIONS[name].owners]
        values = {rule_default(rule, name) for rule in rules}
        if group[name] is None and group["weight_rule"] in rules and len(values) == 1:
            group[name] = values.pop()


def has_cycled(group: Mapping[str, Any], name: str) -> bool:
    """Whether the weights' rule of a group has what schedules change by this name, and a value is in the group."""
    return group[name] is not None and group["weight_rule"] in OPTIONS[name].owners


def lr_of_step(value: Any, where: str) -> Any:
    """A learning rate that somebody has put into a group, as steps take it; of a tensor a view without dimensions."""
    if getattr(value, "ndim", 0) and math.prod(value.shape) == 1:  # an array's or a tensor's only number
        value = value.reshape(())
    value = value if isinstance(value, Tensor) else plain(value)
    if not isinstance(value, Real) and getattr(value, "ndim", None) != 0:
        check_lr(value, where)
    return value


def loaded_lr(value: Any, own: Any) -> Any:
    """A saved learning rate in the form that the group has: on the device, where a graph is to read it there."""
    number = plain(value)
    return torch.full_like(own, number) if isinstance(own, Tensor) else number


def refuse_baked_lr(group: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for a tensor that a CUDA graph of the group's steps would not read."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        elsewhere = any(p.is_cuda and p.device != lr.device for p in group["params"])
        if elsewhere or lr.dtype != torch.float32:
            raise ValueError(
                f"`lr` of {where} is {lr.dtype} on {lr.device}: with `capturable` it must be float32 on the "
                "parameters' device."
            )


def warn_one_rate(groups: Sequence[Mapping[str, Any]]) -> None:
    """Say where groups have several multiples of the learning rate, and one rate: a schedule set them all alike."""
    if len({group.get(LR_MULTIPLE, 1) for group in groups}) < 2:
        return
    rates = {plain(group["lr"]) for group in groups}
    if len(rates) == 1 and rates != {0}:  # a warmup may start at 0
        warnings.warn(
            f"Every group has the learning rate {rates.pop():g}: `lr_pattern` and ratios have no effect. Give "
            "OneCycleLR and CyclicLR lists of `max_lr` and `base_lr`, one for each group.",
            stacklevel=5,
        )


def check_lr(value: Any, where: str) -> None:
    """Raise `ValueError` unless `value` is a finite number >= 0."""
    complaint = number(0).complaint(value)
    if complaint:
        raise ValueError(f"`lr` of {where} must be {complaint}, got {value!r}.")
