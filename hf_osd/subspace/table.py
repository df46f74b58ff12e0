"""The subspace rules by name, and those that users bring."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

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

# Options of the optimizer that only a rule that learns P uses.
LEARNING_OPTIONS = frozenset(
    {"alpha", "projection_lr", "projection_schedule", "projection_rule", "projection_weight_decay"}
)
RULE_OPTIONS = frozenset({"lambda_", "update_interval", "projection_interval", "distribution", "mixing"})

# Rules that users have passed as objects: groups of parameters name them, for they hold primitives only. The latest of
# a name counts, as of a class that is defined again in a notebook.
_USER_RULES: dict[str, SubspaceRule] = {}

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
    _USER_RULES[name] = rule
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
    if name not in _USER_RULES:
        raise ValueError(
            f"The subspace rule {name} is not known: it is neither one of {', '.join(SUBSPACES)}, nor has it been "
            "given as an object in this process. Construct the optimizer with subspace= that object."
        )
    return _USER_RULES[name]


def rule_class(name: str) -> type[SubspaceRule]:
    """The class behind a name."""
    rule = user_rule(name)
    return SUBSPACES[name] if rule is None else type(rule)


def is_rule(name: Any) -> bool:
    """Whether there is a rule of this name."""
    return isinstance(name, str) and (name in SUBSPACES or name in _USER_RULES)


def subspace_options(name: str) -> frozenset[str]:
    """Which of the optimizer's options the rule uses, of those that depend on it. A user's has its own settings."""
    rule = rule_class(name)
    own = {field.name for field in fields(rule)} if name in SUBSPACES else set()  # type: ignore[arg-type]
    return frozenset(own) | (LEARNING_OPTIONS if rule.learns else frozenset())


def build_subspace(name: str, given: Mapping[str, Any]) -> SubspaceRule:
    """The rule of this name with the optimizer's options; one that is `None` takes the rule's default."""
    rule = user_rule(name)
    if rule is not None:
        return rule
    own = subspace_options(name) & RULE_OPTIONS
    return _build(name, tuple((key, given[key]) for key in sorted(own) if given[key] is not None))


@lru_cache(maxsize=256)
def _build(name: str, settings: tuple[tuple[str, Any], ...]) -> SubspaceRule:
    return SUBSPACES[name](**dict(settings))
