"""How P fares at one step, as 0-dim tensors on the device: computed in steps that are logged only.

Letters and shapes as in `subspace.operators`.
"""

import math

import torch
from torch import Tensor

from ...update_rules import GradientCheck
from .projection import LiveProjection


def observation(projection: LiveProjection, K: Tensor, check: GradientCheck) -> tuple[Tensor, Tensor]:
    """Share of the gradient's energy outside the subspace, and ||PᵀP - I|| / sqrt(r), where K = gram(R) of all."""
    geometry, errors = projection.geometry, []
    lengths = [projection.rule.length(rows, geometry.rank) for rows in geometry.factor_rows]
    factors = [X / length for X, length in zip(geometry.op.split(projection.read()), lengths, strict=True)]
    for factor in factors:
        C = factor.mT @ factor
        C.diagonal().sub_(1)
        errors.append(torch.linalg.matrix_norm(C) / math.sqrt(geometry.rank))
    error = errors[0] if len(errors) == 1 else torch.stack(errors).mean()
    K = K / (lengths[0] * lengths[-1])  # of one P twice its length, of two factors the lengths of both
    return geometry.op.pca_loss(torch.cat(factors), K, check.inv_norm2), error
