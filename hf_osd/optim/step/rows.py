"""How the rows of P are divided among the processes of a mesh: as a DTensor's, `Shard(0)` of each mesh dimension."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from .sharding import Sharding


@dataclass(frozen=True)
class Rows(Sharding):
    """The rows of P (s, r), each on one process: also where copies of the weight's part are on several.

    Attributes:
        sizes (`tuple[int, ...]`): How many each process has, in the mesh's order: uneven, and 0 of the last ones.
        place (`int`): This process's place in that order.
    """

    sizes: tuple[int, ...]
    place: int

    @cached_property
    def slots(self) -> list[int]:
        """Place in the process group, which is by rank, of each process in the mesh's order."""
        from torch.distributed import get_process_group_ranks

        ranks = get_process_group_ranks(self.group)
        return [ranks.index(rank) for rank in self.mesh.mesh.flatten().tolist()]

    def own(self, P: Tensor) -> Tensor:
        """The rows of this process, of a whole P: a view."""
        end = list(accumulate(self.sizes))[self.place]
        return P[end - self.local_size : end]


def rows_of(sharding: Sharding, s: int) -> Rows:
    """How P (s, r) of a weight that is sharded so is divided."""
    from torch.distributed.tensor import Shard

    mesh, sizes = sharding.mesh, [s]
    for processes in mesh.shape:
        sizes = [part for size in sizes for part in _chunks(size, processes)]
    place = 0
    for coordinate, processes in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        place = place * processes + coordinate
    return Rows(mesh, (Shard(0),) * mesh.ndim, 0, sizes[place], 1, tuple(sizes), place)


def _chunks(size: int, parts: int) -> list[int]:
    """As `torch.chunk` has them, with those that are empty."""
    most = -(-size // parts)
    return [max(0, min(most, size - i * most)) for i in range(parts)]
