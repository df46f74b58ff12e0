"""The one line that says what is perturbed, and how."""

import os

import torch.distributed as dist

from ..text import announce, format_bytes, format_count
from .optimizer import SubZero
from .weight import LowRankWeight


def announce_summary(optimizer: SubZero) -> None:
    """Say the line, on the main process."""
    among = dist.is_available() and dist.is_initialized()
    if (dist.get_rank() if among else int(os.environ.get("RANK", "0"))) == 0:
        announce(summary(optimizer))


def summary(optimizer: SubZero) -> str:
    """What is perturbed in subspaces and what densely, and what U and V take."""
    weights = optimizer.weights.weights.values()
    low_rank = [weight.W for weight in weights if isinstance(weight, LowRankWeight)]
    dense = [weight.W for weight in weights if not isinstance(weight, LowRankWeight)]
    counts = [format_count(sum(W.numel() for W in group), "M") for group in (low_rank, dense)]
    rank, following = optimizer.options.rank, len(optimizer.weights.following)
    matrices = f"{len(low_rank)} matrices in subspaces of rank {rank} ({counts[0]} parameters), " if low_rank else ""
    return (
        f"SubZero: {matrices}{counts[1]} parameters densely; {2 * optimizer.options.queries} forward passes a step, "
        f"no gradients; U and V {format_bytes(optimizer.weights.basis_bytes, smallest='MB')}"
        + (f"; V of {following} matrices follows their inputs, which no log can tell" if following else "")
    )
