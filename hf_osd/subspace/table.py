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

# Rules that users have passed as objects: groups of parameters name them, for they hold primitives only.
_USER_RULES: dict[str, SubspaceRule] = {}


def name_rule(rule: SubspaceRule) -> str:
    """The name of a user's rule, by which `rule_class` and `build_subspace` find it: what it is and its settings."""
    if not is_dataclass(rule) or not rule.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(
            f"The rule {type(rule).__name__} given as `subspace` must be a frozen dataclass of its settings, for "
            "checkpoints tell rules by them: put @dataclass(frozen=True) before its class."
        )
    name = repr(rule)
    _USER_RULES[name] = rule
    return name


def rule_class(name: str) -> type[SubspaceRule]:
    """The class behind a name."""
    return SUBSPACES[name] if name in SUBSPACES else type(_USER_RULES[name])


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
    if name not in SUBSPACES:
        return _USER_RULES[name]
    own = subspace_options(name) & RULE_OPTIONS
    return _build(name, tuple((key, given[key]) for key in sorted(own) if given[key] is not None))


@lru_cache(maxsize=256)
def _build(name: str, settings: tuple[tuple[str, Any], ...]) -> SubspaceRule:
    return SUBSPACES[name](**dict(settings))
