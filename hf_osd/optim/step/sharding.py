"""Parameters that are divided among processes: DTensors, as FSDP2 (`fully_shard`) and tensor parallelism make them.

A step works on each process's own part, in plain tensors. What it needs of the whole gradient is a sum over processes:
||G||² of every parameter, in one all-reduce, and A of every projected weight, which P's gradient is made from.

The side is chosen so that nothing else is exchanged. Of rows W_i on process i,

    right:  R_i = G_i P     W_i <- W_i - lr D_i Pᵀ     A = sum_i G_iᵀ R_i                (rows divided, `Shard(0)`)
    left:   R_i = Pᵀ G_i    W_i <- W_i - lr P D_i      A = sum_i G_i R_iᵀ                (columns divided, `Shard(1)`)

The moments of R are divided like the weight. P and its own are the same on all processes, or divided by rows, see
`divided`: then A stays what it is on each process.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...update_rules import Moment


@dataclass(frozen=True)
class Sharding:
    """How one parameter lies on its mesh.

    Attributes:
        mesh (`DeviceMesh`): The processes; FSDP2's 1-D mesh, HSDP's and tensor parallelism's 2-D ones.
        placements (`tuple[Placement, ...]`): One for each mesh dimension.
        dim (`int`, *optional*): Which dimension of the parameter is divided; `None` where every process holds all.
        local_size (`int`): Its part on this process: uneven, and 0 where there are fewer rows than processes.
        copies (`int`): How many processes hold the same part.
    """

    mesh: Any
    placements: tuple[Any, ...]
    dim: int | None
    local_size: int
    copies: int

    def local_shape(self, shape: Sequence[int], dim: int | None) -> tuple[int, ...]:
        """Shape of this process's part of a tensor that is divided in `dim` like the parameter in its own."""
        return tuple(self.local_size if i == dim else size for i, size in enumerate(shape))

    @property
    def group(self) -> Any:
        """All processes of the mesh."""
        return group_of(self.mesh)

    def wrap(self, X: Tensor, shape: Sequence[int], dim: int | None) -> Tensor:
        """A DTensor of `shape` around this process's part of it."""
        from torch.distributed.tensor import DTensor, Replicate

        placements = self.placements
        if dim is None:
            placements = (Replicate(),) * len(placements)
        elif dim != self.dim:
            placements = tuple(moved(other, dim) for other in placements)
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(X, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def unwrap(self, X: Tensor) -> Tensor:
        """The process's own part of a gradient or direction, which may lie otherwise than the parameter."""
        dtensor: Any = X
        if tuple(dtensor.placements) != self.placements:
            dtensor = dtensor.redistribute(self.mesh, self.placements)
        return dtensor.to_local()

    def full(self, X: Tensor, shape: Sequence[int]) -> Tensor:
        """The whole of which X is this process's part, on every process: a temporary of that size."""
        dtensor: Any = self.wrap(X, shape, self.dim)
        return dtensor.full_tensor()

    def sum(self, X: Tensor) -> Tensor:
        """The sum over all parts, the same bits on every process. Changes X."""
        if self.mesh.size() > 1 and self.dim is not None:
            torch.distributed.all_reduce(X, group=group_of(self.mesh))
            # Copies are summed too, and divided out: groups of their own could round differently, and P would drift.
            if self.copies > 1:
                X.div_(self.copies)
        return X

    def agree(self, X: Tensor) -> Tensor:
        """X of the mesh's first process, on every process. Changes X."""
        if self.mesh.size() > 1:
            torch.distributed.broadcast(X, src=int(self.mesh.mesh.flatten()[0]), group=group_of(self.mesh))
        return X


def moved(placement: Any, dim: int) -> Any:
    """The same placement of what is divided in another dimension."""
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return placement
    parts = getattr(placement, "split_factor", None)  # of `_StridedShard`, as fused layers have it
    return Shard(dim) if parts is None else type(placement)(dim, split_factor=parts)


def sharding_of(p: Tensor, name: str) -> Sharding | None:
    """How a parameter is divided; `None` for a plain tensor.

    Raises:
        ValueError: For a DTensor that is divided in two dimensions, or not divided but summed.
    """
    if not is_sharded(p):
        return None
    dtensor: Any = p
    placements = tuple(dtensor.placements)
    # Replicate has no `dim`; `_StridedShard` (FSDP2 over tensor parallelism) has one like Shard.
    dims = {getattr(placement, "dim", None) for placement in placements if not placement.is_replicate()}
    if None in dims or len(dims) > 1:
        raise ValueError(
            f"{name} lies on its mesh as {placements}: OSD supports parameters that are divided in one dimension, as "
            "fully_shard and one direction of tensor parallelism do."
        )
    dim = dims.pop() if dims else None
    copies = 1
    for placement, size in zip(placements, dtensor.device_mesh.shape, strict=True):
        copies *= size if placement.is_replicate() else 1
    local_size = 0 if dim is None else local(p).shape[dim]
    return Sharding(dtensor.device_mesh, placements, dim, local_size, copies)


def meshes_of(params: Iterable[Tensor]) -> set[Any]:
    """The meshes of sharded parameters, and `None` for plain ones."""
    dtensors: Iterable[Any] = params
    return {p.device_mesh if is_sharded(p) else None for p in dtensors}


def divided(moment: Moment, sharding: Sharding | None, ndim: int) -> int | None:
    """The dimension of a weight's moment that is divided. R (m, r) or (r, n) is divided like G (m, n)."""
    if sharding is None or sharding.dim is None:
        return None
    dims = tuple(range(ndim)) if moment.dims is None else moment.dims
    return dims.index(sharding.dim) if sharding.dim in dims else None


def local(X: Tensor) -> Tensor:
    """The process's own part of a DTensor, a view; a plain tensor itself."""
    if not is_sharded(X):
        return X
    dtensor: Any = X
    return dtensor.to_local()


def refuse_flat(p: Tensor, name: str) -> None:
    """Raise `ValueError` for a parameter that an engine has flattened, or will flatten, into a vector of many."""
    engine = None
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        engine = "FSDP1 (FullyShardedDataParallel)"
    elif hasattr(p, "ds_id"):
        engine = "DeepSpeed ZeRO"
    if engine is not None:
        raise ValueError(f"{name} is managed by {engine}. {FLAT}")


FLAT = (
    "It hands the optimizer flat pieces of many parameters, which have no rows and columns to project. Use FSDP2: "
    "`fsdp_version: 2` in accelerate's config, `version: 2` in Trainer's `fsdp_config`, or a model from "
    "`from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))`; in a loop of your own `fully_shard`. "
    "Or use DDP."
)
INT8_NOT_SHARDED = (
    "weight_dtype='int8' is not for FSDP2 and tensor parallelism, which would shard what it is read as: use DDP, or "
    "leave it out."
)


def is_sharded(X: Tensor) -> bool:
    """Whether X is a DTensor."""
    if type(X) is Tensor or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(X, DTensor)


def group_of(mesh: Any) -> Any:
    """One process group for all of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    return _new_group(tuple(mesh.mesh.flatten().tolist()))


@lru_cache(maxsize=16)
def _new_group(ranks: tuple[int, ...]) -> Any:
    return torch.distributed.new_group(list(ranks), use_local_synchronization=True)
