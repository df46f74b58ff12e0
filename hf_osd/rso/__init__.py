"""Randomized Subspace Optimization (arXiv 2502.07222) on peft's LoRA layers: see `create_rso_model`."""

from .callback import RSOCallback
from .memory import gradient_bytes, subspace_bytes, subspace_parameters, trained_parameters
from .model import create_rso_model, rso_param_groups, unload_rso_model
from .outer_loop import OuterLoop, outer_loop
from .sampling import SAMPLINGS


__all__ = [
    "SAMPLINGS",
    "OuterLoop",
    "RSOCallback",
    "create_rso_model",
    "gradient_bytes",
    "outer_loop",
    "rso_param_groups",
    "subspace_bytes",
    "subspace_parameters",
    "trained_parameters",
    "unload_rso_model",
]
