"""The rules that a group's options name, as objects."""

from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ...subspace import SubspaceRule, build_subspace
from ...subspace.table import USER_RULES
from ...update_rules import MomentStorage, UpdateRule, build_rule, build_storage
from .table import OPTIONS, projection_rule


class Rules(NamedTuple):
    """The rules of a group: the axes that its options name."""

    weight: UpdateRule
    weight_storage: MomentStorage
    subspace: SubspaceRule
    projection: UpdateRule | None  # None where P is not learned
    projection_storage: MomentStorage
    residual: str
    restarts: bool  # whether the weight's moments do, with each new P

    @property
    def moments(self) -> list[str]:
        """Names of all moments that are kept."""
        return [moment.name for rule in (self.weight, self.projection) if rule for moment in rule.moments((2, 2))]


# What the rules are made of: their names, and the options that they declare.
_NAMES: tuple[str, ...] = ("rank", "weight_rule", "projection_rule", "projection_weight_decay")
_NAMES += ("subspace", "projection_sample", "moment_dtype", "residual", "residual_sample", "restart_moments")
_NAMES += tuple(name for name, own in OPTIONS.items() if own.owners)
# A group's options that its rules are made of. No function of ours, because every step asks whether they changed.
rule_options_of = itemgetter(*_NAMES)


def rules_of(group: Mapping[str, Any]) -> Rules:
    """The rules of a group as its options are now: schedulers may change `betas` between steps."""
    values, own = rule_options_of(group), USER_RULES.get(group["subspace"])
    try:
        return _rules(values, own)
    except TypeError:  # a loaded state may have lists, which a cache does not take
        return _rules(tuple(tuple(value) if isinstance(value, list) else value for value in values), own)


@lru_cache(maxsize=256)
def _rules(values: tuple[Any, ...], own: SubspaceRule | None) -> Rules:
    group = dict(zip(_NAMES, values, strict=True))
    weight, projection, moment_dtype = group["weight_rule"], projection_rule(group), group["moment_dtype"]
    return Rules(
        weight=build_rule(weight, group),
        weight_storage=build_storage(weight, getattr(torch, moment_dtype) if moment_dtype else None),
        subspace=own or build_subspace(group["subspace"], group),
        projection=build_rule(projection, group) if projection else None,
        projection_storage=build_storage(projection or weight),
        residual=group["residual"],
        restarts=group["restart_moments"],
    )
