"""The rules that a group's options name, built once for each set of options."""

from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ...subspace import RULE_OPTIONS, SubspaceRule, build_subspace, user_rule
from ...update_rules import MomentStorage, UpdateRule, build_rule, build_storage
from .table import projection_rule


_RULE_OPTIONS = tuple(sorted(RULE_OPTIONS))


class Rules(NamedTuple):
    """The rules of a group: the axes that its options name."""

    weight: UpdateRule
    weight_storage: MomentStorage
    subspace: SubspaceRule
    projection: UpdateRule | None  # None where P is not learned
    projection_storage: MomentStorage
    residual: str


# A group's options that its rules are made of. No function of ours, because every step asks whether they changed.
rule_options_of = itemgetter(
    *("rank", "weight_rule", "projection_rule", "subspace", *_RULE_OPTIONS),
    *("betas", "eps", "momentum", "moment_dtype", "residual"),
)


def rules_of(group: Mapping[str, Any]) -> Rules:
    """The rules of a group as its options are now: schedulers may change `betas` between steps."""
    betas = tuple(group["betas"]) if group["betas"] is not None else None
    return _rules(
        group["weight_rule"],
        projection_rule(group),
        group["subspace"],
        user_rule(group["subspace"]),
        tuple(group[name] for name in _RULE_OPTIONS),
        betas,
        group["eps"],
        group["momentum"],
        group["moment_dtype"],
        group["residual"],
    )


@lru_cache(maxsize=256)
def _rules(weight, projection, subspace, own, settings, betas, eps, momentum, moment_dtype, residual) -> Rules:
    dtype = getattr(torch, moment_dtype) if moment_dtype else None
    return Rules(
        weight=build_rule(weight, betas, eps, momentum),
        weight_storage=build_storage(weight, dtype),
        subspace=own or build_subspace(subspace, dict(zip(_RULE_OPTIONS, settings, strict=True))),
        projection=build_rule(projection, betas, eps, momentum) if projection else None,
        projection_storage=build_storage(projection or weight),
        residual=residual,
    )
