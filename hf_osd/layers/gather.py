"""Many P on their way here in one exchange: flat buffers in which each process's rows of all of them lie together.

Parts are as long as the longest of their P, so that one call of the backend does for all. Nothing waits before what
was sent for is used.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


# Entries of a bucket, 16 MiB in float32, of which two are on their way at once; a larger P has one of its own.
BUCKET_LIMIT = 1 << 22


class Layout:
    """Where the rows of each P lie in the flat part of a process.

    Args:
        members (`Sequence[tuple[Rows, int]]`): How each (s, r) is divided, on one mesh, and r.
    """

    def __init__(self, members: Sequence[tuple[Any, int]]):
        self.lengths = [max(rows.sizes) * r for rows, r in members]
        self.length, self.group = sum(self.lengths), members[0][0].group
        self.processes = len(members[0][0].sizes)
        self.even = all(min(rows.sizes) == max(rows.sizes) for rows, _ in members)

    def flat(self, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for so many parts; zero where there will be gaps, for what nobody reads is sent, too."""
        return (torch.empty if self.even else torch.zeros)(parts, self.length, dtype=dtype, device=device)


class Gather:
    """Many P on their way here, of one mesh.

    Args:
        parts (`Mapping[Hashable, tuple[torch.Tensor, Rows]]`): This process's rows of each P, and how it is divided.
        dtype (`torch.dtype`): That they are gathered in.
    """

    def __init__(self, parts: Mapping[Any, tuple[Tensor, Any]], dtype: torch.dtype):
        self._layout = layout = Layout([(rows, X.shape[1]) for X, rows in parts.values()])
        given = [X for X, _ in parts.values()]
        flat = layout.flat(1, dtype, given[0].device).view(-1)
        pieces = [piece[: X.numel()] for piece, X in zip(flat.split(layout.lengths), given, strict=True)]
        torch._foreach_copy_(pieces, [X.view(-1) for X in given])
        self._work: Any
        self._flat: Tensor | None = flat  # until it has been sent
        self._all = flat.new_empty(layout.processes * layout.length)
        self._work = collective("all_gather_single", "all_gather_into_tensor")(
            self._all, flat, group=layout.group, async_op=True
        )
        self._places = {key: (i, rows, X.shape[1]) for i, (key, (X, rows)) in enumerate(parts.items())}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def wait(self) -> None:
        """Let what follows find what was sent for."""
        if self._work is not None:
            self._work.wait()
            self._work = self._flat = None

    def take(self, key: Hashable) -> Tensor:
        """P (s, r), a tensor of its own."""
        self.wait()
        index, rows, r = self._places[key]
        own = self._all.view(self._layout.processes, -1).split(self._layout.lengths, dim=1)[index]
        return torch.cat([own[slot, : size * r] for slot, size in zip(rows.slots, rows.sizes, strict=True)]).view(
            -1, r
        )


def narrower(P: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What P is gathered in to be used in this precision: its own if that is less, but for int8, whose floats go."""
    return P.dtype if P.is_floating_point() and P.dtype.itemsize < dtype.itemsize else dtype


def collective(name: str, before: str) -> Any:
    """A function of torch.distributed, by its name since torch 2.13 or the one that it had."""
    return getattr(dist, name, None) or getattr(dist, before)
