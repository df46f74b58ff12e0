"""The subspace rules by name, and those that users bring."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from ..declare import build, options_of
from .cosine import Cosine
from .importance import Importance
from .online_pca import OnlinePCA
from .power import PowerIteration
from .protocol import SubspaceRule
from .random import Random
from .static import Static
from .svd import PeriodicSVD


SUBSPACES: dict[str, type[SubspaceRule]] = {
    "online_pca": OnlinePCA,
    "svd": PeriodicSVD,
    "random": Random,
    "cosine": Cosine,
    "importance": Importance,
    "power": PowerIteration,
    "static": Static,
}

# Rules that users have passed as objects: groups of parameters name them, for they hold primitives only. The latest of
# a name counts, as of a class that is defined again in a notebook.
USER_RULES: dict[str, SubspaceRule] = {}

# What is useless alone: a rule that overrides one of these must override the others.
_TOGETHER = (("moves_at", "advance_"), ("code_spec", "expand"))


def name_rule(rule: SubspaceRule) -> str:
    """The name of a user's rule, by which `rule_class` and `build_subspace` find it: what it is and its settings."""
    if not is_dataclass(rule) or not rule.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(
            f"The rule {type(rule).__name__} given as `subspace` must be a frozen dataclass of its settings, for "
            "checkpoints tell rules by them: put @dataclass(frozen=True) before its class."
        )
    _refuse_incomplete(rule)
    name = repr(rule)
    USER_RULES[name] = rule
    return name


def _refuse_incomplete(rule: SubspaceRule) -> None:
    kind = type(rule)

    def overrides(method: str) -> bool:
        return getattr(kind, method) is not getattr(SubspaceRule, method)

    for methods in _TOGETHER:
        missing = [method for method in methods if not overrides(method)]
        if len(missing) == 1:
            (given,) = set(methods) - set(missing)
            raise ValueError(f"{kind.__name__} overrides `{given}`, which is nothing without `{missing[0]}`.")
    if (rule.code is None) == overrides("expand"):
        raise ValueError(f"{kind.__name__} must set `code` and override `code_spec` and `expand`, or none of them.")
    if rule.code is not None and overrides("advance_"):
        raise ValueError(
            f"{kind.__name__} keeps `code` instead of P, so `advance_` would move what is not kept: renew the code in "
            "`refresh_due` and `make`, or keep P (code = None)."
        )
    try:
        hash(rule)
    except TypeError as error:
        raise ValueError(
            f"The settings of {kind.__name__} must be hashable ({error}): take tuples for lists."
        ) from None


def user_rule(name: str) -> SubspaceRule | None:
    """The rule that a user has passed by this name, `None` for one of `SUBSPACES`.

    Raises:
        ValueError: If it has not been passed in this process.
    """
    if name in SUBSPACES:
        return None
    if name not in USER_RULES:
        raise ValueError(
            f"The subspace rule {name} is not known: it is neither one of {', '.join(SUBSPACES)}, nor has it been "
            "given as an object in this process. Construct the optimizer with subspace= that object."
        )
    return USER_RULES[name]


def rule_class(name: str) -> type[SubspaceRule]:
    """The class behind a name."""
    rule = user_rule(name)
    return SUBSPACES[name] if rule is None else type(rule)


def is_rule(name: Any) -> bool:
    """Whether there is a rule of this name."""
    return isinstance(name, str) and (name in SUBSPACES or name in USER_RULES)


def subspace_options(name: str) -> frozenset[str]:
    """Which of the optimizer's options the rule declares. A user's has its own settings."""
    return frozenset(options_of(SUBSPACES[name])) if name in SUBSPACES else frozenset()


def build_subspace(name: str, given: Mapping[str, Any]) -> SubspaceRule:
    """The rule of this name with the optimizer's options; one that is `None` takes the rule's default."""
    return user_rule(name) or build(SUBSPACES[name], given)
