"""The subspace rules by name."""

from dataclasses import fields
from functools import lru_cache

from .online_pca import OnlinePCA
from .protocol import SubspaceRule
from .static import Static
from .svd import PeriodicSVD


SUBSPACES: dict[str, type[SubspaceRule]] = {"online_pca": OnlinePCA, "svd": PeriodicSVD, "static": Static}

# Options of the optimizer that only a rule that learns P uses.
LEARNING_OPTIONS = frozenset({"alpha", "projection_lr", "projection_rule", "projection_weight_decay"})
RULE_OPTIONS = frozenset({"lambda_", "update_interval"})


def subspace_options(name: str) -> frozenset[str]:
    """Which of the optimizer's options the rule uses, of those that depend on it."""
    own = {field.name for field in fields(SUBSPACES[name])}  # type: ignore[arg-type]
    return frozenset(own) | (LEARNING_OPTIONS if SUBSPACES[name].learns else frozenset())


@lru_cache(maxsize=256)
def build_subspace(name: str, lambda_: float | None = None, update_interval: int | None = None) -> SubspaceRule:
    """The rule of this name; an option that is `None` takes the rule's default, one that it does not use is left."""
    given = {"lambda_": lambda_, "update_interval": update_interval}
    return SUBSPACES[name](
        **{key: given[key] for key in subspace_options(name) & RULE_OPTIONS if given[key] is not None}
    )
