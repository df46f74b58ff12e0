"""Sums of many gP in one exchange, as [`Gather`] brings many P: this process's rows of each, of all parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.gather import Layout, collective
from .rows import Rows


class Reduce:
    """Sums of many gP on their way here, of one mesh.

    Args:
        stacks (`list[tuple[Rows, torch.Tensor]]`):
            (k, s, r) each, of this process's part of the gradients, with how P is divided.
    """

    def __init__(self, stacks: Sequence[tuple[Rows, Tensor]]):
        layout = Layout([(rows, gP.shape[-1]) for rows, gP in stacks for _ in gP])
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
        self._work = collective("reduce_scatter_single", "reduce_scatter_tensor")(
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
