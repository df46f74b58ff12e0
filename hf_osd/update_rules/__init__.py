"""Update rules: a direction from a gradient and its moments. A rule never sees the weight.

Each is used twice (paper, Algorithm 1): as OptimizerW on the low-rank gradient R, and as OptimizerP on the gradient
of the PCA loss.
"""

from .blockwise import require_bitsandbytes
from .protocol import GradientCheck, KeptMoment, Moment, RuleStep, UpdateRule
from .storage import (
    MIN_8BIT_SIZE,
    MIN_BLOCK_SIZE,
    BlockWise8bit,
    Dense,
    MomentStorage,
    TensorSpec,
)
from .table import RULES, build_rule, build_storage, has_carry, rule_options


__all__ = [
    "MIN_8BIT_SIZE",
    "MIN_BLOCK_SIZE",
    "RULES",
    "BlockWise8bit",
    "Dense",
    "GradientCheck",
    "KeptMoment",
    "Moment",
    "MomentStorage",
    "RuleStep",
    "TensorSpec",
    "UpdateRule",
    "build_rule",
    "build_storage",
    "has_carry",
    "require_bitsandbytes",
    "rule_options",
]
