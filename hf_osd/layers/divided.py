"""Layers whose weights are divided by rows among processes: by FSDP2, or by tensor parallelism, which is done here.

Letters and shapes as in `product`. Process i has rows W_i of W (m, n). Tensor parallelism gives each the whole x and
lets it make its columns of y; then R needs no exchange:

    y_i = x W_iᵀ + b_i          R_i = dY_iᵀ (x P)          dx = sum_i dY_i W_i
"""

from typing import Any

import torch
from torch import Tensor, nn

from .product import SubspaceProduct


def reason_of(sharding: Any, transposed: bool) -> str | None:
    """Why a layer whose weight lies so on its mesh cannot be prepared: the rows of W must be the rows of R.

    Raises:
        ValueError: Where two dimensions of the mesh divide it.
    """
    if sum(not placement.is_replicate() for placement in sharding.placements) > 1:
        raise ValueError(
            "source='activations' goes with FSDP2 or with tensor parallelism, not with both at once: use "
            "source='gradients'."
        )
    if sharding.dim is None:
        return "it is whole on each process of a mesh"
    return None if sharding.dim == 0 and not transposed else "the dimension of its inputs is divided"


def zeros_by_rows(sharding: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A stand-in that lies like its weight, and takes no memory."""
    zero = torch.zeros(1, 1, dtype=dtype, device=device)
    return nn.Parameter(sharding.wrap(zero.expand(sharding.local_shape(shape, 0)), shape, 0))


def parallel_product(osd: Any, x: Any, W: Any, b: Any) -> Tensor:
    """The forward pass of a layer under tensor parallelism, of whose outputs each process makes its own part.

    Args:
        osd ([`LayerInfo`]): The layer's.
        x (`DTensor` or `torch.Tensor`): The inputs; what is no DTensor is the same on all processes.
        W (`DTensor`): (m, n), divided by rows.
        b (`DTensor`, *optional*): (m,), divided likewise.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = W.device_mesh
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    elif not all(placement.is_replicate() for placement in x.placements):
        x = x.redistribute(mesh, [Replicate()])
    with torch.no_grad():
        own = x.to_local()  # the very tensor that is in x, by which layers that are given it find each other
    xP, B, _ = osd.in_subspace(own, W)
    x = x.to_local(grad_placements=[Partial()])
    y = SubspaceProduct.apply(x, W.to_local(), None if b is None else b.to_local(), B.to_local(), xP, False)
    return osd.sharding.wrap(y, torch.Size([*y.shape[:-1], W.shape[0]]), y.ndim - 1)
