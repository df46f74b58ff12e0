"""One exchange for the rows of many P: flat buffers in which each process's part of all of them lies together.

    gather      its rows of P_1, P_2, ... from every process     ->  each P whole
    reduce      gP_1, gP_2, ..., whole, of every process's part  ->  this process's rows of the sums

Parts are as long as the longest of their P, so that one call of the backend does for all. Nothing waits before what
was sent for is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .projection import LiveProjection
from .rows import Rows


# Entries of a bucket, 16 MiB in float32, of which two are on their way at once; a larger P has one of its own.
BUCKET_LIMIT = 1 << 22


class _Layout:
    """Where each P lies in the flat part of a process."""

    def __init__(self, members: Sequence[tuple[Rows, int]]):
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
        projections (`list[LiveProjection]`): With their states.
        dtype (`torch.dtype`): That they are gathered in.
    """

    def __init__(self, projections: Sequence[LiveProjection], dtype: torch.dtype):
        members = [(_rows(P), P.geometry.rank) for P in projections]
        layout = self._layout = _Layout(members)
        parts = [P.slot.state["projection"] for P in projections]
        flat = layout.flat(1, dtype, parts[0].device).view(-1)
        pieces = [piece[: X.numel()] for piece, X in zip(flat.split(layout.lengths), parts, strict=True)]
        torch._foreach_copy_(pieces, [X.view(-1) for X in parts])
        self._work: Any
        self._flat: Tensor | None = flat  # until it has been sent
        self._all = flat.new_empty(layout.processes * layout.length)
        self._work = _collective("all_gather_single", "all_gather_into_tensor")(
            self._all, flat, group=layout.group, async_op=True
        )
        self._places = {P: index for index, P in enumerate(projections)}

    def __contains__(self, projection: LiveProjection) -> bool:
        return projection in self._places

    def take(self, projection: LiveProjection) -> Tensor:
        """P (s, r), a tensor of its own."""
        if self._work is not None:
            self._work.wait()
            self._work = self._flat = None
        layout, index, rows, r = self._layout, self._places[projection], _rows(projection), projection.geometry.rank
        own = self._all.view(layout.processes, -1).split(layout.lengths, dim=1)[index]
        return torch.cat([own[slot, : size * r] for slot, size in zip(rows.slots, rows.sizes, strict=True)]).view(
            -1, r
        )


class Reduce:
    """Sums of many gP on their way here, of one mesh.

    Args:
        stacks (`list[tuple[Rows, torch.Tensor]]`):
            (k, s, r) each, of this process's part of the gradients, with how P is divided.
    """

    def __init__(self, stacks: Sequence[tuple[Rows, Tensor]]):
        layout = _Layout([(rows, gP.shape[-1]) for rows, gP in stacks for _ in gP])
        first = stacks[0][1]
        flat = layout.flat(layout.processes, first.dtype, first.device)
        pieces, parts = [], []
        owns = iter(flat.split(layout.lengths, dim=1))
        for rows, stack in stacks:
            for gP in stack:
                own = next(owns)
                for slot, part in zip(rows.slots, gP.split(rows.sizes), strict=True):
                    pieces.append(own[slot, : part.numel()].view(part.shape))
                    parts.append(part)
        torch._foreach_copy_(pieces, parts)
        self._shapes = [(len(gP), max(rows.sizes), gP.shape[-1]) for rows, gP in stacks]
        self._sizes = [rows.local_size for rows, _ in stacks]
        self._work: Any
        self._flat: Tensor | None = flat  # until it has been sent
        self._own = flat.new_empty(layout.length)
        self._work = _collective("reduce_scatter_single", "reduce_scatter_tensor")(
            self._own, flat.view(-1), group=layout.group, async_op=True
        )

    def take(self) -> list[Tensor]:
        """Of each stack of sums the rows of this process, (k, s / processes, r)."""
        self._work.wait()
        self._work = self._flat = None
        stacks = self._own.split([k * size * r for k, size, r in self._shapes])
        shaped = zip(stacks, self._shapes, self._sizes, strict=True)
        return [stack.view(shape)[:, :size] for stack, shape, size in shaped]


def total(tensors: Sequence[Tensor], group: Any) -> None:
    """Add up tensors of all processes, each in place, in one exchange."""
    flat = torch.cat([X.reshape(-1) for X in tensors])
    torch.distributed.all_reduce(flat, group=group)
    sums = flat.split([X.numel() for X in tensors])
    torch._foreach_copy_(list(tensors), [own.view(X.shape) for own, X in zip(sums, tensors, strict=True)])


def _collective(name: str, before: str) -> Any:
    """A function of torch.distributed, by its name since torch 2.13 or the one that it had."""
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, before)


def _rows(projection: LiveProjection) -> Rows:
    rows = projection.rows
    assert rows is not None
    return rows
