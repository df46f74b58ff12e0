"""The paper's subspaces: linear operators, rules that choose P, and ways to start it. Pure functions, torch only."""

from .cosine import Cosine
from .importance import Importance
from .initialization import choose_init, initial_projection, randomized_svd
from .online_pca import OnlinePCA
from .operators import Left, LinearOperator, Right, choose_side, effective_rank
from .pca import pca_gradient, pca_loss
from .power import PowerIteration
from .protocol import Movement, Start, SubspaceRule
from .random import Random
from .static import Static
from .svd import PeriodicSVD
from .table import (
    SUBSPACES,
    build_subspace,
    is_rule,
    name_rule,
    rule_class,
    subspace_options,
    user_rule,
)
from .two_sided import OPERATORS, SIDES, TwoSided, operator_of


__all__ = [
    "OPERATORS",
    "SIDES",
    "SUBSPACES",
    "Cosine",
    "Importance",
    "Left",
    "LinearOperator",
    "Movement",
    "OnlinePCA",
    "PeriodicSVD",
    "PowerIteration",
    "Random",
    "Right",
    "Start",
    "Static",
    "SubspaceRule",
    "TwoSided",
    "build_subspace",
    "choose_init",
    "choose_side",
    "effective_rank",
    "initial_projection",
    "is_rule",
    "name_rule",
    "operator_of",
    "pca_gradient",
    "pca_loss",
    "randomized_svd",
    "rule_class",
    "subspace_options",
    "user_rule",
]
