"""The paper's subspaces: linear operators, rules that choose P, and ways to start it. Pure functions, torch only."""

from .initialization import choose_init, initial_projection, randomized_svd
from .online_pca import OnlinePCA, pca_gradient, pca_loss
from .operators import OPERATORS, Left, LinearOperator, Right, choose_side, effective_rank
from .protocol import SubspaceRule
from .static import Static
from .svd import PeriodicSVD
from .table import LEARNING_OPTIONS, RULE_OPTIONS, SUBSPACES, build_subspace, subspace_options


__all__ = [
    "LEARNING_OPTIONS",
    "OPERATORS",
    "RULE_OPTIONS",
    "SUBSPACES",
    "Left",
    "LinearOperator",
    "OnlinePCA",
    "PeriodicSVD",
    "Right",
    "Static",
    "SubspaceRule",
    "build_subspace",
    "choose_init",
    "choose_side",
    "effective_rank",
    "initial_projection",
    "pca_gradient",
    "pca_loss",
    "randomized_svd",
    "subspace_options",
]
