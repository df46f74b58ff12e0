"""Stacks (E, m, n) of experts' matrices that are divided among processes: which of them are here, and how each lies.

Divided in the first dimension (`Shard(0)`, as `fully_shard` and expert parallelism do) whole experts lie on each
process, many, one or none of them. They are projected there, with nothing exchanged but a new P where several hold the
same experts (HSDP). Divided in another dimension, every process has a part of each expert's matrix, which is then like
any sharded matrix.
"""

from dataclasses import replace

import torch

from .sharding import Sharding, moved


def lies_whole(sharding: Sharding | None) -> bool:
    """Whether the experts of a stack are on different processes, each of them whole."""
    return sharding is not None and sharding.dim == 0


def local_experts(sharding: Sharding, experts: int) -> tuple[int, ...]:
    """The places in the stack of those that are on this process. Nothing is exchanged."""
    from torch.distributed.tensor import distribute_tensor

    # torch's own division of as many numbers: uneven, and by two dimensions of a mesh (FSDP2 over expert parallelism)
    places = distribute_tensor(torch.arange(experts), sharding.mesh, sharding.placements, src_data_rank=None)
    return tuple(places.to_local().tolist())


def sharding_of_expert(sharding: Sharding | None) -> Sharding | None:
    """How the matrix of each expert lies; `None` for one that is on this process alone.

    Raises:
        ValueError: For copies over a mesh whose dimensions have no names.
    """
    if sharding is None or sharding.dim is None:
        return sharding
    if sharding.dim > 0:
        dim = sharding.dim - 1
        return replace(sharding, dim=dim, placements=tuple(moved(other, dim) for other in sharding.placements))
    if sharding.copies == 1:
        return None
    mesh, names = sharding.mesh, sharding.mesh.mesh_dim_names
    if names is None:
        raise ValueError("A mesh on which experts are replicated needs names for its dimensions (`mesh_dim_names`).")
    over = [i for i, other in enumerate(sharding.placements) if other.is_replicate()]
    copies = mesh[tuple(names[i] for i in over)]
    return Sharding(copies, tuple(sharding.placements[i] for i in over), None, 0, sharding.copies)
